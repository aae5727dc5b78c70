"""A compact copy of images and their captions, made once, which training reads at full speed; and reading it.

The copy is a `datasets` DatasetDict on disk, so every tool that knows those opens it.
"""

from capcli.prepared.reader import StoredImages

__all__ = ["StoredImages"]

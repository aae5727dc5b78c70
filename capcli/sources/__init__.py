"""Sources of images: files, folders, patterns, lists and standard input."""

from capcli.sources.files import IMAGE_SUFFIXES
from capcli.sources.source import Naming, Source, open_source

__all__ = ["IMAGE_SUFFIXES", "Naming", "Source", "open_source"]

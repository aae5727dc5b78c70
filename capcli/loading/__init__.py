"""Decoder processes: entries in, one `Loaded` or `Failure` out for each, in their order, with bounded memory.

An image that crashes its decoder process, exceeds the time limit or uses too much memory becomes a failure, and the process
is replaced.

    with load(entries, decode, workers=4) as images:
        for image in images:  # Loaded | Failure
            ...
"""

from capcli.loading.loader import Loading, default_workers, load, usable_cpus
from capcli.loading.worker_main import Decode

__all__ = ["Decode", "Loading", "default_workers", "load", "usable_cpus"]

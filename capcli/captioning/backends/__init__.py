"""The backends of `capcli caption`: what turns loaded images into captions. `open_backend` chooses and opens one."""

from __future__ import annotations

from capcli.captioning.backends.base import Backend
from capcli.options import CaptionOptions
from capcli.storage.run_file import RunFile


def open_backend(options: CaptionOptions, earlier: RunFile | None) -> Backend:
    """The backend for these options, ready to caption; `earlier` is the run file of the run that this one continues.

    Raises UsageError for options that the backend or the model does not take, before weights are read where that is
    possible, and CapcliError where the model cannot be used.
    """
    if options.endpoint is not None:
        from capcli.captioning.backends.endpoint import EndpointBackend

        return EndpointBackend.open(options, options.endpoint, earlier)
    from capcli.captioning.backends.slots import SlotsBackend  # imports torch, which servers make unnecessary here

    return SlotsBackend.open(options, earlier)

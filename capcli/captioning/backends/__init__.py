"""The backends of `capcli caption`: what turns loaded images into captions. `open_backend` chooses and opens one."""

from __future__ import annotations

from capcli.captioning.backends.backend import Backend
from capcli.options import CaptionOptions
from capcli.progress import warn
from capcli.storage.run_file import RunFile


def open_backend(options: CaptionOptions, earlier: RunFile | None) -> Backend:
    """The backend for these options, ready to caption; `earlier` is the run file of the run that this one continues.

    Raises UsageError for options that the backend or the model does not take, before weights are read where that is
    possible, and CapcliError where the model cannot be used.
    """
    if options.endpoint is not None:
        from capcli.captioning.backends.endpoint_backend import EndpointBackend

        return EndpointBackend.open(options, options.endpoint, earlier)
    return open_model(options, earlier)


def open_model(options: CaptionOptions, earlier: RunFile | None) -> Backend:
    """The backend for a model on this machine. Imports torch, which servers make unnecessary."""
    from capcli.captioning.backends.generate_backend import GenerateBackend
    from capcli.captioning.backends.slots_backend import SlotsBackend
    from capcli.captioning.model import find_any_model
    from capcli.models.model_files import has_family

    files = find_any_model(options.model, options.revision, options.backend, quiet=options.quiet)
    if options.backend != "generate" and options.device != "mps" and (files.is_engine or has_family(files.config)):
        return SlotsBackend.open(options, earlier, files)
    if options.backend == "auto":
        missing = "mps" if options.device == "mps" else files.config["model_type"]
        warn(f"no decode loop for {missing} yet: using transformers' generate() (slower)")
    return GenerateBackend.open(options, files, earlier)

"""The backends of `capcli caption`: what turns loaded images into captions. `open_backend` chooses and opens one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capcli.captioning.backends.backend import Backend
from capcli.errors import UsageError
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

    files = find_any_model(
        options.model, options.revision, options.backend, adapter=options.adapter, quiet=options.quiet
    )
    if files.is_engine and options.device == "mps":
        raise UsageError(f"--device mps: no engine runs there, and {options.model} is one: leave it out")
    if options.backend != "generate" and options.device != "mps" and (files.is_engine or has_family(files.config)):
        return SlotsBackend.open(options, earlier, files)
    if runs_in_slots(options, files.config):
        from capcli.captioning.backends.vlm_backend import VlmBackend

        return VlmBackend.open(options, files, earlier)
    if options.backend == "slots":
        raise UsageError(
            f"--backend slots: there is no decode loop for {files.config['model_type']} with these options"
        )
    if options.backend == "auto":
        missing = "mps" if options.device == "mps" else files.config["model_type"]
        warn(f"no decode loop for {missing} yet: using transformers' generate() (slower)")
    return GenerateBackend.open(options, files, earlier)


def runs_in_slots(options: CaptionOptions, config: Mapping[str, Any]) -> bool:
    """Whether a vision-language model runs on the decode loop with these options."""
    from capcli.models.model_files import is_vlm

    elsewhere = options.backend == "generate" or options.device == "mps" or options.quantize is not None
    return not elsewhere and is_vlm(config)

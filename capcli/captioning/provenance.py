"""What made these captions: the receipt of a run, and whether a later run may go on from it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import numpy
import PIL
import torch
import transformers

from capcli import __version__
from capcli.captioning.captioner import Captioner
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.errors import UsageError
from capcli.models.model_files import fingerprint
from capcli.options import CaptionOptions
from capcli.progress import Report
from capcli.sinks import Sink, difference
from capcli.sources import Naming, Source


def make_run_record(
    options: CaptionOptions, source: Source, captioner: Captioner, settings: Settings, earlier: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A run's receipt, as it stands before the first image.

    What is under `settings` decides the captions: a later run goes on only where it is the same. The shapes (`with_shapes`)
    and `threads` are taken over by a run that goes on where this one was cut short: its captions are the same to the bit.
    """
    return {
        "capcli": __version__,
        "state": "running",
        "source": source.describe(),
        "folder": root_of(source, earlier),
        "model": {"name": captioner.files.name, "revision": captioner.files.revision},
        "settings": {
            "model": fingerprint(captioner.files.folder),
            "dtype": captioner.model.dtype,
            "fields": list(options.sink.fields),
            "keep_prompt": options.keep_prompt,
            **({} if options.tags_field is None else {"tags_field": options.tags_field}),
            "sidecar": options.sink.sidecar,
            "sidecar_dir": options.sink.sidecar_dir,
            "generation": settings.in_run_file(),
            **({"fast_decode": True} if options.fast_decode else {}),
            **({"gpu_decode": True} if options.gpu_decode else {}),
        },
        "images": {"max_pixels": options.max_pixels, "decode_timeout": options.decode_timeout, "order": options.order},
        "batch_size": options.batch_size,
        "device": str(captioner.model.runtime.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
            "numpy": numpy.__version__,
            **(captioner.model.engine.versions if captioner.model.engine else {}),
        },
    }


def refuse_other_settings(old: Mapping[str, Any] | None, new: Mapping[str, Any], out: str | None) -> None:
    """Raises UsageError, naming what differs, when `new` would not have made the captions that `old` made."""
    lines = [] if old is None else difference(old.get("settings", {}), new["settings"])
    if lines:
        raise UsageError(
            f"{out} was begun with other settings: {'; '.join(lines)}. Go on with those, name another --out, "
            "or start anew with --overwrite"
        )


def with_shapes(receipt: Mapping[str, Any], shapes: Shapes, settings: Settings) -> dict[str, Any]:
    """The receipt with the shapes of all tensors of the run."""
    held = {"loops": shapes.loops, "slots": shapes.slots, "chunk": shapes.chunk}
    held |= {"rows": settings.rows, "pool": settings.entries}
    return {**receipt, "shapes": held}


def root_of(source: Source, earlier: Mapping[str, Any] | None) -> str | None:
    """The folder that names in the captions file are relative to, were it only those of an earlier run."""
    return source.root if earlier is None else earlier.get("folder")


def earlier_naming(old: Mapping[str, Any] | None) -> Naming | None:
    """How an earlier run named its images."""
    return None if old is None else Naming(old.get("folder"))


def earlier_shapes(old: Mapping[str, Any] | None, device: torch.device, batch_size: int | None) -> Shapes | None:
    """The shapes of an earlier run that was cut short on such a device; one that finished binds no later one.

    None too where another batch size than then is asked for.
    """
    if old is None or old.get("state") == "finished" or not str(old.get("device")).startswith(device.type):
        return None
    if batch_size not in (None, old.get("batch_size")):
        return None
    try:
        held = old["shapes"]
        return Shapes(int(held["slots"]), int(held["chunk"]), int(held.get("loops", 1)))
    except (KeyError, TypeError, ValueError):
        return None


def finished(receipt: Mapping[str, Any], report: Report, sink: Sink, state: str) -> dict[str, Any]:
    """The receipt at the end of a run: rows and failures on record, and what this run did."""
    counts = {"captions": sink.old_captions + report.captioned, "failures": sink.failures_on_record}
    last = {"captioned": report.captioned, "failed": report.failed, "skipped": report.skipped}
    return {**receipt, "state": state, "counts": counts, "last_run": {**last, "seconds": round(report.seconds, 3)}}

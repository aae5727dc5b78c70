"""The slots backend: capcli's own decode loop, for the families in capcli.models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers

from capcli import pixels
from capcli.annotations.metadata import MetadataColumn
from capcli.captioning.answers import failing
from capcli.captioning.backends.slots_plan import (
    choose_shapes,
    decoder_processes,
    load_captioner,
    search_settings,
    settle_gpu_decode,
)
from capcli.captioning.feed import Arrivals, Deliver
from capcli.captioning.slot_captioner import SlotCaptioner
from capcli.decoding.activity import Activity
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.loading import Loading, load
from capcli.loading.gpu_jpeg import GpuJpegDecoder, GpuLoading
from capcli.models.adapters import adapter_setting
from capcli.models.encoder_text import tag_ids
from capcli.models.model_files import ModelFiles, fingerprint
from capcli.options import CaptionOptions
from capcli.progress import warn
from capcli.records import Entry
from capcli.sources import Source
from capcli.sources.dataset_images import StoredDecode
from capcli.storage.run_file import RunFile


@dataclass
class SlotsBackend:
    """A captioner with its search settings. `shapes` follow from `plan`, and shrink when device memory runs out."""

    options: CaptionOptions
    captioner: SlotCaptioner
    search: Settings
    earlier: RunFile | None = None  # of the run that this one continues
    shapes: Shapes | None = None

    def __post_init__(self) -> None:
        self._tags = MetadataColumn(self.options.tags_field) if self.options.tags_field else None

    @classmethod
    def open(cls, options: CaptionOptions, earlier: RunFile | None, files: ModelFiles | None = None) -> SlotsBackend:
        """Load the captioner. Raises UsageError for options that the model does not take, and CapcliError."""
        captioner = load_captioner(options, earlier, files)
        search = search_settings(options, captioner)
        return cls(settle_gpu_decode(options, captioner.model, earlier), captioner, search, earlier)

    @property
    def batch_size(self) -> int:
        """Images that are captioned at once, in all decode loops; 0 before `plan`."""
        return 0 if self.shapes is None else self.shapes.loops * self.shapes.slots

    @property
    def label(self) -> str:
        return f"in {self.captioner.model.dtype}"

    def settings(self) -> Mapping[str, Any]:
        options = self.options
        return {
            "model": fingerprint(self.captioner.files.folder),
            **adapter_setting(self.captioner.files),
            "dtype": self.captioner.model.dtype,
            **({} if options.tags_field is None else {"tags_field": options.tags_field}),
            "generation": self.search.in_run_file(),
            **({"fast_decode": True} if options.fast_decode else {}),
            **({"gpu_decode": True} if options.gpu_decode else {}),
        }

    def facts(self) -> Mapping[str, Any]:
        """The model, the machine, and the shapes of all tensors once they are chosen."""
        model, files = self.captioner.model, self.captioner.files
        facts = {
            "model": {"name": files.name, "revision": files.revision},
            "device": str(model.runtime.device),
            "threads": torch.get_num_threads(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **(model.engine.versions if model.engine else {}),
            },
        }
        if (shapes := self.shapes) is not None:
            rows, pool = self.search.rows, self.search.entries
            sizes = {"loops": shapes.loops, "slots": shapes.slots, "chunk": shapes.chunk, "rows": rows, "pool": pool}
            facts["shapes"] = sizes
        return facts

    def plan(self, wanted: Iterator[Entry], source: Source) -> Iterator[Entry]:
        """Choose the batch size, for which the first entries may be counted."""
        self.shapes, wanted = choose_shapes(self.options, self.captioner, self.search, wanted, source, self.earlier)
        return wanted

    def prepared(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """The entries, with the ids of their tags for an encoder that reads tags. The tags are read from metadata files."""
        tags, model = self._tags, self.captioner.model
        if tags is None:
            return entries
        ids = partial(tag_ids, model.tokenizer, count=model.tag_tokens)
        return (replace(entry, encoder_ids=ids([tags.of(entry.path)])[0]) for entry in entries)

    def load(self, entries: Iterable[Entry], facts: Collection[str]) -> Loading | GpuLoading:
        """Start the decoder processes, and the GPU's JPEG decoder where it is used."""
        options, model = self.options, self.captioner.model
        device = model.runtime.device
        start = partial(load, workers=decoder_processes(options, device), timeout=options.decode_timeout)
        arguments: dict[str, Any] = {"spec": model.spec, "max_pixels": options.max_pixels, "facts": facts}
        decode = StoredDecode(partial(pixels.load, **arguments, fast=options.fast_decode))
        if not options.gpu_decode:
            return start(entries, decode)
        keep_jpeg = StoredDecode(partial(pixels.load_or_keep, **arguments))
        return GpuLoading(entries, GpuJpegDecoder.on(device, model.spec), keep_jpeg, decode, start)

    def caption(
        self,
        arrivals: Arrivals,
        deliver: Deliver,
        *,
        stop: Callable[[], bool],
        changed: Callable[[], None],
        activity: Activity,
    ) -> Iterator[None]:
        """Run the decode loops over all arrivals; yields after every step. After a stop, images in slots are finished."""
        if self.shapes is None:
            raise RuntimeError("plan() chooses the shapes before images are captioned")

        def shrink(shapes: Shapes) -> None:
            """Record fewer slots, so that a resumed run uses the same number. Called by each loop that shrinks."""
            if self.shapes is None or shapes.slots >= self.shapes.slots:
                return
            self.shapes = shapes
            changed()
            where = f" in one of {shapes.loops} loops" if shapes.loops > 1 else ""
            warn(f"the device ran out of memory: continuing with a batch size of {shapes.slots}{where}")

        yield from self.captioner.run(
            arrivals,
            self.search,
            self.shapes,
            failing(deliver, self.options.on_bad),
            ordered=self.options.order == "source",
            keep_prompt=self.options.keep_prompt,
            stop=stop,
            on_shrink=shrink,
            activity=activity,
        )

    def notes(self) -> Iterable[str]:
        if self._tags and not self._tags.found:
            yield f"no image has tags: there is no metadata with a field {self.options.tags_field} beside or above them"

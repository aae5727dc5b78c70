"""The slots backend for vision-language models, whose processors run in decoder processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
import transformers

from capcli.captioning.answers import failing
from capcli.captioning.backends.generate_backend import given_of, open_settings, refuse_slots_options
from capcli.captioning.backends.slots_plan import COUNTED, earlier_shapes, refuse_dropped
from capcli.captioning.feed import Arrivals, Deliver
from capcli.captioning.processed import ProcessedDecode
from capcli.captioning.vlm_captioner import VlmCaptioner, VlmSettings, load_vlm
from capcli.decoding.activity import Activity
from capcli.decoding.settings import idle
from capcli.decoding.shapes import Shapes, useful_slots
from capcli.loading import Loading, default_workers, load, usable_cpus
from capcli.models.adapters import adapter_setting
from capcli.models.auto import text_files
from capcli.models.model_files import ModelFiles, fingerprint
from capcli.options import CaptionOptions
from capcli.progress import warn
from capcli.records import Entry
from capcli.sources import Source
from capcli.sources.dataset_images import StoredDecode
from capcli.storage.run_file import RunFile


@dataclass
class VlmBackend:
    """A captioner with its settings. `shapes` follow from `plan`, and shrink when device memory runs out."""

    options: CaptionOptions
    captioner: VlmCaptioner
    search: VlmSettings
    earlier: RunFile | None = None  # of the run that this one continues
    shapes: Shapes | None = None

    @classmethod
    def open(cls, options: CaptionOptions, files: ModelFiles, earlier: RunFile | None) -> VlmBackend:
        """Load the model. Raises UsageError for options that the model does not take, and CapcliError."""
        refuse_slots_options(options)
        captioner = load_vlm(files, *open_settings(options, earlier))
        if earlier is not None and earlier.has_captions:
            captioner.assume_usable()
        search = captioner.settings(options.generation, given_of(options, captioner.auto, files))
        refuse_dropped(options, search.search.num_return_sequences)
        for line in idle(options.generation, search.search):
            warn(line)
        return cls(options, captioner, search, earlier)

    @property
    def label(self) -> str:
        return f"in {self.captioner.dtype}"

    def settings(self) -> Mapping[str, Any]:
        given = self.search.given
        return {
            "model": fingerprint(self.captioner.files.folder, text_files),
            **adapter_setting(self.captioner.files),
            "dtype": self.captioner.dtype,
            "prompt": given.prompt,
            "system": given.system,
            "max_image_edge": given.max_edge,
            "generation": self.search.search.in_run_file(),
        }

    def facts(self) -> Mapping[str, Any]:
        files = self.captioner.files
        facts: dict[str, Any] = {
            "model": {"name": files.name, "revision": files.revision},
            "prompt": self.captioner.auto.write(self.search.given.prompt, self.search.given.system),
            "device": str(self.captioner.device),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if (shapes := self.shapes) is not None:
            search = self.search.search
            sizes = {"loops": 1, "slots": shapes.slots, "chunk": shapes.chunk, "rows": search.rows}
            facts["shapes"] = {**sizes, "pool": search.prompt_room - 1 + search.entries}
        return facts

    def plan(self, wanted: Iterator[Entry], source: Source) -> Iterator[Entry]:
        """Choose the batch size, for which the first entries may be counted."""
        device, batch_size = self.captioner.device, self.options.batch_size
        self.shapes = earlier_shapes(self.earlier, device, batch_size)
        if self.shapes is not None:
            return wanted
        first: list[Entry] = []
        count = None
        if not source.streaming:
            most = batch_size or COUNTED * useful_slots(device, self.search.search)
            first = list(islice(wanted, most))
            count = len(first) if len(first) < most else None
        self.shapes = self.captioner.shapes(self.search, count, batch_size)
        return chain(first, wanted)

    def prepared(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """The entries, with their prompts where these contain fields of the metadata beside the images."""
        prompts = self.search.given.prompts
        return entries if prompts is None else prompts.prepared(entries)

    def load(self, entries: Iterable[Entry], facts: Collection[str]) -> Loading:
        """Start the decoder processes, which run the model's processor."""
        options, captioner = self.options, self.captioner
        workers = options.workers
        if workers is None:
            workers = default_workers(usable_cpus(), on_gpu=captioner.device.type == "cuda")
        decode = ProcessedDecode(captioner.files, self.search.given, options.max_pixels, facts)
        return load(entries, StoredDecode(decode, prompts=True), workers=workers, timeout=options.decode_timeout)

    def caption(
        self,
        arrivals: Arrivals,
        deliver: Deliver,
        *,
        stop: Callable[[], bool],
        changed: Callable[[], None],
        activity: Activity,
    ) -> Iterator[None]:
        """Run the decode loop over all arrivals; yields after every step. After a stop, images in slots are finished."""
        if self.shapes is None:
            raise RuntimeError("plan() chooses the shapes before images are captioned")

        def shrink(shapes: Shapes) -> None:
            self.shapes = shapes
            changed()
            warn(f"the device ran out of memory: continuing with a batch size of {shapes.slots}")

        yield from self.captioner.run(
            arrivals,
            self.search,
            self.shapes,
            failing(deliver, self.options.on_bad),
            ordered=self.options.order == "source",
            stop=stop,
            on_shrink=shrink,
            activity=activity,
        )

    def notes(self) -> Iterable[str]:
        return ()

"""The generate backend: transformers' own `generate()`, for every model that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import transformers

from capcli import pixels
from capcli.captioning.answers import failing
from capcli.captioning.backends.slots_plan import refuse_dropped
from capcli.captioning.feed import Arrivals, Deliver
from capcli.captioning.generate_captioner import GenerateCaptioner, GenerateSettings, load_generate
from capcli.captioning.model import choose_dtype
from capcli.captioning.processed import Given
from capcli.captioning.prompts import Prompts
from capcli.decoding.activity import Activity
from capcli.errors import UsageError
from capcli.loading import Loading, default_workers, load, usable_cpus
from capcli.models.adapters import adapter_setting
from capcli.models.auto import AutoModel, text_files
from capcli.models.dtypes import choose_device
from capcli.models.families import FILES
from capcli.models.model_files import ModelFiles, fingerprint
from capcli.options import CaptionOptions
from capcli.progress import warn
from capcli.records import Entry
from capcli.sources import Source
from capcli.sources.dataset_images import StoredDecode
from capcli.storage.run_file import RunFile

NOT_SETTINGS = ("transformers_version", "return_dict_in_generate", "output_logits", "output_scores")


@dataclass
class GenerateBackend:
    """A captioner with its settings. `batch` follows from `plan`, and shrinks when memory runs out."""

    options: CaptionOptions
    captioner: GenerateCaptioner
    search: GenerateSettings
    batch: int = 1

    @classmethod
    def open(cls, options: CaptionOptions, files: ModelFiles, earlier: RunFile | None) -> GenerateBackend:
        """Load the model. Raises UsageError for options that only the slots backend has, and CapcliError."""
        refuse_slots_options(options)
        captioner = load_generate(files, *open_settings(options, earlier), options.quantize)
        if earlier is not None and earlier.has_captions:
            captioner.assume_usable()
        search = captioner.settings(options.generation, given_of(options, captioner.auto, files))
        refuse_dropped(options, search.generation.num_return_sequences or 1)
        return cls(options, captioner, search)

    @property
    def label(self) -> str:
        return f"in {self.captioner.dtype} by generate()"

    def settings(self) -> Mapping[str, Any]:
        search, options = self.search, self.options
        generation = search.generation.to_diff_dict()
        return {
            "backend": "generate",
            "model": fingerprint(self.captioner.files.folder, text_files),
            **adapter_setting(self.captioner.files),
            "dtype": self.captioner.dtype,
            **({} if options.quantize is None else {"quantize": options.quantize}),
            "prompt": search.given.prompt,
            "system": search.given.system,
            "max_image_edge": search.given.max_edge,
            "generation": {name: value for name, value in generation.items() if name not in NOT_SETTINGS}
            | ({"seed": search.seed} if search.generation.do_sample else {}),
        }

    def facts(self) -> Mapping[str, Any]:
        files = self.captioner.files
        return {
            "model": {"name": files.name, "revision": files.revision},
            "prompt": self.captioner.auto.write(self.search.given.prompt, self.search.given.system),
            "device": str(self.captioner.device),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "shapes": {"images": self.batch},
        }

    def plan(self, wanted: Iterator[Entry], source: Source) -> Iterator[Entry]:
        """Choose the batch size, for which the first entries may be counted."""
        self.batch = self.captioner.batch_size(self.search, self.options.batch_size, None)
        if source.streaming:
            return wanted
        first = list(islice(wanted, self.batch))
        self.batch = max(1, min(self.batch, len(first)))
        return chain(first, wanted)

    def prepared(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """The entries, with their prompts where these contain fields of the metadata beside the images."""
        prompts = self.search.given.prompts
        return entries if prompts is None else prompts.prepared(entries)

    def load(self, entries: Iterable[Entry], facts: Collection[str]) -> Loading:
        """Start the decoder processes, which send whole RGB images."""
        options = self.options
        workers = options.workers
        if workers is None:
            workers = default_workers(usable_cpus(), on_gpu=self.captioner.device.type == "cuda")
        decode = partial(
            pixels.load_whole,
            max_pixels=options.max_pixels,
            facts=facts,
            max_edge=self.search.given.max_edge,
        )
        return load(entries, StoredDecode(decode), workers=workers, timeout=options.decode_timeout)

    def caption(
        self,
        arrivals: Arrivals,
        deliver: Deliver,
        *,
        stop: Callable[[], bool],
        changed: Callable[[], None],
        activity: Activity,
    ) -> Iterator[None]:
        """Generate captions batch by batch. After a stop the batch under way is finished."""

        def shrink(batch: int) -> None:
            self.batch = batch
            changed()
            warn(f"the device ran out of memory: continuing with a batch size of {batch}")

        ordered = self.options.order == "source"
        judged = failing(deliver, self.options.on_bad)
        yield from self.captioner.run(
            arrivals, self.search, self.batch, judged, ordered=ordered, stop=stop, on_shrink=shrink, activity=activity
        )

    def notes(self) -> Iterable[str]:
        return ()


def open_settings(options: CaptionOptions, earlier: RunFile | None) -> tuple[str, torch.device]:
    """The dtype and the device of a run, and its number of threads, which is set; those of the earlier run unless given."""
    dtype: str = options.dtype
    if dtype == "auto" and earlier is not None:
        dtype = earlier.dtype or "auto"
    device = choose_device(options.device)
    if options.threads or (earlier is not None and earlier.threads):
        torch.set_num_threads(options.threads or min(earlier.threads or 1, usable_cpus()))  # type: ignore[union-attr]
    return choose_dtype(dtype, device), device


def given_of(options: CaptionOptions, auto: AutoModel, files: ModelFiles) -> Given:
    """What the options give the model beside the images."""
    is_family = files.config["model_type"] in FILES
    if options.system is not None and (is_family or not getattr(auto.processor, "chat_template", None)):
        raise UsageError(f"--system: {options.model} has no use for it: leave it out")
    edge = auto.bound_edge(options.max_image_edge)
    prompts = Prompts(options.prompt) if options.prompt is not None and not is_family else None
    return Given(options.prompt, options.system, edge, options.keep_prompt, prompts)


def refuse_slots_options(options: CaptionOptions) -> None:
    """Raises UsageError for options that the generate backend does not have."""
    given = {
        "--tags-field": options.tags_field is not None,
        "--gpu-decode": options.gpu_decode,
        "--fast-decode": options.fast_decode,
        "--dtype int8": options.dtype == "int8",
    }
    if wrong := [flag for flag, is_given in given.items() if is_given]:
        raise UsageError(f"{' and '.join(wrong)}: this model does not have it: leave it out")

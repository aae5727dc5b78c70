"""The slots backend's captioner for vision-language models: their processor, prefill and language model on the decode loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial

import torch

from capcli.captioning.feed import ArrivalFeed, Arrivals, Deliver, LocalArrivals, OrderedDelivery, Result
from capcli.captioning.processed import HOPELESS, MAX_NEW_TOKENS, Given, answer_text, whole_image
from capcli.captioning.slot_captioner import ImageLike, delivered, overflow
from capcli.decoding import noise
from capcli.decoding.activity import Activity
from capcli.decoding.loop import Finished, Job, decode_steps
from capcli.decoding.settings import Settings, resolve
from capcli.decoding.shapes import Shapes, fitting_slots, useful_slots
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.models.auto import AutoModel, blank, load_auto
from capcli.models.model_files import ModelFiles
from capcli.models.vlm import Prefill, VlmStep, vlm_family, with_ids
from capcli.options import MAX_PIXELS, GenerationOptions
from capcli.records import Candidate, Caption, Failure, Loaded
from capcli.runtimes.vlm_runtime import ROOM, VlmRuntime

SHAPES = ((1, 1), (3, 4), (4, 3), (1, 2), (2, 1))  # height and width of the images that prompts are measured with
LARGEST = 2048  # pixels of their longest edge where nothing else bounds it
CPU_SLOTS = 16  # a prefill takes seconds there, and no caption comes before all slots are filled
PROMPT_LENGTHS = ("max_length", "min_length")  # of prompt and caption together, which differ by image


@dataclass(frozen=True)
class VlmSettings:
    """What captions depend on."""

    search: Settings
    given: Given


class VlmCaptioner:
    """Captions images with one model. Use it from one thread at a time."""

    def __init__(self, auto: AutoModel, files: ModelFiles, dtype: str) -> None:
        family = vlm_family(files.config)
        self.auto, self.files, self.dtype = auto, files, dtype
        self.device: torch.device = auto.model.device
        self._succeeded, self._unusable = False, 0
        self.step = VlmStep(auto.model, family).eval()
        self.runtime = VlmRuntime(Prefill(auto.model).eval(), self.step, self.device)

    def assume_usable(self) -> None:
        """As `GenerateCaptioner.assume_usable`."""
        self._succeeded = True

    def caption(
        self,
        images: Iterable[ImageLike],
        options: GenerationOptions,
        *,
        prompt: str | None = None,
        keep_prompt: bool = False,
        tags: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[Result]:
        """As `Captioner.caption`. Raises UsageError at once for settings that the model cannot run with, and for tags."""
        if tags is not None:
            raise UsageError(f"{self.files.name} reads no tags: leave them out")
        settings = self.settings(options, Given(prompt, None, self.auto.bound_edge(None), keep_prompt))
        return self._captions(images, settings, batch_size, max_pixels)

    def _captions(
        self, images: Iterable[ImageLike], settings: VlmSettings, batch_size: int | None, max_pixels: int
    ) -> Iterator[Result]:
        shapes = self.shapes(settings, len(images) if isinstance(images, Sized) else None, batch_size)
        ready: deque[Result] = deque()
        arrivals = LocalArrivals(images, whole_image(settings.given.max_edge, max_pixels))
        for _ in self.run(arrivals, settings, shapes, lambda _, result: ready.append(result)):
            while ready:
                yield ready.popleft()

    def settings(self, options: GenerationOptions, given: Given) -> VlmSettings:
        """The settings of a run: `options`, with the model's generation_config for those that are None.

        Raises UsageError and CapcliError for settings that this model cannot run with.
        """
        own = {name: value for name, value in self.auto.generation.to_dict().items() if name not in PROMPT_LENGTHS}
        own |= {"decoder_start_token_id": 0}  # not read: each prompt has its own last token
        own["max_new_tokens"] = own.get("max_new_tokens") or MAX_NEW_TOKENS
        search = replace(resolve(own, options), prompt_room=self.prompt_room(given))
        room = self.step.positions - search.prompt_room
        if search.max_new_tokens > room:
            raise UsageError(
                f"--max-new-tokens is {search.max_new_tokens}, but the decoder accepts {self.step.positions} tokens, including "
                f"image and prompt: give at most {max(room, 0)}, or a smaller --max-image-edge"
            )
        return VlmSettings(search, given)

    def prompt_room(self, given: Given) -> int:
        """The tokens of image and prompt, the most of images of several shapes, rounded up. A longer prompt makes more room."""
        edge = min(given.max_edge or LARGEST, LARGEST)
        sizes = [(edge * height // max(height, width), edge * width // max(height, width)) for height, width in SHAPES]
        try:
            every = [given.made(self.auto.inputs, blank(*size), given.prompt) for size in sizes]
        except ImageError as error:
            raise UsageError(
                f"the model's processor takes no image with this prompt or --max-image-edge: {error}"
            ) from None
        lengths = [with_ids(inputs, self.auto.model)["input_ids"].shape[1] for inputs in every]
        return -(-max(lengths) // ROOM) * ROOM

    def shapes(self, settings: VlmSettings, count: int | None, batch_size: int | None = None) -> Shapes:
        """The slots of the run. `count` is the number of images, None where it is unknown.

        `batch_size` None: as many slots as are worthwhile and fit into device memory.
        """
        search = settings.search
        most = None if batch_size is not None else fitting_slots(self.device, self.bytes_per_slot(search))
        useful = useful_slots(self.device, search)
        if self.device.type == "cpu":
            useful = min(useful, CPU_SLOTS)
        return self.runtime.shapes(batch_size or useful, search, most, count)

    def bytes_per_slot(self, search: Settings) -> int:
        """Device memory of a slot: its pool, and several copies of a step's logits in float32."""
        return self.runtime.pool_bytes(search) + 16 * search.rows * self.step.vocabulary

    def run(
        self,
        arrivals: Arrivals,
        settings: VlmSettings,
        shapes: Shapes,
        deliver: Deliver,
        *,
        ordered: bool = True,
        stop: Callable[[], bool] = lambda: False,
        on_shrink: Callable[[Shapes], None] = lambda _: None,
        activity: Activity | None = None,
    ) -> Iterator[None]:
        """As `SlotCaptioner.run`."""
        give = OrderedDelivery(deliver).put if ordered else deliver
        feed = ArrivalFeed(arrivals, partial(self._job, settings), give, stop)
        steps = decode_steps(feed, self.runtime, settings.search, shapes, on_shrink, activity)
        yield from delivered(steps, partial(self._result, settings), give)

    def _job(self, settings: VlmSettings, index: int, loaded: Loaded) -> Job:
        """Raises ImageError for an image that the processor or the decoder cannot take."""
        loaded, inputs = settings.given.inputs(self.auto.inputs, loaded)
        inputs = with_ids(inputs, self.auto.model)
        prompt = tuple(inputs["input_ids"][0].tolist())
        search, most = settings.search, self.step.positions
        if len(prompt) + search.max_new_tokens > most:
            raise ImageError(
                "too-long",
                f"image and prompt have {len(prompt)} tokens, and the decoder accepts {most} with a caption of "
                f"{search.max_new_tokens}: give a smaller --max-image-edge or --max-new-tokens",
            )
        return Job((index, loaded), inputs, noise.key(search.seed, loaded.name), prompt=prompt)

    def _result(self, settings: VlmSettings, loaded: Loaded, done: Finished) -> Result:
        """Raises CapcliError where the model has captioned nothing yet and failed for several images."""
        if done.error is not None:
            self._unusable += not self._succeeded
            if self._unusable >= HOPELESS:
                raise CapcliError(f"{self.files.name} cannot caption: {done.error}")
            return Failure(loaded.name, "model", done.error)
        self._succeeded = True
        if not done.hypotheses:
            return overflow(loaded.name, self.dtype)
        ends = settings.search.eos_token_ids
        texts = [answer_text(self.auto, [t for t in h.tokens if t not in ends]) for h in done.hypotheses]
        kept = [settings.given.kept(text, loaded.prompt) for text in texts]
        pairs = zip(kept, done.hypotheses, strict=True)
        return Caption(loaded.name, tuple(Candidate(text, h.score) for text, h in pairs), loaded.facts)


def load_vlm(files: ModelFiles, dtype: str, device: torch.device) -> VlmCaptioner:
    """Load a captioner from a folder. Raises CapcliError where it cannot be loaded."""
    return VlmCaptioner(load_auto(files, dtype, device), files, dtype)

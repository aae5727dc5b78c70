"""The decode loop: images are admitted to free slots, each step decodes one token for every slot, finished slots are freed.

It does not depend on files, text or models: an image is an array with a key, a caption is a list of token ids.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Protocol

import torch

from capcli.decoding.activity import Activity, LoopActivity
from capcli.decoding.search import Hypothesis, make_search
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.decoding.slots import Slots
from capcli.errors import CapcliError

LINGER = 0.05  # seconds without a new image after which a chunk that is not full is encoded
OPENING_STEPS = 32  # longer captions are not waited for before the batch is filled


@dataclass(frozen=True, slots=True)
class Job:
    """One image to caption: what the runtime encodes, the `key` of its sampling noise, and the caller's own `tag`.

    The image is `pixels` uint8 [height, width, 3], or for a vision-language model the processor's tensors by name.
    `encoder_ids` are the token ids that the encoder reads with this image, the same number for every image of a run; empty:
    those of the settings. `prompt` is the image's own, where the settings have `prompt_room`.
    """

    tag: Any
    pixels: Any
    key: int = 0
    encoder_ids: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """A captioned job. `hypotheses` is empty where the image's memory or a caption's score is not finite.

    They are empty too where the model cannot encode the image; `error` says why.
    """

    tag: Any
    hypotheses: list[Hypothesis]
    error: str | None = None


class PromptTooLongError(Exception):
    """An image's prompt has more tokens than the buffers have room for: `needed`."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"a prompt has {needed} tokens")
        self.needed = needed


class UnencodableError(Exception):
    """The model cannot encode an image, the only one of its chunk."""


class Feed(Protocol):
    """Where jobs come from."""

    @property
    def ended(self) -> bool:
        """Whether no more jobs will come."""

    def take(self, most: int, wait: float | None) -> Sequence[Job]:
        """At most `most` of the jobs that are ready; waits up to `wait` seconds (None: no limit) for the first of them."""


class EncodedImages(Protocol):
    """A chunk of encoded images, as a runtime's `encode` returns it."""

    def ready(self) -> bool:
        """Whether encoding has finished; it may run concurrently with the steps."""


class Runtime(Protocol):
    """Executes encode and step, with memory and pool for `slots` slots.

    S slots, R rows per slot, T new tokens at most, P prefix entries of the prompt, V tokens in the vocabulary; E images in a
    chunk, W encoder token ids for each image.
    """

    device: torch.device
    lag: int  # how many steps late the finished flags are read
    # Whether encoding runs during the steps, so that a chunk should be encoded before slots are free for it.
    ahead: bool

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        """Prepares a new run with these shapes; frees the buffers of any earlier one."""

    def fewer(self, shapes: Shapes, settings: Settings) -> Shapes:
        """Shapes with about half the slots, for less memory; `shapes` itself where no smaller ones exist."""

    def encode(self, images: Sequence[Any], encoder_ids: Sequence[Sequence[int]]) -> Any:
        """Starts to encode the E `images` of jobs; returns EncodedImages, which `admit` takes.

        `encoder_ids` [E, W] are the token ids that the encoder reads, W = 0 where it reads none; a negative id is no token.
        Raises PromptTooLongError and UnencodableError.
        """

    def admit(self, encoded: Any, slots: Sequence[int]) -> torch.Tensor:
        """Puts the first n = len(slots) images of a chunk into `slots`, once it is ready.

        Returns bool [n]: whether the image's memory is finite. The previous contents of the slots are cleared.
        """

    def step(self, tokens: torch.Tensor, position: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Decodes one token per row: tokens int64 [S, R], position int64 [S], visible bool [S, R, P + R*T] -> logits [S, R, V].

        The logits are valid until the next step, which may write into the same buffer.
        """

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        """A function equivalent to `step`, to be called many times: `step` itself or a recording (a CUDA graph) of it.

        The tensors that `step` reads and writes keep their addresses.
        """


class IterableFeed:
    """A feed of jobs that are all ready."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = iter(jobs)
        self.ended = False

    def take(self, most: int, wait: float | None) -> Sequence[Job]:  # noqa: ARG002
        taken = list(islice(self._jobs, most))
        self.ended = len(taken) < most
        return taken


def decode(
    feed: Feed, runtime: Runtime, settings: Settings, shapes: Shapes, shrunk: Callable[[Shapes], None] = lambda _: None
) -> Iterator[Finished]:
    """Captions every job of `feed`, in the order in which captions finish. Errors as in `decode_steps`."""
    return chain.from_iterable(decode_steps(feed, runtime, settings, shapes, shrunk))


def decode_steps(
    feed: Feed,
    runtime: Runtime,
    settings: Settings,
    shapes: Shapes,
    shrunk: Callable[[Shapes], None] = lambda _: None,
    activity: Activity | None = None,
) -> Iterator[list[Finished]]:
    """`decode` step by step: yields the jobs that finished with each step, often none. `activity` is kept up to date.

    It also yields an empty list where the feed returned without a job. When the device runs out of memory, the jobs in
    progress start again with half the slots, and `shrunk` is called with the new shapes. They also start again, with more room,
    when a prompt has none. Raises CapcliError when not even the smallest shapes fit.
    """
    waiting: deque[Job] = deque()
    loop = (activity or Activity()).loop(settings.max_new_tokens)
    while True:
        run = None
        try:
            runtime.allocate(shapes, settings)
            run = Batch(feed, runtime, settings, shapes, waiting, loop)
            yield from run.captions()
            return
        except PromptTooLongError as error:
            settings = replace(settings, prompt_room=error.needed)
            yield start_again(run, waiting, loop)
            continue
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            fewer = runtime.fewer(shapes, settings)
            if fewer.slots >= shapes.slots:
                least = "one image fits" if shapes.slots == 1 else f"{shapes.slots} images at a time fit"
                raise CapcliError(f"not even {least} into the device's memory: {error}") from error
            yield start_again(run, waiting, loop)
            shapes = fewer
        shrunk(shapes)


def start_again(run: Batch | None, waiting: deque[Job], activity: LoopActivity) -> list[Finished]:
    """Puts the jobs in progress before those that wait; returns those that had finished already."""
    if run is None:
        return []
    waiting.extendleft(reversed([*run.slots.items, *run.encoding]))
    activity.dropped(encoding=len(run.encoding), decoding=len(run.slots.items))
    return run.unencodable


def out_of_memory(error: Exception) -> bool:
    """Whether this is one of torch's out-of-memory errors, some of which have no separate class."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


class Batch:
    """The running batch of fixed shapes. `waiting` are the jobs that have been taken from the feed and not yet encoded.

    Where encoding blocks the steps, one batch of a run, the `opening` one, decodes its first chunk to the first caption before
    it encodes another: otherwise no caption would come before all slots of all loops are filled.
    """

    def __init__(
        self,
        feed: Feed,
        runtime: Runtime,
        settings: Settings,
        shapes: Shapes,
        waiting: deque[Job],
        activity: LoopActivity,
    ) -> None:
        self.feed, self.runtime, self.shapes, self.waiting = feed, runtime, shapes, waiting
        self.activity, self.opening = activity, False
        self.encoding: list[Job] = []  # the jobs of the chunk that is encoded but not admitted yet
        self.encoded: EncodedImages | None = None
        self.encoder_ids = settings.encoder_ids
        self.slots: Slots[Job] = Slots(shapes.slots)
        self.search = make_search(settings, shapes.slots, runtime.device)
        self.readings: deque[tuple[int, torch.Tensor, torch.Tensor, Any]] = deque()  # step, and `read_flags` after it
        self.broken = torch.zeros(shapes.slots, dtype=torch.bool, device=runtime.device)  # memory is not finite
        self.last_arrival = 0.0
        self.unencodable: list[Finished] = []
        self.repeated = runtime.repeated(self.decode_token)

    def captions(self) -> Iterator[list[Finished]]:
        """The jobs that finished with each step, until the feed has ended and every slot is free."""
        while True:
            done: list[Finished] = []
            with torch.inference_mode():  # not across the yield: the caller may be training
                if self.slots.busy or self.encoding or self.waiting or self.fetch(wait=None):
                    self.fill()
                    began = time.monotonic()
                    if self.slots.busy:
                        self.step()
                        done = self.retire()
                    self.activity.stepped(time.monotonic() - began)
                elif self.feed.ended and not self.unencodable:
                    return
            done, self.unencodable = [*self.unencodable, *done], []
            yield done

    def fill(self) -> None:
        """Admits the jobs that arrived. Afterwards a slot is occupied, unless an image could not be encoded."""
        self.opening = self.opening and self.slots.now < OPENING_STEPS
        while not (self.opening and self.slots.busy):
            if not self.encoding and (self.slots.free or self.runtime.ahead) and self.fetch(wait=0):
                self.begin_encoding()
            room = self.slots.free >= len(self.encoding)
            if self.encoded and room and (self.encoded.ready() or not self.slots.busy):
                self.admit(self.encoded)
            elif self.slots.busy or (self.unencodable and not self.encoding):
                break
            else:
                self.fetch(wait=LINGER)

    def begin_encoding(self) -> None:
        """Encodes the waiting jobs, if the conditions below are met.

        Encoding takes as long for a partial chunk as for a full one, so they wait until the chunk is full or no job has come for
        LINGER seconds. Where encoding blocks the steps, they also wait until slots are free for all of them.
        """
        count = min(self.shapes.chunk, len(self.waiting))
        complete = count == self.shapes.chunk or self.feed.ended or time.monotonic() - self.last_arrival >= LINGER
        if complete and (self.runtime.ahead or self.slots.free >= count):
            self.encoding = [self.waiting.popleft() for _ in range(count)]
            full = [*self.encoding, *[self.encoding[0]] * (self.shapes.chunk - count)]
            encoder_ids = [job.encoder_ids or self.encoder_ids for job in full]
            self.opening = self.activity.encodes(count) and count > 1 and not self.runtime.ahead
            try:
                self.encoded = self.runtime.encode([job.pixels for job in full], encoder_ids)
            except UnencodableError as error:
                self.unencodable += [Finished(job.tag, [], str(error)) for job in self.encoding]
                self.encoding, self.opening = [], False
                self.activity.dropped(encoding=count, decoding=0)

    def fetch(self, wait: float | None) -> bool:
        """Takes jobs from the feed until a full chunk is waiting; returns whether any job is waiting."""
        want = self.shapes.chunk - len(self.waiting)
        if want > 0 and not self.feed.ended:
            jobs = self.feed.take(want, wait)
            if jobs:
                self.last_arrival = time.monotonic()
            self.waiting.extend(jobs)
        return bool(self.waiting)

    def admit(self, encoded: EncodedImages) -> None:
        """Moves the encoded chunk into slots. A slot whose memory is not finite ends at once."""
        jobs, self.encoding, self.encoded = self.encoding, [], None
        slots = self.slots.admit(jobs)
        finite = self.runtime.admit(encoded, slots)
        self.activity.admitted(len(jobs))
        self.search.admit(slots, [job.key for job in jobs], [job.prompt for job in jobs])
        at = torch.tensor(slots, device=self.runtime.device)
        self.broken[at] = ~finite
        self.search.ended[at] = ~finite

    def step(self) -> None:
        """One step of all slots, and the start of reading its flags."""
        self.slots.now += 1
        self.repeated()
        self.readings.append((self.slots.now, *self.read_flags()))

    def decode_token(self) -> None:
        """The next token of every row. All operations run on the device, without synchronization."""
        self.search.advance(self.runtime.step(*self.search.inputs()))

    def read_flags(self) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Copies of `ended` and `broken` [S] on the host, and the CUDA event after which they are complete (None: now)."""
        ended, broken = self.search.ended, self.broken
        if ended.device.type != "cuda":
            return ended.clone(), broken.clone(), None
        ended, broken = (x.to("cpu", non_blocking=True) for x in (ended, broken))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return ended, broken, event

    def retire(self) -> list[Finished]:
        """Frees the slots that have ended by the flags of `lag` steps ago, and returns their captions."""
        if len(self.readings) <= self.runtime.lag:
            return []
        step, ended, broken, event = self.readings.popleft()
        if event is not None:
            event.synchronize()
        slots = self.slots.finished(ended.tolist(), step)
        if not slots:
            return []
        self.opening = False
        hypotheses = self.search.hypotheses(slots)
        self.activity.finished(len(slots), max((len(h.tokens) for found in hypotheses for h in found), default=0))
        done = []
        for slot, found in zip(slots, hypotheses, strict=True):
            sound = not broken[slot] and all(math.isfinite(h.score) for h in found)
            done.append(Finished(self.slots.release(slot).tag, found if sound else []))
        return done

"""The proof that an engine says what PyTorch says, on the same pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capcli.decoding.constraints import Constraints
from capcli.decoding.loop import IterableFeed, Job, decode
from capcli.decoding.search import Hypothesis
from capcli.decoding.settings import Settings
from capcli.errors import CapcliError
from capcli.runtimes.base import SlotRuntime
from capcli.text import counted

Pixels = npt.NDArray[np.uint8]
DRAWN = 16  # images of a proof without a folder
SLOTS = 8
# How far teacher-forced logits may be from PyTorch's in float32, as a share of their spread (their standard deviation).
BOUND = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3, "int8": 0.6}
FLOOR = (
    0.5  # of the captions in less than float32 are equal at least: what is damaged beyond the logits says other things
)
TIE = 1e-4  # log-probability that a choice of float32 may hang on and be a tie: what matrix shapes change
PYTORCH = "PyTorch's in float32"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What of one kind of search was the same: captions, and among those that differ, ties."""

    search: str
    captions: int
    equal: int
    ties: int


@dataclass(frozen=True, slots=True)
class ParityResult:
    """`logits` is the largest difference of teacher-forced logits in units of their spread, `bound` what it may be.

    `against` is what it was held against.
    """

    passed: bool
    failed: str | None
    images: int
    logits: float
    bound: float
    said: tuple[SearchResult, ...]
    against: str

    def line(self) -> str:
        """One line for people."""
        captions, equal = (sum(getattr(each, name) for each in self.said) for name in ("captions", "equal"))
        ties = sum(each.ties for each in self.said)
        tied = f" and {counted(ties, 'tie')}" if ties else ""
        return (
            f"proof on {counted(self.images, 'image')}: {equal} of {counted(captions, 'caption')} equal to {self.against}{tied}; "
            f"logits within {self.logits:.1e} of their spread (bound {self.bound:.0e})"
        )

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def check_parity(
    engine: SlotRuntime,
    truth: SlotRuntime,
    images: Sequence[Pixels],
    searches: Mapping[str, Settings],
    precision: str,
    batches: Sequence[int] = (SLOTS,),
    against: str = PYTORCH,
) -> ParityResult:
    """Captions `images` with both in each of these searches, and holds the logits of the same tokens against each other.

    `truth`, which people know as `against`, computes in float32, or in the engine's own precision. In float32 an engine must
    say every token alike, but for ties; in less (`precision` is a key of BOUND) its logits must stay within the bound, and
    FLOOR of the captions be equal. The engine does it with so many slots as each of `batches` says, so that every plan of
    one is proved.
    """
    true = {name: captions(truth, images, settings, SLOTS) for name, settings in searches.items()}
    if not all(each for told in true.values() for each in told):
        raise CapcliError("the captioner's own numbers overflow (NaN or infinity): its weights may be damaged")
    first = next(iter(searches))
    spoken = [each[0] for each in true[first]]
    wanted = list(forced_logits(truth, images, searches[first], spoken, SLOTS))
    said, apart = [], 0.0
    for slots in batches:
        apart = max(apart, distance(forced_logits(engine, images, searches[first], spoken, slots), wanted))
        for name, settings in searches.items():
            shown = f"{name}, {slots} slots" if len(batches) > 1 else name
            said.append(compare(shown, truth, images, settings, captions(engine, images, settings, slots), true[name]))
    bound = BOUND[precision]
    failed = None
    least = 1.0 if precision == "float32" else FLOOR
    worst = min(said, key=lambda each: each.equal + each.ties)
    if not apart <= bound:
        failed = f"its logits are {apart:.1e} of their spread from {against}, and {bound:.0e} is allowed"
    elif worst.equal + worst.ties < least * worst.captions:
        failed = f"{worst.captions - worst.equal - worst.ties} of {worst.captions} captions differ ({worst.search})"
    return ParityResult(failed is None, failed, len(images), apart, bound, tuple(said), against)


def searches(settings: Settings, beams: Sequence[int]) -> dict[str, Settings]:
    """Searches with so many beams, under the captioner's own constraints."""
    plain = replace(settings, do_sample=False, num_return_sequences=1)
    return {"greedy" if n == 1 else f"{n} beams": replace(plain, num_beams=n) for n in beams}


def captions(runtime: SlotRuntime, images: Sequence[Pixels], settings: Settings, slots: int) -> list[list[Hypothesis]]:
    jobs = [Job(index, pixels) for index, pixels in enumerate(images)]
    shapes = runtime.shapes(slots, settings)
    found = {done.tag: done.hypotheses for done in decode(IterableFeed(jobs), runtime, settings, shapes)}
    return [found[index] for index in range(len(images))]


def compare(
    search: str,
    truth: SlotRuntime,
    images: Sequence[Pixels],
    settings: Settings,
    ours: Sequence[list[Hypothesis]],
    theirs: Sequence[list[Hypothesis]],
) -> SearchResult:
    equal = ties = 0
    for image, mine, true in zip(images, ours, theirs, strict=True):
        if [h.tokens for h in mine] == [h.tokens for h in true]:
            equal += 1
        elif mine and margin(truth, image, settings, mine[0], true[0]) < TIE:
            ties += 1
    return SearchResult(search, len(theirs), equal, ties)


@torch.inference_mode()
def margin(truth: SlotRuntime, image: Pixels, settings: Settings, one: Hypothesis, other: Hypothesis) -> float:
    """The log-probability by which the search chose `other`, which is what `truth` said, over `one`.

    Greedy: at the first token that differs. Beams: of the whole captions, as their scores were before lengths divided them.
    """
    if settings.num_beams > 1:
        divisor: float = max(len(each.tokens) ** settings.length_penalty for each in (one, other))
        return abs(one.beam_score - other.beam_score) * divisor
    pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
    step, (mine, true) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
    logits = next(forced_logits(truth, [image], settings, [other], SLOTS))[step]
    said = torch.tensor([*settings.prompt, *other.tokens])
    length = torch.tensor([len(settings.prompt) + step])
    scores = Constraints(settings, "cpu").apply(logits[None, None], said[None, None], length)[0, 0]
    apart: float = (scores[mine] - scores[true]).abs().item()
    return apart


def distance(ours: Iterable[torch.Tensor], true: Iterable[torch.Tensor]) -> float:
    """The largest difference of two lots of logits, over the spread of the true ones."""
    apart = 0.0
    for mine, theirs in zip(ours, true, strict=True):
        each = ((mine - theirs).abs().max() / theirs.std()).item()
        if not math.isfinite(each):  # which no comparison would find: every one with a NaN is false
            return math.inf
        apart = max(apart, each)
    return apart


@torch.inference_mode()
def forced_logits(
    runtime: SlotRuntime, images: Sequence[Pixels], settings: Settings, spoken: Sequence[Hypothesis], slots: int
) -> Iterator[torch.Tensor]:
    """For each image [steps, V] in float32 on the CPU: of a slot's first row, all rows being given the tokens `spoken`."""
    shapes = runtime.shapes(slots, settings)
    prefix, rows, start = len(settings.prompt) - 1, settings.rows, settings.prompt[-1]
    row = torch.arange(rows, device=runtime.device)
    for first in range(0, len(images), shapes.chunk):
        group, said = images[first : first + shapes.chunk], spoken[first : first + shapes.chunk]
        runtime.allocate(shapes, settings)
        full = np.stack([*group, *[group[0]] * (shapes.chunk - len(group))])
        runtime.admit(runtime.encode(full, [settings.encoder_ids] * len(full)), range(len(group)))
        visible = torch.zeros(shapes.slots, rows, settings.entries, dtype=torch.bool, device=runtime.device)
        visible[..., :prefix] = True
        tokens = torch.full((shapes.slots, rows), start, device=runtime.device)
        position = torch.zeros(shapes.slots, dtype=torch.long, device=runtime.device)
        logits = []
        for step in range(max(len(h.tokens) for h in said)):
            visible[:, row, prefix + step * rows + row] = True
            told = runtime.step(tokens, position + step, visible)[: len(group), 0]
            logits.append(told.to("cpu", torch.float32, copy=True))  # the next step may write over it
            for seat, hypothesis in enumerate(said):
                tokens[seat] = hypothesis.tokens[step] if step < len(hypothesis.tokens) else start
        for seat, hypothesis in enumerate(said):
            yield torch.stack([each[seat] for each in logits[: len(hypothesis.tokens)]])


def draw_images(size: tuple[int, int], count: int = DRAWN) -> list[Pixels]:
    """Pictures unlike each other: coarse colour fields of different grain with bars and discs on them."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    images = []
    for number in range(count):
        rng = np.random.default_rng(number)
        grain = 2 + number % 7
        field = rng.uniform(0, 255, (grain, grain, 3))
        picture = field[rows * grain // height, columns * grain // width]
        picture += rng.normal(0, 4 * (number % 4), picture.shape)
        y, x, radius = rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width, rng.uniform(0.1, 0.3) * width
        picture[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = rng.uniform(0, 255, 3)
        bar = int(rng.uniform(0, 0.9) * width)
        picture[:, bar : bar + width // 12 + 1] = rng.uniform(0, 255, 3)
        images.append(picture.clip(0, 255).astype(np.uint8))
    return images

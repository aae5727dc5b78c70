"""The parity check: an engine's captions and logits compared with PyTorch's on the same pixels."""

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
SLOTS = 8
# The largest difference allowed between teacher-forced logits and PyTorch's in float32, in units of the latter's standard
# deviation, by the engine's precision.
BOUND = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3, "int8": 0.6}
# The share of captions that must be equal in less than float32. Damage that the logits of the first row do not show, as in
# the other rows, changes nearly all captions.
MIN_EQUAL = 0.5
# In float32, captions tie where their log-probabilities differ by less than this: the rounding of
# products depends on the shapes of matrices.
TIE = 1e-4
PYTORCH = "PyTorch's in float32"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Counts of one search: captions, equal captions, and ties among the others."""

    search: str
    captions: int
    equal: int
    ties: int


@dataclass(frozen=True, slots=True)
class ParityResult:
    """The result of a parity check. `failed` is the reason where it did not pass.

    `logits` is the largest difference of teacher-forced logits, in standard deviations of the reference's, and `bound` the
    largest one allowed. `against` names the reference.
    """

    passed: bool
    failed: str | None
    images: int
    logits: float
    bound: float
    searches: tuple[SearchResult, ...]
    against: str

    def line(self) -> str:
        """A summary in one line."""
        captions, equal, ties = (
            sum(getattr(search, name) for search in self.searches) for name in ("captions", "equal", "ties")
        )
        tied = f" and {counted(ties, 'tie')}" if ties else ""
        return (
            f"parity check on {counted(self.images, 'image')}: {equal} of {counted(captions, 'caption')} equal to "
            f"{self.against}{tied}; logits differ by {self.logits:.1e} standard deviations at most (bound {self.bound:.0e})"
        )

    def facts(self) -> dict[str, Any]:
        """The result as engine.json stores it."""
        return asdict(self)


def check_parity(
    engine: SlotRuntime,
    reference: SlotRuntime,
    images: Sequence[Pixels],
    searches: Mapping[str, Settings],
    precision: str,
    batches: Sequence[int] = (SLOTS,),
    against: str = PYTORCH,
) -> ParityResult:
    """Captions `images` with both runtimes in each of `searches`, and compares the logits of the same tokens.

    `reference`, which messages call `against`, computes in float32 or in the engine's own precision. `precision` is the
    engine's, a key of BOUND: in float32 all captions must be equal or tie; in less the logits must stay within the bound and
    MIN_EQUAL of the captions be equal. The engine captions with each number of slots in `batches`, so that every plan runs.
    Raises CapcliError where the reference's numbers are not finite.
    """
    expected = {name: captions(reference, images, settings, SLOTS) for name, settings in searches.items()}
    if not all(hypotheses for found in expected.values() for hypotheses in found):
        raise CapcliError("the captioner's own values overflow (NaN or infinity): its weights may be damaged")
    first = next(iter(searches))
    forced = [hypotheses[0] for hypotheses in expected[first]]
    wanted = list(forced_logits(reference, images, searches[first], forced, SLOTS))
    results, difference = [], 0.0
    for slots in batches:
        logits = forced_logits(engine, images, searches[first], forced, slots)
        difference = max(difference, largest_difference(logits, wanted))
        for name, settings in searches.items():
            title = f"{name}, {slots} slots" if len(batches) > 1 else name
            found = captions(engine, images, settings, slots)
            results.append(compare(title, reference, images, settings, found, expected[name]))
    bound = BOUND[precision]
    failed = None
    least = 1.0 if precision == "float32" else MIN_EQUAL
    worst = min(results, key=lambda result: result.equal + result.ties)
    if not difference <= bound:
        failed = f"its logits differ from {against} by {difference:.1e} standard deviations, and {bound:.0e} is allowed"
    elif worst.equal + worst.ties < least * worst.captions:
        failed = f"{worst.captions - worst.equal - worst.ties} of {worst.captions} captions differ ({worst.search})"
    return ParityResult(failed is None, failed, len(images), difference, bound, tuple(results), against)


def searches(settings: Settings, beams: Sequence[int]) -> dict[str, Settings]:
    """A search for each number of beams, with the constraints of `settings`."""
    plain = replace(settings, do_sample=False, num_return_sequences=1)
    return {"greedy" if n == 1 else f"{n} beams": replace(plain, num_beams=n) for n in beams}


def captions(runtime: SlotRuntime, images: Sequence[Pixels], settings: Settings, slots: int) -> list[list[Hypothesis]]:
    """The captions of each image."""
    jobs = [Job(index, pixels) for index, pixels in enumerate(images)]
    shapes = runtime.shapes(slots, settings)
    found = {done.tag: done.hypotheses for done in decode(IterableFeed(jobs), runtime, settings, shapes)}
    return [found[index] for index in range(len(images))]


def compare(
    search: str,
    reference: SlotRuntime,
    images: Sequence[Pixels],
    settings: Settings,
    found: Sequence[list[Hypothesis]],
    expected: Sequence[list[Hypothesis]],
) -> SearchResult:
    equal = ties = 0
    for image, ours, theirs in zip(images, found, expected, strict=True):
        if [h.tokens for h in ours] == [h.tokens for h in theirs]:
            equal += 1
        elif ours and margin(reference, image, settings, ours[0], theirs[0]) < TIE:
            ties += 1
    return SearchResult(search, len(expected), equal, ties)


@torch.inference_mode()
def margin(reference: SlotRuntime, image: Pixels, settings: Settings, found: Hypothesis, expected: Hypothesis) -> float:
    """The log-probability by which the reference preferred its caption `expected` to `found`.

    Greedy: at the first token that differs. Beams: of the whole captions, before division by their lengths.
    """
    if settings.num_beams > 1:
        divisor: float = max(len(hypothesis.tokens) ** settings.length_penalty for hypothesis in (found, expected))
        return abs(found.beam_score - expected.beam_score) * divisor
    pairs = enumerate(zip(found.tokens, expected.tokens, strict=False))
    step, (ours, theirs) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
    logits = next(forced_logits(reference, [image], settings, [expected], SLOTS))[step]
    history = torch.tensor([*settings.prompt, *expected.tokens])
    length = torch.tensor([len(settings.prompt) + step])
    scores = Constraints(settings, "cpu").apply(logits[None, None], history[None, None], length)[0, 0]
    difference: float = (scores[ours] - scores[theirs]).abs().item()
    return difference


def largest_difference(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """The largest difference of two series of logits in standard deviations of the expected ones; inf where one is NaN."""
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        difference = ((ours - theirs).abs().max() / theirs.std()).item()
        if not math.isfinite(difference):  # max() would skip it: comparisons with NaN are false
            return math.inf
        largest = max(largest, difference)
    return largest


@torch.inference_mode()
def forced_logits(
    runtime: SlotRuntime, images: Sequence[Pixels], settings: Settings, forced: Sequence[Hypothesis], slots: int
) -> Iterator[torch.Tensor]:
    """For each image the logits of a slot's first row, [steps, V] in float32 on the CPU; all rows get the tokens `forced`."""
    shapes = runtime.shapes(slots, settings)
    prefix, rows, start = len(settings.prompt) - 1, settings.rows, settings.prompt[-1]
    row = torch.arange(rows, device=runtime.device)
    for first in range(0, len(images), shapes.chunk):
        group, targets = images[first : first + shapes.chunk], forced[first : first + shapes.chunk]
        runtime.allocate(shapes, settings)
        padded = np.stack([*group, *[group[0]] * (shapes.chunk - len(group))])
        runtime.admit(runtime.encode(list(padded), [settings.encoder_ids] * len(padded)), range(len(group)))
        visible = torch.zeros(shapes.slots, rows, settings.entries, dtype=torch.bool, device=runtime.device)
        visible[..., :prefix] = True
        tokens = torch.full((shapes.slots, rows), start, device=runtime.device)
        position = torch.zeros(shapes.slots, dtype=torch.long, device=runtime.device)
        steps = []
        for step in range(max(len(target.tokens) for target in targets)):
            visible[:, row, prefix + step * rows + row] = True
            logits = runtime.step(tokens, position + step, visible)[: len(group), 0]
            steps.append(logits.to("cpu", torch.float32, copy=True))  # the next step may overwrite it
            for slot, target in enumerate(targets):
                tokens[slot] = target.tokens[step] if step < len(target.tokens) else start
        for slot, target in enumerate(targets):
            yield torch.stack([logits[slot] for logits in steps[: len(target.tokens)]])

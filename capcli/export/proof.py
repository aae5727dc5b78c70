"""The proof that an engine says what PyTorch says, on the same pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capcli.decoding.loop import IterableFeed, Job, Runtime, Shapes, decode
from capcli.decoding.search import Hypothesis
from capcli.decoding.settings import Settings

Pixels = npt.NDArray[np.uint8]
DRAWN = 16  # images of a proof without a folder
# How far teacher-forced logits may be from PyTorch's in float32, as a share of their spread (their standard deviation).
BOUND = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3, "int8": 0.6}
TIE = 1e-4  # mean log-probability by which two captions of float32 may differ and be a tie: what matrix shapes change


@dataclass(frozen=True, slots=True)
class Said:
    """What of one kind of search was the same: captions, and among those that differ, ties."""

    search: str
    captions: int
    equal: int
    ties: int


@dataclass(frozen=True, slots=True)
class Proof:
    """`logits` is the largest difference of teacher-forced logits in units of their spread, `bound` what it may be."""

    passed: bool
    failed: str | None
    images: int
    logits: float
    bound: float
    said: tuple[Said, ...]

    def line(self) -> str:
        """One line for people."""
        captions, equal = (sum(getattr(each, name) for each in self.said) for name in ("captions", "equal"))
        ties = sum(each.ties for each in self.said)
        tied = f" and {ties} ties" if ties else ""
        return (
            f"proof on {self.images} images: {equal} of {captions} captions equal to PyTorch's in float32{tied}; "
            f"logits within {self.logits:.1e} of their spread (bound {self.bound:.0e})"
        )

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def prove(engine: Runtime, truth: Runtime, images: Sequence[Pixels], settings: Settings, precision: str) -> Proof:
    """Captions `images` with both, greedily and with beams, and holds the logits of the same tokens against each other.

    `truth` computes in float32. In float32 an engine must say every token alike, but for ties; in less (`precision` is a
    key of BOUND) its logits must stay within the bound, and how many captions are equal is told.
    """
    searches = searched(settings)
    greedy = searches["greedy"]
    told = {name: (captions(engine, images, s), captions(truth, images, s)) for name, s in searches.items()}
    apart = logit_distance(engine, truth, images, greedy, [each[0] for each in told["greedy"][1]])
    said = tuple(compare(name, *both) for name, both in told.items())
    bound = BOUND[precision]
    failed = None
    if not apart <= bound:
        failed = f"its logits are {apart:.1e} of their spread from PyTorch's, and {bound:.0e} is allowed"
    elif precision == "float32" and any(each.equal + each.ties < each.captions for each in said):
        worst = next(each for each in said if each.equal + each.ties < each.captions)
        failed = f"{worst.captions - worst.equal - worst.ties} of {worst.captions} captions differ ({worst.search})"
    return Proof(failed is None, failed, len(images), apart, bound, said)


def searched(settings: Settings) -> dict[str, Settings]:
    """Greedy and beams, under the captioner's own constraints."""
    plain = replace(settings, do_sample=False, num_return_sequences=1, num_beams=1)
    return {"greedy": plain, "4 beams": replace(plain, num_beams=4)}


def captions(runtime: Runtime, images: Sequence[Pixels], settings: Settings) -> list[list[Hypothesis]]:
    jobs = [Job(index, pixels) for index, pixels in enumerate(images)]
    found = {d.tag: d.hypotheses for d in decode(IterableFeed(jobs), runtime, settings, Shapes.of(min(8, len(jobs))))}
    return [found[index] for index in range(len(images))]


def compare(search: str, ours: Sequence[list[Hypothesis]], theirs: Sequence[list[Hypothesis]]) -> Said:
    equal = ties = 0
    for mine, true in zip(ours, theirs, strict=True):
        if [h.tokens for h in mine] == [h.tokens for h in true]:
            equal += 1
        elif mine and true and abs(mine[0].score - true[0].score) < TIE:
            ties += 1
    return Said(search, len(theirs), equal, ties)


@torch.inference_mode()
def logit_distance(
    engine: Runtime, truth: Runtime, images: Sequence[Pixels], settings: Settings, spoken: Sequence[Hypothesis]
) -> float:
    """The largest difference of both logits where both are given the tokens `spoken`, over the spread of the true ones."""
    ours, theirs = (forced_logits(runtime, images, settings, spoken) for runtime in (engine, truth))
    apart = 0.0
    for one, other, hypothesis in zip(ours, theirs, spoken, strict=True):
        mine, true = one[: len(hypothesis.tokens)], other[: len(hypothesis.tokens)]
        apart = max(apart, ((mine - true).abs().max() / true.std()).item())
    return apart if apart == apart else float("inf")


def forced_logits(
    runtime: Runtime, images: Sequence[Pixels], settings: Settings, spoken: Sequence[Hypothesis]
) -> torch.Tensor:
    """[images, steps, V] in float32 on the CPU."""
    count, steps = len(images), max(len(h.tokens) for h in spoken)
    runtime.allocate(Shapes(count, count), settings)
    runtime.admit(np.stack(list(images)), range(count))
    prefix = len(settings.prompt) - 1
    visible = torch.zeros(count, 1, settings.entries, dtype=torch.bool, device=runtime.device)
    visible[..., :prefix] = True
    tokens = torch.full((count, 1), settings.prompt[-1], device=runtime.device)
    position = torch.zeros(count, dtype=torch.long, device=runtime.device)
    logits = []
    for step in range(steps):
        visible[..., prefix + step] = True
        logits.append(runtime.step(tokens, position + step, visible)[:, 0].to("cpu", torch.float32, copy=True))
        said = [h.tokens[step] if step < len(h.tokens) else settings.prompt[-1] for h in spoken]
        tokens = torch.tensor(said, device=runtime.device)[:, None]
    return torch.stack(logits, 1)


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


def shown(proof: Mapping[str, Any]) -> str:
    """What engine.json keeps of a proof, in a few words."""
    return "passed" if proof.get("passed") else f"failed: {proof.get('failed')}"

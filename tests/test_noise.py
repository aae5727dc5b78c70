"""Sampling noise: a Gumbel variable for every seed, name, step, row and token, and drawing by it is drawing by softmax."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from fake_runtime import START, image
from hypothesis import given
from hypothesis import strategies as st

from capcli.decoding import noise
from capcli.decoding.loop import IterableFeed, Job, decode
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.runtimes.base import EncodedChunk

MANY = 20_000


def table(names, steps, rows=3, vocabulary=50, seed=0):
    keys = torch.tensor([noise.key(seed, name) for name in names])
    return noise.gumbel(keys, torch.tensor(steps), rows, vocabulary)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((a.flatten().double(), b.flatten().double())))[0, 1].item()


def misfit(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square over its degrees of freedom, in standard deviations from what chance gives."""
    expected = probabilities * counts.sum()
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - degrees) / math.sqrt(2 * degrees)


def splitmix64(x: int) -> int:
    """The finaliser, written as its authors do: unsigned."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_keys_and_noise_are_what_they_were_when_a_run_to_resume_was_begun():
    key, golden = noise.key(0, "a.jpg"), 0x9E3779B97F4A7C15
    assert key == -123866571502082167
    found = noise.gumbel(torch.tensor([key]), torch.tensor([3]), 2, 4)[0]
    for row in range(2):
        stream = splitmix64((splitmix64((key + 3 * golden) % 2**64) + row * golden) % 2**64)
        for token in range(4):
            u = ((splitmix64((stream + token * golden) % 2**64) >> 32) + 0.5) / 2**32
            assert found[row, token].item() == pytest.approx(-math.log(-math.log1p(-u)), abs=1e-5)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6), st.data())
def test_noise_depends_on_no_neighbour(names, data):
    steps = data.draw(st.lists(st.integers(0, 60), min_size=len(names), max_size=len(names)))
    whole = table(names, steps)
    for i, (name, step) in enumerate(zip(names, steps, strict=True)):
        assert torch.equal(whole[i], table([name], [step])[0])
        assert torch.equal(whole[i, :2, :20], table([name], [step], rows=2, vocabulary=20)[0])


@pytest.mark.parametrize("name", ["a", "é", "\udcff.jpg", "a/b\n", "x" * 5000], ids=ascii)
def test_any_name_has_a_key_and_every_seed_another(name):
    keys = {noise.key(seed, name) for seed in (0, 1, -1, 2**63, 2**64 - 2)}
    assert len(keys) == 5
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_keys_of_many_names_differ():
    assert len({noise.key(0, f"{i}.jpg") for i in range(MANY)}) == MANY


def test_it_is_gumbel_noise():
    x = table(["a", "b", "c", "d"], [0, 1, 2, 3], rows=4, vocabulary=MANY // 4).flatten().double()
    assert x.isfinite().all()
    assert x.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert x.var().item() == pytest.approx(math.pi**2 / 6, abs=0.04)
    uniform = torch.exp(-torch.exp(-x))
    counts = torch.histc(uniform, 50, 0, 1)
    assert abs(misfit(counts, torch.full((50,), 1 / 50))) < 5


@pytest.mark.parametrize("of", ["steps", "rows", "names", "seeds", "tokens"])
def test_noise_of_different_steps_rows_names_seeds_and_tokens_is_unrelated(of):
    base = table(["a", "b"], [4, 4], rows=2, vocabulary=MANY)
    other = {
        "steps": lambda: table(["a", "b"], [5, 5], rows=2, vocabulary=MANY),
        "rows": lambda: base.flip(1),
        "names": lambda: base.flip(0),
        "seeds": lambda: table(["a", "b"], [4, 4], rows=2, vocabulary=MANY, seed=1),
        "tokens": lambda: base.roll(1, -1),
    }[of]()
    assert not torch.equal(base, other)
    assert abs(correlation(base, other)) < 0.02


def test_shifted_steps_rows_and_tokens_never_share_noise():
    seen = table(["a", "b", "c"], [0, 1, 2], rows=5, vocabulary=500)
    more = table(["a", "b", "c"], [3, 3, 3], rows=5, vocabulary=500)
    values = torch.cat((seen, more)).flatten()
    assert len(values.unique()) > 0.99 * len(values)  # float32 itself repeats a few


PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


def test_the_largest_of_logits_and_noise_is_a_draw_from_softmax():
    x = table([f"{i}" for i in range(MANY)], [0] * MANY, rows=1, vocabulary=5)[:, 0]
    drawn = (PROBABILITIES.log() + x).argmax(-1)
    assert abs(misfit(drawn.bincount(minlength=5).double(), PROBABILITIES)) < 5


def test_the_two_largest_are_drawn_without_replacement():
    x = table([f"{i}" for i in range(MANY)], [7] * MANY, rows=1, vocabulary=5)[:, 0]
    first, second = (PROBABILITIES.log() + x).topk(2, -1).indices.unbind(-1)
    pairs = list(permutations(range(5), 2))
    counts = torch.tensor([((first == a) & (second == b)).sum().item() for a, b in pairs]).double()
    chances = torch.tensor([(PROBABILITIES[a] * PROBABILITIES[b] / (1 - PROBABILITIES[a])).item() for a, b in pairs])
    assert abs(misfit(counts, chances)) < 5


class TinyVocabulary:
    """A runtime that always gives the same five probabilities."""

    device, lag, ahead = torch.device("cpu"), 0, False

    def repeated(self, turn):
        return turn

    def allocate(self, shapes, settings):
        self.shape = (shapes.slots, settings.rows, 5)

    def encode(self, *_):
        return EncodedChunk((), torch.empty(0))

    def admit(self, _encoded, seats):
        return torch.ones(len(seats), dtype=torch.bool)

    def step(self, *_):
        return PROBABILITIES.log().expand(self.shape) + 3.0


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.8)]
)
def test_captions_are_distributed_as_the_settings_say(temperature, top_k, top_p):
    asked = Settings(
        (START,), (), 2, num_return_sequences=4, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p
    )
    jobs = [Job(i, image(0), noise.key(5, f"{i}.jpg")) for i in range(600)]
    counts = torch.zeros(5, 5)
    for done in decode(IterableFeed(jobs), TinyVocabulary(), asked, Shapes(100, 100)):
        for hypothesis in done.hypotheses:
            counts[hypothesis.tokens] += 1
    kept = 3 if top_k or top_p < 1 else 5
    p = PROBABILITIES[:kept] ** (1 / temperature)
    p /= p.sum()
    assert counts.sum() == counts[:kept, :kept].sum() == 2400
    assert abs(misfit(counts[:kept, :kept].flatten(), torch.outer(p, p).flatten())) < 5

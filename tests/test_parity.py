"""The oracle: captions equal transformers' `generate()`, one image at a time, token for token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captioners import SIZE, random_captioner

from capcli.decoding.loop import IterableFeed, Job, Shapes, decode
from capcli.decoding.settings import Settings, resolve
from capcli.models.vision_encoder_decoder import Encode, Step
from capcli.options import GenerationOptions
from capcli.runtimes.eager import Eager

HALF = (0.5, 0.5, 0.5)


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(count)]


def values(picture: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    x = torch.from_numpy(picture.astype(np.float64) * (1 / 255)).float()
    return ((x - 0.5) / 0.5).permute(2, 0, 1)[None].to(dtype)


def settings_of(model, prompt=(), **given) -> Settings:
    return resolve(model.generation_config.to_dict(), GenerationOptions(**given), prompt)


def ours(model, images, settings, slots=4, chunk=2, keys=None):
    runtime = Eager(Encode(model, 1 / 255, HALF, HALF).eval(), Step(model).eval(), torch.device("cpu"))
    jobs = [Job(i, image, keys[i] if keys else 0) for i, image in enumerate(images)]
    done = decode(IterableFeed(jobs), runtime, settings, Shapes(slots, chunk))
    found = {d.tag: d.hypotheses for d in done}
    assert sorted(found) == list(range(len(images)))
    return [found[i] for i in range(len(images))]


def oracle(model, image, settings, prompt=(), **given):
    """generate() on one image: tokens of each caption up to and with the end, and sequences_scores."""
    given = {name: value for name, value in given.items() if name != "seed"}
    ids = torch.tensor([settings.prompt]) if prompt else None
    with torch.inference_mode():
        out = model.generate(
            values(image, model.dtype),
            decoder_input_ids=ids,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **given,
        )
    tokens = []
    for row in out.sequences[:, len(settings.prompt) :].tolist():
        end = next((i + 1 for i, t in enumerate(row) if t in settings.eos_token_ids), len(row))
        tokens.append(tuple(row[:end]))
    scores = getattr(out, "sequences_scores", None)
    return tokens, None if scores is None else scores.tolist(), out


CASES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "two beams, returned both": {"num_beams": 2, "num_return_sequences": 2},
    "five returned": {"num_beams": 5, "num_return_sequences": 5},
    "length penalty": {"num_beams": 4, "length_penalty": 2.0},
    "short is good": {"num_beams": 3, "length_penalty": -1.0},
    "no length penalty": {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    "early": {"num_beams": 4, "early_stopping": True},
    "never": {"num_beams": 4, "early_stopping": "never", "length_penalty": 1.5},
    "ngrams": {"no_repeat_ngram_size": 2},
    "one-grams": {"no_repeat_ngram_size": 1},
    "ngrams, beams": {"num_beams": 4, "no_repeat_ngram_size": 3},
    "penalty": {"repetition_penalty": 1.7},
    "penalty, beams": {"num_beams": 3, "repetition_penalty": 1.3},
    "at least": {"min_new_tokens": 6},
    "at least, beams": {"num_beams": 4, "min_new_tokens": 5, "early_stopping": True},
    "all together": {
        "num_beams": 4,
        "num_return_sequences": 3,
        "length_penalty": 2.0,
        "early_stopping": True,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.2,
        "min_new_tokens": 3,
    },
}


@pytest.mark.parametrize("one_id", [False, True], ids=["ids", "one id"])
@pytest.mark.parametrize("decoder", ["gpt2", "bert"])
@pytest.mark.parametrize("case", CASES)
def test_generate(case, decoder, one_id):
    given = {"max_new_tokens": 12, **CASES[case]}
    model = random_captioner("vit", decoder, one_id=one_id, seed=1).double()
    settings = settings_of(model, **given)
    images = pictures(7)
    found = ours(model, images, settings)
    lengths = set()
    for image, hypotheses in zip(images, found, strict=True):
        tokens, scores, _ = oracle(model, image, settings, **given)
        assert [h.tokens for h in hypotheses] == tokens
        if scores is not None:
            assert [h.beam_score for h in hypotheses] == pytest.approx(scores, abs=1e-4)
        lengths |= {len(t) for t in tokens}
    print(case, decoder, sorted(lengths))

"""transformers' `generate()` on one image at a time, the reference for every caption."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from captioners import captions, modules, values
from families import asks, encoder_ids, prompted
from transformers import GenerationConfig, PreTrainedModel

from capcli.decoding import noise
from capcli.decoding.search import Hypothesis
from capcli.decoding.settings import NO_TOKEN, Settings, resolve
from capcli.decoding.shapes import Shapes
from capcli.models.families import family_of, with_start
from capcli.options import GenerationOptions


@dataclass(frozen=True)
class Case:
    """Fields of the checkpoint's generation_config, the user's options (`given`), and the prompt's ids."""

    given: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    prompt: tuple[int, ...] = ()

    def config(self, model: PreTrainedModel) -> GenerationConfig:
        config = copy.deepcopy(generator(model).generation_config)
        for name, value in self.checkpoint.items():
            setattr(config, name, value)
        return config

    def settings(self, model: PreTrainedModel) -> Settings:
        config = model.config.to_dict()
        own = family_of(config).generation(config, self.config(model).to_dict())
        if asks(model):
            return replace(resolve(own, GenerationOptions(**self.given)), encoder_ids=encoder_ids(model, self.prompt))
        empty = (NO_TOKEN,) * getattr(model.config, "tag_tokens", 0)
        started = with_start(config, own, self.prompt)
        return replace(resolve(started, GenerationOptions(**self.given), self.prompt), encoder_ids=empty)


@dataclass(frozen=True)
class Truth:
    """generate()'s captions of one image: tokens up to and with the end, `sequences_scores`, and the mean raw log-probability."""

    tokens: list[tuple[int, ...]]
    beam_scores: list[float] | None
    scores: list[float]


_known: dict[str, Truth] = {}


def generator(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a captioner whose `generate()` is called."""
    return getattr(model, "text_decoder", model)


def truth(
    model: PreTrainedModel, image: np.ndarray, case: Case, key: int = 0, tags: tuple[int, ...] | None = None
) -> Truth:
    """generate()'s captions; when sampling, with the noise of `key`. `tags` are token ids beside the image."""
    name = f"{id(model)} {hash(image.tobytes())} {case} {key} {tags}"  # models are never freed, so ids are unique
    if name not in _known:
        _known[name] = ask(model, image, case, key, tags)
    return _known[name]


@torch.inference_mode()
def ask(model: PreTrainedModel, image: np.ndarray, case: Case, key: int, tags: tuple[int, ...] | None = None) -> Truth:
    settings = case.settings(model)
    given = {name: value for name, value in case.given.items() if name != "seed"}
    vocabulary = modules(model)[1].vocabulary
    with checkpoint(model, case), given_noise(key, settings.rows, vocabulary):
        out = model.generate(
            pixel_values=values(image, model.dtype),
            **prompted(model, case.prompt),
            **({} if tags is None else {"tags": torch.tensor([tags])}),
            # without a cache: GIT's of transformers 5.17 changes captions, and capcli's own classes are to be tested without one
            use_cache=model.config.model_type not in ("git", "prefix-captioner", "vision-t5"),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **given,
        )
    tokens, scores = [], []
    for i, row in enumerate(out.sequences[:, len(settings.prompt) :].tolist()):
        end = next((n + 1 for n, token in enumerate(row) if token in settings.eos_token_ids), len(row))
        tokens.append(tuple(row[:end]))
        rows = [i] * end if getattr(out, "beam_indices", None) is None else out.beam_indices[i, :end].tolist()
        log_probabilities = [out.logits[n][rows[n]].double().log_softmax(-1)[row[n]].item() for n in range(end)]
        scores.append(sum(log_probabilities) / end)
    beam_scores = getattr(out, "sequences_scores", None)
    return Truth(tokens, None if beam_scores is None else beam_scores.tolist(), scores)


@contextmanager
def checkpoint(model: PreTrainedModel, case: Case) -> Iterator[None]:
    """Gives a model the generation_config of a case, from which generate() takes what it is not given."""
    model = generator(model)
    before, model.generation_config = model.generation_config, case.config(model)
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def given_noise(key: int, rows: int, vocabulary: int) -> Iterator[None]:
    """Makes generate() sample with capcli's noise: the largest of log-probability plus Gumbel noise, without replacement."""
    drawn, steps = torch.multinomial, count()

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert ((probabilities > 0).sum(-1) >= num_samples).all(), "generate() itself could not draw so many"
        table = noise.gumbel(torch.tensor([key]), torch.tensor([next(steps)]), rows, vocabulary)
        return (probabilities.log() + table.view(probabilities.shape)).topk(num_samples, -1).indices

    torch.multinomial = multinomial
    try:
        yield
    finally:
        torch.multinomial = drawn


def matches(hypotheses: list[Hypothesis], expected: Truth, rtol: float = 1e-6) -> None:
    """Fails unless these are generate()'s captions with generate()'s scores."""
    assert [h.tokens for h in hypotheses] == expected.tokens
    assert np.allclose([h.score for h in hypotheses], expected.scores, rtol=0, atol=1e-4)
    if expected.beam_scores is not None:
        assert np.allclose([h.beam_score for h in hypotheses], expected.beam_scores, rtol=rtol, atol=1e-4)


def agrees(
    model: PreTrainedModel,
    images: list[np.ndarray],
    case: Case,
    shapes: Shapes = Shapes(4, 2),  # noqa: B008
    keys: list[int] | None = None,
    lag: int = 0,
    tags: list[tuple[int, ...]] | None = None,
    rtol: float = 1e-6,
) -> set[int]:
    """Fails unless every image's captions are generate()'s; returns the lengths of the captions."""
    keys = keys or [0] * len(images)
    found = captions(model, images, case.settings(model), shapes, keys, lag, tags)
    for n, (image, key, hypotheses) in enumerate(zip(images, keys, found, strict=True)):
        matches(hypotheses, truth(model, image, case, key, tags[n] if tags else None), rtol)
    return {len(h.tokens) for hypotheses in found for h in hypotheses}

"""transformers' `generate()` on one image at a time: what every caption is held against."""

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
from capcli.models.families import family_of
from capcli.options import GenerationOptions


@dataclass(frozen=True)
class Case:
    """What a checkpoint says (`generation_config`), what the user asks for (`given`), and the prompt's ids."""

    given: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    prompt: tuple[int, ...] = ()

    def config(self, model: PreTrainedModel) -> GenerationConfig:
        config = copy.deepcopy(speaker(model).generation_config)
        for name, value in self.checkpoint.items():
            setattr(config, name, value)
        return config

    def settings(self, model: PreTrainedModel) -> Settings:
        config = model.config.to_dict()
        own = family_of(config).generation(config, self.config(model).to_dict())
        if asks(model):
            return replace(resolve(own, GenerationOptions(**self.given)), encoder_ids=encoder_ids(model, self.prompt))
        empty = (NO_TOKEN,) * getattr(model.config, "tag_tokens", 0)
        return replace(resolve(own, GenerationOptions(**self.given), self.prompt), encoder_ids=empty)


@dataclass(frozen=True)
class Truth:
    """generate()'s captions of one image: tokens up to and with the end, `sequences_scores`, and the mean raw log-probability."""

    tokens: list[tuple[int, ...]]
    beam_scores: list[float] | None
    scores: list[float]


_known: dict[str, Truth] = {}


def speaker(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a captioner whose `generate()` searches."""
    return getattr(model, "text_decoder", model)


def truth(
    model: PreTrainedModel, image: np.ndarray, case: Case, key: int = 0, tags: tuple[int, ...] | None = None
) -> Truth:
    """generate()'s captions; when sampling, with the noise that belongs to `key`. `tags` are words beside the image."""
    name = f"{id(model)} {hash(image.tobytes())} {case} {key} {tags}"  # models are never let go
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
            # with a cache, GIT of transformers 5.17 says other than without; of architectures of our own it would prove less
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
        said = [out.logits[n][rows[n]].double().log_softmax(-1)[row[n]].item() for n in range(end)]
        scores.append(sum(said) / end)
    beam_scores = getattr(out, "sequences_scores", None)
    return Truth(tokens, None if beam_scores is None else beam_scores.tolist(), scores)


@contextmanager
def checkpoint(model: PreTrainedModel, case: Case) -> Iterator[None]:
    """Lets a captioner be the checkpoint of a case: what generate() is given fills its gaps from the model's own config."""
    model = speaker(model)
    own, model.generation_config = model.generation_config, case.config(model)
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def given_noise(key: int, rows: int, vocabulary: int) -> Iterator[None]:
    """Lets generate() draw with capcli's noise: the largest of log-probability plus Gumbel noise, without replacement."""
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


def matches(hypotheses: list[Hypothesis], expected: Truth) -> None:
    """Fails unless these are generate()'s captions with generate()'s scores."""
    assert [h.tokens for h in hypotheses] == expected.tokens
    assert np.allclose([h.score for h in hypotheses], expected.scores, rtol=0, atol=1e-4)
    if expected.beam_scores is not None:
        assert np.allclose([h.beam_score for h in hypotheses], expected.beam_scores, rtol=1e-6, atol=1e-4)


def agrees(
    model: PreTrainedModel,
    images: list[np.ndarray],
    case: Case,
    shapes: Shapes = Shapes(4, 2),  # noqa: B008
    keys: list[int] | None = None,
    lag: int = 0,
    tags: list[tuple[int, ...]] | None = None,
) -> set[int]:
    """Fails unless every image's captions are generate()'s; the lengths of the captions."""
    keys = keys or [0] * len(images)
    found = captions(model, images, case.settings(model), shapes, keys, lag, tags)
    for n, (image, key, hypotheses) in enumerate(zip(images, keys, found, strict=True)):
        matches(hypotheses, truth(model, image, case, key, tags[n] if tags else None))
    return {len(h.tokens) for hypotheses in found for h in hypotheses}

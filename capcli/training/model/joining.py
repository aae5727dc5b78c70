"""What captioners are joined of, and by which way: one for each family that is made of an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from transformers import PreTrainedModel

from capcli.errors import UsageError
from capcli.models.model_files import JOINED
from capcli.options import ModelOptions
from capcli.training.model.pretrained import Config
from capcli.training.model.tokenizers import SpecialTokens

BY_DECODER, PREFIX = ("join_cross_attention", "join_t5"), ("join_prefix",)  # files of this folder


@dataclass(frozen=True, slots=True)
class Parts:
    """What is joined. `reader` is a T5 whose encoder reads the question first; `foreign`: the tokenizer is not the decoder's,
    and `estranged`: it is not the reader's.
    """

    encoder: Config
    decoder: Config
    reader: Config | None
    tokenizer: Any
    specials: SpecialTokens
    options: ModelOptions
    seed: int
    foreign: bool
    estranged: bool = False


@dataclass(frozen=True, slots=True)
class Joined:
    """The captioner, its special tokens, and what of it is random, with a line on it (or none)."""

    model: PreTrainedModel
    specials: SpecialTokens
    new: dict[str, str]


class Joining(Protocol):
    """What the file of a way holds."""

    FAMILY: str  # the model_type of what it makes
    ASKED: bool  # whether the encoder is asked a question

    def any_size(self, encoder: Config) -> bool:
        """Whether the encoder takes images of other sizes than its config names."""

    def room(self, decoder: Config, options: ModelOptions) -> int:
        """How many tokens a caption may have."""

    def join(self, parts: Parts) -> Joined:
        """The captioner before training; the seed decides what is random. The tokenizer may get tokens that it needs."""


def joining_of(options: ModelOptions, encoder: Config, decoder: Config) -> Joining:
    """The way that goes by the decoder and by what was asked for. Raises UsageError for parts that do not go together."""
    ways = [cast("Joining", import_module(f"capcli.training.model.{name}")) for name in ways_of(options)]
    way = next((way for way in ways if decoder.kind in JOINED[way.FAMILY][2]), None)
    if way is None:
        decoders = [kind for each in ways for kind in JOINED[each.FAMILY][2]]
        raise UsageError(
            f"{decoder.title} is a {decoder.kind}; an image is put before the words of a {' or '.join(decoders)} only"
        )
    if encoder.kind not in JOINED[way.FAMILY][1]:
        raise UsageError(f"{encoder.title} is a {encoder.kind}, which goes before the words only: give join prefix")
    if options.question_encoder is not None and not way.ASKED:
        raise UsageError(f"question_encoder reads a question, and {decoder.title}, a {decoder.kind}, is asked none")
    return way


def ways_of(options: ModelOptions) -> Sequence[str]:
    return PREFIX if options.join == "prefix" else BY_DECODER

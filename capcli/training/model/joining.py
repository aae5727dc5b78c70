"""Joins an encoder and a decoder into one captioner: by cross-attention, with the image as a prefix, or inside a T5."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from capcli.errors import UsageError
from capcli.models import cross_decoders, vision_t5
from capcli.models.checkpoint import quiet_transformers
from capcli.models.encoders import ANY_SIZE
from capcli.models.model_files import JOINED
from capcli.models.prefix import PrefixCaptioner, PrefixConfig
from capcli.models.vision_t5 import VisionT5, VisionT5Config
from capcli.options import ModelOptions
from capcli.options.train import IMAGE_TOKENS, NEW
from capcli.training.model.embeddings import fit_embeddings, set_positions, token_count
from capcli.training.model.pretrained import (
    CROSS_ATTENTION,
    HEADS,
    PartConfig,
    PretrainedPart,
    config_of,
    make_part,
    seeded,
)
from capcli.training.model.tokenizers import SpecialTokens

GAPS = 100  # sentinel tokens <extra_id_0> to <extra_id_99>: each replaces masked words
NEW_DECODER = {"decoder": "the decoder has new random weights"}


@dataclass(frozen=True, slots=True)
class JoinInputs:
    """The parts to join.

    `new_embeddings`: the tokenizer is not the decoder's, so its token embeddings are replaced; `new_question_embeddings`:
    nor is it the question encoder's.
    """

    encoder: PartConfig
    decoder: PartConfig
    question_encoder: PartConfig | None
    tokenizer: Any
    specials: SpecialTokens
    options: ModelOptions
    seed: int
    new_embeddings: bool
    new_question_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class Joined:
    """The captioner in float32, its special tokens, and which of its parts are random.

    `new` maps each of these parts to a line for the user, which may be empty.
    """

    model: PreTrainedModel
    specials: SpecialTokens
    new: dict[str, str]


class Join(ABC):
    """One way to join an encoder and a decoder."""

    FAMILY: ClassVar[str]  # model_type of the captioner
    has_question: ClassVar[bool] = False  # whether the encoder reads a question in addition to the image

    @abstractmethod
    def any_size(self, encoder: PartConfig) -> bool:
        """Whether the encoder takes images of other sizes than its config names."""

    @abstractmethod
    def max_tokens(self, decoder: PartConfig, options: ModelOptions) -> int:
        """The length of the longest caption in tokens. Raises UsageError where no token would fit."""

    @abstractmethod
    def join(self, inputs: JoinInputs) -> Joined:
        """The captioner before training; its random weights depend on the seed alone. May add tokens to the tokenizer."""


class CrossAttentionJoin(Join):
    """transformers' VisionEncoderDecoderModel: the decoder attends to the encoder's output."""

    FAMILY = "vision-encoder-decoder"

    def any_size(self, encoder: PartConfig) -> bool:
        return encoder.kind in ANY_SIZE

    def max_tokens(self, decoder: PartConfig, options: ModelOptions) -> int:  # noqa: ARG002
        return cross_decoders.length(config_of(decoder))

    def join(self, inputs: JoinInputs) -> Joined:
        encoder, decoder, new = _encoder_and_decoder(inputs, cross_attention=True)
        with seeded(inputs.seed, "projection"), quiet_transformers():
            config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)
            model = VisionEncoderDecoderModel(config=config, encoder=encoder, decoder=decoder)
        return Joined(model, inputs.specials, new)


class PrefixJoin(Join):
    """PrefixCaptioner: image tokens, and then tags, precede the caption in a GPT-2's sequence."""

    FAMILY = PrefixConfig.model_type

    def any_size(self, encoder: PartConfig) -> bool:  # noqa: ARG002
        return True

    def max_tokens(self, decoder: PartConfig, options: ModelOptions) -> int:
        """Raises UsageError also for a --max-length that image and tags leave no room for."""
        positions: int = config_of(decoder).n_positions
        image, tags = prefix_lengths(options)
        left = positions - image - tags
        if left <= 0:
            raise UsageError(
                f"{image} image tokens and {tags} tag tokens leave no room for a caption: the decoder accepts {positions} tokens"
            )
        if options.max_length is not None and options.max_length > left:
            raise UsageError(
                f"--max-length is {options.max_length}, but {decoder.title} accepts {positions} tokens, and {image} image "
                f"tokens and {tags} tag tokens leave {left}: give {left} or less, or fewer of those"
            )
        return left

    def join(self, inputs: JoinInputs) -> Joined:
        encoder, decoder, new = _encoder_and_decoder(inputs, cross_attention=False)
        with seeded(inputs.seed, "projection"), quiet_transformers():
            lengths = prefix_lengths(inputs.options)
            config = PrefixConfig(encoder.config.to_dict(), decoder.config.to_dict(), *lengths)
            return Joined(PrefixCaptioner(config, encoder, decoder), inputs.specials, new)


class T5Join(Join):
    """VisionT5: a T5 reads the image and a question; its vocabulary has sentinel tokens for masked words."""

    FAMILY = VisionT5Config.model_type
    has_question = True

    def any_size(self, encoder: PartConfig) -> bool:
        return encoder.kind in ANY_SIZE

    def max_tokens(self, decoder: PartConfig, options: ModelOptions) -> int:  # noqa: ARG002
        return vision_t5.POSITIONS

    def join(self, inputs: JoinInputs) -> Joined:
        seed = inputs.seed
        add_sentinels(inputs.tokenizer)
        specials = replace(inputs.specials, start=inputs.specials.pad)  # T5 starts with padding
        count = token_count(inputs.tokenizer)
        ids: dict[str, Any] = {
            "eos_token_id": specials.end,
            "pad_token_id": specials.pad,
            "decoder_start_token_id": specials.start,
        }
        if inputs.decoder.files is None:
            decoder = make_part(inputs.decoder, seed, **ids, vocab_size=count).model
            new = dict(NEW_DECODER)
        else:
            decoder = make_part(inputs.decoder, seed).model
            new = _fit_decoder(decoder, count, inputs)
        question_encoder = None
        if inputs.question_encoder is not None:
            question_encoder, new_in_question = _question_encoder(inputs.question_encoder, count, inputs)
            new |= new_in_question
        encoder = _encoder(inputs)
        parts = (encoder, decoder, question_encoder)
        for part in parts:
            if part is not None:
                part.config.dtype = torch.float32
        with seeded(seed, "projection"), quiet_transformers():
            # copies: a config that becomes part of another model's loses its attention implementation
            configs: list[Any] = [None if part is None else part.config.to_dict() for part in parts]
            return Joined(VisionT5(VisionT5Config(*configs, **ids), *parts), specials, new)


def choose_join(options: ModelOptions, encoder: PartConfig, decoder: PartConfig) -> Join:
    """The join for this decoder and `options.join`. Raises UsageError for parts that cannot be joined."""
    joins: list[Join] = [PrefixJoin()] if options.join == "prefix" else [CrossAttentionJoin(), T5Join()]
    join = next((join for join in joins if decoder.kind in JOINED[join.FAMILY][2]), None)
    if join is None:
        kinds = " or ".join(kind for each in joins for kind in JOINED[each.FAMILY][2])
        raise UsageError(f"{decoder.title} is a {decoder.kind}, but --join prefix takes only a {kinds} as decoder")
    if encoder.kind not in JOINED[join.FAMILY][1]:
        raise UsageError(f"{encoder.title} is a {encoder.kind}, which needs --join prefix or a T5 as decoder")
    if options.question_encoder is not None and not join.has_question:
        raise UsageError(f"--question-encoder needs a T5 as decoder, and {decoder.title} is a {decoder.kind}")
    return join


def prefix_lengths(options: ModelOptions) -> tuple[int, int]:
    """How many image tokens and how many tag tokens precede the caption."""
    return options.image_tokens or IMAGE_TOKENS, options.tag_tokens or 0


def add_sentinels(tokenizer: Any) -> None:
    """Adds those of <extra_id_0> to <extra_id_99> that the tokenizer lacks, in T5's order: the last one first."""
    known = tokenizer.get_vocab()
    names = [f"<extra_id_{number}>" for number in reversed(range(GAPS))]
    missing = [name for name in names if name not in known]
    if missing:
        # lstrip: a space before the sentinel in a prompt is not a token
        tokens = [AddedToken(name, lstrip=True, normalized=False, special=True) for name in missing]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)


def _encoder_and_decoder(inputs: JoinInputs, *, cross_attention: bool) -> tuple[Any, Any, dict[str, str]]:
    decoder, new = _decoder(inputs, cross_attention=cross_attention)
    encoder = _encoder(inputs)
    for part in (encoder, decoder):
        part.config.dtype = torch.float32
    return encoder, decoder, new


def _encoder(inputs: JoinInputs) -> Any:
    encoder = make_part(inputs.encoder, inputs.seed).model
    if inputs.encoder.files is None:
        set_positions(encoder)
    return encoder


def _decoder(inputs: JoinInputs, *, cross_attention: bool) -> tuple[Any, dict[str, str]]:
    """A causal decoder with an embedding for every token, and which of its parts are random."""
    decoder, specials, seed = inputs.decoder, inputs.specials, inputs.seed
    count = token_count(inputs.tokenizer)
    changes: dict[str, Any] = {
        "is_decoder": True,
        "add_cross_attention": cross_attention,
        "cross_attention_hidden_size": None,
    }
    if decoder.files is None:
        ids = {"bos_token_id": specials.start, "eos_token_id": specials.end, "pad_token_id": specials.pad}
        return make_part(decoder, seed, **changes, **ids, vocab_size=count).model, dict(NEW_DECODER)
    part = make_part(decoder, seed, **changes)
    cross_decoders.set_padding(part.model, specials.pad)
    if cross_decoders.length(part.model.config) < 1:
        raise UsageError(
            f"{decoder.title} is a {decoder.kind}, which counts positions from its padding token, and the tokenizer's is "
            f"{specials.pad}: give a tokenizer with a lower id, such as the decoder's own or --tokenizer {NEW}"
        )
    new: dict[str, str] = {}
    if _lacks(part, CROSS_ATTENTION):
        new["cross-attention"] = ""  # usual: only a captioner's decoder has it
    if _lacks(part, HEADS):
        new["embeddings"] = "the decoder's output layer is new: its weights have none"
    return part.model, new | _fit_decoder(part.model, count, inputs)


def _fit_decoder(decoder: Any, count: int, inputs: JoinInputs) -> dict[str, str]:
    fit_embeddings(decoder, count, inputs.seed, new=inputs.new_embeddings)
    if not inputs.new_embeddings:
        return {}
    return {"embeddings": f"the decoder's embeddings are new ({count:,}): the tokenizer is not its own"}


def _question_encoder(part: PartConfig, count: int, inputs: JoinInputs) -> tuple[Any, dict[str, str]]:
    """The encoder of a T5 with an embedding for every token, and which of its parts are random."""
    part = replace(part, kind="t5-encoder")
    if part.files is None:
        model = make_part(part, inputs.seed, vocab_size=count).model
        return model, {"question-encoder": "the question encoder has new random weights"}
    model = make_part(part, inputs.seed).model
    fit_embeddings(model, count, inputs.seed, new=inputs.new_question_embeddings)
    if not inputs.new_question_embeddings:
        return model, {}
    return model, {"question-embeddings": f"the question encoder's embeddings are new ({count:,})"}


def _lacks(part: PretrainedPart, names: tuple[str, ...]) -> bool:
    return any(name in weight for weight in part.missing for name in names)

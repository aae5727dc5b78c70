"""Which captioner to train: one to go on from, or the encoder, decoder and tokenizer of a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from capcli.errors import UsageError
from capcli.text import flag

NEW = "new"  # the tokenizer that is trained on the captions
IMAGE_TOKENS = 10  # of a prefix
TAG_TOKENS = 16  # words on an image at most, where images have tags
PREFIX_ENCODER = "microsoft/resnet-101"
DEFAULT_LENGTH = 50  # tokens of a caption
PARTS = ("encoder", "decoder", "question_encoder")
LEAST_VOCABULARY = 259  # every byte, start, end and padding
LEASTS = {"vocab_size": LEAST_VOCABULARY, "max_length": 2, "image_tokens": 1, "tag_tokens": 0, "extra_tokens": 0}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Where the weights come from.

    `model` is a captioner to go on from, a folder or a name on the hub, with its own tokenizer. Else `encoder` and `decoder`
    are each a name on the hub or a folder with weights; or the path of a .json file of config values, or a table of them with
    a "model_type": those get new random weights. `tokenizer` None is the decoder's own, "new" a byte-level BPE of at most
    `vocab_size` tokens trained on the captions, anything else a name or a folder. `max_length` is how many tokens of a
    caption are learned from, the end token included; None is DEFAULT_LENGTH, or what the decoder holds where that is less.

    `join` is how encoder and decoder come together: "cross" is cross-attention, "prefix" puts the image before the words, as
    `image_tokens` of them (None: IMAGE_TOKENS), and after it at most `tag_tokens` words on it; None is "cross". A prefix begins
    from PREFIX_ENCODER where no encoder is given.
    `question_encoder` is a T5 whose encoder reads the question before the decoder, a T5 too, does. `extra_tokens` adds as many
    tokens to the vocabulary: <loc_0>, <loc_1> and so on.
    """

    model: str | None = None
    encoder: str | Mapping[str, Any] | None = None
    decoder: str | Mapping[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: int = 15000
    max_length: int | None = None
    join: Literal["cross", "prefix"] | None = None
    image_tokens: int | None = None
    tag_tokens: int | None = None
    question_encoder: str | Mapping[str, Any] | None = None
    extra_tokens: int = 0

    def __post_init__(self) -> None:
        names = (*PARTS, "tokenizer", "join", "image_tokens", "tag_tokens")
        parts = [name for name in names if getattr(self, name) is not None]
        if self.model is not None and parts:
            without = " and ".join(map(flag, parts))
            raise UsageError(
                f"--model is a whole captioner and goes without {without}: give either it, or --encoder and --decoder"
            )
        if self.join not in (None, "cross", "prefix"):
            raise UsageError(f"--join is {self.join!r}; it must be cross or prefix")
        if self.join != "prefix" and (beside := [name for name in parts if name.endswith("_tokens")]):
            raise UsageError(f"{flag(beside[0])} are of an image that stands before the words: give --join prefix too")
        if self.join == "prefix" and self.encoder is None:
            object.__setattr__(self, "encoder", PREFIX_ENCODER)
        if self.model is None and (self.encoder is None or self.decoder is None):
            lacks = " and ".join(flag(name) for name in ("encoder", "decoder") if getattr(self, name) is None)
            raise UsageError(f"{lacks} missing: give --encoder and --decoder, or --model, a captioner to go on from")
        if self.model is not None and self.extra_tokens:
            raise UsageError(
                "--extra-tokens are of a new captioner, and --model is a whole one: give --encoder and --decoder"
            )
        for name in ("model", *PARTS, "tokenizer"):
            if getattr(self, name) == "":
                raise UsageError(f"{flag(name)} is empty; it must name a folder or a model on the hub")
        for name, least in LEASTS.items():
            value = getattr(self, name)
            if value is None and name != "vocab_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{flag(name)} is {value!r}; it must be a whole number of at least {least}")

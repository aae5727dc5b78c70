"""Freezing the encoder or the decoder of a captioner, for the whole training or its first steps."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from capcli.errors import UsageError
from capcli.models.families import family_of, unused_weights
from capcli.training.model.pretrained import CROSS_ATTENTION, HEADS

What = Literal["encoder", "decoder", "none"]
# Parts that must not be frozen if they are new, with the text for the error message.
NEVER_FROZEN_IF_NEW = {
    "encoder": {
        "encoder": "encoder is",
        "question-encoder": "question encoder is",
        "question-embeddings": "question encoder's embeddings are",
    },
    "decoder": {"decoder": "decoder is"},
}


@dataclass(frozen=True, slots=True)
class Frozen:
    """The names of the frozen weights and the numbers of frozen and of trainable parameters."""

    what: What
    names: tuple[str, ...]
    parameters: int
    trainable: int

    def line(self) -> str:
        """For example: frozen: the encoder (85,798,656 parameters); 152,806,656 trainable."""
        if not self.names:
            return f"frozen: nothing; {self.trainable:,} parameters trainable"
        return f"frozen: the {self.what} ({self.parameters:,} parameters); {self.trainable:,} trainable"


def freeze(model: Any, what: What, *, new_cross_attention: bool = False, new_embeddings: bool = False) -> Frozen:
    """Freezes one part of a captioner and makes all other weights trainable; the projection is always trainable.

    Cross-attention and embeddings of a frozen decoder stay trainable if they are new, because their weights are random. Call
    this before the optimizer is created, and afterwards `train(model)` instead of `model.train()`.
    """
    names, prefixes = [], tuple(f"{name}." for name in _parts(model).get(what, ()))
    for name, weight in _weights(model):
        frozen = name.startswith(prefixes) and not _is_new(name, model, new_cross_attention, new_embeddings)
        weight.requires_grad_(not frozen)
        if frozen:
            names.append(name)
    sizes = {name: weight.numel() for name, weight in _weights(model)}
    parameters = sum(sizes[name] for name in names)
    return Frozen(what, tuple(names), parameters, sum(sizes.values()) - parameters)


def unfreeze(model: Any) -> Frozen:
    """Makes all weights trainable."""
    return freeze(model, "none")


def train(model: Any) -> None:
    """`model.train()` for all but the frozen modules, which stay in evaluation mode: without dropout."""
    model.train()
    used = dict(_weights(model))
    for prefix in (name for names in _parts(model).values() for name in names):
        if all(weight.requires_grad for name, weight in used.items() if name.startswith(f"{prefix}.")):
            continue
        part = model.get_submodule(prefix)
        part.eval()
        for module in part.modules():
            parameters = list(module.parameters())
            if parameters and all(weight.requires_grad for weight in parameters):
                module.train()


def refuse_freezing(what: What, new: Collection[str]) -> None:
    """Raises UsageError if a part to be frozen is new: its weights would stay random."""
    for name, subject in NEVER_FROZEN_IF_NEW.get(what, {}).items():
        if name in new:
            raise UsageError(f"freeze is {what}, but the {subject} new: random weights would never be trained")


def _parts(model: Any) -> dict[str, tuple[str, ...]]:
    """The names of the sub-modules of encoder and decoder that the model has."""
    family, modules = family_of(model.config.to_dict()), {name for name, _ in model.named_modules()}
    parts = {"encoder": family.ENCODER, "decoder": family.DECODER}
    return {what: tuple(name for name in names if name in modules) for what, names in parts.items()}


def _weights(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    unused = unused_weights(model)
    return ((name, weight) for name, weight in model.named_parameters() if name not in unused)


def _is_new(name: str, model: Any, cross_attention: bool, embeddings: bool) -> bool:
    if cross_attention and any(part in name for part in CROSS_ATTENTION):
        return True
    if not embeddings:
        return False
    [decoder, *_] = _parts(model)["decoder"]
    input_embeddings = model.get_submodule(decoder).get_input_embeddings().weight
    return model.get_parameter(name) is input_embeddings or name.startswith(
        tuple(f"{decoder}.{head}" for head in HEADS)
    )

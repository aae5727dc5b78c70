"""Which weights learn: freezing the encoder or the decoder, for a while or for good."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from capcli.errors import UsageError
from capcli.models.families import family_of
from capcli.training.model.pretrained import CROSS_ATTENTION, HEADS

What = Literal["encoder", "decoder", "none"]
# What of a part may be new as a whole, or where nothing lets it learn all the same.
NEW_WITHIN = {
    "encoder": {
        "encoder": "encoder is",
        "question-encoder": "question encoder is",
        "question-embeddings": "question encoder's embeddings are",
    },
    "decoder": {"decoder": "decoder is"},
}
POOLER = ".pooler."  # rests always: no caption sees it


@dataclass(frozen=True, slots=True)
class Frozen:
    """The names of the frozen weights, and how many numbers are frozen and learn."""

    what: What
    names: tuple[str, ...]
    parameters: int
    learning: int

    def line(self) -> str:
        """For people: frozen: the encoder (85,798,656 parameters); 152,806,656 learn."""
        if not self.names:
            return f"frozen: nothing; {self.learning:,} parameters learn"
        return f"frozen: the {self.what} ({self.parameters:,} parameters); {self.learning:,} learn"


def freeze(model: Any, what: What, *, new_cross_attention: bool = False, new_embeddings: bool = False) -> Frozen:
    """Freezes a part of a captioner and lets the rest learn; the projection between the parts always learns.

    Of a frozen decoder, cross-attention and embeddings that are new learn all the same: their weights are random. Call before
    the optimizer is made, and `train` instead of `model.train()` afterwards.
    """
    names, part = [], tuple(f"{name}." for name in _parts(model).get(what, ()))
    for name, weight in _learnable(model):
        frozen = name.startswith(part) and not _is_new(name, model, new_cross_attention, new_embeddings)
        weight.requires_grad_(not frozen)
        if frozen:
            names.append(name)
    held = set(names)
    sizes = {name: weight.numel() for name, weight in _learnable(model)}
    return Frozen(what, tuple(names), sum(sizes[n] for n in held), sum(sizes[n] for n in sizes if n not in held))


def unfreeze(model: Any) -> Frozen:
    """Lets everything learn again."""
    return freeze(model, "none")


def train(model: Any) -> None:
    """`model.train()`, with what is frozen as it is when captioning: without dropout."""
    model.train()
    for part in (model.get_submodule(name) for names in _parts(model).values() for name in names):
        weights = [weight for name, weight in part.named_parameters() if not f".{name}".startswith(POOLER)]
        if all(weight.requires_grad for weight in weights):
            continue
        part.eval()
        for module in part.modules():
            own = list(module.parameters())
            if own and all(weight.requires_grad for weight in own):
                module.train()


def refuse_freezing(what: What, new: Collection[str]) -> None:
    """Raises UsageError for a part that is new: frozen, it would stay random."""
    for name, words in NEW_WITHIN.get(what, {}).items():
        if name in new:
            raise UsageError(f"freeze is {what}, but the {words} new: random weights would never be learnt")


def _parts(model: Any) -> dict[str, tuple[str, ...]]:
    """The names of the sub-modules that see and of those that speak; some need not be there."""
    family, there = family_of(model.config.to_dict()), {name for name, _ in model.named_modules()}
    parts = {"encoder": family.ENCODER, "decoder": family.DECODER}
    return {what: tuple(name for name in names if name in there) for what, names in parts.items()}


def _learnable(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if POOLER not in name)


def _is_new(name: str, model: Any, cross_attention: bool, embeddings: bool) -> bool:
    if cross_attention and any(sign in name for sign in CROSS_ATTENTION):
        return True
    if not embeddings:
        return False
    [decoder, *_] = _parts(model)["decoder"]
    put_in = model.get_submodule(decoder).get_input_embeddings().weight
    return model.get_parameter(name) is put_in or name.startswith(tuple(f"{decoder}.{head}" for head in HEADS))

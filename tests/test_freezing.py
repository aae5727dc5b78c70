"""Freezing: frozen weights do not change, new weights learn, and frozen modules use no dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from assembling import BERT, CAPTIONS, GPT2, VIT, new, save_bytes, save_decoder
from captioners import pictures, values

from capcli.errors import UsageError
from capcli.training.loop.freezing import freeze, refuse_freezing, train, unfreeze
from capcli.training.model.tokenizers import encode_captions

DROPOUT = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}


def changed_by_training(assembled: Any) -> set[str]:
    """The names of the weights that one step of training changes."""
    before = {name: weight.detach().clone() for name, weight in assembled.model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [w for w in assembled.model.parameters() if w.requires_grad], lr=0.1, weight_decay=0.1
    )
    labels = torch.tensor(encode_captions(assembled.tokenizer, CAPTIONS[:1], assembled.specials, 40))
    train(assembled.model)
    assembled.model(pixel_values=values(pictures(1)[0]), labels=labels).loss.backward()
    optimizer.step()
    return {name for name, weight in assembled.model.named_parameters() if not torch.equal(weight, before[name])}


def names(assembled: Any, start: str = "") -> set[str]:
    """The weights that can learn, of those whose names start with `start`."""
    every = {name for name, _ in assembled.model.named_parameters() if not name.startswith("encoder.pooler.")}
    return {name for name in every if name.startswith(start)}


def numbers(assembled: Any, chosen: set[str]) -> int:
    return sum(weight.numel() for name, weight in assembled.model.named_parameters() if name in chosen)


def test_a_frozen_encoder_does_not_change_and_the_projection_learns() -> None:
    assembled = new()
    frozen = freeze(assembled.model, "encoder")
    assert set(frozen.names) == names(assembled, "encoder.")
    size, rest = (
        numbers(assembled, names(assembled, "encoder.")),
        numbers(assembled, names(assembled) - names(assembled, "encoder.")),
    )
    assert frozen.line() == f"frozen: the encoder ({size:,} parameters); {rest:,} trainable"
    changed = changed_by_training(assembled)
    assert changed == names(assembled) - names(assembled, "encoder.")
    assert "enc_to_dec_proj.weight" in changed


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_new_cross_attention_of_a_frozen_decoder_learns(tmp_path: Path, kind: str) -> None:
    save_decoder(tmp_path, kind, vocabulary=300)
    save_bytes(tmp_path)
    assembled = new(decoder=str(tmp_path), tokenizer=None)
    frozen = freeze(assembled.model, "decoder", new_cross_attention="cross-attention" in assembled.new)
    crossing = {name for name in names(assembled, "decoder.") if "crossattention" in name or "ln_cross_attn" in name}
    assert crossing
    assert set(frozen.names) == names(assembled, "decoder.") - crossing
    assert changed_by_training(assembled) == names(assembled) - set(frozen.names)


def test_trained_cross_attention_is_frozen_with_its_decoder() -> None:
    assembled = new()
    assert set(freeze(assembled.model, "decoder").names) == names(assembled, "decoder.")
    assert changed_by_training(assembled) == names(assembled) - names(assembled, "decoder.")


@pytest.mark.parametrize("table", [GPT2, BERT], ids=["gpt2", "bert"])
def test_new_embeddings_of_a_frozen_decoder_learn(table: dict[str, Any]) -> None:
    assembled = new(decoder=table)
    freeze(assembled.model, "decoder", new_embeddings=True)
    changed = changed_by_training(assembled) & names(assembled, "decoder.")
    tied = {name for name in changed if name.endswith(("wte.weight", "word_embeddings.weight"))}
    assert len(tied) == 1
    assert all(name.startswith("decoder.cls.") for name in changed - tied)


def test_after_unfreezing_all_but_the_pooler_learns() -> None:
    assembled = new()
    freeze(assembled.model, "encoder")
    unfrozen = unfreeze(assembled.model)
    assert unfrozen.line() == f"frozen: nothing; {numbers(assembled, names(assembled)):,} parameters trainable"
    assert changed_by_training(assembled) == names(assembled)


def test_freezing_one_part_unfreezes_the_other() -> None:
    assembled = new()
    freeze(assembled.model, "encoder")
    assert set(freeze(assembled.model, "decoder").names) == names(assembled, "decoder.")
    assert all(
        w.requires_grad for name, w in assembled.model.named_parameters() if name in names(assembled, "encoder.")
    )


def test_a_frozen_encoder_uses_no_dropout() -> None:
    assembled = new(
        encoder=VIT | {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}, decoder=GPT2 | DROPOUT
    )
    picture = values(pictures(1)[0])
    train(assembled.model)
    assert not torch.equal(assembled.model.encoder(picture)[0], assembled.model.encoder(picture)[0])
    freeze(assembled.model, "encoder")
    train(assembled.model)
    assert torch.equal(assembled.model.encoder(picture)[0], assembled.model.encoder(picture)[0])
    assert assembled.model.decoder.training
    unfreeze(assembled.model)
    train(assembled.model)
    assert all(module.training for module in assembled.model.modules())


def test_only_the_learning_part_of_a_frozen_decoder_uses_dropout() -> None:
    assembled = new(decoder=GPT2 | DROPOUT)
    freeze(assembled.model, "decoder", new_cross_attention=True)
    train(assembled.model)
    block = assembled.model.decoder.transformer.h[0]
    assert block.crossattention.training
    assert block.crossattention.attn_dropout.training
    assert not any(part.training for part in (block.attn, block.mlp.dropout, assembled.model.decoder.transformer.drop))
    assert assembled.model.encoder.training


@pytest.mark.parametrize("what", ["encoder", "decoder"])
def test_a_new_part_cannot_be_frozen(what: Any) -> None:
    with pytest.raises(UsageError, match=f"freeze is {what}, but the {what} is new"):
        refuse_freezing(what, new().new)
    refuse_freezing(what, {"cross-attention", "embeddings"})
    refuse_freezing("none", new().new)

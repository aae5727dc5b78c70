"""Assembled captioners: every kind of encoder and decoder, which weights are random, and the folder that transformers loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assembling import (
    BERT,
    CAPTIONS,
    GPT2,
    RINNA,
    TABLES,
    VIT,
    new,
    save_bytes,
    save_characters,
    save_decoder,
    save_encoder,
    save_pieces,
    write_json,
)
from captioners import pictures, values
from fake_hub import FakeHub, Repo, files_of
from PIL import Image
from running import environment, save_captioner
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, VisionEncoderDecoderModel

from capcli import Captioner
from capcli.errors import CapcliError, UsageError
from capcli.models.families import FILES
from capcli.models.model_files import DECODERS, ENCODERS
from capcli.options import GenerationOptions, ModelOptions
from capcli.training.loop import trainer as folders
from capcli.training.model.tokenizers import SpecialTokens, encode_captions, special_tokens

SWIN = {"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
SWIN |= {"window_size": 4}
BARTS = ("bart", "mbart", "trocr")  # whose decoders have cross-attention already


def table(kind: str) -> dict[str, Any]:
    """The config of a new encoder."""
    values = {name: value for name, value in VIT.items() if name != "intermediate_size" or "dinov2" not in kind}
    return (SWIN if "swin" in kind else values) | {"model_type": kind}


def save(assembled: Any, place: Path) -> Path:
    folders.save_captioner(place, assembled.model, assembled.tokenizer, assembled.processor)
    return place


def state(model: Any) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def same(one: Any, other: Any) -> bool:
    first, second = state(one), state(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def loss_of(assembled: Any, captions: list[str]) -> torch.Tensor:
    """transformers' own loss, which depends on every weight that captioning uses."""
    labels = torch.tensor(encode_captions(assembled.tokenizer, captions, assembled.specials, 40))
    pixels = torch.cat([values(picture) for picture in pictures(len(captions))])
    loss: torch.Tensor = assembled.model(pixel_values=pixels, labels=labels).loss
    return loss


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [*((kind, "gpt2") for kind in ENCODERS), *(("vit", kind) for kind in DECODERS if kind != "gpt2")],
)
def test_new_captioners_of_every_kind_caption_like_transformers(tmp_path: Path, encoder: str, decoder: str) -> None:
    assembled = new(
        encoder=table(encoder),
        decoder=TABLES[decoder],
        generation=GenerationOptions(num_beams=3, max_new_tokens=7, length_penalty=0.5),
    )
    assert assembled.new == {"encoder", "decoder"}
    assert assembled.encode.encoder is assembled.model.encoder
    assert any(part is assembled.step.decoder for part in assembled.model.decoder.modules())
    loss_of(assembled, CAPTIONS[:1]).backward()
    unused = [
        name for name, weight in assembled.model.named_parameters() if weight.requires_grad and weight.grad is None
    ]
    assert unused == []  # DDP waits for the gradient of every weight that requires one

    place = save(assembled, tmp_path / "a folder")
    loaded, report = VisionEncoderDecoderModel.from_pretrained(place, output_loading_info=True)
    assert same(loaded, assembled.model)
    assert not any(report.values())
    assert loaded.config.architectures == ["VisionEncoderDecoderModel"]
    saved = loaded.generation_config
    assert (saved.num_beams, saved.max_new_tokens, saved.length_penalty) == (3, 7, 0.5)
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    picture = pictures(1)[0]
    generated = tokenizer.decode(loaded.eval().generate(values(picture))[0], skip_special_tokens=True)
    captioner = Captioner.load(str(place), device="cpu", dtype="float32")
    (caption,) = captioner.caption([Image.fromarray(picture)])
    assert caption.text == generated.strip()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [(save_bytes, GPT2), (save_characters, GPT2), (save_pieces, GPT2), (save_characters, BERT)],
    ids=["bytes-gpt2", "characters-gpt2", "pieces-gpt2", "characters-bert"],
)
def test_tokenizers_of_every_kind_are_saved_whole(
    tmp_path: Path, kind: Callable[[Path], object], decoder: dict[str, Any]
) -> None:
    kind(tmp_path / "tokenizer")
    assembled = new(decoder=decoder, tokenizer=str(tmp_path / "tokenizer"))
    count = len(assembled.tokenizer)
    place = save(assembled, tmp_path / "saved")
    assert not list(place.glob("*.model"))
    config = json.loads((place / "config.json").read_text())
    assert config["decoder"]["vocab_size"] == count
    s = assembled.specials
    for part in (config, json.loads((place / "generation_config.json").read_text())):
        ids = [part[name] for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")]
        assert ids == [s.start, s.start, s.end, s.pad]
    again: Any = AutoTokenizer.from_pretrained(place)
    captioner = Captioner.load(str(place), device="cpu", dtype="float32")
    every = list(range(count))
    assert again.decode(every) == assembled.tokenizer.decode(every) == captioner.core.model.tokenizer.decode(every)
    assert special_tokens(again) == s
    assert again.pad_token_id == s.pad


@pytest.mark.skipif(not RINNA.exists(), reason="the shared data is not here")
def test_rinnas_real_config_and_tokenizer_are_read(tmp_path: Path) -> None:
    assembled = new(decoder=str(RINNA / "gpt2-ja-xsmall-config.json"), tokenizer=None)
    assert assembled.specials == SpecialTokens(1, 2, 3)
    decoder = assembled.model.config.decoder
    assert (decoder.n_embd, decoder.n_inner, decoder.n_layer, decoder.vocab_size) == (512, 2304, 6, 32000)
    assembled.tokenizer.save_pretrained(tmp_path)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    labels = encode_captions(again, ["犬がボールで遊んでいる。"], assembled.specials, 40)
    assert again.decode(labels[0], skip_special_tokens=True) == "犬がボールで遊んでいる。"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_encoder_keeps_its_weights_without_the_head(tmp_path: Path, encoder: str) -> None:
    original = state(save_encoder(tmp_path / "encoder", encoder, resample=3, size=32))
    assembled = new(encoder=str(tmp_path / "encoder"))
    encoder_weights = state(assembled.model.encoder)
    assert original.keys() - encoder_weights.keys() <= {"embeddings.mask_token"}
    assert all(torch.equal(encoder_weights[name], original[name]) for name in original.keys() & encoder_weights.keys())
    assert {name for name in encoder_weights.keys() - original.keys() if "pooler." not in name} == set()
    assert assembled.new == {"decoder"}
    assert assembled.processor == json.loads((tmp_path / "encoder" / "preprocessor_config.json").read_text())
    place = save(assembled, tmp_path / "saved")
    assert json.loads((place / "preprocessor_config.json").read_text()) == assembled.processor
    assert assembled.spec.resample == 3


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_keeps_its_weights_and_gets_new_cross_attention(tmp_path: Path, decoder: str) -> None:
    original = save_decoder(tmp_path / "decoder", decoder, vocabulary=300)
    save_bytes(tmp_path / "decoder")
    assembled = new(decoder=str(tmp_path / "decoder"), tokenizer=None)
    weights, before = state(assembled.model.decoder), state(original)
    assert all(torch.equal(weights[name], before[name]) for name in weights.keys() & before.keys())
    new_weights = weights.keys() - before.keys()
    assert assembled.new == {"encoder"} | ({"cross-attention"} if new_weights else set())
    assert bool(new_weights) == (decoder not in BARTS)
    assert all("crossattention" in name or "ln_cross_attn" in name for name in new_weights)
    assert assembled.model.config.decoder.add_cross_attention
    assert assembled.model.config.decoder.is_decoder


@pytest.mark.parametrize("decoder", DECODERS)
def test_another_tokenizer_gets_new_embeddings(tmp_path: Path, decoder: str) -> None:
    save_decoder(tmp_path / "decoder", decoder, vocabulary=300)
    save_bytes(tmp_path / "decoder")
    kept = new(decoder=str(tmp_path / "decoder"), tokenizer=None)
    other = new(decoder=str(tmp_path / "decoder"), vocab_size=300)
    assert other.new == {"encoder", "embeddings"} | ({"cross-attention"} if decoder not in BARTS else set())
    assert any("embeddings are new" in note for note in other.notes)
    rows, old = (assembled.model.get_input_embeddings().weight for assembled in (other, kept))
    assert len(rows) == len(other.tokenizer)
    shared = min(len(rows), len(old))
    assert not (rows[:shared] == old[:shared]).all(1).any()
    assert 0.01 < rows.std().item() < 0.03  # as in new models
    assert other.model.get_output_embeddings().weight is rows
    first, second = state(kept.model), state(other.model)
    inner = [name for name in first if ".h." in name or ".layer" in name]
    assert all(torch.equal(first[name], second[name]) for name in inner)
    loaded: Any = VisionEncoderDecoderModel.from_pretrained(save(other, tmp_path / "saved")).eval()
    ids, pixels = torch.tensor([[0, 5, 9, 7, 1, 2, 2]]), values(pictures(1)[0])
    expected = other.model(pixel_values=pixels, decoder_input_ids=ids).logits
    assert torch.equal(loaded(pixel_values=pixels, decoder_input_ids=ids).logits, expected)


def test_roberta_refuses_a_tokenizer_whose_padding_leaves_no_positions(tmp_path: Path) -> None:
    save_decoder(tmp_path / "decoder", "roberta", vocabulary=300)
    tokenizer: Any = new(tokenizer=str(save_bytes(tmp_path / "tokenizer"))).tokenizer
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UsageError, match="counts positions from its padding token, and the tokenizer's is 3"):
        new(decoder=str(tmp_path / "decoder"), tokenizer=str(tmp_path / "tokenizer"))


def test_added_tokens_get_new_embeddings_and_the_others_keep_theirs(tmp_path: Path) -> None:
    save_decoder(tmp_path / "decoder", vocabulary=300)
    tokenizer: Any = new(decoder=str(tmp_path / "decoder"), tokenizer=str(save_bytes(tmp_path / "decoder"))).tokenizer
    count = len(tokenizer)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(50)])
    tokenizer.save_pretrained(tmp_path / "longer")
    assembled = new(decoder=str(tmp_path / "decoder"), tokenizer=str(tmp_path / "longer"))
    plain = new(decoder=str(tmp_path / "decoder"), tokenizer=None)
    assert assembled.new == {"encoder", "cross-attention"}
    rows, old = (each.model.get_input_embeddings().weight for each in (assembled, plain))
    assert len(rows) == count + 50
    assert torch.equal(rows[:count], old[:count])


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    save_decoder(tmp_path / "decoder", vocabulary=120)
    for options in ({}, {"encoder": str(tmp_path / "encoder"), "decoder": str(tmp_path / "decoder")}):
        torch.manual_seed(1)
        one = new(**options, seed=5)
        after = torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(torch.rand(1), after)  # the process's random generator is unchanged
        assert same(one.model, new(**options, seed=5).model)
        assert not same(one.model, new(**options, seed=6).model)
    alone = new(encoder=str(tmp_path / "encoder"), seed=5)
    assert all(
        torch.equal(a, b) for a, b in zip(*(state(m.model.decoder).values() for m in (alone, new(seed=5))), strict=True)
    )


def test_only_different_widths_are_joined_by_a_projection() -> None:
    assert new().model.enc_to_dec_proj.weight.shape == (48, 40)
    assert not hasattr(new(decoder=GPT2 | {"n_embd": 40}).model, "enc_to_dec_proj")


def test_a_start_token_that_is_also_padding_is_learned(tmp_path: Path) -> None:
    assembled = new(decoder=BERT, tokenizer=str(save_bytes(tmp_path)))
    assert assembled.specials.start == assembled.specials.pad
    again = new(model=str(save(assembled, tmp_path / "saved")))
    gradients = []
    for each in (assembled, again):
        loss_of(each, CAPTIONS[:1]).backward()
        embeddings = each.model.decoder.bert.embeddings.word_embeddings
        assert embeddings.padding_idx is None
        gradients.append(embeddings.weight.grad[assembled.specials.start])
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_weights_in_half_precision_become_float32(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder").half()
    encoder.save_pretrained(tmp_path / "encoder")
    assembled = new(encoder=str(tmp_path / "encoder"))
    assert {weight.dtype for weight in assembled.model.parameters()} == {torch.float32}
    assert VisionEncoderDecoderModel.from_pretrained(save(assembled, tmp_path / "saved")).dtype == torch.float32


def test_search_settings_are_written_to_the_generation_config(tmp_path: Path) -> None:
    given = GenerationOptions(
        num_beams=5, do_sample=True, temperature=1.2, top_k=50, top_p=0.95, no_repeat_ngram_size=3
    )
    assembled = new(generation=given)
    written = json.loads((save(assembled, tmp_path) / "generation_config.json").read_text())
    named = ("num_beams", "do_sample", "temperature", "top_k", "top_p", "no_repeat_ngram_size")
    assert {name: written[name] for name in named} == {name: getattr(given, name) for name in named}
    assert written["max_new_tokens"] == 40
    assert assembled.notes[-1] == "the encoder has new random weights"


def test_settings_without_effect_are_reported_and_not_written(tmp_path: Path) -> None:
    assembled = new(generation=GenerationOptions(temperature=0.7, length_penalty=2.0, seed=3))
    assert "--temperature has no effect without --do-sample" in assembled.notes
    assert "--length-penalty has no effect with one beam" in assembled.notes
    written = json.loads((save(assembled, tmp_path) / "generation_config.json").read_text())
    assert not {"temperature", "length_penalty", "seed"} & written.keys()


def test_a_trained_captioner_is_changed_only_where_options_say_so(tmp_path: Path) -> None:
    first = new(generation=GenerationOptions(num_beams=3, no_repeat_ngram_size=2, length_penalty=2.0))
    place = save(first, tmp_path / "first")
    again = new(model=str(place))
    assert same(first.model, again.model)
    assert (again.new, again.specials, again.processor, again.spec) == (
        frozenset(),
        first.specials,
        first.processor,
        first.spec,
    )
    save(again, tmp_path / "again")
    for name in os.listdir(place):
        assert (tmp_path / "again" / name).read_bytes() == (place / name).read_bytes(), name
    other = new(model=str(place), generation=GenerationOptions(num_beams=1, max_new_tokens=9))
    written = json.loads((save(other, tmp_path / "other") / "generation_config.json").read_text())
    assert (written["num_beams"], written["max_new_tokens"], written["no_repeat_ngram_size"]) == (1, 9, 2)
    assert "length_penalty" not in written
    assert not any(weight.requires_grad for weight in other.model.encoder.pooler.parameters())


def test_a_trained_captioner_keeps_special_tokens_that_its_tokenizer_does_not_name(tmp_path: Path) -> None:
    place = save_captioner(tmp_path)  # its start token is <start>
    config = json.loads((place / "generation_config.json").read_text())
    (place / "generation_config.json").write_text(
        json.dumps(config | {"decoder_start_token_id": 7, "eos_token_id": [9, 8]})
    )
    assert new(model=str(place)).specials == SpecialTokens(7, 9, 117)


def test_parts_are_taken_from_a_captioners_config(tmp_path: Path) -> None:
    whole = write_json(
        tmp_path / "config.json", {"model_type": "vision-encoder-decoder", "encoder": VIT, "decoder": GPT2}
    )
    assembled = new(encoder=str(whole), decoder=str(whole))
    assert assembled.model.config.encoder.hidden_size == 40
    assert assembled.model.config.decoder.n_embd == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder": {"model_type": "convnext"}},
            "the encoder table is of the kind convnext; supported as",
        ),
        ({"encoder": {"hidden_size": 40}}, "the encoder table has no model_type"),
        ({"decoder": GPT2 | {"model_type": "llama"}}, "of the kind llama; supported as decoder are gpt2, bert"),
        ({"encoder": VIT | {"hiden_size": 40}}, r"the encoder table sets hiden_size \(did you mean hidden_size\?\)"),
        ({"encoder": VIT | {"colour": 1}}, "sets colour: vit has no such setting"),
        ({"decoder": GPT2 | {"n_head": 7}}, "Cannot build a gpt2 from the decoder table"),
        ({"encoder": VIT | {"hidden_size": "wide"}}, "Cannot build a vit from the encoder table"),
        (
            {"decoder": GPT2 | {"n_positions": 39}},
            "--max-length is 40, but the decoder table accepts 39 tokens: give 39 or less",
        ),
        ({"decoder": BERT | {"max_position_embeddings": 9}}, "accepts 9 tokens"),
        ({"tokenizer": None}, "the decoder table has no tokenizer: give --tokenizer"),
        ({"generation": GenerationOptions(max_new_tokens=65)}, "--max-new-tokens is 65, but the decoder accepts 64"),
        ({"generation": GenerationOptions(num_return_sequences=3)}, "3 captions per image need at least as many beams"),
        ({"encoder": "./no such folder"}, "No such folder: './no such folder'"),
        ({"decoder": "./nothing.json"}, r"Cannot read ./nothing\.json: No such file"),
    ],
    ids=str,
)
def test_wrong_options_are_usage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        new(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--encoder and --decoder missing: give --encoder and --decoder, or --model"),
        ({"encoder": "a/b"}, "^--decoder missing"),
        ({"model": "a/b", "encoder": "c/d"}, "cannot be combined with --encoder"),
        ({"model": "a/b", "tokenizer": "new"}, "cannot be combined with --tokenizer"),
        ({"model": "a/b", "max_length": 1}, "--max-length is 1; it must be a whole number of at least 2"),
        ({"model": "a/b", "vocab_size": True}, "--vocab-size is True"),
        ({"encoder": "", "decoder": "a/b"}, "encoder is empty"),
    ],
    ids=str,
)
def test_contradicting_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelOptions(**options)


def test_captions_are_by_default_as_long_as_the_decoder_holds(tmp_path: Path) -> None:
    for holds, expected in ((39, 39), (64, 50)):
        assembled = new(decoder=GPT2 | {"n_positions": holds}, max_length=None)
        assert assembled.max_length == assembled.model.generation_config.max_new_tokens == expected
        folders.save_captioner(tmp_path / str(holds), assembled.model, assembled.tokenizer, assembled.processor)
        assert new(model=str(tmp_path / str(holds))).max_length == expected
    with pytest.raises(UsageError, match=r"--max-length is 40, but .* accepts 39 tokens"):
        new(model=str(tmp_path / "39"), max_length=40)


def test_folders_without_a_usable_encoder_are_refused_with_the_reason(tmp_path: Path) -> None:
    place = tmp_path / "enc"
    place.mkdir()
    with pytest.raises(CapcliError, match=r"enc has no config\.json"):
        new(encoder=str(place))
    save_encoder(place, size={"height": 48, "width": 48})
    with pytest.raises(CapcliError, match=r"produces 48x48 pixels and its encoder expects 32x32"):
        new(encoder=str(place))
    save_encoder(place, size={"shortest_edge": 32})
    with pytest.raises(CapcliError, match="leaves images of different sizes"):
        new(encoder=str(place))
    save_encoder(place, image_processor_type="SamImageProcessor")
    with pytest.raises(CapcliError, match="SamImageProcessor"):
        new(encoder=str(place))
    save_encoder(place)
    weights = load_file(place / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "layernorm_before" not in name}, place / "model.safetensors")
    with pytest.raises(CapcliError, match=r"The weights of .*enc lack .*layernorm_before.*and 1 more"):
        new(encoder=str(place))
    (place / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CapcliError, match=r"model\.safetensors cannot be used"):
        new(encoder=str(place))
    (place / "model.safetensors").unlink()
    with pytest.raises(CapcliError, match=r"lacks its weights"):
        new(encoder=str(place))
    for kind in FILES:
        write_json(tmp_path / kind / "config.json", {"model_type": kind})
        for part in ("encoder", "decoder"):
            with pytest.raises(UsageError, match=f"of the kind {kind}.* It is a whole captioner: give it as --model"):
                new(**{part: str(tmp_path / kind)})
    (place / "config.json").write_text("{")
    with pytest.raises(CapcliError, match=r"config\.json of .*enc is not JSON"):
        new(encoder=str(place))


def test_an_encoder_without_a_processor_gets_one_with_a_note(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assembled = new(encoder=str(tmp_path))
    assert "has no preprocessor_config.json: images are resized to 32x32" in assembled.notes[0]
    assert (assembled.spec.height, assembled.spec.width, assembled.spec.mean) == (32, 32, (0.5, 0.5, 0.5))


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CapcliError, match=r"Cannot write the model to .*file"):
        save(new(), tmp_path / "file")


def test_a_folder_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assembled = new()
    with pytest.raises(CapcliError, match="its name is not UTF-8"):
        folders.save_captioner(
            os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), assembled.model, assembled.tokenizer, assembled.processor
        )


def test_a_new_tokenizer_gets_new_embeddings_whatever_the_decoder_has(tmp_path: Path) -> None:
    count = len(new().tokenizer)
    original = save_decoder(tmp_path / "decoder", vocabulary=count)  # of the same size, by chance
    (tmp_path / "decoder" / "tokenizer.json").write_text("broken, and not read")
    assembled = new(decoder=str(tmp_path / "decoder"))
    assert "embeddings" in assembled.new
    assert not (assembled.model.get_input_embeddings().weight == original.get_input_embeddings().weight).all(1).any()


def test_weights_in_a_pickle_are_read_without_running_its_code(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    safe = new(encoder=str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    assert same(new(encoder=str(tmp_path)).model, safe.model)
    torch.save({"weight": Path(tmp_path)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CapcliError, match="a pickle that contains more than tensors"):
        new(encoder=str(tmp_path))


def test_loading_and_saving_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_encoder(tmp_path / "encoder")
    save_decoder(tmp_path / "decoder", vocabulary=300)
    save_bytes(tmp_path / "decoder")
    capfd.readouterr()
    save(new(encoder=str(tmp_path / "encoder"), decoder=str(tmp_path / "decoder"), tokenizer=None), tmp_path / "saved")
    new(model=str(tmp_path / "saved"))
    assert capfd.readouterr() == ("", "")


FROM_HUB = """
from huggingface_hub import close_session
from capcli.errors import CapcliError
from capcli.options import GenerationOptions, ModelOptions
from capcli.training.model.assembly import assemble
def attempts():
    for encoder, decoder in (("who/sees", "who/speaks"), ("who/is-not", "who/speaks")):
        try:
            assembled = assemble(ModelOptions(encoder=encoder, decoder=decoder), list, GenerationOptions(), 0)
            print(sorted(assembled.new), assembled.model.config.encoder.model_type, assembled.tokenizer.name_or_path, flush=True)
        except CapcliError as error:
            print(error, flush=True)
attempts()
input()  # until the hub is gone
close_session()  # its server still answers on open connections
attempts()
"""


def test_parts_come_from_the_hub_and_then_from_its_cache(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    save_decoder(tmp_path / "decoder", vocabulary=300)
    save_bytes(tmp_path / "decoder")
    found = "['cross-attention'] vit who/speaks"
    with FakeHub() as hub:
        for name, place in (("who/sees", "encoder"), ("who/speaks", "decoder")):
            hub.repos[name] = Repo()
            hub.repos[name].push(files_of(tmp_path / place) | {"tf_model.h5": b"large", "README.md": b""})
        env = environment(
            HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", FROM_HUB], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().strip() == found
        assert process.stdout.readline().startswith("There is no folder who/is-not here, and no such model on the hub")
        assert not {"tf_model.h5", "README.md"} & hub.fetched()
    rest, _ = process.communicate("\n", timeout=120)
    assert process.returncode == 0
    lines = rest.splitlines()
    assert lines[0] == found
    assert "give --encoder a folder" in lines[1]


@pytest.mark.parametrize("encoder", ["vit", "deit"])
def test_a_new_encoder_starts_with_position_embeddings(encoder: str) -> None:
    """Every position has its own; near patches are more similar than far ones, equally in rows and columns."""
    assembled = new(encoder=table(encoder))
    positions = assembled.model.encoder.embeddings.position_embeddings[0].detach()
    config = assembled.model.config.encoder
    side = config.image_size // config.patch_size
    grid = positions[-side * side :].reshape(side, side, -1)
    similarity = torch.nn.functional.cosine_similarity(grid[:1, :1], grid, dim=-1)
    assert similarity[0, 1] > similarity[0, 3]
    assert similarity[1, 0] > similarity[3, 0]
    assert torch.allclose(similarity, similarity.T, atol=1e-5)
    assert similarity.flatten()[1:].max() < 0.99
    assert not positions[: -side * side].any()

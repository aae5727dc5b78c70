"""`--dtype int8`: products in 8 bits whose rows know nothing of each other, near float32, and a captioner of them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from captioners import HALF, pictures
from families import random_of_family, save_family
from running import call, paint, save_captioner
from torch import nn
from transformers.pytorch_utils import Conv1D

from capcli import Captioner
from capcli.decoding.shapes import Shapes
from capcli.models import build, int8
from capcli.models.families import family_of
from capcli.models.int8 import Int8Linear
from capcli.options import GenerationOptions

needs_vnni = pytest.mark.skipif(int8.lacking() is not None, reason=str(int8.lacking()))
EXAMPLES = Path(__file__).parents[1] / "examples"


def layer(*, gelu=None, fine=False, bias=True, inputs=40, outputs=24):
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias)
    made = Int8Linear(plain.weight.detach(), plain.bias.detach() if bias else None, gelu=gelu, fine=fine)
    return (nn.Sequential(plain, nn.GELU(approximate=gelu)) if gelu else plain), made


@needs_vnni
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_layer_is_near_the_one_it_was_made_of_and_a_fine_one_nearer(gelu, bias):
    x = torch.randn(3, 7, 40)
    plain, coarse = layer(gelu=gelu, bias=bias)
    _, fine = layer(gelu=gelu, bias=bias, fine=True)
    said, spread = plain(x), plain(x).std()
    off = [(each(x) - said).square().mean().sqrt() / spread for each in (fine, coarse)]
    assert off[0] < off[1] < 0.02
    assert coarse(x).shape == said.shape


@needs_vnni
@pytest.mark.parametrize("fine", [False, True])
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_beside_any_others(fine):
    _, made = layer(fine=fine)
    many = torch.randn(2 * int8.TOGETHER + 3, 40)
    many[5:] *= 1000
    assert torch.equal(made(many)[:5], made(many[:5]))
    assert torch.equal(made(many.flip(0)).flip(0), made(many))


@needs_vnni
@torch.inference_mode()
def test_what_is_no_number_stays_in_its_row_and_zeros_give_the_bias():
    plain, made = layer()
    x = torch.randn(5, 40)
    x[1, 3], x[2, 4], x[3] = torch.nan, torch.inf, 0
    said = made(x)
    assert not said[1].isfinite().any()
    assert not said[2].isfinite().any()
    torch.testing.assert_close(said[3], plain.bias)
    assert said[[0, 4]].isfinite().all()


@needs_vnni
def test_the_demo_model_says_nearly_the_same_in_8_bits():
    scenes = sorted(map(str, (EXAMPLES / "scenes").glob("scene-*")))
    for search in ({}, {"num_beams": 4}):
        said = {
            dtype: list(
                Captioner.load(str(EXAMPLES / "demo-model"), device="cpu", dtype=dtype).caption(scenes, **search)
            )
            for dtype in ("float32", "int8")
        }
        pairs = list(zip(*said.values(), strict=True))
        assert sum(plain.text == made.text for plain, made in pairs) >= 0.8 * len(scenes)
        assert sum(abs(plain.score - made.score) < 0.05 for plain, made in pairs) >= 0.8 * len(scenes)
        assert any(plain.score != made.score for plain, made in pairs)


@needs_vnni
def test_the_command_captions_in_it_and_goes_on_in_nothing_else(tmp_path):
    model, out = str(save_captioner(tmp_path / "model")), str(tmp_path / "out.jsonl")
    photos = paint(tmp_path / "photos", "a.png", "b.png", "c.png")
    run = ("caption", photos, "--model", model, "--out", out)
    assert call(*run, "--dtype", "int8", "--limit", "2").code == 0
    run_file = json.loads((tmp_path / "out.run.json").read_text())
    assert run_file["settings"]["dtype"] == "int8"
    refused = call(*run, "--dtype", "float32")
    assert refused.code == 2
    assert "int8" in refused.err
    assert call(*run).code == 0  # goes on in what it began in
    assert len(Path(out).read_text().splitlines()) == 3


def test_where_it_cannot_be_it_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "lacking", lambda: "this CPU has no VNNI")
    monkeypatch.setattr(build, "load_weights", lambda *_: pytest.fail("weights were read"))
    model = str(save_captioner(tmp_path / "model"))
    refused = call("caption", paint(tmp_path / "photos", "a.png"), "--model", model, "--dtype", "int8")
    assert refused.code == 2
    assert "--dtype int8: this CPU has no VNNI" in refused.err


@needs_vnni
@pytest.mark.parametrize("family", ["blip", "git", "florence2", "prefix", "vision-t5"])
def test_every_family_captions_in_it_and_only_what_says_words_is_fine(tmp_path, family):
    whole = copy.deepcopy(random_of_family(family)).float()
    kind = family_of(whole.config.to_dict())
    encode, step = kind.Encode(whole, 1 / 255, HALF, HALF), kind.Step(whole)
    int8.quantize_both(encode, step)
    assert not any(each.fine for each in encode.encoder.modules() if isinstance(each, Int8Linear))
    assert any(each.fine for each in step.modules() if isinstance(each, Int8Linear))
    assert not any(isinstance(each, nn.Linear | Conv1D) for part in (encode, step) for each in part.modules())
    captioner = Captioner.load(str(save_family(tmp_path / "model", family)), device="cpu", dtype="int8")
    said = list(captioner.caption(pictures(6), num_beams=2))
    alone = [next(iter(captioner.caption([each], num_beams=2, batch_size=4))) for each in pictures(6)]
    assert [each.text for each in said] == [each.text for each in alone]


@needs_vnni
@pytest.mark.parametrize(
    "search", [{"num_beams": 18}, {"prompt": "word7 word9 word11"}, {"prompt": "word7", "num_beams": 3}]
)
@pytest.mark.parametrize("family", [None, "prefix"])
def test_many_rows_and_prompts_are_near_float32(tmp_path, family, search):
    folder = save_family(tmp_path / "model", family) if family else save_captioner(tmp_path / "model")
    said = {
        dtype: list(Captioner.load(str(folder), device="cpu", dtype=dtype).caption(pictures(6), **search))
        for dtype in ("float32", "int8")
    }
    assert all(each.text for each in said["int8"])
    near = [abs(plain.score - made.score) < 0.1 for plain, made in zip(*said.values(), strict=True)]
    assert sum(near) >= 4


@needs_vnni
@pytest.mark.parametrize(
    ("family", "kept"), [(None, torch.bfloat16), ("prefix", torch.bfloat16), ("vision-t5", torch.float32)]
)
@torch.inference_mode()
def test_slots_keep_entries_in_bfloat16_in_every_loop_where_the_decoder_attends_so(tmp_path, family, kept):
    folder = save_family(tmp_path / "model", family) if family else save_captioner(tmp_path / "model")
    captioner = Captioner.load(str(folder), device="cpu", dtype="int8")
    settings = captioner.settings(GenerationOptions(max_new_tokens=5))
    image = pictures(1)[0][None]
    for runtime in captioner.model.runtime.replicas(2):
        runtime.allocate(Shapes(2, 1), settings)
        runtime.admit(runtime.encode(image, [settings.encoder_ids]), [0])
        held = [*runtime._memory, *runtime._pool]  # noqa: SLF001
        assert {each.dtype for each in held} == {kept}
        assert 2 * runtime.slot_bytes(image, settings) == sum(each.nbytes for each in held)


def test_a_run_that_began_in_it_says_so_where_it_cannot_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "lacking", lambda: None)
    model, out = save_captioner(tmp_path / "model"), tmp_path / "out.jsonl"
    run = ("caption", paint(tmp_path / "photos", "a.png", "b.png"), "--model", model, "--out", out)
    assert call(*run, "--dtype", "float32", "--limit", "1").code == 0
    run_file = tmp_path / "out.run.json"
    run_file.write_text(run_file.read_text().replace('"dtype": "float32"', '"dtype": "int8"'))
    monkeypatch.setattr(build, "lacking", lambda: "this CPU has no VNNI")
    refused = call(*run)
    assert refused.code == 2
    assert f"{out} was begun in int8, and this CPU has no VNNI" in refused.err


@needs_vnni
def test_products_that_saturate_are_noticed():
    asked = "from capcli.models.int8 import lacking; print(lacking())"
    for most, said in (
        ("AVX2", "oneDNN does not use this CPU's VNNI (ONEDNN_MAX_CPU_ISA may be set)"),
        ("ALL", "None"),
    ):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
        done = subprocess.run(
            [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == said

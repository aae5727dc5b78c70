"""`--dtype int8`: layers near float32 whose rows are independent of each other, and captioners with such layers."""

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
from capcli.captioning import model as captioning_model
from capcli.decoding.shapes import Shapes
from capcli.models import int8
from capcli.models.families import family_of
from capcli.models.int8 import Int8Linear
from capcli.options import GenerationOptions

needs_vnni = pytest.mark.skipif(int8.int8_lacks() is not None, reason=str(int8.int8_lacks()))
EXAMPLES = Path(__file__).parents[1] / "examples"


def make_layer(*, gelu=None, fine=False, bias=True, inputs=40, outputs=24):
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias)
    made = Int8Linear(plain.weight.detach(), plain.bias.detach() if bias else None, gelu=gelu, fine=fine)
    return (nn.Sequential(plain, nn.GELU(approximate=gelu)) if gelu else plain), made


@needs_vnni
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_layer_is_near_the_float32_layer_and_a_fine_one_nearer(gelu, bias):
    x = torch.randn(3, 7, 40)
    plain, coarse = make_layer(gelu=gelu, bias=bias)
    _, fine = make_layer(gelu=gelu, bias=bias, fine=True)
    expected, spread = plain(x), plain(x).std()
    errors = [(layer(x) - expected).square().mean().sqrt() / spread for layer in (fine, coarse)]
    assert errors[0] < errors[1] < 0.02
    assert coarse(x).shape == expected.shape


@needs_vnni
@pytest.mark.parametrize("fine", [False, True])
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_beside_any_others(fine):
    _, made = make_layer(fine=fine)
    many = torch.randn(2 * int8.ROWS_PER_PART + 3, 40)
    many[5:] *= 1000
    assert torch.equal(made(many)[:5], made(many[:5]))
    assert torch.equal(made(many.flip(0)).flip(0), made(many))


@needs_vnni
@torch.inference_mode()
def test_a_nan_stays_in_its_row_and_zeros_give_the_bias():
    plain, made = make_layer()
    x = torch.randn(5, 40)
    x[1, 3], x[2, 4], x[3] = torch.nan, torch.inf, 0
    out = made(x)
    assert not out[1].isfinite().any()
    assert not out[2].isfinite().any()
    torch.testing.assert_close(out[3], plain.bias)
    assert out[[0, 4]].isfinite().all()


@needs_vnni
def test_captions_of_the_demo_model_are_nearly_those_of_float32():
    scenes = sorted(map(str, (EXAMPLES / "scenes").glob("scene-*")))
    for search in ({}, {"num_beams": 4}):
        found = {
            dtype: list(
                Captioner.load(str(EXAMPLES / "demo-model"), device="cpu", dtype=dtype).caption(scenes, **search)
            )
            for dtype in ("float32", "int8")
        }
        pairs = list(zip(*found.values(), strict=True))
        assert sum(plain.text == made.text for plain, made in pairs) >= 0.8 * len(scenes)
        assert sum(abs(plain.score - made.score) < 0.05 for plain, made in pairs) >= 0.8 * len(scenes)
        assert any(plain.score != made.score for plain, made in pairs)


@needs_vnni
def test_the_command_captions_in_int8_and_resumes_in_nothing_else(tmp_path):
    model, out = str(save_captioner(tmp_path / "model")), str(tmp_path / "out.jsonl")
    photos = paint(tmp_path / "photos", "a.png", "b.png", "c.png")
    run = ("caption", photos, "--model", model, "--out", out, "--workers", 0)
    assert call(*run, "--dtype", "int8", "--limit", "2").code == 0
    run_file = json.loads((tmp_path / "out.run.json").read_text())
    assert run_file["settings"]["dtype"] == "int8"
    refused = call(*run, "--dtype", "float32")
    assert refused.code == 2
    assert "int8" in refused.err
    assert call(*run).code == 0  # resumes in int8
    assert len(Path(out).read_text().splitlines()) == 3


def test_where_it_is_impossible_it_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "int8_lacks", lambda: "this CPU has no VNNI")
    monkeypatch.setattr(captioning_model, "load_weights", lambda *_: pytest.fail("weights were read"))
    model = str(save_captioner(tmp_path / "model"))
    refused = call("caption", paint(tmp_path / "photos", "a.png"), "--model", model, "--dtype", "int8")
    assert refused.code == 2
    assert "--dtype int8: this CPU has no VNNI" in refused.err


@needs_vnni
@pytest.mark.parametrize("family", ["blip", "git", "florence2", "prefix", "vision-t5"])
def test_every_family_captions_in_int8_and_only_its_step_has_fine_layers(tmp_path, family):
    whole = copy.deepcopy(random_of_family(family)).float()
    kind = family_of(whole.config.to_dict())
    encode, step = kind.Encode(whole, 1 / 255, HALF, HALF), kind.Step(whole)
    int8.quantize_both(encode, step)
    assert not any(layer.fine for layer in encode.encoder.modules() if isinstance(layer, Int8Linear))
    assert any(layer.fine for layer in step.modules() if isinstance(layer, Int8Linear))
    assert not any(isinstance(layer, nn.Linear | Conv1D) for part in (encode, step) for layer in part.modules())
    captioner = Captioner.load(str(save_family(tmp_path / "model", family)), device="cpu", dtype="int8")
    together = list(captioner.caption(pictures(6), num_beams=2))
    alone = [next(iter(captioner.caption([image], num_beams=2, batch_size=4))) for image in pictures(6)]
    assert [caption.text for caption in together] == [caption.text for caption in alone]


@needs_vnni
@pytest.mark.parametrize(
    "search", [{"num_beams": 18}, {"prompt": "word7 word9 word11"}, {"prompt": "word7", "num_beams": 3}]
)
@pytest.mark.parametrize("family", [None, "prefix"])
def test_many_rows_and_prompts_are_near_float32(tmp_path, family, search):
    folder = save_family(tmp_path / "model", family) if family else save_captioner(tmp_path / "model")
    found = {
        dtype: list(Captioner.load(str(folder), device="cpu", dtype=dtype).caption(pictures(6), **search))
        for dtype in ("float32", "int8")
    }
    assert all(caption.text for caption in found["int8"])
    near = [abs(plain.score - made.score) < 0.1 for plain, made in zip(*found.values(), strict=True)]
    assert sum(near) >= 4


@needs_vnni
@pytest.mark.parametrize(
    ("family", "kept"), [(None, torch.bfloat16), ("prefix", torch.bfloat16), ("vision-t5", torch.float32)]
)
@torch.inference_mode()
def test_slots_hold_bfloat16_where_the_decoders_attention_can_be_chosen(tmp_path, family, kept):
    folder = save_family(tmp_path / "model", family) if family else save_captioner(tmp_path / "model")
    captioner = Captioner.load(str(folder), device="cpu", dtype="int8").core
    settings = captioner.settings(GenerationOptions(max_new_tokens=5))
    image = pictures(1)[0][None]
    for runtime in captioner.model.runtime.replicas(2):
        runtime.allocate(Shapes(2, 1), settings)
        runtime.admit(runtime.encode(image, [settings.encoder_ids]), [0])
        buffers = [*runtime._memory, *runtime._pool]  # noqa: SLF001
        assert {buffer.dtype for buffer in buffers} == {kept}
        assert 2 * runtime.slot_bytes(image, settings) == sum(buffer.nbytes for buffer in buffers)


def test_a_run_in_int8_cannot_resume_where_int8_is_impossible(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "int8_lacks", lambda: None)
    model, out = save_captioner(tmp_path / "model"), tmp_path / "out.jsonl"
    run = ("caption", paint(tmp_path / "photos", "a.png", "b.png"), "--model", model, "--out", out, "--workers", 0)
    assert call(*run, "--dtype", "float32", "--limit", "1").code == 0
    run_file = tmp_path / "out.run.json"
    run_file.write_text(run_file.read_text().replace('"dtype": "float32"', '"dtype": "int8"'))
    monkeypatch.setattr(int8, "int8_lacks", lambda: "this CPU has no VNNI")
    refused = call(*run)
    assert refused.code == 2
    assert f"{out} was started in int8, and this CPU has no VNNI" in refused.err


@needs_vnni
def test_products_that_saturate_are_detected():
    program = "from capcli.models.int8 import int8_lacks; print(int8_lacks())"
    for most, expected in (
        ("AVX2", "oneDNN does not use this CPU's VNNI (ONEDNN_MAX_CPU_ISA may be set)"),
        ("ALL", "None"),
    ):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected

"""On a CUDA device: the same captions as `generate()` there, through refill and flags that are read late; engines; training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from captioners import SIZE, random_captioner
from running import call, paint, save_captioner

from capcli.decoding.loop import IterableFeed, Job, decode
from capcli.decoding.settings import resolve
from capcli.decoding.shapes import Shapes
from capcli.models.vision_encoder_decoder import Encode, Step
from capcli.options import GenerationOptions
from capcli.runtimes.eager import Eager

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("given", [{}, {"num_beams": 4, "no_repeat_ngram_size": 2}], ids=["greedy", "beams"])
def test_captions_on_a_gpu_equal_generate_there(given: dict[str, int]) -> None:
    device = torch.device("cuda:0")
    model = random_captioner("vit", "gpt2", seed=3).double().to(device)
    settings = resolve(model.generation_config.to_dict(), GenerationOptions(max_new_tokens=12, **given))
    images = torch.randint(0, 256, (9, SIZE, SIZE, 3), dtype=torch.uint8).numpy()
    runtime = Eager(Encode(model, 1 / 255, (0.5,) * 3, (0.5,) * 3).eval().to(device), Step(model).eval(), device)
    jobs = [Job(index, image) for index, image in enumerate(images)]
    found = {d.tag: d.hypotheses[0].tokens for d in decode(IterableFeed(jobs), runtime, settings, Shapes(4, 2))}
    for index, image in enumerate(images):
        values = ((torch.from_numpy(image).double() * (1 / 255)).float() - 0.5) / 0.5
        values = values.permute(2, 0, 1)[None].double().to(device)
        said = model.generate(pixel_values=values, max_new_tokens=12, **given)[0, 1:].tolist()
        assert list(found[index]) == said[: len(found[index])]
        assert len(said) == len(found[index])


@pytest.mark.parametrize("given", [{}, {"num_beams": 4}], ids=["1 row", "4 rows"])
def test_a_captured_step_says_what_an_uncaptured_one_says(given: dict[str, int]) -> None:
    device = torch.device("cuda:0")
    model = random_captioner("vit", "gpt2", seed=3).to(device)
    settings = resolve(model.generation_config.to_dict(), GenerationOptions(max_new_tokens=12, **given))
    images = torch.randint(0, 256, (600, SIZE, SIZE, 3), dtype=torch.uint8).numpy()
    told = []
    for record in (True, False):
        encode, step = Encode(model, 1 / 255, (0.5,) * 3, (0.5,) * 3).eval().to(device), Step(model).eval()
        runtime = Eager(encode, step, device, record=record)
        jobs = [Job(index, image) for index, image in enumerate(images)]
        done = decode(IterableFeed(jobs), runtime, settings, Shapes(256, 64))
        told.append({each.tag: each.hypotheses for each in done})
    assert told[0] == told[1]


def test_an_engine_on_cuda_says_what_pytorch_says(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA: pip install onnxruntime-gpu")
    save_captioner(tmp_path / "captioner")
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(9)))
    flags = ("--model", tmp_path / "captioner", "--out", tmp_path / "engine", "--profile", "portable")
    done = call("export", "--onnx", *flags, "--device", "cuda")
    assert done.code == 0, done.err
    for search in ((), ("--num-beams", 4)):
        ours, theirs = (
            call(
                "caption",
                photos,
                "--model",
                tmp_path / name,
                "--device",
                "cuda",
                "--dtype",
                "float32",
                "-o",
                "-",
                *search,
            )
            for name in ("engine", "captioner")
        )
        assert [row["text"] for row in ours.rows] == [row["text"] for row in theirs.rows]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_on_cuda_learns(tmp_path: Path, dtype: str) -> None:
    from training import history, paint_data, recipe

    text = recipe(tmp_path / "run.toml", paint_data(tmp_path / "pictures"), max_steps=40).read_text()
    (tmp_path / "run.toml").write_text(text.replace('device = "cpu"\n', ""))
    done = call("train", "--config", tmp_path / "run.toml", "--out", tmp_path / "out", "--dtype", dtype)
    assert done.code == 0, done.err
    losses = [float(row["loss"]) for row in history(tmp_path / "out") if row["loss"]]
    assert losses[-1] < losses[0]

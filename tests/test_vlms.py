"""Vision-language models on the decode loop: equal to generate() one image at a time, and independent of order and batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import given_noise
from PIL import Image
from running import call, change_json, execute, paint
from vlms import MODELS, save_vlm, shaken

from capcli import Caption, Captioner
from capcli.captioning.processed import Given
from capcli.captioning.vlm_captioner import VlmCaptioner
from capcli.decoding import noise
from capcli.options import GenerationOptions

FAMILIES = [name for name in MODELS if name not in ("kosmos-2", "pix2struct")]
SIZES = {
    "a.png": (60, 40),
    "b.png": (40, 60),
    "c.png": (32, 32),
    "d.png": (40, 96),
    "e.png": (100, 40),
    "f.png": (60, 60),
}
FLAGS = ("--dtype", "float32", "--device", "cpu", "--threads", 1, "--workers", 0, "--max-new-tokens", 10)
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "penalty": {"repetition_penalty": 1.4},
    "n-grams": {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "length_penalty": 0.5},
    "lengths": {"num_beams": 2, "min_new_tokens": 6, "no_repeat_ngram_size": 1},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of six shapes, so that prompts have several lengths."""
    folder = paint(tmp_path_factory.mktemp("photos"), *SIZES)
    for name, size in SIZES.items():
        Image.open(folder / name).resize(size).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the checkpoint of a name, made once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else save_vlm(root / name, name)

    return folder


def captioner_of(folder: Path) -> VlmCaptioner:
    core: Any = Captioner.load(str(folder), device="cpu", dtype="float32").core
    assert isinstance(core, VlmCaptioner)
    return core


def caption(photos: Path, model: Path, *flags: object, out: Path | str = "-") -> Any:
    return call("caption", photos, "--model", model, "--out", out, *FLAGS, *flags)


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def arrays(photos: Path) -> list[Any]:
    return [np.array(Image.open(photos / name).convert("RGB")) for name in SIZES]


@torch.inference_mode()
def generated(core: Any, images: list[Any], prompt: str | None = None, **search: Any) -> Iterator[list[str]]:
    """The captions of transformers' generate(), one image at a time, with transformers' own attention."""
    model, text = core.auto.model, core.step.text
    text.set_attn_implementation("eager" if getattr(text.config, "attn_logit_softcapping", None) else "sdpa")
    for image in images:
        inputs = core.auto.inputs(image, prompt)
        inputs = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        found = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 10} | search).tolist()
        given = inputs["input_ids"][0].tolist() if "input_ids" in inputs else []
        cut = [ids[len(given) :] if given and ids[: len(given)] == given else ids for ids in found]
        yield [str(core.auto.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in cut]
    text.set_attn_implementation("capcli-grouped")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_captions_as_generate_does_one_image_at_a_time(name: str, photos: Path, folders: Any) -> None:
    for flags, search in (((), {}), (("--num-beams", 4), {"num_beams": 4})):
        done = caption(photos, folders(name), "--batch-size", 4, *flags)
        assert (done.code, "generate()" in done.err) == (0, False), done.err
        expected = [best for best, *_ in generated(captioner_of(folders(name)), arrays(photos), **search)]
        assert texts(done.rows) == expected
        assert len(set(expected)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_search_equals_generate(name: str, dtype: torch.dtype, photos: Path, folders: Any) -> None:
    core, images = captioner_of(folders(name)), arrays(photos)
    core.auto.model.to(dtype)
    for search in SEARCHES.values():
        results = core.caption(images, GenerationOptions(max_new_tokens=10, **search), batch_size=3)
        got = [result.text for result in results if isinstance(result, Caption)]
        assert got == [best for best, *_ in generated(core, images, **search)], search


@pytest.mark.parametrize("name", ["smolvlm", "qwen2.5-vl", "paligemma2"])
def test_samples_equal_those_of_generate_with_the_same_noise(name: str, photos: Path, folders: Any) -> None:
    core, images = captioner_of(folders(name)), arrays(photos)
    search = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2}
    results = core.caption(images, GenerationOptions(max_new_tokens=10, seed=7, **search), batch_size=2)
    got = [[candidate.text for candidate in result.candidates] for result in results if isinstance(result, Caption)]
    for number, image in enumerate(images):
        with given_noise(noise.key(7, str(number)), 3, core.step.vocabulary):
            assert next(generated(core, [image], **search)) == got[number]


@pytest.mark.parametrize("name", FAMILIES)
def test_captions_and_scores_are_the_same_to_the_bit_in_any_order(name: str, photos: Path, folders: Any) -> None:
    core, images = captioner_of(folders(name)), arrays(photos)
    options = GenerationOptions(max_new_tokens=10, num_beams=2)

    def run(order: list[int]) -> dict[int, list[tuple[str, float | None]]]:
        results = core.caption([images[n] for n in order], options, batch_size=3)
        found = [[(c.text, c.score) for c in r.candidates] for r in results if isinstance(r, Caption)]
        return dict(zip(order, found, strict=True))

    whole = run([0, 1, 2, 3, 4, 5])
    assert run([5, 3, 1, 0, 2, 4]) == whole
    assert run([4, 4, 4, 2]) == {n: whole[n] for n in (4, 2)}


def test_prompts_of_metadata_make_room_for_themselves(photos: Path, folders: Any, tmp_path: Path) -> None:
    """Prompts are measured before the run without the values of their fields: a long one needs larger buffers in its midst."""
    lines = [f"{name},{'a red dog ' * (1 + 40 * (name == 'd.png'))}" for name in SIZES]
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for name in SIZES:
        (pictures / name).write_bytes((photos / name).read_bytes())
    (pictures / "metadata.csv").write_text("file_name,tags\n" + "\n".join(lines) + "\n")
    flags = ("--prompt", "Tags: {tags}.", "--batch-size", 2, "--repetition-penalty", 1.3)
    done = caption(pictures, folders("qwen2.5-vl"), *flags)
    assert done.code == 0, done.err
    core = captioner_of(folders("qwen2.5-vl"))
    for row, image, line in zip(done.rows, arrays(photos), lines, strict=True):
        prompt = f"Tags: {line.partition(',')[2].strip()}."
        assert row["text"] == next(generated(core, [image], prompt, repetition_penalty=1.3))[0]


@pytest.mark.slow
def test_decoder_processes_run_the_processor(photos: Path, folders: Any, tmp_path: Path) -> None:
    """Their captions are the same bytes; what the processor refuses is a failure of that image."""
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for name in SIZES:
        (pictures / name).write_bytes((photos / name).read_bytes())
    Image.new("RGB", (900, 3)).save(pictures / "long.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    model, command = folders("qwen2.5-vl"), ("caption", pictures, "--dtype", "float32", "--max-new-tokens", 8)
    files = {}
    for workers in (0, 2):
        out = tmp_path / f"{workers}.jsonl"
        done = execute(*command, "--model", model, "--workers", workers, "--out", out)
        assert done.code == 3, done.err
        files[workers] = (out.read_bytes(), out.with_suffix(".failures.jsonl").read_bytes())
    assert files[0] == files[2]
    failures = [json.loads(line) for line in files[0][1].splitlines()]
    assert {failure["file_name"]: failure["error"] for failure in failures} == {
        "long.png": "shape",
        "broken.png": "unknown-format",
    }


def test_a_run_in_parts_gives_the_bytes_of_a_whole_one(photos: Path, folders: Any, tmp_path: Path) -> None:
    model = folders("smolvlm")
    flags = ("--num-beams", 2, "--batch-size", 3)
    assert caption(photos, model, *flags, out=tmp_path / "whole.jsonl").code == 0
    for _ in range(3):
        assert caption(photos, model, *flags, "--limit", 2, out=tmp_path / "parts.jsonl").code == 0
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (
        json.loads((tmp_path / "parts.run.json").read_text())["prompt"]
        == "<s>user: <image>Describe this image in one sentence.assistant:"
    )
    other = caption(photos, model, *flags, "--prompt", "What is this?", out=tmp_path / "whole.jsonl")
    assert (other.code, "prompt was" in other.err) == (2, True)


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen3-vl", "gemma3", "blip-2"])
def test_the_memory_of_a_slot_is_known_before_the_run(name: str, photos: Path, folders: Any) -> None:
    core = captioner_of(folders(name))
    options = GenerationOptions(max_new_tokens=10, num_beams=3)
    settings = core.settings(options, Given())
    list(core.caption(arrays(photos), options, batch_size=4))
    assert sum(buffer.nbytes for buffer in core.runtime.buffers) == 4 * core.runtime.pool_bytes(settings.search)


def test_lengths_that_the_decoder_does_not_accept_are_a_usage_error(photos: Path, folders: Any) -> None:
    done = caption(photos, folders("blip-2"), "--max-new-tokens", 250)
    assert done.code == 2
    assert "the decoder accepts 256 tokens, including image and prompt" in done.err
    refused = caption(photos, folders("smolvlm"), "--prompt", "<image><image> what?")
    assert (refused.code, "takes no image with this prompt" in refused.err) == (2, True), refused.err


def test_a_decoder_that_was_not_tested_has_no_decode_loop(photos: Path, tmp_path: Path) -> None:
    folder = save_vlm(tmp_path / "llava", "llava")
    config = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", {"text_config": config["text_config"] | {"model_type": "gpt_neox"}})
    done = call("caption", photos, "--model", folder, "--backend", "slots")
    assert (done.code, "is not supported: llava" in done.err) == (1, True)


def test_an_image_that_the_model_cannot_process_is_a_failure(
    photos: Path, folders: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fault in the model itself: none of transformers' models refuses a single image that its processor made."""
    from transformers import LlavaModel as Model

    forward = Model.forward

    def limited(self: Any, *given: Any, **inputs: Any) -> Any:
        if inputs["pixel_values"].mean() < limit:
            raise RuntimeError("no such image")
        return forward(self, *given, **inputs)

    core = captioner_of(folders("llava"))
    means = sorted(float(core.auto.inputs(image, None)["pixel_values"].mean()) for image in arrays(photos))
    limit = (means[1] + means[2]) / 2
    monkeypatch.setattr(Model, "forward", limited)
    done = caption(photos, folders("llava"), "--batch-size", 2, out=tmp_path / "x.jsonl")
    assert done.code == 3, done.err
    failures = [json.loads(line) for line in (tmp_path / "x.failures.jsonl").read_text().splitlines()]
    assert [failure["error"] for failure in failures] == ["model", "model"]
    assert "the model cannot process it: RuntimeError: no such image" in failures[0]["message"]
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == len(SIZES) - 2
    limit = 1e9
    ended = caption(photos, folders("llava"), "--batch-size", 2)
    assert (ended.code, "cannot caption: the model cannot process it" in ended.err) == (1, True), ended.err


def test_no_image_is_lost_when_memory_runs_out(folders: Any, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that the model could not process just before, nor those in the slots."""
    core, images = captioner_of(folders("llava")), arrays(photos)
    options = GenerationOptions(max_new_tokens=8)
    expected = [result.text for result in core.caption(images, options, batch_size=4) if isinstance(result, Caption)]
    prefill, step, calls = core.runtime._prefill.forward, core.runtime.step, [0, 0]  # noqa: SLF001

    def failing_prefill(inputs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("no such image")
        return prefill(inputs)

    def failing_step(*given: Any) -> Any:
        calls[1] += 1
        if calls[1] == 1:
            raise torch.OutOfMemoryError("out of memory")
        return step(*given)

    monkeypatch.setattr(core.runtime._prefill, "forward", failing_prefill)  # noqa: SLF001
    monkeypatch.setattr(core.runtime, "step", failing_step)
    results = list(core.caption(images, options, batch_size=4))
    assert [result.name for result in results] == [str(number) for number in range(len(images))]
    assert not isinstance(results[1], Caption)
    assert [r.text for r in results if isinstance(r, Caption)] == [*expected[:1], *expected[2:]]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 14}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 12}),
        ("qwen3", {}),
    ],
)
def test_other_decoders_in_the_same_model_equal_generate(
    kind: str, changes: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    model, processor = MODELS["llava"]()
    text = {**model.config.text_config.to_dict(), "model_type": kind, **changes}
    for name in ("layer_types", "architectures"):
        text.pop(name, None)
    config = type(model.config)(**{**model.config.to_dict(), "text_config": text})
    shaken(type(model)(config)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    core, images = captioner_of(tmp_path), arrays(photos)
    for search in ({}, {"num_beams": 3}):
        results = core.caption(images, GenerationOptions(max_new_tokens=10, **search), batch_size=3)
        got = [result.text for result in results if isinstance(result, Caption)]
        assert got == [best for best, *_ in generated(core, images, **search)]

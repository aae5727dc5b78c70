"""The generate backend: models of many architectures through `capcli caption`, equal to generate() one image at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, save_family
from PIL import Image
from running import call, change_json, paint, save_captioner
from vlms import MODELS, save_vlm

from capcli import Caption, Captioner
from capcli.captioning.generate_captioner import WINDOW, GenerateCaptioner, Item, Waiting
from capcli.records import Loaded

NAMES = ("a.png", "b.png", "c.png", "d.png", "wide/e.png")
FLAGS = (
    "--backend",
    "generate",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--threads",
    1,
    "--workers",
    0,
    "--max-new-tokens",
    8,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two shapes, so that they are in two batches."""
    folder = paint(tmp_path_factory.mktemp("photos"), *NAMES)
    for name in ("b.png", "d.png"):
        Image.open(folder / name).resize((72, 40)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("models") / "llava", "llava")


def caption(photos: Path, model: Path, out: Path | str = "-", *flags: object, **options: Any) -> Any:
    return call("caption", photos, "--model", model, "--out", out, *FLAGS, *flags, **options)


def texts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["file_name"]: row["text"] for row in rows}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.inference_mode()
def generated(captioner: GenerateCaptioner, photo: Path, **search: Any) -> str:
    """The caption of transformers' generate() of one image."""
    auto = captioner.auto
    inputs = auto.inputs(np.array(Image.open(photo).convert("RGB")), None)
    ids = auto.model.generate(**inputs, max_new_tokens=8, do_sample=False, **search)[0].tolist()
    given = inputs["input_ids"][0].tolist() if "input_ids" in inputs else []
    ids = ids[len(given) :] if given and ids[: len(given)] == given else ids
    return str(auto.tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_architecture_captions_as_generate_does_one_image_at_a_time(
    name: str, photos: Path, tmp_path: Path
) -> None:
    folder = save_vlm(tmp_path / name, name)
    captioner = Captioner.load(str(folder), device="cpu", dtype="float32", backend="generate")
    core: Any = captioner.core
    assert isinstance(core, GenerateCaptioner)
    for beams in (1, 3):
        ended = caption(photos, folder, "-", "--num-beams", beams)
        assert ended.code == 0, ended.err
        assert "by generate()" in ended.err
        expected = {n: generated(core, photos / n, num_beams=beams) for n in NAMES}
        assert texts(ended.rows) == expected
        assert len(set(expected.values())) > 1
        results = captioner.caption([str(photos / n) for n in NAMES], num_beams=beams, max_new_tokens=8)
        assert [result.text for result in results if isinstance(result, Caption)] == list(expected.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_give_equal_captions_and_scores(family: str, photos: Path, tmp_path: Path) -> None:
    folder = save_family(tmp_path / family, family)
    for beams in (1, 3):
        slots, generate = (
            caption(photos, folder, "-", "--num-beams", beams, "--backend", backend)
            for backend in ("slots", "generate")
        )
        assert slots.code == generate.code == 0, slots.err + generate.err
        assert texts(slots.rows) == texts(generate.rows)
        for one, other in zip(slots.rows, generate.rows, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=2e-4)


def test_a_prompt_reaches_families_by_both_backends(photos: Path, tmp_path: Path) -> None:
    folder = save_captioner(tmp_path / "captioner")
    slots, generate = (
        caption(photos, folder, "-", "--prompt", "word20 word21", "--keep-prompt", "--backend", backend)
        for backend in ("slots", "generate")
    )
    assert {n: text.strip() for n, text in texts(slots.rows).items()} == texts(generate.rows)
    assert all(row["text"].startswith("word20 word21") for row in generate.rows)


def test_a_run_stopped_halfway_resumes_with_each_image_once(photos: Path, llava: Path, tmp_path: Path) -> None:
    whole = caption(photos, llava, tmp_path / "whole.jsonl")
    assert whole.code == 0, whole.err
    for _ in range(3):
        part = caption(photos, llava, tmp_path / "parts.jsonl", "--limit", 2)
        assert part.code == 0, part.err
    parts, whole_rows = (read(tmp_path / f"{name}.jsonl") for name in ("parts", "whole"))
    assert [row["file_name"] for row in parts] == [row["file_name"] for row in whole_rows]
    assert texts(parts) == texts(whole_rows)
    other = caption(photos, llava, tmp_path / "whole.jsonl", "--prompt", "What is this?")
    assert other.code == 2
    assert "prompt was" in other.err


def test_prompt_and_system_prompt_are_in_the_conversation_of_the_run_file(
    photos: Path, llava: Path, tmp_path: Path
) -> None:
    flags = ("--prompt", "What is this?", "--system", "Be brief.")
    ended = caption(photos, llava, tmp_path / "x.jsonl", *flags)
    assert ended.code == 0, ended.err
    settings = json.loads((tmp_path / "x.run.json").read_text())["settings"]
    assert settings["backend"] == "generate"
    assert (settings["prompt"], settings["system"]) == ("What is this?", "Be brief.")
    recorded = json.loads((tmp_path / "x.run.json").read_text())
    assert recorded["prompt"] == "<s>system: Be brief.user: <image>What is this?assistant:"
    assert settings["generation"]["max_new_tokens"] == 8


def test_fields_of_a_prompt_come_from_the_metadata_beside_the_images(llava: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", "a.png", "b.png", "c.png")
    for name in ("a.png", "b.png"):
        Image.open(photos / "c.png").save(photos / name)  # so that captions differ by the prompt alone
    (photos / "metadata.csv").write_text("file_name,tags\na.png,a red dog\nb.png,blue\nc.png,\n")
    ended = caption(photos, llava, tmp_path / "x.jsonl", "--prompt", "Tags: {tags}. {{describe}}")
    assert ended.code == 3, ended.err
    rows = texts(read(tmp_path / "x.jsonl"))
    assert rows["a.png"] != rows["b.png"]
    [failure] = read(tmp_path / "x.failures.jsonl")
    assert (failure["file_name"], failure["error"]) == ("c.png", "missing-field")
    plain = caption(photos, llava, "-", "--prompt", "Tags: a red dog. {{describe}}")
    assert texts(plain.rows)["c.png"] == rows["a.png"]


def test_a_batch_that_does_not_fit_memory_is_halved(
    photos: Path, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in generate() itself: no device here runs out of memory at a known size."""
    expected = texts(caption(photos, llava).rows)
    from transformers import LlavaForConditionalGeneration as Model

    generate = Model.generate

    def limited(self: Any, **inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return generate(self, **inputs)

    monkeypatch.setattr(Model, "generate", limited)
    ended = caption(photos, llava, tmp_path / "x.jsonl")
    assert ended.code == 0, ended.err
    assert texts(read(tmp_path / "x.jsonl")) == expected
    assert ended.err.count("the device ran out of memory: continuing with a batch size of 1") == 1
    assert json.loads((tmp_path / "x.run.json").read_text())["shapes"] == {"images": 1}


def test_an_image_that_the_processor_refuses_is_a_failure(tmp_path: Path) -> None:
    """Qwen's processor takes no image that is more than 200 times as long as it is wide."""
    folder, photos = save_vlm(tmp_path / "qwen", "qwen2.5-vl"), paint(tmp_path / "photos", "a.png", "b.png")
    Image.new("RGB", (900, 3)).save(photos / "long.png")
    ended = caption(photos, folder, tmp_path / "x.jsonl")
    assert ended.code == 3, ended.err
    [failure] = read(tmp_path / "x.failures.jsonl")
    assert failure["file_name"] == "long.png"
    assert failure["error"] == "shape"
    assert len(read(tmp_path / "x.jsonl")) == 2


def test_a_model_that_fails_for_every_image_ends_the_run(photos: Path, tmp_path: Path) -> None:
    broken = save_vlm(tmp_path / "broken", "llava")
    change_json(
        broken / "processor_config.json", {"patch_size": 14}
    )  # so that image tokens and features differ in number
    ended = caption(photos, broken)
    assert ended.code == 1
    assert "cannot caption" in ended.err
    assert "Traceback" not in ended.err


def test_images_are_bounded_where_the_processor_has_no_bound(tmp_path: Path) -> None:
    free = save_vlm(tmp_path / "free", "qwen2.5-vl")
    settings = json.loads((free / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"shortest_edge": 16, "longest_edge": 1 << 30}
    (free / "processor_config.json").write_text(json.dumps(settings))
    captioner: Any = Captioner.load(str(free), device="cpu", dtype="float32", backend="generate").core
    assert captioner.auto.bound_edge(None) == 1024
    assert captioner.auto.bound_edge(300) == 300
    photos = paint(tmp_path / "photos", "a.png")
    Image.open(photos / "a.png").resize((160, 120)).save(photos / "a.png")
    small, large = (caption(photos, free, tmp_path / f"{edge}.jsonl", "--max-image-edge", edge) for edge in (16, 1000))
    assert small.code == large.code == 0, small.err + large.err
    assert (tmp_path / "16.jsonl").read_text() != (tmp_path / "1000.jsonl").read_text()


def test_samples_are_repeatable_and_best_first(photos: Path, llava: Path) -> None:
    flags = ("--do-sample", "--num-return-sequences", 3, "--seed", 5)
    first, again = (caption(photos, llava, "-", *flags) for _ in range(2))
    assert first.code == 0, first.err
    assert first.out == again.out
    for row in first.rows:
        scores = [candidate["score"] for candidate in row["candidates"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--quantize", "4bit"), "--quantize 4bit needs the package bitsandbytes: pip install bitsandbytes"),
        (("--fast-decode",), "--fast-decode: this model does not have it"),
        (("--device", "mps"), "no Metal device can be used here"),
    ],
)
def test_what_a_model_or_a_machine_does_not_have_is_said(
    flags: tuple[str, ...], message: str, photos: Path, llava: Path
) -> None:
    ended = caption(photos, llava, "-", *flags)
    assert ended.code in (1, 2)
    assert message in ended.err


def test_models_are_listed_with_the_backend_that_runs_them(llava: Path, tmp_path: Path) -> None:
    slots, other = save_captioner(tmp_path / "captioner"), tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    kosmos = save_vlm(tmp_path / "kosmos", "kosmos-2")
    ended = call("models", slots, llava, kosmos, other, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["models"]
    assert [(line["backend"], line["architecture"]) for line in found] == [
        ("slots", "vision-encoder-decoder (vit + gpt2)"),
        ("slots", "llava"),
        ("generate", "kosmos-2"),
        ("none", "gpt2"),
    ]
    listed = call("models", env={"HF_HUB_CACHE": str(tmp_path)})
    assert listed.code == 0, listed.err
    assert b"qwen3_vl" in listed.out


def test_a_model_without_a_decode_loop_runs_by_generate_with_a_warning(photos: Path, tmp_path: Path) -> None:
    folder = save_vlm(tmp_path / "kosmos", "kosmos-2")
    ended = caption(photos, folder, "-", "--backend", "auto")
    assert (ended.code, len(ended.rows)) == (0, len(NAMES)), ended.err
    assert "no decode loop for kosmos-2 yet: using transformers' generate() (slower)" in ended.err
    refused = caption(photos, folder, "-", "--backend", "slots")
    assert (refused.code, "is not supported: kosmos-2" in refused.err) == (1, True)


def test_models_that_generate_no_text_from_images_are_refused_by_name(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    ended = caption(photos, folder)
    assert ended.code == 1
    assert "is a gpt2, which transformers" in ended.err
    (folder / "config.json").write_text('{"model_type": "molmo", "auto_map": {"AutoModel": "x.Y"}}')
    assert "its own code, which capcli never runs" in caption(photos, folder).err


def test_an_image_of_a_rare_shape_does_not_hold_up_the_rows_behind_it() -> None:
    waiting, batches = Waiting(), []
    for number in range(100):
        inputs = {"pixel_values": torch.zeros(1, 9 if number == 0 else 3)}
        waiting.add(Item(number, Loaded(str(number), np.zeros(0, np.uint8)), inputs))
        if waiting.full(4):
            batches.append([item.index for item in waiting.take(4)])
    overtaken = batches.index([0])
    assert overtaken * 4 <= (WINDOW + 1) * 4
    assert sorted(index for batch in batches for index in batch)[:90] == list(range(90))


def test_a_system_prompt_that_the_model_does_not_read_is_refused(photos: Path, tmp_path: Path) -> None:
    done = caption(photos, save_vlm(tmp_path / "paligemma", "paligemma"), "-", "--system", "Be brief.")
    assert (done.code, "--system: " in done.err) == (2, True), done.err


def test_options_with_lists_of_tokens_and_too_few_beams(photos: Path, llava: Path) -> None:
    plain = caption(photos, llava)
    banned = caption(photos, llava, "-", "--bad-words-ids", "30,31", "--bad-words-ids", "40", "--suppress-tokens", "50")
    assert (banned.code, len(banned.rows)) == (plain.code, len(NAMES)) == (0, len(NAMES)), banned.err
    few = caption(photos, llava, "-", "--num-return-sequences", 3)
    assert (few.code, "need at least as many beams" in few.err) == (2, True), few.err

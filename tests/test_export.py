"""`capcli export --onnx` and captioning with what it builds, held against transformers' `generate()`."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import captioners
import onnx
import pytest
import torch
from captioners import eager, pictures, random_captioner
from oracle import Case, agrees
from running import VOCABULARY, call, change_json, paint, save_captioner
from transformers import VisionEncoderDecoderModel

from capcli import Captioner
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.engine.engine_json import read_engine, write_engine
from capcli.export import graphs
from capcli.export.folder import put_in_place
from capcli.export.parity import check_parity, draw_images, searches
from capcli.options import GenerationOptions
from capcli.runtimes.eager import Eager
from capcli.storage import locks

KINDS: dict[str, dict[str, Any]] = {
    "fused": {"encoder": "vit", "decoder": "gpt2"},
    "portable": {"encoder": "swinv2", "decoder": "bert"},
}
SEARCHES = [
    Case({}),
    Case({"num_beams": 4}),
    Case({"num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": -1.0, "early_stopping": True}),
    Case({"num_beams": 2, "repetition_penalty": 1.4}, prompt=(5, 6, 7)),
    Case({"do_sample": True, "num_return_sequences": 3, "seed": 1}),
]


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a captioner and the engine that the command makes of it, by profile."""
    place = tmp_path_factory.mktemp(request.param)
    save_captioner(place / "captioner", **KINDS[request.param])
    flags = ("--profile", request.param, "--threads", 1, "--device", "cpu")
    done = call("export", "--onnx", "--model", place / "captioner", "--out", place / "engine", *flags)
    assert done.code == 0, done.err
    assert "32 of 32 captions equal" in done.err
    return place, request.param


@pytest.fixture
def engine(built: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the engine, to do as one likes with."""
    return Path(shutil.copytree(built[0] / "engine", tmp_path / "engine"))


def caption(photos: Path, model: Path, *flags: object) -> Any:
    return call("caption", photos, "--model", model, "--device", "cpu", "--workers", 0, "-o", "-", *flags)


def model_of(kind: str) -> VisionEncoderDecoderModel:
    return random_captioner(vocabulary=VOCABULARY, **KINDS[kind])


@pytest.mark.parametrize("case", SEARCHES, ids=["greedy", "beams", "constraints", "prompt", "sampling"])
def test_an_engine_says_what_generate_says(
    built: tuple[Path, str], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine images in four slots: some leave early and others take their seats."""
    runtime: Any = Captioner.load(str(built[0] / "engine"), device="cpu").model.runtime
    monkeypatch.setattr(captioners, "eager", lambda model, lag: runtime)  # noqa: ARG005
    lengths = agrees(model_of(built[1]), pictures(9), case)
    assert len(lengths) > 1
    assert agrees(model_of(built[1]), pictures(3), case, Shapes(1, 1))


def test_the_command_writes_the_same_rows(built: tuple[Path, str], tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(7)), "broken.jpg")
    (photos / "broken.jpg").write_bytes(b"no picture")
    for flags in ((), ("--num-beams", 3, "--batch-size", 2)):
        ours, theirs = (
            caption(photos, built[0] / name, "--dtype", "float32", *flags) for name in ("engine", "captioner")
        )
        assert ours.code == theirs.code == 3
        assert [row["text"] for row in ours.rows] == [row["text"] for row in theirs.rows]
        for mine, true in zip(ours.rows, theirs.rows, strict=True):
            assert mine["score"] == pytest.approx(true["score"], abs=1e-3)


def test_it_needs_neither_the_captioner_nor_a_hub(engine: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", "one.png")
    names = {path.name for path in engine.iterdir()}
    assert {"engine.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    done = call("caption", photos, "--model", engine, "-o", "-", env={"HF_HUB_OFFLINE": "1"})
    assert done.code == 0, done.err


def test_an_interrupted_run_goes_on_and_another_engine_is_refused(
    built: tuple[Path, str], engine: Path, tmp_path: Path
) -> None:
    photos, out = paint(tmp_path / "photos", "1.png", "2.png", "3.png"), tmp_path / "c.jsonl"
    assert call("caption", photos, "--model", engine, "-o", out, "--limit", 2).code == 0
    other = call("caption", photos, "--model", built[0] / "captioner", "--dtype", "float32", "-o", out)
    assert other.code == 2
    assert "begun with other settings: model" in other.err
    again = call("caption", photos, "--model", engine, "-o", out)
    assert "1 captioned, 2 skipped" in again.err
    assert "onnxruntime" in json.loads((tmp_path / "c.run.json").read_text())["versions"]


def test_the_proof_stands_in_engine_json(built: tuple[Path, str]) -> None:
    told = json.loads((built[0] / "engine" / "engine.json").read_text())
    assert told["proof"]["passed"]
    assert told["proof"]["logits"] < 1e-3
    assert [(each["search"], each["equal"]) for each in told["proof"]["said"]] == [("greedy", 16), ("4 beams", 16)]
    assert told["profile"] == built[1]
    assert set(told["versions"]) == {"onnxruntime"}
    assert set(told["files"]) >= {"encode.onnx", "step.onnx", "step.onnx.data", "tokenizer.json", "config.json"}


@pytest.mark.parametrize("name", ["encode.onnx", "step.onnx.data", "tokenizer.json", "preprocessor_config.json"])
def test_a_tampered_engine_is_refused(engine: Path, tmp_path: Path, name: str) -> None:
    path = engine / name
    path.write_bytes(path.read_bytes() + b" ")
    refused = caption(paint(tmp_path / "photos", "one.png"), engine)
    assert refused.code == 1
    assert name in refused.err
    assert "capcli export --onnx" in refused.err
    path.unlink()
    assert "lacks" in caption(tmp_path / "photos", engine).err


def test_an_engine_of_another_runtime_is_refused_with_the_command_that_rebuilds_it(
    engine: Path, tmp_path: Path
) -> None:
    write_engine(str(engine), replace(read_engine(str(engine)), versions={"onnxruntime": "1.2.3"}))
    refused = caption(paint(tmp_path / "photos", "one.png"), engine)
    assert refused.code == 1
    assert "built with onnxruntime 1.2.3, and here is" in refused.err
    assert "capcli export --onnx --model" in refused.err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 99, "command": ["a"]}'])
def test_a_damaged_engine_json_is_an_error_for_people(engine: Path, tmp_path: Path, text: str) -> None:
    (engine / "engine.json").write_text(text)
    refused = caption(paint(tmp_path / "photos", "one.png"), engine)
    assert refused.code == 1
    assert "engine.json" in refused.err
    assert "Traceback" not in refused.err
    assert "unexpected" not in refused.err


def test_another_dtype_is_refused(engine: Path, tmp_path: Path) -> None:
    refused = caption(paint(tmp_path / "photos", "one.png"), engine, "--dtype", "bfloat16")
    assert refused.code == 2
    assert "the engine computes in float32" in refused.err


def test_an_engine_that_says_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of its graph goes wrong while it is built."""
    from capcli.export import origin

    def save(graph: onnx.ModelProto, path: str) -> None:
        if path.endswith("step.onnx"):
            weights = [w for w in graph.graph.initializer if len(w.dims) == 2 and w.data_type == onnx.TensorProto.FLOAT]
            for weight in weights:
                values = onnx.numpy_helper.to_array(weight)
                weight.CopyFrom(onnx.numpy_helper.from_array(values * 1.5, weight.name))
        original(graph, path)

    original = origin.save
    monkeypatch.setattr(origin, "save", save)
    save_captioner(tmp_path / "captioner", n_layer=1)
    flags = ("--model", tmp_path / "captioner", "--threads", 1, "--out", tmp_path / "engine")
    failed = call("export", "--onnx", *flags)
    assert failed.code == 1
    assert "failed its proof" in failed.err
    assert os.listdir(tmp_path) == ["captioner"]
    os.remove(tmp_path / "captioner" / "generation_config.json")  # its settings stand in config.json then
    kept = call("export", "--onnx", *flags, "--force")
    assert kept.code == 0
    assert "failed its proof" in kept.err
    said = caption(paint(tmp_path / "photos", "one.png"), tmp_path / "engine")
    assert said.code == 0
    assert "failed its proof" in said.err


def test_int8_captions_an_image_alike_whatever_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_captioner(tmp_path / "captioner", n_layer=1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step.onnx.data").write_text("of another engine, in which somebody stands")
    flags = ("--quantize", "int8", "--profile", "portable", "--threads", 1, "--force")
    done = call("export", "--onnx", "--model", tmp_path / "captioner", "--out", tmp_path / "engine", *flags)
    assert done.code == 0, done.err
    told = read_engine(str(tmp_path / "engine"))
    assert (told.quantize, told.profile, told.opset) == ("int8", "portable", 18)
    whole, less = (sum(p.stat().st_size for p in (tmp_path / n).iterdir()) for n in ("captioner", "engine"))
    assert less < whole
    one = paint(tmp_path / "one", "0.png")
    many = paint(tmp_path / "many", *(f"{n}.png" for n in range(8)))
    assert "in int8" in caption(one, tmp_path / "engine").err
    alone, among = (caption(folder, tmp_path / "engine", "--batch-size", 4).rows[0] for folder in (one, many))
    assert alone["text"] == among["text"]
    assert alone["score"] == pytest.approx(among["score"], abs=1e-5)


def test_half_precision_is_proved_with_the_images_of_a_folder(tmp_path: Path) -> None:
    save_captioner(tmp_path / "captioner", n_layer=1)
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)), "broken.jpg")
    (photos / "broken.jpg").write_bytes(b"no picture")
    flags = ("--dtype", "float16", "--verify-with", photos, "--device", "cpu", "--threads", 1)
    done = call("export", "--onnx", "--model", tmp_path / "captioner", "--out", tmp_path / "engine", *flags)
    assert done.code == 0, done.err
    assert f"{photos / 'broken.jpg'} is passed over" in done.err
    told = read_engine(str(tmp_path / "engine"))
    assert told.dtype == "float16"
    assert told.proof["images"] == 5
    assert all(each["equal"] >= 3 for each in told.proof["said"])
    said = caption(photos, tmp_path / "engine")
    assert [row["file_name"] for row in said.rows] == [f"{n}.png" for n in range(5)]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "--onnx or --trt"),
        (("--onnx", "--quantize", "int8", "--dtype", "float16"), "begins from float32"),
        (("--onnx", "--verify-with", "nowhere"), "nowhere"),
        (("--onnx", "--num-beams", "4"), "--num-beams is for plans"),
        (("--onnx", "--dtype", "bfloat16", "--device", "cpu"), "on CUDA only"),
        (("--onnx", "--out", "engine\udcff"), "is not UTF-8"),
        (("--trt", "--batch-sizes", "0"), "at least 1"),
        (("--trt", "--batch-sizes", "1,many"), "whole numbers"),
    ],
)
def test_wrong_usage_is_told(tmp_path: Path, flags: tuple[object, ...], told: str) -> None:
    refused = call("export", "--model", tmp_path / "m", "--out", tmp_path / "engine", *flags)
    assert refused.code == 2, refused.err
    assert told in refused.err
    assert not (tmp_path / "engine").exists()


def test_only_an_engine_is_replaced(built: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    model = ("--onnx", "--model", built[0] / "captioner")
    refused = call("export", *model, "--out", tmp_path / "mine", "--overwrite")
    assert refused.code == 2
    assert "holds no engine" in refused.err
    refused = call("export", *model, "--out", built[0] / "engine")
    assert refused.code == 2
    assert "--overwrite replaces it" in refused.err
    assert call("export", "--onnx", "--model", built[0] / "engine", "--out", tmp_path / "e").code == 2


def test_only_what_an_export_wrote_goes(engine: Path, built: tuple[Path, str]) -> None:
    model = ("--onnx", "--model", built[0] / "captioner", "--overwrite")
    for name in ("notes.txt", "mine.model", "vocab.txt"):
        (engine / name).write_text("mine")
        refused = call("export", *model, "--out", engine)
        assert refused.code == 2
        assert f"holds {name} besides an engine" in refused.err
        os.remove(engine / name)
    shutil.copytree(built[0] / "captioner", engine / "captioner")
    refused = call("export", "--onnx", "--model", engine / "captioner", "--overwrite", "--out", engine)
    assert refused.code == 2
    assert "holds what --model reads" in refused.err
    assert call("export", *model, "--out", ".").code == 2
    assert (engine / "engine.json").exists()


@pytest.fixture
def nothing_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test in which no graph is made."""

    def no(*_: object, **__: object) -> None:
        raise AssertionError("a graph was exported")

    monkeypatch.setattr(graphs, "encode_graph", no)


@pytest.mark.usefixtures("nothing_exported")
def test_what_needs_no_graph_is_refused_before_one_is_made(tmp_path: Path) -> None:
    save_captioner(tmp_path / "captioner", n_layer=1, generation={"typical_p": 0.5})
    model = ("--model", tmp_path / "captioner", "--out", tmp_path / "engine", "--threads", 1)
    refused = call("export", "--onnx", *model)
    assert refused.code == 1
    assert "typical_p=0.5" in refused.err
    change_json(tmp_path / "captioner" / "generation_config.json", {"typical_p": 1.0})
    refused = call("export", "--trt", *model, "--max-new-tokens", 65)
    assert refused.code == 2
    assert "the decoder holds 64" in refused.err
    photos = paint(tmp_path / "photos", "broken.jpg")
    (photos / "broken.jpg").write_bytes(b"no picture")
    refused = call("export", "--onnx", *model, "--verify-with", photos)
    assert refused.code == 1
    assert "none of its images can be used" in refused.err


def test_nothing_stays_of_an_export_that_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor of one that was killed, once another begins; one that is under way keeps its folder, and a stranger's stays."""
    save_captioner(tmp_path / "captioner", n_layer=1)
    killed, alive, other = (tmp_path / f".engine.building-{n}" for n in ("abcdefgh", "12345678", "backup"))
    for folder in (killed / "engine", alive, other):
        folder.mkdir(parents=True)
    monkeypatch.setattr(graphs, "encode_graph", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    model = ("--model", tmp_path / "captioner", "--out", tmp_path / "engine", "--threads", 1)
    with open(alive / "lock", "wb") as lock:
        assert locks.take(lock.fileno())
        assert call("export", "--onnx", *model).code == 143
    assert {path.name for path in tmp_path.iterdir()} == {"captioner", alive.name, other.name}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_cannot_be_written_is_told_and_what_cannot_be_read_is_not_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_captioner(tmp_path / "captioner", n_layer=1)
    (tmp_path / "file").write_text("mine")
    model = ("--model", tmp_path / "captioner", "--threads", 1)
    refused = call("export", "--onnx", *model, "--out", tmp_path / "file" / "engine")
    assert refused.code == 1
    assert "cannot be written" in refused.err

    def unreadable(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "weights")

    monkeypatch.setattr(graphs, "encode_graph", unreadable)
    failed = call("export", "--onnx", *model, "--out", tmp_path / "engine")
    assert failed.code == 1
    assert "cannot be written" not in failed.err
    assert "weights" in failed.err


def test_an_engine_comes_back_where_its_replacement_is_interrupted(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Path(shutil.copytree(engine, tmp_path / "site" / "engine"))
    before, rename = (engine / "engine.json").stat().st_ino, os.rename

    def interrupted(source: object, target: object) -> None:
        if source == str(new):
            raise KeyboardInterrupt
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(str(new), str(engine), overwrite=True)
    assert (engine / "engine.json").stat().st_ino == before
    monkeypatch.undo()
    put_in_place(str(new), str(engine), overwrite=True)
    assert (engine / "engine.json").stat().st_ino != before


def test_without_tensorrt_the_graphs_for_it_are_left_and_an_engine_stays(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capcli.errors import CapcliError
    from capcli.export import tensorrt

    def missing() -> None:
        raise CapcliError("TensorRT is missing")

    monkeypatch.setattr(tensorrt, "require_tensorrt", missing)
    before = (engine / "engine.json").read_bytes()
    save_captioner(tmp_path / "captioner", n_layer=1)
    flags = ("--model", tmp_path / "captioner", "--batch-sizes", "1,8", "--threads", 1)
    left = call("export", "--trt", *flags, "--out", engine, "--overwrite")
    assert left.code == 1
    assert "TensorRT is missing" in left.err
    assert "capcli export --trt --model" in left.err
    assert (engine / "engine.json").read_bytes() == before
    unfinished = Path(f"{engine}-unfinished")
    assert {"encode.trt.onnx", "step.trt.onnx", "engine.json"} <= {path.name for path in unfinished.iterdir()}
    refused = caption(paint(tmp_path / "photos", "one.png"), unfinished)
    assert refused.code == 1
    assert "has no plans yet" in refused.err


def test_an_engine_whose_numbers_overflow_fails_its_proof(built: tuple[Path, str]) -> None:
    """In half precision no token need be alike, so only the logits can tell."""
    truth, wrong = (Captioner.load(str(built[0] / n), device="cpu", dtype="float32") for n in ("captioner", "engine"))
    runtime: Any = wrong.model.runtime
    step = runtime.step
    runtime.step = lambda *given: step(*given) * float("nan")
    settings = truth.settings(GenerationOptions(max_new_tokens=4))
    images = pictures(2)
    told = check_parity(runtime, truth.model.runtime, images, searches(settings, (1, 4)), "float16")
    assert not told.passed
    runtime.step = step
    assert check_parity(runtime, truth.model.runtime, images, searches(settings, (1, 4)), "float16").passed


def proof_runtimes() -> tuple[Any, Any, Settings]:
    """Two of one captioner, the truth and one to spoil, and its greedy search."""
    model = random_captioner()
    settings = Settings(prompt=(118,), eos_token_ids=(119,), max_new_tokens=12)
    truth, engine = (eager(model) for _ in range(2))
    return truth, engine, settings


def prefer(runtime: Any, first: int, second: int, lead: float) -> None:
    """At the first step every row says `first`, and `second` is only `lead` behind."""
    step = Eager.step

    def preferring(tokens: torch.Tensor, position: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        logits = step(runtime, tokens, position, visible).clone()
        begun = (position == 0)[:, None]
        top = logits.amax(-1) + 1
        for token, value in ((first, top), (second, top - lead)):
            logits[..., token] = torch.where(begun, value, logits[..., token])
        return logits

    runtime.step = preferring


@pytest.mark.parametrize(("lead", "tied"), [(2e-5, True), (4e-4, False)])
def test_a_greedy_caption_ties_where_the_tokens_that_part_it_do(lead: float, tied: bool) -> None:
    """However far the captions come apart after it."""
    truth, engine, settings = proof_runtimes()
    prefer(truth, 5, 6, lead)
    prefer(engine, 6, 5, lead)
    told = check_parity(engine, truth, draw_images((32, 32)), {"greedy": settings}, "float32")
    assert told.logits < told.bound
    assert told.passed is tied
    assert (told.said[0].equal, told.said[0].ties) == (0, 16 if tied else 0)


def test_a_greedy_tie_is_one_under_the_constraints() -> None:
    """A token said before is penalised: what is nearly alike then was not before."""
    truth, engine, settings = proof_runtimes()
    settings = replace(settings, prompt=(118, 5), repetition_penalty=2.0)
    for runtime, ahead in ((truth, 1e-5), (engine, -1e-5)):

        def step(*given: torch.Tensor, runtime: Any = runtime, ahead: float = ahead) -> torch.Tensor:
            logits = Eager.step(runtime, *given).clone()
            top = logits.amax(-1).abs() + 10
            logits[..., 5], logits[..., 6] = 2 * top + ahead, top
            return logits

        runtime.step = step
    told = check_parity(engine, truth, draw_images((32, 32)), {"greedy": settings}, "float32")
    assert (told.said[0].equal, told.said[0].ties) == (0, 16)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_beams_that_went_wrong_are_no_ties_whatever_lengths_divide_scores_by(precision: str) -> None:
    """And in less than float32 captions that are all others are damage, though the logits of the first row are right."""
    truth, engine, settings = proof_runtimes()

    def wrong_behind_the_first(*given: torch.Tensor) -> torch.Tensor:
        logits = Eager.step(engine, *given).clone()
        logits[:, 1:] = logits[:, 1:].roll(1, -1)
        return logits

    engine.step = wrong_behind_the_first
    penalised = searches(replace(settings, length_penalty=9.0), (1, 4))
    told = check_parity(engine, truth, draw_images((32, 32)), penalised, precision)
    assert told.logits < told.bound
    assert told.said[0].equal == 16
    assert not told.passed
    assert told.failed is not None
    assert "captions differ (4 beams)" in told.failed


def test_drawn_images_are_unlike_each_other() -> None:
    images = draw_images((32, 48))
    assert all(image.shape == (32, 48, 3) for image in images)
    assert len({image.tobytes() for image in images}) == len(images)
    assert all(torch.equal(*map(torch.from_numpy, pair)) for pair in zip(images, draw_images((32, 48)), strict=True))

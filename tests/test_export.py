"""`capcli export --onnx`, and captions of the engines that it builds compared with transformers' `generate()`."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import captioners
import onnx
import pytest
import torch
from captioners import eager, pictures, random_captioner
from exporting import KINDS, REPORT, built_engine, cached_graphs
from oracle import Case, agrees
from running import VOCABULARY, call, change_json, paint, save_captioner

from capcli import Captioner
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.engine.engine_json import read_engine
from capcli.export import graphs
from capcli.export.folder import put_in_place
from capcli.export.parity import check_parity, searches
from capcli.export.parity_images import draw_images
from capcli.export.quantize import quiet
from capcli.export.run import float32_convolutions
from capcli.options import GenerationOptions
from capcli.runtimes.eager import Eager
from capcli.storage import locks

pytestmark = pytest.mark.slow

SEARCHES = [
    Case({}),
    Case({"num_beams": 4}),
    Case({"num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": -1.0, "early_stopping": True}),
    Case({"num_beams": 2, "repetition_penalty": 1.4}, prompt=(5, 6, 7)),
    Case({"do_sample": True, "num_return_sequences": 3, "seed": 1}),
]


IMAGES = draw_images((32, 32), 4)  # of parity checks that compare captioners with themselves


@pytest.fixture(scope="module", autouse=True)
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cached_graphs(tmp_path_factory):
        yield


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a captioner and the engine that the command makes of it, and the profile."""
    return built_engine(tmp_path_factory, request.param), request.param


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fused engine, for tests that do not depend on the profile."""
    return built_engine(tmp_path_factory, "fused")


@pytest.fixture
def engine(fused: Path, tmp_path: Path) -> Path:
    """A copy of the fused engine, which a test may change."""
    return Path(shutil.copytree(fused / "engine", tmp_path / "engine"))


def caption(photos: Path, model: Path, *flags: object) -> Any:
    return call("caption", photos, "--model", model, "--device", "cpu", "--workers", 0, "-o", "-", *flags)


@pytest.mark.parametrize("case", SEARCHES, ids=["greedy", "beams", "constraints", "prompt", "sampling"])
def test_an_engine_gives_the_captions_of_generate(
    built: tuple[Path, str], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine images in four slots: some end early and others take their slots."""
    runtime: Any = Captioner.load(str(built[0] / "engine"), device="cpu").core.model.runtime
    monkeypatch.setattr(captioners, "eager", lambda model, lag: runtime)  # noqa: ARG005
    model = random_captioner(vocabulary=VOCABULARY, **KINDS[built[1]])
    # Measured against generate() in float64, scores are up to 1.6e-6 off in float32, generate()'s own included.
    lengths = agrees(model, pictures(9), case, rtol=4e-6)
    assert len(lengths) > 1
    assert agrees(model, pictures(3), case, Shapes(1, 1), rtol=4e-6)


def test_the_command_writes_the_rows_of_the_captioner(built: tuple[Path, str], tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(7)), "broken.jpg")
    (photos / "broken.jpg").write_bytes(b"no picture")
    for flags in ((), ("--num-beams", 3, "--batch-size", 2)):
        engine, captioner = (
            caption(photos, built[0] / name, "--dtype", "float32", *flags) for name in ("engine", "captioner")
        )
        assert engine.code == captioner.code == 3
        assert [row["text"] for row in engine.rows] == [row["text"] for row in captioner.rows]
        for ours, theirs in zip(engine.rows, captioner.rows, strict=True):
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-3)


def test_an_engine_needs_neither_the_captioner_nor_a_hub(engine: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", "one.png")
    names = {path.name for path in engine.iterdir()}
    assert {"engine.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    done = call("caption", photos, "--model", engine, "-o", "-", env={"HF_HUB_OFFLINE": "1"})
    assert done.code == 0, done.err


def test_an_interrupted_run_resumes_and_another_engine_is_refused(fused: Path, engine: Path, tmp_path: Path) -> None:
    photos, out = paint(tmp_path / "photos", "1.png", "2.png", "3.png"), tmp_path / "c.jsonl"
    assert call("caption", photos, "--model", engine, "-o", out, "--limit", 2).code == 0
    other = call("caption", photos, "--model", fused / "captioner", "--dtype", "float32", "-o", out)
    assert other.code == 2
    assert "started with other settings: model" in other.err
    resumed = call("caption", photos, "--model", engine, "-o", out)
    assert "1 captioned, 2 skipped" in resumed.err
    assert "onnxruntime" in json.loads((tmp_path / "c.run.json").read_text())["versions"]


def test_engine_json_has_the_parity_check(built: tuple[Path, str]) -> None:
    content = json.loads((built[0] / "engine" / "engine.json").read_text())
    parity = content["parity"]
    assert parity["passed"]
    assert parity["logits"] < 1e-3
    assert [(search["search"], search["equal"]) for search in parity["searches"]] == [("greedy", 16), ("4 beams", 16)]
    assert "32 of 32 captions equal to PyTorch's in float32" in (built[0] / REPORT).read_text()
    assert content["profile"] == built[1]
    assert set(content["versions"]) == {"onnxruntime"}
    assert set(content["files"]) >= {"encode.onnx", "step.onnx", "step.onnx.data", "tokenizer.json", "config.json"}


def test_another_dtype_is_refused(fused: Path, tmp_path: Path) -> None:
    refused = caption(paint(tmp_path / "photos", "one.png"), fused / "engine", "--dtype", "bfloat16")
    assert refused.code == 2
    assert "the engine computes in float32" in refused.err


def test_an_engine_that_fails_its_parity_check_is_kept_only_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of its step are changed while it is built."""
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
    assert "failed its parity check" in failed.err
    assert os.listdir(tmp_path) == ["captioner"]
    os.remove(tmp_path / "captioner" / "generation_config.json")  # its settings are in config.json too
    kept = call("export", "--onnx", *flags, "--force")
    assert kept.code == 0
    assert "failed its parity check" in kept.err
    warned = caption(paint(tmp_path / "photos", "one.png"), tmp_path / "engine")
    assert warned.code == 0
    assert "failed its parity check" in warned.err


def test_captions_in_int8_do_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_captioner(tmp_path / "captioner", n_layer=1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step.onnx.data").write_text("the weights of another engine, in the working directory")
    flags = ("--quantize", "int8", "--profile", "portable", "--threads", 1, "--force")
    done = call("export", "--onnx", "--model", tmp_path / "captioner", "--out", tmp_path / "engine", *flags)
    assert done.code == 0, done.err
    engine = read_engine(str(tmp_path / "engine"))
    assert (engine.quantize, engine.profile, engine.opset) == ("int8", "portable", 18)
    before, after = (sum(p.stat().st_size for p in (tmp_path / n).iterdir()) for n in ("captioner", "engine"))
    assert after < before
    one = paint(tmp_path / "one", "0.png")
    many = paint(tmp_path / "many", *(f"{n}.png" for n in range(8)))
    assert "in int8" in caption(one, tmp_path / "engine").err
    alone, among = (caption(folder, tmp_path / "engine", "--batch-size", 4).rows[0] for folder in (one, many))
    assert alone["text"] == among["text"]
    assert alone["score"] == pytest.approx(among["score"], abs=1e-5)


def test_half_precision_is_checked_with_the_images_of_a_folder(tmp_path: Path) -> None:
    save_captioner(tmp_path / "captioner", n_layer=1)
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)), "broken.jpg")
    (photos / "broken.jpg").write_bytes(b"no picture")
    flags = ("--dtype", "float16", "--verify-with", photos, "--device", "cpu", "--threads", 1)
    done = call("export", "--onnx", "--model", tmp_path / "captioner", "--out", tmp_path / "engine", *flags)
    assert done.code == 0, done.err
    assert f"{photos / 'broken.jpg'} is skipped" in done.err
    engine = read_engine(str(tmp_path / "engine"))
    assert engine.dtype == "float16"
    assert engine.parity["images"] == 5
    assert all(search["equal"] >= 3 for search in engine.parity["searches"])
    captioned = caption(photos, tmp_path / "engine")
    assert [row["file_name"] for row in captioned.rows] == [f"{n}.png" for n in range(5)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--onnx or --trt"),
        (("--onnx", "--quantize", "int8", "--dtype", "float16"), "starts from float32"),
        (("--onnx", "--verify-with", "nowhere"), "nowhere"),
        (("--onnx", "--num-beams", "4"), "--num-beams is for plans"),
        (("--onnx", "--dtype", "bfloat16", "--device", "cpu"), "on CUDA only"),
        (("--onnx", "--out", "engine\udcff"), "is not UTF-8"),
        (("--trt", "--batch-sizes", "0"), "at least 1"),
        (("--trt", "--batch-sizes", "1,many"), "whole numbers"),
    ],
)
def test_wrong_usage_is_refused(tmp_path: Path, flags: tuple[object, ...], message: str) -> None:
    refused = call("export", "--model", tmp_path / "m", "--out", tmp_path / "engine", *flags)
    assert refused.code == 2, refused.err
    assert message in refused.err
    assert not (tmp_path / "engine").exists()


def test_only_an_engine_is_replaced(fused: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    model = ("--onnx", "--model", fused / "captioner")
    refused = call("export", *model, "--out", tmp_path / "mine", "--overwrite")
    assert refused.code == 2
    assert "is not an engine" in refused.err
    refused = call("export", *model, "--out", fused / "engine")
    assert refused.code == 2
    assert "--overwrite replaces it" in refused.err
    assert call("export", "--onnx", "--model", fused / "engine", "--out", tmp_path / "e").code == 2


def test_files_that_no_export_wrote_are_not_removed(fused: Path, engine: Path) -> None:
    model = ("--onnx", "--model", fused / "captioner", "--overwrite")
    for name in ("notes.txt", "mine.model", "vocab.txt"):
        (engine / name).write_text("mine")
        refused = call("export", *model, "--out", engine)
        assert refused.code == 2
        assert f"contains {name}, which is not part of its engine" in refused.err
        os.remove(engine / name)
    shutil.copytree(fused / "captioner", engine / "captioner")
    refused = call("export", "--onnx", "--model", engine / "captioner", "--overwrite", "--out", engine)
    assert refused.code == 2
    assert "contains the input of --model" in refused.err
    assert call("export", *model, "--out", ".").code == 2
    assert (engine / "engine.json").exists()


@pytest.fixture
def nothing_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a graph is exported."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a graph was exported")

    monkeypatch.setattr(graphs, "encode_graph", fail)


@pytest.mark.usefixtures("nothing_exported")
def test_errors_that_need_no_graph_come_before_the_export(tmp_path: Path) -> None:
    save_captioner(tmp_path / "captioner", n_layer=1, generation={"typical_p": 0.5})
    model = ("--model", tmp_path / "captioner", "--out", tmp_path / "engine", "--threads", 1)
    refused = call("export", "--onnx", *model)
    assert refused.code == 1
    assert "typical_p=0.5" in refused.err
    change_json(tmp_path / "captioner" / "generation_config.json", {"typical_p": 1.0})
    refused = call("export", "--trt", *model, "--max-new-tokens", 65)
    assert refused.code == 2
    assert "the decoder has room for 64" in refused.err
    photos = paint(tmp_path / "photos", "broken.jpg")
    (photos / "broken.jpg").write_bytes(b"no picture")
    refused = call("export", "--onnx", *model, "--verify-with", photos)
    assert refused.code == 1
    assert "none of its images can be used" in refused.err


def test_temporary_folders_of_ended_exports_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an export that is ended at its end, and of a killed one by the next; a running one and other folders stay."""
    save_captioner(tmp_path / "captioner", n_layer=1)
    killed, alive, other = (tmp_path / f".engine.building-{n}" for n in ("abcdefgh", "12345678", "backup"))
    for folder in (killed / "engine", alive, other):
        folder.mkdir(parents=True)
    monkeypatch.setattr(graphs, "encode_graph", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    model = ("--model", tmp_path / "captioner", "--out", tmp_path / "engine", "--threads", 1)
    running = os.open(alive, os.O_RDONLY)
    assert locks.take(running)
    assert call("export", "--onnx", *model).code == 143
    os.close(running)
    assert {path.name for path in tmp_path.iterdir()} == {"captioner", alive.name, other.name}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_folder_that_cannot_be_written_is_an_error_and_a_read_error_is_not_called_that(
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


def test_an_engine_is_restored_when_its_replacement_is_interrupted(
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


def test_without_tensorrt_its_graphs_are_kept_beside_an_engine(
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
    done = call("export", "--trt", *flags, "--out", engine, "--overwrite")
    assert done.code == 1
    assert "TensorRT is missing" in done.err
    assert "capcli export --trt --model" in done.err
    assert (engine / "engine.json").read_bytes() == before
    unfinished = Path(f"{engine}-unfinished")
    assert {"encode.trt.onnx", "step.trt.onnx", "engine.json"} <= {path.name for path in unfinished.iterdir()}
    refused = caption(paint(tmp_path / "photos", "one.png"), unfinished)
    assert refused.code == 1
    assert "has no plans yet" in refused.err


def test_an_engine_whose_numbers_overflow_fails_its_parity_check(fused: Path) -> None:
    """In half precision half of the captions may differ, so only the logits show it."""
    reference, engine = (
        Captioner.load(str(fused / name), device="cpu", dtype="float32").core for name in ("captioner", "engine")
    )
    runtime: Any = engine.model.runtime
    step = runtime.step
    runtime.step = lambda *inputs: step(*inputs) * float("nan")
    settings = reference.settings(GenerationOptions(max_new_tokens=4))
    images = pictures(2)
    result = check_parity(runtime, reference.model.runtime, images, searches(settings, (1, 4)), "float16")
    assert not result.passed
    runtime.step = step
    assert check_parity(runtime, reference.model.runtime, images, searches(settings, (1, 4)), "float16").passed


def two_runtimes() -> tuple[Any, Any, Settings]:
    """Two runtimes of one captioner, a reference and an engine to damage, and its greedy search."""
    model = random_captioner()
    settings = Settings(prompt=(118,), eos_token_ids=(119,), max_new_tokens=12)
    reference, engine = (eager(model) for _ in range(2))
    return reference, engine, settings


def prefer(runtime: Any, first: int, second: int, lead: float) -> None:
    """At the first step `first` has the highest logit in every row, and `second` is `lead` below it."""
    step = Eager.step

    def preferring(tokens: torch.Tensor, position: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        logits = step(runtime, tokens, position, visible).clone()
        at_start = (position == 0)[:, None]
        top = logits.amax(-1) + 1
        for token, value in ((first, top), (second, top - lead)):
            logits[..., token] = torch.where(at_start, value, logits[..., token])
        return logits

    runtime.step = preferring


@pytest.mark.parametrize(("lead", "tied"), [(2e-5, True), (4e-4, False)])
def test_greedy_captions_tie_where_their_first_differing_tokens_do(lead: float, tied: bool) -> None:
    """However far the captions differ after it."""
    reference, engine, settings = two_runtimes()
    prefer(reference, 5, 6, lead)
    prefer(engine, 6, 5, lead)
    result = check_parity(engine, reference, IMAGES, {"greedy": settings}, "float32")
    assert result.logits < result.bound
    assert result.passed is tied
    assert (result.searches[0].equal, result.searches[0].ties) == (0, len(IMAGES) if tied else 0)


def test_a_greedy_tie_is_one_under_the_constraints() -> None:
    """The logits of a repeated token are penalised: two that tie after that do not tie before."""
    reference, engine, settings = two_runtimes()
    settings = replace(settings, prompt=(118, 5), repetition_penalty=2.0)
    for runtime, ahead in ((reference, 1e-5), (engine, -1e-5)):

        def step(*inputs: torch.Tensor, runtime: Any = runtime, ahead: float = ahead) -> torch.Tensor:
            logits = Eager.step(runtime, *inputs).clone()
            top = logits.amax(-1).abs() + 10
            logits[..., 5], logits[..., 6] = 2 * top + ahead, top
            return logits

        runtime.step = step
    result = check_parity(engine, reference, IMAGES, {"greedy": settings}, "float32")
    assert (result.searches[0].equal, result.searches[0].ties) == (0, len(IMAGES))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_wrong_beams_are_no_ties_whatever_the_length_penalty(precision: str) -> None:
    """In less than float32 too: captions that all differ are damage, though the logits of the first row are right."""
    reference, engine, settings = two_runtimes()

    def wrong_after_the_first_row(*inputs: torch.Tensor) -> torch.Tensor:
        logits = Eager.step(engine, *inputs).clone()
        logits[:, 1:] = logits[:, 1:].roll(1, -1)
        return logits

    engine.step = wrong_after_the_first_row
    penalised = searches(replace(settings, length_penalty=9.0), (1, 4))
    result = check_parity(engine, reference, IMAGES, penalised, precision)
    assert result.logits < result.bound
    assert result.searches[0].equal == len(IMAGES)
    assert not result.passed
    assert result.failed is not None
    assert "captions differ (4 beams)" in result.failed


def test_drawn_images_differ_from_each_other_and_are_always_the_same() -> None:
    images = draw_images((32, 48))
    assert all(image.shape == (32, 48, 3) for image in images)
    assert len({image.tobytes() for image in images}) == len(images)
    assert all(torch.equal(*map(torch.from_numpy, pair)) for pair in zip(images, draw_images((32, 48)), strict=True))


def test_the_parity_check_leaves_the_processs_settings_as_they_were() -> None:
    allowed = torch.backends.cudnn.allow_tf32
    logging.disable(logging.INFO)
    try:
        with float32_convolutions(), quiet():
            assert not torch.backends.cudnn.allow_tf32
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)
    assert torch.backends.cudnn.allow_tf32 == allowed

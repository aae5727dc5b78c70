"""engine.json and its folder: an engine that has changed is refused with the command that builds it again where it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from exporting import built_engine
from running import Ended, call, change_json, paint

from capcli.captioning import model
from capcli.cli.shared_options import set_openmp_wait_policy
from capcli.engine.engine_json import Engine, Memory, read_engine, write_engine
from capcli.errors import CapcliError
from capcli.runtimes.ort import import_onnxruntime


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a captioner and its engine: treat it as constant."""
    return built_engine(tmp_path_factory, "fused")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("photos"), "one.png")


@pytest.fixture
def engine(exported: Path, tmp_path: Path) -> Path:
    """A copy of the engine, which a test may change."""
    return Path(shutil.copytree(exported / "engine", tmp_path / "engine"))


def caption(photos: Path, engine: Path) -> Ended:
    return call("caption", photos, "--model", engine, "--device", "cpu", "--workers", 0, "-o", "-")


def write(folder: Path, **fields: Any) -> None:
    """Writes engine.json as capcli would, with other values for some fields."""
    write_engine(str(folder), replace(read_engine(str(folder)), **fields))


@pytest.mark.slow
def test_the_command_builds_a_moved_engine_where_it_is_with_its_options(
    exported: Path, photos: Path, engine: Path
) -> None:
    assert caption(photos, engine).code == 0
    (engine / "step.onnx").write_bytes(b"")
    refused = caption(photos, engine)
    assert refused.code == 1
    assert f"--out {engine} " in refused.err
    assert str(exported / "engine") not in refused.err
    assert "--device cpu --force --overwrite" in refused.err


def test_an_engine_json_of_format_1_is_read(tmp_path: Path) -> None:
    """As capcli 0.1 wrote it, with the keys proof, said and asked, and a hash over these."""
    shutil.copy(Path(__file__).with_name("engine_format_1.json"), tmp_path / "engine.json")
    engine = read_engine(str(tmp_path))
    assert engine.memory == Memory(2, 4, 17, 12, reads_question=True)
    assert not engine.passed
    assert engine.parity["failed"] == "1 of 16 captions differ (4 beams)"
    assert engine.parity["searches"] == [
        {"search": "greedy", "captions": 16, "equal": 16, "ties": 0},
        {"search": "4 beams", "captions": 16, "equal": 14, "ties": 1},
    ]
    write_engine(str(tmp_path), engine)
    content = json.loads((tmp_path / "engine.json").read_text())
    assert content["format"] == 2
    assert not {"proof", "said", "asked"} & set(re.findall(r'"(\w+)":', json.dumps(content)))
    assert read_engine(str(tmp_path)) == engine


def test_an_edited_engine_json_of_format_1_is_refused(tmp_path: Path) -> None:
    text = Path(__file__).with_name("engine_format_1.json").read_text()
    (tmp_path / "engine.json").write_text(text.replace('"passed": false', '"passed": true'))
    with pytest.raises(CapcliError, match="was edited"):
        read_engine(str(tmp_path))


@pytest.mark.parametrize("name", ["encode.onnx", "step.onnx.data", "tokenizer.json", "preprocessor_config.json"])
def test_a_changed_file_is_refused(photos: Path, engine: Path, name: str) -> None:
    path = engine / name
    path.write_bytes(path.read_bytes() + b" ")
    refused = caption(photos, engine)
    assert refused.code == 1
    assert name in refused.err
    assert "capcli export --onnx" in refused.err
    path.unlink()
    assert "lacks" in caption(photos, engine).err


def test_an_engine_of_another_runtime_is_refused_with_the_command_that_rebuilds_it(photos: Path, engine: Path) -> None:
    write(engine, versions={"onnxruntime": "1.2.3"})
    refused = caption(photos, engine)
    assert refused.code == 1
    assert f"built with onnxruntime 1.2.3, and {onnxruntime.__version__} is installed" in refused.err
    assert "capcli export --onnx --model" in refused.err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 99, "command": ["a"]}'])
def test_a_damaged_engine_json_is_refused_without_a_traceback(photos: Path, engine: Path, text: str) -> None:
    (engine / "engine.json").write_text(text)
    refused = caption(photos, engine)
    assert refused.code == 1
    assert "engine.json" in refused.err
    assert "Traceback" not in refused.err
    assert "unexpected" not in refused.err


@pytest.mark.parametrize(
    "fields",
    [{"versions": {}}, {"kind": "foo"}, {"parity": {"passed": True}}, {"files": {}}, {"more": 1}, {"hash": None}],
    ids=lambda fields: next(iter(fields)),
)
def test_an_edited_engine_json_is_refused(exported: Path, photos: Path, engine: Path, fields: dict[str, Any]) -> None:
    change_json(engine / "engine.json", fields)
    refused = caption(photos, engine)
    assert refused.code == 1
    assert "engine.json was edited" in refused.err
    assert f"capcli export --onnx --model {exported / 'captioner'} --out {engine}" in refused.err


def test_the_layout_of_engine_json_does_not_matter(photos: Path, engine: Path) -> None:
    content = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps(dict(sorted(content.items())), indent=None))
    assert caption(photos, engine).code == 0


WRONG: dict[str, Any] = {
    "kind": "foo",
    "pixels": [32],
    "memory": None,
    "positions": True,
    "dtype": 32,
    "captioner": [],
    "command": "capcli",
    "gpu": "a GPU",
    "buckets": [{"slots": 1}],
    "versions": {"onnxruntime": 1},
    "parity": "passed",
    "files": ["step.onnx"],
}


@pytest.mark.parametrize("name", WRONG)
def test_values_of_wrong_types_are_refused(photos: Path, engine: Path, name: str) -> None:
    write(engine, **{name: WRONG[name]})
    refused = caption(photos, engine)
    assert refused.code == 1
    assert "engine.json is damaged" in refused.err
    assert "unexpected" not in refused.err


def without(engine: Engine, name: str) -> dict[str, str]:
    return {file: digest for file, digest in engine.files.items() if file != name}


@pytest.mark.parametrize("name", ["step.onnx", "encode.onnx", "tokenizer.json", "preprocessor_config.json"])
def test_engine_json_must_name_every_file(photos: Path, engine: Path, name: str) -> None:
    write(engine, files=without(read_engine(str(engine)), name))
    refused = caption(photos, engine)
    assert refused.code == 1
    assert name in refused.err
    assert "was modified after it was built" in refused.err


def test_engine_json_must_name_the_runtime(photos: Path, engine: Path) -> None:
    write(engine, versions={})
    assert "names no version of ONNX Runtime" in caption(photos, engine).err


@pytest.mark.parametrize("name", ["processor_config.json", "added_tokens.json", "other.model"])
def test_an_added_file_that_loading_would_read_is_refused(photos: Path, engine: Path, name: str) -> None:
    """A processor_config.json would be preferred to the engine's preprocessor_config.json."""
    (engine / name).write_text('{"image_processor": {"size": {"height": 32, "width": 32}}}')
    refused = caption(photos, engine)
    assert refused.code == 1
    assert f"{name} was added to it (remove it)" in refused.err
    assert "capcli export" not in refused.err, "an export refuses to remove the file"


def test_an_engine_that_failed_its_parity_check_captions_with_a_warning(photos: Path, engine: Path) -> None:
    """Only `true` is passed."""
    write(engine, parity={"passed": "no", "failed": "all captions differ"})
    done = caption(photos, engine)
    assert done.code == 0
    assert "failed its parity check (all captions differ)" in done.err


def test_generation_settings_and_other_files_may_be_changed(photos: Path, engine: Path) -> None:
    change_json(engine / "generation_config.json", {"max_new_tokens": 3})
    (engine / "notes.txt").write_text("mine")
    assert caption(photos, engine).code == 0


def test_threads_of_pytorch_sleep_beside_an_engine_unless_set_otherwise(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    set_openmp_wait_policy(str(tmp_path))
    assert "OMP_WAIT_POLICY" not in os.environ
    set_openmp_wait_policy(str(engine))
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    set_openmp_wait_policy(str(engine))
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def test_int8_stays_on_the_cpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(model, "choose_device", lambda _: cuda)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    content = read_engine(str(engine))
    assert model.device_of("auto", content) == cuda
    assert model.device_of("auto", replace(content, quantize="int8")) == torch.device("cpu")


def test_an_older_onnx_runtime_is_refused_before_a_fused_export(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.3")
    refused = call("export", "--onnx", "--model", exported / "captioner", "--out", tmp_path / "engine")
    assert refused.code == 1
    assert "ONNX Runtime 1.24.3 is too old for --profile fused: 1.25 or newer" in refused.err
    assert "exporting" not in refused.err
    assert import_onnxruntime("portable") is onnxruntime


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('libonnxruntime.so: cannot open shared object file')", "installed but cannot be loaded"),
        ("raise ModuleNotFoundError(name='onnxruntime.capi.state')", "installed but cannot be loaded"),
        ("raise ModuleNotFoundError(name='onnxruntime')", "ONNX Runtime is missing: pip install"),
    ],
)
def test_a_broken_onnx_runtime_and_a_missing_one_have_different_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(source)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CapcliError, match=message):
        import_onnxruntime()

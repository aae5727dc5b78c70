"""engine.json and the folder around it: what was changed is refused with the command that builds it again, in its place."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from running import Ended, call, change_json, paint, save_captioner

from capcli.cli.shared_options import set_openmp_wait_policy
from capcli.engine.engine_json import Engine, read_engine, write_engine
from capcli.errors import CapcliError
from capcli.models import build
from capcli.runtimes.ort import import_onnxruntime


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, and an engine: treat both as constant."""
    place = tmp_path_factory.mktemp("exported")
    save_captioner(place / "captioner", n_layer=1)
    flags = ("--model", place / "captioner", "--out", place / "engine", "--threads", 1, "--device", "cpu", "--force")
    done = call("export", "--onnx", *flags)
    assert done.code == 0, done.err
    paint(place / "photos", "one.png")
    return place


@pytest.fixture
def engine(exported: Path, tmp_path: Path) -> Path:
    """A copy of the engine, to do as one likes with."""
    return Path(shutil.copytree(exported / "engine", tmp_path / "engine"))


def caption(exported: Path, engine: Path) -> Ended:
    return call("caption", exported / "photos", "--model", engine, "--device", "cpu", "--workers", 0, "-o", "-")


def written(folder: Path, **fields: Any) -> None:
    """engine.json as capcli would write it of an engine that says this."""
    write_engine(str(folder), replace(read_engine(str(folder)), **fields))


def test_the_command_builds_it_again_where_it_lies_and_as_it_was_built(exported: Path, engine: Path) -> None:
    assert caption(exported, engine).code == 0
    (engine / "step.onnx").write_bytes(b"")
    refused = caption(exported, engine)
    assert refused.code == 1
    assert f"--out {engine} " in refused.err
    assert str(exported / "engine") not in refused.err
    assert "--device cpu --force --overwrite" in refused.err


@pytest.mark.parametrize(
    "fields",
    [{"versions": {}}, {"kind": "foo"}, {"proof": {"passed": True}}, {"files": {}}, {"more": 1}, {"hash": None}],
    ids=lambda fields: next(iter(fields)),
)
def test_an_edit_is_told(exported: Path, engine: Path, fields: dict[str, Any]) -> None:
    change_json(engine / "engine.json", fields)
    refused = caption(exported, engine)
    assert refused.code == 1
    assert "engine.json was edited" in refused.err
    assert f"capcli export --onnx --model {exported / 'captioner'} --out {engine}" in refused.err


def test_another_layout_is_no_edit(exported: Path, engine: Path) -> None:
    known = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps(dict(sorted(known.items())), indent=None))
    assert caption(exported, engine).code == 0


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
    "proof": "passed",
    "files": ["step.onnx"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_told(exported: Path, engine: Path, name: str) -> None:
    written(engine, **{name: WRONG[name]})
    refused = caption(exported, engine)
    assert refused.code == 1
    assert "engine.json is damaged" in refused.err
    assert "unexpected" not in refused.err


def without(engine: Engine, name: str) -> dict[str, str]:
    return {file: digest for file, digest in engine.files.items() if file != name}


@pytest.mark.parametrize("name", ["step.onnx", "encode.onnx", "tokenizer.json", "preprocessor_config.json"])
def test_every_file_must_be_named(exported: Path, engine: Path, name: str) -> None:
    written(engine, files=without(read_engine(str(engine)), name))
    refused = caption(exported, engine)
    assert refused.code == 1
    assert name in refused.err
    assert "is not as it was built" in refused.err


def test_the_runtime_must_be_named(exported: Path, engine: Path) -> None:
    written(engine, versions={})
    assert "names no version of ONNX Runtime" in caption(exported, engine).err


@pytest.mark.parametrize("name", ["processor_config.json", "added_tokens.json", "other.model"])
def test_a_file_that_was_put_into_it_is_refused(exported: Path, engine: Path, name: str) -> None:
    """A processor_config.json would come before the preprocessor_config.json that was proved."""
    (engine / name).write_text('{"image_processor": {"size": {"height": 32, "width": 32}}}')
    refused = caption(exported, engine)
    assert refused.code == 1
    assert f"{name} was put into it (take it out)" in refused.err
    assert "capcli export" not in refused.err, "an export does not replace what is not an engine's"


def test_nothing_but_true_is_a_proof(exported: Path, engine: Path) -> None:
    written(engine, proof={"passed": "no", "failed": "all captions differ"})
    said = caption(exported, engine)
    assert said.code == 0
    assert "failed its proof (all captions differ)" in said.err


def test_generation_settings_and_notes_are_the_users(exported: Path, engine: Path) -> None:
    change_json(engine / "generation_config.json", {"max_new_tokens": 3})
    (engine / "notes.txt").write_text("mine")
    assert caption(exported, engine).code == 0


def test_threads_of_pytorch_sleep_beside_an_engine_unless_told_otherwise(
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
    monkeypatch.setattr(build, "choose_device", lambda _: cuda)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    whole = read_engine(str(engine))
    assert build.device_of("auto", whole) == cuda
    assert build.device_of("auto", replace(whole, quantize="int8")) == torch.device("cpu")


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
    ("source", "told"),
    [
        ("raise ImportError('libonnxruntime.so: cannot open shared object file')", "installed but cannot be loaded"),
        ("raise ModuleNotFoundError(name='onnxruntime.capi.state')", "installed but cannot be loaded"),
        ("raise ModuleNotFoundError(name='onnxruntime')", "ONNX Runtime is missing: pip install"),
    ],
)
def test_a_broken_onnx_runtime_is_told_from_one_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, told: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(source)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CapcliError, match=told):
        import_onnxruntime()

"""Every use of TensorRT in the code is in the bindings of each version that capcli supports."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import FunctionType

import fake_tensorrt
import pytest
from tensorrt_uses import API, complaints, uses

ROOT = Path(__file__).parents[1]
SOURCES = {
    "capcli/runtimes/trt_plan.py": 20,
    "capcli/export/plan_builder.py": 20,
}


def test_the_snapshot_has_both_major_versions():
    assert [version.split(".")[0] for version in API] == ["10", "11"]
    assert "FP16" not in API["11.4.0.106"]["BuilderFlag"]["enum"]


@pytest.mark.parametrize("name", SOURCES)
def test_every_use_is_in_the_bindings(name):
    source = (ROOT / name).read_text()
    assert complaints(source) == []
    assert len(uses(source, API["11.4.0.106"])) >= SOURCES[name], "the check misses uses"


@pytest.mark.parametrize("name", SOURCES)
def test_every_misspelt_use_is_found(name):
    source = (ROOT / name).read_text()
    lines = source.splitlines(keepends=True)
    for use in uses(source, API["11.4.0.106"]):
        node = use.where
        row = lines[node.end_lineno - 1]
        end = len(row.encode()[: node.end_col_offset].decode())
        wrong = [*lines]
        wrong[node.end_lineno - 1] = row[:end] + "x" + row[end:]
        assert complaints("".join(wrong)), f"{use} could be misspelt"


def test_no_other_module_touches_tensorrt():
    others = {str(p.relative_to(ROOT)) for p in (ROOT / "capcli").rglob("*.py") if imports_tensorrt(p)}
    assert others <= set(SOURCES)


def imports_tensorrt(path: Path) -> bool:
    names = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import)]
    return any(alias.name == "tensorrt" for node in names for alias in node.names)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("tensorrt.Bilder(log)", "tensorrt.Bilder is not in"),
        ("tensorrt.Builder(log).create_network(1, 2)", "create_network is called in a way"),
        (
            "tensorrt.Builder(log).create_builder_config().set_timing_cache(cache, ignore=True)",
            "set_timing_cache is called",
        ),
        ("tensorrt.BuilderFlag.FP16", "BuilderFlag.FP16 is not in 11"),
        ("engine.num_io_tensors()", "num_io_tensors is called"),
        ("hasattr(engine, 'get_aliased') and engine.get_aliased", "get_aliased is in no version"),
    ],
)
def test_wrong_uses_are_reported(code, complaint):
    assert any(complaint in line for line in complaints(f"def f(tensorrt, engine: trt.ICudaEngine): {code}"))


@pytest.mark.parametrize("version", ["10.15.1.29", "11.4.0.106"])
@pytest.mark.parametrize("fake", fake_tensorrt.FAKES, ids=lambda fake: fake.__name__)
def test_the_stand_in_has_the_signatures_of_the_bindings(fake, version):
    real = API[version][fake.__name__]["members"]
    for name, value in vars(fake).items():
        if isinstance(value, FunctionType) and not name.startswith("_"):
            counts = [len(signature["takes"]) for signature in real[name]["signatures"]]
            assert len(inspect.signature(value).parameters) in counts or name == "create_execution_context"
        elif isinstance(value, property):
            assert "property" in real[name]

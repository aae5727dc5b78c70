"""`capcli doctor`: its findings about working, missing and broken parts, on this machine and on simulated ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnxruntime
import pexpect
import pytest
import torch
from huggingface_hub import constants
from onnx import TensorProto, helper
from running import COMMAND, call, change_json, environment, execute

from capcli import __version__
from capcli.doctor import probe, software
from capcli.doctor import run as doctor
from capcli.engine.engine_json import Bucket, Engine, Memory, plan_files, write_engine
from capcli.models.int8 import int8_lacks

SECTIONS = ["versions", "cpu", "gpus", "runtimes", "extras", "models", "engines"]
STATES = {"ok", "none", "missing", "broken"}
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

# Fake runtimes that import quickly.
TORCH = """
__version__ = "2.12.1"
class version: cuda, hip = None, None
class cpu: get_capabilities = dict
class cuda:
    is_available = lambda: False
"""
TORCH_WITH_GPU = """
__version__ = "2.12.1+cu130"
class version: cuda, hip = "13.0", None
class cpu: get_capabilities = lambda: {"amx_bf16": True}
class cuda:
    is_available = lambda: True
    device_count = lambda: 1
    get_device_capability = lambda device: (9, 0)
    get_device_name = lambda device: "NVIDIA H100"
    get_device_properties = lambda device: type("Properties", (), {"total_memory": 80 << 30})
device = lambda kind, number: f"{kind}:{number}"
def ones(count, device):
    import numpy
    class Ones(numpy.ndarray): pass
    return numpy.ones(count).view(Ones)
"""
ONNXRUNTIME = """
__version__ = "1.30.0"
get_available_providers = lambda: ["CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, model, providers): self.providers = providers
    def get_providers(self): return self.providers
    def run(self, names, given): return list(given.values())
"""
ENGINE = Engine(
    kind="onnx",
    profile="fused",
    opset=24,
    dtype="float32",
    quantize=None,
    captioner={"name": "my captioner"},
    pixels=(32, 32),
    memory=Memory(1, 2, 3, 4),
    positions=64,
    vocabulary=120,
    command=("capcli", "export", "--onnx", "--model", "my captioner", "--out", "old place", "--overwrite"),
    capcli=__version__,
    files=dict.fromkeys(("encode.onnx", "step.onnx"), hashlib.sha256(b"").hexdigest()),
    versions={"onnxruntime": "1.30.0"},
    parity={"passed": True},
)
BUCKETS = (Bucket(1, 1, 1, 9),)
PLANS = replace(
    ENGINE,
    kind="tensorrt",
    gpu={"name": "NVIDIA H100", "capability": "9.0"},
    versions={"tensorrt": "11.4.0.1"},
    buckets=BUCKETS,
    files=dict.fromkeys(plan_files(BUCKETS), hashlib.sha256(b"").hexdigest()),
)


class Machine:
    """A simulated machine: its Python modules, programs, cache and engines are in temporary folders."""

    def __init__(self, folder: Path) -> None:
        self.modules, self.programs, self.cache, self.engines = (
            folder / name for name in ("modules", "programs", "cache", "engines")
        )
        self.modules.mkdir()
        self.programs.mkdir()
        self.engines.mkdir()
        self.has("torch", TORCH)
        self.has("onnxruntime", ONNXRUNTIME)
        self.has("tensorrt", "raise ModuleNotFoundError(name='tensorrt')")

    def has(self, module: str, source: str) -> None:
        (self.modules / f"{module}.py").write_text(source)

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def variables(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.modules), *filter(None, sys.path)])
        return {
            "PYTHONPATH": path,
            "PATH": str(self.programs),
            "JAVA_HOME": "",
            "HF_HUB_CACHE": str(self.cache),
            "CAPCLI_ENGINES": str(self.engines),
        }

    def findings(self) -> dict[str, list[dict[str, Any]]]:
        """The JSON of capcli doctor: its lines by section."""
        paths = [str(self.modules), *sys.path]
        with (
            mock.patch.object(sys, "path", paths),
            mock.patch.object(constants, "HF_HUB_CACHE", str(self.cache)),
            mock.patch.object(doctor, "modules", dict),  # the packages of this machine, which take seconds to import
        ):
            done = call("doctor", "--json", env=self.variables())
        assert (done.code, done.err) == (0, "")
        found: dict[str, list[dict[str, Any]]] = json.loads(done.out)
        assert list(found) == SECTIONS
        for lines in found.values():
            assert lines
            assert all(line["state"] in STATES and line["text"] and "fix" in line for line in lines)
        return found

    def runtime(self, name: str) -> dict[str, Any]:
        return {line["name"]: line for line in self.findings()["runtimes"]}[name]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# This machine


@pytest.mark.slow
def test_it_finds_what_is_installed_here() -> None:
    done = execute("doctor", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    versions = found["versions"][0]["versions"]
    assert versions["capcli"] == __version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    runtimes = {line["name"]: line for line in found["runtimes"]}
    assert runtimes["PyTorch"]["version"] == versions["torch"] == torch.__version__
    assert runtimes["ONNX Runtime"]["version"] == onnxruntime.__version__
    assert runtimes["ONNX Runtime"]["errors"]["CPUExecutionProvider"] is None
    assert found["cpu"][0]["usable_cores"] >= 1
    assert found["cpu"][0]["int8"] == (int8_lacks() is None)
    assert found["cpu"][0]["memory"] > 1 << 28
    assert bool([line for line in found["gpus"] if line["state"] == "ok"]) == torch.cuda.is_available()


@pytest.mark.slow
def test_it_prints_a_table_on_a_terminal_and_plain_lines_in_a_pipe(machine: Machine) -> None:
    variables = environment(**machine.variables(), TERM="xterm")
    command = [*COMMAND, "doctor"]
    terminal = pexpect.spawn(command[0], command[1:], env=variables, dimensions=(50, 110), encoding="utf-8", timeout=60)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert "\x1b[" in terminal.before
    piped = execute("doctor", env=machine.variables())
    plain = piped.out.decode()
    assert "\x1b" not in plain
    assert "  ok       ONNX Runtime" in plain
    assert "\n           fix: capcli export --onnx\n" in plain
    for words in ("Runtimes", "ONNX Runtime", "capcli export --onnx", "no NVIDIA GPU", "Engines"):
        assert words in terminal.before
        assert words in plain
    assert len(terminal.before.splitlines()) <= 66


def test_it_imports_no_runtime_itself(machine: Machine) -> None:
    code = (
        "import sys\nfrom capcli.cli import main\nsys.argv = ['capcli', 'doctor', '--json']\ntry: main()\n"
        "except SystemExit as leaving: print(leaving.code, {'torch', 'transformers', 'onnxruntime'} & set(sys.modules))"
    )
    machine.program("try", f'exec {sys.executable} -c "$CODE"')
    process = pexpect.run(str(machine.programs / "try"), env=environment(**machine.variables(), CODE=code), timeout=60)
    assert process.decode().splitlines()[-1] == "0 set()"


def test_output_that_is_only_ascii_gets_escapes(machine: Machine) -> None:
    put(machine, "écran\x1b[31m", ENGINE)
    done = execute("doctor", env={**machine.variables(), "PYTHONIOENCODING": "ascii"})
    assert done.code == 0
    assert b"\\xe9cran\\x1b[31m" in done.out
    assert b"\x1b" not in done.out


def test_needed_packages_and_extras_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(requirement: str) -> str:
        return re.split(r"[^\w.-]", requirement)[0]

    assert sorted(software.NEEDED) == sorted(map(name, PROJECT["dependencies"]))
    metadata = list(PROJECT["dependencies"])
    for extra, requirements in PROJECT["optional-dependencies"].items():
        metadata += [f"{text}{' and' if ';' in text else ';'} extra == '{extra}'" for text in requirements]
    monkeypatch.setattr(software, "requires", lambda _: metadata)  # as an installation of this project has it
    for extra in software.USES:
        assert software.packages(extra) == list(map(name, PROJECT["optional-dependencies"][extra]))


def test_the_smallest_model_is_valid_onnx_and_runs() -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    stored = onnx.ModelProto.FromString(probe.IDENTITY)
    onnx.checker.check_model(stored, full_check=True)
    assert stored == made
    assert probe.run_identity(onnxruntime, "CPUExecutionProvider") is None
    with pytest.warns(UserWarning, match="NoSuchProvider"):
        assert probe.run_identity(onnxruntime, "NoSuchProvider") == "its libraries cannot be loaded"


# Runtimes


def test_runtimes_without_a_gpu(machine: Machine) -> None:
    found = machine.findings()
    assert [(line["name"], line["state"], line["fix"]) for line in found["runtimes"]] == [
        ("PyTorch", "ok", None),
        ("ONNX Runtime", "ok", None),
        ("TensorRT", "none", None),
    ]
    assert "10.15" in found["runtimes"][2]["text"]
    assert "NVIDIA GPU" in found["runtimes"][2]["text"]
    assert [(line["state"], line["fix"]) for line in found["gpus"]] == [("none", None)]
    assert "float32" in found["cpu"][0]["text"]


def test_a_gpu_used_by_all_runtimes(machine: Machine) -> None:
    machine.has("torch", TORCH_WITH_GPU)
    machine.has("onnxruntime", ONNXRUNTIME.replace('["CPU', '["CUDAExecutionProvider", "CPU'))
    machine.has("tensorrt", "__version__ = '11.4.0.1'")
    machine.program("nvidia-smi", "echo 'NVIDIA H100, 80 GB HBM3, 81559, 580.65, 9.0'")
    found = machine.findings()
    gpu = found["gpus"][0]
    assert (gpu["name"], gpu["memory"], gpu["driver"], gpu["capability"]) == (
        "NVIDIA H100, 80 GB HBM3",
        81559 << 20,
        "580.65",
        "9.0",
    )
    assert [(line["state"], line["fix"]) for line in found["runtimes"]] == [("ok", None)] * 3
    assert all("CUDA" in line["text"] for line in found["runtimes"])
    assert "bfloat16" in found["cpu"][0]["text"]


def test_a_gpu_used_by_no_runtime(machine: Machine) -> None:
    machine.has("tensorrt", "__version__ = '10.9.0'")
    machine.program("nvidia-smi", "echo 'NVIDIA L4, 23034, 580.65, 8.9'")
    found = machine.findings()["runtimes"]
    assert [line["state"] for line in found] == ["missing"] * 3
    assert [line["fix"] for line in found] == [
        "pip install --force-reinstall torch",
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        "pip install 'capcli[trt]' --upgrade",
    ]
    assert "10.9.0 is too old" in found[2]["text"]


def test_gpus_by_pytorch_where_the_driver_has_no_program(machine: Machine) -> None:
    machine.has("torch", TORCH_WITH_GPU)
    assert [(gpu["name"], gpu["capability"]) for gpu in machine.findings()["gpus"]] == [("NVIDIA H100", "9.0")]


def test_a_gpu_on_which_pytorch_computes_nothing(machine: Machine) -> None:
    machine.has("torch", TORCH_WITH_GPU + "\ndef ones(*_, **__): raise RuntimeError('no kernel image')")
    line = machine.runtime("PyTorch")
    assert line["state"] == "broken"
    assert "no kernel image" in line["text"]


def test_a_driver_that_does_not_answer(machine: Machine) -> None:
    machine.program("nvidia-smi", "echo 'could not talk to the driver'; exit 9")
    line = machine.findings()["gpus"][0]
    assert line["state"] == "broken"
    assert "could not talk to the driver" in line["text"]


def test_a_provider_that_is_listed_and_does_not_load(machine: Machine) -> None:
    machine.has("torch", TORCH_WITH_GPU)
    listed = ONNXRUNTIME.replace('["CPU', '["CUDAExecutionProvider", "CPU')
    machine.has("onnxruntime", listed.replace("return self.providers", "return ['CPUExecutionProvider']"))
    line = machine.runtime("ONNX Runtime")
    assert (line["state"], line["fix"]) == ("broken", "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    assert "cannot be loaded" in line["text"]


def test_an_old_onnx_runtime_is_for_portable_engines(machine: Machine) -> None:
    machine.has("onnxruntime", ONNXRUNTIME.replace("1.30", "1.20"))
    line = machine.runtime("ONNX Runtime")
    assert line["state"] == "missing"
    assert "portable only" in line["text"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file')", "libnvinfer.so.10"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "Segmentation fault"),
        ("import os; print('so long', flush=True); os._exit(7)", "code 7"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("syntax error", "SyntaxError"),
    ],
)
def test_a_runtime_that_does_not_work_is_a_line(machine: Machine, source: str, words: str) -> None:
    machine.has("tensorrt", source)
    line = machine.runtime("TensorRT")
    assert line["state"] == "broken"
    assert words in line["text"]
    assert line["fix"] is None, "without a GPU no package helps"


def test_tensorrt_missing_or_broken_on_a_machine_with_a_gpu(machine: Machine) -> None:
    machine.has("torch", TORCH_WITH_GPU)
    line = machine.runtime("TensorRT")
    assert (line["state"], line["fix"]) == ("missing", "pip install 'capcli[trt]'")
    machine.has("tensorrt", "raise ImportError('libnvinfer.so.10')")
    line = machine.runtime("TensorRT")
    assert (line["state"], line["fix"]) == ("broken", "pip install 'capcli[trt]' --force-reinstall")


def test_all_runtimes_broken_at_once(machine: Machine) -> None:
    for name in ("torch", "onnxruntime", "tensorrt"):
        machine.has(name, "print('noise'); raise RuntimeError('two\\nlines')")
    found = machine.findings()
    assert [line["state"] for line in found["runtimes"]] == ["broken"] * 3
    assert all("RuntimeError: two lines" in line["text"] for line in found["runtimes"])


def test_a_runtime_that_hangs_is_killed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has("tensorrt", "import time; time.sleep(600)")
    monkeypatch.syspath_prepend(str(machine.modules))
    begun = time.monotonic()
    assert "hangs" in probe.probe_all(["tensorrt"], timeout=0.5)["tensorrt"]["error"]
    assert time.monotonic() - begun < 60


# Extras


def test_java_missing_working_and_broken(machine: Machine) -> None:
    lines = {line["name"]: line for line in machine.findings()["extras"]}
    assert set(lines) == {"endpoint", "gpu-decode", "heif", "metrics", "onnx", "train", "vlm", "Java"}
    assert lines["Java"]["state"] == "missing"
    assert "install" in lines["Java"]["fix"]
    machine.program("java", "echo 'openjdk version \"99\"' >&2")
    lines = {line["name"]: line for line in machine.findings()["extras"]}
    assert (lines["Java"]["state"], lines["Java"]["version"]) == ("ok", 'openjdk version "99"')
    machine.program("java", "echo 'get Java from its makers' >&2; exit 1")
    lines = {line["name"]: line for line in machine.findings()["extras"]}
    assert lines["Java"]["state"] == "broken"
    assert "get Java from its makers" in lines["Java"]["text"]


def test_an_extra_without_one_of_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"torch", "accelerate", "pillow-heif", "onnxruntime-gpu", "onnx", "onnxscript"}

    def version(name: str) -> str:
        if name not in present:
            raise software.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(software, "version", version)
    lines = {line.name: line for line in software.extra_lines({}, gpus=0)}
    assert (lines["heif"].state, lines["onnx"].state) == ("ok", "ok")
    assert lines["train"].fix == "pip install 'capcli[train]'"
    assert "datasets" in lines["train"].text
    assert "accelerate" not in lines["train"].text
    assert (lines["gpu-decode"].state, lines["gpu-decode"].fix) == ("none", None)
    assert {line.name: line for line in software.extra_lines({}, gpus=1)}["gpu-decode"].state == "missing"
    needed = {line.name: line for line in software.version_lines({})}
    assert "torch" not in needed
    assert needed["pillow"].fix == "pip install pillow"


# Cached captioners


def cached(machine: Machine, name: str, files: Path, *without: str) -> Path:
    """A model in the hub's cache, as a download leaves it; its snapshot."""
    commit = "c0ffee" + "0" * 34
    folder = machine.cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    shutil.copytree(files, snapshot, ignore=shutil.ignore_patterns(*without))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return snapshot


def test_cached_captioners_complete_and_incomplete(machine: Machine, captioner: Path) -> None:
    cached(machine, "some/captioner", captioner)
    cached(machine, "some/half", captioner, "*.safetensors")
    change_json(cached(machine, "some/classifier", captioner) / "config.json", {"model_type": "vit"})
    cached(machine, "some/nothing", captioner, "*")
    (cached(machine, "some/torn", captioner) / "config.json").write_text("{")
    lines = {line["name"]: line for line in machine.findings()["models"]}
    assert list(lines) == ["some/captioner", "some/half", "others"]
    assert lines["some/captioner"]["state"] == "ok"
    assert lines["some/captioner"]["bytes"] == sum(file.stat().st_size for file in captioner.iterdir())
    assert (lines["some/half"]["state"], lines["some/half"]["fix"]) == ("missing", "hf download some/half")
    assert "weights" in lines["some/half"]["text"]
    assert "3" in lines["others"]["text"]


def test_a_missing_cache_and_a_cache_that_is_a_file(machine: Machine) -> None:
    line = machine.findings()["models"][0]
    assert (line["name"], line["state"]) == ("nlpconnect/vit-gpt2-image-captioning", "none")
    assert line["fix"] == "hf download nlpconnect/vit-gpt2-image-captioning"
    machine.cache.write_text("no folder")
    assert machine.findings()["models"][0]["state"] == "broken"


# Engines


def folder_of(machine: Machine, name: str) -> Path:
    folder = machine.engines / name
    folder.mkdir()
    return folder


def put(machine: Machine, name: str, engine: Engine) -> Path:
    """An engine with its files, all of them empty."""
    folder = folder_of(machine, name)
    for file in (*engine.files, "generation_config.json"):
        (folder / file).touch()
    write_engine(str(folder), engine)
    return folder


def engines(machine: Machine) -> dict[str, dict[str, Any]]:
    return {Path(line["name"]).name: line for line in machine.findings()["engines"]}


def test_engines_that_fit_and_that_do_not(machine: Machine) -> None:
    of = {
        "fits": ENGINE,
        "older": replace(ENGINE, versions={"onnxruntime": "1.29.3"}),
        "forced": replace(ENGINE, parity={"passed": False, "failed": "9 of 16 captions differ"}),
        "lacking": ENGINE,
        "changed": ENGINE,
        "bare": ENGINE,
        "foreign": ENGINE,
        "half": replace(ENGINE, dtype="bfloat16"),
        "plans": PLANS,
        "unfinished": replace(PLANS, versions={}, parity={"passed": False, "failed": "its plans are not built yet"}),
    }
    for name, engine in of.items():
        put(machine, name, engine)
    (machine.engines / "lacking" / "step.onnx").unlink()
    (machine.engines / "changed" / "step.onnx").write_bytes(b"something else")
    (machine.engines / "bare" / "generation_config.json").unlink()
    (machine.engines / "foreign" / "processor_config.json").touch()
    folder_of(machine, "no engine")
    (machine.engines / "README.md").write_text("no folder")
    lines = engines(machine)
    assert set(lines) == set(of)
    assert lines["fits"]["state"] == "ok"
    assert lines["fits"]["fix"] is None
    assert lines["fits"]["fits"] is True
    expected = {
        "older": "built with onnxruntime 1.29.3, and 1.30.0 is installed",
        "forced": "it failed its parity check (9 of 16 captions differ) and was kept by --force",
        "lacking": "it lacks step.onnx",
        "changed": "step.onnx has changed since the engine was built",
        "bare": "it lacks generation_config.json",
        "foreign": "processor_config.json was added to it",
        "half": "bfloat16",
        "plans": "TensorRT is missing",
        "unfinished": "its plans are not built yet",
    }
    for name, text in expected.items():
        assert lines[name]["state"] == "broken"
        assert text in lines[name]["text"]
    place = machine.engines / "older"  # not where it was built
    assert lines["older"]["fix"] == f"capcli export --onnx --model 'my captioner' --out {place} --overwrite"
    assert lines["foreign"]["fix"] == f"mv -n {machine.engines / 'foreign' / 'processor_config.json'} {machine.engines}"
    assert "--force" not in lines["unfinished"]["text"]
    assert lines["plans"]["fix"] is lines["unfinished"]["fix"] is None, "there is no GPU"


def test_plans_of_this_gpu_and_of_another(machine: Machine) -> None:
    machine.has("torch", TORCH_WITH_GPU)
    machine.has("tensorrt", "__version__ = '11.4.0.1'")
    for name, gpu in {"mine": "NVIDIA H100", "other": "NVIDIA L4"}.items():
        put(machine, name, replace(PLANS, gpu={"name": gpu, "capability": "9.0"}))
    put(machine, "half done", replace(PLANS, versions={}, gpu=None, parity={"passed": False, "failed": "no plans yet"}))
    lines = engines(machine)
    assert lines["mine"]["state"] == "ok"
    assert "built on a NVIDIA L4" in lines["other"]["text"]
    assert lines["half done"]["fix"] == f"capcli export --trt --model '{machine.engines / 'half done'}'"


def test_an_engine_json_that_cannot_be_parsed_is_a_line(machine: Machine) -> None:
    put(machine, "whole", ENGINE)
    texts = ["", "{", "[]", "null", '{"format": 9}', "[" * 100_000, '{"format": 1, "memory": 3}']
    for number, text in enumerate(texts):
        (folder_of(machine, f"torn {number}") / "engine.json").write_text(text)
    lines = engines(machine)
    assert lines.pop("whole")["state"] == "ok"
    assert [line["state"] for line in lines.values()] == ["broken"] * len(texts)
    for name, line in lines.items():
        place = machine.engines / name
        assert line["fix"] == f"mv '{place}' '{place}-damaged' && capcli export --onnx --model MODEL --out '{place}'"


def test_an_engine_json_of_wrong_values_is_a_line(machine: Machine) -> None:
    wrong: list[dict[str, Any]] = [{"versions": [1]}, {"command": None}, {"kind": "other"}, {"captioner": 3}]
    for number, fields in enumerate(wrong):
        put(machine, str(number), replace(ENGINE, **fields))
    change_json(put(machine, "edited", ENGINE) / "engine.json", {"dtype": "float16"})
    lines = engines(machine)
    place = machine.engines / "edited"
    assert lines["edited"]["fix"] == f"mv {place} {place}-damaged && capcli export --onnx --model MODEL --out {place}"
    assert [line["state"] for line in lines.values()] == ["broken"] * (len(wrong) + 1)
    assert "was edited" in lines["edited"]["text"]


def test_names_that_are_not_utf8(machine: Machine) -> None:
    folder = os.fsencode(machine.engines) + b"/caf\xe9"
    os.mkdir(folder)
    shutil.copytree(put(machine, "cafe", ENGINE), os.fsdecode(folder), dirs_exist_ok=True)
    shutil.rmtree(machine.engines / "cafe")
    assert machine.findings()["engines"][0]["path"].endswith("/caf\ufffd")
    done = execute("doctor", env=machine.variables())
    assert rb"/caf\xe9" in done.out


def test_no_engines_folder(machine: Machine) -> None:
    line = machine.findings()["engines"][0]
    assert (line["state"], line["fix"]) == ("none", "capcli export --onnx")
    machine.engines.rmdir()
    assert machine.findings()["engines"][0]["state"] == "none"
    machine.engines.write_text("no folder")
    assert machine.findings()["engines"][0]["state"] == "broken"


def test_the_engines_folder_may_be_below_home(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    put(machine, "fits", ENGINE)
    variables = machine.variables() | {"HOME": str(machine.engines.parent), "CAPCLI_ENGINES": "~/engines"}
    monkeypatch.setattr(machine, "variables", lambda: variables)
    assert engines(machine)["fits"]["state"] == "ok"


def test_it_takes_no_arguments() -> None:
    assert call("doctor", "folder").code == 2
    assert call("doctor", "--jsn").code == 2

"""Examines runtimes and packages in other processes: a library that crashes, hangs or prints affects nothing else.

`probe_all` starts `python -m capcli.doctor.probe NAME` for each runtime; the process prints one JSON object. `import_errors`
starts one process that imports all packages, and a further one after each that crashes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from capcli.doctor.output import error_text
from capcli.imports import CORE, cause

TIMEOUT = 120.0  # seconds for all probes; importing PyTorch from a slow disk takes long

Answer = Mapping[str, Any]


def probe_all(names: Sequence[str], timeout: float = TIMEOUT) -> dict[str, Answer]:
    """The result for each module, examined concurrently; {"error": text} where a process failed."""
    end = time.monotonic() + timeout
    try:
        processes = {name: _start(name) for name in names}
    except OSError as error:  # no memory, or too many processes
        return {name: {"error": f"it cannot be examined: {error}"} for name in names}
    return {name: _answer(process, end, timeout) for name, process in processes.items()}


def import_errors(modules: Mapping[str, str], timeout: float = TIMEOUT) -> dict[str, str]:
    """Why packages cannot be imported, by name; those that work are left out. `modules` are the modules to import."""
    end = time.monotonic() + timeout
    errors, left = {}, list(modules)
    while left and time.monotonic() < end:
        try:
            process = _start("packages", *(modules[name] for name in left))
        except OSError:  # no memory, or too many processes
            break
        lines, failure = _lines(process, end, timeout)
        errors.update({name: line for name, line in zip(left, lines, strict=False) if line})
        if failure and len(lines) < len(left):
            errors[left[len(lines)]] = failure
        left = left[len(lines) + 1 :]
    return errors


def _lines(process: subprocess.Popen[bytes], end: float, timeout: float) -> tuple[list[str], str | None]:
    """The lines that the process has printed, and how it ended if not with exit code 0."""
    failure = None
    try:
        out, _ = process.communicate(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        failure = f"it hangs: no response in {timeout:.0f} s"
    except BaseException:
        process.kill()
        raise
    code = process.returncode
    if code < 0 and failure is None:
        failure = f"it crashes (signal {-code}: {signal.strsignal(-code)})"
    elif code and failure is None:
        failure = f"it ends with code {code}"
    return out.decode("utf-8", "replace").splitlines(), failure


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)  # the child imports what this process can
    return subprocess.Popen(
        [sys.executable, "-m", "capcli.doctor.probe", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _answer(process: subprocess.Popen[bytes], end: float, timeout: float) -> Answer:
    try:
        out, err = process.communicate(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"it hangs: no response in {timeout:.0f} s"}
    except BaseException:
        process.kill()
        raise
    code = process.returncode
    if code < 0:
        return {"error": f"it crashes (signal {-code}: {signal.strsignal(-code)})"}
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        lines = err.decode("utf-8", "replace").strip().splitlines() or ["no error message"]
        return {"error": f"it ends with code {code}: {lines[-1]}"}
    return answer


# In the child process

# y = Identity(x), float [1], opset 13: the smallest model that shows whether ONNX Runtime works.
IDENTITY = (
    b'\x08\x07:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def main(name: str, *modules: str) -> None:
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the JSON
    if name == "packages":
        for module in modules:
            os.write(answer_fd, f"{import_error(module) or ''}\n".encode())
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = probe(name)
    answer["warnings"] = [" ".join(str(each.message).split()) for each in caught if "CUDA" in str(each.message)]
    os.write(answer_fd, json.dumps(answer).encode())


def import_error(module: str) -> str | None:
    """Why a module cannot be imported. As in a command, a broken package then counts as missing for the others."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(module)
    except Exception as error:
        if package not in CORE:
            sys.modules[package] = None  # type: ignore[assignment]
        return cause(error)
    return None


def probe(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module(name)
        return {"version": str(getattr(module, "__version__", "unknown")), **PROBES[name](module)}
    except ModuleNotFoundError as error:
        return {"missing": True} if error.name == name else {"error": error_text(error)}
    except Exception as error:
        return {"error": error_text(error)}


def probe_torch(torch: Any) -> dict[str, Any]:
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    found = {
        "cuda": torch.version.cuda or torch.version.hip,
        "cpu_bfloat16": bool(features.get("avx512_bf16") or features.get("amx_bf16")),
        "devices": [
            probe_gpu(torch, number) for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ],
    }
    with contextlib.suppress(Exception):
        from capcli.models.int8 import int8_lacks

        found["cpu_int8_lacks"] = int8_lacks()  # absent where this cannot be determined
    return found


def probe_gpu(torch: Any, number: int) -> dict[str, Any]:
    """A GPU's properties, and `error` where it does not compute: this PyTorch may not be built for its architecture."""
    device = torch.device("cuda", number)
    major, minor = torch.cuda.get_device_capability(device)
    found = {
        "name": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "memory": torch.cuda.get_device_properties(device).total_memory,
        "error": None,
    }
    try:
        assert (torch.ones(2, device=device) + 1).sum().item() == 4.0
    except Exception as error:
        found["error"] = error_text(error)
    return found


def probe_onnxruntime(onnxruntime: Any) -> dict[str, Any]:
    providers = list(onnxruntime.get_available_providers())
    if "CUDAExecutionProvider" in providers:
        with contextlib.suppress(Exception):
            import torch  # noqa: F401 - as in a run: PyTorch loads CUDA's libraries
    used = [name for name in ("CPUExecutionProvider", "CUDAExecutionProvider") if name in providers]
    return {"providers": providers, "errors": {name: run_identity(onnxruntime, name) for name in used}}


def run_identity(onnxruntime: Any, provider: str) -> str | None:
    """Why the provider does not run the smallest model; None where it does."""
    try:
        import numpy as np

        session = onnxruntime.InferenceSession(IDENTITY, providers=[provider])
        if provider not in session.get_providers():
            return "its libraries cannot be loaded"
        values = np.full(1, 3, np.float32)
        return None if session.run(None, {"x": values})[0] == values else "it computes 1 x 3 wrongly"
    except Exception as error:
        return error_text(error)


def probe_tensorrt(_: Any) -> dict[str, Any]:
    return {}


PROBES = {"torch": probe_torch, "onnxruntime": probe_onnxruntime, "tensorrt": probe_tensorrt}

if __name__ == "__main__":
    main(*sys.argv[1:])

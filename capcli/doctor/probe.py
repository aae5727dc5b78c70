"""Looks at one runtime, in a process of its own: a library that crashes, hangs or talks takes nothing else with it.

`python -m capcli.doctor.probe torch` prints one JSON object.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from typing import Any

from capcli.doctor.findings import said

# y = Identity(x), float [1], opset 13: the smallest model that an ONNX Runtime can be seen to run.
IDENTITY = (
    b'\x08\x07:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries that print must not spoil the answer
    name = sys.argv[1]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        answer = probed(name)
    answer["warnings"] = [" ".join(str(each.message).split()) for each in warned if "CUDA" in str(each.message)]
    os.write(answers, json.dumps(answer).encode())


def probed(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module(name)
        return {"version": str(getattr(module, "__version__", "unknown")), **LOOK[name](module)}
    except ModuleNotFoundError as error:
        return {"missing": True} if error.name == name else {"error": said(error)}
    except Exception as error:
        return {"error": said(error)}


def look_at_torch(torch: Any) -> dict[str, Any]:
    abilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    there = bool(torch.cuda.is_available())
    return {
        "cuda": torch.version.cuda or torch.version.hip,
        "cpu_bfloat16": bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16")),
        **look_at_int8(),
        "devices": [look_at_device(torch, number) for number in range(torch.cuda.device_count())] if there else [],
    }


def look_at_int8() -> dict[str, Any]:
    """What `--dtype int8` lacks here, None for nothing; nothing at all where that cannot be told."""
    with contextlib.suppress(Exception):
        from capcli.models.int8 import int8_lacks

        return {"cpu_int8_lacks": int8_lacks()}
    return {}


def look_at_device(torch: Any, number: int) -> dict[str, Any]:
    """What a GPU is, and `error` where it does not compute: its architecture may be none that this PyTorch is built for."""
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
        found["error"] = said(error)
    return found


def look_at_onnxruntime(onnxruntime: Any) -> dict[str, Any]:
    providers = list(onnxruntime.get_available_providers())
    if "CUDAExecutionProvider" in providers:
        with contextlib.suppress(Exception):
            import torch  # noqa: F401 - as in a run, where CUDA's libraries come with it
    ours = [name for name in ("CPUExecutionProvider", "CUDAExecutionProvider") if name in providers]
    return {"providers": providers, "errors": {name: run_identity(onnxruntime, name) for name in ours}}


def run_identity(onnxruntime: Any, provider: str) -> str | None:
    """Why the provider does not run the smallest model; None where it does."""
    try:
        import numpy as np

        session = onnxruntime.InferenceSession(IDENTITY, providers=[provider])
        if provider not in session.get_providers():
            return "its libraries cannot be loaded"
        given = np.full(1, 3, np.float32)
        return None if session.run(None, {"x": given})[0] == given else "it computes 1 x 3 wrongly"
    except Exception as error:
        return said(error)


def look_at_tensorrt(_: Any) -> dict[str, Any]:
    return {}


LOOK = {"torch": look_at_torch, "onnxruntime": look_at_onnxruntime, "tensorrt": look_at_tensorrt}

if __name__ == "__main__":
    main()

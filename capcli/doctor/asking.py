"""Asks the probes, all at the same time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

PATIENCE = 120.0  # seconds for all: the first import of PyTorch from a slow disk takes its time

Answer = Mapping[str, Any]


def ask(names: Sequence[str], patience: float = PATIENCE) -> dict[str, Answer]:
    """What each probe says of its runtime; `error` where it did not come to an end by itself."""
    end = time.monotonic() + patience
    try:
        asked = {name: start(name) for name in names}
    except OSError as error:  # no memory, no more processes
        return {name: {"error": f"it cannot be looked at: {error}"} for name in names}
    return {name: hear(process, end, patience) for name, process in asked.items()}


def start(name: str) -> subprocess.Popen[bytes]:
    # what can be imported here can be imported there, wherever this process found it
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "capcli.doctor.probe", name],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def hear(process: subprocess.Popen[bytes], end: float, patience: float) -> Answer:
    try:
        out, err = process.communicate(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"it hangs: no answer in {patience:.0f} s"}
    except BaseException:
        process.kill()
        raise
    if process.returncode < 0:
        return {"error": f"it crashes (signal {-process.returncode}: {signal.strsignal(-process.returncode)})"}
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        last = err.decode("utf-8", "replace").strip().splitlines() or ["it says nothing"]
        return {"error": f"it ends with code {process.returncode}: {last[-1]}"}
    return answer

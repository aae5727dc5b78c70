"""Decode functions for the tests of loading: the path names an action. Decoder processes import this, so it is light."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capcli.errors import ImageError

Decoded = tuple[npt.NDArray[np.uint8], dict[str, str | int]]


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__("line one\nline two")
        self.secret = lambda: None


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


def picture(number: int) -> npt.NDArray[np.uint8]:
    """An image that differs for every `number`, also in its size."""
    height, width = 5 + number % 7, 3 + number % 5
    return ((np.arange(height * width * 3) + 31 * number) % 251).astype(np.uint8).reshape(height, width, 3)


def decode(path: str) -> Decoded:
    """`action:argument:number` runs the action, then returns `picture(number)` unless the action returns an image."""
    action, argument, number = path.split(":", 2)
    if action == "invalid-facts":
        return picture(0), {"number": {1, 2}}  # type: ignore[dict-item]
    function = ACTIONS.get(action)
    if function is not None:
        image = function(argument)
        if image is not None:
            return image, {}
    return picture(int(number)), {"number": int(number), "pid": os.getpid(), "path": path}


def _sleep(argument: str) -> None:
    time.sleep(float(argument))


def _hang(_argument: str) -> None:
    time.sleep(1e6)


def _hang_holding_the_gil(_argument: str) -> None:
    ctypes.PyDLL(None).sleep(1_000_000)


def _kill(argument: str) -> None:
    os.kill(os.getpid(), getattr(signal, argument))


def _exit(argument: str) -> None:
    os._exit(int(argument))


def _system_exit(_argument: str) -> None:
    sys.exit(7)


def _garble(_argument: str) -> None:
    os.write(int(sys.argv[1]), b"\0\0\0\3abc")  # into the socket that answers go through
    time.sleep(1e6)


def _answer_often(_argument: str) -> None:
    for message in (b'{"error":"missing","message":"written by the codec"}',) * 4:
        os.write(int(sys.argv[1]), len(message).to_bytes(4, "big") + message)


def _allocate(argument: str) -> None:
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(int(argument))]
    blocks.clear()


_leaked: list[npt.NDArray[np.uint8]] = []


def _leak(argument: str) -> None:
    _leaked.append(np.ones(int(argument) << 20, np.uint8))


_corrupted = False


def _corrupt(_argument: str) -> None:
    """Succeeds, and lets `crash-if-corrupt` crash later in this process."""
    global _corrupted
    _corrupted = True


def _crash_if_corrupt(_argument: str) -> None:
    if _corrupted:
        os.kill(os.getpid(), signal.SIGSEGV)


def _raise(argument: str) -> None:
    errors: dict[str, BaseException] = {
        "image": ImageError("missing", "it is\nnot there"),
        "value": ValueError("odd \udcff"),
        "unpicklable": UnpicklableError(),
        "unprintable": UnprintableError(),
        "recursion": RecursionError("deep"),
        "memory": MemoryError(),
    }
    raise errors[argument]


def _big(argument: str) -> npt.NDArray[np.uint8]:
    return np.full((int(argument) << 10, 1024, 3), 7, np.uint8)


RESULTS: dict[str, Any] = {
    "float": np.zeros((2, 2, 3)),
    "flat": np.zeros((2, 2), np.uint8),
    "grey": np.zeros((2, 2, 1), np.uint8),
    "text": "pixels",
    "empty": np.zeros((0, 4, 3), np.uint8),
    "file": np.frombuffer(b"the bytes of a file", np.uint8),
    "no-file": np.zeros(0, np.uint8),
    "strided": np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)[::-1, ::2],
}


def _result(argument: str) -> Any:
    return RESULTS[argument]


def _print(_argument: str) -> None:
    print("a codec prints", flush=True)
    os.write(2, b"a codec warns\n")
    sys.stderr.write("and again\n")


def _note(argument: str) -> None:
    """Create a file named by the process id in the folder `argument`, then hang."""
    Path(argument, str(os.getpid())).touch()
    time.sleep(1e6)


def _environment(argument: str) -> npt.NDArray[np.uint8]:
    text = os.environ.get(argument, "").encode() or b"\0"
    return np.frombuffer(text, np.uint8).reshape(1, -1, 1).repeat(3, axis=2)


def _modules(argument: str) -> npt.NDArray[np.uint8]:
    return np.full((1, 1, 3), argument in sys.modules, np.uint8)


ACTIONS = {
    "sleep": _sleep,
    "hang": _hang,
    "hold": _hang_holding_the_gil,
    "kill": _kill,
    "exit": _exit,
    "system-exit": _system_exit,
    "garble": _garble,
    "answer-often": _answer_often,
    "allocate": _allocate,
    "leak": _leak,
    "corrupt": _corrupt,
    "crash-if-corrupt": _crash_if_corrupt,
    "raise": _raise,
    "big": _big,
    "result": _result,
    "print": _print,
    "note": _note,
    "environment": _environment,
    "modules": _modules,
}


def slow_on_the_second(path: str) -> Decoded:
    """`picture(0)`, or for a file named 1.jpg an endless wait."""
    if path.endswith("1.jpg"):
        time.sleep(1e6)
    return picture(0), {}

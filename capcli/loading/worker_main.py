"""The main program of a decoder process: decodes the paths that its parent sends until the parent closes the socket."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from capcli.errors import ImageError
from capcli.records import Facts

Pixels: TypeAlias = npt.NDArray[np.uint8]
Decoded: TypeAlias = tuple[Pixels, Facts]
Decode: TypeAlias = Callable[..., Decoded]  # of a path or address, and of the entry's prompt where it has one

LONGEST_ANSWER = 1 << 20  # bytes
PROMPT_FOLLOWS = "\0\0"  # between a path and a prompt: no path or address contains it


def attempt(decode: Decode, path: str, prompt: str | None = None) -> Decoded | ImageError:
    """The result of `decode`, or the error: every exception but an exit or interrupt is the image's failure."""
    try:
        pixels, facts = decode(path) if prompt is None else decode(path, prompt)
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.dtype != np.uint8
            or not _is_valid(pixels.shape)
            or not pixels.size
        ):
            raise TypeError("decode returned neither uint8 [height, width, 3] nor a file's bytes uint8 [n]")
        return pixels, facts
    except ImageError as error:
        return ImageError(error.kind, _message(error))
    except MemoryError:
        return ImageError("out-of-memory", "decoding needs more memory than one image may take")
    except Exception as error:  # a codec may raise anything
        return ImageError("unreadable", f"{type(error).__name__}: {_message(error)}")


def _is_valid(shape: Sequence[int]) -> bool:
    """Whether the shape is valid: [height, width, 3] for pixels, [n] for the bytes of a file."""
    return len(shape) == 1 or (len(shape) == 3 and shape[2] == 3)


def _message(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    except Exception:  # an exception's own __str__ may be broken
        return "no message"


def main(arguments: Sequence[str]) -> None:
    """Decode the paths that the parent sends until it closes the socket."""
    channel_fd, memory, *files = map(int, arguments)
    _follow_parent()
    channel = Connection(channel_fd)
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        try:
            decode: Decode = pickle.loads(channel.recv_bytes())
        except Exception as error:
            channel.send_bytes(_json({"broken": f"{type(error).__name__}: {_message(error)}"}))
            return
        _bound_memory(memory)
        channel.send_bytes(_json({"ready": True}))
        for number in count():
            path = channel.recv_bytes().decode("utf-8", "surrogatepass")
            channel.send_bytes(_answer(decode, path, files[number % len(files)]))


def _answer(decode: Decode, path: str, file: int) -> bytes:
    path, follows, prompt = path.partition(PROMPT_FOLLOWS)
    decoded = attempt(decode, path, prompt if follows else None)
    if not isinstance(decoded, ImageError):
        pixels, facts = decoded
        try:
            answer = _json({"shape": pixels.shape, "facts": dict(facts)})
            if len(answer) > LONGEST_ANSWER:
                raise ValueError("the facts are too long")
            _write(file, pixels)
            return answer
        except (MemoryError, OSError) as error:
            decoded = ImageError("out-of-memory", f"no memory for the pixels: {_message(error)}")
        except Exception as error:
            decoded = ImageError("unreadable", f"{type(error).__name__}: {_message(error)}")
    return _json({"error": decoded.kind, "message": str(decoded)[:10_000]})


def _write(file: int, pixels: Pixels) -> None:
    flat = np.ascontiguousarray(pixels).reshape(-1)
    at = 0
    while at < flat.size:
        at += os.pwrite(file, flat[at:].data, at)


def _json(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode("ascii")


def _follow_parent() -> None:
    """Exit when the parent ends, also in the middle of an image; ignore the signals that a terminal sends to the group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # where memory runs out the kernel ends this process, not the run


def _bound_memory(rise: int) -> None:
    """Limit the growth of this process's data to `rise` bytes (0: no limit), and disable core dumps.

    RLIMIT_DATA counts private writable memory, not address space, of which libraries reserve far more than they use.
    """
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    core = 1 if hard == resource.RLIM_INFINITY else min(1, hard)  # 1, not 0: this also disables a piped core_pattern
    resource.setrlimit(resource.RLIMIT_CORE, (core, hard))
    if rise and sys.platform == "linux":
        with open("/proc/self/status") as status:
            used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = used + rise if hard == resource.RLIM_INFINITY else min(used + rise, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


if __name__ == "__main__":
    main(sys.argv[1:])

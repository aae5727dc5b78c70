"""What runs inside a decoder process: it decodes what its parent asks for until the parent is gone."""

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
Decode: TypeAlias = Callable[[str], Decoded]

LONGEST_ANSWER = 1 << 20  # bytes


def attempt(decode: Decode, path: str) -> Decoded | ImageError:
    """What `decode` makes of `path`, or why it cannot: any exception but an exit or interrupt is the image's fault."""
    try:
        pixels, facts = decode(path)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not _fits(pixels.shape) or not pixels.size:
            raise TypeError("decoding gave neither uint8 [height, width, 3] nor a file's bytes uint8 [n]")
        return pixels, facts
    except ImageError as error:
        return ImageError(error.kind, _words(error))
    except MemoryError:
        return ImageError("out-of-memory", "decoding needs more memory than one image may take")
    except Exception as error:  # a codec may raise anything
        return ImageError("unreadable", f"{type(error).__name__}: {_words(error)}")


def _fits(shape: Sequence[int]) -> bool:
    """Whether a result may have this shape: [height, width, 3], or [n] where decoding ends in encoding anew."""
    return len(shape) == 1 or (len(shape) == 3 and shape[2] == 3)


def _words(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    except Exception:  # an exception's own __str__ may be broken
        return "no message"


def main(arguments: Sequence[str]) -> None:
    """Decode what the parent asks for until it closes the socket."""
    channel_fd, memory, *blocks = map(int, arguments)
    _follow_parent()
    channel = Connection(channel_fd)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        try:
            decode: Decode = pickle.loads(channel.recv_bytes())
        except Exception as error:
            channel.send_bytes(_json({"broken": f"{type(error).__name__}: {_words(error)}"}))
            return
        _bound_memory(memory)
        channel.send_bytes(_json({"ready": True}))
        for turn in count():
            path = channel.recv_bytes().decode("utf-8", "surrogatepass")
            channel.send_bytes(_answer(decode, path, blocks[turn % len(blocks)]))


def _answer(decode: Decode, path: str, block: int) -> bytes:
    decoded = attempt(decode, path)
    if not isinstance(decoded, ImageError):
        pixels, facts = decoded
        try:
            answer = _json({"shape": pixels.shape, "facts": dict(facts)})
            if len(answer) > LONGEST_ANSWER:
                raise ValueError("the facts are too long")
            _write(block, pixels)
            return answer
        except (MemoryError, OSError) as error:
            decoded = ImageError("out-of-memory", f"no memory for the pixels: {_words(error)}")
        except Exception as error:
            decoded = ImageError("unreadable", f"{type(error).__name__}: {_words(error)}")
    return _json({"error": decoded.kind, "message": str(decoded)[:10_000]})


def _write(block: int, pixels: Pixels) -> None:
    flat = np.ascontiguousarray(pixels).reshape(-1)
    at = 0
    while at < flat.size:
        at += os.pwrite(block, flat[at:].data, at)


def _json(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode("ascii")


def _follow_parent() -> None:
    """End when the parent ends, even in the middle of an image, and by nobody else's polite request."""
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(request, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # where the machine runs out of memory, one image goes and not the run


def _bound_memory(rise: int) -> None:
    """Let this process's data grow by `rise` bytes at most (0: no bound), and let it dump no core.

    RLIMIT_DATA counts what is written to, not address space, which libraries reserve far more of than they use.
    """
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    core = 1 if hard == resource.RLIM_INFINITY else min(1, hard)  # 1 and not 0: that also stops a piped core_pattern
    resource.setrlimit(resource.RLIMIT_CORE, (core, hard))
    if rise and sys.platform == "linux":
        with open("/proc/self/status") as status:
            used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = used + rise if hard == resource.RLIM_INFINITY else min(used + rise, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


if __name__ == "__main__":
    main(sys.argv[1:])

"""One decoder process as its parent sees it: how it is started, asked, answered and ended.

It is a plain child (`python -m capcli.loading.worker_main`) and no `multiprocessing` one: those run the user's `__main__`
again, and keep a tracker process that speaks on stderr. The two sides share a socket for small messages and, for
pixels, files that live in memory and have no name, so nothing is left behind however either side ends. The worker
writes them and the parent reads them: no mapping to grow, any size fits, and each result is the reader's own copy.
Answers are JSON: a codec taken over by an image can send data, never code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import count
from multiprocessing.connection import Connection

import numpy as np

from capcli.errors import CapcliError, ImageError
from capcli.loading.worker_main import LONGEST_ANSWER, Decoded, Pixels

AHEAD = 2  # images a worker holds: one being decoded, one waiting, so that it never waits for the parent
LONGEST_PATH = 65_536  # bytes; a path must fit in the socket, or sending it to a busy worker would block
_KEPT = 16 << 20  # bytes a block keeps between images
_GRACE = 1.0  # seconds a process that is ending has to be gone


class Worker:
    """A decoder process as its parent sees it. It answers in the order it is asked, at most `AHEAD` asked at a time.

    The thread that makes it must outlive it: on Linux the kernel ends a worker with the thread that started it.
    """

    def __init__(self, decode: bytes, memory: int | None) -> None:
        """Start a process for `decode` (pickled) that may grow by `memory` bytes; OSError if none can be started."""
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            undo.callback(theirs.close)
            self._blocks: list[int] = []
            for _ in range(AHEAD):
                self._blocks.append(_nameless_file())
                undo.callback(os.close, self._blocks[-1])
            self._process = _start([theirs.fileno(), memory or 0, *self._blocks], [theirs.fileno(), *self._blocks])
            undo.pop_all()
        theirs.close()
        self._channel = Connection(ours.detach())
        self._turns = count()
        with contextlib.suppress(OSError):  # if it is dead already, receive() will say so
            self._channel.send_bytes(decode)

    def fileno(self) -> int:
        """Readable when there is something to receive, the process's end included."""
        return self._channel.fileno()

    def send(self, path: bytes) -> None:
        """Ask for one image, its path as `encode_path` gives it; a dead worker is found out by `receive`."""
        with contextlib.suppress(OSError):
            self._channel.send_bytes(path)

    def receive(self) -> Decoded | ImageError | None:
        """The next answer; None once, first, when the worker is ready.

        EOFError: the process is gone or talks nonsense. CapcliError: it cannot decode at all, whatever the image.
        """
        try:
            answer = json.loads(self._channel.recv_bytes(LONGEST_ANSWER))
            match answer:
                case {"ready": True}:
                    return None
                case {"broken": str(message)}:
                    raise CapcliError(f"decoder processes cannot start: {message}")
                case {"error": str(kind), "message": str(message)}:
                    next(self._turns)
                    return ImageError(kind, message)
                case {"shape": ([int(), int(), 3] | [int()]) as shape, "facts": dict(facts)}:
                    return self._read(shape), facts
        except (OSError, ValueError) as error:
            raise EOFError from error
        except MemoryError:
            return ImageError("out-of-memory", "no memory to take over the pixels")
        raise EOFError

    def _read(self, shape: Sequence[int]) -> Pixels:
        block = self._blocks[next(self._turns) % AHEAD]
        pixels = np.empty(shape, np.uint8)
        flat = pixels.reshape(-1)
        at = 0
        while at < flat.size:  # one call moves 2 GiB at most
            read = os.preadv(block, [flat[at:].data], at)
            if not read:
                raise EOFError
            at += read
        if at > _KEPT:
            os.ftruncate(block, 0)
        return pixels

    def kill(self) -> None:
        """End the process; returns at once."""
        self._process.kill()

    def end(self) -> str:
        """Close everything, wait for the process, killing it if need be, and say how it ended."""
        self._channel.close()
        for block in self._blocks:
            os.close(block)
        self._blocks = []
        for _ in range(2):  # one that waits for a dead disk cannot be killed: it is left to the system
            try:
                return _ending(self._process.wait(_GRACE))
            except subprocess.TimeoutExpired:
                self._process.kill()
        return "could not be ended"


def encode_path(path: str) -> bytes:
    """`path` as it travels to a worker: any str has such a form, whatever its surrogates."""
    return path.encode("utf-8", "surrogatepass")


def _nameless_file() -> int:
    """A file in memory without a name, gone with its last user; a container's small /dev/shm does not bound it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("capcli-pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _start(arguments: Sequence[int], fds: Sequence[int]) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise FileNotFoundError("this Python does not know its own executable")
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    python_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path if isinstance(entry, str))
    utf8 = f"utf8={sys.flags.utf8_mode}"
    return subprocess.Popen(
        [sys.executable, "-P", "-X", utf8, "-m", "capcli.loading.worker_main", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # the codecs' C libraries warn on the terminal
        stderr=subprocess.DEVNULL,
        env={**os.environ, **one_thread, "PYTHONPATH": python_path},
        pass_fds=fds,
        start_new_session=True,  # Ctrl-C and Ctrl-Z are for the parent to act on
    )


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}"

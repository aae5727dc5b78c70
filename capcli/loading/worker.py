"""The parent's side of one decoder process: start it, send it paths, receive pixels, end it.

It is a plain child process (`python -m capcli.loading.worker_main`), not a `multiprocessing` one: those run the user's
`__main__` again and keep a tracker process that prints to stderr. The two sides share a socket for small messages. Pixels
go through files in memory that have no name, so no file remains, however either side ends. The worker writes these
files and the parent reads them: any size fits without a mapping, and each result is a copy of its own. Answers are JSON, so
that an image that exploits a codec can send data but no code.
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
from capcli.loading.worker_main import LONGEST_ANSWER, PROMPT_FOLLOWS, Decoded, Pixels

AHEAD = 2  # tasks per worker: one being decoded and one waiting, so that the worker never waits for the parent
LONGEST_PATH = 65_536  # bytes; a path must fit in the socket, or sending it to a busy worker would block
_KEPT = 16 << 20  # bytes that a memory file keeps between images
_END_TIMEOUT = 1.0  # seconds to wait for a process that is ending


class Worker:
    """A decoder process. It answers in the order of the paths sent, of which at most `AHEAD` may be unanswered.

    The thread that creates it must outlive it: on Linux the kernel ends a worker with the thread that started it.
    """

    def __init__(self, decode: bytes, memory: int | None) -> None:
        """Start a process for `decode` (pickled) that may grow by `memory` bytes; raises OSError where it cannot start."""
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            undo.callback(theirs.close)
            self._files: list[int] = []
            for _ in range(AHEAD):
                self._files.append(_nameless_file())
                undo.callback(os.close, self._files[-1])
            self._process = _start([theirs.fileno(), memory or 0, *self._files], [theirs.fileno(), *self._files])
            undo.pop_all()
        theirs.close()
        self._channel = Connection(ours.detach())
        self._answers = count()
        with contextlib.suppress(OSError):  # if it has ended already, receive() raises EOFError
            self._channel.send_bytes(decode)

    def fileno(self) -> int:
        """Readable when there is an answer to receive, or the process has ended."""
        return self._channel.fileno()

    def send(self, path: bytes) -> None:
        """Request one image, by its path from `encode_path`; if the worker has ended, `receive` raises EOFError."""
        with contextlib.suppress(OSError):
            self._channel.send_bytes(path)

    def receive(self) -> Decoded | ImageError | None:
        """The next answer. The first is None: the worker is ready.

        Raises EOFError where the process has ended or its answer is invalid, and CapcliError where it cannot decode any
        image.
        """
        try:
            answer = json.loads(self._channel.recv_bytes(LONGEST_ANSWER))
            match answer:
                case {"ready": True}:
                    return None
                case {"broken": str(message)}:
                    raise CapcliError(f"decoder processes cannot start: {message}")
                case {"error": str(kind), "message": str(message)}:
                    next(self._answers)
                    return ImageError(kind, message)
                case {"shape": ([int(), int(), 3] | [int()]) as shape, "facts": dict(facts)}:
                    return self._read(shape), facts
        except (OSError, ValueError) as error:
            raise EOFError from error
        except MemoryError:
            return ImageError("out-of-memory", "no memory to copy the pixels")
        raise EOFError

    def _read(self, shape: Sequence[int]) -> Pixels:
        file = self._files[next(self._answers) % AHEAD]
        pixels = np.empty(shape, np.uint8)
        flat = pixels.reshape(-1)
        at = 0
        while at < flat.size:  # one call moves 2 GiB at most
            read = os.preadv(file, [flat[at:].data], at)
            if not read:
                raise EOFError
            at += read
        if at > _KEPT:
            os.ftruncate(file, 0)
        return pixels

    def kill(self) -> None:
        """End the process; returns at once."""
        self._process.kill()

    def end(self) -> str:
        """Close everything and wait for the process, killing it if necessary; returns how it ended."""
        self._channel.close()
        for file in self._files:
            os.close(file)
        self._files = []
        for _ in range(2):  # a process that waits for a disk that does not answer cannot be killed
            try:
                return _ending(self._process.wait(_END_TIMEOUT))
            except subprocess.TimeoutExpired:
                self._process.kill()
        return "could not be killed"


def encode_path(path: str, prompt: str | None = None) -> bytes:
    """`path`, with the image's prompt if it has one, as bytes for `Worker.send`; works for every str, also with surrogates."""
    return (path if prompt is None else path + PROMPT_FOLLOWS + prompt).encode("utf-8", "surrogatepass")


def _nameless_file() -> int:
    """A file in memory without a name, freed when all descriptors are closed; not limited by the size of /dev/shm."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("capcli-pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _start(arguments: Sequence[int], fds: Sequence[int]) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise FileNotFoundError("sys.executable is not set")
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    python_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path if isinstance(entry, str))
    utf8 = f"utf8={sys.flags.utf8_mode}"
    return subprocess.Popen(
        [sys.executable, "-P", "-X", utf8, "-m", "capcli.loading.worker_main", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # the codecs' C libraries print warnings
        stderr=subprocess.DEVNULL,
        env={**os.environ, **one_thread, "PYTHONPATH": python_path},
        pass_fds=fds,
        start_new_session=True,  # Ctrl-C and Ctrl-Z go to the parent only
    )


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}"

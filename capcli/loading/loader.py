"""`load` and `Loading`: the interface of decoder processes, and how many of them to start."""

from __future__ import annotations

import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from capcli.loading.dispatch import Dispatcher, to_result
from capcli.loading.window import Window
from capcli.loading.worker_main import Decode, attempt
from capcli.options import DECODE_TIMEOUT
from capcli.records import Entry, Failure, Loaded

# Bytes by which a worker may grow. A PNG of 179 megapixels with alpha, the largest that Pillow accepts, took 2.9 GB.
MEMORY = 4 << 30
_FEEDER_TIMEOUT = 0.2  # seconds that `close` waits for the thread that reads the entries


def load(
    entries: Iterable[Entry],
    decode: Decode,
    *,
    workers: int,
    timeout: float = DECODE_TIMEOUT,
    memory: int | None = MEMORY,
    window: int | None = None,
) -> Loading:
    """One `Loaded` or `Failure` for each entry, in their order, each as soon as it and all before it are ready.

    `entries` is read in a separate thread, which it may block, and at most `window` (default 4 * workers + 16) ahead of
    the results taken. `decode` is called with an entry's path, and its prompt if it has one; it returns facts, and pixels
    uint8 [height, width, 3] or the bytes of a file that it encoded,
    uint8 [n]. It must pickle, and be importable from a module other than `__main__`. What it raises becomes a failure: an
    ImageError with its own kind, any other exception as `unreadable`. An entry with a failure is not decoded.
    `timeout` is in seconds per image. `memory` is how
    many bytes a worker may grow by (None: no limit); an image that needs more is a failure `out-of-memory`. A process that
    dies gives a failure `crash`. `workers=0` decodes in this process when a result is taken, without limits of time and
    memory.

    An error that `entries` raises is raised after the results before it. Raises CapcliError where no process can be
    started.
    """
    return Loading(entries, decode, workers, timeout, memory, 4 * workers + 16 if window is None else window)


class Loading(Iterator[Loaded | Failure]):
    """The results of `load`; its processes are running already.

    `with` or `close` ends them, and so does the garbage collector or the end of the interpreter. Closing kills the
    processes and waits for them. Only one thread at a time may take results.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        decode: Decode,
        workers: int,
        timeout: float,
        memory: int | None,
        window: int,
    ) -> None:
        if workers < 0 or window < 1 or timeout <= 0:
            raise ValueError("workers must not be negative; window and timeout must be positive")
        self._decode = decode
        self._window = Window(window)
        targets: list[Callable[[], None]] = [partial(self._window.feed, entries)]
        self._in_place = workers == 0
        if not self._in_place:
            targets.append(Dispatcher(self._window, pickle.dumps(decode), workers, timeout, memory).run)
        # Daemon threads: a read of standard input that never returns must not block the end of the interpreter. They
        # hold no reference to this object, which could not be collected otherwise.
        threads = [threading.Thread(target=target, name="capcli-loading", daemon=True) for target in targets]
        self._close = weakref.finalize(self, _close, self._window, threads)
        for thread in threads:
            thread.start()

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:
        """The next result. None: nothing within `timeout` seconds (None: no limit), or all is `done`."""
        if self._in_place and (task := self._window.next_task(timeout)):
            try:
                answer = attempt(self._decode, task.entry.path, task.entry.prompt)
            except BaseException:  # an interrupt
                self._window.put_back(task)
                raise
            self._window.finish(task, to_result(task, answer))
        return self._window.take(0 if self._in_place else timeout)

    @property
    def done(self) -> bool:
        """Whether there are no more results."""
        return self._window.done

    def close(self) -> None:
        """End the processes and threads at once; only a thread that is blocked in `entries` is left running."""
        self._close()

    def __next__(self) -> Loaded | Failure:
        result = self.take()
        if result is None:
            self.close()
            raise StopIteration
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(window: Window, threads: Sequence[threading.Thread]) -> None:
    window.close()
    if threading.current_thread() in threads:  # the garbage collector runs in any thread
        return
    feeder, *others = threads
    for thread in others:
        thread.join()
    feeder.join(_FEEDER_TIMEOUT)


def default_workers(cpus: int, *, on_gpu: bool) -> int:
    """How many decoder processes to start for a model on a GPU, or on these CPUs themselves.

    On CPUs decoding is 2 to 4 % of the work and the model uses every core. A GPU leaves all but two of them free, and
    captions no more images than 32 processes decode.
    """
    return max(1, min(cpus - 2, 32)) if on_gpu else min(1 + cpus // 16, 4)


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, limited by the quota of its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, cpu_quota("/sys/fs/cgroup/cpu.max") or cpus)


def cpu_quota(path: str) -> int | None:
    """CPUs that a cgroup's `cpu.max` file ("quota period", or "max period") allows; None if unlimited."""
    try:
        with open(path) as file:
            quota, period = file.read().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None

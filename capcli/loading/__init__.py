"""Decoder processes over shared memory, bounded: entries go in, an image or a failure each comes out, in their order.

An image that crashes, hangs or swells a codec costs itself: it becomes a failure and its process is replaced.

    with load(entries, decode, workers=4) as images:
        for image in images:  # Loaded | Failure
            ...
"""

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

__all__ = ["Decode", "Loading", "default_workers", "load", "usable_cpus"]

# Bytes a worker may grow by: a PNG of 179 megapixels with alpha, as large as Pillow trusts, took 2.9 GB.
MEMORY = 4 << 30
_FEEDER_GRACE = 0.2  # seconds to let entries that do not block come to an end


def load(
    entries: Iterable[Entry],
    decode: Decode,
    *,
    workers: int,
    timeout: float = DECODE_TIMEOUT,
    memory: int | None = MEMORY,
    window: int | None = None,
) -> Loading:
    """One `Loaded` or `Failure` for each entry, in their order, each as soon as it and all before it are there.

    `entries` is read in a thread of its own, which it may block, and at most `window` (4 * workers + 16) ahead of what
    was taken. `decode` gives facts, and pixels uint8 [height, width, 3] or the bytes of a file that it encoded, uint8 [n].
    It must pickle, and be importable from a module other than `__main__`; what it raises is a failure: an ImageError
    under its own kind, any other exception as `unreadable`. A `timeout` is per image, in seconds; `memory` is how many
    bytes a worker may grow by (None: no bound), beyond which an image is a failure `out-of-memory`. A process that dies
    gives a failure `crash`. `workers=0` decodes in this process, when a result is asked for, and bounds neither time
    nor memory.

    An error that `entries` raises comes after the results before it; CapcliError where no process can be started.
    """
    return Loading(entries, decode, workers, timeout, memory, 4 * workers + 16 if window is None else window)


class Loading(Iterator[Loaded | Failure]):
    """What `load` gives, already at work. `with` or `close` ends it; so does forgetting it, or the interpreter's end.

    Closing takes a moment: the processes are killed and waited for. One thread at a time may take.
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
        work: list[Callable[[], None]] = [partial(self._window.feed, entries)]
        self._in_place = workers == 0
        if not self._in_place:
            work.append(Dispatcher(self._window, pickle.dumps(decode), workers, timeout, memory).run)
        # Daemons: a read of standard input that never returns must not hold up the end of the interpreter. They must
        # not know this object, or it could not be forgotten.
        threads = [threading.Thread(target=target, name="capcli-loading", daemon=True) for target in work]
        self._close = weakref.finalize(self, _close, self._window, threads)
        for thread in threads:
            thread.start()

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:
        """The next result, or None: nothing within `timeout` seconds (None: as long as it takes), or all is `done`."""
        if self._in_place and (ticket := self._window.next_task(timeout)):
            try:
                answer = attempt(self._decode, ticket.entry.path)
            except BaseException:  # an interrupt
                self._window.put_back(ticket)
                raise
            self._window.settle(ticket, to_result(ticket, answer))
        return self._window.take(0 if self._in_place else timeout)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._window.done

    def close(self) -> None:
        """End the processes and threads, whatever they are doing; only a blocked `entries` is left where it is."""
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
    if threading.current_thread() in threads:  # the garbage collector runs anywhere
        return
    feeder, *others = threads
    for thread in others:
        thread.join()
    feeder.join(_FEEDER_GRACE)


def default_workers(cpus: int, *, on_gpu: bool) -> int:
    """How many decoder processes to start for a model on a GPU, or on these CPUs itself.

    On CPUs decoding is 2 to 4 % of the work and every core is the model's; a GPU leaves all but two of them free, and
    takes no more images than 32 can decode.
    """
    return max(1, min(cpus - 2, 32)) if on_gpu else min(1 + cpus // 16, 4)


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, and the quota of the container it is in."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, quota("/sys/fs/cgroup/cpu.max") or cpus)


def quota(path: str) -> int | None:
    """CPUs' worth of time that a cgroup's `cpu.max` ("quota period", or "max period") grants; None if unbounded."""
    try:
        with open(path) as file:
            quota, period = file.read().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None

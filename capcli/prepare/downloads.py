"""Images from their addresses: fetched side by side, handed on in their order, a bounded number ahead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from capcli.errors import CapcliError, ImageError
from capcli.options import DownloadOptions
from capcli.prepare.encoding import address_of
from capcli.records import Entry
from capcli.sources.fetching import Fetcher

FETCHED = re.compile(r"\d+")
AHEAD = 8  # images, for each connection, that are fetched or waiting for one that is slow


class Downloads:
    """Fetches while it is entered, in a thread of its own, into files that are removed as soon as they are `drop`ped."""

    def __init__(self, options: DownloadOptions, folder: str) -> None:
        self._options = options
        self._folder = os.path.join(folder, "downloads")
        self._handed_on: deque[str] = deque()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(options.connections))  # where host names are looked up
        self._thread = threading.Thread(target=self._loop.run_forever, name="capcli-downloads", daemon=True)
        self._lock = threading.Lock()
        self._closed = False

    def entries(self, listed: Iterable[Entry]) -> Iterator[Entry]:
        """The images whose addresses are listed, each with the path of its file, or of why there is none.

        Raises CapcliError when it looks as if the network were gone, and CancelledError once it is left.
        """
        under_way: deque[tuple[Entry, Future[str]]] = deque()
        for number, entry in enumerate(listed):
            under_way.append((entry, self._begin(entry.path, os.path.join(self._folder, str(number)))))
            if len(under_way) == AHEAD * self._options.connections:
                yield self._hand_on(*under_way.popleft())
        while under_way:
            yield self._hand_on(*under_way.popleft())

    def drop(self) -> None:
        """The first of the images that were handed on and not yet dropped is done with."""
        path = self._handed_on.popleft()
        if path.startswith(self._folder):
            os.unlink(path)

    def _begin(self, address: str, path: str) -> Future[str]:
        with self._lock:
            if self._closed:
                raise CancelledError
            return asyncio.run_coroutine_threadsafe(self._fetch(address, path), self._loop)

    async def _fetch(self, address: str, path: str) -> str:
        try:
            await self._fetcher.fetch(address, path)
        except ImageError as error:
            return address_of(error)
        return path

    def _hand_on(self, entry: Entry, fetched: Future[str]) -> Entry:
        path = fetched.result()
        if self._fetcher.lost is not None:
            raise CapcliError(f"{self._fetcher.lost}; the same command goes on from here")
        self._handed_on.append(path)
        return Entry(entry.name, path)

    def __enter__(self) -> Self:
        os.makedirs(self._folder, exist_ok=True)
        sweep(self._folder, FETCHED)  # what a kill left
        self._fetcher = Fetcher(self._options)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._give_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        sweep(self._folder, FETCHED)
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)

    async def _give_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._fetcher.close()


def sweep(folder: str, names: re.Pattern[str]) -> None:
    """Remove the files of such names from a folder, where there is one."""
    with contextlib.suppress(FileNotFoundError):
        for name in filter(names.fullmatch, os.listdir(folder)):
            os.unlink(os.path.join(folder, name))

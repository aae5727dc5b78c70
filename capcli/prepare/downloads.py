"""Images from URLs: downloaded concurrently, yielded in order, with a bounded number in advance."""

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
from capcli.records import Entry
from capcli.sources.dataset_images import address_of
from capcli.sources.fetching import Fetcher

DOWNLOADED = re.compile(r"\d+")
AHEAD = 8  # images per connection that are in progress or wait for a slower one


class Downloads:
    """Downloads to files in `folder`, in a thread that runs inside the `with` block. `drop` removes each file after use."""

    def __init__(self, options: DownloadOptions, folder: str) -> None:
        self._options = options
        self._folder = os.path.join(folder, "downloads")
        self._yielded: deque[str] = deque()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(options.connections))  # resolves host names
        self._thread = threading.Thread(target=self._loop.run_forever, name="capcli-downloads", daemon=True)
        self._lock = threading.Lock()
        self._closed = False

    def entries(self, urls: Iterable[Entry]) -> Iterator[Entry]:
        """Each entry, whose path is a URL, with the path of the downloaded file, or the address of the ImageError.

        Raises CapcliError when the network seems to be down, and CancelledError after the end of the `with` block.
        """
        pending: deque[tuple[Entry, Future[str]]] = deque()
        for number, entry in enumerate(urls):
            pending.append((entry, self._begin(entry.path, os.path.join(self._folder, str(number)))))
            if len(pending) == AHEAD * self._options.connections:
                yield self._finished(*pending.popleft())
        while pending:
            yield self._finished(*pending.popleft())

    def drop(self) -> None:
        """Removes the file of the oldest entry that was yielded and not dropped."""
        path = self._yielded.popleft()
        if path.startswith(self._folder):
            os.unlink(path)

    def _begin(self, url: str, path: str) -> Future[str]:
        with self._lock:
            if self._closed:
                raise CancelledError
            return asyncio.run_coroutine_threadsafe(self._download(url, path), self._loop)

    async def _download(self, url: str, path: str) -> str:
        try:
            await self._fetcher.fetch(url, path)
        except ImageError as error:
            return address_of(error)
        return path

    def _finished(self, entry: Entry, download: Future[str]) -> Entry:
        path = download.result()
        if self._fetcher.lost is not None:
            raise CapcliError(f"{self._fetcher.lost} Run the same command again to continue from here")
        self._yielded.append(path)
        return Entry(entry.name, path)

    def __enter__(self) -> Self:
        os.makedirs(self._folder, exist_ok=True)
        remove_files(self._folder, DOWNLOADED)  # of a run that was killed
        self._fetcher = Fetcher(self._options)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        remove_files(self._folder, DOWNLOADED)
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)

    async def _cancel(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._fetcher.close()


def remove_files(folder: str, names: re.Pattern[str]) -> None:
    """Removes the files with such names from a folder, if it exists and is not a link to one."""
    if os.path.islink(folder):
        return
    with contextlib.suppress(FileNotFoundError):
        for name in filter(names.fullmatch, os.listdir(folder)):
            os.unlink(os.path.join(folder, name))

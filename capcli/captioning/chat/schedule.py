"""The schedule: which image is sent to which server and when, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from capcli.captioning.chat.client import (
    ChatClient,
    NoLogprobsError,
    NotReachedError,
    RepeatableError,
)
from capcli.captioning.chat.completions import Completion
from capcli.captioning.chat.request import RequestTemplate
from capcli.captioning.chat.servers import Server, Servers, backoff
from capcli.errors import BoundError, ImageError, UnfinishedError
from capcli.options import EndpointOptions
from capcli.progress import warn
from capcli.records import Loaded
from capcli.text import counted

LONGEST_WAIT = 900.0  # seconds; a server that requests a longer wait (Retry-After) stops the run
LOST = 10  # images in a row without an answer after which the run stops
JOIN = 5.0  # seconds to wait for the thread at the end


@dataclass(slots=True, eq=False)
class ImageRequest:
    """One image: what its requests contain, and how many of them failed."""

    index: int
    image: Loaded
    prompt: str
    attempts: int = 0
    avoided: Server | None = None  # where the last attempt failed

    def __lt__(self, other: ImageRequest) -> bool:
        return self.index < other.index


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request under way."""

    work: ImageRequest
    server: Server
    started: float


@dataclass(frozen=True, slots=True)
class Retry:
    """An attempt is to be repeated after a delay in seconds, if possible by another server than `avoided`."""

    avoided: Server | None = None
    delay: float = 0.0


Outcome = Completion | ImageError | None  # None: given up because the run ends


@dataclass(slots=True)
class Usage:
    """What the requests of a run have cost; `seconds` is the sum of the times that they took."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Schedule:
    """A context in which submitted images are sent to the servers; `outcomes` has one outcome for each, in any order.

    `stopped` is the error that ended the schedule early, if any; it is set before the last outcomes are there.
    """

    def __init__(
        self, options: EndpointOptions, client: ChatClient, servers: Servers, template: RequestTemplate, usage: Usage
    ) -> None:
        self.outcomes: SimpleQueue[tuple[ImageRequest, Outcome]] = SimpleQueue()
        self.stopped: BaseException | None = None
        self.logprobs = True  # whether requests ask for log-probabilities
        self._options, self._client, self._servers, self._template = options, client, servers, template
        self._usage = usage
        self._waiting: list[ImageRequest] = []  # a heap: the first images first
        self._delayed: dict[ImageRequest, asyncio.TimerHandle] = {}
        self._running: dict[asyncio.Task[Outcome | Retry], Attempt] = {}
        self._wake: asyncio.TimerHandle | None = None
        self._left_out: set[Server] = set()
        self._ended = False  # no more requests start
        self._captioned = False
        self._lost_in_row = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="capcli-endpoint", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN)

    def submit(self, work: ImageRequest) -> None:
        """Queue an image. Called by another thread, as `end` is."""
        self._loop.call_soon_threadsafe(self._enqueue, work)

    def end(self) -> None:
        """Start no more requests: those under way are finished, all other images are given up."""
        self._loop.call_soon_threadsafe(self._end)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._ended = True
            for task in self._running:
                task.cancel()
            ended: Any = asyncio.gather(*self._running, return_exceptions=True)
            self._loop.run_until_complete(ended)
            self._loop.run_until_complete(self._client.close())
            self._loop.close()

    def _enqueue(self, work: ImageRequest) -> None:
        self._delayed.pop(work, None)
        if self._ended:
            self.outcomes.put((work, None))
            return
        heapq.heappush(self._waiting, work)
        self._assign()

    def _assign(self) -> None:
        """Send waiting images to servers with room."""
        while self._waiting and not self._ended:
            if bound := self._bound_reached():
                self._end(BoundError(bound))
                return
            server = self._servers.choose(self._waiting[0].avoided)
            if server is None:
                self._wake_later()
                return
            self._start(heapq.heappop(self._waiting), server)

    def _start(self, work: ImageRequest, server: Server) -> None:
        server.active += 1
        self._usage.requests += 1
        task = self._loop.create_task(self._attempt(work, server))
        self._running[task] = Attempt(work, server, time.monotonic())
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[Outcome | Retry]) -> None:
        """Store the outcome of an attempt, or queue its image again. A task may be cancelled before it runs at all."""
        attempt = self._running.pop(task)
        attempt.server.active -= 1
        self._usage.seconds += time.monotonic() - attempt.started
        outcome: Outcome | Retry = None
        if not task.cancelled():
            error = task.exception()
            if error is None:
                outcome = task.result()
            else:
                self._fail(error)
        if isinstance(outcome, Retry):
            self._repeat(attempt.work, outcome)
        else:
            self.outcomes.put((attempt.work, outcome))
        self._assign()

    def _repeat(self, work: ImageRequest, retry: Retry) -> None:
        work.avoided = retry.avoided
        if retry.delay and not self._ended:
            self._delayed[work] = self._loop.call_later(retry.delay, self._enqueue, work)
        else:
            self._enqueue(work)

    def _wake_later(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        wait = self._servers.next_room()
        if wait is not None:
            self._wake = self._loop.call_later(wait + 0.001, self._assign)

    def _bound_reached(self) -> str | None:
        """Which bound allows no further request, as a message; None where there is none."""
        options, usage = self._options, self._usage
        if options.max_requests is not None and usage.requests >= options.max_requests:
            return f"--max-requests {options.max_requests} is reached; the same command continues the run"
        if options.max_tokens_total is not None and usage.tokens >= options.max_tokens_total:
            return (
                f"--max-tokens-total {options.max_tokens_total} is reached, with {counted(usage.tokens, 'token')}; the same "
                "command continues the run"
            )
        return None

    def _end(self, error: BaseException | None = None) -> None:
        self.stopped = self.stopped or error
        self._ended = True
        for handle in self._delayed.values():
            handle.cancel()
        for work in (*self._waiting, *self._delayed):
            self.outcomes.put((work, None))
        self._waiting.clear()
        self._delayed.clear()

    def _fail(self, error: BaseException) -> None:
        """End the schedule because of an error that every request would get; requests under way are cancelled."""
        self._end(error)
        for task in self._running:
            if task is not asyncio.current_task(self._loop):
                task.cancel()

    async def _attempt(self, work: ImageRequest, server: Server) -> Outcome | Retry:
        logprobs = self.logprobs
        body = self._template.body(work.image.pixels, work.prompt, logprobs=logprobs)
        try:
            return self._counted(await self._client.complete(server, body, logprobs=logprobs), server)
        except NoLogprobsError:
            self.logprobs = False
            return Retry()
        except NotReachedError as error:
            self._usage.requests -= 1
            return self._not_reached(server, str(error))
        except RepeatableError as error:
            return self._failed(work, server, error)
        except ImageError as error:
            if error.kind.startswith(("http-", "malformed")) and not self._captioned:
                self._count_lost(server, str(error))
            return error

    def _counted(self, completion: Completion, server: Server) -> Completion:
        self._captioned = True
        self._lost_in_row = 0
        counts = (completion.prompt_tokens, completion.completion_tokens)
        self._usage.prompt_tokens += counts[0] or 0
        self._usage.completion_tokens += counts[1] or 0
        if None in counts and self._options.max_tokens_total is not None:
            self._end(
                UnfinishedError(
                    f"{server.url} reports no numbers of tokens, which --max-tokens-total needs: use --max-requests"
                )
            )
        return completion

    def _failed(self, work: ImageRequest, server: Server, error: RepeatableError) -> ImageError | Retry | None:
        """The failure of an image whose attempt failed, unless it is to be repeated or given up."""
        work.attempts += 1
        server.failure(alone=len(self._servers.each) == 1)
        if min(each.paused_until for each in self._servers.each) - time.monotonic() > LONGEST_WAIT:
            self._end(
                UnfinishedError(
                    f"{server.url} accepts no requests for {error.wait or LONGEST_WAIT:.0f} seconds: {error}; the same command "
                    "continues the run"
                )
            )
            return None
        if work.attempts <= self._options.retries:
            return Retry(server, backoff(work.attempts) if error.wait is None else 0.0)
        self._count_lost(server, str(error))
        attempts = f" ({counted(work.attempts, 'attempt')})" if work.attempts > 1 else ""
        return ImageError(error.kind, f"{error}{attempts}")

    def _count_lost(self, server: Server, reason: str) -> None:
        """Count an image without an answer; after `LOST` in a row the run stops."""
        self._lost_in_row += 1
        if self._lost_in_row == LOST:
            self._fail(
                UnfinishedError(
                    f"{server.url} answered none of the last {LOST} images, the last: {reason}; the same command continues the "
                    "run, and --retry-failed tries them again"
                )
            )

    def _not_reached(self, server: Server, reason: str) -> Retry | None:
        """An attempt without a connection is repeated, unless all servers stay unreachable: then the run stops."""
        server.not_reached()
        most = self._options.retries
        if server.unreachable > most:
            if all(each.unreachable > most for each in self._servers.each):
                self._fail(
                    UnfinishedError(f"{server.url} cannot be reached: {reason}; the same command continues the run")
                )
                return None
            if server not in self._left_out:
                self._left_out.add(server)
                warn(f"{server.url} cannot be reached and is left out: {reason}")
        return Retry(server)

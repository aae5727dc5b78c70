"""The endpoint backend: OpenAI-compatible servers, such as vLLM, llama.cpp, Ollama or `transformers serve`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from queue import Empty
from typing import Any
from urllib.parse import urlsplit

from capcli import pixels
from capcli.captioning.answers import Answer, Problem, accept, judge
from capcli.captioning.chat.client import ApiKey, ChatClient
from capcli.captioning.chat.completions import Choice, Completion
from capcli.captioning.chat.request import RequestTemplate, sampling_of
from capcli.captioning.chat.schedule import ImageRequest, Outcome, Schedule, Usage
from capcli.captioning.chat.schema import AnswerSchema
from capcli.captioning.chat.servers import Server, Servers
from capcli.captioning.feed import POLL_SECONDS, Arrivals, Deliver, OrderedDelivery
from capcli.captioning.prompts import DEFAULT_PROMPT, Prompts
from capcli.decoding.activity import Activity
from capcli.errors import ImageError, UsageError
from capcli.loading import Loading, default_workers, load, usable_cpus
from capcli.options import MAX_IMAGE_EDGE, CaptionOptions, EndpointOptions
from capcli.records import Candidate, Caption, Entry, Failure, Loaded
from capcli.sources import Source
from capcli.sources.dataset_images import StoredDecode
from capcli.storage.run_file import RunFile
from capcli.text import flag

FATAL: tuple[Problem, ...] = ("refusal", "empty-answer", "cut-answer")  # failures unless --on-bad keep
AHEAD = 8  # images that are ready beside those at the servers
MOST_WAITING = 4096  # results that wait for an earlier image
TURN = 0.02  # seconds that one of the two sides is waited for while the other may have something
RECORD_SECONDS = 10.0  # between two updates of the token counts in the run file
# Options of models that run here, with the values that they have unless given.
LOCAL = {
    "revision": None,
    "device": "auto",
    "dtype": "auto",
    "backend": "auto",
    "batch_size": None,
    "threads": None,
    "keep_prompt": False,
    "tags_field": None,
    "fast_decode": False,
    "gpu_decode": False,
    "quantize": None,
    "adapter": None,
}


@dataclass
class EndpointBackend:
    """The requests of a run. `open` builds it; no request is sent before `caption`."""

    options: CaptionOptions
    endpoint: EndpointOptions
    template: RequestTemplate
    prompts: Prompts
    client: ChatClient
    schema: AnswerSchema | None
    before: Mapping[str, float]  # the usage of the runs that this one continues
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self._scored = self._captioned = 0
        self._fewer = False  # a server returned fewer captions than requested

    @classmethod
    def open(cls, options: CaptionOptions, endpoint: EndpointOptions, earlier: RunFile | None) -> EndpointBackend:
        """Check all options. Raises UsageError, and CapcliError where a package is missing."""
        refuse_local_options(options)
        schema = AnswerSchema(endpoint.schema) if endpoint.schema is not None else None
        template = RequestTemplate(
            options.model, options.system, sampling_of(options.generation), schema.content if schema else None
        )
        prompts = Prompts(DEFAULT_PROMPT if options.prompt is None else options.prompt)
        client = ChatClient(endpoint, ApiKey.from_environment(), options.model)
        return cls(options, endpoint, template, prompts, client, schema, usage_before(earlier))

    @property
    def label(self) -> str:
        return f"by {self.options.model}"

    @property
    def max_edge(self) -> int:
        return self.options.max_image_edge or MAX_IMAGE_EDGE

    def settings(self) -> Mapping[str, Any]:
        """Servers may move to another host or port; their paths may not change."""
        options = self.options
        return {
            "backend": "endpoint",
            "endpoint": sorted({urlsplit(url).path for url in self.urls}),
            "model": options.model,
            "prompt": DEFAULT_PROMPT if options.prompt is None else options.prompt,
            "system": options.system,
            "schema": None if self.schema is None else self.schema.sha256,
            "max_image_edge": self.max_edge,
            "generation": dict(self.template.sampling),
        }

    def facts(self) -> Mapping[str, Any]:
        """The addresses, and what all runs with this output have cost together."""
        usage = {name: round(value + self.before.get(name, 0), 3) for name, value in asdict(self.usage).items()}
        return {"endpoint": {"urls": self.urls}, "usage": usage, "versions": {"httpx2": version("httpx2")}}

    @property
    def urls(self) -> list[str]:
        return [base_address(url) for url in self.endpoint.urls]

    def plan(self, wanted: Iterator[Entry], source: Source) -> Iterator[Entry]:  # noqa: ARG002
        return wanted

    def prepared(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """The entries, with their prompts where these contain fields of the metadata beside the images."""
        return self.prompts.prepared(entries)

    def load(self, entries: Iterable[Entry], facts: Collection[str]) -> Loading:
        """Start the decoder processes, which encode upright JPEGs."""
        options = self.options
        decode = partial(pixels.load_jpeg, max_pixels=options.max_pixels, max_edge=self.max_edge, facts=facts)
        workers = default_workers(usable_cpus(), on_gpu=True) if options.workers is None else options.workers
        return load(entries, StoredDecode(decode), workers=workers, timeout=options.decode_timeout)

    def caption(
        self,
        arrivals: Arrivals,
        deliver: Deliver,
        *,
        stop: Callable[[], bool],
        changed: Callable[[], None],
        activity: Activity,
    ) -> Iterator[None]:
        """Send all arrivals to the servers. After a stop, requests under way are finished."""
        servers = Servers([Server(url, self.endpoint.concurrency) for url in self.urls])
        with Schedule(self.endpoint, self.client, servers, self.template, self.usage) as schedule:
            ordered = self.options.order == "source"
            order = OrderedDelivery(deliver)
            put, most = (order.put, MOST_WAITING) if ordered else (deliver, None)
            traffic = Traffic(arrivals, schedule, servers, self.prompts, put, self.result, most)
            recorded = time.monotonic()
            while traffic.move(stop()):
                activity.change(decoding=traffic.under_way - activity.under_way)
                yield
                if time.monotonic() - recorded > RECORD_SECONDS:
                    recorded = time.monotonic()
                    changed()
            if schedule.stopped is not None:
                order.flush()  # answers that are paid for, after images that were given up
                raise schedule.stopped

    def result(self, image: Loaded, outcome: Completion | ImageError) -> Caption | Failure:
        """The row of an image: its captions, or the failure where no answer is one."""
        if isinstance(outcome, ImageError):
            return Failure(image.name, outcome.kind, str(outcome))
        candidates: list[Candidate] = []
        errors: list[ImageError] = []
        for choice in outcome.choices:
            try:
                candidates.append(Candidate(self.text(choice), choice.score))
            except ImageError as error:
                errors.append(error)
        if not candidates:
            return Failure(image.name, errors[0].kind, str(errors[0]))
        self._captioned += 1
        self._scored += candidates[0].score is not None
        self._fewer |= len(outcome.choices) < self.template.sampling.get("n", 1)
        if all(candidate.score is not None for candidate in candidates):
            candidates.sort(key=lambda candidate: -(candidate.score or 0.0))
        return Caption(image.name, tuple(candidates), image.facts)

    def text(self, choice: Choice) -> str:
        """The caption in an answer. Raises ImageError where it is none."""
        answer = judge(choice.text, cut=choice.cut)
        if choice.refused and answer.problem is None:
            answer = Answer(answer.text, "refusal")
        text = accept(answer, self.options.on_bad, FATAL)
        return text if self.schema is None else self.schema.checked(text)

    def notes(self) -> Iterable[str]:
        if self._captioned and not self._scored:
            yield "the server returns no log-probabilities: score is null"
        elif self._scored < self._captioned:
            missing = self._captioned - self._scored
            yield f"the server returned no log-probabilities for {missing} of {self._captioned} images: score is null there"
        if self._fewer:
            yield f"the server returned fewer captions than --num-return-sequences {self.template.sampling['n']}"


class Traffic:
    """Moves images from the arrivals to the servers, and results from there to `deliver`, with a bound on both."""

    def __init__(
        self,
        arrivals: Arrivals,
        schedule: Schedule,
        servers: Servers,
        prompts: Prompts,
        deliver: Deliver,
        result: Callable[[Loaded, Completion | ImageError], Caption | Failure],
        most_waiting: int | None,
    ) -> None:
        self._most_waiting = most_waiting
        self._arrivals, self._schedule, self._servers, self._prompts = arrivals, schedule, servers, prompts
        self._deliver, self._result = deliver, result
        self._taken = self._under_way = 0
        self._unfinished: dict[int, None] = {}  # indices, in order
        self._ended = False

    def move(self, stop: bool) -> bool:
        """Move what is ready, or wait a moment for it. False once nothing is left to do."""
        if stop and not self._ended:
            self._schedule.end()
        self._ended = self._ended or stop or self._schedule.stopped is not None
        takes = not self._ended and not self._arrivals.done
        if not takes and not self._under_way:
            return False
        if takes and self._has_room:
            self._take(TURN if self._under_way else POLL_SECONDS)
            self._collect(0.0)
        else:
            self._collect(POLL_SECONDS)
        return True

    @property
    def under_way(self) -> int:
        """Images at the servers, or waiting to be sent again."""
        return self._under_way

    @property
    def _has_room(self) -> bool:
        oldest = next(iter(self._unfinished), self._taken)
        return self._under_way < self._servers.room + AHEAD and (
            self._most_waiting is None or self._taken - oldest < self._most_waiting
        )

    def _take(self, wait: float) -> None:
        arrival = self._arrivals.take(wait)
        if arrival is None:
            return
        index, self._taken = self._taken, self._taken + 1
        if isinstance(arrival, Failure):
            self._deliver(index, arrival)
            return
        try:
            work = ImageRequest(index, arrival, self._prompts.of(arrival.prompt))
        except ImageError as error:
            self._deliver(index, Failure(arrival.name, error.kind, str(error)))
            return
        self._unfinished[index] = None
        self._under_way += 1
        self._schedule.submit(work)

    def _collect(self, wait: float) -> None:
        """Deliver the outcomes that are there; waits at most `wait` seconds for the first."""
        try:
            while True:
                self._finish(
                    *self._schedule.outcomes.get(timeout=wait) if wait else self._schedule.outcomes.get_nowait()
                )
                wait = 0.0
        except Empty:
            return

    def _finish(self, work: ImageRequest, outcome: Outcome) -> None:
        self._under_way -= 1
        del self._unfinished[work.index]
        if outcome is not None:
            self._deliver(work.index, self._result(work.image, outcome))


def refuse_local_options(options: CaptionOptions) -> None:
    """Raises UsageError for options of models that run on this machine."""
    given = [flag(name) for name, default in LOCAL.items() if getattr(options, name) != default]
    if given:
        raise UsageError(f"{', '.join(given)}: with --endpoint the server decides this: leave it out")


def base_address(url: str) -> str:
    """The address that paths of the API are appended to."""
    return url.rstrip("/").removesuffix("/chat/completions").rstrip("/")


def usage_before(earlier: RunFile | None) -> Mapping[str, float]:
    """The usage that an earlier run recorded."""
    usage = {} if earlier is None else earlier.data.get("usage")
    return {name: n for name, n in usage.items() if isinstance(n, int | float)} if isinstance(usage, Mapping) else {}

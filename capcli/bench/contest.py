"""Contestants: each in a process of its own, taking turns over the same photos, so that the machine's moods hit all alike."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Self

from capcli.errors import CapcliError


@dataclass(frozen=True, slots=True)
class Round:
    """One turn: `seconds` from the first file to the last row, and the captions by path."""

    seconds: float
    captions: Mapping[str, str]


@dataclass(slots=True)
class ContestantResult:
    """What a contestant did in all its rounds; `failed` says why it could not go on."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    failed: str | None = None

    @property
    def rate(self) -> float:
        """Images per second in the median round."""
        return statistics.median(len(each.captions) / each.seconds for each in self.rounds)


class Contestant:
    """A process that is told its task, says a line of JSON when it is ready, and one after every `go`."""

    def __init__(self, name: str, command: Sequence[str], task: Mapping[str, Any]) -> None:
        self.told, self._task = ContestantResult(name), task
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
        except OSError as error:
            raise CapcliError(f"{command[0]} cannot be started: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ready(self) -> None:
        """Has it load and warm up, and waits until it has: no other works meanwhile."""
        self._write(json.dumps(self._task))  # a command line has no room for the names of thousands of photos
        self.told.facts = self._line() or {}

    def go(self) -> None:
        """One round, unless it failed before."""
        if self.told.failed is not None:
            return
        self._write("go")
        line = self._line()
        if line is not None:
            self.told.rounds.append(Round(line["seconds"], line["captions"]))

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the line that does not come tells why
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _line(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print, too
                told: dict[str, Any] = json.loads(line)
                return told
        self._process.wait()
        self._errors.seek(0)
        said = [each.strip() for each in self._errors if each.strip()]
        self.told.failed = said[-1] if said else f"it ended with code {self._process.returncode}"
        return None


def contest(contestants: Sequence[Contestant], rounds: int) -> None:
    """All of them ready, one after another, and then as many rounds of each, in turns."""
    for each in contestants:
        each.ready()
    for _ in range(rounds):
        for each in contestants:
            each.go()


def equal_share(ours: Round, theirs: Round) -> float:
    """The share of captions that are the same, of images that both captioned."""
    both = ours.captions.keys() & theirs.captions.keys()
    return sum(ours.captions[name] == theirs.captions[name] for name in both) / max(len(both), 1)

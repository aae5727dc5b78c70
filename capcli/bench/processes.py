"""The processes that `capcli bench` compares: each captions the same photos, and they take turns in every round.

Separate processes for capcli and each baseline isolate their memory and threads. Taking turns spreads changes of
the machine's speed over all of them.
"""

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
    """One round of one process: seconds from the first file to the last row, and the captions by path."""

    seconds: float
    captions: Mapping[str, str]


@dataclass(slots=True)
class ProcessResult:
    """All rounds of one process; `failed` is the reason why it ended early."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    failed: str | None = None

    @property
    def rate(self) -> float:
        """Images per second in the median round."""
        return statistics.median(len(each.captions) / each.seconds for each in self.rounds)


class BenchProcess:
    """A process that reads its task and then captions all photos at every `go`.

    It prints a line of JSON when it is ready, and one after every `go`.
    """

    def __init__(self, name: str, command: Sequence[str], task: Mapping[str, Any]) -> None:
        self.result, self._task = ProcessResult(name), task
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

    def prepare(self) -> None:
        """Send the task, and wait until the process has loaded its model and warmed up."""
        self._write(json.dumps(self._task))  # not as an argument: a command line is too short for thousands of paths
        self.result.facts = self._read() or {}

    def run_round(self) -> None:
        """Run one round; does nothing if the process failed before."""
        if self.result.failed is not None:
            return
        self._write("go")
        answer = self._read()
        if answer is not None:
            self.result.rounds.append(Round(answer["seconds"], answer["captions"]))

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_read` finds the reason
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _read(self) -> dict[str, Any] | None:
        """The next line of JSON; None, with `failed` set, if the process ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print other lines
                answer: dict[str, Any] = json.loads(line)
                return answer
        self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        self.result.failed = lines[-1] if lines else f"it ended with code {self._process.returncode}"
        return None


def run_rounds(processes: Sequence[BenchProcess], rounds: int) -> None:
    """Prepare the processes one after another, then run the rounds, with every process in each."""
    for process in processes:
        process.prepare()
    for _ in range(rounds):
        for process in processes:
            process.run_round()


def equal_share(first: Round, second: Round) -> float:
    """The share of equal captions, of the images that both rounds captioned."""
    both = first.captions.keys() & second.captions.keys()
    return sum(first.captions[name] == second.captions[name] for name in both) / max(len(both), 1)

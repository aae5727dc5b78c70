"""The Stanford PTB tokenizer and METEOR, which run in Java; pycocoevalcap contains their files."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import IO, Self

from capcli.errors import CapcliError
from capcli.interrupts import Interrupts
from capcli.metrics.ptb import PUNCTUATION
from capcli.metrics.tokenization import one_line

TOKENIZER_JAR = "stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor-1.5.jar"
GET_JAVA = (
    "Install one (Debian, Ubuntu: apt-get install default-jre-headless; macOS: brew install openjdk), or leave METEOR out with "
    "--without-java"
)
# Before version 18 Java's default encoding depends on the locale; captions are always UTF-8.
# METEOR reads and writes numbers in the format of the default locale, whose decimal separator may be a comma.
OPTIONS = (
    "-Dfile.encoding=UTF-8",
    "-Duser.language=en",
    "-Duser.country=US",
    "-Duser.language.format=en",
    "-Duser.country.format=US",
)
OVERRIDES = "_JAVA_OPTIONS"  # a variable whose options take precedence over those of the command line


def java() -> str:
    """The path of the Java program; raises CapcliError if there is none."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java") or (home and shutil.which("java", path=os.path.join(home, "bin")))
    if not found:
        raise CapcliError(f"METEOR and the PTB tokenizer need a Java runtime, and none is installed. {GET_JAVA}")
    return os.path.abspath(found)


def package_folder(name: str) -> str:
    """The folder of one of pycocoevalcap's subpackages; raises CapcliError if it is not installed."""
    try:
        spec = find_spec(f"pycocoevalcap.{name}")
    except ImportError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise CapcliError("scoring captions needs pycocoevalcap: pip install 'capcli[metrics]'")
    return next(iter(spec.submodule_search_locations))


class Java:
    """A Java process that is ended by the `with` block, by the garbage collector, or at Python's exit."""

    def __init__(self, folder: str, *command: str) -> None:
        program, pipe = [java(), *OPTIONS, *command], subprocess.PIPE
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        # An interrupt between the fork and the next line would leave a Java process behind.
        with Interrupts(quiet=True, grace=math.inf) as interrupts:
            try:
                self.process = subprocess.Popen(
                    program, cwd=folder, env=environment(), stdin=pipe, stdout=pipe, stderr=self.errors
                )
            except OSError as error:
                self.errors.close()
                raise CapcliError(f"Java cannot be started: {error.strerror or error}. {GET_JAVA}") from error
            # An interrupt may come before the `with` block is entered.
            self._end = weakref.finalize(self, end, self.process, self.errors)
        if interrupts.asked():
            self._end()
            raise SystemExit(interrupts.exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self.process, self.errors)
        self._end.detach()


def environment() -> dict[str, str]:
    """The environment of Java: the user's, in which no variable overrides OPTIONS."""
    overrides = os.environ.get(OVERRIDES)
    return {**os.environ, **({OVERRIDES: " ".join((overrides, *OPTIONS))} if overrides else {})}


def tokenize(texts: Sequence[str]) -> list[str]:
    """Each text's PTB tokens from the original tokenizer: lower case, without COCO's punctuation, separated by spaces.

    Unlike `ptb.ptb`, it looks past the end of a line to decide whether a full stop belongs to a letter. Raises CapcliError
    where there is no Java or it fails.
    """
    if not texts:
        return []
    command = ("-cp", TOKENIZER_JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    with Java(package_folder("tokenizer"), *command) as tokenizer:
        answer, _ = tokenizer.process.communicate("\n".join(map(one_line, texts)).encode())
        lines = answer.decode().split("\n")
        # There is a line end after the last line as well, unless the last text is empty.
        if tokenizer.process.returncode or len(lines) < len(texts):
            raise CapcliError(f"the PTB tokenizer failed: {error_line(tokenizer.errors.fileno())}. {GET_JAVA}")
    return [" ".join(w for w in line.rstrip().split(" ") if w not in PUNCTUATION) for line in lines[: len(texts)]]


class Meteor(Java):
    """METEOR 1.5 for English."""

    def __init__(self) -> None:
        command = (f"-Xmx{heap()}m", "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
        super().__init__(package_folder("meteor"), *command)

    def statistics(self, caption: str, references: Sequence[str]) -> list[float]:
        """METEOR's counts for one tokenized caption and its references. Counts of several captions can be summed."""
        line = " ||| ".join(("SCORE", *map(unbarred, references), unbarred(caption)))
        return [float(number) for number in self._ask(line)[0].split()]

    def scores(self, statistics: Sequence[Sequence[float]]) -> list[float]:
        """The score of each set of counts, from 0 to 1."""
        if not statistics:
            return []
        line = " ||| ".join(("EVAL", *(" ".join(map(str, each)) for each in statistics)))
        return [float(answer) for answer in self._ask(line, len(statistics) + 1)[:-1]]  # the last is the score of all

    def _ask(self, line: str, answers: int = 1) -> list[str]:
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        lines = []
        try:
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
            lines = [process.stdout.readline() for _ in range(answers)]
        except OSError:
            pass  # the process has ended; the reason is read below
        if not all(lines) or len(lines) < answers:
            process.wait()
            reason = error_line(self.errors.fileno())
            raise CapcliError(f"METEOR failed at {line[-60:]!r}: {reason}. --without-java leaves it out")
        return [line.decode().strip() for line in lines]


def heap() -> int:
    """METEOR's heap limit in MiB. It takes 1 GB, and memory quadratic in the length of a caption of thousands of words."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    except (OSError, ValueError):
        memory = 0
    return max(2048, memory // 2)


def unbarred(text: str) -> str:
    """The text without METEOR's separator."""
    return text.replace("|||", "").replace("  ", " ")


def end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, errors):
        if stream is not None:
            with contextlib.suppress(OSError):  # unread input
                stream.close()


def error_line(errors: int) -> str:
    """The first line of standard error that names an error, or else the first line."""
    os.lseek(errors, 0, os.SEEK_SET)
    lines = os.read(errors, 1 << 16).decode("utf-8", "replace").splitlines()
    errors_named = [line.strip() for line in lines if "Error" in line or "Exception" in line] or [
        x for x in lines if x.strip()
    ]
    return errors_named[0][:300] if errors_named else "no error message"

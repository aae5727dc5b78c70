"""What runs in Java: the Stanford PTB tokenizer and METEOR, both from the files that pycocoevalcap brings along."""

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
    "Install one (Debian, Ubuntu: apt-get install default-jre-headless; macOS: brew install openjdk; Windows: winget install "
    "EclipseAdoptium.Temurin.21.JRE), or leave METEOR out with --without-java"
)
# A caption is UTF-8 whatever the locale says, which decides in Java before 18.
OPTIONS = ("-Dfile.encoding=UTF-8", "-Duser.language=en")


def java() -> str:
    """The Java program; raises CapcliError that says how to get one."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java") or (home and shutil.which("java", path=os.path.join(home, "bin")))
    if not found:
        raise CapcliError(f"METEOR and the PTB tokenizer need a Java runtime, and there is none. {GET_JAVA}")
    return os.path.abspath(found)


def package_folder(name: str) -> str:
    """Where pycocoevalcap keeps one of its parts; raises CapcliError that says how to get it."""
    try:
        spec = find_spec(f"pycocoevalcap.{name}")
    except ImportError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise CapcliError("captions are measured by pycocoevalcap, which is missing: pip install 'capcli[metrics]'")
    return next(iter(spec.submodule_search_locations))


class Java:
    """A Java program that ends with the `with` block, or with this object, or with Python, whatever happens."""

    def __init__(self, folder: str, *command: str) -> None:
        program, pipe = [java(), *OPTIONS, *command], subprocess.PIPE
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - ended with the process
        # An interrupt, or a second, between the fork and the next line would leave a Java behind that nobody knows.
        with Interrupts(quiet=True, grace=math.inf) as interrupts:
            try:
                self.process = subprocess.Popen(program, cwd=folder, stdin=pipe, stdout=pipe, stderr=self.errors)
            except OSError as error:
                self.errors.close()
                raise CapcliError(f"Java cannot be started: {error.strerror or error}. {GET_JAVA}") from error
            # Another may come before the `with` block is entered.
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


def tokenize(texts: Sequence[str]) -> list[str]:
    """Each text's PTB tokens, in small letters and without COCO's punctuation, with a space between two.

    The same as `tokens.ptb` by the original: it looks past the end of a line where a full stop may belong to a letter.
    Raises CapcliError where there is no Java or it fails.
    """
    if not texts:
        return []
    command = ("-cp", TOKENIZER_JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    with Java(package_folder("tokenizer"), *command) as tokenizer:
        answer, _ = tokenizer.process.communicate("\n".join(map(one_line, texts)).encode())
        lines = answer.decode().split("\n")
        # One line end comes after the last line as well, unless the last text is empty.
        if tokenizer.process.returncode or len(lines) < len(texts):
            raise CapcliError(f"the PTB tokenizer failed: {last_words(tokenizer.errors.fileno())}. {GET_JAVA}")
    return [" ".join(w for w in line.rstrip().split(" ") if w not in PUNCTUATION) for line in lines[: len(texts)]]


class Meteor(Java):
    """METEOR 1.5 for English."""

    def __init__(self) -> None:
        command = (f"-Xmx{heap()}m", "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
        super().__init__(package_folder("meteor"), *command)

    def statistics(self, caption: str, references: Sequence[str]) -> list[float]:
        """What METEOR counts in one caption against its references, all tokenized. The counts of several add up."""
        told = " ||| ".join(("SCORE", *map(unbarred, references), unbarred(caption)))
        return [float(number) for number in self._ask(told)[0].split()]

    def scores(self, statistics: Sequence[Sequence[float]]) -> list[float]:
        """The score of each set of counts, between 0 and 1."""
        if not statistics:
            return []
        told = " ||| ".join(("EVAL", *(" ".join(map(str, each)) for each in statistics)))
        return [float(answer) for answer in self._ask(told, len(statistics) + 1)[:-1]]  # the last is of them together

    def _ask(self, told: str, answers: int = 1) -> list[str]:
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        lines = []
        try:
            process.stdin.write(f"{told}\n".encode())
            process.stdin.flush()
            lines = [process.stdout.readline() for _ in range(answers)]
        except OSError:
            pass  # it has ended, and says below why
        if not all(lines) or len(lines) < answers:
            process.wait()
            words = last_words(self.errors.fileno())
            raise CapcliError(f"METEOR failed at {told[-60:]!r}: {words}. --without-java leaves it out")
        return [line.decode().strip() for line in lines]


def heap() -> int:
    """MiB that METEOR may take. It takes 1 GB, and for a caption of many thousand words as much as their square."""
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    except (AttributeError, OSError, ValueError):  # not told on Windows
        there = 0
    return max(2048, there // 2)


def unbarred(text: str) -> str:
    """Without the sign that METEOR takes for the end of a text."""
    return text.replace("|||", "").replace("  ", " ")


def end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, errors):
        if stream is not None:
            with contextlib.suppress(OSError):  # what it did not read
                stream.close()


def last_words(errors: int) -> str:
    """The first line on standard error that tells something."""
    os.lseek(errors, 0, os.SEEK_SET)
    lines = os.read(errors, 1 << 16).decode("utf-8", "replace").splitlines()
    telling = [line.strip() for line in lines if "Error" in line or "Exception" in line] or [
        x for x in lines if x.strip()
    ]
    return telling[0][:300] if telling else "it said nothing"

"""history.csv: one row per reported step of a training run, never partially written."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from capcli.errors import CapcliError
from capcli.progress import warn as print_warning
from capcli.storage import atomic
from capcli.text import printable

CSV = "history.csv"
NUMBERS = ("loss", "val_loss", "learning_rate", "grad_norm", "images_per_second")
SCORES = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L")


@dataclass(frozen=True, slots=True)
class Point:
    """The figures of an optimizer step; None where there is none. `scores` of generated captions are by name."""

    step: int
    epoch: float
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    images_per_second: float | None = None
    val_loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    def merged(self, later: Point) -> Point:
        """This point with the figures of `later`, which replace its own."""
        known = {name: value for name in NUMBERS if (value := getattr(later, name)) is not None}
        return replace(self, epoch=later.epoch, scores={**self.scores, **later.scores}, **known)


class History:
    """The points of a run and their file `folder`/history.csv.

    The constructor replaces the file with exactly `points`: for a resumed run those up to its checkpoint. It raises
    CapcliError when the file cannot be written. `add` never raises for that: each different problem is passed to `warn` once.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        points: Iterable[Point] = (),
        *,
        warn: Callable[[str], None] = print_warning,
    ) -> None:
        self._path, self._warn = os.path.join(folder, CSV), warn
        self._points: dict[int, Point] = {}
        for point in sorted(points, key=lambda point: point.step):
            self._points[point.step] = self._merged(point)
        self._extra: list[str] = []  # scores that are not in SCORES: columns at the end
        self._warnings: set[str] = set()
        self._last = self._end = 0  # byte offsets at which the last row begins and ends
        try:
            os.makedirs(folder, exist_ok=True)
            self._rewrite()
        except OSError as error:
            reason = error.strerror or error
            raise CapcliError(f"{printable(self._path)} cannot be written: {reason}; choose another --out") from error

    @property
    def points(self) -> list[Point]:
        """All points, sorted by step."""
        return list(self._points.values())

    def add(self, point: Point) -> None:
        """Writes a point to the file. A second point of a step is merged into the row of that step."""
        last = next(reversed(self._points), None)
        latest = last is None or point.step >= last
        merging = point.step in self._points
        self._points[point.step] = self._merged(point)
        if not latest and not merging:
            self._points = dict(sorted(self._points.items()))
        try:
            if not latest or self._new_scores([point]) or not self._wrote_last(self._points[point.step], merging):
                self._rewrite()
        except OSError as error:
            self._end = -1  # so the next point rewrites the file
            self._warn_once(
                f"{printable(self._path)} cannot be written ({error.strerror or error}); training continues"
            )

    def _merged(self, point: Point) -> Point:
        known = self._points.get(point.step)
        return point if known is None else known.merged(point)

    def _wrote_last(self, point: Point, merging: bool) -> bool:
        """Writes the last row in one call, over the row that it replaces; False when the file must be rewritten."""
        row = _row(point, self._extra)
        start = self._last if merging else self._end
        if start + len(row) < self._end:
            return False  # the end of the old, longer row would remain behind it
        try:
            descriptor = os.open(self._path, os.O_WRONLY)
        except FileNotFoundError:
            return False
        try:
            if os.fstat(descriptor).st_size != self._end:
                return False
            os.lseek(descriptor, start, os.SEEK_SET)
            if os.write(descriptor, row) < len(row):
                return False
        finally:
            os.close(descriptor)
        self._last, self._end = start, start + len(row)
        return True

    def _rewrite(self) -> None:
        points = self._points.values()
        self._extra += self._new_scores(points)
        last = len(_row(next(reversed(points)), self._extra)) if points else 0
        size = 0

        def chunks() -> Iterator[bytes]:
            nonlocal size
            for chunk in (_line(columns(self._extra)), *(_row(point, self._extra) for point in points)):
                size += len(chunk)
                yield chunk

        atomic.replace(self._path, chunks())
        self._last, self._end = size - last, size

    def _new_scores(self, points: Iterable[Point]) -> list[str]:
        names = dict.fromkeys(name for point in points for name in point.scores)
        return [name for name in names if name not in SCORES and name not in self._extra]

    def _warn_once(self, warning: str) -> None:
        if warning not in self._warnings:
            self._warnings.add(warning)
            self._warn(warning)


def read_history(path: str | os.PathLike[str]) -> list[Point]:
    """The points of a history.csv; none when the file does not exist.

    An incomplete last line, as a full disk or a kill leaves it, is ignored. Raises CapcliError for any other file.
    """
    shown = printable(os.fspath(path))
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise CapcliError(f"{shown} cannot be read: {error}") from error
    whole = text[: text.rfind("\n") + 1]
    rows = csv.reader(io.StringIO(whole))
    header = next(rows, [])
    if header[:2] != ["step", "epoch"] or len(set(header)) < len(header):
        raise CapcliError(
            f"{shown} is not the history of a training run (line 1 does not begin with step,epoch): remove it"
        )
    points, lines = [], whole.count("\n")
    for row in rows:
        try:
            points.append(_point(header, row))
        except ValueError as error:
            if rows.line_num < lines:
                message = f"{shown}, line {rows.line_num}: {error}; correct the line or remove the file"
                raise CapcliError(message) from error
    return points


def columns(extra: Sequence[str] = ()) -> list[str]:
    """The names of history.csv's columns."""
    return ["step", "epoch", *NUMBERS, *SCORES, *extra]


def _row(point: Point, extra: Sequence[str]) -> bytes:
    numbers = [getattr(point, name) for name in NUMBERS]
    scores = [point.scores.get(name) for name in (*SCORES, *extra)]
    # float() because the repr of NumPy's and torch's numbers is different.
    cells = ["" if x is None else repr(float(x)) for x in (point.epoch, *numbers, *scores)]
    return _line([str(int(point.step)), *cells])


def _line(cells: Sequence[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue().encode("utf-8", "backslashreplace")


def _point(header: Sequence[str], row: Sequence[str]) -> Point:
    if len(row) != len(header):
        raise ValueError(f"{len(row)} cells where the first line has {len(header)}")
    cells = dict(zip(header, row, strict=True))
    step, epoch = int(cells.pop("step")), float(cells.pop("epoch"))
    known = {name: float(cell) for name, cell in cells.items() if cell}
    numbers = {name: known.pop(name) for name in NUMBERS if name in known}
    return Point(step, epoch, scores=known, **numbers)

"""What a training run knows at each step: points, kept whole in history.csv and drawn as curves.png."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from capcli.errors import CapcliError
from capcli.progress import warn as tell
from capcli.storage import atomic
from capcli.text import printable

CSV, PNG = "history.csv", "curves.png"
NUMBERS = ("loss", "val_loss", "learning_rate", "grad_norm", "images_per_second")
SCORES = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L")


@dataclass(frozen=True, slots=True)
class Point:
    """What is known at an optimizer step; None where nothing is. `scores` are of generated captions, by name."""

    step: int
    epoch: float
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    images_per_second: float | None = None
    val_loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    def with_news(self, other: Point) -> Point:
        """This point, and whatever `other`, of the same step, knows; the news wins."""
        known = {name: value for name in NUMBERS if (value := getattr(other, name)) is not None}
        return replace(self, epoch=other.epoch, scores={**self.scores, **other.scores}, **known)


class History:
    """The points of a run, in `folder`/history.csv.

    The file is anew exactly `points`, of which a resumed run gives those up to its checkpoint. Raises CapcliError when
    it cannot be written. Later nothing here ends a training run: what goes wrong is told to `warn`, once.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        points: Iterable[Point] = (),
        *,
        warn: Callable[[str], None] = tell,
    ) -> None:
        self._folder, self._warn = os.fspath(folder), warn
        self._path = os.path.join(self._folder, CSV)
        self._points: dict[int, Point] = {}
        for point in sorted(points, key=lambda point: point.step):
            self._points[point.step] = self._merged(point)
        self._extra: list[str] = []  # scores beyond the usual ones, as columns at the end
        self._told: set[str] = set()
        self._drawn = False  # as it stands
        self._last = self._end = 0  # where the last row begins and ends
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._rewrite()
        except OSError as error:
            reason = error.strerror or error
            raise CapcliError(f"{printable(self._path)} cannot be written: {reason}; choose another --out") from error

    @property
    def points(self) -> list[Point]:
        """All points in the order of their steps."""
        return list(self._points.values())

    def add(self, point: Point) -> None:
        """Put a point on disk. One of a step already there adds to its row."""
        self._drawn = False
        last = next(reversed(self._points), None)
        latest = last is None or point.step >= last
        merging = point.step in self._points
        self._points[point.step] = self._merged(point)
        if not latest and not merging:
            self._points = dict(sorted(self._points.items()))
        try:
            if not latest or self._unknown([point]) or not self._written(self._points[point.step], merging):
                self._rewrite()
        except OSError as error:
            self._end = -1  # whatever is there now, the next point writes all of it again
            self._once(f"{printable(self._path)} cannot be written ({error.strerror or error}); training goes on")

    def draw(self) -> None:
        """Draw curves.png; nothing while there is nothing to draw, or nothing new. Never raises: what fails becomes a warning."""
        if self._drawn:
            return
        try:
            from capcli.training.output.curves import draw

            image = draw(self.points)
            if image:
                atomic.replace(os.path.join(self._folder, PNG), [image])
            self._drawn = True
        except ImportError:
            self._once(f"{PNG} is not drawn, matplotlib is missing: pip install 'capcli[train]'")
        except Exception as error:  # a picture is not worth a run
            self._once(f"{PNG} is not drawn: {type(error).__name__}: {printable(str(error))}")

    def _merged(self, point: Point) -> Point:
        known = self._points.get(point.step)
        return point if known is None else known.with_news(point)

    def _written(self, point: Point, merging: bool) -> bool:
        """Write the last row in one call, over the row it takes the place of; False when the file wants writing anew."""
        row = _row(point, self._extra)
        start = self._last if merging else self._end
        if start + len(row) < self._end:
            return False  # the end of the old row would stick out for an instant
        try:
            file = os.open(self._path, os.O_WRONLY)
        except FileNotFoundError:
            return False
        try:
            if os.fstat(file).st_size != self._end:
                return False
            os.lseek(file, start, os.SEEK_SET)
            if os.write(file, row) < len(row):
                return False
        finally:
            os.close(file)
        self._last, self._end = start, start + len(row)
        return True

    def _rewrite(self) -> None:
        points = self._points.values()
        self._extra += self._unknown(points)
        last = len(_row(next(reversed(points)), self._extra)) if points else 0
        size = 0

        def chunks() -> Iterator[bytes]:
            nonlocal size
            for chunk in (_line(columns(self._extra)), *(_row(point, self._extra) for point in points)):
                size += len(chunk)
                yield chunk

        atomic.replace(self._path, chunks())
        self._last, self._end = size - last, size

    def _unknown(self, points: Iterable[Point]) -> list[str]:
        names = dict.fromkeys(name for point in points for name in point.scores)
        return [name for name in names if name not in SCORES and name not in self._extra]

    def _once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._warn(line)


def read_history(path: str | os.PathLike[str]) -> list[Point]:
    """The points of a history.csv; none where there is no such file.

    A last line that is not whole, as a full disk or a kill leaves it, is no point. Raises CapcliError for a file that is
    no history.
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
        raise CapcliError(f"{shown} is no history of a training run: its first line is not step,epoch,...; remove it")
    points, lines = [], whole.count("\n")
    for row in rows:
        try:
            points.append(_point(header, row))
        except ValueError as error:
            if rows.line_num < lines:
                wrong = f"{shown}, line {rows.line_num}: {error}; mend the line or remove the file"
                raise CapcliError(wrong) from error
    return points


def columns(extra: Sequence[str] = ()) -> list[str]:
    """The names of history.csv's columns."""
    return ["step", "epoch", *NUMBERS, *SCORES, *extra]


def _row(point: Point, extra: Sequence[str]) -> bytes:
    numbers = [getattr(point, name) for name in NUMBERS]
    scores = [point.scores.get(name) for name in (*SCORES, *extra)]
    # float() first: NumPy's and torch's numbers have a repr of their own.
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

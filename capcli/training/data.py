"""The images and captions of a run: read, looked at once, and from then on the same until it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from capcli.annotations import DataReport, check_images, read_split
from capcli.errors import CapcliError
from capcli.options import TrainOptions
from capcli.progress import Progress
from capcli.records import Annotated
from capcli.training.place import LEFT_OUT, Place, digest


@dataclass(frozen=True)
class Data:
    """What a run learns from and is held against; `report` says what was left out."""

    train: list[Annotated]
    val: list[Annotated]
    report: DataReport


@dataclass(slots=True)
class Looked:
    """How many images were looked at so far."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        return self.done / max(time.monotonic() - self.began, 1e-9)


def read_data(options: TrainOptions, place: Place, arguments: Any) -> Data:
    """The split, without images that cannot be used. The first process looks at every image; the others, and a run that goes
    on, take its word, so that all of them learn from the same.

    Raises CapcliError for an empty or broken set, and where a run that goes on finds other data than it began with.
    """
    with arguments.main_process_first(local=False):
        split = read_split(options.data)
        if arguments.process_index == 0 and place.checkpoint is None:
            return _looked_at(options, place, Data(split.train, split.val, split.report))
    known = place.recall()
    broken = set(known["broken"])
    data = Data(_without(split.train, broken), _without(split.val, broken), split.report)
    if [digest(data.train), digest(data.val)] != known["data"]:
        raise CapcliError(
            f"the data is no longer what {place.folder} was begun with: {known['images']} images then to train on and "
            f"{known['val_images']} to validate, {len(data.train)} and {len(data.val)} now, or other captions. Bring it "
            "back, or begin another run from the model with --model"
        )
    return data


def _looked_at(options: TrainOptions, place: Place, data: Data) -> Data:
    looked = Looked()
    count = len(data.train) + len(data.val)
    with Progress(looked, shown=not options.quiet, total=lambda: count, task="looking at the images") as bar:

        def progress(done: int, _total: int) -> None:
            looked.done = done
            bar.update()

        good = check_images(
            [*data.train, *data.val],
            data.report,
            workers=options.workers,
            max_pixels=options.max_pixels,
            timeout=options.decode_timeout,
            progress=progress,
        )
    kept = {id(each) for each in good}
    broken = sorted({each.name for each in (*data.train, *data.val) if id(each) not in kept})
    data = Data([x for x in data.train if id(x) in kept], [x for x in data.val if id(x) in kept], data.report)
    if not data.train:
        raise CapcliError(f"no image is left to train on: {data.report.line()}")
    data.report.write(place.path(LEFT_OUT))
    place.remember(
        broken=broken, data=[digest(data.train), digest(data.val)], images=len(data.train), val_images=len(data.val)
    )
    return data


def _without(annotated: Sequence[Annotated], names: set[str]) -> list[Annotated]:
    return [each for each in annotated if each.name not in names]

"""The images and captions of a run: read, looked at once, and from then on the same until it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import broadcast_object_list

from capcli.annotations import DataReport, Split, check_images, read_split
from capcli.errors import CapcliError, UsageError
from capcli.options import TrainOptions
from capcli.progress import Progress
from capcli.records import Annotated, Failure
from capcli.text import counted
from capcli.training.output.folder import LEFT_OUT, RunFolder, digest, sources

Facts = dict[str, Any]  # for run.json
Part = tuple[list[Annotated], list[Annotated]]


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is held against; `report` says what was left out.

    `parts` are the same by where they come from, in the order of `place.sources`: each what to learn from, and what validates.
    """

    train: list[Annotated]
    val: list[Annotated]
    report: DataReport
    parts: Sequence[Part] = ()

    @classmethod
    def of(cls, parts: Sequence[Part], report: DataReport) -> TrainingData:
        train, val = ([image for part in parts for image in part[which]] for which in (0, 1))
        return cls(train, val, report, parts)

    def only(self, kept: Container[int]) -> TrainingData:
        """The images whose `id` is among `kept`."""
        parts = [
            ([image for image in train if id(image) in kept], [image for image in val if id(image) in kept])
            for train, val in self.parts
        ]
        return TrainingData.of(parts, self.report)


@dataclass(slots=True)
class CheckedImages:
    """How many images were looked at so far."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        return self.done / max(time.monotonic() - self.began, 1e-9)


def read_data(options: TrainOptions, place: RunFolder, arguments: Any) -> tuple[TrainingData, Facts]:
    """The split, without images that cannot be used, and what a run that goes on needs to know of that. The first process
    looks at every image; the others, and a run that goes on, take its word, so that all of them learn from the same.

    Raises CapcliError for an empty or broken set, and where a run that goes on finds other data than it began with.
    """
    with arguments.main_process_first(local=False):
        data = _together([read_split(each) for each in sources(options)])
    if place.checkpoint is None:
        looked = _looked_at(options, data) if arguments.process_index == 0 else None
        if looked is not None:
            broadcast_object_list([looked[1]])
            return looked
        [known] = broadcast_object_list([None])
    else:
        known = place.recall()
    data = _without(set(known["broken"]), data)
    data.report.failures.extend(Failure(*each) for each in known["left_out"])
    if [digest(data.train), digest(data.val)] != known["data"]:
        then, now = (known["images"], known["val_images"]), (len(data.train), len(data.val))
        change = (
            "captions or names of images are others"
            if then == now
            else f"{counted(then[0], 'image')} then to train on and {then[1]} to validate, {now[0]} and {now[1]} now"
        )
        raise CapcliError(
            f"the data is no longer what {place.folder} was begun with: {change}. Bring it back, or begin another run "
            "from the model with --model"
        )
    return data, known


def _together(splits: Sequence[Split]) -> TrainingData:
    """Several splits as one: what validates in one of them is learnt from in none."""
    if len(splits) == 1:
        [split] = splits
        return TrainingData.of([(split.train, split.val)], split.report)
    report = DataReport()
    for each in splits:
        report.failures += each.report.failures
        report.notes += each.report.notes
    held_out = {image.image for split in splits for image in split.val}
    parts = [([image for image in split.train if image.image not in held_out], split.val) for split in splits]
    data = TrainingData.of(parts, report)
    report.count(data.train)
    report.count(data.val)
    return data


def _looked_at(options: TrainOptions, data: TrainingData) -> tuple[TrainingData, Facts]:
    looked = CheckedImages()
    count, before = len(data.train) + len(data.val), len(data.report.failures)
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
    broken = [number for number, each in enumerate((*data.train, *data.val)) if id(each) not in kept]
    told = [[each.name, each.error, each.message] for each in data.report.failures[before:]]
    data = data.only(kept)
    if not data.train:
        raise CapcliError(f"no image is left to train on: {data.report.line()}")
    return data, {
        "broken": broken,
        "left_out": told,
        "data": [digest(data.train), digest(data.val)],
        "images": len(data.train),
        "val_images": len(data.val),
    }


def _without(broken: set[int], data: TrainingData) -> TrainingData:
    """The data without images that were found broken before; names would not do, for two folders may share them."""
    every = [*data.train, *data.val]
    data.report.count((every[number] for number in broken if number < len(every)), -1)
    return data.only({id(each) for number, each in enumerate(every) if number not in broken})


def refuse_unvalidated(options: TrainOptions, data: TrainingData) -> None:
    """Raises UsageError where something goes by validation and nothing validates."""
    if data.val:
        return
    plateau = options.schedule == "reduce_lr_on_plateau"
    for name, given in (("patience", options.patience is not None), ("schedule reduce_lr_on_plateau", plateau)):
        if given:
            raise UsageError(f"{name} goes by validation, and nothing validates: give {validating(options)}")


def validating(options: TrainOptions) -> str:
    """What to give so that something validates."""
    return "a [[task]] val_fraction or val_data" if options.task else "--val-fraction or --val-data"


class Lost:
    """Images that broke while a run went on, each told once and listed with those left out before."""

    def __init__(self, place: RunFolder, report: DataReport, say: Callable[[str], None]) -> None:
        self._path, self._report, self._say = place.path(LEFT_OUT), report, say
        known = place.recall().get("lost", [])
        self._place, self._names = place, {each[0] for each in known}
        report.failures.extend(Failure(*each) for each in known)

    def __call__(self, failure: Failure) -> None:
        if failure.name in self._names:
            return
        self._names.add(failure.name)
        self._report.failures.append(failure)
        self._say(f"{failure.name} can no longer be loaded, and teaches nothing: {failure.message}")
        self._report.write(self._path)
        lost = [*self._place.recall().get("lost", []), [failure.name, failure.error, failure.message]]
        self._place.remember(lost=lost)

"""The images and captions of a training run: read and checked once, then unchanged until the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import broadcast_object_list

from capcli.annotations import DataReport, Split, check_images, read_split
from capcli.errors import CapcliError, UsageError
from capcli.options import TrainOptions
from capcli.progress import OneStage, Progress
from capcli.records import Annotated, Failure
from capcli.text import counted
from capcli.training.output.folder import LEFT_OUT, RunFolder, digest, sources

Facts = dict[str, Any]  # for run.json
Part = tuple[list[Annotated], list[Annotated]]  # training and validation images of one source


@dataclass(frozen=True)
class TrainingData:
    """The images to train on and to validate on; `report` lists those left out.

    `parts` holds the same images by source, in the order of `output.folder.sources`.
    """

    train: list[Annotated]
    val: list[Annotated]
    report: DataReport
    parts: Sequence[Part] = ()

    @classmethod
    def of(cls, parts: Sequence[Part], report: DataReport) -> TrainingData:
        train = [image for part, _ in parts for image in part]
        val = [image for _, part in parts for image in part]
        return cls(train, val, report, parts)

    def only(self, kept: Container[int]) -> TrainingData:
        """The images whose `id()` is in `kept`."""
        parts = [
            ([image for image in train if id(image) in kept], [image for image in val if id(image) in kept])
            for train, val in self.parts
        ]
        return TrainingData.of(parts, self.report)


@dataclass(slots=True)
class CheckedImages:
    """Counts for the progress bar of the check."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.done / max(time.monotonic() - self.began, 1e-9)


def read_data(options: TrainOptions, place: RunFolder, arguments: Any) -> tuple[TrainingData, Facts]:
    """The data without images that cannot be used, and the facts about it that a resumed run needs.

    Only the first process decodes every image, and only when a run starts; the other processes and a resumed run reuse
    its result, so that all of them train on the same images. Raises CapcliError for an empty or unreadable set, and when a
    resumed run finds other data than the run started with.
    """
    with arguments.main_process_first(local=False):
        data = _combine([read_split(source) for source in sources(options)])
    if place.checkpoint is None:
        checked = _check(options, data) if arguments.process_index == 0 else None
        if checked is not None:
            broadcast_object_list([checked[1]])
            return checked
        [facts] = broadcast_object_list([None])
    else:
        facts = place.facts()
    data = _without(set(facts["broken"]), data)
    data.report.failures.extend(Failure(*values) for values in facts["left_out"])
    if [digest(data.train), digest(data.val)] != facts["data"]:
        then, now = (facts["images"], facts["val_images"]), (len(data.train), len(data.val))
        change = (
            "captions or image names differ"
            if then == now
            else f"{counted(then[0], 'image')} then to train on and {then[1]} to validate, {now[0]} and {now[1]} now"
        )
        raise CapcliError(
            f"the data has changed since {place.folder} was started: {change}. Restore it, or start another run from the "
            "model with --model"
        )
    return data, facts


def _combine(splits: Sequence[Split]) -> TrainingData:
    """Several splits as one: a validation image of any of them is a training image of none."""
    if len(splits) == 1:
        [split] = splits
        return TrainingData.of([(split.train, split.val)], split.report)
    report = DataReport()
    for split in splits:
        report.failures += split.report.failures
        report.notes += split.report.notes
    held_out = {image.image for split in splits for image in split.val}
    parts = [([image for image in split.train if image.image not in held_out], split.val) for split in splits]
    data = TrainingData.of(parts, report)
    report.count(data.train)
    report.count(data.val)
    return data


def _check(options: TrainOptions, data: TrainingData) -> tuple[TrainingData, Facts]:
    """The data without images that cannot be decoded, and the facts for run.json."""
    checked = CheckedImages()
    images = [*data.train, *data.val]
    failures_before = len(data.report.failures)
    with Progress(
        checked, shown=not options.quiet, total=lambda: len(images), work=OneStage("checking the images")
    ) as bar:

        def progress(done: int, _total: int) -> None:
            checked.done = done
            bar.update()

        good = check_images(
            images,
            data.report,
            workers=options.workers,
            max_pixels=options.max_pixels,
            timeout=options.decode_timeout,
            progress=progress,
        )
    kept = {id(image) for image in good}
    broken = [number for number, image in enumerate(images) if id(image) not in kept]
    left_out = [[failure.name, failure.error, failure.message] for failure in data.report.failures[failures_before:]]
    data = data.only(kept)
    if not data.train:
        raise CapcliError(f"no image is left to train on: {data.report.line()}")
    return data, {
        "broken": broken,
        "left_out": left_out,
        "data": [digest(data.train), digest(data.val)],
        "images": len(data.train),
        "val_images": len(data.val),
    }


def _without(broken: set[int], data: TrainingData) -> TrainingData:
    """The data without the images of these numbers; two folders may share a name, so names do not identify an image."""
    images = [*data.train, *data.val]
    data.report.count((images[number] for number in broken if number < len(images)), -1)
    return data.only({id(image) for number, image in enumerate(images) if number not in broken})


def refuse_unvalidated(options: TrainOptions, data: TrainingData) -> None:
    """Raises UsageError where a setting depends on validation and there are no validation images."""
    if data.val:
        return
    plateau = options.schedule == "reduce_lr_on_plateau"
    for name, given in (("patience", options.patience is not None), ("schedule reduce_lr_on_plateau", plateau)):
        if given:
            raise UsageError(
                f"{name} needs validation, and there are no validation images: give {validation_flags(options)}"
            )


def validation_flags(options: TrainOptions) -> str:
    """The settings that add validation images, for messages."""
    return "a [[task]] val_fraction or val_data" if options.task else "--val-fraction or --val-data"


class LostImages:
    """Called with each image that failed to load during training: reports it once and adds it to the images left out."""

    def __init__(self, place: RunFolder, report: DataReport, say: Callable[[str], None]) -> None:
        self._path, self._report, self._say = place.path(LEFT_OUT), report, say
        lost = place.facts().get("lost", [])
        self._place, self._names = place, {values[0] for values in lost}
        report.failures.extend(Failure(*values) for values in lost)

    def __call__(self, failure: Failure) -> None:
        if failure.name in self._names:
            return
        self._names.add(failure.name)
        self._report.failures.append(failure)
        self._say(f"{failure.name} can no longer be loaded and is left out: {failure.message}")
        self._report.write(self._path)
        lost = [*self._place.facts().get("lost", []), [failure.name, failure.error, failure.message]]
        self._place.add_facts(lost=lost)

"""The main function of `capcli evaluate`: files -> captions of images with references -> scores -> a table, JSON, CSV."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace

from capcli.errors import CapcliError, UsageError
from capcli.interrupts import terminable
from capcli.metrics import bootstrap, java, output, tokenization
from capcli.metrics.caption_files import (
    Captions,
    NamedColumns,
    References,
    names_by_number,
    read_captions,
    read_references,
)
from capcli.metrics.diversity import diversity
from capcli.metrics.matching import match
from capcli.metrics.results import MEASURES, Difference, FileScores, Matched, Result
from capcli.metrics.scorer import Scorer
from capcli.options import EvaluateOptions
from capcli.progress import warn
from capcli.text import brief, printable


def run(options: EvaluateOptions) -> int:
    """Measure captions and print the scores; returns the exit code. Raises CapcliError; UsageError for wrong options."""
    check(options)
    with terminable(), contextlib.ExitStack() as closing:
        # METEOR loads its paraphrases for seconds while the files are read.
        meteor = None if options.without_java else closing.enter_context(java.Meteor())
        result = evaluate(options, meteor)
    output.write(result, options)
    return 0


def check(options: EvaluateOptions) -> None:
    """Raises the errors that can be detected before anything is read."""
    for part in ("bleu", *(() if options.without_java else ("tokenizer", "meteor"))):
        java.package_folder(part)
    for path in (*options.captions, *options.references):
        if path != "-" and not os.path.exists(path):
            raise UsageError(f"{printable(path)}: no such file or folder")
    if "-" in options.references:
        raise UsageError("references are read from files, not from standard input")
    if options.per_image is not None:
        check_output(options.per_image, (*options.captions, *options.references))
    if not options.without_java:
        java.java()


def check_output(path: str, inputs: Sequence[str]) -> None:
    """Raises UsageError where the CSV cannot be written to `path`, or `path` is an input."""
    shown = f"--per-image {printable(path)}"
    if not os.path.isdir(os.path.dirname(path) or os.curdir):
        raise UsageError(f"{shown}: there is no such folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{shown} is not a regular file: name another")
    if os.path.exists(path) and any(each != "-" and os.path.samefile(path, each) for each in inputs):
        raise UsageError(f"{shown} is an input and would be overwritten: name another file")


def evaluate(options: EvaluateOptions, meteor: java.Meteor | None) -> Result:
    columns = {name: getattr(options, name) for name in ("image_column", "caption_column")}
    named = NamedColumns({name: column for name, column in columns.items() if column is not None})
    references = read_references(options.references, named, options.split)
    captions = [read_captions(path, named) for path in options.captions]
    named.check()
    matched = [matched_captions(each, references) for each in captions]
    if len(matched) > 1:
        matched = on_the_same_images(matched)
    for each in matched:
        warn_of_failures(each)

    tokenize = options.tokenize or tokenization.choose_tokenizer(
        text for texts in references.texts.values() for text in texts
    )
    if tokenize == "characters" and options.tokenize is None:
        warn(
            "the references are in a script without spaces, so characters are compared (--tokenize ptb compares words); "
            "METEOR supports English only"
        )
    if len(matched[0].texts) == 1:
        warn("one image: CIDEr is 0, because it weights n-grams by inverse document frequency")
    wanted = {name: references.texts[name] for each in matched for name in each.texts}
    by_java = meteor is not None and tokenize == "ptb"
    scorer = Scorer(wanted, tokenize, tokenize_all=java.tokenize if by_java else None)
    measured = [measure(each, scorer, meteor) for each in matched]
    result = Result(
        measured,
        tokenize,
        tokenize if tokenize == "characters" else "PTB" if by_java else "PTB in Python",
        options.resamples if options.bootstrap else None,
        options.seed,
    )
    return compared(result, meteor)


def matched_captions(captions: Captions, references: References) -> Matched:
    """The captions of images that have references; raises CapcliError with an example of both names if there are none."""
    known: dict[str, str] = {}  # COCO's numbers that the references resolve
    if captions.numbered:
        numbers = names_by_number(references.paths)
        known = {name: numbers[name] for name in captions.texts if numbers.get(name) in references.texts}
    taken = set(known.values())
    found = known | match(
        (name for name in captions.texts if name not in known),
        (name for name in references.texts if name not in taken),
    )
    if not found:
        raise CapcliError(
            f"no image in {printable(captions.path)} has references: its names are like "
            f"{brief(next(iter(captions.texts)))}, the references' like {brief(next(iter(references.texts)))}"
        )
    if captions.several:
        warn(
            f"{printable(captions.path)}: images with several captions, of which only the first is scored: {captions.several:,}"
        )
    file_names = {reference: name for name, reference in found.items()}
    return Matched(
        captions.path,
        {reference: captions.texts[name] for name, reference in found.items()},
        file_names,
        len(captions.texts) - len(found),
        len(references.texts) - len(found),
        len(match(captions.failed, (name for name in references.texts if name not in file_names))),
    )


def on_the_same_images(matched: Sequence[Matched]) -> list[Matched]:
    """Only the images that all files have captions of, in the order of the first file."""
    names = [name for name in matched[0].texts if all(name in each.texts for each in matched)]
    if not names:
        raise CapcliError(
            f"{', '.join(printable(each.path) for each in matched)}: there is no image of which all have a caption"
        )
    for each in matched:
        if len(each.texts) > len(names):
            left_out = len(each.texts) - len(names)
            why = "the other file has no caption" if len(matched) == 2 else "not all files have a caption"
            warn(f"{printable(each.path)}: images left out because {why} of them: {left_out:,}")
    return [replace(each, texts={name: each.texts[name] for name in names}) for each in matched]


def warn_of_failures(matched: Matched) -> None:
    """A warning where images are left out because the captioner failed: the captions of a part of the images are no fault."""
    if matched.failed:
        warn(
            f"{printable(matched.path)}: images with references that could not be captioned: {matched.failed:,} (left out; "
            "the scores are too high, as these images are likely the difficult ones)"
        )


def measure(matched: Matched, scorer: Scorer, meteor: java.Meteor | None) -> FileScores:
    scores = scorer.measure(matched.texts, meteor)
    figures = {name: scores.corpus[name] for name in MEASURES if name in scores.corpus}
    return FileScores(matched, scores, figures | diversity(list(scores.tokens.values())))


def compared(result: Result, meteor: java.Meteor | None) -> Result:
    """The result with the differences to the first file, and with intervals if wanted."""
    measured = list(result.measured)
    first = measured[0].figures
    differences = [Difference({name: each.figures[name] - first[name] for name in first}) for each in measured[1:]]
    if result.resamples is not None:
        drawn = bootstrap.resample([each.scores for each in measured], meteor, result.resamples, result.seed)
        measured = [
            replace(each, intervals=bootstrap.intervals(values)) for each, values in zip(measured, drawn, strict=True)
        ]
        differences = [
            replace(each, intervals=bootstrap.intervals({name: values[name] - drawn[0][name] for name in values}))
            for each, values in zip(differences, drawn[1:], strict=True)
        ]
    return replace(result, measured=measured, differences=differences)

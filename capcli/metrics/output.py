"""What `capcli evaluate` writes: a table or JSON on standard output, and a CSV with a row for each image."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from capcli.errors import CapcliError
from capcli.metrics.bootstrap import Interval
from capcli.metrics.results import MEASURES, FileScores, Matched, Result
from capcli.options import EvaluateOptions
from capcli.sinks.row_formats import csv_line
from capcli.storage import atomic
from capcli.text import as_text, counted, is_text, printable, raw_bytes

TITLES = {
    "Bleu_1": "BLEU-1",
    "Bleu_2": "BLEU-2",
    "Bleu_3": "BLEU-3",
    "Bleu_4": "BLEU-4",
    "ROUGE_L": "ROUGE-L",
    "words_mean": "words per caption",
    "words_min": "fewest words",
    "words_max": "most words",
    "distinct_captions": "distinct captions",
    "distinct_share": "distinct share",
    "repeated_2": "repeat a 2-gram",
    "repeated_3": "repeat a 3-gram",
    "repeated_4": "repeat a 4-gram",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
}
INTEGERS = ("words_min", "words_max", "distinct_captions")


def write(result: Result, options: EvaluateOptions) -> None:
    """Write the outputs that the options select; raises CapcliError where it cannot be written."""
    if options.per_image is not None:
        try:
            atomic.replace(os.path.realpath(options.per_image), [per_image(result)])
        except OSError as error:
            raise CapcliError(f"cannot write {printable(options.per_image)}: {error.strerror or error}") from error
    try:
        if options.json:
            print(json.dumps(document(result), indent=2))
        else:
            table(result)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # the reader has closed the pipe: not an error
    except OSError as error:
        raise CapcliError(f"cannot write to standard output: {error.strerror or error}") from error


def document(result: Result) -> dict[str, Any]:
    """One file's figures by name and the settings.

    For two files `first`, `second` and their `difference`; for more `files` and their `differences` to the first.
    """
    settings: dict[str, Any] = {"images": len(result.measured[0].scores.names), "tokenizer": result.tokenizer}
    if result.resamples is not None:
        settings["bootstrap"] = {"resamples": result.resamples, "seed": result.seed, "level": 0.95}
    files = list(map(file_figures, result.measured))
    differences = [
        {**each.figures, **({} if each.intervals is None else {"intervals": each.intervals})}
        for each in result.differences
    ]
    if len(files) == 1:
        return files[0] | settings
    if len(files) == 2:
        return {"first": files[0], "second": files[1], "difference": differences[0]} | settings
    return {"files": files, "differences": differences} | settings


def file_figures(measured: FileScores) -> dict[str, Any]:
    matched = measured.matched
    values: dict[str, Any] = dict(measured.figures)
    if measured.intervals is not None:
        values["intervals"] = measured.intervals
    return values | {
        "captions": as_text(matched.path),
        "captions_without_references": matched.captions_without_references,
        "references_without_caption": matched.references_without_caption,
        "failed": matched.failed,
    }


def table(result: Result) -> None:
    """Print a table: a row for each figure, a column for each file, and for two files their difference."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=f"{counted(len(result.measured[0].scores.names), 'image')}, tokens: {result.tokenizer}",
        title_justify="left",
    )
    shown.add_column("")
    columns: list[tuple[str, Mapping[str, float], Mapping[str, Interval] | None]] = [
        (each.matched.path, each.figures, each.intervals) for each in result.measured
    ]
    if len(columns) == 2:
        columns.append(("difference", result.differences[0].figures, result.differences[0].intervals))
    for heading, _, _ in columns:
        shown.add_column(Text(encodable(printable(heading))), justify="right", overflow="fold")
    for name in result.measured[0].figures:
        cells = [
            _cell(name, figures, intervals, signed=number >= len(result.measured), tall=len(columns) > 1)
            for number, (_, figures, intervals) in enumerate(columns)
        ]
        shown.add_row(TITLES.get(name, name), *cells, end_section=name == "CIDEr")
    if result.resamples is not None:
        shown.caption = f"95 % intervals: percentile bootstrap over images, {result.resamples:,} resamples"
    console = Console(soft_wrap=False)
    console.print(shown)
    for each in result.measured:
        for line in omissions(each.matched):
            console.print(Text(encodable(line)), soft_wrap=True)


def encodable(text: str) -> str:
    """The text with escapes for what standard output cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def omissions(matched: Matched) -> Iterator[str]:
    """A line on what is left out of one file, if anything is."""
    counts = {
        "with references and no caption": matched.references_without_caption,
        "with a caption and no references": matched.captions_without_references,
    }
    left_out = [f"{counted(count, 'image')} {what}" for what, count in counts.items() if count]
    if left_out:
        yield f"{printable(matched.path)}: left out {', '.join(left_out)}"


def _cell(
    name: str, figures: Mapping[str, float], intervals: Mapping[str, Interval] | None, *, signed: bool, tall: bool
) -> str:
    sign = "+" if signed else ""
    value = f"{figures[name]:{sign},.0f}" if name in INTEGERS else f"{figures[name]:{sign}.4f}"
    if intervals is None or name not in intervals:
        return value
    low, high = intervals[name]
    between = "\n" if tall else "  "
    return f"{value}{between}{low:{sign}.4f} to {high:{sign}.4f}"


def per_image(result: Result) -> bytes:
    """CSV with `file_name`, `text`, the measures and `words`.

    With two files the second's columns begin with `second_`, and second minus first with `difference_`; of more the columns
    begin with `2_`, `3_`, ..., and `2_difference_`, ... If some names are not UTF-8, a last column `file_name_bytes` has
    their bytes in base64.
    """
    files = result.measured
    names = files[0].scores.names
    file_names = [files[0].matched.file_names[name] for name in names]
    measures = [name for name in MEASURES if name in files[0].scores.per_image]
    numbered = [f"{number}_" for number in range(2, len(files) + 1)]
    others, signs = (
        (["second_"], ["difference_"]) if len(files) == 2 else (numbered, [f"{n}difference_" for n in numbered])
    )
    columns: dict[str, list[Any]] = {"file_name": [as_text(name) for name in file_names]}
    for prefix, file in zip(("", *others), files, strict=True):
        columns[f"{prefix}text"] = [as_text(file.matched.texts[name]) for name in names]
    for prefix, file in zip(("", *others), files, strict=True):
        for measure in measures:
            columns[prefix + measure] = [f"{value:.6f}" for value in file.scores.per_image[measure]]
        columns[f"{prefix}words"] = [len(file.scores.tokens[name].split()) for name in names]
    for prefix, file in zip(signs, files[1:], strict=True):
        for measure in measures:
            values = file.scores.per_image[measure] - files[0].scores.per_image[measure]
            columns[prefix + measure] = [f"{value:.6f}" for value in values]
    if not all(map(is_text, file_names)):
        columns["file_name_bytes"] = ["" if is_text(n) else base64.b64encode(raw_bytes(n)).decode() for n in file_names]
    rows = zip(*columns.values(), strict=True)
    return b"".join([csv_line(columns), *(csv_line(map(str, row)) for row in rows)])

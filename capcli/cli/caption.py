"""`capcli caption`: parse, build CaptionOptions, run the pipeline, exit with its code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click

from capcli.cli.generation import generation_options, taken_generation
from capcli.cli.model import leave_cores_to, model_options
from capcli.cli.sections import AutoOrNumber, SectionedCommand, SectionedOption, comma_separated, set_note
from capcli.options import DECODE_TIMEOUT, MAX_PIXELS, CaptionOptions, SinkOptions, SourceOptions
from capcli.records import FACTS

Decorator = Callable[[Any], Any]


def under(section: str) -> Callable[..., Decorator]:
    return partial(click.option, cls=SectionedOption, section=section, show_envvar=False)


source, generation, model, output, running = map(under, ("Source", "Generation", "Model", "Output", "Running"))


@click.command(cls=SectionedCommand, short_help="Caption images: files, folders, lists, standard input.")
@click.argument("sources", nargs=-1, type=click.Path())
@source(
    "--from-file", metavar="LIST", type=click.Path(), help="Take paths from a file, one per line ('-': standard input)."
)
@source("-0", "--null", is_flag=True, help="Listed paths are separated by NUL, as by find -print0.")
@source("--recursive/--no-recursive", default=True, show_default=True, help="Look into folders below folders.")
@source(
    "--include", metavar="PATTERN", multiple=True, help="In folders take only what matches, e.g. '*.tif'; repeatable."
)
@source(
    "--exclude",
    metavar="PATTERN",
    multiple=True,
    help="In folders leave out what matches, e.g. 'thumbs/**'; repeatable.",
)
@source("--limit", metavar="N", type=click.IntRange(min=0), help="Caption at most N images in this run.")
@source(
    "--max-pixels",
    metavar="N",
    type=click.IntRange(min=1),
    default=MAX_PIXELS,
    show_default=True,
    help="Refuse images of more pixels than this, before they are decoded.",
)
@source(
    "--decode-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=DECODE_TIMEOUT,
    show_default=True,
    help="Give up on an image that takes longer to decode.",
)
@source(
    "--fast-decode", is_flag=True, help="Decode large JPEGs at a part of their size: sooner, and not exactly the same."
)
@source(
    "--gpu-decode",
    is_flag=True,
    help="On CUDA: decode JPEGs there, many at a time, where it is quicker; not exactly the same.",
)
@model_options
@model("--revision", metavar="REV", help="Branch, tag or commit of a model on the hub.")
@generation_options
@generation("--seed", metavar="N", type=int, help="With sampling: other noise; the same seed gives the same captions.")
@generation(
    "--prompt",
    metavar="TEXT",
    help="Words given to the decoder before the caption; to Florence-2 and a T5, the question.",
)
@generation(
    "--tags-field",
    metavar="NAME",
    help="Field of the images' metadata.jsonl or .csv with tags for a captioner that reads them: [dog] [bark].",
)
@generation("--keep-prompt", is_flag=True, help="Leave the prompt in the text.")
@output(
    "-o",
    "--out",
    metavar="PATH|-",
    type=click.Path(allow_dash=True),
    help="Write rows here and go on with what is there. [default: standard output]",
)
@output("--format", type=click.Choice(["jsonl", "csv"]), help="Format of the rows. [default: by the suffix of --out]")
@output("--fields", metavar="A,B,..", callback=comma_separated, help=f"More columns: {', '.join(FACTS)}.")
@output("--sidecar", type=click.Choice([".txt", ".caption"]), help="Write a text file per image too, beside the image.")
@output("--sidecar-dir", metavar="FOLDER", type=click.Path(), help="Where to put the text files, in the same folders.")
@output(
    "--existing",
    type=click.Choice(["skip", "overwrite", "append"]),
    default="skip",
    show_default=True,
    help="What to do about a text file that is there.",
)
@output(
    "--failures", metavar="PATH", type=click.Path(), help="Where to list images that failed. [default: beside --out]"
)
@output(
    "--order",
    type=click.Choice(["source", "done"]),
    default="source",
    show_default=True,
    help="Order of the rows: the source's, or as captions come.",
)
@output("--overwrite", is_flag=True, help="Start --out anew.")
@output("--retry-failed", is_flag=True, help="Try images again that failed in an earlier run.")
@running(
    "--workers",
    type=AutoOrNumber(0),
    default="auto",
    show_default=True,
    help="Processes that decode images; 0 decodes in this one, without --decode-timeout.",
)
@running("--dry-run", is_flag=True, help="List what would be captioned and stop.")
@running("-q", "--quiet", is_flag=True, help="No progress and no closing line.")
@running("--debug", is_flag=True, expose_value=False, callback=set_note, help="Show where an error came from.")
def caption(**given: Any) -> int:
    """Caption SOURCES: image files, folders, quoted glob patterns, or - for paths on standard input.

    \b
      capcli caption ./photos --out captions.jsonl
      find . -name '*.jpg' -print0 | capcli caption -0 - | head

    A rerun with the same --out goes on where the last one ended. What is not given comes from the model's own
    generation settings. Every option can be set in the environment too: CAPCLI_CAPTION_NUM_BEAMS=4.

    \b
    Exit codes: 0 all captioned; 3 finished, with failures on record; 2 wrong usage; 1 could not run;
    130 or 143 interrupted (the same command goes on from there).
    """
    options = caption_options(given)
    leave_cores_to(options.model)
    from capcli.captioning import pipeline

    return pipeline.run(options)


def caption_options(given: dict[str, Any]) -> CaptionOptions:
    """The command's parameters, by name, in the dataclass that each belongs to. Raises UsageError for what cannot be."""

    def taken(kind: type) -> dict[str, Any]:
        return {name: given[name] for name in kind.__dataclass_fields__ if name in given}  # type: ignore[attr-defined]

    unknown = [name for name in given["fields"] if name not in FACTS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)} is none of {', '.join(FACTS)}", param_hint="--fields")
    several = (given["num_return_sequences"] or 1) > 1
    return CaptionOptions(
        source=SourceOptions(**taken(SourceOptions)),
        sink=SinkOptions(candidates=several, **taken(SinkOptions)),
        generation=taken_generation(given),
        **taken(CaptionOptions),
    )

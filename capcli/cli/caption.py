"""`capcli caption`: parses the command line into CaptionOptions and runs the pipeline."""

from __future__ import annotations

from functools import partial
from typing import Any

import click
from click.core import ParameterSource

from capcli.cli.click_options import (
    SectionedCommand,
    TokenIds,
    auto_or_number,
    comma_separated,
    debug_option,
    do_without_broken,
    fields_from,
    option,
    typed_option_in,
)
from capcli.cli.shared_options import (
    generation,
    generation_from,
    generation_options,
    image_limits,
    model,
    model_options,
    quiet_option,
    set_openmp_wait_policy,
    workers_option,
)
from capcli.errors import UsageError
from capcli.imports import UNUSED_BY_CAPTIONING
from capcli.interrupts import terminable
from capcli.options import MAX_IMAGE_EDGE, CaptionOptions, EndpointOptions, SinkOptions, SourceOptions
from capcli.progress import is_shown, stage, warn
from capcli.records import FACTS

source = partial(option, SourceOptions, section="Source")
output = partial(option, SinkOptions, section="Output")
server = partial(option, EndpointOptions, section="Server")


@click.command(cls=SectionedCommand, short_help="Caption images: files, folders, lists, standard input.")
@click.argument("sources", nargs=-1, type=click.Path())
@source(
    "--from-file", metavar="LIST", type=click.Path(), help="Read paths from a file, one per line; - is standard input."
)
@source("-0", "--null", help="Paths in lists are separated by NUL, as find -print0 does.")
@source("--recursive/--no-recursive", help="Search folders recursively.")
@source(
    "--include",
    metavar="PATTERN",
    multiple=True,
    help="In folders, take only files that match, for example '*.tif'. Repeatable.",
)
@source(
    "--exclude",
    metavar="PATTERN",
    multiple=True,
    help="In folders, skip files and folders that match, for example 'thumbs/**'. Repeatable.",
)
@option(CaptionOptions, "--limit", section="Source", help="Caption at most N images in this run.")
@image_limits(CaptionOptions, section="Source")
@option(
    CaptionOptions,
    "--fast-decode",
    section="Source",
    help="Decode large JPEGs at a reduced size: faster, but pixels differ slightly.",
)
@option(
    CaptionOptions,
    "--gpu-decode",
    section="Source",
    help="Decode JPEGs in batches on the GPU where that is faster (CUDA only). Pixels differ slightly.",
)
@model_options
@model("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub.")
@model(
    "--adapter",
    metavar="FOLDER|ID",
    help="A LoRA adapter of peft, merged into the model when it is loaded. Without --model, into the adapter's base model.",
)
@option(
    CaptionOptions,
    "--backend",
    section="Model",
    help="What runs the model. slots: capcli's own decode loop. generate: transformers' generate(), for any model that "
    "transformers loads. auto: slots where capcli has a decode loop for the model.",
)
@model(
    "--quantize",
    help="Load the weights in 4 or 8 bits with bitsandbytes. Models without a decode loop of capcli only.",
)
@server(
    "--endpoint",
    field="urls",
    metavar="URL",
    multiple=True,
    help="Have an OpenAI-compatible server caption the images: http://localhost:8000/v1. --model is the name of the model "
    "there. The API key is read from CAPCLI_API_KEY or OPENAI_API_KEY. Repeatable: several servers of the same model.",
)
@server(
    "--concurrency",
    **auto_or_number(EndpointOptions, "concurrency"),
    help="Requests at a time. auto: more as answers arrive, half as many when a server refuses or slows down.",
)
@server("--retries", help="Repeat a request that failed at most N times.")
@server("--request-timeout", metavar="SECONDS", help="Repeat a request that takes longer.")
@server(
    "--max-requests",
    help="Stop after N requests, repeated ones included. The exit code is 4, and the same command continues the run.",
)
@server(
    "--max-tokens-total",
    help="Stop once the servers have counted N tokens, of prompts, images and answers. Requests under way may exceed it. The "
    "exit code is 4, and the same command continues the run.",
)
@server(
    "--schema",
    metavar="FILE",
    type=click.Path(),
    help="Request answers in JSON that follow the JSON schema in this file. An answer that does not is a failure.",
)
@server("--insecure", help="Allow http addresses of other machines: images and the API key are sent unencrypted.")
@generation_options
@generation("--seed", help="Sampling: the same seed gives the same captions. [default: 0]")
@generation(
    "--suppress-tokens",
    type=TokenIds(),
    help="Tokens that never occur in a caption, by their ids.",
)
@generation("--begin-suppress-tokens", type=TokenIds(), help="Tokens with which no caption begins.")
@generation(
    "--bad-words-ids",
    type=TokenIds(),
    multiple=True,
    help="A word that never occurs in a caption, as the ids of its tokens. Repeatable.",
)
@option(
    CaptionOptions,
    "--prompt",
    section="Generation",
    metavar="TEXT",
    help="Prompt, whose tokens precede the caption. Florence-2 and T5 captioners read it as a question. For the generate "
    "backend and --endpoint it is the user's message; {tags}, {caption} or another name in braces stands for that field of "
    "metadata.jsonl or metadata.csv beside the image, and {{ and }} for braces.",
)
@option(
    CaptionOptions,
    "--system",
    section="Generation",
    metavar="TEXT",
    help="System message, for the generate backend and --endpoint.",
)
@option(
    CaptionOptions,
    "--max-image-edge",
    section="Generation",
    help=f"Shrink images to N pixels on their longest edge, for the generate backend and --endpoint. "
    f"[default: {MAX_IMAGE_EDGE}]",
)
@option(
    CaptionOptions,
    "--on-bad",
    section="Generation",
    help="What to do with refusals, with answers that are empty, cut or repeat themselves, and with leaked special tokens: "
    "keep them as captions, or fail the image. [default: keep; with --endpoint refusals, empty and cut answers fail]",
)
@option(
    CaptionOptions,
    "--tags-field",
    section="Generation",
    metavar="NAME",
    help="Field of metadata.jsonl or metadata.csv beside the images with tags, for captioners that read tags: [dog] [bark].",
)
@option(CaptionOptions, "--keep-prompt", section="Generation", help="Keep the prompt in the caption text.")
@output(
    "-o",
    "--out",
    metavar="PATH|-",
    type=click.Path(allow_dash=True),
    help="File of captions. An existing file is resumed. [default: standard output]",
)
@output(
    "--format",
    help="Format of the rows. csv-excel: for spreadsheet programs, with a byte order mark, and without formulas. [default: by "
    "the suffix of --out]",
)
@output(
    "--fields",
    metavar="NAME,...",
    callback=comma_separated,
    help=f"Additional columns with properties of the image file: {', '.join(FACTS)}.",
)
@output("--sidecar", help="Also write one text file per image, beside the image.")
@output(
    "--sidecar-dir",
    metavar="FOLDER",
    type=click.Path(),
    help="Write the text files below this folder, in the same subfolders.",
)
@output(
    "--existing",
    help="What to do with a text file that has text already; append: add the caption to its first line. [default: skip]",
)
@output("--separator", metavar="TEXT", help="What precedes an appended caption. [default: ', ']")
@output("--failures", metavar="PATH", type=click.Path(), help="File that lists failed images. [default: beside --out]")
@option(
    CaptionOptions,
    "--order",
    section="Output",
    help="Order of the rows: that of the source, or that in which captions are done.",
)
@output("--overwrite", help="Replace --out and start from scratch.")
@output("--retry-failed", help="Try images again that failed in earlier runs.")
@output(
    "--refresh",
    help="Caption images again whose file has changed since: by size and time, then by a hash of the content. Images that were "
    "captioned by a version without a record of them: whose file is newer than --out.",
)
@output("--prune", help="Drop the rows and failures of images that no longer exist in the folders of SOURCES.")
@workers_option(
    CaptionOptions, help="Processes that decode images. 0 decodes in the main process, without --decode-timeout."
)
@option(CaptionOptions, "--dry-run", section="Execution", help="List the images that would be captioned, and exit.")
@quiet_option("Print neither progress nor summary.")
@debug_option
def caption(**given: Any) -> int:
    """Caption SOURCES: image files, folders, quoted glob patterns, what capcli prepare wrote, or - for paths on standard input.

    \b
      capcli caption ./photos --out captions.jsonl
      find . -name '*.jpg' -print0 | capcli caption -0 - | head

    The same command with the same --out resumes where the last run ended. Generation options that are not given are
    those of the model. Each option can also be set by an environment variable: CAPCLI_CAPTION_NUM_BEAMS=4.

    \b
    Exit codes:
      0         all images are captioned
      1         the run failed
      2         wrong usage
      3         the run finished; some images failed
      4         --max-requests or --max-tokens-total was reached; the same command continues the run
      130, 143  interrupted; the same command resumes the run
    """
    options = caption_options(given)
    set_openmp_wait_policy(options.model)
    shown = is_shown(quiet=options.quiet, reads_stdin=options.source.reads_stdin)
    try:
        with terminable(), stage("loading the model", shown=shown):
            do_without_broken(UNUSED_BY_CAPTIONING)
            from capcli.captioning import pipeline

            return pipeline.run(options)
    except KeyboardInterrupt:  # before the first image or after the last: in between the pipeline handles it
        if not options.quiet:
            warn("interrupted")
        raise


def caption_options(given: dict[str, Any]) -> CaptionOptions:
    """The options that the command's parameters describe. Raises UsageError and click.BadParameter."""
    unknown = [name for name in given["fields"] if name not in FACTS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)} is none of {', '.join(FACTS)}", param_hint="--fields")
    several = (given["num_return_sequences"] or 1) > 1
    return CaptionOptions(
        source=SourceOptions(**fields_from(SourceOptions, given)),
        sink=SinkOptions(candidates=several, **fields_from(SinkOptions, given)),
        generation=generation_from(given),
        **fields_from(CaptionOptions, given) | {"endpoint": endpoint_from(given)},
    )


def endpoint_from(given: dict[str, Any]) -> EndpointOptions | None:
    """The options of the endpoint backend; None without --endpoint. Raises UsageError."""
    if not given["endpoint"]:
        if typed := typed_option_in("Server"):
            raise UsageError(f"{typed} has no effect without --endpoint")
        return None
    if click.get_current_context().get_parameter_source("model") is ParameterSource.DEFAULT:
        raise UsageError("--endpoint needs --model: the name of the model on the server")
    return EndpointOptions(urls=tuple(given["endpoint"]), **fields_from(EndpointOptions, given))

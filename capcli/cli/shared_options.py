"""Options that several commands have: model, generation, training data, limits of images, execution."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from capcli.cli.click_options import (
    Decorator,
    apply,
    auto_or_number,
    fields_from,
    flag_option,
    model_or,
    option,
)
from capcli.options import DEFAULT_MODEL, CaptionOptions, DataOptions, GenerationOptions

PATH = click.Path()
EARLY_STOPPING = {"true": True, "false": False, "never": "never"}

model = partial(option, CaptionOptions, section="Model")
generation = partial(option, GenerationOptions, section="Generation")
data = partial(option, DataOptions, section="Data")

MODEL_OPTIONS = (
    model(
        "-m",
        "--model",
        metavar="ID|FOLDER",
        help="Captioner: a name on the Hugging Face Hub, a folder, or an engine.",
        **model_or(DEFAULT_MODEL),
    ),
    model("--device", metavar="auto|cpu|cuda[:N]|mps", help="Device of the model. mps (Apple): only by generate()."),
    model(
        "--dtype",
        help="Precision of the computation. auto: bfloat16 where the hardware computes in it, otherwise float32. int8 (CPUs "
        "only): the layers' matrix products in 8 bits, the rest in float32 or bfloat16.",
    ),
    model(
        "--batch-size",
        **auto_or_number(CaptionOptions, "batch_size"),
        help="Images that are captioned together. auto: what fits into device memory, at most the number of images.",
    ),
    model("--threads", help="CPU threads of the model. [default: all cores]"),
)
GENERATION_OPTIONS = (
    generation("--num-beams", help="Number of beams; 1 is greedy search."),
    generation("--max-new-tokens", help="Maximum length of a caption in tokens."),
    generation("--min-new-tokens", help="Minimum length of a caption in tokens."),
    generation("--length-penalty", help="Beam search: values above 0 favor longer captions."),
    generation(
        "--early-stopping",
        help="Beam search: stop as soon as there are --num-beams finished captions (true), when better ones are unlikely "
        "(false), or when better ones are impossible (never).",
    ),
    generation("--no-repeat-ngram-size", help="No sequence of N tokens occurs twice in a caption; 0 is off."),
    generation("--repetition-penalty", help="Values above 1 make tokens that have occurred less likely."),
    generation(
        "--do-sample/--no-do-sample", default=None, help="Sample tokens instead of taking the most likely ones."
    ),
    generation(
        "--temperature", help="Sampling: values above 1 flatten the distribution of tokens, below 1 sharpen it."
    ),
    generation("--top-k", help="Sampling: only from the N most likely tokens; 0 is off."),
    generation(
        "--top-p", help="Sampling: only from the smallest set of most likely tokens whose probabilities sum to X."
    ),
    generation("--num-return-sequences", help="Captions per image: the best beams, or samples."),
)
DATA_OPTIONS = (
    data(
        "--data",
        metavar="PATH",
        type=PATH,
        multiple=True,
        help="Images with captions: CSV, TSV, JSONL or Parquet, Flickr token files, COCO, Karpathy or LLaVA JSON, an "
        "imagefolder, images with .txt or .json files beside them, a dataset on disk, or the output of capcli prepare. "
        "Repeatable.",
    ),
    data("--val-data", metavar="PATH", type=PATH, multiple=True, help="The same for validation. Repeatable."),
    data(
        "--image-root",
        metavar="FOLDER",
        type=PATH,
        help="Folder of the images. Whole paths of another machine are found in it by their last parts. "
        "[default: that of the annotations]",
    ),
    data("--image-column", metavar="NAME", help="Column or key of the image name. [default: the usual names]"),
    data("--caption-column", metavar="NAME", help="Column or key of the caption. [default: the usual names]"),
    data("--split-column", metavar="NAME", help="Column or key of the split: train, val or test."),
    data(
        "--tags-column",
        metavar="NAME",
        help="Column or key of the image's tags, a text or a list: [dog] [bark]. Read with --join prefix.",
    ),
    data("--train-names", metavar="FILE", type=PATH, help="Train on the images in this list, one name per line."),
    data("--val-names", metavar="FILE", type=PATH, help="Validate on the images in this list, one name per line."),
    data("--val-fraction", help="Validate on this fraction of the images, drawn at random."),
    data(
        "--train-limit",
        metavar="N|X",
        help="Train on N images, or below 1 on this fraction of them, drawn at random.",
    ),
    data(
        "--val-limit",
        metavar="N|X",
        help="Validate on N images, or below 1 on this fraction of them, drawn at random.",
    ),
    data(
        "--label-template",
        metavar="TEXT",
        help="Read folders of images without captions as classes. The caption is this text; {label} stands for the name of "
        "the image's folder.",
    ),
    data(
        "--text-files",
        help="How text files beside images are read: each line as a caption, or the whole file, with all of its "
        "paragraphs, as one caption. [default: lines]",
    ),
    data("--seed", help="Seed of the random number generators."),
)

model_options = partial(apply, MODEL_OPTIONS)
generation_options = partial(apply, GENERATION_OPTIONS)
data_options = partial(apply, DATA_OPTIONS)


def image_limits(options: type, section: str) -> Callable[[Any], Any]:
    """Adds --max-pixels and --decode-timeout, fields of the dataclass `options`."""
    limits = (
        option(
            options,
            "--max-pixels",
            section=section,
            help="Reject images with more pixels than this, before they are decoded.",
        ),
        option(
            options,
            "--decode-timeout",
            section=section,
            metavar="SECONDS",
            help="Reject an image that takes longer to decode.",
        ),
    )
    return partial(apply, limits)


def workers_option(options: type, help: str) -> Decorator:  # noqa: A002
    """Adds --workers, a field of the dataclass `options`."""
    return option(options, "--workers", section="Execution", help=help, **auto_or_number(options, "workers"))


def quiet_option(help: str) -> Decorator:  # noqa: A002
    """Adds -q and --quiet."""
    return flag_option("-q", "--quiet", section="Execution", help=help)


def data_from(given: dict[str, Any]) -> DataOptions:
    """The data options among a command's parameters. Raises UsageError."""
    return DataOptions(**fields_from(DataOptions, given))


def generation_from(given: dict[str, Any]) -> GenerationOptions:
    """The generation options among a command's parameters. Raises UsageError."""
    values = fields_from(GenerationOptions, given)
    values["bad_words_ids"] = values.get("bad_words_ids") or None  # an option that is not given is an empty tuple
    return GenerationOptions(**values | {"early_stopping": EARLY_STOPPING.get(given["early_stopping"])})


def set_openmp_wait_policy(model: str) -> None:
    """If `model` is an engine, let PyTorch's idle threads sleep instead of spin, which would slow the engine down.

    Sets OMP_WAIT_POLICY unless it is set. OpenMP reads it when torch is imported, so this must be called before.
    BENCHMARKS.md has the measurement.
    """
    from capcli.models.model_files import is_engine

    if is_engine(os.path.expanduser(model)):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")

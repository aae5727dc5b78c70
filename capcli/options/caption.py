"""Options of `capcli caption`: where images come from, how captions are generated, and where rows go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from capcli.errors import UsageError
from capcli.options.limits import NonNegativeInt, PositiveFloat, PositiveInt, Range, check_limits
from capcli.options.server import EndpointOptions

DEFAULT_MODEL = "nlpconnect/vit-gpt2-image-captioning"
MAX_PIXELS = 178_956_970  # above this Pillow itself refuses an image as a decompression bomb
LARGEST_ID = 2**31 - 1  # of a token
DECODE_TIMEOUT = 60.0  # seconds
MAX_IMAGE_EDGE = 1024  # pixels of the longest edge of an image for the generate and endpoint backends, unless given

Format = Literal["jsonl", "csv", "csv-excel"]
Suffix = Literal[".txt", ".caption"]
Existing = Literal["skip", "overwrite", "append"]
BackendName = Literal["auto", "slots", "generate"]
OnBad = Literal["keep", "fail"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True)
class SourceOptions:
    """The images to list.

    `sources` are files, folders, glob patterns, copies that `capcli prepare` wrote, or `-` (names on standard input). A path
    that exists is taken literally, even if it contains wildcards. `from_file` is a list of paths, one per line, or separated
    by NUL with `null`, which applies to standard input too. Folders and patterns yield the files with an image suffix,
    without hidden files (those with a leading dot).

    `include` and `exclude` are patterns over the name relative to the folder, or relative to the part of a glob before
    its first wildcard. A pattern without `/` is matched against base names at any depth: `*.tif`. A pattern with `/` is
    matched against the whole relative name: `2024/*.tif`, `2024/**`. If `include` is given, only its patterns apply,
    regardless of the suffix. `exclude` takes precedence over `include`, and a folder that it matches is not entered. Hidden
    names are included only by patterns that contain the dot. Files that are named or listed are always yielded.
    """

    sources: tuple[str, ...] = ()
    from_file: str | None = None
    null: bool = False
    recursive: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_limits(self)

    @property
    def reads_stdin(self) -> bool:
        """Whether names come from standard input."""
        return "-" in (*self.sources, self.from_file)


@dataclass(frozen=True)
class SinkOptions:
    """Where captions are written and what a row contains.

    `out` is a file, `-` for standard output, or None: standard output, unless sidecars are written. `format` None is
    chosen by the suffix of `out`; on standard output it is JSON lines, and readable lines on a terminal. `candidates`
    adds all captions of an image to its row, `fields` names columns with properties of the image file. `failures` None
    is a file beside `out`; without `out`, failures are printed on standard error. `overwrite` starts the output from
    scratch, `retry_failed` tries images again that failed in earlier runs. `sidecar` is the suffix of one text file per
    image, beside the image or below `sidecar_dir`; `existing` states what to do with a text file that has text already (None:
    skip it), and `separator` what precedes an appended caption (None: a comma and a space). `refresh` captions images again
    whose file has changed, `prune` drops the rows of images that no longer exist.
    """

    out: str | None = None
    format: Format | None = None
    candidates: bool = False
    fields: tuple[str, ...] = ()
    failures: str | None = None
    overwrite: bool = False
    retry_failed: bool = False
    sidecar: Suffix | None = None
    sidecar_dir: str | None = None
    existing: Existing | None = None
    separator: str | None = None
    refresh: bool = False
    prune: bool = False

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Settings of the caption search, with the names and meanings of transformers' `GenerationConfig`.

    None leaves a field to the checkpoint's generation_config. `suppress_tokens` and `begin_suppress_tokens` are token ids,
    `bad_words_ids` sequences of them. Raises UsageError for a value out of its limits.
    """

    num_beams: PositiveInt | None = None
    max_new_tokens: PositiveInt | None = None
    min_new_tokens: NonNegativeInt | None = None
    length_penalty: Annotated[float, Range(-100, 100)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    no_repeat_ngram_size: NonNegativeInt | None = None
    repetition_penalty: PositiveFloat | None = None
    do_sample: bool | None = None
    temperature: PositiveFloat | None = None
    top_k: NonNegativeInt | None = None
    top_p: Annotated[float, Range(0, 1, min_open=True)] | None = None
    num_return_sequences: PositiveInt | None = None
    seed: int | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        check_limits(self, written=str)  # also used for a checkpoint's generation_config.json, where names are keys
        least, most = self.min_new_tokens, self.max_new_tokens
        if least is not None and most is not None and least > most:
            raise UsageError(f"--min-new-tokens is {least}, which is more than --max-new-tokens, {most}")
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if not is_ids(value := getattr(self, name)):
                raise UsageError(f"{name} is {shortened(value)}; it must be a list of token ids")
        if not (self.bad_words_ids is None or is_words(self.bad_words_ids)):
            raise UsageError(
                f"bad_words_ids is {shortened(self.bad_words_ids)}; it must be a list of lists of token ids"
            )


def is_ids(value: object) -> bool:
    """Whether a value is None or a list of token ids."""
    return value is None or (
        isinstance(value, list | tuple) and all(type(each) is int and 0 <= each <= LARGEST_ID for each in value)
    )


def is_words(value: object) -> bool:
    """Whether a value is a list of lists of token ids, none of them empty."""
    return isinstance(value, list | tuple) and all(
        isinstance(each, list | tuple) and each and is_ids(each) for each in value
    )


def shortened(value: object) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass(frozen=True, slots=True)
class CaptionOptions:
    """Options of one `capcli caption`. None means `auto`: chosen from the machine, the model and the number of images.

    `tags_field` names a field of the metadata beside the images: tags that the captioner reads with the image. `endpoint` is
    set where servers caption the images; `model` is the name of the model there. Such models and those of the generate backend
    take a `system` message, and images whose longest edge has at most `max_image_edge` pixels. `on_bad` states what to do with
    answers that are no good captions (see `capcli.captioning.answers`); None: the backend decides.
    """

    source: SourceOptions
    sink: SinkOptions
    generation: GenerationOptions = GenerationOptions()
    prompt: str | None = None
    system: str | None = None
    keep_prompt: bool = False
    tags_field: str | None = None
    model: str = DEFAULT_MODEL
    backend: BackendName = "auto"
    endpoint: EndpointOptions | None = None
    revision: str | None = None
    adapter: str | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    quantize: Literal["4bit", "8bit"] | None = None
    batch_size: PositiveInt | None = None
    workers: NonNegativeInt | None = None
    threads: PositiveInt | None = None
    max_pixels: PositiveInt = MAX_PIXELS
    max_image_edge: PositiveInt | None = None
    on_bad: OnBad | None = None
    decode_timeout: PositiveFloat = DECODE_TIMEOUT
    fast_decode: bool = False
    gpu_decode: bool = False
    order: Literal["source", "done"] = "source"
    limit: NonNegativeInt | None = None
    dry_run: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_limits(self)
        check_device(self.device)
        if self.fast_decode and self.gpu_decode:
            raise UsageError("--fast-decode and --gpu-decode are two ways to decode JPEGs: give one of them")
        if self.gpu_decode and self.workers == 0:
            raise UsageError("--gpu-decode needs decoder processes, which read the files: leave --workers 0 out")


def check_device(name: str) -> None:
    """Raises UsageError unless `name` is the name of a device. Whether the machine has the device is not checked."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name):
        raise UsageError(f"--device {name}: it must be auto, cpu, cuda, cuda:N or mps")

"""What `capcli caption` was asked to do, and the search settings that other commands share."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from capcli.errors import UsageError

DEFAULT_MODEL = "nlpconnect/vit-gpt2-image-captioning"
MAX_PIXELS = 178_956_970  # where Pillow itself refuses an image as a decompression bomb
DECODE_TIMEOUT = 60.0  # seconds

Format = Literal["jsonl", "csv"]
Suffix = Literal[".txt", ".caption"]
Existing = Literal["skip", "overwrite", "append"]


@dataclass(frozen=True)
class SourceOptions:
    """What to list.

    `sources` are files, folders, glob patterns or `-` (names on standard input); a path that exists is taken as it
    is, wildcards or not. `from_file` is a list of paths, one a line, or separated by NUL with `null`, which holds
    for standard input as well. Folders and patterns yield files with an image suffix, hidden ones (leading dot) not.

    `include` and `exclude` hold patterns over the name relative to the folder (or to the part of a glob before its
    first wildcard). One without `/` is held against base names at any depth: `*.tif`. One with `/` is held against the
    whole relative name: `2024/*.tif`, `2024/**`. With `include` these patterns alone decide, whatever the suffix;
    `exclude` wins over it, and prunes a folder that it matches. Hidden names are included only by patterns that spell
    the dot. Files that are named or listed are always yielded.
    """

    sources: tuple[str, ...] = ()
    from_file: str | None = None
    null: bool = False
    recursive: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class SinkOptions:
    """Where captions go and what a row holds.

    `out` is a file, `-` for standard output, or None: standard output, unless sidecars are asked for. `format` None
    goes by the file's suffix; on standard output it is JSON lines, readable ones on a terminal. `candidates` adds all
    captions of an image to its row, `fields` names facts to add. `failures` None: beside `out`, or lines to `warn`.
    `overwrite` starts a file anew, `retry_failed` tries earlier failures again. `sidecar` is the suffix of a text file
    for each image, beside it or below `sidecar_dir`; `existing` says what becomes of one that is there.
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
    existing: Existing = "skip"


KINDS = dict.fromkeys(
    ("num_beams", "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size", "top_k", "num_return_sequences", "seed"),
    int,
) | dict.fromkeys(("length_penalty", "repetition_penalty", "temperature", "top_p"), (int, float))


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Search settings asked for; `None` leaves a field to the checkpoint's generation_config."""

    num_beams: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_return_sequences: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kinds in KINDS.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise UsageError(f"{name} is {value!r}; it must be a {'whole ' if kinds is int else ''}number")
        for name, allowed in (
            ("num_beams", 1),
            ("max_new_tokens", 1),
            ("min_new_tokens", 0),
            ("no_repeat_ngram_size", 0),
            ("top_k", 0),
            ("num_return_sequences", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < allowed:
                raise UsageError(f"{name} is {value}; it must be at least {allowed}")
        least, most = self.min_new_tokens, self.max_new_tokens
        if least is not None and most is not None and least > most:
            raise UsageError(f"--min-new-tokens is {least}, which is more than --max-new-tokens, {most}")
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}; it must be above 0 and finite")
        if self.length_penalty is not None and not abs(self.length_penalty) <= 100:
            raise UsageError(f"length_penalty is {self.length_penalty}; it must be between -100 and 100")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.early_stopping not in (None, True, False, "never"):
            raise UsageError(f"early_stopping is {self.early_stopping!r}; it must be true, false or 'never'")


@dataclass(frozen=True, slots=True)
class CaptionOptions:
    """One `capcli caption`. `None` is `auto`: what this machine, the model and the number of images ask for.

    `tags_field` names the field, of the metadata beside the images, with words on each that the captioner reads.
    """

    source: SourceOptions
    sink: SinkOptions
    generation: GenerationOptions = GenerationOptions()
    prompt: str | None = None
    keep_prompt: bool = False
    tags_field: str | None = None
    model: str = DEFAULT_MODEL
    revision: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    batch_size: int | None = None
    workers: int | None = None
    threads: int | None = None
    max_pixels: int = MAX_PIXELS
    decode_timeout: float = DECODE_TIMEOUT
    fast_decode: bool = False
    gpu_decode: bool = False
    order: Literal["source", "done"] = "source"
    limit: int | None = None
    dry_run: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_device(self.device)
        if not self.decode_timeout > 0:
            raise UsageError(f"decode_timeout is {self.decode_timeout}; it must be above 0")
        if self.fast_decode and self.gpu_decode:
            raise UsageError("--fast-decode and --gpu-decode are two ways to decode JPEGs: give one of them")
        if self.gpu_decode and self.workers == 0:
            raise UsageError("--gpu-decode needs decoder processes, which read the files: leave --workers 0 out")


def check_device(name: str) -> None:
    """Raises UsageError for what names no kind of device; whether it is there is another question."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name}: it is auto, cpu, cuda, or cuda:N")

"""What a command was asked to do: one frozen, validated dataclass per concern. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capcli.errors import UsageError
from capcli.sinks.options import SinkOptions
from capcli.sources import SourceOptions

DEFAULT_MODEL = "nlpconnect/vit-gpt2-image-captioning"
MAX_PIXELS = 178_956_970  # where Pillow itself refuses an image as a decompression bomb
DECODE_TIMEOUT = 60.0  # seconds

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
        for name, least in (
            ("num_beams", 1),
            ("max_new_tokens", 1),
            ("min_new_tokens", 0),
            ("no_repeat_ngram_size", 0),
            ("top_k", 0),
            ("num_return_sequences", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}")
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}; it must be above 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.early_stopping not in (None, True, False, "never"):
            raise UsageError(f"early_stopping is {self.early_stopping!r}; it must be true, false or 'never'")


@dataclass(frozen=True, slots=True)
class CaptionOptions:
    """One `capcli caption`. `None` is `auto`: what this machine, the model and the number of images ask for."""

    source: SourceOptions
    sink: SinkOptions
    generation: GenerationOptions = GenerationOptions()
    prompt: str | None = None
    keep_prompt: bool = False
    model: str = DEFAULT_MODEL
    revision: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int | None = None
    workers: int | None = None
    threads: int | None = None
    max_pixels: int = MAX_PIXELS
    decode_timeout: float = DECODE_TIMEOUT
    order: Literal["source", "done"] = "source"
    limit: int | None = None
    dry_run: bool = False
    quiet: bool = False

"""The search settings in force: a checkpoint's generation_config, what was asked for instead, and what is refused. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from capcli.errors import CapcliError, UsageError
from capcli.options import GenerationOptions
from capcli.text import counted, flag

# Fields of a generation_config that change no caption here: caches, outputs, assistants that are not there, bookkeeping.
WITHOUT_EFFECT = frozenset(
    [
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "max_matching_ngram_size",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "low_memory",
        "prefill_chunk_size",
        "transformers_version",
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
    ]
)
HONOURED = frozenset(
    [
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "early_stopping",
        "do_sample",
        "num_beams",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "renormalize_logits",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "suppress_tokens",
        "begin_suppress_tokens",
        "num_return_sequences",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "decoder_start_token_id",
    ]
)
# What generate() takes a missing field for; a field that holds this changes nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
    "guidance_scale": (1.0,),
    "token_healing": (False,),
    "use_mtp": (False,),
}
NO_TOKEN = -1  # among the ids that an encoder reads: there is none
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")  # without effect where nothing is drawn
BEAM_SEARCH = ("length_penalty", "early_stopping")


@dataclass(frozen=True, slots=True)
class Settings:
    """How captions are searched for; names and meanings are those of transformers' `GenerationConfig`.

    `max_new_tokens` is resolved (a `max_length` counts the prompt, this does not), so is `min_new_tokens`. `prompt` holds the
    ids given to the decoder before the caption, its start token first; `question` those that the encoder reads, where it does.
    """

    prompt: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    renormalize_logits: bool = False
    remove_invalid_values: bool = False
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    seed: int = 0
    question: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_return_sequences > self.num_beams and not (self.do_sample and self.num_beams == 1):
            raise UsageError(
                f"{self.num_return_sequences} captions per image need at least as many beams "
                f"(--num-beams {self.num_return_sequences}) or sampling (--do-sample)"
            )
        if self.max_new_tokens < 1:
            raise UsageError(
                f"no room for a caption: the prompt has {counted(len(self.prompt), 'token')} and the checkpoint allows "
                f"{len(self.prompt) + self.max_new_tokens} in all; give --max-new-tokens"
            )

    @property
    def rows(self) -> int:
        """Rows of a slot: beams, or samples; greedy has one."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @property
    def entries(self) -> int:
        """Entries of a slot's pool: the prefix (all of the prompt but its last token), then every row's every token."""
        return len(self.prompt) - 1 + self.rows * self.max_new_tokens

    def effective(self) -> dict[str, Any]:
        """The settings that have an effect, as the run file has them."""
        idle = (*(() if self.do_sample else SAMPLING), *(() if self.num_beams > 1 else BEAM_SEARCH))
        idle += () if self.question else ("question",)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in idle}


def resolve(config: Mapping[str, Any], given: GenerationOptions, prompt: Iterable[int] = ()) -> Settings:
    """The settings in force: `given` where it says something, else the checkpoint's `config` (a generation_config as a dict).

    `prompt` is the prompt's ids without the start token, which is put before them unless they begin with it.
    Raises CapcliError for a field of `config` that would change captions and is not done here.
    """
    refuse_unknown(config)
    refuse_impossible(config)
    asked = {name: value for name, value in asdict(given).items() if value is not None}
    have = {name: value for name, value in config.items() if value is not None}
    fields = {**have, **asked}
    start = fields.get("decoder_start_token_id", fields.get("bos_token_id"))
    if start is None:
        raise CapcliError("the model's generation_config names no decoder_start_token_id and no bos_token_id")
    ids = tuple(prompt)
    ids = ids if ids[:1] == (start,) else (start, *ids)
    taken = {name: fields[name] for name in Settings.__dataclass_fields__ if name in fields}
    taken |= {
        "prompt": ids,
        "eos_token_ids": as_ids(fields.get("eos_token_id")),
        "forced_eos_token_ids": as_ids(fields.get("forced_eos_token_id")),
        "suppress_tokens": as_ids(fields.get("suppress_tokens")),
        "begin_suppress_tokens": as_ids(fields.get("begin_suppress_tokens")),
        "max_new_tokens": most(fields, len(ids)),
        "min_new_tokens": least(fields, len(ids)),
    }
    return Settings(**taken)


def most(fields: Mapping[str, Any], prompt: int) -> int:
    """New tokens at most: max_new_tokens, else max_length, which counts the prompt; else generate()'s 20."""
    if "max_new_tokens" in fields:
        return int(fields["max_new_tokens"])
    return int(fields["max_length"]) - prompt if "max_length" in fields else 20


def least(fields: Mapping[str, Any], prompt: int) -> int:
    """New tokens at least: min_new_tokens, else min_length, which counts the prompt."""
    if "min_new_tokens" in fields:
        return int(fields["min_new_tokens"])
    return max(int(fields.get("min_length", 0)) - prompt, 0)


def as_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def refuse_unknown(config: Mapping[str, Any]) -> None:
    known = HONOURED | WITHOUT_EFFECT
    for name, value in config.items():
        if name.startswith("_") or name in known or value is None or value in NEUTRAL.get(name, ()):
            continue
        raise CapcliError(
            f"the model's generation_config sets {name}={value!r}, which capcli does not do: its captions would differ. "
            f"Remove {name} from generation_config.json if you can do without it"
        )


def refuse_impossible(config: Mapping[str, Any]) -> None:
    """Raises CapcliError for a value that no option could have: the checkpoint's are held to the same rules.

    Each by itself: of lengths that do not go together generate() takes the longest, and so does the search here.
    """
    try:
        for name in GenerationOptions.__dataclass_fields__:
            if config.get(name) is not None:
                GenerationOptions(**{name: config[name]})
    except UsageError as error:
        raise CapcliError(f"the model's generation_config cannot be used: {error}") from None


def idle(given: GenerationOptions, settings: Settings) -> list[str]:
    """What was asked for, or is the model's own, and has no effect under these settings, a line each."""
    lines = []
    if settings.min_new_tokens > settings.max_new_tokens:
        least, most = (
            f"the model's own {name}" if getattr(given, name) is None else flag(name)
            for name in ("min_new_tokens", "max_new_tokens")
        )
        n, m = settings.min_new_tokens, settings.max_new_tokens
        lines.append(f"{least} {n} is more than {most} {m}: captions are cut after {m} tokens")
    if not settings.do_sample:
        names = [name for name in SAMPLING if hasattr(given, name)]
        lines += [f"{flag(n)} has no effect without --do-sample" for n in names if getattr(given, n) is not None]
    if settings.num_beams == 1:
        names = list(BEAM_SEARCH)
        lines += [f"{flag(n)} has no effect with one beam" for n in names if getattr(given, n) is not None]
    return lines

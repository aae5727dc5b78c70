"""The search settings of a run, from a checkpoint's generation_config and the user's options. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from capcli.errors import CapcliError, UsageError
from capcli.options import GenerationOptions
from capcli.options.caption import LARGEST_ID, is_ids, shortened
from capcli.text import counted, flag

# Fields of a generation_config that change no caption here: caches, outputs, assistant models, bookkeeping.
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
SUPPORTED = frozenset(
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
        "bad_words_ids",
        "num_return_sequences",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "decoder_start_token_id",
    ]
)
# Values that disable a field in generate(): a generation_config may contain these.
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
# What fields must be that are no options, or that have another type there: a test of the value, and the words for it.
CHECKS: Sequence[tuple[tuple[str, ...], Callable[[Any], bool], str]] = (
    (("bos_token_id", "decoder_start_token_id", "forced_bos_token_id"), lambda x: is_ids([x]), "a token id"),
    (("eos_token_id", "forced_eos_token_id"), lambda x: is_end(x), "a token id or a list of token ids"),
    (("max_length", "min_length"), lambda x: type(x) is int, "a whole number"),
    (("min_p",), lambda x: type(x) in (int, float) and 0 <= x <= 1, "a number from 0 to 1"),
    (("renormalize_logits", "remove_invalid_values"), lambda x: isinstance(x, bool), "true or false"),
)
UNUSABLE = "the model's generation_config cannot be used"
NO_TOKEN = -1  # in encoder_ids: no token at this position
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")  # without effect unless do_sample
BEAM_SEARCH = ("length_penalty", "early_stopping")  # without effect with one beam
# Names in the run file: they must not change, so that runs of earlier versions can be resumed.
RUN_FILE_NAMES = {"encoder_ids": "question"}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the caption search; names and meanings are those of transformers' `GenerationConfig`.

    `max_new_tokens` and `min_new_tokens` are resolved: they do not count the prompt, as `max_length` does. `prompt` are the
    token ids given to the decoder before the caption, the start token first; `encoder_ids` the token ids that the encoder
    reads with the image, empty where it reads none. Raises UsageError for settings that exclude each other.

    With `prompt_room` each image has a prompt of its own of at most so many tokens, which stand for the image too: the runtime
    keeps all but its last token as the image's prefix. `prompt` is then any one token.
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
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    encoder_ids: tuple[int, ...] = ()
    prompt_room: int = 0

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
        """R, the rows of a slot: its beams or samples; one for greedy search."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @property
    def context(self) -> int:
        """Tokens before the caption in a sequence, as far as the search reads them."""
        if not self.prompt_room:
            return len(self.prompt)
        reads = self.repetition_penalty != 1.0 or self.no_repeat_ngram_size or self.bad_words_ids
        return self.prompt_room if reads else 1

    @property
    def entries(self) -> int:
        """Entries of a slot's pool, P + R*T: the prompt but its last token, then each token of each row."""
        return len(self.prompt) - 1 + self.rows * self.max_new_tokens

    def in_run_file(self) -> dict[str, Any]:
        """The settings that have an effect, as stored in the run file."""
        idle = (*(() if self.do_sample else SAMPLING), *(() if self.num_beams > 1 else BEAM_SEARCH))
        idle += tuple(name for name in ("encoder_ids", "bad_words_ids") if not getattr(self, name))
        idle += ("prompt", "prompt_room") if self.prompt_room else ("prompt_room",)
        shown = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in idle}
        return {RUN_FILE_NAMES.get(name, name): value for name, value in shown.items()}


def resolve(config: Mapping[str, Any], given: GenerationOptions, prompt: Iterable[int] = ()) -> Settings:
    """The settings of a run: the options in `given`, else those of the checkpoint's `config` (a generation_config as a dict).

    `prompt` are the prompt's ids; the start token is put before them unless they begin with it. Raises CapcliError for a field
    of `config` that would change captions and is not supported.
    """
    refuse_unknown(config)
    refuse_impossible(config)
    own = {name: value for name, value in config.items() if value is not None}
    fields = own | {name: value for name, value in asdict(given).items() if value is not None}
    start = fields.get("decoder_start_token_id", fields.get("bos_token_id"))
    if start is None:
        raise CapcliError("the model's generation_config has neither decoder_start_token_id nor bos_token_id")
    end = as_ids(fields.get("eos_token_id"))
    ids = tuple(prompt)
    ids = ids if ids[:1] == (start,) else (start, *ids)
    taken = {name: fields[name] for name in Settings.__dataclass_fields__ if name in fields}
    taken |= {
        "prompt": ids,
        "eos_token_ids": end,
        "forced_eos_token_ids": as_ids(fields.get("forced_eos_token_id")),
        "suppress_tokens": as_ids(fields.get("suppress_tokens")),
        "begin_suppress_tokens": as_ids(fields.get("begin_suppress_tokens")),
        "bad_words_ids": bad_words(fields.get("bad_words_ids", ()), end),
        "max_new_tokens": max_new_tokens(fields, len(ids)),
        "min_new_tokens": min_new_tokens(fields, len(ids)),
    }
    return Settings(**taken)


def max_new_tokens(fields: Mapping[str, Any], prompt: int) -> int:
    """`max_new_tokens`, else `max_length` less the `prompt` tokens, else generate()'s default of 20."""
    if "max_new_tokens" in fields:
        return int(fields["max_new_tokens"])
    return int(fields["max_length"]) - prompt if "max_length" in fields else 20


def min_new_tokens(fields: Mapping[str, Any], prompt: int) -> int:
    """`min_new_tokens`, else `min_length` less the `prompt` tokens."""
    if "min_new_tokens" in fields:
        return int(fields["min_new_tokens"])
    return max(int(fields.get("min_length", 0)) - prompt, 0)


def is_end(value: object) -> bool:
    """Whether a value is a token id or a list of token ids; an id below 0 is that of no token."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(type(each) is int and abs(each) <= LARGEST_ID for each in values)


def as_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def bad_words(words: Iterable[Sequence[int]], end: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The different token sequences among `words`; as in generate(), an end token alone is none."""
    return tuple(word for word in dict.fromkeys(map(tuple, words)) if not (len(word) == 1 and word[0] in end))


def refuse_unknown(config: Mapping[str, Any]) -> None:
    """Raises CapcliError for a field that is not supported and has an effect in generate()."""
    known = SUPPORTED | WITHOUT_EFFECT
    for name, value in config.items():
        if name.startswith("_") or name in known or value is None or value in NEUTRAL.get(name, ()):
            continue
        raise CapcliError(
            f"the model's generation_config sets {name}={value!r}, which capcli does not support: captions would differ. "
            f"Remove {name} from generation_config.json if you do not need it"
        )


def refuse_impossible(config: Mapping[str, Any]) -> None:
    """Raises CapcliError for a value that the option of the same name would reject.

    Each field is checked by itself: lengths that contradict each other are resolved as generate() resolves them.
    """
    try:
        for name in GenerationOptions.__dataclass_fields__:
            if config.get(name) is not None:
                GenerationOptions(**{name: config[name]})
    except UsageError as error:
        raise CapcliError(f"{UNUSABLE}: {error}") from None
    for names, is_valid, wanted in CHECKS:
        for name in names:
            if (value := config.get(name)) is not None and not is_valid(value):
                raise CapcliError(f"{UNUSABLE}: {name} is {shortened(value)}; it must be {wanted}")


def idle(given: GenerationOptions, settings: Settings) -> list[str]:
    """Warnings, one line each, for options and model settings that have no effect under these settings."""
    lines = []
    if settings.min_new_tokens > settings.max_new_tokens:
        shortest, longest = (
            f"the model's own {name}" if getattr(given, name) is None else flag(name)
            for name in ("min_new_tokens", "max_new_tokens")
        )
        n, m = settings.min_new_tokens, settings.max_new_tokens
        lines.append(f"{shortest} {n} is more than {longest} {m}: captions are truncated after {m} tokens")
    if not settings.do_sample:
        names = [name for name in SAMPLING if hasattr(given, name)]
        lines += [f"{flag(n)} has no effect without --do-sample" for n in names if getattr(given, n) is not None]
    if settings.num_beams == 1:
        names = list(BEAM_SEARCH)
        lines += [f"{flag(n)} has no effect with one beam" for n in names if getattr(given, n) is not None]
    return lines

"""The generation_config of a captioner in training: its special tokens and the search settings given for it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import GenerationConfig

from capcli.decoding.settings import BEAM_SEARCH, SAMPLING, idle, resolve
from capcli.errors import UsageError
from capcli.models.families import family_of
from capcli.options import GenerationOptions
from capcli.text import flag
from capcli.training.model.tokenizers import SpecialTokens


def set_generation(
    model: Any, positions: int, specials: SpecialTokens, given: GenerationOptions, max_new_tokens: int | None
) -> list[str]:
    """Writes special tokens and the given search settings into a model's configs.

    A new captioner gets a generation_config with `max_new_tokens`, unless `given` has another length, and all special
    tokens. None means a trained captioner: it keeps its settings and its special tokens, and gets only those that it lacks.
    `positions` is the maximum number of tokens of its decoder.

    Returns a line for each given setting that has no effect; those are not written, because transformers refuses to save
    them. Raises UsageError for settings that contradict each other, and for those that the architecture cannot save.
    """
    is_new = max_new_tokens is not None
    if is_new:
        new_config: Any = GenerationConfig
        model.generation_config = new_config(max_new_tokens=max_new_tokens)
    config = model.generation_config
    config._from_model_config = None  # noqa: SLF001  (else generate() may put the model config's values over these)
    _set_special_tokens(model, specials, overwrite=is_new)
    wanted = {name: value for name, value in asdict(given).items() if value is not None and name != "seed"}
    if "max_new_tokens" in wanted:
        config.max_length = None  # generate() warns when both are set
    if "min_new_tokens" in wanted:
        config.min_length = None
    for name, value in wanted.items():
        setattr(config, name, value)
    in_force = family_of(model.config.to_dict()).generation(model.config.to_dict(), config.to_dict())
    if lost := [name for name, value in wanted.items() if in_force.get(name) != value]:
        raise UsageError(f"a {model.config.model_type} cannot save {flag(lost[0])}: give it to capcli caption instead")
    settings = resolve(in_force, GenerationOptions())
    if settings.max_new_tokens > positions:
        raise UsageError(
            f"--max-new-tokens is {settings.max_new_tokens}, but the decoder accepts {positions}: give {positions} or less"
        )
    for name in (*(() if settings.do_sample else SAMPLING), *(BEAM_SEARCH if settings.num_beams == 1 else ())):
        if hasattr(config, name):
            setattr(config, name, None)
    return idle(given, settings)


def _set_special_tokens(model: Any, specials: SpecialTokens, *, overwrite: bool) -> None:
    ids = {"bos_token_id": specials.start, "eos_token_id": specials.end, "pad_token_id": specials.pad}
    start = {"decoder_start_token_id": specials.start}
    decoder_config = model.config.get_text_config(decoder=True)
    for config, values in (
        (decoder_config, ids),
        (model.config, ids | start),
        (model.generation_config, ids | start),
    ):
        for name, value in values.items():
            if overwrite or getattr(config, name, None) is None:
                setattr(config, name, value)

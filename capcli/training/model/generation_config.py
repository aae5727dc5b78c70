"""How a captioner searches by itself: its generation_config, from its special tokens and what was asked for."""

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
    model: Any, specials: SpecialTokens, given: GenerationOptions, max_new_tokens: int | None
) -> list[str]:
    """Writes special tokens and search settings into a model's configs, over what it has.

    With `max_new_tokens` it has nothing yet, and that is the longest caption unless another is given; else tokens are only
    filled in where it names none.
    Gives a line for each setting that has no effect: those are left out, for transformers refuses to save them.
    Raises UsageError for settings that cannot be.
    """
    if max_new_tokens is not None:
        fresh: Any = GenerationConfig
        model.generation_config = fresh(max_new_tokens=max_new_tokens)
    config = model.generation_config
    config._from_model_config = None  # noqa: SLF001  (else generate() may put the model config's values over these)
    ids = {"bos_token_id": specials.start, "eos_token_id": specials.end, "pad_token_id": specials.pad}
    start = {"decoder_start_token_id": specials.start}
    text = model.config.get_text_config(decoder=True)
    for place, values in ((text, ids), (model.config, ids | start), (config, ids | start)):
        for name, value in values.items():
            if max_new_tokens is not None or getattr(place, name, None) is None:
                setattr(place, name, value)
    asked = {name: value for name, value in asdict(given).items() if value is not None and name != "seed"}
    if "max_new_tokens" in asked:
        config.max_length = None  # of which generate() would warn
    if "min_new_tokens" in asked:
        config.min_length = None
    for name, value in asked.items():
        setattr(config, name, value)
    family = family_of(model.config.to_dict())
    in_force = family.generation(model.config.to_dict(), config.to_dict())
    if lost := [name for name, value in asked.items() if in_force.get(name) != value]:
        raise UsageError(f"a {model.config.model_type} keeps no {flag(lost[0])} of its own: give it to capcli caption")
    settings = resolve(in_force, GenerationOptions())
    holds = family.Step(model).positions
    if settings.max_new_tokens > holds:
        raise UsageError(
            f"--max-new-tokens is {settings.max_new_tokens}, but the decoder holds {holds} tokens: give {holds} or less"
        )
    for name in (*(() if settings.do_sample else SAMPLING), *(BEAM_SEARCH if settings.num_beams == 1 else ())):
        if hasattr(config, name):
            setattr(config, name, None)
    return idle(given, settings)

"""A captioner's folder, as plain transformers and `capcli caption` load it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from capcli.errors import CapcliError
from capcli.models.checkpoint import quiet_transformers
from capcli.models.model_files import PROCESSOR
from capcli.storage.atomic import replace
from capcli.text import is_text, printable


def save_captioner(folder: str | os.PathLike[str], model: Any, tokenizer: Any, processor: Mapping[str, Any]) -> None:
    """Writes config.json, generation_config.json, model.safetensors, the tokenizer's files and preprocessor_config.json.

    Raises CapcliError when they cannot be written.
    """
    place = os.fspath(folder)
    if not is_text(place):
        raise CapcliError(f"The model cannot be written to {printable(place)}: its name is not UTF-8; choose another.")
    try:
        os.makedirs(place, exist_ok=True)
        with quiet_transformers():
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
        text = json.dumps(dict(processor), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        replace(os.path.join(place, PROCESSOR), [text.encode()])
    except Exception as error:  # the writers of weights and of tokenizers raise types of their own
        reason = getattr(error, "strerror", None) or str(error)
        raise CapcliError(f"Cannot write the model to {place}: {reason}.") from error

"""A captioner's folder, as plain transformers and `capcli caption` load it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from capcli.errors import CapcliError
from capcli.models.build import quiet_transformers
from capcli.models.files import PROCESSOR
from capcli.sinks.atomic import replace


def save_captioner(folder: str | os.PathLike[str], model: Any, tokenizer: Any, processor: Mapping[str, Any]) -> None:
    """Writes config.json, generation_config.json, model.safetensors, the tokenizer's files and preprocessor_config.json.

    Raises CapcliError when they cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        text = json.dumps(dict(processor), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        replace(os.path.join(os.fspath(folder), PROCESSOR), [text.encode()])
    except OSError as error:
        raise CapcliError(f"Cannot write the model to {os.fspath(folder)}: {error.strerror or error}.") from error

"""LoRA adapters as the peft package saves them: found with their base model, and merged into its weights at load."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from capcli.errors import CapcliError
from capcli.imports import importing
from capcli.models.hub import find_model
from capcli.models.model_files import ADAPTER, CONFIG, IncompleteError, ModelFiles, ModelListing, file_hash
from capcli.text import printable

WEIGHTS = "adapter_model.safetensors"
MISSING = "the package peft, which merges adapters, is missing: pip install 'capcli[peft]'"
Find = Callable[[str, str | None], ModelFiles]  # of a model's name and revision


def find_with_adapter(
    find: Find, model: str | None, adapter: str | None, revision: str | None, *, quiet: bool
) -> ModelFiles:
    """The files of `model` with those of `adapter`, either of which may be the folder or the name of the other.

    A model that is an adapter alone brings its base model, and so does an adapter where `model` is None. Raises UsageError and
    CapcliError as `find_model`.
    """
    adapter_revision = None
    if model is not None and adapter is None:
        files = find(model, revision)
        if files.config:
            return files
        adapter, model, adapter_revision, revision = model, None, revision, None
    assert adapter is not None
    found = find_model(adapter, adapter_revision, quiet=quiet, take=collect_adapter, option="--adapter")
    base = model or text_in(found.processor, "base_model_name_or_path")
    if base is None:
        raise CapcliError(f"the adapter {adapter} does not name its base model: give --model and --adapter")
    files = find(base, revision if model else text_in(found.processor, "revision"))
    if files.is_engine:
        raise CapcliError(
            f"{files.name} is an engine, into which no adapter can be merged: give the model it was made from"
        )
    return replace(files, name=f"{files.name} with {adapter}", adapter=found.folder)


def collect_adapter(name: str, listing: ModelListing, revision: str | None) -> ModelFiles:
    """Fetches the files of an adapter; its settings are the `processor` of the result. Raises CapcliError."""
    if ADAPTER not in listing.names:
        raise IncompleteError(f"{listing.title} has no {ADAPTER}, so it is not an adapter in the format of peft.")
    if WEIGHTS not in listing.names:
        raise IncompleteError(f"{listing.title} lacks {WEIGHTS}.")
    settings = listing.read_json(ADAPTER)
    if settings.get("peft_type") != "LORA":
        raise CapcliError(
            f"{listing.title} is not a LoRA adapter: {ADAPTER} has the peft_type {settings.get('peft_type')!r}"
        )
    paths = [listing.fetch(file) for file in (ADAPTER, WEIGHTS)]
    return ModelFiles(name, os.path.dirname(paths[0]), revision, {}, settings)


def text_in(settings: dict[str, Any], name: str) -> str | None:
    """A text among an adapter's settings; None where there is none."""
    value = settings.get(name)
    return value if isinstance(value, str) and value else None


def is_adapter(listing: ModelListing) -> bool:
    """Whether a folder has an adapter and no whole model."""
    return ADAPTER in listing.names and CONFIG not in listing.names


def adapter_setting(files: ModelFiles) -> dict[str, str]:
    """The run file's entry for an adapter: a hash of the files that captions depend on."""
    if files.adapter is None:
        return {}
    return {"adapter": " ".join(file_hash(os.path.join(files.adapter, name)) for name in (ADAPTER, WEIGHTS))}


def merged(model: Any, files: ModelFiles) -> Any:
    """The model with its adapter merged into the weights; the model itself where it has none. Raises CapcliError."""
    if files.adapter is None:
        return model
    with importing("peft", "peft", MISSING, "pip install --force-reinstall peft"):
        from peft import PeftModel
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            whole: Any = PeftModel.from_pretrained(model, files.adapter)
            result = whole.merge_and_unload(safe_merge=True)
        except Exception as error:  # peft and safetensors raise many types
            raise CapcliError(
                f"Cannot merge the adapter {files.adapter}: {' '.join(str(error).split())[:300]}"
            ) from error
    if missing := [str(each.message) for each in raised if "missing adapter keys" in str(each.message)]:
        raise CapcliError(f"{files.name}: the adapter does not fit the model: {printable(missing[0])[:200]}")
    return result

"""capcli captions folders of images in bulk. `Captioner` is its Python face; nothing heavy is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from capcli.models.registration import register_models

__version__ = "0.1.0"
__all__ = ["CapcliError", "Caption", "Captioner", "Failure", "UsageError", "__version__"]

if TYPE_CHECKING:
    from capcli.captioning.captioner import Captioner
    from capcli.errors import CapcliError, UsageError
    from capcli.records import Caption, Failure

HOMES = {
    "Captioner": "captioner",
    "Caption": "records",
    "Failure": "records",
    "CapcliError": "errors",
    "UsageError": "errors",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"capcli.{HOMES[name]}"), name)
    raise AttributeError(f"module 'capcli' has no attribute {name!r}")


register_models()

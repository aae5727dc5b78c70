"""capcli captions folders of images in bulk. `Captioner` is its Python interface. Importing capcli does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CapcliError", "Caption", "Captioner", "Failure", "UsageError", "__version__", "register"]

if TYPE_CHECKING:
    from capcli.captioning.captioner import Captioner
    from capcli.errors import CapcliError, UsageError
    from capcli.records import Caption, Failure

MODULES = {
    "Captioner": "captioning.captioner",
    "Caption": "records",
    "Failure": "records",
    "CapcliError": "errors",
    "UsageError": "errors",
}
OWN_ARCHITECTURES = ("prefix", "vision_t5")  # modules of capcli.models that register a model class when imported


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"capcli.{MODULES[name]}"), name)
    raise AttributeError(f"module 'capcli' has no attribute {name!r}")


def register() -> None:
    """Registers capcli's own architectures with transformers' Auto classes, which then load their folders.

    Imports torch and transformers. The `capcli` command does not need it.
    """
    for module in OWN_ARCHITECTURES:
        import_module(f"capcli.models.{module}")

"""capcli captions folders of images in bulk. `Captioner` is its Python interface. Importing capcli does not import torch."""

from __future__ import annotations

import warnings
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
        if name == "Captioner":
            _hide_broken_packages()
        return getattr(import_module(f"capcli.{MODULES[name]}"), name)
    raise AttributeError(f"module 'capcli' has no attribute {name!r}")


def register() -> None:
    """Registers capcli's own architectures with transformers' Auto classes, which then load their folders.

    Imports torch and transformers. The `capcli` command does not need it.
    """
    _hide_broken_packages()
    for module in OWN_ARCHITECTURES:
        import_module(f"capcli.models.{module}")


def _hide_broken_packages() -> None:
    """Prevents that transformers imports optional packages that cannot be imported. Must precede its import."""
    from capcli.imports import UNUSED_BY_CAPTIONING, hide_broken

    for line in hide_broken(UNUSED_BY_CAPTIONING):
        warnings.warn(line, stacklevel=3)

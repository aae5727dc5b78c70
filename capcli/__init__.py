"""capcli captions folders of images in bulk. `Captioner` is its Python interface; nothing heavy is imported before use."""

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
OWN_ARCHITECTURES = ("prefix", "vision_t5")  # modules of capcli.models, each of which registers its own when imported


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"capcli.{MODULES[name]}"), name)
    raise AttributeError(f"module 'capcli' has no attribute {name!r}")


def register() -> None:
    """Make capcli's own architectures known to transformers' Auto classes, so that their folders load as any other.

    Imports torch and transformers. The `capcli` command does not need it.
    """
    for module in OWN_ARCHITECTURES:
        import_module(f"capcli.models.{module}")

"""capcli captions folders of images in bulk. `Captioner` is its Python face; nothing heavy is imported before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capcli.models.registration import register_models

__version__ = "0.1.0"
__all__ = ["Captioner", "__version__"]

if TYPE_CHECKING:
    from capcli.captioner import Captioner


def __getattr__(name: str) -> Any:
    if name == "Captioner":
        from capcli.captioner import Captioner

        return Captioner
    raise AttributeError(f"module 'capcli' has no attribute {name!r}")


register_models()

"""capcli's own architectures with transformers' Auto classes, so that their folders load as any other: a hook, for it is quick.

`import capcli` imports neither transformers nor torch. Where transformers' Auto classes are there already the architectures are
registered at once, else when the import that brings them is over.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"
OWN = ("prefix", "vision_t5")  # the files of this folder that hold one; each calls `register` when it has been read


def register(config: Any, model: Any) -> None:
    """Makes an architecture known to AutoConfig and AutoModel."""
    from transformers import AutoConfig, AutoModel

    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)


def register_models() -> None:
    """Registers them now, or as soon as there is something to register with."""
    if AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    for file in OWN:
        try:
            import_module(f"capcli.models.{file}")
        except ImportError:  # no torch, or a transformers of another age: who uses capcli is told of it by capcli
            return


class _Watch:
    """Sees the modules of transformers come, and registers when the outermost import that brought the Auto classes is over.

    In the midst of it modules are half there, and an architecture's file, which imports many, would meet them.
    """

    def __init__(self) -> None:
        self._depth = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader is the module's from now on, as it was
            self._depth.value = depth = getattr(self._depth, "value", 0) + 1
            try:
                run(module)
            finally:
                self._depth.value = depth - 1
            if depth == 1 and AUTO in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = exec_module

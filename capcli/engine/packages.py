"""The packages that run engines: how to install each, which version is needed, and the error where one cannot be imported."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from capcli.imports import importing


@dataclass(frozen=True, slots=True)
class Package:
    """A runtime's package; an engine fits where the first `binding` numbers of its version are those it was built with."""

    name: str
    title: str
    install: str
    binding: int


ONNXRUNTIME = Package("onnxruntime", "ONNX Runtime", "pip install 'capcli[onnx]'", 2)
TENSORRT = Package("tensorrt", "TensorRT", "pip install 'capcli[trt]'", 4)
RUNTIME: Mapping[str, Package] = {"onnx": ONNXRUNTIME, "tensorrt": TENSORRT}  # by the kind of an engine
FUSED = (1, 25)  # the first ONNX Runtime with TensorScatter and Attention of opset 24
KEEPS = (10, 15)  # the first TensorRT with KVCacheUpdate, to which TensorScatter is converted


def release(version: str, numbers: int = 2) -> tuple[int, ...]:
    """The first numbers of a version: (1, 31) of 1.31.1+cpu."""
    parts = version.split("+")[0].split(".")[:numbers]
    return tuple(int(part) for part in parts if part.isdigit())


def importing_runtime(package: Package) -> AbstractContextManager[None]:
    """A context for the import of the package. Raises CapcliError, which distinguishes a missing from a broken package."""
    missing = f"{package.title} is missing: {package.install}"
    return importing(package.name, package.title, missing, f"{package.install} --force-reinstall")

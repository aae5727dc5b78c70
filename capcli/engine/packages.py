"""The packages that run engines: how to install each, which version is needed, and the error where one cannot be imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from capcli.errors import CapcliError


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


@contextmanager
def importing(package: Package) -> Iterator[None]:
    """A context for the import of the package. Raises CapcliError, which distinguishes a missing from a broken package."""
    try:
        yield
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package.name:
            raise CapcliError(f"{package.title} is missing: {package.install}") from error
        raise CapcliError(
            f"{package.title} is installed but cannot be loaded ({error}): {package.install} --force-reinstall"
        ) from error

"""Why a captioner's files do not load, said so that the user can mend it."""

from __future__ import annotations

import json
import os
import pickle
from typing import BinaryIO

from capcli.errors import CapcliError
from capcli.models.model_files import ModelFiles, list_model, weight_files

LFS_POINTER = b"version https://git-lfs"
MISMATCH = ("size mismatch", "ignore_mismatched_sizes", "mismatched")


def explain_load_error(error: Exception, files: ModelFiles) -> CapcliError:
    """Turn what loading raised into one error that names the file and what to do.

    The weights on disk are looked at first: what a reader says of a truncated file seldom names it.
    """
    broken = broken_weights(files.folder)
    if broken is not None:
        return CapcliError(f"{broken} {_again(files)}")
    if isinstance(error, OSError) and error.errno is not None:
        return CapcliError(f"Cannot read {error.filename or files.folder}: {error.strerror}.")
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text or "Weights only load" in text:
        return CapcliError(
            f"The weights of {files.name} are a pickle that holds more than tensors, and unpickling runs code:"
            " convert them to model.safetensors where you trust them."
        )
    if "trust_remote_code" in text or "custom code" in text:
        return CapcliError(f"{files.name} needs code that it brings along, and capcli runs no code of a model.")
    if any(sign in text for sign in MISMATCH):
        return CapcliError(
            f"The weights of {files.name} do not fit its config.json ({_line(error)}): they are of two models."
            f" {_again(files)}"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return CapcliError(f"Not enough memory to load {files.name}: free some, or use a smaller model.")
    if isinstance(error, ImportError):
        return CapcliError(f"{files.name} needs a Python package that is not installed: {_line(error)}")
    return CapcliError(f"Cannot load {files.name} from {files.folder}: {_line(error)}")


def broken_weights(folder: str) -> str | None:
    """Say which weight file is cut short or not what its name says; None when all look whole."""
    shelf = list_model(folder)
    for name in weight_files(shelf):
        path = shelf.fetch(name)
        try:
            fault = _fault(path)
        except OSError as error:
            fault = error.strerror
        if fault is not None:
            return f"{path} cannot be used: {fault}."
    return None


def _fault(path: str) -> str | None:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            return "it is a Git LFS pointer, not the file (run `git lfs pull` in its repository)"
        if size == 0:
            return "it is empty"
        if not path.endswith(".safetensors"):
            return None
        file.seek(0)
        wanted = _safetensors_size(file, size)
    if wanted is None:
        return "its header is damaged"
    return None if size == wanted else f"it has {size:,} bytes where its header wants {wanted:,}"


def _safetensors_size(file: BinaryIO, size: int) -> int | None:
    """Give the size that the header implies: its length, itself, and the tensors to the last one's end."""
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        return None
    try:
        header = json.loads(file.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return 8 + length + max(ends, default=0)


def _again(files: ModelFiles) -> str:
    if files.revision is None:
        return "Copy the model into its folder again."
    cached = os.path.dirname(os.path.dirname(files.folder))  # all commits: they share the bytes of their files
    return f"Remove {cached}, and the next run downloads the model again."


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

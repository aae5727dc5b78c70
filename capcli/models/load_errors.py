"""The errors of loading a captioner: which file is wrong, and what to do."""

from __future__ import annotations

import json
import os
import pickle
from typing import BinaryIO

from capcli.errors import CapcliError
from capcli.imports import explain_import
from capcli.models.model_files import ModelFiles, list_model, weight_files

LFS_POINTER = b"version https://git-lfs"
MISMATCH = ("size mismatch", "ignore_mismatched_sizes", "mismatched")


def explain_load_error(error: Exception, files: ModelFiles) -> CapcliError:
    """The error for an exception that loading raised, with the file's name and what to do.

    The weight files are checked first: the error of a reader seldom names the file that is truncated.
    """
    broken = broken_weights(files.folder)
    if broken is not None:
        return CapcliError(f"{broken} {replace_advice(files)}")
    if isinstance(error, OSError) and error.errno is not None:
        return CapcliError(f"Cannot read {error.filename or files.folder}: {error.strerror}.")
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text or "Weights only load" in text:
        return CapcliError(
            f"The weights of {files.name} are a pickle that contains more than tensors, and unpickling runs code:"
            " convert them to model.safetensors if you trust them."
        )
    if "trust_remote_code" in text or "custom code" in text:
        return CapcliError(f"{files.name} needs the code in its repository, and capcli runs no code of a model.")
    if any(sign in text for sign in MISMATCH):
        return CapcliError(
            f"The weights of {files.name} do not fit its config.json ({first_line(error)}): they belong to different models."
            f" {replace_advice(files)}"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return CapcliError(f"Not enough memory to load {files.name}: free some memory, or use a smaller model.")
    if package := explain_import(error):
        return CapcliError(f"Cannot load {files.name}: {package}")
    if isinstance(error, ImportError):
        return CapcliError(f"{files.name} needs a Python package that is not installed: {first_line(error)}")
    return CapcliError(f"Cannot load {files.name} from {files.folder}: {first_line(error)}")


def broken_weights(folder: str) -> str | None:
    """A message about the first weight file that is truncated or of another format; None when all look complete."""
    listing = list_model(folder)
    for name in weight_files(listing):
        path = listing.fetch(name)
        try:
            fault = weight_fault(path)
        except OSError as error:
            fault = error.strerror
        if fault is not None:
            return f"{path} cannot be used: {fault}."
    return None


def weight_fault(path: str) -> str | None:
    """What is wrong with a weight file, by its size and header; None when nothing is."""
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
        expected = safetensors_size(file, size)
    if expected is None:
        return "its header is damaged"
    return None if size == expected else f"it has {size:,} bytes where its header gives {expected:,}"


def safetensors_size(file: BinaryIO, size: int) -> int | None:
    """The file size by its header (8 bytes of length, the header, the tensors); None for a damaged header."""
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        return None
    try:
        header = json.loads(file.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        return None
    return 8 + length + max(ends, default=0)


def replace_advice(files: ModelFiles) -> str:
    if files.revision is None:
        return "Copy the model into its folder again."
    cached = os.path.dirname(os.path.dirname(files.folder))  # the folder of all commits, which share their files
    return f"Remove {cached}, and the next run downloads the model again."


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

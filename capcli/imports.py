"""Imports of packages that may be missing or broken: what capcli does without, and errors that name the fix."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType

from capcli.errors import CapcliError
from capcli.text import printable

# Packages that transformers and torch import with the modules that captioning needs, where they are installed. Captioning
# uses none of them, so the check of an import costs nothing that is not spent anyway.
UNUSED = (
    "pynvml",
    "jinja2",
    "psutil",
    "triton",
    "scipy",
    "hqq",
    "torchao",
    "torchdistx",
    "torch_npu",
    "torchvision",
    "soundfile",
    "soxr",
    "torchaudio",
)
UNUSED_BY_CAPTIONING = (*UNUSED, "accelerate", "sentencepiece")
UNUSED_BY_TRAINING = (*UNUSED, "datasets", "sklearn", "peft")
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "google": "protobuf"}  # packages of another name in pip
CORE = ("PIL", "click", "huggingface_hub", "numpy", "rich", "safetensors", "tokenizers", "torch", "transformers")
SEE_DOCTOR = "`capcli doctor` lists what else is missing or broken"

MORE_FILES = "this process may not open enough files: raise the limit, ulimit -n 1024"

_hidden: dict[str, str] = {}  # why these packages cannot be imported


def hide_broken(names: Iterable[str]) -> list[str]:
    """Make packages that are installed but cannot be imported count as not installed in this process; a warning for each.

    transformers uses an optional package if `find_spec` finds it, which finds packages that cannot be imported too: a
    torchvision that was built for another torch would prevent captioning, which does not need torchvision.
    """
    warnings = []
    for name in names:
        if name in sys.modules or find_spec(name) is None:
            continue
        try:
            import_module(name)
        except Exception as error:
            if lacks_core(error) or lacks_files(error):
                break  # captioning fails too, with an error that names that package
            sys.modules[name] = None  # type: ignore[assignment]  # find_spec then finds nothing
            _hidden[name] = cause(error)
            warnings.append(f"doing without {name}, which cannot be imported ({_hidden[name]}): see `capcli doctor`")
    return warnings


@contextmanager
def importing(package: str, title: str, missing: str, fix: str) -> Iterator[None]:
    """A context for the import of one package. Raises CapcliError: `missing`, or that it is broken, with the command `fix`."""
    try:
        yield
    except Exception as error:
        if is_missing(error, package):
            raise CapcliError(missing) from error
        if lacks_files(error):
            raise CapcliError(MORE_FILES) from error
        raise CapcliError(f"{title} is installed but cannot be loaded ({cause(error)}): {fix}") from error


def is_missing(error: BaseException, package: str) -> bool:
    """Whether an import failed because `package` itself is not installed."""
    return isinstance(error, ModuleNotFoundError) and error.name == package and package not in _hidden


def explain_import(error: BaseException) -> str | None:
    """The message for an error that the import of a package raised: its name and the fix; None for any other error.

    An error for want of open files, which an import may meet first, has a message too.
    """
    if lacks_files(error):
        return MORE_FILES
    while error.__cause__ is not None:  # transformers raises another error from the one of the import
        error = error.__cause__
    importer, name = importing_package(error.__traceback__), imported(error)
    if name in _hidden:
        return broken(name, _hidden[name])
    if isinstance(error, ModuleNotFoundError) and name and (importer is None or name in CORE):
        use = ", which capcli needs" if name in CORE else ""
        return f"the package {printable(name)} is missing{use}: pip install {distribution(name)}; {SEE_DOCTOR}"
    importer = importer or name
    return broken(importer, cause(error)) if importer else None


def imported(error: BaseException) -> str:
    """The package that an ImportError names; empty for other errors and for capcli's own modules."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    return "" if name == "capcli" else name


def lacks_files(error: BaseException | None) -> bool:
    """Whether the cause of an error is the limit on open files (`ulimit -n`)."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def lacks_core(error: BaseException) -> bool:
    """Whether an import failed because one of capcli's required packages is missing or broken."""
    missing = isinstance(error, ModuleNotFoundError) and imported(error) in CORE
    return missing or importing_package(error.__traceback__) in CORE


def broken(name: str, reason: str) -> str:
    """The message about a package that is installed but cannot be imported, without a full stop."""
    fix = f"pip install --force-reinstall {distribution(name)}"
    return f"the package {name} is installed but cannot be imported ({reason}): {fix}; {SEE_DOCTOR}"


def cause(error: BaseException) -> str:
    """An error's type and message on one line; for an import that was hidden, the error that was the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    if (name := getattr(error, "name", None)) in _hidden:
        return _hidden[name]
    text = printable(" ".join(str(error).split()))[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def distribution(package: str) -> str:
    """The name under which pip knows a package."""
    return DISTRIBUTIONS.get(package, package).replace("_", "-")


def importing_package(trace: TracebackType | None) -> str | None:
    """The package whose import was interrupted by the error of this traceback; None where none of another project was.

    It is that of the innermost module whose top-level code was running.
    """
    package = None
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "<module>":
            package = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
        trace = trace.tb_next
    own = package in ("capcli", "__main__") or package in sys.stdlib_module_names
    return None if own else package

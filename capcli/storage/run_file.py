"""The run file, `captions.run.json` beside `captions.jsonl`: the settings of a run and its progress.

A later run with the same output reads it, and continues only where its own settings would give the same captions.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capcli.errors import CapcliError, UsageError
from capcli.storage import atomic
from capcli.text import printable

_SUFFIX = ".run.json"
_UNSET = object()


ALL_RELATIVE = "relative to folder"


@dataclass(frozen=True)
class RunFile:
    """The content of a run file. `data` is its JSON object.

    `settings` are what the captions depend on. Properties are None, False or empty where the file has no such key, as
    those of earlier versions may.
    """

    data: Mapping[str, Any]

    @classmethod
    def beside(cls, out: str, *, overwrite: bool = False) -> RunFile | None:
        """The run file of the captions file `out`; None where there is none, and with `overwrite` where it is unreadable.

        Raises CapcliError where it cannot be read, unless it is a link, which is going to be replaced.
        """
        path = f"{stem_beside(out)}{_SUFFIX}"
        try:
            data = read(path)
        except CapcliError:
            if overwrite or os.path.islink(path):
                return None
            raise
        return None if data is None else cls(data)

    def write(self, path: str, out: str) -> None:
        """Write the run file of the captions file `out` to `path`, atomically. Raises CapcliError."""
        write(path, {**self.data, "output": os.path.basename(out)})

    @property
    def settings(self) -> Mapping[str, Any]:
        found = self.data.get("settings")
        return found if isinstance(found, Mapping) else {}

    @property
    def dtype(self) -> str | None:
        return self.settings.get("dtype")

    @property
    def gpu_decode(self) -> bool:
        return bool(self.settings.get("gpu_decode"))

    @property
    def folder(self) -> str | None:
        """The folder (a real path) that names of images are relative to; None where they are paths as given."""
        return self.data.get("folder")

    @property
    def source(self) -> str:
        return str(self.data.get("source", ""))

    @property
    def all_relative(self) -> bool:
        """Whether the names of all images are relative to `folder`, also those of images outside it."""
        return self.data.get("names") == ALL_RELATIVE

    @property
    def refreshing(self) -> bool:
        """Whether a run that captions changed images again did not get to the end: they may have two rows."""
        return bool(self.data.get("refresh"))

    @property
    def device(self) -> str:
        return str(self.data.get("device", ""))

    @property
    def threads(self) -> int | None:
        return self.data.get("threads")

    @property
    def batch_size(self) -> int | None:
        """The value of --batch-size; None if it was chosen automatically."""
        return self.data.get("batch_size")

    @property
    def finished(self) -> bool:
        """Whether the run processed its whole source: it was neither interrupted nor killed."""
        return self.data.get("state") == "finished"

    @property
    def shapes(self) -> tuple[int, int, int] | None:
        """Slots and chunk of each decode loop, and the number of loops."""
        try:
            shapes = self.data["shapes"]
            return int(shapes["slots"]), int(shapes["chunk"]), int(shapes.get("loops", 1))
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def with_facts(self, facts: Mapping[str, Any]) -> RunFile:
        """A copy with these keys replaced; of `versions`, which has other keys too, only those in `facts`."""
        versions = {**self.data.get("versions", {}), **facts.get("versions", {})}
        return RunFile({**self.data, **facts, "versions": versions})

    def ended(self, state: str, counts: Mapping[str, int], last_run: Mapping[str, float]) -> RunFile:
        """A copy for the end of a run: `counts` of all rows on disk, and the figures of the `last_run`."""
        data = {name: value for name, value in self.data.items() if name != "refresh"}
        return RunFile({**data, "state": state, "counts": dict(counts), "last_run": dict(last_run)})

    @property
    def has_captions(self) -> bool:
        """Whether the run, when it ended, had captions."""
        counts = self.data.get("counts")
        return isinstance(counts, Mapping) and bool(counts.get("captions"))

    def refuse_other_settings(self, new: RunFile, out: str | None) -> None:
        """Raises UsageError, naming the differences, unless `new` gives the same captions as this run."""
        if lines := difference(self.settings, new.settings):
            raise UsageError(
                f"{out} was started with other settings: {'; '.join(lines)}. Use those, choose another --out, or start "
                "from scratch with --overwrite"
            )


def stem_beside(out: str) -> str:
    """What the names of the files beside the captions file `out` begin with: `captions` for `captions.jsonl`.

    It is the whole name, `captions.csv`, where another captions file, `captions.jsonl`, has the files of that stem.
    """
    folder, name = os.path.split(out)
    stem = os.path.splitext(out)[0]
    if os.path.lexists(f"{out}{_SUFFIX}"):
        return out
    try:
        owner = str((read(f"{stem}{_SUFFIX}") or {}).get("output", name))
    except CapcliError:
        return stem
    return out if owner != name and os.path.exists(os.path.join(folder, owner)) else stem


def read(path: str) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. Raises CapcliError where it cannot be read."""
    try:
        with open(path, "rb", opener=_open_regular) as stream:
            data = json.loads(stream.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CapcliError(
            f"cannot read the run file {printable(path)}: {error}; start from scratch with --overwrite"
        ) from None
    if not isinstance(data, dict):
        raise CapcliError(f"{printable(path)} is not a run file of capcli; choose another --out")
    return data


def _open_regular(path: str, flags: int) -> int:
    """An opener for `open` that refuses pipes and devices, whose content may never end. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file")


def write(path: str, data: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, atomically. Raises CapcliError."""
    # json.dumps leaves lone surrogates, the bytes of paths that are not UTF-8, as they are: here they become \udc..
    text = json.dumps(data, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace") + b"\n"
    try:
        atomic.replace(path, [text])
    except OSError as error:
        raise CapcliError(f"cannot write {printable(path)}: {error.strerror or error}") from error


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each setting that differs, in the order of `new`: "num_beams was 4, is now 1"."""
    before, after = _flat(old), _flat(new)
    lines = []
    for name in dict.fromkeys((*after, *before)):
        was, now = before.get(name, _UNSET), after.get(name, _UNSET)
        if was != now or isinstance(was, bool) != isinstance(now, bool):
            lines.append(f"{name} was {_shown(was)}, is now {_shown(now)}")
    return lines


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings after a round trip through JSON, nested names joined with dots."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value))
    return flat


def _shown(value: Any) -> str:
    return "not set" if value is _UNSET else json.dumps(value, ensure_ascii=False)

"""The run file, `captions.run.json` beside `captions.jsonl`: the settings of a run and its progress.

A later run with the same output reads it, and continues only where its own settings would give the same captions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capcli.errors import CapcliError, UsageError
from capcli.storage import atomic
from capcli.text import printable

_UNSET = object()


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

        Raises CapcliError where it cannot be read, and UsageError where it belongs to another captions file that differs
        only in its suffix.
        """
        try:
            data = read(path_beside(out))
        except CapcliError:
            if overwrite:
                return None
            raise
        if data is None:
            return None
        name = os.path.basename(out)
        owner = str(data.get("output", name))
        if owner != name and os.path.exists(os.path.join(os.path.dirname(out), owner)):
            raise UsageError(
                f"the run file {printable(path_beside(out))} belongs to {printable(owner)}: choose another --out"
            )
        return cls(data)

    def write_beside(self, out: str) -> None:
        """Write the run file of the captions file `out`, atomically. Raises CapcliError."""
        write(path_beside(out), {**self.data, "output": os.path.basename(out)})

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

    def with_shapes(self, *, loops: int, slots: int, chunk: int, rows: int, pool: int) -> RunFile:
        """A copy with the shapes of all tensors of the run: `rows` of a slot, and entries of its `pool`."""
        shapes = {"loops": loops, "slots": slots, "chunk": chunk, "rows": rows, "pool": pool}
        return RunFile({**self.data, "shapes": shapes})

    def ended(self, state: str, counts: Mapping[str, int], last_run: Mapping[str, float]) -> RunFile:
        """A copy for the end of a run: `counts` of all rows on disk, and the figures of the `last_run`."""
        return RunFile({**self.data, "state": state, "counts": dict(counts), "last_run": dict(last_run)})

    def refuse_other_settings(self, new: RunFile, out: str | None) -> None:
        """Raises UsageError, naming the differences, unless `new` gives the same captions as this run."""
        if lines := difference(self.settings, new.settings):
            raise UsageError(
                f"{out} was started with other settings: {'; '.join(lines)}. Use those, choose another --out, or start "
                "from scratch with --overwrite"
            )


def path_beside(out: str) -> str:
    """The path of the run file of the captions file `out`."""
    return f"{os.path.splitext(out)[0]}.run.json"


def read(path: str) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. Raises CapcliError where it cannot be read."""
    try:
        with open(path, "rb") as stream:
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

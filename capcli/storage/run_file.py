"""The receipt beside the captions: what a run was, so that a later one can tell whether it may go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from capcli.errors import CapcliError
from capcli.storage import atomic
from capcli.text import printable

_UNSET = object()


def read(path: str) -> dict[str, Any] | None:
    """The receipt, None where there is none; raises CapcliError where it cannot be read."""
    try:
        with open(path, "rb") as stream:
            data = json.loads(stream.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CapcliError(f"cannot read the receipt {printable(path)}: {error}; --overwrite starts anew") from None
    if not isinstance(data, dict):
        raise CapcliError(f"{printable(path)} is no receipt of this command; choose another --out")
    return data


def write(path: str, data: Mapping[str, Any]) -> None:
    """Write the receipt, whole or not at all; raises CapcliError."""
    # Bytes of paths that are not UTF-8 become the escapes that JSON has for them.
    text = json.dumps(data, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace") + b"\n"
    try:
        atomic.replace(path, [text])
    except OSError as error:
        raise CapcliError(f"cannot write the receipt {printable(path)}: {error.strerror or error}") from error


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each setting that is not the same in both, in the order of `new`: "num_beams was 4, is now 1"."""
    before, after = _flat(old), _flat(new)
    lines = []
    for name in dict.fromkeys((*after, *before)):
        was, now = before.get(name, _UNSET), after.get(name, _UNSET)
        if was != now or isinstance(was, bool) != isinstance(now, bool):
            lines.append(f"{name} was {_shown(was)}, is now {_shown(now)}")
    return lines


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings as they come back from a file, nested names joined with dots."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value))
    return flat


def _shown(value: Any) -> str:
    return "not set" if value is _UNSET else json.dumps(value, ensure_ascii=False)

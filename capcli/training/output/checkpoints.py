"""The checkpoints of a run: which are whole, which are the best and are kept, and which one a run goes on from."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, Literal

MARK = "capcli.json"  # written last: a checkpoint that has it is whole
# What only a run that goes on needs, and the best that are kept for their captions do not.
STATE = re.compile(r"optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")
Select = Literal["loss", "cider"]
Merit = tuple[float, ...]


def whole(folder: str) -> dict[int, str]:
    """Checkpoints in `folder` by step: those that were written to their end."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = {
        int(match[1]): os.path.join(folder, name)
        for name in names
        if (match := re.fullmatch(r"checkpoint-(\d+)", name))
    }
    return {step: path for step, path in sorted(found.items()) if os.path.exists(os.path.join(path, MARK))}


def latest(folder: str) -> str | None:
    """The checkpoint to go on from: the last that holds the optimizer too."""
    resumable = [path for path in whole(folder).values() if os.path.exists(os.path.join(path, "optimizer.pt"))]
    return resumable[-1] if resumable else None


def ranking(log: Iterable[Mapping[str, Any]], select: Select) -> list[tuple[int, Merit]]:
    """The steps that were evaluated and how good each was, higher is better, in order of time.

    For equal CIDEr the lower validation loss is better; of what is equal in all the earlier is the best.
    """
    key = "eval_loss" if select == "loss" else "eval_CIDEr"
    return [(entry["step"], _merit(entry, select)) for entry in log if key in entry]


def _merit(entry: Mapping[str, Any], select: Select) -> Merit:
    merit = (-entry["eval_loss"],) if select == "loss" else (entry["eval_CIDEr"], -entry["eval_loss"])
    return tuple(-math.inf if math.isnan(value) else value for value in merit)


def best(folder: str, ranked: Iterable[tuple[int, Merit]], count: int) -> list[int]:
    """The steps of the best `count` checkpoints that are there, the best first; of equals the earlier."""
    there = whole(folder)
    by_merit = sorted(sorted(ranked), key=lambda each: each[1], reverse=True)  # stable: the earlier first
    return [step for step, _ in by_merit if step in there][:count]


def prune(folder: str, keep: Iterable[int]) -> None:
    """Leaves the latest checkpoint, and of `keep` what captions need; a torn one goes too."""
    kept = set(keep)
    there = whole(folder)
    last = max(there, default=None)
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        step = int(name.rpartition("-")[2]) if re.fullmatch(r"checkpoint-\d+", name) else None
        if step is None or step == last:
            continue
        if step not in kept or step not in there:
            shutil.rmtree(path)
            continue
        for file in os.listdir(path):
            if STATE.fullmatch(file):
                os.remove(os.path.join(path, file))

"""The checkpoints of a run: which are complete, which are the best, which to resume from, which to delete."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, Literal

COMPLETE = "capcli.json"  # the file of a checkpoint that is written last
# Files that only a resumed run reads: the best checkpoints are kept without them.
TRAINING_STATE = re.compile(r"optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")
Select = Literal["loss", "cider"]
Rank = tuple[float, ...]


def complete(folder: str) -> dict[int, str]:
    """The paths of the complete checkpoints in `folder` by step, in the order of steps."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = {
        int(match[1]): os.path.join(folder, name)
        for name in names
        if (match := re.fullmatch(r"checkpoint-(\d+)", name))
    }
    return {step: path for step, path in sorted(found.items()) if os.path.exists(os.path.join(path, COMPLETE))}


def latest(folder: str) -> str | None:
    """The checkpoint to resume from: the last complete one that includes the optimizer."""
    resumable = [path for path in complete(folder).values() if os.path.exists(os.path.join(path, "optimizer.pt"))]
    return resumable[-1] if resumable else None


def ranking(log: Iterable[Mapping[str, Any]], select: Select) -> list[tuple[int, Rank]]:
    """The steps of the evaluations in a Trainer's log, in its order, each with its rank: higher is better.

    Of equal CIDEr the lower validation loss is better; of equal ranks the earlier step is the best.
    """
    key = "eval_loss" if select == "loss" else "eval_CIDEr"
    return [(entry["step"], _rank(entry, select)) for entry in log if key in entry]


def _rank(entry: Mapping[str, Any], select: Select) -> Rank:
    rank = (-entry["eval_loss"],) if select == "loss" else (entry["eval_CIDEr"], -entry["eval_loss"])
    return tuple(-math.inf if math.isnan(value) else value for value in rank)


def best(folder: str, ranked: Iterable[tuple[int, Rank]], count: int) -> list[int]:
    """The steps of the `count` best complete checkpoints in `folder`, the best first."""
    existing = complete(folder)
    by_rank = sorted(sorted(ranked), key=lambda item: item[1], reverse=True)  # stable: the earlier step first
    return [step for step, _ in by_rank if step in existing][:count]


def prune(folder: str, keep: Iterable[int]) -> None:
    """Deletes all checkpoints but the latest and those of the steps in `keep`, of which the training state is deleted."""
    existing, keep = complete(folder), set(keep)
    last = max(existing, default=None)
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        step = int(name.rpartition("-")[2]) if re.fullmatch(r"checkpoint-\d+", name) else None
        if step is None or step == last:
            continue
        if step not in keep or step not in existing:
            shutil.rmtree(path)
            continue
        for file in os.listdir(path):
            if TRAINING_STATE.fullmatch(file):
                os.remove(os.path.join(path, file))

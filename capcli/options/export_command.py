"""Builds and edits the command line of an export, also for the advice in error messages.

An engine stores the command that built it. Everything that edits such a command is here, below `capcli.engine`, which
therefore needs no option names of its own.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence

from capcli.options.export import ExportOptions
from capcli.text import counted

# The options that take a value, and the values that an export may write.
VALUES = {
    "--model": ".+",
    "--out": ".+",
    "--revision": r"[\w./-]+",
    "--dtype": r"\w+",
    "--profile": r"\w+",
    "--quantize": r"\w+",
    "--num-beams": r"\d+",
    "--max-new-tokens": r"\d+",
    "--batch-sizes": r"[\d,]+",
    "--device": r"(auto|cpu|cuda)(:\d+)?",
}
OUT, BEAMS, LENGTH, BATCHES = "--out", "--num-beams", "--max-new-tokens", "--batch-sizes"


def export_command(options: ExportOptions, out: str) -> tuple[str, ...]:
    """The command that builds an engine with these options again, in the folder `out`."""
    model = os.path.abspath(options.model) if os.path.isdir(options.model) else options.model
    values: list[tuple[str, object]] = [
        ("--model", model),
        (OUT, out),
        ("--revision", options.revision),
        ("--dtype", options.dtype),
        ("--profile", options.profile),
        ("--quantize", options.quantize),
    ]
    if options.kind == "tensorrt":
        values += [(BEAMS, options.num_beams), (LENGTH, options.max_new_tokens)]
        values += [(BATCHES, ",".join(map(str, options.batch_sizes)))]
    values += [("--device", None if options.device == "auto" else options.device)]
    words = [word for name, value in values if value is not None for word in (name, str(value))]
    words += ["--force"] * options.force
    return ("capcli", "export", "--onnx" if options.kind == "onnx" else "--trt", *words, "--overwrite")


def checked_command(command: Sequence[str]) -> tuple[str, ...]:
    """The export that `command` describes, built from its options one by one. `command` may have any author.

    Raises ValueError for anything but an export, and for values that no export writes.
    """
    options, flags = list(command[3:]), {"--force", "--overwrite"}
    if tuple(command[:2]) != ("capcli", "export") or command[2] not in ("--onnx", "--trt"):
        raise ValueError("its command is not an export")
    words: list[str] = []
    while options:
        name = options.pop(0)
        if name in flags:
            words.append(name)
        elif name in VALUES and options and re.fullmatch(VALUES[name], options[0]) and options[0].isprintable():
            words += [name, options.pop(0)]
        else:
            raise ValueError("its command is not an export")
    return (*command[:3], *words)


def with_options(command: Sequence[str], options: Mapping[str, object]) -> tuple[str, ...]:
    """`command` with other values for some of its options; an option that it lacks is appended."""
    changed = list(command)
    for name, value in options.items():
        if name in changed[:-1]:
            changed[changed.index(name) + 1] = str(value)
        else:
            changed += [name, str(value)]
    return tuple(changed)


def in_folder(command: Sequence[str], folder: str) -> tuple[str, ...]:
    """`command` with the folder `folder` as its output."""
    return with_options(command, {OUT: folder})


def finishing(command: Sequence[str]) -> tuple[str, ...]:
    """The command that builds the plans of the unfinished engine that `command` wrote to its output folder."""
    return ("capcli", "export", "--trt", "--model", command[command.index(OUT) + 1])


def too_many_slots(command: Sequence[str], sizes: Sequence[int], largest: int, slots: int) -> str:
    """The error for a run of `slots` slots where the largest plan that fits its search has `largest`.

    `command` built the engine with plans of the batch sizes `sizes`; the error gives the one that adds a plan for the run.
    """
    again = with_options(command, {BATCHES: ",".join(map(str, sorted({slots, *sizes})))})
    return (
        f"the engine was built for --batch-size {largest} at most, and this run needs {slots}: "
        f"give less, or build the engine for it ({shlex.join(again)})"
    )


def too_large_search(
    command: Sequence[str],
    built: Sequence[tuple[int, int]],
    *,
    num_beams: int,
    rows: int,
    max_new_tokens: int,
    prompt: int,
) -> str:
    """The error for a search that is larger than every plan of an engine.

    `built` are (rows, tokens of a caption) of the plans. The search has `rows` rows a slot, which are its beams or its
    samples, and a prompt that uses as many pool entries as `prompt` caption tokens.
    """
    limits = ", ".join(f"{BEAMS} {beams} and up to {LENGTH} {length}" for beams, length in sorted(set(built)))
    run = f"{BEAMS} {rows}"
    if num_beams != rows:
        run = f"{rows} samples per image, which count as {run},"
    after = f", plus {counted(prompt, 'token')} of a prompt" if prompt else ""
    again = with_options(command, {BEAMS: rows, LENGTH: max_new_tokens + math.ceil(prompt / rows)})
    return (
        f"the engine was built for {limits}; this run needs {run} and {LENGTH} {max_new_tokens}{after}: "
        f"build the engine for it ({shlex.join(again)})"
    )

"""engine.json: what an engine folder holds, what it was built from and for, and whether it fits this machine. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from capcli.errors import CapcliError, UsageError
from capcli.sinks import atomic

ENGINE, ENCODE, STEP = "engine.json", "encode.onnx", "step.onnx"
FORMAT = 1
Kind = Literal["onnx", "tensorrt"]


@dataclass(frozen=True, slots=True)
class Memory:
    """One image's memory in a decoder layer: heads, positions and the size of a head, alike in all layers.

    `prefixed`: it is no memory for cross-attention, but the first entries of the pool.
    """

    layers: int
    heads: int
    positions: int
    head_size: int
    prefixed: bool = False


@dataclass(frozen=True, slots=True)
class Bucket:
    """The fixed shapes of one plan: slots, images encoded at a time, rows of a slot, entries of its pool."""

    slots: int
    chunk: int
    rows: int
    entries: int


@dataclass(frozen=True)
class Engine:
    """An engine as its engine.json tells of it.

    `files` gives the SHA-256 of every graph, plan and weight file by name; `versions` and `gpu` (a name and a compute
    capability; None: any machine) are those it was proved with; `buckets` are a plan's shapes, none for ONNX, which takes
    any. `proof` is what the proof saw, with `passed`; `command` builds it again.
    """

    kind: Kind
    profile: str
    opset: int
    dtype: str
    quantize: str | None
    captioner: Mapping[str, Any]
    pixels: tuple[int, int]
    memory: Memory
    positions: int
    vocabulary: int
    command: Sequence[str]
    capcli: str
    files: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)
    gpu: Mapping[str, str] | None = None
    buckets: tuple[Bucket, ...] = ()
    proof: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rebuild(self) -> str:
        """The command that builds it again, for a shell."""
        return shlex.join(self.command)

    def bucket(self, slots: int, rows: int, entries: int) -> Bucket:
        """The smallest bucket with room for `slots`, else the largest. Raises UsageError for rows or entries of no plan."""
        fitting = [b for b in self.buckets if b.rows == rows and b.entries >= entries]
        if not fitting:
            image = self.memory.positions if self.memory.prefixed else 0
            limits = sorted({(b.rows, (b.entries - image) // b.rows) for b in self.buckets})
            shown = ", ".join(f"--num-beams {rows} up to --max-new-tokens {length}" for rows, length in limits)
            raise UsageError(
                f"the engine was built for {shown}; this asks for {rows} rows and a pool of {entries} entries: "
                f"build it for that ({self.rebuild})"
            )
        enough = [b for b in fitting if b.slots >= slots]
        return min(enough, key=lambda b: b.slots) if enough else max(fitting, key=lambda b: b.slots)


def is_engine(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, ENGINE))


def write_engine(folder: str, engine: Engine) -> None:
    """Writes engine.json, last of all: a folder that has it is whole."""
    known = {"format": FORMAT, **asdict(engine)}
    atomic.replace(os.path.join(folder, ENGINE), [(json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode()])


def read_engine(folder: str) -> Engine:
    """Raises CapcliError for an engine.json that is none, or of another capcli's format."""
    path = os.path.join(folder, ENGINE)
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        if known.pop("format") != FORMAT:
            raise CapcliError(
                f"{path} is of another version of capcli: build the engine again ({shlex.join(known.get('command', []))})"
            )
        known["memory"] = Memory(**known["memory"])
        known["buckets"] = tuple(Bucket(**each) for each in known["buckets"])
        known["pixels"] = tuple(known["pixels"])
        if not all(isinstance(known[name], dict) for name in ("captioner", "files", "versions", "proof")):
            raise TypeError("a table is none")
        return Engine(**known)
    except OSError as error:
        raise CapcliError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CapcliError(f"{path} is damaged ({error}): build the engine again") from error


def file_hash(path: str) -> str:
    """The SHA-256 of a file. Raises CapcliError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CapcliError(f"{path} cannot be read: {error.strerror}") from error


def hash_files(folder: str, names: Sequence[str]) -> dict[str, str]:
    return {name: file_hash(os.path.join(folder, name)) for name in names}


def refuse_tampered(folder: str, engine: Engine) -> None:
    """Raises CapcliError unless every file but the generation settings is the one that was proved."""
    unfit = sorted({ENCODE, STEP} - set(engine.files)) if engine.kind == "onnx" else []
    if unfit or not engine.files:
        raise CapcliError(
            f"{os.path.join(folder, ENGINE)} is damaged: it does not name {', '.join(unfit) or 'any file'}"
        )
    if not os.path.exists(os.path.join(folder, "generation_config.json")):
        raise CapcliError(f"{folder} lacks generation_config.json: build the engine again ({engine.rebuild})")
    for name, digest in engine.files.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise CapcliError(f"{folder} lacks {name}: build the engine again ({engine.rebuild})")
        if file_hash(path) != digest:
            raise CapcliError(
                f"{path} is not the file that was built and proved (its hash differs from {ENGINE}'s): "
                f"build the engine again ({engine.rebuild})"
            )


def misfits(engine: Engine, versions: Mapping[str, str], gpu: Mapping[str, str] | None) -> list[str]:
    """What of this machine is not as when the engine was built, a line each; only runtimes' own versions and GPUs count."""
    lines = []
    for name, built in engine.versions.items():
        here = versions.get(name)
        if here is not None and release(name, here) != release(name, built):
            lines.append(f"it was built with {name} {built}, and here is {here}")
    if engine.gpu is not None and gpu != engine.gpu:
        here_gpu = gpu["name"] if gpu else "none"
        lines.append(f"it was built on a {engine.gpu['name']}, and the GPU here is {here_gpu}")
    return lines


def release(name: str, version: str) -> tuple[str, ...]:
    """What of a version decides whether an engine fits: major and minor; for TensorRT, whose plans are bound to it, all."""
    parts = tuple(version.split("+")[0].split("."))
    return parts if name == "tensorrt" else parts[:2]


def refuse_misfit(folder: str, engine: Engine, versions: Mapping[str, str], gpu: Mapping[str, str] | None) -> None:
    """Raises CapcliError, naming the command that rebuilds it, for an engine of another machine."""
    lines = misfits(engine, versions, gpu)
    if lines:
        raise CapcliError(
            f"the engine {folder} does not fit this machine: {'; '.join(lines)}. Build it again: {engine.rebuild}"
        )

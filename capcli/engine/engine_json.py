"""engine.json: what an engine folder holds, what it was built from and for, and with which command. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from capcli.decoding.settings import Settings
from capcli.engine.packages import TENSORRT
from capcli.errors import CapcliError, UsageError
from capcli.models.model_files import ENGINE, ModelFiles, file_hash
from capcli.storage import atomic

ENCODE, STEP = "encode.onnx", "step.onnx"
ENGINES = "CAPCLI_ENGINES"
FORMAT = 1
Kind = Literal["onnx", "tensorrt"]


@dataclass(frozen=True, slots=True)
class Memory:
    """One image's memory in a decoder layer: heads, positions and the size of a head, alike in all layers.

    `prefixed`: it is no memory for cross-attention, but the first entries of the pool. `asked`: the words of a question,
    which encode reads beside the pixels, come on top of `positions`.
    """

    layers: int
    heads: int
    positions: int
    head_size: int
    prefixed: bool = False
    asked: bool = False

    @property
    def names(self) -> list[str]:
        """k0, v0, k1, ...: what graphs and plans call the tensors of a memory or a pool, after `memory_` or `pool_`."""
        return [f"{kind}{layer}" for layer in range(self.layers) for kind in "kv"]

    @property
    def image_entries(self) -> int:
        """How many entries of the pool are an image's."""
        return self.positions if self.prefixed else 0


@dataclass(frozen=True, slots=True)
class Bucket:
    """The fixed shapes of one plan: slots, images encoded at a time, rows of a slot, entries of its pool."""

    slots: int
    chunk: int
    rows: int
    entries: int


def encode_plan(chunk: int) -> str:
    """The file of the plan that encodes so many images at a time."""
    return f"encode-E{chunk}.plan"


def step_plan(bucket: Bucket) -> str:
    return f"step-S{bucket.slots}-R{bucket.rows}-N{bucket.entries}.plan"


def plan_files(buckets: Sequence[Bucket]) -> list[str]:
    """The files that plans of these buckets are: several may share the plan of one chunk."""
    return sorted({name for bucket in buckets for name in (encode_plan(bucket.chunk), step_plan(bucket))})


@dataclass(frozen=True)
class Engine:
    """An engine as its engine.json tells of it.

    `files` gives the SHA-256 of every file but engine.json and the generation settings by name; `versions` and `gpu` (a
    name and a compute capability; None: any machine) are those it was proved with; `buckets` are a plan's shapes, none for
    ONNX, which takes any, and `graphs` the hashes of the ONNX files that plans were built from. `proof` is what the proof
    saw, with `passed`; `command` builds it again, where it lies now.
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
    graphs: Mapping[str, str] = field(default_factory=dict)
    gpu: Mapping[str, str] | None = None
    buckets: tuple[Bucket, ...] = ()
    proof: Mapping[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """What it computes in: int8, or its dtype."""
        return self.quantize or self.dtype

    @property
    def rebuild(self) -> str:
        """The command that builds it again, for a shell."""
        return shlex.join(self.command)

    @property
    def finish(self) -> str:
        """The command that builds the plans of an unfinished one: from its own graphs, if a CPU can prove them."""
        if self.dtype == "bfloat16":
            return self.rebuild
        return shlex.join(("capcli", "export", "--trt", "--model", self.command[self.command.index("--out") + 1]))

    @property
    def passed(self) -> bool:
        """Whether it passed its proof."""
        return self.proof.get("passed") is True

    @property
    def unfinished(self) -> bool:
        """Whether it holds graphs that no plans were built from yet."""
        return self.kind == "tensorrt" and TENSORRT.name not in self.versions

    def bucket(self, slots: int, settings: Settings, most: int | None = None) -> Bucket:
        """The smallest bucket with room for `slots`; where only `most` fit the memory, none larger, if any is as small.

        Raises UsageError for a search that no plan has room for, and, with `most` None, for more slots than any has.
        """
        entries = self.memory.image_entries + settings.entries
        fitting = [b for b in self.buckets if b.rows == settings.rows and b.entries >= entries]
        if not fitting:
            raise UsageError(self._no_plan(settings))
        fitting.sort(key=lambda b: (b.slots, b.entries))
        if most is not None:
            fitting = [b for b in fitting if b.slots <= most] or fitting[:1]
        elif fitting[-1].slots < slots:
            largest, sizes = fitting[-1].slots, sorted({slots, *(b.slots for b in self.buckets)})
            again = with_options(self.command, {"--batch-sizes": ",".join(map(str, sizes))})
            raise UsageError(
                f"the engine was built for --batch-size {largest} at most, and this asks for {slots}: "
                f"give less, or build it for that ({shlex.join(again)})"
            )
        return next((b for b in fitting if b.slots >= slots), fitting[-1])

    def _no_plan(self, settings: Settings) -> str:
        image = self.memory.image_entries
        limits = sorted({(b.rows, (b.entries - image) // b.rows) for b in self.buckets})
        built = ", ".join(f"--num-beams {rows} and up to --max-new-tokens {length}" for rows, length in limits)
        rows, length, prompt = settings.rows, settings.max_new_tokens, len(settings.prompt) - 1
        asked = f"--num-beams {rows}"
        if settings.num_beams != rows:
            asked = f"{rows} samples per image, which take the room of {asked},"
        after = f", after a prompt that takes room for {prompt} tokens" if prompt else ""
        needed = {"--num-beams": rows, "--max-new-tokens": length + math.ceil(prompt / rows)}
        return (
            f"the engine was built for {built}; this asks for {asked} and --max-new-tokens {length}{after}: "
            f"build it for that ({shlex.join(with_options(self.command, needed))})"
        )


def with_options(command: Sequence[str], options: Mapping[str, object]) -> tuple[str, ...]:
    """A command with other values for some of its options."""
    changed = list(command)
    for name, value in options.items():
        if name in changed[:-1]:
            changed[changed.index(name) + 1] = str(value)
        else:
            changed += [name, str(value)]
    return tuple(changed)


def engines_folder() -> str:
    """Where engines are built and looked for."""
    return os.path.expanduser(os.environ.get(ENGINES) or "engines")


def write_engine(folder: str, engine: Engine) -> None:
    """Writes engine.json, last of all: a folder that has it is whole."""
    known = {"format": FORMAT, **asdict(engine)}
    text = json.dumps({**known, "hash": own_hash(known)}, indent=2) + "\n"
    atomic.replace(os.path.join(folder, ENGINE), [text.encode()])


def engine_of(files: ModelFiles) -> Engine | None:
    """The engine in a captioner's folder; None for a folder of weights. Raises CapcliError as `read_engine`."""
    return read_engine(files.folder) if files.is_engine else None


def read_engine(folder: str) -> Engine:
    """Raises CapcliError for an engine.json that is none, was edited, or is of another capcli's format."""
    path, mend = os.path.join(folder, ENGINE), "move the folder away and build the engine again"
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        sealed = known.pop("hash", None)
        again = shlex.join(with_options(known["command"], {"--out": os.path.abspath(folder)}))
        if known["format"] != FORMAT:
            raise CapcliError(f"{path} is of another version of capcli: {mend} ({again})")
        if sealed != own_hash(known):
            raise CapcliError(f"{path} was edited: {mend} ({again})")
        engine: Engine = parsed(Engine, {name: value for name, value in known.items() if name != "format"})
    except OSError as error:
        raise CapcliError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CapcliError(f"{path} is damaged ({error}): {mend}") from error
    return replace(engine, command=with_options(engine.command, {"--out": os.path.abspath(folder)}))


def own_hash(known: Mapping[str, Any]) -> str:
    """The SHA-256 that engine.json holds of all else in it, whatever its layout."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def parsed(kind: Any, value: Any, name: str = ENGINE) -> Any:
    """JSON's `value` as what a dataclass's field is annotated to be. Raises TypeError for another, KeyError for no field."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None and NoneType in parts else parsed(parts[0], value, name)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return kind(**{key: parsed(hints[key], each, key) for key, each in value.items()})  # type: ignore[operator]
    if origin is Mapping and isinstance(value, dict):
        return {key: parsed(parts[1], each, key) for key, each in value.items()}
    count = len(parts) if origin is tuple and parts[1] is not ... else None
    if origin in (Sequence, tuple) and isinstance(value, list) and count in (None, len(value)):
        return tuple(parsed(parts[0], each, name) for each in value)
    if kind is Any or (value in parts if origin is Literal else type(value) is kind):
        return value
    raise TypeError(f"{name} is {json.dumps(value)[:40]}")


def hash_files(folder: str, names: Sequence[str]) -> dict[str, str]:
    return {name: file_hash(os.path.join(folder, name)) for name in names}

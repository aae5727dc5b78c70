"""engine.json: what an engine folder contains, what it was built from, and the result of its parity check. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from capcli.decoding.settings import Settings
from capcli.engine.packages import TENSORRT
from capcli.errors import CapcliError, UsageError
from capcli.models.model_files import ENGINE, ModelFiles, file_hash
from capcli.options.export_command import checked_command, finishing, in_folder, too_large_search, too_many_slots
from capcli.storage import atomic

ENCODE, STEP = "encode.onnx", "step.onnx"
ENGINES = "CAPCLI_ENGINES"
FORMAT = 2
READABLE = (1, FORMAT)
LARGEST = 2**31  # of a number in engine.json: all are counts, sizes and versions
Kind = Literal["onnx", "tensorrt"]
Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Memory:
    """The shape of one image's memory in a decoder layer: heads, positions, head size; the same in all layers.

    `prefixed`: the memory is not read by cross-attention; it is the first entries of the pool. `reads_question`: encode
    reads a question's token ids together with the pixels, and the memory has an entry for each token after its `positions`.
    """

    layers: int
    heads: int
    positions: int
    head_size: int
    prefixed: bool = False
    reads_question: bool = False

    @property
    def names(self) -> list[str]:
        """k0, v0, k1, ...: the names of a memory's or pool's tensors in graphs and plans, without `memory_` or `pool_`."""
        return [f"{kind}{layer}" for layer in range(self.layers) for kind in "kv"]

    @property
    def image_entries(self) -> int:
        """The number of pool entries that an image takes."""
        return self.positions if self.prefixed else 0


@dataclass(frozen=True, slots=True)
class Bucket:
    """The fixed shapes of one plan: slots, images encoded at a time, rows of a slot, entries of its pool."""

    slots: int
    chunk: int
    rows: int
    entries: int


def encode_plan(chunk: int) -> str:
    """The file name of the plan that encodes `chunk` images at a time."""
    return f"encode-E{chunk}.plan"


def step_plan(bucket: Bucket) -> str:
    """The file name of the plan of a bucket's steps."""
    return f"step-S{bucket.slots}-R{bucket.rows}-N{bucket.entries}.plan"


def plan_files(buckets: Sequence[Bucket]) -> list[str]:
    """The file names of the plans of these buckets; buckets of one chunk share the plan that encodes."""
    return sorted({name for bucket in buckets for name in (encode_plan(bucket.chunk), step_plan(bucket))})


@dataclass(frozen=True)
class Engine:
    """The content of engine.json.

    `files` gives the SHA-256 of every file but engine.json and the generation settings. `versions` and `gpu` (a name and a
    compute capability; None: any machine) are those of the parity check. `buckets` are the shapes of plans; ONNX has none
    and takes any shape. `graphs` are the SHA-256 of the ONNX files that plans were built from. `parity` is the result of the
    parity check, with `passed`. `command` builds the engine again, in the folder where it is.
    """

    kind: Kind
    profile: str
    opset: int
    dtype: Precision
    quantize: Literal["int8"] | None
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
    parity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The precision it computes in: int8, or its dtype."""
        return self.quantize or self.dtype

    @property
    def rebuild(self) -> str:
        """The shell command that builds it again."""
        return shlex.join(self.command)

    @property
    def finish(self) -> str:
        """The shell command that builds the plans of an unfinished engine.

        It starts from the engine's own graphs; in bfloat16, where no CPU can run these for the parity check, from the
        captioner.
        """
        return self.rebuild if self.dtype == "bfloat16" else shlex.join(finishing(self.command))

    @property
    def passed(self) -> bool:
        """Whether it passed its parity check."""
        return self.parity.get("passed") is True

    @property
    def unfinished(self) -> bool:
        """Whether it has graphs that no plans were built from yet."""
        return self.kind == "tensorrt" and TENSORRT.name not in self.versions

    def bucket(self, slots: int, settings: Settings, most: int | None = None) -> Bucket:
        """The smallest bucket with room for `slots` slots of this search.

        With `most`, the number of slots that fit into memory, it is the largest one of up to `most` slots, or the smallest
        of all. Raises UsageError for a search that is larger than every plan, and, without `most`, for more slots than any has.
        """
        image = self.memory.image_entries
        fitting = [b for b in self.buckets if b.rows == settings.rows and b.entries >= image + settings.entries]
        if not fitting:
            raise UsageError(
                too_large_search(
                    self.command,
                    [(b.rows, (b.entries - image) // b.rows) for b in self.buckets],
                    num_beams=settings.num_beams,
                    rows=settings.rows,
                    max_new_tokens=settings.max_new_tokens,
                    prompt=len(settings.prompt) - 1,
                )
            )
        fitting.sort(key=lambda b: (b.slots, b.entries))
        if most is not None:
            fitting = [b for b in fitting if b.slots <= most] or fitting[:1]
        elif fitting[-1].slots < slots:
            sizes = [b.slots for b in self.buckets]
            raise UsageError(too_many_slots(self.command, sizes, fitting[-1].slots, slots))
        return next((b for b in fitting if b.slots >= slots), fitting[-1])


def engines_folder() -> str:
    """The folder in which engines are built and searched for."""
    return os.path.expanduser(os.environ.get(ENGINES) or "engines")


def write_engine(folder: str, engine: Engine) -> None:
    """Writes engine.json. It must be the last file written: a folder that has it is complete."""
    content = {"format": FORMAT, **asdict(engine)}
    text = json.dumps({**content, "hash": content_hash(content)}, indent=2) + "\n"
    atomic.replace(os.path.join(folder, ENGINE), [text.encode()])


def engine_of(files: ModelFiles) -> Engine | None:
    """The engine in a captioner's folder; None for a folder of weights. Raises CapcliError as `read_engine` does."""
    return read_engine(files.folder) if files.is_engine else None


def read_engine(folder: str) -> Engine:
    """Reads engine.json; `command` has the folder where the engine is now.

    Raises CapcliError for a file that is damaged, was edited, or has a format that this version of capcli does not read.
    """
    path, advice = os.path.join(folder, ENGINE), "move the folder away and build the engine again"
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        stored = content.pop("hash", None)
        command = in_folder(checked_command(content["command"]), os.path.abspath(folder))
        if content["format"] not in READABLE:
            raise CapcliError(f"{path} is of another version of capcli: {advice} ({shlex.join(command)})")
        if stored != content_hash(content):
            raise CapcliError(f"{path} was edited: {advice} ({shlex.join(command)})")
        fields = from_format_1(content) if content["format"] == 1 else content
        engine: Engine = parsed(Engine, {name: value for name, value in fields.items() if name != "format"})
    except OSError as error:
        raise CapcliError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CapcliError(f"{path} is damaged ({error}): {advice}") from error
    return replace(engine, command=command)


def from_format_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of an engine.json of format 1 with the keys of format 2."""
    parity = renamed(content["proof"], {"said": "searches"})
    memory = renamed(content["memory"], {"asked": "reads_question"})
    rest = {key: value for key, value in content.items() if key != "proof"}
    return {**rest, "parity": parity, "memory": memory}


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A dict with other keys; any other value unchanged, which `parsed` rejects."""
    return {names.get(key, key): item for key, item in value.items()} if isinstance(value, dict) else value


def content_hash(content: Mapping[str, Any]) -> str:
    """The SHA-256 of all other keys of engine.json, independent of their order and layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parsed(kind: Any, value: Any, name: str = ENGINE) -> Any:
    """A value of JSON as the type `kind` that a dataclass field is annotated with.

    Raises TypeError for a value of another type, KeyError for a key that is not a field, ValueError for a number that counts
    nothing.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None and NoneType in parts else parsed(parts[0], value, name)
    if kind is int and type(value) is int and not 0 < value <= LARGEST:
        raise ValueError(f"{name} is {value}")
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return kind(**{key: parsed(hints[key], item, key) for key, item in value.items()})  # type: ignore[operator]
    if origin is Mapping and isinstance(value, dict):
        return {key: parsed(parts[1], item, key) for key, item in value.items()}
    count = len(parts) if origin is tuple and parts[1] is not ... else None
    if origin in (Sequence, tuple) and isinstance(value, list) and count in (None, len(value)):
        return tuple(parsed(parts[0], item, name) for item in value)
    if kind is Any or (value in parts if origin is Literal else type(value) is kind):
        return value
    raise TypeError(f"{name} is {json.dumps(value)[:40]}")


def hash_files(folder: str, names: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of files of a folder by their names. Raises CapcliError where one cannot be read."""
    return {name: file_hash(os.path.join(folder, name)) for name in names}

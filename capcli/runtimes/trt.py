"""The TensorRT runtime: an engine's plans, bound to PyTorch's tensors and replayed as CUDA graphs.

A plan has one shape. A run uses the smallest bucket it fits into; unused slots and entries that no row attends to have no effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.engine.check import refuse_misfit
from capcli.engine.engine_json import Engine, encode_plan, step_plan
from capcli.errors import CapcliError
from capcli.models.dtypes import DTYPES
from capcli.runtimes.base import SlotRuntime
from capcli.runtimes.trt_plan import Plan, Plans, import_tensorrt

TYPES = DTYPES | {"int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}


def this_gpu(device: torch.device) -> dict[str, str]:
    """The properties of a GPU that decide whether a plan runs on it."""
    major, minor = torch.cuda.get_device_capability(device)
    return {"name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}


def open_trt(folder: str, engine: Engine, device: torch.device) -> Trt:
    """The runtime of an engine folder.

    Raises CapcliError when TensorRT or a GPU is missing, or the engine was built for another version or GPU.
    """
    if device.type != "cuda":
        raise CapcliError(
            f"{folder} contains TensorRT plans, which run on an NVIDIA GPU, and the device is {device}: "
            "use a machine with one (--device cuda), or export --onnx for this machine"
        )
    tensorrt = import_tensorrt()
    refuse_misfit(folder, engine, {"tensorrt": tensorrt.__version__}, this_gpu(device))
    with torch.cuda.device(device):
        plans = Plans(tensorrt)

    def load(name: str) -> Plan:
        with torch.cuda.device(device):
            return plans.load(os.path.join(folder, name))

    return Trt(engine, load, device)


@dataclass
class SideBuffers:
    """The pool before and after a step: the same buffers where a plan writes in place, else two sets that alternate."""

    name: str
    before: list[Tensor]
    after: list[Tensor]
    swapped: bool = False

    def swap(self) -> None:
        if any(before is not after for before, after in zip(self.before, self.after, strict=True)):
            self.before, self.after, self.swapped = self.after, self.before, not self.swapped


class Replayed:
    """A plan bound to torch's tensors.

    On CUDA each binding first runs without a graph, as TensorRT requires before a capture, and from then on as a CUDA graph.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self._device = plan, device
        self._warm: set[Hashable] = set()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, bound: Mapping[str, Tensor], binding: Hashable = None) -> None:
        """Runs the plan with `bound`, a tensor for every port. A `binding` must always refer to the same tensors."""
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._run_on_gpu(bound, binding)
        else:
            self._bind(bound)
            self.plan.run(0)

    def _run_on_gpu(self, bound: Mapping[str, Tensor], binding: Hashable) -> None:
        if binding in self.graphs:
            self.graphs[binding].replay()
            return
        self._bind(bound)
        if binding in self._warm:
            self.graphs[binding] = self._captured()
            self.graphs[binding].replay()
        else:
            self._run_aside()
            self._warm.add(binding)

    def _bind(self, bound: Mapping[str, Tensor]) -> None:
        for name, x in bound.items():
            self.plan.bind(name, x.data_ptr())

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.plan.run(torch.cuda.current_stream(self._device).cuda_stream)
        return graph

    def _run_aside(self) -> None:
        """Runs on another stream: on the default stream TensorRT waits for the device."""
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        self.plan.run(aside.cuda_stream)
        current.wait_stream(aside)


class Trt(SlotRuntime):
    """Runs an engine's plans; `load` reads one by its file name."""

    def __init__(self, engine: Engine, load: Callable[[str], Plan], device: torch.device) -> None:
        super().__init__(device, prefixed=engine.memory.prefixed)
        self._engine, self._load = engine, load
        self._names = engine.memory.names
        self._remembered = [] if self.prefixed else self._names
        self._plans: dict[str, Plan] = {}
        self._release()

    def _release(self) -> None:
        """Frees every buffer."""
        self._encoding: dict[str, Tensor] = {}
        self._stepping: dict[str, Tensor] = {}
        self._main: SideBuffers | None = None
        self._scratch: SideBuffers | None = None

    def shapes(self, slots: int, settings: Settings, most: int | None = None, count: int | None = None) -> Shapes:
        """The shapes of a bucket. Raises UsageError where no bucket has room for the search or for so many slots."""
        bucket = self._engine.bucket(slots if count is None else min(slots, max(1, count)), settings, most)
        return Shapes(bucket.slots, bucket.chunk)

    def fewer(self, shapes: Shapes, settings: Settings) -> Shapes:
        half = shapes.slots // 2
        return self.shapes(half, settings, half)

    def slot_bytes(self, pixels: npt.NDArray[np.uint8], settings: Settings) -> int:  # noqa: ARG002
        """The bytes of a slot's memory and pool, the pool twice: not every plan writes in place."""
        memory = self._engine.memory
        bucket = self._engine.bucket(1, settings)
        entries = memory.positions - memory.image_entries + 2 * bucket.entries
        return len(self._names) * memory.heads * memory.head_size * entries * TYPES[self._engine.dtype].itemsize

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        """Loads the plans of a bucket, unless they are loaded, and allocates their buffers.

        Raises UsageError where no bucket has room for the run.
        """
        bucket, memory = self._engine.bucket(shapes.slots, settings), self._engine.memory
        self._bucket = bucket
        self._release()
        super().allocate(shapes, settings)
        wanted = (encode_plan(bucket.chunk), step_plan(bucket))
        self._plans = {name: plan for name, plan in self._plans.items() if name in wanted}
        for name in wanted:
            self._plans.setdefault(name, self._plans.get(name) or self._load(name))
        self._encoder, self._decoder = (Replayed(self._plans[name], self.device) for name in wanted)
        self._refuse_mismatch()
        self._encoding, self._stepping = self._buffers(self._encoder.plan), self._buffers(self._decoder.plan)
        self._main = self._sides("main")
        self._memory = [self._stepping[f"memory_{name}"] for name in self._remembered]
        self._pool, self._image_entries = self._main.before, memory.image_entries
        self._image = torch.ones(shapes.slots, memory.image_entries, dtype=torch.bool, device=self.device)

    def _buffers(self, plan: Plan) -> dict[str, Tensor]:
        """A zero tensor for every port; an output that overwrites an input shares its tensor."""
        buffers: dict[str, Tensor] = {}
        for name, port in sorted(plan.ports.items(), key=lambda item: not item[1].is_input):
            shared = None if port.is_input else plan.aliased(name)
            buffers[name] = (
                buffers[shared] if shared else torch.zeros(port.shape, dtype=TYPES[port.dtype], device=self.device)
            )
        return buffers

    def _refuse_mismatch(self) -> None:
        """Raises CapcliError for a plan whose ports are not those that engine.json describes."""
        engine, bucket = self._engine, self._bucket
        rows = (bucket.slots, bucket.rows)
        memory, pool = ([f"{kind}_{name}" for name in self._names] for kind in ("memory", "pool"))
        read = [f"memory_{name}" for name in self._remembered]
        encoded: dict[str, tuple[int, ...] | None] = {
            "pixels": (bucket.chunk, *engine.pixels, 3),
            **dict.fromkeys(memory),
        }
        stepped: dict[str, tuple[int, ...] | None] = {
            "tokens": rows,
            "position": rows,
            "at": rows[:1],
            "visible": (*rows, bucket.entries),
        }
        stepped |= {"logits": (*rows, engine.vocabulary), **dict.fromkeys((*read, *pool))}
        stepped |= dict.fromkeys(f"pool_out_{name}" for name in self._names)
        for plan, wanted in ((self._encoder.plan, encoded), (self._decoder.plan, stepped)):
            found = {name: (port.shape, port.dtype) for name, port in plan.ports.items()}
            wrong = sorted(set(found) ^ set(wanted))
            wrong += [n for n in found if n not in wrong and wanted[n] not in (None, found[n][0])]
            wrong += [n for n in found if n not in wrong and found[n][1] not in TYPES]
            if wrong:
                what = ", ".join(f"{name} {found.get(name, ('is missing',))}" for name in wrong[:3])
                raise CapcliError(f"{plan.name} is not the plan that engine.json describes ({what}): {engine.rebuild}")

    def _sides(self, name: str) -> SideBuffers:
        """The pool buffers of the step plan for `main`, else new ones of the same shapes."""
        before = [self._stepping[f"pool_{layer}"] for layer in self._names]
        after = [self._stepping[f"pool_out_{layer}"] for layer in self._names]
        if name == "main":
            return SideBuffers(name, before, after)
        new = [torch.zeros_like(x) for x in before]
        return SideBuffers(
            name, new, [n if a is b else torch.zeros_like(a) for n, b, a in zip(new, before, after, strict=True)]
        )

    def _encode(self, pixels: npt.NDArray[np.uint8], encoder_ids: Tensor) -> Sequence[Tensor]:
        most = self._bucket.chunk
        if len(pixels) > most:
            parts = [slice(start, start + most) for start in range(0, len(pixels), most)]
            encoded = [[x.clone() for x in self._encode(pixels[part], encoder_ids[part])] for part in parts]
            return [torch.cat(layer) for layer in zip(*encoded, strict=True)]
        self._encoding["pixels"][: len(pixels)].copy_(torch.from_numpy(np.ascontiguousarray(pixels)))
        self._encoder.run(self._encoding)
        return [self._encoding[f"memory_{name}"][: len(pixels)] for name in self._names]

    def _run_step(
        self,
        tokens: Tensor,
        position: Tensor,
        at: Tensor,
        visible: Tensor,
        memory: Sequence[Tensor],  # noqa: ARG002
        pool: Sequence[Tensor],  # noqa: ARG002
    ) -> Tensor:
        assert self._main is not None
        logits = self._run_decoder(self._main, tokens, position, at, visible)
        self._pool = self._main.before
        return logits

    def _run_decoder(self, pool: SideBuffers, tokens: Tensor, position: Tensor, at: Tensor, visible: Tensor) -> Tensor:
        """One step with the plan's memory and `pool`, whose two buffers are swapped; the plan's other slots are not used."""
        slots = len(tokens)
        for name, x in (("tokens", tokens), ("position", position), ("at", at)):
            self._stepping[name][:slots].copy_(x)
        self._stepping["visible"][:slots, :, : visible.shape[2]].copy_(visible)
        bound = self._stepping
        for name, before, after in zip(self._names, pool.before, pool.after, strict=True):
            bound[f"pool_{name}"], bound[f"pool_out_{name}"] = before, after
        self._decoder.run(bound, (pool.name, pool.swapped))
        pool.swap()
        return bound["logits"][:slots]

    def _write_prompt(self, keys_values: Sequence[Tensor], image_visible: Tensor, at: Tensor) -> None:  # noqa: ARG002
        """Runs the prompt as rows of steps, the only shape of the plan, in a second pool: occupied slots must not change."""
        self._scratch = self._scratch or self._sides("scratch")
        pool, rows, slots, image = self._scratch, self._bucket.rows, self._bucket.slots, self._image_entries
        for copy, entries in zip(pool.before, self._pool, strict=True):
            copy.index_copy_(0, at, entries[at])
        prefix = len(self._prompt) - 1
        entry = torch.arange(self._bucket.entries, device=self.device)
        for start in range(0, prefix, rows):
            order = start + torch.arange(
                rows, device=self.device
            )  # rows past the prefix write entries that steps overwrite
            place = order.clamp(max=prefix - 1)
            visible = (entry <= image + order[:, None]).repeat(slots, 1, 1)
            visible[: len(self._image), :, :image] &= self._image[:, None]
            tokens, first = self._prompt[place].expand(slots, -1), (image + order[0]).expand(slots)
            self._run_decoder(pool, tokens, place.expand(slots, -1), first, visible)
        for entries, new in zip(self._pool, pool.before, strict=True):
            entries[at, :, : image + prefix] = new[at, :, : image + prefix]

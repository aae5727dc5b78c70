"""The shapes of a run: how many slots, images per chunk and decode loops; and the automatic batch size for a device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from capcli.decoding.settings import Settings

CPU_SLOTS = 64  # per loop: every step reads all weights anyway; with more slots their memory outweighs the weights
CPU_ROWS = 256
CPU_LOOPS = 4
LOOP_IMAGES = 8  # with fewer images per loop, one loop on all cores is faster
CUDA_ROWS = 1024
CUDA_SLOTS = 256
SHARE = 0.5  # of the memory that is free once the weights are loaded; the rest is for activations and other programs


@dataclass(frozen=True, slots=True)
class Shapes:
    """The fixed shapes of a run: S `slots` in the running batch, images encoded `chunk` (E) at a time, `loops` of this shape.

    Together with the settings' rows and entries they fix the shape of every tensor, so a caption does not depend on the
    other images of the batch.
    """

    slots: int
    chunk: int
    loops: int = 1

    @classmethod
    def of(cls, slots: int) -> Shapes:
        """A chunk is a quarter of the slots: larger chunks encode no faster and leave slots free for longer."""
        return cls(slots, min(slots, max(4, slots // 4)))

    def shared_by(self, count: int) -> Shapes:
        """Shapes for `count` images: no slot that is never used, and a last chunk as full as possible.

        Encoding takes the time of a whole chunk and a step that of all slots, even if some are empty.
        """
        rounds = max(1, math.ceil(count / self.slots))
        per_round = max(1, math.ceil(count / rounds))
        least = math.ceil(per_round / 4)
        chunk = min(
            range(least, max(least, min(self.chunk, per_round)) + 1), key=lambda e: (math.ceil(count / e) * e, -e)
        )
        return Shapes(min(self.slots, math.ceil(per_round / chunk) * chunk), chunk)

    def halved(self) -> Shapes:
        slots = max(1, self.slots // 2)
        return replace(self, slots=slots, chunk=min(self.chunk, slots))


def useful_slots(device: torch.device, settings: Settings) -> int:
    """The number of slots beyond which throughput no longer grows."""
    if device.type == "cuda":
        return max(1, min(CUDA_SLOTS, CUDA_ROWS // settings.rows))
    return max(1, min(CPU_SLOTS, CPU_ROWS // settings.rows))


def useful_loops(threads: int, images: int | None) -> int:
    """The number of decode loops to run on a CPU with `threads` threads, which they share evenly.

    `images` is how many images are in progress at a time; None: no limit.
    """
    most = CPU_LOOPS if images is None else min(CPU_LOOPS, images // LOOP_IMAGES)
    spare = int(threads > CPU_LOOPS)  # of many cores one may be left to image decoding
    return max(n for n in range(1, max(1, most) + 1) if threads % n <= spare)


def fitting_slots(device: torch.device, per_slot: int) -> int:
    """The number of slots of `per_slot` bytes that fit into the device's free memory; at least one."""
    return max(1, int(free_memory(device) * SHARE) // max(per_slot, 1))


def free_memory(device: torch.device) -> int:
    """The free bytes of a device; 4 GiB for a CPU whose system has no readable /proc/meminfo."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30

"""How many slots pay, and how many fit: the automatic batch size."""

from __future__ import annotations

import torch

from capcli.decoding.settings import Settings

CPU_SLOTS = 64  # of a loop: a step reads every weight anyway; beyond, their memory outweighs the weights
CPU_ROWS = 256
CPU_LOOPS = 4
LOOP_IMAGES = 8  # for fewer, cores are better off together
CUDA_ROWS = 1024
CUDA_SLOTS = 256
SHARE = 0.5  # of the memory that is free now: the weights are in it already, the rest is for activations and neighbours


def paying_slots(device: torch.device, settings: Settings) -> int:
    """Slots beyond which throughput grows no further."""
    if device.type == "cuda":
        return max(1, min(CUDA_SLOTS, CUDA_ROWS // settings.rows))
    return max(1, min(CPU_SLOTS, CPU_ROWS // settings.rows))


def paying_loops(threads: int, images: int | None) -> int:
    """Decode loops on a CPU that pay for `images` at a time (None: as many as you like), each with as many threads."""
    most = CPU_LOOPS if images is None else min(CPU_LOOPS, images // LOOP_IMAGES)
    spare = int(threads > CPU_LOOPS)  # of many cores one may be left to what decodes images
    return max(n for n in range(1, max(1, most) + 1) if threads % n <= spare)


def fitting_slots(device: torch.device, per_slot: int) -> int:
    """Slots of `per_slot` bytes for which this device has memory now; at least one."""
    return max(1, int(free_memory(device) * SHARE) // max(per_slot, 1))


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; on a system that does not say, 4 GiB for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30

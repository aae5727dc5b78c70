"""The processor, the memory and the GPUs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capcli.doctor.asking import Answer
from capcli.doctor.findings import Line, gibibytes
from capcli.text import counted

# What decides how fast a processor multiplies, by Linux's names.
ABILITIES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)
ASK = ("--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits")
PATIENCE = 30.0  # seconds: a driver that nobody holds open takes some to wake


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver tells of it, or PyTorch; memory in bytes."""

    name: str
    capability: str
    memory: int
    driver: str | None = None

    def fits(self) -> dict[str, str]:
        """What engine.json keeps of it."""
        return {"name": self.name, "capability": self.capability}


def look_at_cpu(torch: Answer) -> Iterator[Line]:
    from capcli.loading import usable_cpus

    told = read_cpu()
    cores, usable = os.cpu_count() or 1, usable_cpus()
    total, free = memory()
    able = [name for name in ABILITIES if name in told["flags"]]
    bfloat16 = torch.get("cpu_bfloat16")
    there = counted(cores, "core") if usable == cores else f"{usable} of {counted(cores, 'core')}"
    held = [f"{gibibytes(total)} memory" + (f", {gibibytes(free)} of it free" if free else "")] if total else []
    dtype = [] if bfloat16 is None else [f"--dtype auto computes in {'bfloat16' if bfloat16 else 'float32'}"]
    if "cpu_int8_lacks" in torch:
        lacks = torch["cpu_int8_lacks"]
        dtype += [f"--dtype int8 does not work: {lacks}" if lacks else "--dtype int8 works"]
    facts = {
        "model": told["model"],
        "cores": cores,
        "usable_cores": usable,
        "abilities": able,
        "bfloat16": bfloat16,
        "int8": torch["cpu_int8_lacks"] is None if "cpu_int8_lacks" in torch else None,
        "memory": total,
        "memory_free": free,
    }
    text = "; ".join([told["model"], there, *held, *([", ".join(able)] if able else []), *dtype])
    yield Line("CPU", "ok", text, facts=facts)


def read_cpu() -> dict[str, Any]:
    """The processor's name and abilities; no abilities where the system is not Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    model = named[1].strip() if named else platform.processor() or platform.machine()
    return {"model": model, "flags": set(flags[1].split()) if flags else set()}


def memory() -> tuple[int | None, int | None]:
    """Bytes there are, and bytes free; None where the system does not tell."""
    free = None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = re.search(r"^MemAvailable:\s*(\d+) kB", file.read(), re.MULTILINE)
        free = int(found[1]) << 10 if found else None
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), free
    except (AttributeError, OSError, ValueError):
        return None, free


def find_gpus(torch: Answer) -> tuple[list[Gpu], str | None]:
    """The GPUs by their driver, or else by PyTorch; and what is wrong with the driver, if it is there and does not answer."""
    devices: Sequence[Mapping[str, Any]] = torch.get("devices") or ()
    seen = [Gpu(d["name"], d["capability"], d["memory"]) for d in devices]
    program = shutil.which("nvidia-smi")
    if program is None:
        return seen, None
    try:
        done = subprocess.run([program, *ASK], capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return seen, f"nvidia-smi does not answer: {error}"
    told = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
    if done.returncode:
        return seen, f"nvidia-smi fails: {' '.join(told.split()) or done.returncode}"
    return [gpu for line in told.splitlines() if (gpu := gpu_of(line))] or seen, None


def gpu_of(line: str) -> Gpu | None:
    """One row of nvidia-smi; None for one that is none."""
    parts = [part.strip() for part in line.rsplit(",", 3)]
    if len(parts) != 4:
        return None
    name, mebibytes, driver, capability = parts
    return Gpu(name, capability, int(mebibytes) << 20 if mebibytes.isdigit() else 0, driver)


def look_at_gpus(gpus: Sequence[Gpu], trouble: str | None) -> Iterator[Line]:
    if trouble:
        yield Line("GPU", "broken", f"{trouble}; install or load NVIDIA's driver again")
    for number, gpu in enumerate(gpus):
        told = [gpu.name, f"compute capability {gpu.capability}"]
        told += [f"{gibibytes(gpu.memory)} memory"] if gpu.memory else []
        told += [f"driver {gpu.driver}"] if gpu.driver else []
        facts = {**gpu.fits(), "memory": gpu.memory, "driver": gpu.driver}
        yield Line(f"GPU {number}", "ok", ", ".join(told), facts=facts)
    if not gpus and not trouble:
        yield Line("GPU", "none", "no NVIDIA GPU")

"""The processor, the memory and the GPUs."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from capcli.doctor.output import Line
from capcli.doctor.probe import Answer
from capcli.text import counted

# Instruction sets that determine the speed of matrix products, by their names in Linux.
FEATURES = (
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
QUERY = ("--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits")
TIMEOUT = 30.0  # seconds; a driver that is not loaded yet answers slowly


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver or PyTorch describes it; memory in bytes."""

    name: str
    capability: str
    memory: int
    driver: str | None = None

    @property
    def identity(self) -> dict[str, str]:
        """What engine.json stores of it."""
        return {"name": self.name, "capability": self.capability}


def cpu_lines(torch: Answer) -> Iterator[Line]:
    from capcli.loading import usable_cpus

    model, features = read_cpu()
    cores, usable = os.cpu_count() or 1, usable_cpus()
    total, free = memory()
    bfloat16 = torch.get("cpu_bfloat16")
    parts = [model, counted(cores, "core") if usable == cores else f"{usable} of {counted(cores, 'core')}"]
    if total:
        parts.append(f"{_gibibytes(total)} memory" + (f", {_gibibytes(free)} free" if free else ""))
    if features:
        parts.append(", ".join(features))
    if bfloat16 is not None:
        parts.append(f"--dtype auto computes in {'bfloat16' if bfloat16 else 'float32'}")
    if "cpu_int8_lacks" in torch:
        lacks = torch["cpu_int8_lacks"]
        parts.append(f"--dtype int8 does not work: {lacks}" if lacks else "--dtype int8 works")
    facts = {
        "model": model,
        "cores": cores,
        "usable_cores": usable,
        "abilities": features,
        "bfloat16": bfloat16,
        "int8": torch["cpu_int8_lacks"] is None if "cpu_int8_lacks" in torch else None,
        "memory": total,
        "memory_free": free,
    }
    yield Line("CPU", "ok", "; ".join(parts), facts=facts)


def read_cpu() -> tuple[str, list[str]]:
    """The processor's name and its FEATURES; without features where the system is not Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return (
        name[1].strip() if name else platform.processor() or platform.machine(),
        [feature for feature in FEATURES if feature in known],
    )


def memory() -> tuple[int | None, int | None]:
    """Total and free bytes; None where the system does not report them."""
    total = free = None
    with contextlib.suppress(OSError, ValueError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", file.read(), re.MULTILINE)
        free = int(found[1]) << 10 if found else None
    return total, free


def find_gpus(torch: Answer) -> tuple[list[Gpu], str | None]:
    """The GPUs from nvidia-smi, or else from PyTorch; and the problem where nvidia-smi exists and fails."""
    by_torch = [Gpu(each["name"], each["capability"], each["memory"]) for each in torch.get("devices") or ()]
    program = shutil.which("nvidia-smi")
    if program is None:
        return by_torch, None
    try:
        done = subprocess.run([program, *QUERY], capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return by_torch, f"nvidia-smi does not respond: {error}"
    output = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
    if done.returncode:
        return by_torch, f"nvidia-smi fails: {' '.join(output.split()) or done.returncode}"
    rows = ([cell.strip() for cell in line.rsplit(",", 3)] for line in output.splitlines())
    by_driver = [
        Gpu(name, capability, int(mebibytes) << 20 if mebibytes.isdigit() else 0, driver)
        for name, mebibytes, driver, capability in (row for row in rows if len(row) == 4)
    ]
    return by_driver or by_torch, None


def gpu_lines(gpus: Sequence[Gpu], problem: str | None) -> Iterator[Line]:
    if problem:
        yield Line("GPU", "broken", f"{problem}; install or load NVIDIA's driver again")
    for number, gpu in enumerate(gpus):
        parts = [gpu.name, f"compute capability {gpu.capability}"]
        parts += [f"{_gibibytes(gpu.memory)} memory"] if gpu.memory else []
        parts += [f"driver {gpu.driver}"] if gpu.driver else []
        facts = {**gpu.identity, "memory": gpu.memory, "driver": gpu.driver}
        yield Line(f"GPU {number}", "ok", ", ".join(parts), facts=facts)
    if not gpus and not problem:
        yield Line("GPU", "none", "no NVIDIA GPU")


def _gibibytes(count: float) -> str:
    return f"{count / (1 << 30):.1f} GiB"

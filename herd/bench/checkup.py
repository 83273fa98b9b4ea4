"""What this machine is, as findings: each with its value, whether it makes something slow or impossible, and the remedy.

Everything is read from the system, the environment and the installed packages; `rates` alone measures.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import herd
from herd.bench.capacity import Rates
from herd.bench.machine import Pulse, machine
from herd.kernels.border import ISAS, loaded
from herd.planning.devices import GIB, free_memory, this_machine

__all__ = ["Finding", "Level", "checkup", "rates"]

Level = Literal["good", "note", "slow", "broken"]
"""Of a finding: as it should be, worth knowing, makes herd slower than the machine allows, stops something from working."""

EXTRAS = {
    "llguidance": ("grammar", "replies of a promised form (JSON Schema, regex, grammar)"),
    "matplotlib": ("plot", "plots of benchmarks and of training"),
}
"""Package -> the extra that brings it, what it is for."""

BUSY = 0.15
"""Share of all cores taken by other programs from which on decoding is visibly slower."""

LISTEN = 0.5
"""Seconds in which the work of other programs is counted."""

LITTLE_DISK = 5 * GIB
"""Less free space than the smallest useful download (1B in 16 bits and room to convert it) is worth a word."""

READ_BYTES = 1 << 30
"""Read to measure bandwidth: larger than the caches of any processor."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. `why` says what it means when it is not good, `fix` what to do."""

    area: str
    name: str
    value: str
    level: Level = "good"
    why: str = ""
    fix: str = ""


def checkup(cache: Path) -> list[Finding]:
    """Every finding, by area. `cache` is the folder that downloads go to."""
    facts = machine()
    return [
        *_processor(facts["cpu"], set(facts["instructions"])),
        *_memory(),
        *_graphics(),
        *_software(facts["versions"]),
        *_disk(cache),
    ]


def rates(threads: int) -> Rates:
    """What `threads` threads of this processor reach: the best of several ways to read, and torch's products.

    Takes about two seconds and 1 GiB.
    """
    from herd.bench.players.base import Setup
    from herd.bench.players.limits import open_player

    limits = open_player(Setup(path="", threads=threads, sequences=1, length=READ_BYTES))
    peaks = limits.peaks()
    return Rates(max(limits.bandwidth().values()) * 1e9, peaks["bfloat16"] * 1e9, peaks["int8"] * 1e9)


def _processor(name: str, can: set[str]) -> Iterator[Finding]:
    cores, device = os.cpu_count() or 1, this_machine()
    usable = int(device.source.split()[-2])
    yield Finding("processor", "name", name)
    if usable < cores:
        why = "a container or an affinity mask allows fewer cores than the machine has"
        yield Finding("processor", "cores", f"{usable} of {cores}", "note", why)
    else:
        yield Finding("processor", "cores", str(cores))
    yield _threads(usable)
    library, isa, why = loaded()
    if library is None:
        fix = "" if "switches" in str(why) or "choose" in str(why) else "install a C++20 compiler, then herd again"
        yield Finding("processor", "native kernels", "none", "slow", f"{why}; herd computes with torch alone", fix)
    else:
        best = _best_isa(can)
        slower = best is not None and isa is not None and ISAS.index(isa) > ISAS.index(best)
        level: Level = "slow" if slower else "good"
        why = f"this processor can do {best}" if slower else ""
        fix = "unset HERD_ISA" if slower and os.environ.get("HERD_ISA") else "install herd again on this machine"
        yield Finding("processor", "native kernels", str(isa), level, why, fix if slower else "")
    if not can & {"avx512_vnni", "asimddp"} and platform.machine().lower() in ("x86_64", "amd64"):
        yield Finding(
            "processor",
            "int8 products",
            "emulated",
            "note",
            "no AVX-512 VNNI: reading prompts is slower than elsewhere",
        )
    yield from _governor()
    pulse = Pulse()
    time.sleep(LISTEN)
    others = pulse.stop()
    if others is not None:
        busy = others > BUSY
        why = "two threads that wait for each other lose more than their share when a core is taken" if busy else ""
        fix = "end what else runs, or use fewer threads (OMP_NUM_THREADS)" if busy else ""
        yield Finding("processor", "other programs", f"{others:.0%} of all cores", "slow" if busy else "good", why, fix)


def _best_isa(can: set[str]) -> str | None:
    if {"avx512f", "avx512_vnni"} <= can:
        return "avx512"
    if "avx2" in can:
        return "avx2"
    return "neon" if "asimddp" in can else None


def _threads(cores: int) -> Finding:
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not said:
        return Finding("processor", "threads", f"{cores} (one for each core)")
    if not said.isdecimal() or not int(said):
        why = f"OMP_NUM_THREADS is {said!r}: no number of threads, so the default is used"
        return Finding("processor", "threads", str(cores), "note", why, "unset OMP_NUM_THREADS")
    count = int(said)
    if count == cores:
        return Finding("processor", "threads", said)
    lost = f"leaves {cores - count} cores idle" if count < cores else f"makes threads wait for {cores} cores"
    return Finding("processor", "threads", said, "slow", f"OMP_NUM_THREADS={count} {lost}", "unset OMP_NUM_THREADS")


def _governor() -> Iterator[Finding]:
    said = _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip()
    if said == "powersave" and "intel_pstate" not in _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver")):
        why = "the clock stays low: the governor is powersave"
        yield Finding("processor", "clock", said, "slow", why, "cpupower frequency-set -g performance")
    elif said:
        yield Finding("processor", "clock", said)


def _memory() -> Iterator[Finding]:
    total, free = this_machine().memory, free_memory()
    if free is None:
        yield Finding("memory", "total", _gib(total))
        return
    little = free < total / 4
    why = "less than a quarter is free: smaller models fit, and weights may be read from disk again and again"
    yield Finding(
        "memory", "free", f"{_gib(free)} of {_gib(total)}", "note" if little else "good", why if little else ""
    )
    lines = dict(line.split(":", 1) for line in _text(Path("/proc/meminfo")).splitlines() if ":" in line)
    swap = int(lines.get("SwapTotal", "0").split()[0]) - int(lines.get("SwapFree", "0").split()[0])
    if swap * 1024 > GIB // 4:
        why = f"{_gib(swap * 1024)} of memory lie on disk: what was swapped out answers a thousand times slower"
        yield Finding("memory", "swap", "in use", "slow", why, "end what takes the memory")


def _graphics() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding("graphics", f"cuda:{index}", f"{name}, {_gib(free)} of {_gib(total)} free")
        if importlib.util.find_spec("triton") is None:
            why = "without triton, products and attention on the GPU go through plain torch"
            yield Finding("graphics", "triton", "absent", "slow", why, "pip install triton")
    elif Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            why = f"torch {torch.__version__} was built without CUDA, so the GPU is not used"
            yield Finding("graphics", "NVIDIA GPU", "unused", "slow", why, "install torch with CUDA, see pytorch.org")
        else:
            why = f"torch was built for CUDA {torch.version.cuda} and finds no device: the driver may be too old"
            yield Finding("graphics", "NVIDIA GPU", "unused", "slow", why, "nvidia-smi shows the driver's version")
    elif torch.backends.mps.is_available():
        yield Finding("graphics", "Apple GPU", "unused", "note", "herd computes on the processor of Apple machines")
    else:
        yield Finding("graphics", "GPU", "none", "note", "models run on the processor")


def _software(versions: dict[str, str]) -> Iterator[Finding]:
    yield Finding("software", "herd", herd.__version__)
    yield Finding("software", "Python", f"{platform.python_version()} ({sys.executable})")
    for package in ("torch", "numpy"):
        yield Finding("software", package, versions.get(package, "absent"))
    for package, (extra, purpose) in EXTRAS.items():
        try:
            yield Finding("software", package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                "software", package, "absent", "note", f"needed for {purpose}", f"pip install 'herd[{extra}]'"
            )


def _disk(cache: Path) -> Iterator[Finding]:
    place = next((folder for folder in (cache, *cache.parents) if folder.is_dir()), None)
    if place is None:
        why = "no folder on the way to it exists"
        yield Finding("disk", "downloads", str(cache), "broken", why, "set HF_HOME to a folder that does")
        return
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        why = "it cannot be written, so herd pull has nowhere to put models"
        yield Finding("disk", "downloads", str(cache), "broken", why, "set HF_HOME to a folder of your own")
    elif free < LITTLE_DISK:
        why = "too little for most models"
        yield Finding("disk", "downloads", f"{_gib(free)} free in {cache}", "note", why, "herd list, herd rm")
    else:
        yield Finding("disk", "downloads", f"{_gib(free)} free in {cache}")


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

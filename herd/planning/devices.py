"""Devices by name: memory, bandwidth and dense peak rates, from their makers' public data sheets.

Makers print "80 GB" for what their drivers report as 80 GiB to within two percent; here it is GiB. Peaks are dense (without
structured sparsity), with 32-bit accumulation where the sheet tells them apart, and rates for matrix units.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from herd.errors import ConfigError

__all__ = ["COMMON", "DEVICES", "GIB", "Device", "custom", "device", "free_memory", "known_as", "this_machine"]

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device, or `count` of them together.

    `memory` bytes; `bandwidth` bytes/s; `tflops`, `tflops_fp8`, `tops_int8` 10^12 dense operations/s in 16-bit floating point,
    in fp8 and in int8 (None: it has no such units, or none are published). `source` says where the numbers are from, `assumed`
    which of them are assumptions and not from a data sheet.
    """

    name: str
    memory: int
    bandwidth: float
    tflops: float
    tflops_fp8: float | None = None
    tops_int8: float | None = None
    source: str
    assumed: tuple[str, ...] = ()
    count: int = 1

    def times(self, count: int) -> Device:
        """`count` of them, sharing weights and work evenly."""
        return replace(self, count=count)

    @property
    def title(self) -> str:
        """The name, with the count when there are several."""
        return self.name if self.count == 1 else f"{self.count} x {self.name}"


def _of(
    name: str,
    memory: float,
    gb_per_s: float,
    tflops: float,
    fp8: float | None,
    int8: float | None,
    source: str,
    *assumed: str,
) -> Device:
    return Device(
        name=name,
        memory=int(memory * GIB),
        bandwidth=gb_per_s * 1e9,
        tflops=tflops,
        tflops_fp8=fp8,
        tops_int8=int8,
        source=source,
        assumed=assumed,
    )


_APPLE = (
    "peak rate: estimated from the number of GPU cores, Apple publishes none",
    "three quarters of the memory: what macOS lets the GPU use by default",
)

DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        _of("b200", 180, 8000, 2250, 4500, 4500, "NVIDIA DGX B200 data sheet, an eighth of the system"),
        _of("h200", 141, 4800, 989, 1979, 1979, "NVIDIA H200 data sheet (SXM)"),
        _of("h100", 80, 3350, 989, 1979, 1979, "NVIDIA H100 data sheet (SXM)"),
        _of("a100-80gb", 80, 2039, 312, None, 624, "NVIDIA A100 data sheet (SXM)"),
        _of("a100-40gb", 40, 1555, 312, None, 624, "NVIDIA A100 data sheet"),
        _of("l40s", 48, 864, 362, 733, 733, "NVIDIA L40S data sheet"),
        _of("l4", 24, 300, 121, 242, 242, "NVIDIA L4 data sheet"),
        _of("t4", 16, 320, 65, None, 130, "NVIDIA T4 data sheet; float16, the T4 has no bfloat16"),
        _of("rtx5090", 32, 1792, 209.5, 419, 838, "NVIDIA RTX Blackwell white paper"),
        _of("rtx4090", 24, 1008, 165.2, 330.3, 660.6, "NVIDIA Ada white paper"),
        _of("rtx3090", 24, 936, 71, None, 284, "NVIDIA Ampere GA102 white paper"),
        _of("mi300x", 192, 5300, 1307, 2615, 2615, "AMD Instinct MI300X data sheet"),
        _of("m2-ultra", 192 * 0.75, 800, 27, None, None, "Apple: 192 GB, 800 GB/s", *_APPLE),
        _of("m3-max", 128 * 0.75, 400, 14, None, None, "Apple: 128 GB, 400 GB/s (40 GPU cores)", *_APPLE),
        _of("m4-max", 128 * 0.75, 546, 18, None, None, "Apple: 128 GB, 546 GB/s (40 GPU cores)", *_APPLE),
    )
}

COMMON = ("cpu", "rtx4090", "m3-max", "a100-80gb", "h100", "h200", "b200")
"""What a plan without a device shows."""

_CPU_BANDWIDTH = 40e9
_CPU_TFLOPS_PER_CORE = 0.05


def device(name: str) -> Device:
    """The device called `name`; "cpu" is this machine. Raises ConfigError listing the known names."""
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    if key == "cpu":
        return this_machine()
    if key not in DEVICES:
        raise ConfigError(
            f"no device is called {name[:40]!r}: choose cpu, {', '.join(DEVICES)}, "
            "or custom with --memory, --bandwidth and --flops"
        )
    return DEVICES[key]


_MAKERS = re.compile(r"^(?:(?:nvidia|amd|geforce|tesla|instinct) )+")
_SAME = re.compile(r"(?: (?:sxm\d|oam|hbm\d+e?|\d+gb))*")
"""Words of a driver's name that leave the peak what the data sheet says: the module's form and its memory."""


def known_as(said: str) -> Device | None:
    """The device that a driver calls `said` ("NVIDIA A100-SXM4-80GB"), or None.

    A word that may stand for another peak (PCIe, NVL, Ti, Laptop, MIG) makes it another device. An A100's peak is the same in
    all forms.
    """
    words = _MAKERS.sub("", " ".join(re.findall(r"[a-z0-9.]+", said.lower())))
    core, _, rest = words.replace("rtx ", "rtx").partition(" ")
    if core == "a100":
        core, rest = "a100-80gb" if "80gb" in rest else "a100-40gb", rest.replace("pcie", "").strip()
    found = DEVICES.get(core)
    return found if found is not None and _SAME.fullmatch(f" {rest}" if rest else "") else None


def custom(memory: float, bandwidth: float, tflops: float) -> Device:
    """A device of `memory` GiB, `bandwidth` GB/s and `tflops` TFLOP/s in 16 bits."""
    return _of("custom", memory, bandwidth, tflops, None, None, "given")


def this_machine(root: Path = Path("/")) -> Device:
    """The processor and memory under this program, nothing measured. A container's own limits are respected.

    Raises ConfigError where the memory cannot be found out.
    """
    cores = _cores(root)
    return Device(
        name="cpu",
        memory=_memory(root),
        bandwidth=_CPU_BANDWIDTH,
        tflops=cores * _CPU_TFLOPS_PER_CORE,
        source=f"this machine: its memory, {cores} cores",
        assumed=(
            f"bandwidth {_CPU_BANDWIDTH / 1e9:.0f} GB/s: two channels of DDR4-3200, four fifths used",
            f"{_CPU_TFLOPS_PER_CORE * 1000:.0f} GFLOP/s per core: 8 lanes of fp32 at 3 GHz",
        ),
    )


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take: what the machine has to give, and what every control group above it allows.

    Pages of files count as free, as the system drops them when memory is asked for. None where it cannot be found out.
    """
    found = []
    if (available := re.search(r"MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"))) is not None:
        found.append(int(available[1]) * 1024)
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in _group_files(root, "memory.max", "memory/memory.limit_in_bytes"):
        limit = _text(file).strip()
        used = _text(file.with_name("memory.current" if file.name == "memory.max" else "memory.usage_in_bytes")).strip()
        if limit.isdecimal() and used.isdecimal():
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _text(file.with_name("memory.stat")), re.MULTILINE)
            found.append(int(limit) - int(used) + (int(cached[1]) if cached is not None else 0))
    return max(0, min(found)) if found else None


def _memory(root: Path) -> int:
    found = list(_memory_limits(root))
    if not found:
        raise ConfigError("the size of this machine's memory is unknown: use --device custom --memory GIB")
    return min(found)


def _memory_limits(root: Path) -> Iterator[int]:
    """What the machine has, and what the control groups of a container allow (version 2, then 1)."""
    total = re.search(r"MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"))
    if total is not None:
        yield int(total[1]) * 1024
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in _group_files(root, "memory.max", "memory/memory.limit_in_bytes"):
        limit = _text(file).strip()
        if limit.isdecimal():  # "max": none
            yield int(limit)


def _cores(root: Path) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for file in _group_files(root, "cpu.max"):
        match = re.fullmatch(r"(\d+) (\d+)", _text(file).strip())
        if match is not None and int(match[2]):
            cores = min(cores, max(1, int(match[1]) // int(match[2])))
    return cores


def _group_files(root: Path, *names: str) -> Iterator[Path]:
    """`names` in the control group of this process and in every one above it."""
    base = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    folder = base / (own[1] if own is not None else "")
    folders = [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
    return (place / name for place in dict.fromkeys([*folders, base]) for name in names)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

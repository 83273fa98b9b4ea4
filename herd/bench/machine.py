"""The machine and everything else that a figure means nothing without: hardware, versions, commit, date, command, load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import herd

__all__ = ["Pulse", "last_level_cache", "load_average", "machine"]

PACKAGES = ("torch", "numpy", "llama-cpp-python", "transformers")


def machine(command: Sequence[str] | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Facts of this run as plain data."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory() / 2**30, 1),
        "last_level_cache": last_level_cache(),
        "instructions": _instructions(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "herd": herd.__version__,
        "versions": {name: found for name in packages if (found := _version(name)) is not None},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(command if command is not None else ["herd", *sys.argv[1:]]),
        "load": load_average(),
    }


def load_average() -> list[float] | None:
    """Of 1, 5 and 15 minutes, where the system counts it."""
    return [round(number, 2) for number in os.getloadavg()] if hasattr(os, "getloadavg") else None


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core; None where Linux does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _text(file).strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:])
        if scale is not None:
            sizes.append(int(text[:-1]) * scale)
    return max(sizes, default=None)


class Pulse:
    """What other programs take while something runs: `stop()` gives their share of all cores, 0 to 1 (None: not Linux)."""

    def __init__(self) -> None:
        self._began, self._used, self._busy = time.perf_counter(), time.process_time(), _busy()

    def stop(self, own: float = 0.0) -> float | None:
        """`own`: CPU seconds of children that belong to what was measured."""
        now = _busy()
        if now is None or self._busy is None:
            return None
        others = (now - self._busy) - (time.process_time() - self._used) - own
        return round(min(max(others / ((time.perf_counter() - self._began) * (os.cpu_count() or 1)), 0.0), 1.0), 3)


def _busy() -> float | None:
    """Seconds that all cores together were at work (or taken away by the host) since the start of the machine."""
    fields = _text(Path("/proc/stat")).split("\n", 1)[0].split()
    if not fields:
        return None
    user, nice, system, _, _, irq, soft, steal = (int(word) for word in fields[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _cpu() -> str:
    names = [
        line.split(":")[1].strip() for line in _text(Path("/proc/cpuinfo")).splitlines() if line[:10] == "model name"
    ]
    return names[0] if names else platform.processor() or platform.machine()


def _instructions() -> list[str]:
    line = next((line for line in _text(Path("/proc/cpuinfo")).splitlines() if line[:5] in ("flags", "Featu")), "")
    return sorted({"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm"} & set(line.split()))


def _memory() -> int:
    names = os.sysconf_names
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a checkout, with a plus sign when files of herd differ from it; None outside of one."""
    root = Path(herd.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        said = [
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "herd", "csrc"))
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said[0] + ("+" if said[1] else "") if said[0] else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

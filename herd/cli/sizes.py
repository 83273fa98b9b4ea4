"""Sizes, rates and times as people read them."""

from __future__ import annotations

__all__ = ["duration", "size"]


def size(count: float) -> str:
    """Bytes: 812 B, 4.92 GB (powers of 1000, as disks and the hub count)."""
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= power * 0.9995:
            return f"{count / power:.3g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """0:07, 12:30, 1:02:30."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"

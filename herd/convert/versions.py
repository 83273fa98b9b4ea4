"""What made a report."""

from __future__ import annotations

import platform

import torch

import herd

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Versions by name."""
    return {"herd": herd.__version__, "torch": str(torch.__version__), "python": platform.python_version()}

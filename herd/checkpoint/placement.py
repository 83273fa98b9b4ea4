"""Where a model's numbers live and how wide they are: devices and dtypes by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.errors import ConfigError
from herd.quant.numbers import torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "device_named", "dtype_named"]

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
"""What a model can run in: the names people use, and torch's. torch.float64 is taken, too, as itself: it is for comparisons."""


def dtype_named(value: str | torch.dtype | None, default: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype that `value` means; "auto" and None mean `default`. Raises ConfigError for any other."""
    if value is None or value == "auto":
        return default
    known = DTYPES.get(value) if isinstance(value, str) else str(value).removeprefix("torch.")
    if known is None or known not in {*DTYPES.values(), "float64"}:
        named = repr(value)[:80] if isinstance(value, str) else str(value)[:80]
        raise ConfigError(f"a model cannot run in dtype {named}: choose auto, float32, bfloat16 or float16")
    return torch_dtype(known)


def device_named(text: str | torch.device) -> torch.device:
    """The device called `text` ("cpu", "cuda", "cuda:1", "mps"); "auto" is the fastest kind that this machine has.

    Raises ConfigError for one that is not here, listing those that are.
    """
    import torch

    if text == "auto":
        text = _here()[-1]
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise ConfigError(
            f"this machine has no device {str(text)[:80]!r}: choose {', '.join(_here())} or auto"
        ) from None
    return device


def _here() -> list[str]:
    """Kinds of devices that this machine has, the fastest last."""
    import torch

    kinds = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    return ["cpu", *(kind for kind, here in kinds.items() if here)]

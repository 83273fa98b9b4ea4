"""Makes bitsandbytes.safetensors, which test_floats.py compares with: `pip install bitsandbytes`, then run this file."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb  # pyright: ignore[reportMissingImports]
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).with_name("bitsandbytes.safetensors")


def main() -> None:
    """Matrices [64, 192]: both tables, with and without double quantization, and LLM.int8."""
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(3)) * 0.05
    out = {}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
            case = f"{kind}{'_nested' if nested else ''}"
            parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
            parts |= {"weight": packed, "values": bnb.dequantize_4bit(packed, state)}
            out |= {f"{case}/{name}": tensor.clone() for name, tensor in parts.items()}
    small, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    values = bnb.int8_vectorwise_dequant(small, scales)
    form = torch.tensor(0, dtype=torch.uint8)
    parts = {"weight": small, "SCB": scales, "weight_format": form, "values": values}
    save_file(out | {f"int8/{name}": tensor for name, tensor in parts.items()}, GOLDEN)


if __name__ == "__main__":
    main()

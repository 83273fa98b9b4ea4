"""FP8 folders that are no compressed-tensors: fbgemm_fp8 (Meta's 405B on the hub) and fp8 (AutoFP8, and transformers' blocks).

`fbgemm_fp8`: `weight` float8_e4m3fn [out, in], `weight_scale` [out, 1]; experts of Llama 4 stay fused: `gate_up_proj` [E, D, 2F]
with `gate_up_proj_scale` per output, `down_proj` [E, F, D] with `down_proj_scale`. `fp8`: `weight_scale` for the matrix, or
`weight_scale_inv` for rectangles of `weight_block_size` (which, despite its name, multiplies). What runtimes do to activations
(dynamic scales, an upper bound of 1200) is not part of the weights. Source: transformers quantizers and integrations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from herd.checkpoint.fields import Fields
from herd.checkpoint.quantized.awq import names
from herd.checkpoint.quantized.module import WIDE, Module, Packed
from herd.checkpoint.quantized.scaled import Scaled
from herd.files import short

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FbgemmScheme", "Fp8Scheme"]

_FLOAT8 = ("float8_e4m3fn",)


class FbgemmScheme:
    """`quant_method` "fbgemm_fp8". Raises ConfigError."""

    name = "fbgemm FP8"
    notes: tuple[str, ...] = (
        "the file asks for activations in FP8 with a scale per token; herd does not round activations to FP8",
    )

    def __init__(self, f: Fields) -> None:
        f.number("activation_scale_ub", 1200.0)
        self.kept = names(f, "modules_to_not_convert")

    def open(self, module: Module) -> Packed | None:
        """The module with its scales; None when its weight is plain."""
        for part in ("gate_up_proj", "down_proj"):
            if module.name.endswith(f".experts.{part}"):
                return None
        if not _is_fp8(module, "weight_scale", self.kept):
            return None
        return Scaled(module, "weight_scale")

    def fused(self, module: Module, part: str) -> Packed | None:
        """All experts' `part` of a layer, in the layout of the file; None when it is plain."""
        if not module.has(part) or module.describe(part).number not in _FLOAT8:
            return None
        return FusedExperts(module, part)


class FusedExperts(Packed):
    """Experts [E, in, out] float8_e4m3fn with a scale for each output of each."""

    word = "F8_E4M3"

    def __init__(self, module: Module, part: str) -> None:
        super().__init__(module)
        self._part = part
        module.expect(part, _FLOAT8, module.shape)
        found = module.expect(f"{part}_scale", WIDE).shape
        experts, _, out = module.shape
        if found[:1] != (experts,) or math.prod(found) != experts * out:
            module.fail(f"{part}_scale", f"has shape {found}: expected {experts * out} numbers as {(experts, 1, out)}")

    def values(self) -> Tensor:
        experts, _, out = self.shape
        scales = self.module.finite(f"{self._part}_scale").float().reshape(experts, 1, out)
        return self.module.tensor(self._part).float().mul_(scales)

    def holder(self) -> str | None:
        return None

    def why_not(self) -> str:
        return "fused experts are taken apart"


class Fp8Scheme:
    """`quant_method` "fp8": AutoFP8's matrices, or the rectangles of transformers. Raises ConfigError."""

    name = "FP8"

    def __init__(self, f: Fields) -> None:
        self.kept = names(f, "modules_to_not_convert") + names(f, "ignored_layers")
        kind = f.text("activation_scheme", "dynamic")
        self.notes = (
            f"the file asks for activations in FP8 ({short(kind)} scales); herd does not round activations to FP8",
        )
        size = f.data.get("weight_block_size")
        if size is not None and (
            not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in size)
        ):
            f.fail("weight_block_size", f"is {short(size)}: expected two sizes")
        self.block = None if size is None else (size[0], size[1])

    def open(self, module: Module) -> Packed | None:
        """The module with its scales; None when its weight is plain."""
        scale = "weight_scale_inv" if self.block is not None else "weight_scale"
        if not _is_fp8(module, scale, self.kept):
            return None
        return Scaled(module, scale, block=self.block)


def _is_fp8(module: Module, scale: str, kept: tuple[str, ...]) -> bool:
    """Whether the module is quantized. Raises CheckpointError when its tensors do not go together, or with the list `kept`."""
    if not module.has("weight"):
        return False
    quantized = module.describe("weight").number in _FLOAT8
    if quantized and any(module.name == name or f".{name}." in f".{module.name}." for name in kept):
        module.fail("weight", f"is FP8, but modules_to_not_convert lists it: {short(list(kept))}")
    if not quantized and module.has(scale):
        module.fail(
            scale, f"is beside a weight in {module.describe('weight').number}: the weights were not quantized yet"
        )
    return quantized

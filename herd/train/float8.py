"""float8 products in training: activations and weights in e4m3, gradients in e5m2, scaled anew at every product.

Recipe "tensorwise" (one scale a tensor, as in torchao's and Transformer Engine's current scaling; fastest), "rowwise" (one for
each row and each output, all in e4m3; more exact). Three products of a layer are float8: x W^T, g W, g^T x; sums inside are
float32, results bfloat16. All matrices of layers whose sides divide by 16 are converted; output, embeddings and routers stay.

`emulated` computes the same numbers without such hardware, to within the order of sums: operands are rounded to float8 and
multiplied in float32. It is the twin that tests use, and far slower than bfloat16.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from herd.errors import ConfigError
from herd.model.llama import Llama
from herd.train.precision import NarrowLinear

__all__ = ["Float8Linear", "Recipe", "apply_float8", "remove_float8", "scaled", "supported"]

Recipe = Literal["tensorwise", "rowwise"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Sides of operands must be multiples of this for the hardware."""
TINY = 1e-12


def supported(device: torch.device) -> bool:
    """Whether the device multiplies float8: NVIDIA from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def scaled(x: Tensor, dtype: torch.dtype, dim: int | None) -> tuple[Tensor, Tensor]:
    """(x in float8, the float32 scale that gives it back by multiplication); one scale, or one along `dim` [1 there]."""
    top = (x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)).float().clamp(min=TINY)
    scale = top / torch.finfo(dtype).max
    return (x.float() / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype), scale


def _product(a: Tensor, b: Tensor, kinds: tuple[torch.dtype, torch.dtype], recipe: Recipe, emulated: bool) -> Tensor:
    """a [M, K] b [K, N] in float8 -> [M, N] in a's dtype."""
    by_row = recipe == "rowwise"
    a8, sa = scaled(a, kinds[0], 1 if by_row else None)
    b8, sb = scaled(b, kinds[1], 0 if by_row else None)
    if emulated:
        return ((a8.float() @ b8.float()) * sa * sb).to(a.dtype)
    # The hardware wants the first row-major and the second column-major.
    b8 = b8.t().contiguous().t()
    return torch.ops.aten._scaled_mm(
        a8.contiguous(), b8, scale_a=sa, scale_b=sb, out_dtype=a.dtype, use_fast_accum=False
    )


class _Float8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, emulated: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.emulated = recipe, emulated
        return _product(x, weight.t(), (E4M3, E4M3), recipe, emulated)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        kind = E5M2 if ctx.recipe == "tensorwise" else E4M3
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = _product(grad, weight, (kind, E4M3), ctx.recipe, ctx.emulated)
        if ctx.needs_input_grad[1]:
            by_weight = _product(grad.t(), x, (kind, E4M3), ctx.recipe, ctx.emulated)
        return by_x, by_weight, None, None


class Float8Linear(NarrowLinear):
    """x W^T by float8 products. x [..., in] bfloat16 or float32 -> [..., out] in its dtype; rows are padded to 16 of them."""

    recipe: Recipe = "tensorwise"
    emulated: bool = False
    plain = False
    """The fused loss must not go past this layer's forward."""

    def forward(self, input: Tensor) -> Tensor:
        flat = input.flatten(0, -2)
        short = -len(flat) % MULTIPLE
        padded = nn.functional.pad(flat, (0, 0, 0, short)) if short else flat
        y = _Float8.apply(padded, self.weight.to(input.dtype), self.recipe, self.emulated)
        return y[: len(flat)].unflatten(0, input.shape[:-1])


def apply_float8(model: Llama, recipe: Recipe = "tensorwise", *, emulate: bool = False) -> int:
    """Let the matrices of all layers multiply in float8, in place; returns how many do.

    Raises ConfigError where the device cannot (unless `emulate`), and when no matrix fits.
    """
    device = next(model.parameters()).device
    if not emulate and not supported(device):
        raise ConfigError(
            f"train.precision=float8: {device} cannot multiply float8 (NVIDIA GPUs from compute capability 8.9 on can): use "
            "bfloat16"
        )
    count = 0
    for name, module in model.layers.named_modules():
        if type(module) not in (nn.Linear, NarrowLinear) or name.endswith("router"):
            continue
        assert isinstance(module, nn.Linear)
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE or module.bias is not None:
            continue
        module.__class__ = Float8Linear
        module.recipe, module.emulated = recipe, emulate  # type: ignore[assignment]
        count += 1
    if not count:
        raise ConfigError("train.precision=float8: no matrix of this model's layers has sides that divide by 16")
    return count


def remove_float8(model: nn.Module) -> None:
    """Undo it: layers compute in their input's dtype."""
    for module in model.modules():
        if isinstance(module, Float8Linear):
            module.__class__ = NarrowLinear  # type: ignore[assignment]

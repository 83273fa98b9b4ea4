"""Experts that are stored one by one, as Llama 4's are once they are quantized: their matrices of one kind as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from herd.checkpoint.quantized.module import WIDE, Module, Packed
from herd.checkpoint.store import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

    from herd.checkpoint.quantized.module import Stored

__all__ = ["Plain", "Stacked"]


class Plain(Packed):
    """A matrix that is stored as it is, where its siblings are quantized."""

    def __init__(self, module: Module) -> None:
        super().__init__(module)
        self.word = module.expect("weight", WIDE, module.shape).stored

    def values(self) -> Tensor:
        return self.module.tensor("weight").float()

    def holder(self) -> str | None:
        return None

    def why_not(self) -> str:
        return "one expert is not quantized"


class Stacked(Packed):
    """One matrix of each of E experts, as [E, out, in]."""

    def __init__(self, each: Sequence[Packed]) -> None:
        super().__init__(each[0].module)
        self.each = tuple(each)
        words = dict.fromkeys(one.word for one in each)
        self.word = "/".join(words)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.each), *self.each[0].shape)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.each)

    @property
    def likely(self) -> str | None:
        return _widest([one.likely for one in self.each])

    def values(self) -> Tensor:
        import torch

        out = torch.empty(self.shape, dtype=torch.float32)
        for e, one in enumerate(self.each):
            out[e] = one.values()
        return out

    def holder(self) -> str | None:
        return _widest([one.holder() for one in self.each])

    def why_not(self) -> str:
        return next((one.why_not() for one in self.each if one.holder() is None), "experts are in different forms")

    def blocks(self, kind: str) -> Stored:
        import torch

        from herd.quant.fp8 import Fp8Tensor
        from herd.quant.scheme import QuantTensor

        made = [one.blocks(kind) for one in self.each]
        first = made[0]
        if isinstance(first, QuantTensor):
            blocks = torch.stack([one.blocks for one in made if isinstance(one, QuantTensor)])
            return QuantTensor(blocks, first.type, self.shape)
        rows = [one for one in made if isinstance(one, Fp8Tensor)]
        bits = torch.stack([one.weight.view(torch.uint8) for one in rows])
        return Fp8Tensor(bits.view(torch.float8_e4m3fn), torch.stack([one.scale for one in rows]))

    def parts(self) -> list[tuple[TensorFile, str]]:
        return [part for one in self.each for part in one.parts()]


def _widest(kinds: Sequence[str | None]) -> str | None:
    """A kind that holds what each of `kinds` holds: integers of 4 bits are integers of 8 bits, too."""
    found = set(kinds)
    if len(found) == 1:
        return kinds[0]
    return "Q8_0" if found == {"Q4_0", "Q8_0"} else None

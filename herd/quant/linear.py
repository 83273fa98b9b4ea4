"""Modules that hold quantized weights in place of `nn.Linear`, `nn.Embedding` and `Experts`, with the same forward.

They run anywhere in plain torch (dequantize, then multiply) and natively on a CPU with herd's library. They are for running,
not for training: they have no parameters. Gradients pass through them to their inputs.

Letters: T tokens, D dim, F expert width, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from herd.errors import ConfigError
from herd.model.moe import Experts
from herd.quant.matrix import Matrix

__all__ = ["QuantEmbedding", "QuantExperts", "QuantLinear", "dequantized"]


class _Stored(nn.Module):
    """What the three share: matrices that move with the module and are no part of a state dict."""

    def matrices(self) -> Sequence[Matrix]:
        """Every matrix held, in a fixed order."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> _Stored:
        super()._apply(fn, recurse)
        for matrix in self.matrices():
            matrix.move(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ConfigError(
            f"{prefix.rstrip('.')} is quantized and has no state dict: write files with herd convert, or load the model with "
            "weights='plain'"
        )


class QuantLinear(_Stored):
    """y = x W^T with W [out, in] stored as `weight`. x [..., in], any float dtype -> [..., out] in x's dtype."""

    def __init__(self, weight: Matrix) -> None:
        super().__init__()
        self.matrix = weight
        self.out_features, self.in_features = weight.rows, weight.columns

    def matrices(self) -> Sequence[Matrix]:
        return (self.matrix,)

    def share(self, dim: int, cut: Callable[[int], tuple[int, int]], total: object) -> None:
        """Become one rank's part (`herd.parallel.tensor`): `cut(size)` says where it begins along `dim`, and how much it is.

        Raises ConfigError for a part that is no whole number of blocks.
        """
        self.matrix = self.matrix.part(dim, *cut((self.out_features, self.in_features)[dim]))
        self.out_features, self.in_features = self.matrix.rows, self.matrix.columns

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix.multiply(x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.matrix.type.name}"


class QuantEmbedding(_Stored):
    """tokens [...] int -> rows of a stored table [V, D] as [..., D] in `dtype`, which follows the module's, or with `narrow` (set
    by `herd.train.precision`) in bfloat16."""

    like: Tensor
    narrow = False

    def __init__(self, weight: Matrix, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = weight
        self.num_embeddings, self.embedding_dim = weight.rows, weight.columns
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # moves and casts with the module

    def matrices(self) -> Sequence[Matrix]:
        return (self.matrix,)

    def share(self, dim: int, cut: Callable[[int], tuple[int, int]], total: object) -> None:
        """As `QuantLinear.share`: some rows."""
        self.matrix = self.matrix.part(dim, *cut(self.num_embeddings))
        self.num_embeddings = self.matrix.rows

    def forward(self, tokens: Tensor) -> Tensor:
        return self.matrix.look_up(tokens, torch.bfloat16 if self.narrow else self.like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.matrix.type.name}"


class QuantExperts(_Stored):
    """E feed-forward layers, as `herd.model.moe.Experts`: x [T, D] sorted by expert, counts [E] int64 -> [T, D].

    w1, w3 (E matrices [F, D]) and w2 (E matrices [D, F]).
    """

    def __init__(self, w1: Sequence[Matrix] = (), w2: Sequence[Matrix] = (), w3: Sequence[Matrix] = ()) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = tuple(w1), tuple(w2), tuple(w3)  # loading sets one after the other
        self._part: tuple[int, int, int] | None = None

    def matrices(self) -> Sequence[Matrix]:
        return (*self.w1, *self.w2, *self.w3)

    def share(self, dim: int, cut: Callable[[int], tuple[int, int]], total: object) -> None:
        """As `QuantLinear.share`: some of the experts (`dim` 0), or some units of each (1)."""
        self._part = (dim, *cut(self.w1[0].rows if dim else len(self.w1)))
        for field in ("w1", "w2", "w3"):
            setattr(self, field, self.own(field, getattr(self, field)))

    def own(self, field: str, whole: Sequence[Matrix]) -> tuple[Matrix, ...]:
        """What this rank has of the `whole` of a field, after `share`; all of it before."""
        if self._part is None:
            return tuple(whole)
        dim, first, count = self._part
        if dim == 0:
            return tuple(whole[first : first + count])
        return tuple(matrix.part(1 if field == "w2" else 0, first, count) for matrix in whole)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        out = []
        for e, rows in enumerate(x.split(counts.tolist())):
            if len(rows):
                inner = silu(self.w1[e].multiply(rows)) * self.w3[e].multiply(rows)
                out.append(self.w2[e].multiply(inner))
        return torch.cat(out) if out else torch.empty_like(x)

    def extra_repr(self) -> str:
        kinds = "/".join(one[0].type.name for one in (self.w1, self.w2, self.w3))
        return f"{len(self.w1)} experts, {self.w1[0].columns}, {self.w1[0].rows}, {kinds}"


def dequantized(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The plain twin of a quantized module: the same values as an `nn.Linear`, `nn.Embedding` or `Experts` in `dtype`."""
    match module:
        case QuantLinear():
            twin: nn.Module = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            twin.weight = _fixed(module.matrix.dequantize(dtype))
        case QuantEmbedding():
            twin = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta")
            twin.weight = _fixed(module.matrix.dequantize(dtype))
        case QuantExperts():
            with torch.device("meta"):
                twin = Experts(module.w1[0].columns, module.w1[0].rows, len(module.w1))
            for name in ("w1", "w2", "w3"):
                setattr(twin, name, _fixed(torch.stack([m.dequantize(dtype) for m in getattr(module, name)])))
        case _:
            raise TypeError(f"{type(module).__name__} is not a quantized module")
    return twin


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)

"""LoRA on routed experts: every expert of a layer has factors of its own, beside its frozen matrices, plain or quantized.

Gate and up share the factor that reads x, since PEFT adapts them as one parameter: w1 and w3 together are "w13". As data
(`herd.adapters.lora`) they are two matrices whose `a` is the same.

Letters: T rows, D dim, F expert width, E experts, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from herd.adapters.lora import Factors, LoraAdapter
from herd.kernels.grouped import grouped_linear
from herd.model.late import Index, bare, derived, hand_on, promise, promises, zeros
from herd.model.moe import Experts
from herd.quant.linear import QuantExperts
from herd.quant.matrix import Matrix, frozen_product

__all__ = [
    "PARTS",
    "Change",
    "LowRankExperts",
    "expert_shapes",
    "fused",
    "homes_of",
    "run_experts",
    "start_experts",
    "taken_apart",
]

PARTS: Mapping[str, tuple[str, ...]] = {"w13": ("w1", "w3"), "w2": ("w2",)}
"""What of a layer's experts is adapted together, and the parameters that it is made of."""

Change = tuple[Tensor, Tensor, float]
"""a [E, r, in], b [E, out, r] and the scale of a part."""


def homes_of(names: Iterable[str]) -> list[str]:
    """The experts ("layers.3.feed_forward.experts") of which `names` has parameters, in that order."""
    return list(
        dict.fromkeys(name.rpartition(".")[0] for name in names if name.rpartition(".")[0].endswith(".experts"))
    )


def fused(adapter: LoraAdapter, home: str) -> dict[str, Factors]:
    """The factors of the experts `home` by part: "w13" a [E, r, D], b [E, 2F, r] with the rows of gate first; "w2" a [E, r, F],
    b [E, D, r]. Each alpha gives the scale that `adapter` has.

    Where gate and up do not share a factor or a scale, theirs lie side by side, which is the same change with a larger rank; what
    is missing of the two is zero.
    """
    made: dict[str, Factors] = {}
    if f"{home}.w2" in adapter.factors:
        made["w2"] = adapter.factors[f"{home}.w2"]
    gate, up = f"{home}.w1", f"{home}.w3"
    here = [adapter.factors.get(name) for name in (gate, up)]
    own = next((pair for pair in here if pair is not None), None)
    if own is None:
        return made
    one, other = (Factors(own.a, torch.zeros_like(own.b), own.alpha) if pair is None else pair for pair in here)
    first = adapter.scale(gate if gate in adapter.factors else up)
    second = adapter.scale(up if up in adapter.factors else gate)
    if first == second and (one.a is other.a or _alike(one.a, other.a)):
        made["w13"] = Factors(one.a, torch.cat([one.b, other.b], 1), one.alpha)
        return made
    rows = other.b if first == second else other.b.float() * (second / first)
    above = torch.cat([one.b, torch.zeros_like(one.b[..., :1]).expand(-1, -1, other.rank)], 2)
    below = torch.cat([torch.zeros_like(rows[..., :1]).expand(-1, -1, one.rank), rows], 2)
    rank = one.rank + other.rank
    alpha = first * (math.sqrt(rank) if adapter.rslora else rank)
    made["w13"] = Factors(torch.cat([one.a, other.a], 1), torch.cat([above, below], 1), alpha)
    return made


def taken_apart(home: str, part: str, pair: Factors) -> dict[str, Factors]:
    """The other way: factors of a part as those of its parameters, by canonical name."""
    if part == "w2":
        return {f"{home}.w2": pair}
    gate, up = pair.b.chunk(2, 1)  # the same `a` in both: `fused` knows them by it
    return {f"{home}.w1": Factors(pair.a, gate, pair.alpha), f"{home}.w3": Factors(pair.a, up, pair.alpha)}


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def start_experts(
    module: Experts | QuantExperts, part: str, rank: int, alpha: float, where: torch.device | None = None
) -> Factors:
    """Factors of a part whose product is zero, for every expert as for a matrix of its own.

    Where the numbers of `module` are promised, those of the factors are, too (on `where`): the global random state moves on as if
    they had been drawn, and each expert's are drawn again, alone, by who holds some of them.
    """
    outer, inner = expert_shapes(module)[PARTS[part][0]]
    bound = 1 / math.sqrt(inner)
    shape, wide = (len(module.w1), rank, inner), (len(module.w1), outer * len(PARTS[part]), rank)

    def draw() -> Iterator[Tensor]:
        for _ in range(shape[0]):  # one number after the other comes from the generator: cuts change none
            yield torch.empty(shape[1:]).uniform_(-bound, bound)

    if not promises(module):
        return Factors(torch.empty(shape).uniform_(-bound, bound), torch.zeros(wide), alpha)
    state = torch.get_rng_state()
    for _ in draw():
        pass

    def again(index: Index | None = None) -> Tensor:
        own = tuple(slice(0, size) for size in shape) if index is None else index
        out = torch.empty([part.stop - part.start for part in own], device=where)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            for e, drawn in zip(range(own[0].stop), draw(), strict=False):
                if e >= own[0].start:
                    out[e - own[0].start] = drawn[own[1:]]
        return out

    return Factors(bare(shape, again), torch.zeros(wide, device="meta"), alpha)


def expert_shapes(module: Experts | QuantExperts) -> dict[str, tuple[int, int]]:
    """[out, in] of each matrix that one expert has."""
    if isinstance(module, QuantExperts):
        width, dim = module.w1[0].rows, module.w1[0].columns
    else:
        width, dim = module.w1.shape[1], module.w1.shape[2]
    return {"w1": (width, dim), "w2": (dim, width), "w3": (width, dim)}


class LowRankExperts(nn.Module):
    """Frozen experts with trained factors. x [T, D] sorted by expert, counts [E] int64 -> [T, D], as `Experts`.

    `name` is where they are in the model. The factors are float32, or multiplied in x's dtype when `narrow` is set. b13 is
    [E, 2, F, r], gate before up: so ranks that share every expert (`herd.parallel.tensor`) can each have their units of both.
    """

    narrow = False

    def __init__(
        self,
        name: str,
        base: nn.Module,
        pairs: Mapping[str, Factors],
        scales: Mapping[str, float],
        where: torch.device | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(base, Experts | QuantExperts)
        self.name, self.base = name, base
        self.scales = dict(scales)
        self.alphas = {part: pair.alpha for part, pair in pairs.items()}
        late = bool(promises(base))  # a model whose numbers come later, and then where they belong
        device = (
            base.w1.device
            if isinstance(base, Experts)
            else torch.device("meta")
            if late
            else base.w1[0].dequantize().device
        )
        for part in PARTS:
            for word in ("a", "b"):
                pair = pairs.get(part)
                weight = None
                if pair is not None:
                    values: Tensor = getattr(pair, word)
                    if word == "b" and len(PARTS[part]) > 1:
                        values = values.unflatten(1, (len(PARTS[part]), -1))
                    weight = nn.Parameter(values.to(device, torch.float32, copy=True).contiguous())
                    key = f"{word}{part[1:]}"
                    if late and not values.is_meta:
                        promise(self, key, derived(values.float))
                    elif late and word == "a":
                        hand_on(self, key, pair.a)
                    elif late:  # factors without numbers are those of `start_experts`
                        promise(self, key, zeros(tuple(values.shape), where or torch.device("cpu")))
                self.register_parameter(f"{word}{part[1:]}", weight)

    def factors(self) -> dict[str, Factors]:
        """By part; the tensors are the module's own, detached."""
        found = {part: self._pair(part) for part in self.alphas}
        return {part: Factors(a.detach(), b.detach(), self.alphas[part]) for part, (a, b) in found.items()}

    def _pair(self, part: str) -> tuple[Tensor, Tensor]:
        a, b = getattr(self, f"a{part[1:]}"), getattr(self, f"b{part[1:]}")
        return a, b if b.ndim == 3 else b.flatten(1, 2)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        changes: dict[str, Change] = {}
        for part in self.alphas:
            a, b = self._pair(part)
            if self.narrow:
                a, b = a.to(x.dtype), b.to(x.dtype)
            changes[part] = a, b, self.scales[part]
        return run_experts(self.base, changes, x, counts)

    def extra_repr(self) -> str:
        return ", ".join(f"{part}: LoRA, scale {scale:g}" for part, scale in self.scales.items())


def run_experts(base: Experts | QuantExperts, changes: Mapping[str, Change], x: Tensor, counts: Tensor) -> Tensor:
    """`base` with `changes` by part: x [T, D] sorted by expert, counts [E] int64 -> [T, D] in x's dtype.

    Changes are computed in the dtype of their factors.
    """
    gate, up = _product(base, "w1", x, counts), _product(base, "w3", x, counts)
    if "w13" in changes:
        more, further = _change(changes["w13"], x, counts).chunk(2, -1)
        gate, up = (gate + more).to(gate.dtype), (up + further).to(up.dtype)
    inner = silu(gate) * up
    out = _product(base, "w2", inner, counts)
    return (out + _change(changes["w2"], inner, counts)).to(out.dtype) if "w2" in changes else out


def _change(change: Change, x: Tensor, counts: Tensor) -> Tensor:
    a, b, scale = change
    return grouped_linear(grouped_linear(x.to(a.dtype), a, counts), b, counts) * scale


def _product(base: Experts | QuantExperts, key: str, x: Tensor, counts: Tensor) -> Tensor:
    """Each row with the matrix `key` of its expert. While training no input is rounded."""
    if isinstance(base, Experts):
        return grouped_linear(x, getattr(base, key).to(x.dtype), counts)
    matrices: tuple[Matrix, ...] = getattr(base, key)
    multiply = frozen_product if torch.is_grad_enabled() else _multiplied
    parts = [multiply(rows, matrices[e]) for e, rows in enumerate(x.split(counts.tolist())) if len(rows)]
    return torch.cat(parts) if parts else x.new_empty(0, matrices[0].rows)


def _multiplied(x: Tensor, matrix: Matrix) -> Tensor:
    return matrix.multiply(x)

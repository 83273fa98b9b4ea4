"""Tiny models in the native decoder: weights handed over, a paged cache, steps over any split of any sequences."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from herd.kernels import native
from herd.kernels.border import ISAS, library
from herd.model.llama import Llama
from herd.quant.encode import encode
from herd.quant.scheme import QuantTensor, block_type

BLOCK = 16  # positions
FORMATS = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")

Hand = Callable[[Tensor], native.Weight]


ARM, X86 = ("neon", "scalar"), ("amx", "avx512bf16", "avx512", "avx2", "scalar")
PATHS = ARM if platform.machine().lower() in ("aarch64", "arm64") else X86


@pytest.fixture(params=PATHS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine, one test after the other."""
    before = native.isa()
    if before is None:
        pytest.skip(native.missing() or "")
    if not library().herd_use(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library().herd_use(before.encode())


def offered() -> list[str]:
    """The instruction sets of this machine; skips the test where there is no library. The last one stays in use."""
    if native.isa() is None:
        pytest.skip(native.missing() or "")
    return [name for name in reversed(ISAS) if library().herd_use(name.encode())]


def blocks(kind: str, rows: int, columns: int) -> QuantTensor:
    """Random blocks: every bit pattern of the numbers, scales of ordinary size."""
    form = block_type(kind)
    raw = torch.randint(0, 256, (rows, columns // form.values, form.nbytes), dtype=torch.uint8)
    scale = (torch.rand(rows, columns // form.values, 1) * 0.01 + 0.001).half().view(torch.uint8)
    at = 208 if kind == "Q6_K" else 0
    raw[..., at : at + 2] = scale
    if kind in ("Q4_K", "Q5_K"):
        raw[..., 2:4] = scale
    return QuantTensor(raw.view(rows, -1), form, (rows, columns))


def packed(kind: str) -> Hand:
    """Hands a weight over in blocks of `kind`."""

    def hand(weight: Tensor) -> native.Weight:
        q = encode(weight.detach(), kind)
        assert isinstance(q, QuantTensor)
        return native.pack(q.type.id, q.blocks, weight.shape[-1])

    return hand


def encoded(kind: str) -> Hand:
    """`packed(kind)` for weights that are handed over again and again: each is encoded once."""
    found: dict[tuple[int, ...], QuantTensor] = {}

    def hand(weight: Tensor) -> native.Weight:
        key = weight.data_ptr(), *weight.shape
        if key not in found:
            q = encode(weight.detach(), kind)
            assert isinstance(q, QuantTensor)
            found[key] = q
        return native.pack(found[key].type.id, found[key].blocks, weight.shape[-1])

    return hand


def layers(model: Llama, hand: Hand = native.plain) -> list[native.LayerWeights]:
    """The layers of `model` as the decoder takes them."""
    out = []
    for block, spec in zip(model.layers, model.config.layers, strict=True):
        attention, feed = block.attention, block.feed_forward.shared_expert if spec.moe else block.feed_forward
        linears = (attention.wq, attention.wk, attention.wv, attention.wo, feed.w1, feed.w2, feed.w3)
        routed = {}
        if spec.moe:
            moe, e = block.feed_forward, block.feed_forward.experts
            routed = {
                "router": native.plain(moe.router.weight),
                "top_k": moe.top_k,
                "experts": [tuple(hand(w[i]) for w in (e.w1, e.w2, e.w3)) for i in range(moe.n_experts)],
            }
        weights = [hand(linear.weight) for linear in linears]
        norms = block.attention_norm.weight, block.ffn_norm.weight
        out.append(native.LayerWeights(*norms, weights, spec.placement, spec.chunk, **routed))
    return out


def unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN, or for bytes (whose scales are NaN) anything."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 77, dtype=dtype)


@dataclass
class Paged:
    """`model`'s layers over a cache whose unwritten places hold NaN: a key read too early spoils the answer."""

    model: Llama
    hand: Hand = native.plain
    kv: torch.dtype = torch.float32
    blocks: int = 64
    cache: dict[str, list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        c = self.model.config
        self.decoder = native.Decoder(
            layers(self.model, self.hand),
            dim=c.dim,
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            norm_eps=c.norm_eps,
        )
        shape = (self.blocks, BLOCK, c.n_kv_heads, c.head_dim)
        names = {"k": shape, "v": shape}
        if self.kv == torch.int8:
            names |= {"k_scale": shape[:3], "v_scale": shape[:3]}
        self.cache = {
            name: [unwritten(dims, torch.float32 if name.endswith("scale") else self.kv) for _ in c.layers]
            for name, dims in names.items()
        }
        self.tables = torch.randperm(self.blocks, dtype=torch.int32).view(4, -1)  # four sequences, blocks anywhere

    def step(self, parts: Sequence[tuple[int, int, Tensor]]) -> list[Tensor]:
        """Run (sequence, first position, embedded rows [n, D]) side by side; the rows after all layers, part by part."""
        c = self.model.config
        positions = torch.cat([torch.arange(at, at + len(rows)) for _, at, rows in parts])
        owner = torch.cat([torch.full((len(rows),), sequence) for sequence, _, rows in parts])
        spans, row = [], 0
        for sequence, at, rows in parts:
            spans.append((row, len(rows), at, sequence))
            row += len(rows)
        temper = torch.ones(len(positions))
        if c.temper is not None:
            steps = torch.floor((positions.float() + 1) / c.temper.floor_scale)
            temper = torch.log1p(steps) * c.temper.attn_scale + 1
        rotary = self.model.rope(positions)
        x = torch.cat([rows for _, _, rows in parts]).float().contiguous()
        slots = self.tables[owner, positions // BLOCK].long() * BLOCK + positions % BLOCK
        self.decoder(
            x,
            cos=rotary.cos.squeeze(-2).contiguous(),
            sin=rotary.sin.squeeze(-2).contiguous(),
            temper=temper,
            slots=slots,
            spans=torch.tensor(spans),
            tables=self.tables,
            **self.cache,
        )
        return list(x.split([len(rows) for _, _, rows in parts]))

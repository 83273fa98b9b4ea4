"""Whole layers in the native decoder against `Llama`, for every generation; the same bits in any split and any company."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from herd.kernels import native, reference
from herd.model.attend import Causal
from herd.model.llama import Llama
from herd.model.moe import Experts
from herd.model.norm import rms
from herd.quant.encode import encode
from herd.quant.scheme import QuantTensor
from tests.build import TINY, build, tiny, tokens
from tests.kernels.native import BLOCK, FORMATS, Hand, Paged, encoded, isa

__all__ = ["isa"]

FLOAT = 3e-5
"""Float32 layers: logits of order one, sums in another order (measured: below 5e-6)."""
KV = {torch.bfloat16: 0.05, torch.float16: 0.008}
"""Keys and values rounded to 8 or 11 bits (measured: up to 0.03 and 0.004)."""
FLIPPED = 0.15
"""A float sum in another order can fall on the other side of a rounding to 8 bits than in the reference; the rows that see that
one are then a step apart in every later layer (measured: up to 0.06)."""
UNTOUCHED = 5
"""Rows at least that nothing of the kind has happened to (measured: 9 or more of 70)."""

HEAD = 0.02
"""A norm that is summed in another order moves some roundings to 8 bits by a step (float: below 1e-6)."""

LENGTH = 70
SPLITS = ([LENGTH], [37, 1, 1, 31], [1] * LENGTH)


def run(paged: Paged, x: Tensor, split: list[int], sequence: int = 0) -> Tensor:
    """All rows of one sequence, `split` at a time."""
    out, at = [], 0
    for part in x.split(split):
        out += paged.step([(sequence, at, part)])
        at += len(part)
    return torch.cat(out)


def logits(model: Llama, rows: Tensor) -> Tensor:
    return model.output(model.norm(rows))


@torch.inference_mode()
@pytest.mark.parametrize("name", TINY)
def test_layers_equal_the_model(isa: str, name: str) -> None:
    model = build(name)
    ids = tokens(model.config, LENGTH)
    wanted, x = model(ids)[0], model.embed(ids[0])
    results = [run(Paged(model), x, split) for split in SPLITS]
    assert (logits(model, results[0]) - wanted).abs().max() < FLOAT
    assert all(torch.equal(one, results[0]) for one in results)


@torch.inference_mode()
@pytest.mark.parametrize("kv", KV, ids=str)
@pytest.mark.parametrize("name", ["llama-2", "llama-3.1", "llama-guard-4"])
def test_caches_of_two_bytes(isa: str, name: str, kv: torch.dtype) -> None:
    model = build(name)
    ids = tokens(model.config, LENGTH)
    x = model.embed(ids[0])
    results = [run(Paged(model, kv=kv), x, split) for split in SPLITS]
    assert (logits(model, results[0]) - model(ids)[0]).abs().max() < KV[kv]
    assert all(torch.equal(one, results[0]) for one in results)


def through_bytes(q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
    """Causal attention over keys and values as an int8 cache gives them back."""
    k, v = (numbers * scale for numbers, scale in (reference.to_bytes(k), reference.to_bytes(v)))
    return Causal()(q, k, v, chunk)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama-2", "llama-3.1", "llama-guard-4"])
def test_cache_of_bytes(isa: str, name: str) -> None:
    model = build(name)
    ids = tokens(model.config, LENGTH)
    x = model.embed(ids[0])
    wanted = model(ids, attend=[through_bytes] * model.config.n_layers)[0]
    results = [run(Paged(model, kv=torch.int8), x, split) for split in SPLITS]
    apart = (logits(model, results[0]) - wanted).abs().amax(-1)
    assert (apart < FLOAT).sum() >= UNTOUCHED
    assert apart.max() < FLIPPED
    assert (
        wanted - model(ids)[0]
    ).abs().max() > 2 * FLOAT  # the rounding is seen, so what agrees is not the plain cache
    assert all(torch.equal(one, results[0]) for one in results)


class Rounded(nn.Module):
    """A linear layer whose weight went through blocks of `kind` and whose input is rounded to bytes."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        super().__init__()
        self.weight = decoded(weight, kind)

    def forward(self, x: Tensor) -> Tensor:
        return reference.product(self.weight, x, quantized=True).float()


class RoundedExperts(nn.Module):
    """The same for experts, one by one."""

    def __init__(self, experts: Experts, kind: str) -> None:
        super().__init__()
        self.all = [
            tuple(Rounded(w[i], kind) for w in (experts.w1, experts.w2, experts.w3)) for i in range(len(experts.w1))
        ]

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        parts = x.split(counts.tolist())
        return torch.cat(
            [w2(nn.functional.silu(w1(part)) * w3(part)) for (w1, w2, w3), part in zip(self.all, parts, strict=True)]
        )


def decoded(weight: Tensor, kind: str) -> Tensor:
    return encode(weight.detach(), kind).dequantize()  # pyright: ignore[reportAttributeAccessIssue]


def rounded(model: Llama, kind: str) -> Llama:
    """The torch twin of `model` in blocks of `kind`, in place; the router and the output stay plain."""
    for block in model.layers:
        for parent in [m for m in block.modules() if not isinstance(m, Experts)]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and name != "router":
                    setattr(parent, name, Rounded(child.weight, kind))
                if isinstance(child, Experts):
                    setattr(parent, name, RoundedExperts(child, kind))
    return model


def wide(name: str) -> Llama:
    """A tiny model whose matrices are whole blocks of every format."""
    config = replace(tiny(name), dim=256, n_heads=8, n_kv_heads=2, head_dim=32, hidden_dim=512)
    moe = None if config.moe is None else replace(config.moe, hidden_dim=256)
    return build(replace(config, moe=moe))


@cache
def wide_pair(name: str, kind: str) -> tuple[Llama, Hand, Llama, Tensor, Tensor]:
    """A wide model, what hands its weights over in blocks of `kind`, its twin, embedded ids, and the twin's logits of them: the
    same for every instruction set."""
    model, twin = wide(name), rounded(wide(name), kind)
    ids = tokens(model.config, LENGTH)
    return model, encoded(kind), twin, model.embed(ids[0]), twin(ids)[0]


@torch.inference_mode()
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["llama-3.1", "llama-guard-4"])
def test_quantized_layers_equal_their_twin(isa: str, name: str, kind: str) -> None:
    model, hand, twin, x, wanted = wide_pair(name, kind)
    results = [run(Paged(model, hand), x, split) for split in SPLITS[:2]]
    apart = (logits(twin, results[0]) - wanted).abs().amax(-1)
    assert (apart < FLOAT).sum() >= UNTOUCHED
    assert apart.max() < FLIPPED
    assert all(torch.equal(one, results[0]) for one in results)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama-4-scout", "llama-4-maverick", "llama-4-top-2"])
def test_quantized_experts_equal_their_twin(isa: str, name: str) -> None:
    model, hand, twin, x, wanted = wide_pair(name, "Q8_0")
    results = [run(Paged(model, hand), x, split) for split in SPLITS[:2]]
    apart = (logits(twin, results[0]) - wanted).abs().amax(-1)
    # No bound on the others: a rounding can turn the choice between two experts.
    assert (apart < FLOAT).sum() >= UNTOUCHED
    assert all(torch.equal(one, results[0]) for one in results)


@torch.inference_mode()
@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["llama-3.1", "llama-4-scout", "llama-4-top-2"])
def test_sequences_side_by_side(isa: str, name: str, kv: torch.dtype) -> None:
    model = build(name)
    lengths = (LENGTH, 3, 41, 17)
    xs = [model.embed(tokens(model.config, n, seed=i)[0]) for i, n in enumerate(lengths)]
    alone = [run(Paged(model, kv=kv), x, [len(x)]) for x in xs]
    # Prompts in pieces beside single tokens of others, in an order that changes from step to step.
    plan = [[(2, 20), (0, 30)], [(0, 1), (1, 3), (2, 1)], [(3, 16), (2, 1), (0, 20)], [(2, 19), (0, 19), (3, 1)]]
    paged, at, got = Paged(model, kv=kv), [0] * 4, [[] for _ in lengths]
    for step in plan:
        parts = [(i, at[i], xs[i][at[i] : at[i] + n]) for i, n in step]
        for (i, n), rows in zip(step, paged.step(parts), strict=True):
            at[i] += n
            got[i].append(rows)
    assert tuple(at) == lengths
    assert all(torch.equal(torch.cat(rows), wanted) for rows, wanted in zip(got, alone, strict=True))


@torch.inference_mode()
def test_a_spoilt_sequence_stays_alone(isa: str) -> None:
    model = build("llama-4-top-2")
    x = model.embed(tokens(model.config, 20)[0])
    clean = run(Paged(model), x, [20], sequence=1)
    for value in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[7, 5] = value
        bad, good = Paged(model).step([(0, 0, spoilt), (1, 0, x)])
        assert torch.equal(good, clean)
        assert torch.equal(bad[:7], clean[:7])
        assert not bad[7:].isfinite().any(-1).all()  # rows that see it
        assert not bad[7].isfinite().any()


@torch.inference_mode()
def test_a_part_of_the_layers(isa: str) -> None:
    model = build("llama-4-scout")
    x = model.embed(tokens(model.config, 20)[0]).contiguous()
    whole, parts, half = Paged(model), Paged(model), x.clone()
    wanted = run(whole, x, [20])
    inner = parts.decoder
    parts.decoder = lambda x, **kw: [inner(x, layers=r, **kw) for r in (range(1), range(1, 3), range(3, 4))]
    assert torch.allclose(parts.step([(0, 0, half)])[0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slots", torch.tensor([BLOCK * 64, 1])),
        ("slots", torch.tensor([-1, 1])),
        ("spans", torch.tensor([[0, 1, 0, 0]])),
        ("spans", torch.tensor([[0, 3, 0, 0]])),
        ("spans", torch.tensor([[1, 2, 0, 0]])),
        ("spans", torch.tensor([[0, 2, 0, 9]])),
        ("spans", torch.tensor([[0, 2, -1, 0]])),
        ("spans", torch.tensor([[0, 2, 1 << 40, 0]])),
        ("tables", torch.full((4, 16), 64, dtype=torch.int32)),
        ("tables", torch.full((4, 16), -1, dtype=torch.int32)),
    ],
)
def test_wrong_steps_are_refused_before_anything_is_written(isa: str, name: str, value: Tensor) -> None:
    model = build("llama-3")
    paged = Paged(model)
    inner = paged.decoder
    paged.decoder = lambda x, **kw: inner(x, **(kw | {name: value}))
    with pytest.raises(AssertionError, match=r"span|slot|table"), torch.inference_mode():
        paged.step([(0, 0, model.embed(tokens(model.config, 2)[0]))])
    assert paged.cache["k"][0].isnan().all()


def test_heads_that_are_no_whole_vectors_are_refused() -> None:
    if native.isa() is None:
        pytest.skip(native.missing() or "")
    with pytest.raises(AssertionError):
        Paged(build(replace(tiny("llama-2"), head_dim=12)))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q6_K"])
def test_the_head_is_norm_and_product(kind: str) -> None:
    """Against torch's norm and the library's own product; chosen rows, twice and backwards, each the same bits as alone."""
    torch.manual_seed(3)
    x, norm = torch.randn(5, 256), torch.rand(256) + 0.5
    if kind.startswith("Q"):
        stored = encode(torch.randn(70, 256), kind)
        assert isinstance(stored, QuantTensor)
        weight = native.pack(stored.type.id, stored.blocks, 256)
    else:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        weight = native.plain(torch.randn(70, 256).to(dtype))
    head = native.OutputHead(weight, norm, 1e-5)
    rows = torch.tensor([4, 1, 1])
    found = head(x, rows)
    expected = native.matmul(weight, rms(x[rows], 1e-5) * norm)
    assert (found - expected).norm() <= HEAD * expected.norm()
    for i, row in enumerate(rows):
        assert torch.equal(found[i], head(x, row[None])[0])
    for wrong in (5, -1):
        with pytest.raises(AssertionError, match="of 5"):
            head(x, torch.tensor([0, wrong]))
    assert head(x, rows[:0]).shape == (0, 70)

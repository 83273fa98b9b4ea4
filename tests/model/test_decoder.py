"""Pieces of the decoder that parity alone would not pin down: rounding order, attention masks, routing, initial weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from herd.model.attend import Causal, Packed, masked_attention, packed, visible
from herd.model.config import MoEConfig
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.model.moe import MoE
from herd.model.norm import RMSNorm
from tests.build import TINY, build, tiny, tokens

ATTEND_BOUND = 2e-6
"""fp32 outputs of order one; the fused kernels differ from the definition in the order of summation only."""


def by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v in fp64; query head i uses key/value head i // (H / Hkv). mask [S, K], True = may look."""
    q, k, v = q.double(), k.double(), v.double()
    repeats = q.shape[-2] // k.shape[-2]
    k, v = k.repeat_interleave(repeats, -2), v.repeat_interleave(repeats, -2)
    scores = torch.einsum("...shd,...khd->...hsk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("...hsk,...khd->...shd", weights, v).float()


def qkv(length: int, heads: int = 6, kv_heads: int = 2, batch: tuple[int, ...] = (2,)) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((*batch, length, n, 8) for n in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(shape) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_rounds_before_the_weight(dtype: torch.dtype) -> None:
    """cast(x / rms) * weight, not cast(x / rms * weight): the two differ in the last bit of many values."""
    x = torch.randn(64, 96).to(dtype)
    norm = RMSNorm(96, 1e-5)
    norm.weight.data = torch.randn(96)
    norm = norm.to(dtype)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), wide.to(dtype) * norm.weight)
    assert not torch.equal(norm(x), (wide * norm.weight.float()).to(dtype))


@pytest.mark.parametrize("chunk", [None, 1, 4, 16, 100])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 17, 32])
def test_causal_equals_the_dense_mask(length: int, chunk: int | None) -> None:
    q, k, v = qkv(length)
    positions = torch.arange(length)
    expected = by_definition(q, k, v, visible(positions, positions, chunk))
    assert (Causal()(q, k, v, chunk) - expected).abs().max() <= ATTEND_BOUND


def test_visible() -> None:
    """Earlier or equal, and in the same chunk: not a sliding window."""
    rows = visible(torch.tensor([3, 4, 5]), torch.arange(7), 4).int().tolist()
    assert rows == [[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0]]
    assert visible(torch.tensor([3]), torch.arange(5), None).int().tolist() == [[1, 1, 1, 1, 0]]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_grouped_heads_and_leading_dims(kv_heads: int, batch: tuple[int, ...]) -> None:
    q, k, v = qkv(9, kv_heads=kv_heads, batch=batch)
    mask = torch.rand(9, 9) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    assert (masked_attention(q, k, v, mask) - by_definition(q, k, v, mask)).abs().max() <= ATTEND_BOUND


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_one_query(kv_heads: int, batch: tuple[int, ...]) -> None:
    """A decode step over 40 keys, some masked; also with a mask per sequence."""
    q, k, v = qkv(40, kv_heads=kv_heads, batch=batch)
    mask = torch.arange(40)[None] % 3 > 0
    expected = by_definition(q[..., -1:, :, :], k, v, mask)
    for given in (mask, mask.expand(*batch, 1, 1, 40)):
        out = masked_attention(q[..., -1:, :, :], k, v, given)
        assert out.shape == expected.shape
        assert (out - expected).abs().max() <= ATTEND_BOUND


@pytest.mark.parametrize("chunk", [None, 4])
def test_packed_equals_separate_documents(chunk: int | None) -> None:
    """Each row has its own borders."""
    lengths = [(5, 1, 6), (4, 8)]
    q, k, v = qkv(12)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    out = Packed(positions)(q, k, v, chunk)
    for i, row in enumerate(lengths):
        parts = zip(*(t[i].split(row) for t in (q, k, v)), strict=True)
        expected = torch.cat([Causal()(*part, chunk) for part in parts])
        assert (out[i] - expected).abs().max() <= ATTEND_BOUND


def test_packed_masks_are_ready_and_shared() -> None:
    """What attention needs is made once per distinct chunk before the first layer runs: borders on a CPU, masks elsewhere."""
    config = tiny("llama-4-scout")
    see = packed(config, torch.arange(12)[None])
    assert len(see) == config.n_layers
    assert isinstance(see[0], Packed)
    assert set(see[0].firsts) == {None, 16}
    on_meta = packed(config, torch.arange(12, device="meta")[None])[0]
    assert isinstance(on_meta, Packed)
    assert set(on_meta.masks) == {None, 16}


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_moe_by_definition(top_k: int) -> None:
    """shared(x) + sum over the k largest logits of expert_e(sigmoid(logit_e) x), token by token."""
    moe = MoE(16, MoEConfig(n_experts=4, top_k=top_k, hidden_dim=24)).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    experts = moe.experts
    for row, out in zip(x.flatten(0, 1), moe(x).flatten(0, 1), strict=True):
        expected = moe.shared_expert(row)
        logits = moe.router(row)
        for e in logits.argsort(descending=True)[:top_k].tolist():
            scaled = row * logits[e].float().sigmoid().double()
            expected = expected + experts.w2[e] @ (silu(experts.w1[e] @ scaled) * (experts.w3[e] @ scaled))
        assert torch.allclose(out, expected, rtol=0, atol=1e-6)  # the score is rounded to fp32


def test_moe_trains() -> None:
    """Router, every expert that was chosen and the shared expert receive gradients."""
    moe = MoE(16, MoEConfig(n_experts=3, hidden_dim=24))
    moe(torch.randn(50, 16)).square().sum().backward()
    for name, weight in moe.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_the_four_verbs_compose() -> None:
    model = build("llama-3")
    ids = tokens(model.config, 12, batch=2)
    with torch.no_grad():
        logits = model(ids)
        assert logits.shape == (2, 12, model.config.vocab_size)
        hidden = model.hidden(model.embed(ids))
        assert torch.equal(model.output(hidden), logits)
        last = model.output(hidden[:, -1])  # what serving asks for
        assert (last - logits[:, -1]).abs().max() <= ATTEND_BOUND


def test_tied_output_is_the_embedding() -> None:
    model = build("llama-3.2")
    assert model.output.weight is model.tok_embeddings.weight
    assert len({id(weight) for weight in model.parameters()}) == len(list(model.parameters()))
    assert build("llama-3").output.weight is not build("llama-3").tok_embeddings.weight


def test_one_attend_per_layer_is_required() -> None:
    model = build("llama-3")
    ids = tokens(model.config, 4)
    with pytest.raises(ValueError, match="shorter"):
        model(ids, attend=[Causal()])


@pytest.mark.parametrize("name", TINY)
def test_initial_weights(name: str) -> None:
    """Norms one, embeddings wide, residual writers narrowed by depth, nothing left as torch made it; a first loss near ln V."""
    config = replace(tiny(name), vocab_size=1024)
    model = init_weights(Llama(config))
    depth = 0.02 / (2 * config.n_layers) ** 0.5
    for key, weight in model.named_parameters():
        if weight.ndim == 1:
            assert (weight == 1).all(), key
            continue
        expected = 0.02
        if key == "tok_embeddings.weight":
            expected = 0.02 if config.tie_embeddings else 1.0
        elif key == "output.weight":
            expected = config.dim**-0.5
        elif key.endswith(("wo.weight", "w2.weight", "w3.weight", "experts.w2", "experts.w3")):
            expected = depth
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.15), key
    ids = tokens(config, 64, batch=4)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(torch.tensor(1024.0).log().item(), abs=1.0)

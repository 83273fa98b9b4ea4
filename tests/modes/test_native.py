"""Native steps equal the model's own forward, for every generation, with plain and with quantized weights; and a row's logits are
the same bits alone, in a batch, with any split, with prefix hits, after preemption and beside drafts.

The bounds compare the native runner with torch modules. Where weights are quantized, three things are told apart: the kernels
against the same modules in a plain forward (the same 8-bit activations, rounding flips apart), the rounding of activations
(against the dequantized twin), and the weights' own loss, which tests/quant is about.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from herd.engine.native import NativeRunner, StepwiseRunner, runner_for, unsupported
from herd.engine.pack import RaggedBatch
from herd.engine.paged import PagedCache
from herd.engine.runner import TorchRunner
from herd.errors import ConfigError
from herd.kernels import native
from herd.model.llama import Llama
from herd.quant.apply import dequantize, quantize
from tests.build import TINY, build, tiny
from tests.modes.pairs import pairs
from tests.modes.test_paged import run, texts
from tests.quant.wide import wide

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no native kernels: {native.missing()}")

Measured = Callable[[str, str, float], None]

PLAIN_BOUND = 2e-5
"""float32 logits of order one; sums in another order, and an exponential of its own (relative error 2e-7)."""
BRAINS_BOUND = 0.75
"""The error of rounding activations before products alone, by that of torch's forward, which rounds everywhere (root mean
squares; measured: at most 0.52)."""
SAME_ROWS = 0.2
"""Share of rows that must agree to PLAIN_BOUND. Sums in another order (1e-6) move an activation now and then over a rounding step
of its 8 bits, and what follows in that row moves others: about half of the rows of such a small model meet none."""
EIGHT_BITS_BOUND = 0.05
"""Root mean square of the logits' error over that of the logits: each product adds about 0.7% (tests/quant/test_linear.py),
a model of four layers has sixteen, and they add up as independent errors do, through the norms of every layer."""
EXPERTS_BOUND = 0.12
"""The same with experts: now and then rounding sends a token to another one, whose answer is another one."""
WEIGHTS = ("int8", "int4", "q4_k_m")


@cache
def quantized(name: str, weights: str) -> Llama:
    model = build(wide(name))
    assert quantize(model, weights) == []
    return model


def alone(model: Llama, name: str, kv: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits of every row of every text, each text in one native step of its own."""
    runner, found = NativeRunner(model), []
    for ids in texts(name):
        count = len(ids)
        cache = PagedCache(model.config, blocks=-(-count // 8), block_size=8, dtype=kv)
        at = torch.arange(count)
        tables = torch.arange(cache.blocks, dtype=torch.int32)[None]
        batch = RaggedBatch(torch.tensor(ids), at, at, torch.tensor([[0, count, 0, 0]]), tables, at)
        found.append(runner.logits(batch, cache))
    return found


def forward(model: Llama, name: str) -> list[Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([ids]))[0] for ids in texts(name)]


def worst(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*product(TINY, [torch.float32]), *pairs(TINY, [torch.bfloat16, torch.float16])],
    ids=str,
)
def test_plain_weights(name: str, dtype: torch.dtype, measured: Measured) -> None:
    """Activations are float32 whatever the weights are, so the twin is the same values in float32. Where the processor multiplies
    bfloat16 itself, products with such weights see rounded activations, as all of torch's bfloat16 forward does."""
    model = build(name).to(dtype)
    expected = forward(build(name).to(dtype).float(), name)
    ours = alone(model, name)
    found = worst(ours, expected)
    measured("native, plain weights, against the float32 forward, max abs difference", f"{name}, {dtype}", found)
    if dtype == torch.bfloat16 and native.isa() in ("amx", "avx512bf16"):
        exact, got, other = (torch.cat(rows).float() for rows in (expected, ours, forward(model, name)))
        assert (got - exact).pow(2).mean() <= BRAINS_BOUND**2 * (other - exact).pow(2).mean()
    else:
        assert found <= PLAIN_BOUND


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in TINY), ("llama-3.2", torch.bfloat16), ("llama-4-scout", torch.bfloat16)],
    ids=str,
)
def test_plain_weights_in_any_company(name: str, dtype: torch.dtype) -> None:
    """Bitwise: chunks, other sequences, prefix hits, preemption and drafts leave no trace."""
    model = build(name).to(dtype)
    seen = run(name, alone(model, name), model=model, runner=NativeRunner(model), seed=3)
    assert seen.worst == 0
    assert seen.mixed
    assert seen.cached


@pytest.mark.parametrize(
    ("name", "kv"), pairs(["llama-3.2", "llama-4-scout"], [torch.int8, torch.bfloat16, torch.float16])
)
def test_any_company_with_a_narrow_cache(name: str, kv: torch.dtype) -> None:
    model = quantized(name, "int4")
    seen = run(name, alone(model, name, kv), model=model, runner=NativeRunner(model), seed=5, dtype=kv)
    assert seen.worst == 0


@pytest.mark.parametrize(("name", "weights"), pairs(TINY, WEIGHTS))
def test_quantized_weights(name: str, weights: str, measured: Measured) -> None:
    """Against the same modules in a plain forward, and against the dequantized twin."""
    model = quantized(name, weights)
    ours, modules, twin = (
        torch.cat(rows) for rows in (alone(model, name), forward(model, name), forward(dequantize(model), name))
    )
    size = twin.pow(2).mean().sqrt()
    from_modules, from_twin = (float((ours - other).pow(2).mean().sqrt() / size) for other in (modules, twin))
    measured(
        "native, quantized weights, against the quantized modules, relative rms", f"{name}, {weights}", from_modules
    )
    measured("8-bit activations against the dequantized twin, relative rms", f"{name}, {weights}", from_twin)
    same = (ours - modules).abs().amax(-1) <= PLAIN_BOUND
    assert same.float().mean() >= SAME_ROWS
    bound = EIGHT_BITS_BOUND if tiny(name).moe is None else EXPERTS_BOUND
    assert from_modules <= bound
    assert from_twin <= bound


@pytest.mark.parametrize("name", TINY)
def test_steps_of_many_rows_through_torch(name: str) -> None:
    """Both runners over one cache; the difference is that of two float32 forwards."""
    model = build(name)
    expected = forward(model, name)
    runner = StepwiseRunner(NativeRunner(model), TorchRunner(model), 32)
    assert run(name, expected, model=model, runner=runner, seed=6).worst <= PLAIN_BOUND


@pytest.mark.parametrize("tiles", [False, True], ids=["plain", "amx"])
def test_which_runner(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: tiles)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = build("llama-2").to(dtype)
        stepwise = tiles and dtype == torch.bfloat16
        assert type(runner_for(model)) is (StepwiseRunner if stepwise else NativeRunner)
        assert isinstance(runner_for(model, deterministic=True), NativeRunner)
    assert isinstance(runner_for(quantized("llama-2", "int8")), NativeRunner)


def test_what_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama-2")
    model.layers[0].attention.wq = torch.nn.Sequential(model.layers[0].attention.wq)
    assert "Sequential" in (unsupported(model) or "")
    assert isinstance(runner_for(model), TorchRunner)
    with pytest.raises(ConfigError, match="Sequential"):
        NativeRunner(model)
    assert "float64" in (unsupported(build("llama-2").double()) or "")
    monkeypatch.setattr(native, "missing", lambda: "there is no compiler")
    assert unsupported(build("llama-2")) == "there is no compiler"

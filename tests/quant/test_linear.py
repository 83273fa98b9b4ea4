"""Quantized modules against their plain twins, natively and in torch."""

from __future__ import annotations

import pytest
import torch

from herd.errors import ConfigError
from herd.kernels import native
from herd.kernels.reference import rounded
from herd.model.moe import Experts
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear, dequantized
from herd.quant.matrix import Matrix
from herd.quant.panels import PANEL, unpack
from herd.quant.scheme import QuantTensor, block_type
from tests.quant.stored import PANELS, stored

needs_native = pytest.mark.skipif(native.isa() is None, reason=f"no native kernels: {native.missing()}")

ROUNDED = 2e-6
"""Outputs of order one: the same 8-bit activations and the same weights, float32 sums in another order."""
EIGHT_BITS = 0.035
"""Outputs of order one: rounding to 8 bits moves each activation by at most 1/254 of the largest of its 128 (which is about 3
here), so the standard deviation of a sum of independent errors is 3 / 254 / sqrt(3) = 0.007; five of them are allowed."""
SHAPES = ((48, 512), (37, 256), (1, 768))
"""Whole panels, a panel that is not full, and a single row."""


def packed(tensor: QuantTensor) -> Matrix:
    matrix = Matrix(tensor)
    assert matrix.pack()
    return matrix


@needs_native
@pytest.mark.parametrize("kind", PANELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_panels_become_blocks_again(kind: str, shape: tuple[int, int]) -> None:
    """Byte for byte, for any bytes: what the library packs is what the file said."""
    type = block_type(kind)
    assert type is not None
    blocks = torch.randint(0, 256, (shape[0], type.row_bytes(shape[1])), dtype=torch.uint8)
    panels = native.pack(type.id, blocks, shape[1]).storage
    back = unpack(panels.view(-(-shape[0] // PANEL), -1), type)
    assert torch.equal(back[: shape[0]], blocks)


@needs_native
@pytest.mark.parametrize("kind", [*PANELS, "F16", "BF16", "F32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_product_equals_the_twin(kind: str, shape: tuple[int, int]) -> None:
    linear = QuantLinear(packed(stored(kind, *shape)))
    twin = dequantized(linear)
    x = torch.randn(5, shape[1])
    if kind == "BF16" and native.isa() == "avx512bf16":
        x = x.bfloat16().float()  # what that instruction set multiplies
    plain = kind in ("F16", "BF16", "F32")
    assert (linear(x) - twin(x if plain else rounded(x))).abs().max() <= ROUNDED
    assert (linear(x) - twin(x)).abs().max() <= (ROUNDED if plain else EIGHT_BITS)


@needs_native
@pytest.mark.parametrize("kind", [*PANELS, "F16"])
def test_a_row_alone_equals_the_row_in_a_batch(kind: str) -> None:
    linear = QuantLinear(packed(stored(kind, 48, 512)))
    x = torch.randn(3, 7, 512)
    together = linear(x)
    for i in range(3):
        for j in range(7):
            assert torch.equal(linear(x[i, j]), together[i, j])


@pytest.mark.parametrize("kind", [*PANELS, "Q5_0", "F16"])
def test_without_panels_torch_multiplies(kind: str) -> None:
    linear = QuantLinear(Matrix(stored(kind, 48, 512)))
    x = torch.randn(5, 512)
    assert torch.equal(linear(x), dequantized(linear)(x))
    assert linear(x.bfloat16()).dtype == torch.bfloat16


@needs_native
@pytest.mark.parametrize("kind", PANELS)
def test_rows_come_from_panels_when_the_blocks_are_gone(kind: str) -> None:
    tensor = stored(kind, 37, 256)
    matrix = packed(tensor)
    matrix.drop()
    assert matrix.blocks is None
    table = QuantEmbedding(matrix)
    ids = torch.tensor([[0, 36, 15], [16, 16, 31]])
    assert torch.equal(table(ids), tensor.dequantize()[ids])
    assert torch.equal(matrix.dequantize(), tensor.dequantize())
    with pytest.raises(ConfigError, match="packed for this processor"):
        table.to("meta")


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "F16", "Q5_1"])
def test_embedding_rows(kind: str) -> None:
    table = QuantEmbedding(Matrix(stored(kind, 40, 256)))
    ids = torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(table(ids), dequantized(table)(ids))
    assert table.to(torch.bfloat16)(ids).dtype == torch.bfloat16, "rows come in the module's dtype"


def experts(kind: str, pack: bool) -> QuantExperts:
    def three(out: int, inner: int, seed: int) -> list[Matrix]:
        found = [Matrix(stored(kind, out, inner, seed=seed + e)) for e in range(4)]
        return [matrix for matrix in found if not pack or matrix.pack()]

    return QuantExperts(three(512, 256, 0), three(256, 512, 10), three(512, 256, 20))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
@pytest.mark.parametrize("counts", [[3, 0, 1, 2], [0, 0, 0, 6], [0, 0, 0, 0]])
def test_experts_in_torch(kind: str, counts: list[int]) -> None:
    module = experts(kind, pack=False)
    twin = dequantized(module)
    assert isinstance(twin, Experts)
    x, counted = torch.randn(sum(counts), 256), torch.tensor(counts)
    assert (
        (module(x, counted) - twin(x, counted)).abs().amax().item() <= ROUNDED
        if sum(counts)
        else module(x, counted).shape == (0, 256)
    )


@needs_native
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_experts_natively(kind: str) -> None:
    module, counts = experts(kind, pack=True), torch.tensor([3, 0, 1, 2])
    twin = dequantized(module)
    x = torch.randn(6, 256)
    out = module(x, counts)
    assert (out - twin(x, counts)).abs().max() <= 2 * EIGHT_BITS  # two products, one behind the other
    alone = [
        module(x[i : i + 1], torch.tensor([int(e == j) for j in range(4)])) for i, e in enumerate((0, 0, 0, 2, 3, 3))
    ]
    assert torch.equal(torch.cat(alone), out)


@needs_native
def test_gradients_go_through_the_plain_product() -> None:
    """A native product has none: silently returning zeros would train nothing."""
    linear = QuantLinear(packed(stored("Q8_0", 16, 64)))
    x = torch.randn(2, 64, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, linear.matrix.dequantize().sum(0).expand(2, -1))


def test_a_state_dict_is_refused() -> None:
    with pytest.raises(ConfigError, match="herd convert"):
        torch.nn.Sequential(QuantLinear(Matrix(stored("Q8_0", 16, 64)))).state_dict()


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="no matrix"):
        Matrix(stored("Q8_0", 2, 16, 64))

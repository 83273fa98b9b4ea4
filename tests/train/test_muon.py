import pytest
import torch
from torch import nn

from herd.train.muon import Muon, orthogonalise

BF16 = 0.02
"""torch's own Muon iterates in bfloat16, ours on a CPU in float32 unless told: relative to the largest change."""


@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 32), (3, 24, 12)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    torch.manual_seed(1)
    g = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalise(g))
    assert values.min() > 0.3
    assert values.max() < 1.3
    # The directions are kept: the same singular vectors, so the product with g is close to symmetric and positive.
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    polar = u @ vh
    cosine = (orthogonalise(g) * polar).sum() / (orthogonalise(g).norm() * polar.norm())
    assert cosine > 0.95


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_it_is_the_muon_of_torch(shape, dtype):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    one = Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1, dtype=dtype)
    other = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1)
    before = ours.detach().clone()
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    far = 2 if dtype is torch.bfloat16 else 1  # both round then, at other places
    assert (ours - theirs).abs().max() < far * BF16 * (ours - before).abs().max()


def test_a_stack_of_experts_is_moved_one_by_one():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 12, 8))
    single = [nn.Parameter(part.clone()) for part in stack.detach()]
    stack.grad = torch.randn(3, 12, 8)
    for p, g in zip(single, stack.grad, strict=True):
        p.grad = g.clone()
    Muon([stack], lr=0.1).step()
    Muon(single, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))


def test_it_lowers_a_loss_and_ignores_the_scale_of_gradients():
    def descend(scale: float) -> torch.Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(6, 4))
        target = torch.randn(6, 4)
        muon = Muon([weight], lr=0.05)
        start = (weight - target).square().sum().item()
        for _ in range(40):
            (scale * (weight - target).square().sum()).backward()
            muon.step()
            muon.zero_grad()
        assert (weight - target).square().sum().item() < 0.5 * start
        return weight.detach()

    torch.testing.assert_close(descend(1.0), descend(1000.0), rtol=1e-3, atol=1e-3)

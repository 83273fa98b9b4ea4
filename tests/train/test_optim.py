import pytest
import torch
from torch import nn

from herd.errors import ConfigError
from herd.model.config import ModelConfig, plain
from herd.model.llama import Llama
from herd.train.config import Budget, OptimConfig, ScheduleConfig
from herd.train.optim import Muon, make_optimisers, orthogonalise, rate, set_rate


def test_schedule_warms_up_stays_and_decays_to_zero():
    config = ScheduleConfig(warmup_steps=10, decay_fraction=0.25, final=0.0)
    assert rate(config, 0, 0.0) == pytest.approx(0.1)
    assert rate(config, 9, 0.1) == 1
    assert rate(config, 500, 0.75) == 1
    assert rate(config, 500, 0.875) == pytest.approx(0.5)
    assert rate(config, 500, 1.0) == 0
    assert rate(ScheduleConfig(warmup_steps=0, decay_fraction=0), 0, 1.0) == 1
    assert rate(ScheduleConfig(warmup_steps=0, decay_fraction=1, final=0.1), 5, 1.0) == pytest.approx(0.1)


def test_budget_ends_by_whichever_comes_first():
    assert Budget(steps=10).progress(5, 1e9) == 0.5
    assert Budget(minutes=2).progress(10**9, 60) == 0.5
    assert Budget(steps=10, minutes=2).progress(5, 90) == 0.75
    assert Budget(minutes=1).progress(0, 1e9) == 1
    for bad in ({}, {"steps": 0}, {"minutes": 0.0}):
        with pytest.raises(ConfigError):
            Budget(**bad)


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


def test_muon_lowers_a_loss_and_ignores_the_scale_of_gradients():
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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("muon", [True, False])
def test_every_parameter_is_optimised_once(tied, muon):
    config = ModelConfig(
        dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=32, layers=plain(2), tie_embeddings=tied
    )
    model = Llama(config)
    optimisers = make_optimisers(model, OptimConfig(kind="muon" if muon else "adamw"))
    held = [p for o in optimisers for group in o.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert all(p.ndim == 1 for o in optimisers for g in o.param_groups if g["weight_decay"] == 0 for p in g["params"])
    set_rate(optimisers, 0.5)
    assert all(group["lr"] == 0.5 * group["peak"] for o in optimisers for group in o.param_groups)

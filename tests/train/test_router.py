import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from herd.train.config import Budget, TrainConfig
from herd.train.prepare import prepare_model
from herd.train.router import Routers, balance_loss, z_loss
from tests.train.test_prepare import build

TOKENS = torch.arange(32).reshape(2, 16)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_is_mixtrals(top_k):
    torch.manual_seed(0)
    logits = torch.randn(50, 8)
    torch.testing.assert_close(balance_loss(logits, top_k), load_balancing_loss_func((logits,), 8, top_k))


def test_even_routers_lose_least():
    even = torch.eye(4).repeat(8, 1) * 1e-3
    assert balance_loss(even, 1).item() == pytest.approx(1.0, abs=1e-3)
    assert balance_loss(torch.tensor([[9.0, 0, 0, 0]]).repeat(8, 1), 1).item() > 3.9
    assert z_loss(torch.zeros(3, 4)).item() == pytest.approx(torch.tensor(4.0).log().item() ** 2)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_gradients_are_those_of_the_formulas_with_and_without_checkpointing(policy):
    plain = build("experts")
    logits = []
    plain.layers[1].feed_forward.router.register_forward_hook(lambda m, a, y: logits.append(y))
    hidden = plain.hidden(plain.embed(TOKENS))
    flat = logits[0].flatten(0, -2)
    (hidden.square().sum() + 0.5 * balance_loss(flat, 2) + 0.25 * z_loss(flat)).backward()

    model = prepare_model(build("experts"), TrainConfig(budget=Budget(steps=1), checkpointing=policy))
    routers = Routers(model, 0.5, 0.25)
    with routers.watching():
        hidden = model.hidden(model.embed(TOKENS))
    routed = routers.take()
    (hidden.square().sum() + routed.extra).backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert not routers.logits
    assert 1 <= routed.figures["expert_load"] <= 4
    assert 0 <= routed.figures["expert_idle"] < 1
    assert all(figure.ndim == 0 and not figure.requires_grad for figure in routed.figures.values())


def test_descending_it_evens_the_load():
    torch.manual_seed(0)
    model = build("experts")
    router = model.layers[1].feed_forward.router
    with torch.no_grad():
        router.weight[0] += 3 * router.weight.norm()
    routers = Routers(model, 1.0, 0.0)
    optimiser = torch.optim.Adam([router.weight], lr=0.05)

    def load(step=True):
        with routers.watching():
            model.hidden(model.embed(TOKENS))
        routed = routers.take()
        optimiser.zero_grad()
        routed.extra.backward()
        optimiser.step()
        return routed.figures["router_balance"].item()

    first = load()
    for _ in range(100):
        last = load()
    assert last < first - 0.1 or last < 2.05


def test_dense_models_have_none_and_removed_hooks_leave_nothing():
    assert not Routers(build(), 1.0, 1.0)
    model = build("experts")
    routers = Routers(model, 1.0, 1.0)
    assert routers
    routers.remove()
    with routers.watching():
        model(TOKENS)
    assert not routers.logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:VecISA")  # a busy machine: torch waits 60 s for a compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch asks for it and hides the warning itself
def test_compiled_blocks_tell_the_same():
    def run(compile):
        model = prepare_model(build("experts"), TrainConfig(budget=Budget(steps=1), compile=compile))
        routers = Routers(model, 0.5, 0.25)
        for _ in range(2):
            model.zero_grad()
            with routers.watching():
                hidden = model.hidden(model.embed(TOKENS))
            (hidden.square().sum() + routers.take().extra).backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

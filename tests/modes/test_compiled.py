"""Compiled equals eager, without recompiling, and layers of the same kind share one graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from herd.engine.cache import StaticCache
from herd.model.attend import packed
from herd.model.config import ModelConfig, irope, plain
from herd.model.llama import Llama
from tests.build import TINY, build, tiny, tokens
from tests.modes.pairs import pairs
from tests.modes.test_modes import MODES_BOUND

PROMPT, STEPS = 40, 26
"""The steps cross two borders of chunks of 16 and three of temperature."""


MORE = ["llama-2", "llama-4-scout"]
"""Whose layers are of kinds that others have, too."""


class Graphs:
    """A torch.compile backend that runs the traced graph as it is and counts how many there were."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> object:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled by another test, and any recompilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def eight_layers(name: str) -> ModelConfig:
    """`name` with eight layers."""
    config = tiny(name)
    if config.temper is None:
        return replace(config, layers=plain(8))
    return replace(config, layers=config.layers * (8 // config.n_layers))


def kinds(config: ModelConfig) -> int:
    """How many different layers there are."""
    return len(set(config.layers))


def compile_blocks(model: Llama) -> Graphs:
    """Compile each block on its own, as training and serving do."""
    graphs = Graphs()
    for block in model.layers:
        block.compile(backend=graphs, fullgraph=True, dynamic=False)
    return graphs


@pytest.mark.parametrize("name", TINY)
def test_decode_step_compiles_once(name: str) -> None:
    """The whole model and its cache in one graph: 26 steps, no second compilation, logits of the full forward."""
    model = build(name)
    ids = tokens(model.config, PROMPT + STEPS, batch=2)
    kv = StaticCache(model.config, batch=2, max_len=PROMPT + STEPS)
    graphs = Graphs()

    @torch.compile(backend=graphs, fullgraph=True, dynamic=False)
    def step(token: Tensor, position: Tensor) -> Tensor:
        return model(token, position, kv.bind(position))

    with torch.no_grad():
        full = model(ids)
        prompt = torch.arange(PROMPT)
        model(ids[:, :PROMPT], prompt, kv.bind(prompt))
        steps = [step(ids[:, i : i + 1], torch.tensor([i])) for i in range(PROMPT, PROMPT + STEPS)]
    assert graphs.count == 1
    assert (torch.cat(steps, 1) - full[:, PROMPT:]).abs().max() <= MODES_BOUND


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in MORE), "llama-3.2", "llama-4-maverick", "llama-guard-4"],
)
def test_blocks_share_graphs_in_serving(name: str) -> None:
    """Eight blocks compiled one by one: one graph per kind of layer, over 26 decode steps."""
    model = build(eight_layers(name))
    ids = tokens(model.config, PROMPT + STEPS)
    kv = StaticCache(model.config, max_len=PROMPT + STEPS)
    with torch.no_grad():
        full = model(ids)
        prompt = torch.arange(PROMPT)
        model(ids[:, :PROMPT], prompt, kv.bind(prompt))
        with torch._dynamo.config.patch(recompile_limit=kinds(model.config)):
            graphs = compile_blocks(model)
            for i in range(PROMPT, PROMPT + STEPS):
                position = torch.tensor([i])
                logits = model(ids[:, i : i + 1], position, kv.bind(position))
                assert (logits[:, 0] - full[:, i]).abs().max() <= MODES_BOUND
    assert graphs.count == kinds(model.config)


# dynamo looks at the gradient of every input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "documents"),
    [
        *pairs(["llama-3.2", "llama-4-maverick", "llama-guard-4"], [False, True]),
        *(pytest.param(*given, marks=pytest.mark.slow) for given in product(MORE, [False, True])),
    ],
)
def test_blocks_share_graphs_in_training(name: str, documents: bool) -> None:
    """Eight blocks, several batches: one graph per kind of layer; loss and gradients as in eager."""
    plain_model, model = build(eight_layers(name)).train(), build(eight_layers(name)).train()
    with torch._dynamo.config.patch(recompile_limit=kinds(model.config)):
        graphs = compile_blocks(model)
        for border in (20, 7):
            ids = tokens(model.config, PROMPT, batch=2, seed=border)
            lengths = (border, PROMPT - border) if documents else (PROMPT,)
            positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
            see = packed(model.config, positions) if documents else None
            losses = []
            for candidate in (plain_model, model):
                loss = candidate(ids, positions, see).logsumexp(-1).mean()
                loss.backward()
                losses.append(float(loss.detach()))
            assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for (name, expected), weight in zip(plain_model.named_parameters(), model.parameters(), strict=True):
        assert expected.grad is not None
        assert torch.allclose(weight.grad, expected.grad, rtol=1e-4, atol=1e-6), name
    assert graphs.count == kinds(model.config)


def test_a_recompilation_would_fail() -> None:
    """The fixture above bites: a step of another length is refused, not silently compiled again."""
    model = build("llama-3")
    step = torch.compile(model, backend=Graphs(), fullgraph=True, dynamic=False)
    with torch.no_grad():
        step(tokens(model.config, 4))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            step(tokens(model.config, 5))


def test_kinds_of_layers() -> None:
    """What the graph counts above compare with."""
    assert kinds(eight_layers("llama-3")) == 1
    assert kinds(eight_layers("llama-4-scout")) == 2
    assert kinds(eight_layers("llama-4-maverick")) == 3
    assert kinds(replace(tiny("llama-guard-4"), layers=irope(48, chunk=None))) == 2

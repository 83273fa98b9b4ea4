"""`train.exact_accumulation`: how many rows a micro-batch has does not show in a single bit; and what differs without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from herd.adapters.apply import LoraConfig, apply_lora
from herd.adapters.prefix import tune_prefix
from herd.data.batch import Loader, TokenBatch
from herd.errors import ConfigError
from herd.kernels.documents import document_attention
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.parallel.mesh import Mesh
from herd.parallel.prepare import Spread
from herd.quant.apply import quantize
from herd.train import run as recipes
from herd.train.config import OptimConfig
from herd.train.forecast import Forecast, forecast
from herd.train.objective import NextToken
from herd.train.overrides import load_config
from herd.train.prepare import prepare_model
from herd.train.router import FIGURES, Routers
from herd.train.trainer import Trainer
from herd.train.watch import Recorder
from tests.build import tiny
from tests.train.loop import config, fingerprint, rows

STEP = 6
"""Rows of a step."""
CLIPPED = OptimConfig(kind="adamw", lr=3e-3, clip=0.1, weight_decay=0.0)
ROUNDING = 4e-7
"""Relative to the largest sum of some 300 products that are added in another order: a few units in its last place."""

KINDS: dict[str, dict[str, Any]] = {
    "llama-2": {},
    "llama-3.2": {"train": {"optim": OptimConfig(kind="muon", lr=3e-3)}},  # tied
    "llama-3.1": {"train": {"precision": "bfloat16", "checkpointing": "full"}},
    "llama-4-scout": {"train": {"router_aux": 0.5, "router_z": 0.1}},
    "llama-4-top-2": {"train": {"router_aux": 0.5, "optim": OptimConfig(kind="adamw8bit", lr=3e-3)}},
    "llama-4-maverick": {},
    "lora with dropout": {"model": "llama-3", "method": "lora"},
    "dora over nf4": {"model": "llama-3", "method": "dora"},
    "prefix": {"model": "llama-3", "method": "prefix"},
    "compiled": {"model": "llama-3", "train": {"compile": True}},
}
MARKS = {
    "llama-4-maverick": [pytest.mark.slow],
    "compiled": [
        pytest.mark.slow,
        pytest.mark.filterwarnings("ignore:VecISA"),  # a busy machine: torch waits 60 s for a compiler
        pytest.mark.filterwarnings("ignore:The .grad attribute"),  # torch's own tracing asks for it
    ],
}


DESCRIBED = {
    "recipe": "pretrain",
    "out": "x",
    "model": {"shape": {"dim": 64, "n_layers": 2}, "tokenizer": "nano"},
    "data": {"sources": ["texts"], "length": 512, "rows": 8},
    "train": {"budget": {"steps": 1}},
}


def made(kind: str) -> Llama:
    torch.manual_seed(0)
    model = init_weights(Llama(tiny(KINDS[kind].get("model", kind))))
    method = KINDS[kind].get("method", "full")
    if method == "dora":
        quantize(model, "nf4")
    if method in ("lora", "dora"):
        apply_lora(model, LoraConfig(4, 8.0, dropout=0.2 if method == "lora" else 0.0, use_dora=method == "dora"))
    return tune_prefix(model, 4) if method == "prefix" else model


def run_of(kind: str, size: int, steps: int = 2, exact: bool = True, **options: Any) -> tuple[Trainer, Recorder]:
    """STEP rows a step, in micro-batches of `size`."""
    given = {"optim": CLIPPED, "accumulate": STEP // size, "exact_accumulation": exact} | KINDS[kind].get("train", {})
    settings, model, seen = config(steps, **given), made(kind), Recorder()
    prepare_model(model, settings)
    routers = Routers(model, settings.router_aux, settings.router_z)
    options.setdefault("loader", Loader(rows(), size, seed=1))
    return Trainer(model, NextToken(routers=routers or None), config=settings, watchers=[seen], **options), seen


def told(seen: Recorder) -> list[Any]:
    return [(r.loss, r.norm, r.supervised, r.tokens, dict(r.metrics)) for r in seen.steps]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in KINDS])
def test_rows_of_a_micro_batch_do_not_show_in_a_single_bit(kind: str) -> None:
    found = []
    for size in (6, 3, 1):
        run, seen = run_of(kind, size)
        run.fit()
        found.append((fingerprint(run), told(seen)))
    assert found[0] == found[1] == found[2]
    if not KINDS[kind].get("method"):
        assert all(norm > 0.1 for _, norm, *_ in found[0][1]), "gradients are clipped"


def test_without_it_they_do() -> None:
    found = [run_of("llama-2", size, 1, exact=False)[0] for size in (6, 1)]
    for run in found:
        run.fit()
    assert fingerprint(found[0]) != fingerprint(found[1])


def test_a_step_is_a_plain_loop_over_rows() -> None:
    """Its gradients, their norm and AdamW's step are torch's own, over rows in their order."""
    run, seen = run_of("llama-2", 3, 1)
    twin, loader = made("llama-2"), Loader(rows(), STEP, seed=1)
    batch = loader.draw()
    learned = int((batch.labels >= 0).sum())
    optimiser = torch.optim.AdamW(
        twin.parameters(), 1.5e-3, CLIPPED.betas, CLIPPED.eps, CLIPPED.weight_decay, fused=True
    )
    for row in range(STEP):
        one = TokenBatch(batch.tokens[[row]], batch.labels[[row]], batch.positions[[row]])
        (NextToken()(twin, one).total / learned).backward()
    norm = nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
    run.fit()
    assert seen.steps[0].norm == float(norm)
    assert seen.steps[0].supervised == learned
    nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    optimiser.step()
    for (name, mine), theirs in zip(run.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)


def test_padding_is_counted_as_before() -> None:
    class Padded(Loader):
        def draw(self) -> TokenBatch:
            batch = super().draw()
            return TokenBatch(batch.tokens, batch.labels, batch.positions, batch.ids, seen=10)

    run, _ = run_of("llama-2", 3, 1, loader=Padded(rows(), 3, seed=1))
    run.fit()
    assert run.counters.tokens == 20


def test_losses_of_routers_are_means_over_each_row() -> None:
    """They are no sums over tokens, so how many rows are one mean is another loss, not another rounding."""
    alone, batch = made("llama-4-scout"), Loader(rows(), STEP, seed=1).draw()
    objective = NextToken(routers=Routers(alone, 0.5, 0.1))
    with torch.no_grad():
        losses = [objective(alone, row) for row in batch.each()]
        together = objective(alone, batch)
    learned = sum(loss.supervised for loss in losses)
    for exact, expected in ((True, losses), (False, [together])):
        run, seen = run_of("llama-4-scout", 6, 1, exact)
        run.fit()
        for name in FIGURES:
            means = sum(loss.metrics[name].double() for loss in expected).item() / learned
            assert seen.steps[0].metrics[name] == pytest.approx(means, rel=1e-6)
    apart = sum(loss.metrics["router_balance"] for loss in losses) - together.metrics["router_balance"]
    assert abs(apart) / learned > 1e-3


def test_a_run_goes_on_exactly_and_the_setting_cannot_change(tmp_path: Any) -> None:
    whole, _ = run_of("lora with dropout", 3, 4)
    whole.fit()
    first, _ = run_of("lora with dropout", 3, 4, out=tmp_path)
    first.fit(until=2)
    resumed, _ = run_of("lora with dropout", 3, 4, out=tmp_path)
    resumed.fit()
    assert fingerprint(resumed) == fingerprint(whole)
    other, _ = run_of("lora with dropout", 3, 4, exact=False, out=tmp_path)
    with pytest.raises(ConfigError, match=r"train\.exact_accumulation: True in the checkpoint, nothing now"):
        other.fit()


def test_it_is_refused_where_nobody_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trainer, and by recipes before any data are read."""
    monkeypatch.setattr(recipes, "device_of", torch.device)
    asked = load_config(DESCRIBED, ["device=cuda", "train.exact_accumulation=true"])
    with pytest.raises(ConfigError, match=r"train\.exact_accumulation: kernels of cuda .* device=cpu"):
        recipes.run_recipe(asked)
    model = made("llama-2")
    with pytest.raises(ConfigError, match=r"train\.exact_accumulation: kernels of cuda .* device=cpu"):
        Trainer(
            model,
            NextToken(),
            Loader(rows(), 2),
            config(exact_accumulation=True),
            spread=Spread(model, Mesh.single("cuda")),
        )


def test_rows_are_dealt_to_ranks_in_turn() -> None:
    def ids(size: int, rank: int, draws: int, dealt: bool = True) -> list[int]:
        loader = Loader(rows(), size, seed=1, rank=rank, world=2, workers=rank)
        loader.draw() if size == 6 else None  # what was made ahead is made anew
        loader.restore(Loader(rows(), size, seed=1).state)
        if dealt:
            loader.deal_rows()
        return [row for _ in range(draws) for row in loader.draw().ids]

    for rank in (0, 1):
        assert ids(6, rank, 2) == ids(3, rank, 4) == ids(1, rank, 12) == list(range(rank, 24, 2))
        assert ids(6, rank, 1, dealt=False) != ids(3, rank, 2, dealt=False)


def test_the_memory_that_is_forecast_is_that_of_one_row() -> None:
    def asked(exact: bool) -> Forecast:
        return forecast(load_config(DESCRIBED, [f"train.exact_accumulation={str(exact).lower()}"]))

    assert asked(True).activations < asked(False).activations / 2
    assert asked(True).tokens == asked(False).tokens


# Op by op: what depends on how many rows there are


def row_by_row(run: Any, *parts: Tensor) -> tuple[Tensor, ...]:
    """The sum over rows of each thing that `run` gives for one row of each part."""
    found: list[Tensor] = []
    for some in zip(*parts, strict=True):
        given = run(*some)
        found = list(given) if not found else [a + b for a, b in zip(found, given, strict=True)]
    return tuple(found)


def test_attention_of_documents_does_not_see_other_rows() -> None:
    q, k, v, grad = (torch.randn(4, 48, 2, 16) for _ in range(4))

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        first = torch.zeros(len(q), dtype=torch.bool)
        first[::48] = True
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = document_attention(*leaves, first)[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    whole = run(*(x.flatten(0, 1) for x in (q, k, v, grad)))
    alone = [run(*some) for some in zip(q, k, v, grad, strict=True)]
    assert all(torch.equal(part, torch.cat(some)) for part, some in zip(whole, zip(*alone, strict=True), strict=True))


def test_weights_gradients_differ_by_rounding_alone() -> None:
    """What the setting is for: the largest difference is a few units in the last place of what is added up."""
    weight = torch.randn(48, 32)
    x, grad = torch.randn(4, 64, 32), torch.randn(4, 64, 48)

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = weight.clone().requires_grad_()
        return list(torch.autograd.grad(x @ leaf.T, [leaf], grad))

    (whole,), (summed,) = run(x.flatten(0, 1), grad.flatten(0, 1)), row_by_row(run, x, grad)
    exact = grad.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    assert (whole - summed).abs().max() <= ROUNDING * exact.abs().max()
    assert (summed - exact).abs().max() <= 2 * (whole - exact).abs().max()

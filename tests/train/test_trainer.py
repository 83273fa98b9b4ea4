"""The loop: what a step is, what is told, when it refuses to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from herd.data.batch import Loader, TokenBatch
from herd.data.encode import IGNORE
from herd.errors import ConfigError, DataError
from herd.model.attend import packed
from herd.model.llama import Llama
from herd.train.config import Budget, EvaluatePart, OptimConfig, ScheduleConfig
from herd.train.measure import bits_per_byte
from herd.train.objective import Loss, NextToken
from herd.train.stop import NonFiniteError
from herd.train.watch import Silent
from tests.train.loop import CONFIG, config, model, rows, trainer, weights

SUMS = 2e-6
"""Largest difference of a weight after one AdamW step of 3e-3 when the same gradients are added in another order: AdamW's first
step is the sign of a gradient, so what is nearly zero moves by a share of the rate."""
GRADIENTS = 2e-7
"""Of gradients of at most 0.2: a few units in the last place of their sums."""


def test_training_lowers_the_loss_and_reports_every_step() -> None:
    run, seen = trainer(40)
    run.fit()
    assert [report.step for report in seen.steps] == list(range(1, 41))
    assert seen.steps[-1].loss < seen.steps[0].loss - 0.3
    assert seen.steps[-1].all_tokens == 40 * 2 * 4 * 16 == run.counters.tokens
    assert seen.steps[-1].progress == 1
    assert all(report.memory_bytes > 1e6 and report.seconds > 0 for report in seen.steps)
    assert seen.steps[0].rate == pytest.approx(0.5 * 3e-3)


def test_the_loss_told_is_the_mean_over_supervised_tokens_exactly() -> None:
    run, seen = trainer(1)
    twin = Loader(rows(), 4, seed=1)
    batches = [twin.draw(), twin.draw()]
    with torch.no_grad():
        sums = [NextToken()(run.model, batch).total for batch in batches]
    counts = [int((batch.labels != IGNORE).sum()) for batch in batches]
    assert counts[0] != counts[1]
    run.fit()
    assert seen.steps[0].supervised == sum(counts)
    assert seen.steps[0].loss == (sums[0].double() + sums[1].double()).item() / sum(counts)


@dataclass(frozen=True)
class Exact:
    """A loss all of whose sums are exact in float32: small whole numbers, and a division by a power of two."""

    total: int = 64

    def count(self, batch: TokenBatch) -> int:
        return int((batch.labels != IGNORE).sum())

    def __call__(self, model: Llama, batch: TokenBatch) -> Loss:
        learned = batch.labels != IGNORE
        states = model.embed(batch.tokens)[learned]
        return Loss((states * batch.labels[learned][:, None]).sum(), int(learned.sum()))


def test_accumulation_is_a_larger_batch_bit_for_bit_where_sums_are_exact() -> None:
    """Unequal counts of supervised tokens (1, 3, 7, 53): a mean of means would be far off."""
    tokens = torch.arange(8 * 32).view(8, 32) % 39
    labels = torch.full((8, 32), IGNORE)
    for row, count in enumerate((1, 3, 7, 53 - 32, 32, 0, 0, 0)):
        labels[row, :count] = tokens[row, :count]
    found = []
    for size in (8, 4, 2, 1):
        run, seen = trainer(
            1,
            objective=Exact(),
            loader=Fixed(
                [TokenBatch(*(part[i : i + size] for part in (tokens, labels, tokens))) for i in range(0, 8, size)]
            ),
            changes={"accumulate": 8 // size, "optim": OptimConfig(clip=None)},
        )
        with torch.no_grad():
            run.model.tok_embeddings.weight.mul_(64).round_()
        keep = Gradients(run)
        run.fit()
        assert seen.steps[0].supervised == 64
        found.append((keep.gradients, seen.steps[0].loss, seen.steps[0].norm, weights(run)))
    for gradients, loss, norm, after in found[1:]:
        assert all(torch.equal(gradients[name], found[0][0][name]) for name in gradients)
        assert (loss, norm) == found[0][1:3]
        assert all(torch.equal(after[name], found[0][3][name]) for name in after)


def test_accumulation_is_a_larger_batch_within_rounding() -> None:
    """In a real model the products themselves add over rows, in an order that depends on their number."""
    changes = {"optim": OptimConfig(kind="adamw", lr=3e-3, clip=None, eps=1e-3)}
    found = []
    for size in (8, 4, 2, 1):
        run, _ = trainer(1, batch=size, changes=changes | {"accumulate": 8 // size})
        keep = Gradients(run)
        run.fit()
        found.append((keep.gradients, weights(run)))
    for gradients, after in found[1:]:
        assert max((gradients[n] - found[0][0][n]).abs().max() for n in gradients) <= GRADIENTS
        assert max((after[n] - found[0][1][n]).abs().max() for n in after) <= SUMS


class Fixed:
    """A loader that gives these batches, again and again."""

    def __init__(self, batches: list[TokenBatch]) -> None:
        self.batches, self.state = batches, 0

    def draw(self) -> TokenBatch:
        self.state += 1
        return self.batches[(self.state - 1) % len(self.batches)]

    def restore(self, state: int, *, exact: bool = True) -> None:
        self.state = state


class Gradients:
    """The gradients with which the first optimiser stepped."""

    def __init__(self, run: Any) -> None:
        self.gradients: dict[str, Tensor] = {}
        for optimiser in run.optimisers:
            optimiser.register_step_pre_hook(lambda *_: self.take(run))

    def take(self, run: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}


def test_clipping_is_torchs() -> None:
    run, seen = trainer(1, changes={"optim": OptimConfig(clip=0.25)})
    keep = Gradients(run)
    twin = model()
    loader = Loader(rows(), 4, seed=1)
    losses = [NextToken()(twin, loader.draw()) for _ in range(2)]
    sum(loss.total for loss in losses).div(sum(loss.supervised for loss in losses)).backward()
    expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.25)
    run.fit()
    assert seen.steps[0].norm == pytest.approx(expected.item(), rel=1e-6)
    assert expected > 0.25
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(keep.gradients[name], weight.grad, rtol=1e-5, atol=1e-7)


def test_no_token_to_learn_is_an_error() -> None:
    ids = torch.ones(2, 8, dtype=torch.int64)
    run, _ = trainer(3, loader=Fixed([TokenBatch(ids, torch.full_like(ids, IGNORE), ids)]))
    before = weights(run)
    with pytest.raises(DataError, match="step 1: no token carries loss"):
        run.fit()
    assert all(torch.equal(before[name], now) for name, now in weights(run).items())


def test_router_losses_move_weights_and_are_not_reported_as_loss() -> None:
    class Routed(NextToken):
        def __call__(self, model: Llama, batch: TokenBatch) -> Loss:
            loss = super().__call__(model, batch)
            extra = model.tok_embeddings.weight.square().sum() * loss.supervised
            return Loss(loss.total, loss.supervised, {"balance": extra.detach()}, extra)

    plain, told = trainer(1)
    plain.fit()
    routed, seen = trainer(1, objective=Routed())
    table = routed.model.tok_embeddings.weight.detach().clone()
    routed.fit()
    assert seen.steps[0].loss == told.steps[0].loss
    assert seen.steps[0].metrics["balance"] == pytest.approx(table.square().sum().item(), rel=1e-6)
    assert seen.steps[0].norm != told.steps[0].norm


def nan_in_embedding(run: Any) -> None:
    with torch.no_grad():
        run.model.tok_embeddings.weight[5, 3] = math.nan


def infinite_activation(run: Any) -> None:
    run.model.layers[1].feed_forward.w3.register_forward_hook(lambda m, given, out: out * math.inf)


def nan_in_one_gradient(run: Any) -> None:
    run.model.layers[0].attention.wv.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), math.nan))


def nan_as_loss(run: Any) -> None:
    inner = run.objective

    class Bad(NextToken):
        def __call__(self, model: Llama, batch: TokenBatch) -> Loss:
            loss = inner(model, batch)
            return Loss(loss.total * math.nan, loss.supervised)

    run.objective = Bad()


@pytest.mark.parametrize(
    ("inject", "named", "told"),
    [
        (nan_in_embedding, "model.tok_embeddings.weight", "the weight"),
        (infinite_activation, "layers.1.feed_forward.w3", "the output of"),
        (nan_in_one_gradient, "layers.0.attention.wv.weight", r"the gradient of .* \(16 of 128"),
        (nan_as_loss, "the loss", "everything that the model gave is"),
    ],
)
def test_numbers_that_are_not_finite_stop_before_the_step_and_are_named(
    inject: Any, named: str, told: str, tmp_path: Any
) -> None:
    run, seen = trainer(6, tmp_path)
    run.fit(until=2)
    inject(run)
    before = weights(run)
    saved = sorted((tmp_path / "checkpoints").iterdir())
    with pytest.raises(NonFiniteError, match=told) as caught:
        run.fit()
    assert caught.value.where == named.removeprefix("model.")
    assert caught.value.exit_code == 4
    assert "step 3:" in str(caught.value)
    twin = Loader(rows(), 4, seed=1)
    drawn = [twin.draw() for _ in range(5)][4]  # two batches a step
    assert f" (rows {', '.join(str(twin.where(row)) for row in drawn.ids[:3])} and 5 more). The step" in str(
        caught.value
    )
    assert len(seen.steps) == 2
    after = weights(run)
    assert all(torch.equal(before[n].nan_to_num(7.0), after[n].nan_to_num(7.0)) for n in before)
    assert sorted((tmp_path / "checkpoints").iterdir()) == saved


def test_spoiled_weights_are_never_saved(tmp_path: Any) -> None:
    run, _ = trainer(6, tmp_path)
    run.fit(until=2)
    nan_in_embedding(run)
    with pytest.raises(NonFiniteError, match=r"tok_embeddings.weight \(1 of 640 values\) is not finite: not saved"):
        run.save()


def test_evaluation_changes_nothing_and_comes_on_time() -> None:
    class Figures:
        def __call__(self, model: Llama) -> dict[str, float]:
            torch.rand(3)
            return {"training": float(model.training)}

        def texts(self, model: Llama) -> list[tuple[str, str]]:
            return [("Hello", "there")]

    plain, expected = trainer(6, lora=True)
    plain.fit()
    run, seen = trainer(
        6, lora=True, evaluate=Figures(), changes={"evaluate": EvaluatePart(every_steps=4, every_minutes=None)}
    )
    assert run.fit() == {"training": 0.0}
    assert seen.evaluations == [(4, {"training": 0.0}), (6, {"training": 0.0})]
    assert seen.texts == [(4, "Hello", "there"), (6, "Hello", "there")]
    assert run.model.training
    assert [r.loss for r in seen.steps] == [r.loss for r in expected.steps]


def test_budgets_of_tokens_and_minutes_end_the_run() -> None:
    run, _ = trainer(changes={"budget": Budget(tokens=500)})
    run.fit()
    assert run.step == 4  # of 128 tokens each
    run, _ = trainer(changes={"budget": Budget(steps=10**6, minutes=0.003)})
    run.fit()
    assert 0 < run.step < 10**6
    assert run.counters.seconds >= 0.18


def test_what_watchers_raise_stops_the_run() -> None:
    class Angry(Silent):
        def on_step(self, report: Any) -> None:
            raise RuntimeError("no")

    run, _ = trainer(watchers=[Angry()])
    with pytest.raises(RuntimeError, match="no"):
        run.fit()


def test_packed_documents_do_not_see_each_other() -> None:
    tokens = torch.randint(3, 40, (1, 8))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    labels = torch.full((1, 8), IGNORE)
    labels[0, 4:7] = tokens[0, 5:]
    one, asked = model(), []

    def attend(config: Any, positions: Tensor) -> Any:
        asked.append(positions)
        return packed(config, positions)

    first = NextToken(attend=attend)(one, TokenBatch(tokens, labels, positions))
    other = tokens.clone()
    other[0, :4] = 5
    second = NextToken(chunk=3)(one, TokenBatch(other, labels, positions))
    torch.testing.assert_close(first.total, second.total, rtol=0, atol=1e-5)
    assert first.supervised == 3
    assert len(asked) == 1


def test_bits_per_byte_of_a_uniform_model_is_the_size_of_its_vocabulary() -> None:
    uniform = Llama(CONFIG)
    with torch.no_grad():
        uniform.norm.weight.zero_()  # all logits are equal
    documents = [(list(range(3, 30)), 27), ([4, 5, 6], 3)]
    assert bits_per_byte(uniform, documents, bos=1, length=10) == pytest.approx(torch.log2(torch.tensor(40.0)).item())


def test_a_run_without_a_folder_saves_nothing_and_a_schedule_is_followed() -> None:
    run, seen = trainer(4, changes={"schedule": ScheduleConfig(warmup_steps=0, decay_fraction=1.0)})
    run.fit()
    assert [report.rate for report in seen.steps] == pytest.approx([3e-3 * share for share in (1, 0.75, 0.5, 0.25)])
    with pytest.raises(ConfigError):
        config(accumulate=0)

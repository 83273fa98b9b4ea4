import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from herd.errors import ConfigError
from herd.train.average import Average, soup
from herd.train.config import AveragePart


def walk(model, steps, after):
    torch.manual_seed(0)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        after(step)


def test_the_tail_is_torchs_average():
    model = nn.Linear(3, 2)
    ours, theirs = Average(model, AveragePart(kind="tail", start=0.5)), AveragedModel(model)

    def after(step):
        ours.update(step, step / 10)
        if step >= 5:
            theirs.update_parameters(model)

    walk(model, 10, after)
    assert ours.count == 6
    for name, weight in theirs.module.named_parameters():
        torch.testing.assert_close(ours.held[name], weight.detach())


def test_the_moving_average_is_torchs_once_the_start_is_over():
    model = nn.Linear(3, 2)
    ours, theirs = Average(model, AveragePart(decay=0.1)), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1))

    def after(step):
        ours.update(step, step / 10)
        theirs.update_parameters(model)

    walk(model, 10, after)
    for name, weight in theirs.module.named_parameters():
        torch.testing.assert_close(ours.held[name], weight.detach())


def test_it_is_swapped_in_and_out_saved_and_restored():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    model.bias.requires_grad_(False)
    average = Average(model, AveragePart())
    with average.swapped():
        pass
    walk(model, 4, lambda step: average.update(step, step / 4))
    assert set(average.held) == {"weight"}
    assert average.held["weight"].dtype == torch.float32
    own = model.weight.detach().clone()
    with average.swapped():
        assert torch.equal(model.weight, average.held["weight"].bfloat16())
    assert torch.equal(model.weight, own)
    other = Average(model, AveragePart())
    other.restore(average.tensors())
    walk(model, 3, lambda step: (average.update(step, 1.0), other.update(step, 1.0)))
    assert other.count == average.count == 7
    assert torch.equal(other.held["weight"], average.held["weight"])


def test_updates_come_every_so_many_steps():
    model = nn.Linear(2, 2)
    average = Average(model, AveragePart(every_steps=3))
    walk(model, 10, lambda step: average.update(step, step / 10))
    assert average.count == 3


def test_a_soup_is_the_weighted_mean():
    one, two = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}
    assert torch.equal(soup([one, two])["a"], torch.tensor([2.0, 4.0]))
    assert torch.equal(soup([one, two], [3, 1])["a"], torch.tensor([1.5, 3.0]))
    assert soup([{"a": torch.ones(2).bfloat16()}])["a"].dtype == torch.bfloat16
    for bad, said in (
        ([one, {"b": one["a"]}], "another model"),
        ([], "at least one"),
        ([one, {"a": torch.ones(3)}], "another"),
    ):
        with pytest.raises(ConfigError, match=said):
            soup(bad)
    with pytest.raises(ConfigError, match="shares"):
        soup([one, two], [1])

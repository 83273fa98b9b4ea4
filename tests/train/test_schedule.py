import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from herd.train.config import ScheduleConfig
from herd.train.schedule import rate

STEPS, WARM = 40, 8


def ours(config):
    return [rate(config, step, step / STEPS) for step in range(WARM + 1, STEPS)]


def theirs(make):
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimiser)
    found = []
    for _ in range(STEPS):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return found[WARM + 1 :]


def test_cosine_and_linear_are_those_of_transformers_after_the_warm_up():
    pairs = {
        "cosine": lambda o: get_cosine_schedule_with_warmup(o, WARM, STEPS),
        "linear": lambda o: get_linear_schedule_with_warmup(o, WARM, STEPS),
    }
    for kind, make in pairs.items():
        assert ours(ScheduleConfig(kind=kind, warmup_steps=WARM)) == pytest.approx(theirs(make), abs=1e-12)


def test_wsd_is_that_of_transformers():
    make = lambda o: get_wsd_schedule(o, WARM, 10, num_training_steps=STEPS, decay_type="linear")  # noqa: E731
    assert ours(ScheduleConfig(kind="wsd", warmup_steps=WARM, decay_fraction=0.25)) == pytest.approx(theirs(make))


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear", "constant"])
def test_every_shape_warms_up_and_ends_where_it_says(kind):
    config = ScheduleConfig(kind=kind, warmup_steps=10, decay_fraction=0.5, final=0.1)
    assert [rate(config, s, s / 100) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rate(config, 100, 1.0) == pytest.approx(1.0 if kind == "constant" else 0.1)
    rest = [rate(config, s, s / 100) for s in range(10, 101)]
    assert rest == sorted(rest, reverse=True)


def test_closed_forms_with_a_floor():
    config = ScheduleConfig(kind="cosine", warmup_steps=0, final=0.1)
    assert rate(config, 25, 0.25) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(config, 0, 0.0) == 1.0
    assert rate(ScheduleConfig(kind="linear", warmup_steps=0, final=0.2), 25, 0.25) == pytest.approx(0.8)


def test_a_warm_up_longer_than_the_run_never_decays():
    for kind in ("cosine", "linear"):
        config = ScheduleConfig(kind=kind, warmup_steps=100)
        assert rate(config, 49, 0.98) == pytest.approx(0.5)

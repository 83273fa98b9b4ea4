"""herd.LLM over two processes: the same tokens, what is refused, and how it ends when a process dies, hangs or is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import herd
from herd.chat.params import SamplingParams
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.pack import RaggedBatch
from herd.engine.ranks import Ranks
from herd.engine.rankwire import batch_of, step_of
from herd.engine.request import Request
from herd.errors import ConfigError, RanksError

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = [
    "Once upon a time there was a little dog who lived in a small house near the forest with his mother and his sisters.",
    "The sun",
    "Once upon a time there was a little cat",
]
SOON = 30.0
"""Seconds in which the end of a process is noticed on a machine that others use, too."""


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def two() -> Iterator[herd.LLM]:
    with herd.LLM("nano", tensor_parallel=2, max_seqs=4, step_tokens=16, debug=True) as llm:
        yield llm


def test_greedy_tokens_and_scores_are_those_of_one_process(two: herd.LLM) -> None:
    """Prompts in pieces of 16, several at once, a beginning that is known already."""
    with herd.LLM("nano", max_seqs=4) as one:
        expected = [done.outputs[0].tokens for done in one.generate(PROMPTS, GREEDY)]
        scores = [score.logprob for score in one.score([("The sky is", " blue")])]
        heads, size = one.model.config.n_heads, sum(one.weights.values())
    for _ in range(2):
        assert [done.outputs[0].tokens for done in two.generate(PROMPTS, GREEDY)] == expected
    assert two.stats().cached_tokens > 0
    assert [score.logprob for score in two.score([("The sky is", " blue")])] == pytest.approx(scores, abs=1e-4)
    assert two.model.config.n_heads == heads // 2
    assert two.config.n_heads == heads
    assert sum(two.weights.values()) < 0.55 * size
    assert "on each of 2 ranks" in two.budget.sentence()


def test_an_abort_leaves_nothing_behind(two: herd.LLM) -> None:
    for _ in two.stream("Once", SamplingParams(temperature=0, max_tokens=400)):
        break
    until(lambda: two.stats().running == 0, "the request goes on")
    assert two.stats().blocks_used == 0
    assert two.generate(["The sun"], GREEDY)[0].outputs[0].tokens


def test_what_is_not_possible_is_refused_by_name(two: herd.LLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embeddings are not possible with tensor_parallel=2"):
        two.embed(["a"])
    with pytest.raises(ConfigError, match="herd merge"):
        two.load_adapter("a", tmp_path)
    for ask in (lambda: two.save_prompt(tmp_path / "x", "Once"), lambda: two.load_prompt(tmp_path / "x")):
        with pytest.raises(ConfigError, match="prompt files"):
            ask()
    with pytest.raises(ConfigError, match="tp 3: must be a multiple of the 2 key/value heads"):
        herd.LLM("nano", tensor_parallel=3)
    with pytest.raises(ConfigError, match="name or path"):
        herd.LLM(herd.load("nano"), tensor_parallel=2)
    with pytest.raises(ConfigError, match="tensor_parallel is 0"):
        herd.LLM("nano", tensor_parallel=0)
    with pytest.raises(ConfigError, match=r"2 GPUs|'cpu' or 'cuda'|cuda"):
        herd.LLM("nano", tensor_parallel=2, device="cuda:0")


def test_a_killed_process_ends_the_model(two: herd.LLM) -> None:
    """The last test with this pair: in the middle of a reply, and for whoever comes later."""
    assert two._ranks is not None
    (pid,) = two._ranks.pids
    stream = two.stream("Once", SamplingParams(temperature=0, max_tokens=400, ignore_stop_ids=True))
    next(iter(stream))
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(herd.errors.HerdError, match="rank 1 was killed by SIGKILL"):
        for _ in stream:
            pass
    with pytest.raises(herd.errors.HerdError, match="rank 1 was killed by SIGKILL"):
        two.generate(["The sun"], GREEDY)
    assert time.monotonic() - began < SOON
    assert two.lost is not None
    until(lambda: gone(pid), "the process is there")


@pytest.mark.slow
def test_a_hung_process_is_not_waited_for(tmp_path: Path) -> None:
    """Stopped in the middle: after the patience every rank is ended."""
    path = resolve("nano")
    with Ranks(2, patience=timedelta(seconds=2)) as ranks:
        store = open_store(path)
        model = ranks.load(path, store, torch.float32)
        config = EngineConfig(blocks=8, max_len=64)
        engine = Engine(model, config, runner=ranks.runner(model, config))
        (pid,) = ranks.pids
        os.kill(pid, signal.SIGSTOP)
        engine.add(Request("a", (1, 2, 3), GREEDY))
        with pytest.raises(RanksError, match="a step failed on rank 0"):
            engine.step()
        until(lambda: gone(pid), "the process is there")


ENDS = """
import os, sys, time, herd
llm = herd.LLM("nano", tensor_parallel=2)
print(*llm._ranks.pids, flush=True)
for _ in llm.stream("Once", herd.SamplingParams(temperature=0, max_tokens=450)):
    time.sleep(0.2)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nobody_outlives_rank_0(how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", ENDS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        program.send_signal(how)
        program.wait(SOON)
    until(lambda: gone(pid), "the follower lives on")


def test_steps_cross_the_wire_whole() -> None:
    batch = RaggedBatch(
        tokens=torch.tensor([5, 6, 7]),
        positions=torch.tensor([0, 1, 9]),
        slots=torch.tensor([16, 17, 41]),
        spans=torch.tensor([[0, 2, 0, 0], [2, 1, 9, 1]]),
        tables=torch.tensor([[1, 0], [2, 5]], dtype=torch.int32),
        logit_rows=torch.tensor([2]),
    )
    back = batch_of(step_of(batch), torch.device("cpu"))
    for name in ("tokens", "positions", "slots", "spans", "tables", "logit_rows"):
        assert torch.equal(getattr(back, name), getattr(batch, name)), name
    assert back.known == ((0, 2, 0, 0), (2, 1, 9, 1))

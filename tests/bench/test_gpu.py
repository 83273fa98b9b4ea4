"""Measuring a GPU, as far as a CPU can tell; and for real where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from herd.bench.contest import Plan, contest
from herd.bench.gpu_goals import eighth_bytes, goals
from herd.bench.material import gguf_file, step_bytes
from herd.bench.players.base import Setup
from herd.bench.players.gpu_limits import GpuLimits
from herd.bench.subject import subject
from herd.bench.table import tables
from herd.cli.bench import command
from herd.errors import ConfigError
from herd.model.accounting import parameters


def plan(folder: Path, **given: object) -> Plan:
    usual: dict[str, object] = {"task": "decode", "kinds": ["BF16"], "threads": 1, "prompt": 8, "tokens": 4, "runs": 1}
    return Plan(subject=subject("tiny"), folder=folder, **(usual | given))  # type: ignore[arg-type]


def test_limits_are_of_the_right_size() -> None:
    """The same code on a CPU: rates are positive, and a copy counts what it reads and what it writes."""
    limits = GpuLimits(Setup("", 1, 1, 1 << 24, "cpu"), shape=(64, 128, 64))
    assert set(limits.peaks()) == {"bfloat16", "float32", "int8"}
    assert all(rate > 0 for rate in limits.peaks().values())
    assert set(limits.bandwidth()) == {"copy", "maximum of float32"}
    assert limits.facts()["bytes"] == 1 << 24


def test_bytes_of_a_step_in_fp8(tmp_path: Path) -> None:
    """Every matrix of the layers is one byte a value instead of two."""
    what = subject("tiny")
    path = gguf_file(what, "BF16", tmp_path)
    c = what.config
    layer = c.dim * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads) + 3 * c.dim * c.hidden_dim
    assert step_bytes(path) - eighth_bytes(path) == c.n_layers * layer
    assert eighth_bytes(path) > parameters(c)


def test_goals() -> None:
    own = {"task": "decode", "batch": 1, "weights": "BF16", "share": 0.8, "share_of_compute": 0.01, "times": None}
    peer = {"who": "transformers", "times": 3.5}
    assert [(g["least"], g["met"]) for g in goals([own, peer], 128)] == [(0.75, True), (4.0, False)]
    assert [g["met"] for g in goals([own | {"weights": "Q4_0", "share": 0.44}], 128)] == [False]
    (batch,) = goals([own | {"batch": 16, "share": 0.4, "share_of_compute": 0.06}], 128)
    assert (batch["least"], batch["met"]) == (0.45, True)
    prefill = own | {"task": "prefill", "share": 0.6}
    assert goals([prefill], 128) == []
    assert [g["met"] for g in goals([prefill], 4096)] == [False]


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        contest(plan(tmp_path, kinds=["FP8"]))
    with pytest.raises(ConfigError, match=r"llama\.cpp"):
        contest(plan(tmp_path, device="cuda", peers=["llama.cpp"]))
    result = CliRunner().invoke(command, ["decode", "--device", "gpu9", "--model", "tiny"])
    assert isinstance(result.exception, ConfigError)
    assert "no device" in str(result.exception)
    assert CliRunner().invoke(command, ["cold-start", "--device", "cpu"]).exit_code == 2


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["decode", "prefill", "batch"])
def test_a_contest_on_a_gpu(task: str, tmp_path: Path) -> None:
    batches = (1, 4) if task == "batch" else (1,)
    kinds = ["BF16", "FP8", "Q8_0", "Q4_0"] if task == "decode" else ["BF16"]
    report = contest(plan(tmp_path, task=task, kinds=kinds, batches=batches, device="cuda"))
    assert all(row["tokens_per_s"] > 0 for row in report["rows"])
    assert all(row["facts"]["runner"] == "CudaRunner" for row in report["rows"])
    assert "fp8" in tables(report) or task != "decode"

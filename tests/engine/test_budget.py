"""The memory that keys and values get: chosen, given, refused; and what is free, also inside a container."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from herd.engine.budget import budget_for, memory_of
from herd.engine.config import EngineConfig
from herd.errors import ConfigError
from herd.planning.devices import GIB, free_memory
from tests.build import tiny

CONFIG = replace(tiny("llama-3"), max_seq_len=8192)
PER_TOKEN = 2 * CONFIG.n_layers * CONFIG.n_kv_heads * CONFIG.head_dim * 2  # bf16


def test_there_is_room_for_one_long_request_and_for_the_usual_ones() -> None:
    budget = budget_for(CONFIG, kv="bf16", free=100 * GIB, max_seqs=4)
    assert budget.max_len == 8192
    assert budget.tokens == 4 * 4096
    assert budget.nbytes == budget.tokens * PER_TOKEN
    assert budget_for(CONFIG, kv="bf16", free=100 * GIB, max_seqs=1).tokens == 8192
    assert budget_for(CONFIG, kv="bf16", free=None, max_seqs=1).tokens == 8192


def test_no_more_than_all_requests_can_use() -> None:
    assert budget_for(CONFIG, kv="bf16", free=100 * GIB, max_seqs=2, max_len=100).tokens == 2 * 112
    assert budget_for(CONFIG, kv="bf16", free=1, max_seqs=2, max_len=100, memory="1 GiB").tokens == 2 * 112


def test_little_memory_lowers_the_models_own_context_and_says_so() -> None:
    budget = budget_for(CONFIG, kv="bf16", free=1, memory=1000 * PER_TOKEN)
    assert budget.max_len == budget.tokens == 992
    assert "each of up to 992 tokens (the model was made for 8,192: memory does not hold more)" in budget.sentence()
    assert "bfloat16 (62 blocks of 16)" in budget.sentence()


def test_a_context_that_was_asked_for_is_refused_when_it_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"2,000 tokens take .* given\) holds 992 tokens|2,000 tokens .* holds 992"):
        budget_for(CONFIG, kv="bf16", free=1, memory=1000 * PER_TOKEN, max_len=2000)
    with pytest.raises(ConfigError, match="the free memory"):
        budget_for(CONFIG, kv="bf16", free=1000, max_len=2000)
    with pytest.raises(ConfigError, match="made for 8192"):
        budget_for(CONFIG, kv="bf16", free=None, max_len=8193)
    with pytest.raises(ConfigError, match="at least 2"):
        budget_for(CONFIG, kv="bf16", free=None, max_len=1)
    with pytest.raises(ConfigError, match="'int3': choose"):
        budget_for(CONFIG, kv="int3", free=None)


@pytest.mark.parametrize(
    ("given", "count"),
    [(5000, 5000), ("5000", 5000), ("2 GiB", 2 * GIB), ("1.5gb", 1_500_000_000), (" 500 MB ", 500_000_000)],
)
def test_memory_is_bytes_or_a_text(given: int | str, count: int) -> None:
    assert memory_of(given) == count


@pytest.mark.parametrize("given", [0, -5, True, "", "much", "5 apples", "-5 GB", 1.5, None])
def test_other_amounts_are_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="memory is"):
        memory_of(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": 0}, {"blocks": True}, {"max_len": 1}, {"max_seqs": 0}, {"max_tokens": 0}, {"seed": -1}, {"kv": "x"}],
)
def test_limits_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(**{"blocks": 10, "max_len": 20} | wrong)  # type: ignore[arg-type]


def test_one_request_must_fit() -> None:
    with pytest.raises(ConfigError, match="2 blocks of 16 hold 32 tokens, and one request may have 33"):
        EngineConfig(blocks=2, max_len=33)


def _machine(root: Path, available: int) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text("0::/jobs/one\n")
    (root / "sys/fs/cgroup/jobs/one").mkdir(parents=True)
    return root


def test_free_memory_is_what_the_machine_has(tmp_path: Path) -> None:
    assert free_memory(_machine(tmp_path, 3 * GIB)) == 3 * GIB
    assert (free_memory() or GIB) > 0


@pytest.mark.parametrize("folder", ["jobs", "jobs/one"])
def test_a_container_allows_less(tmp_path: Path, folder: str) -> None:
    group = _machine(tmp_path, 3 * GIB) / "sys/fs/cgroup" / folder
    (group / "memory.max").write_text(f"{2 * GIB}\n")
    (group / "memory.current").write_text(f"{GIB}\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 4096\n")
    assert free_memory(tmp_path) == GIB + 4096
    (group / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 3 * GIB


def test_an_older_container_allows_less(tmp_path: Path) -> None:
    group = _machine(tmp_path, 3 * GIB) / "sys/fs/cgroup/memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{3 * GIB}\n")  # over the limit for a moment
    assert free_memory(tmp_path) == 0

"""`herd plan -tp N`: what each of several processes holds, beside what such processes read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import herd
from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.checkpoint.part import PartStore
from herd.cli.main import run
from herd.errors import CheckpointError, ConfigError
from herd.parallel.part import Part
from herd.planning.plan import plan
from tests.build import build, tiny
from tests.checkpoint.folders import write_hf
from tests.cli.tiny import write_folder


@pytest.mark.parametrize(("name", "ranks"), [("llama-3", 2), ("llama-3", 4), ("llama-3.2", 2), ("llama-4-scout", 2)])
def test_each_process_is_counted_as_what_it_reads(name: str, ranks: int, tmp_path: Path) -> None:
    """To the byte, in the numbers of the files and in bfloat16: 4 processes over 2 key/value heads, a tied output, experts."""
    config = tiny(name)
    model = build(replace(config, n_heads=4) if config.n_heads == 5 else config)
    write_hf(tmp_path, model)
    store = open_store(tmp_path)
    parts = [Part(store.config, rank, ranks) for rank in range(ranks)]
    for weights, dtype in ((None, torch.float32), ("bf16", torch.bfloat16)):
        setup = plan(tmp_path, tensor_parallel=ranks, weights=weights).setup
        total = 0
        for rank, part in enumerate(parts):
            held = fill(PartStore(store, part), dtype)
            read = sum(one.numel() * one.element_size() for one in held.parameters())
            assert setup.share(rank).weights.total == read
            total += read
            heads = part.config.n_kv_heads
            each = 2 * part.config.n_layers * heads * part.config.head_dim * 2
            assert setup.share(rank).kv == setup.context * each
        assert setup.weight_bytes.total == total


def test_parts_add_up_and_more_processes_hold_less() -> None:
    sizes = []
    for ranks in (1, 2, 4, 8, 16):
        found = plan("llama-3.1-70b", device="h100", tensor_parallel=ranks, batch=4).as_dict()
        assert found["tensor_parallel"] == ranks
        assert sum(found["breakdown"].values()) == found["total_bytes"]
        first = found["devices"][0]
        assert first["count"] == ranks
        sizes.append(first["each_bytes"])
        if ranks > 1:
            assert sum(v for k, v in found["each"].items() if k != "total_bytes") == found["each"]["total_bytes"]
            assert first["each_bytes"] == found["each"]["total_bytes"]
            assert ranks * first["each_bytes"] >= found["total_bytes"]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 7 * sizes[3], "eight hold little more than an eighth each"
    eight, sixteen = (plan("llama-3.1-70b", device="h100", tensor_parallel=n) for n in (8, 16))
    assert sixteen.setup.kv_sequence() == 2 * eight.setup.kv_sequence(), "two processes keep the same head"


def test_every_process_must_fit_on_its_own_device() -> None:
    """The flags that are proposed make it fit: more processes, and not more devices for as many."""
    fit = plan("llama-3.1-70b", device="rtx4090", tensor_parallel=4).first
    assert not fit.fits
    assert fit.each_bytes > fit.device.memory
    assert any("--tensor-parallel-size" in one.flags for one in fit.advice)
    assert not any("--devices" in one.flags for one in fit.advice)
    for one in fit.advice:
        words = one.flags.replace("--tensor-parallel-size", "--tensor_parallel").split()
        flags: dict[str, Any] = {
            k.removeprefix("--"): int(v) if v.isdigit() else v for k, v in zip(words[::2], words[1::2], strict=True)
        }
        changed = plan("llama-3.1-70b", **{"device": "rtx4090", "tensor_parallel": 4, **flags}).first
        assert changed.fits, one.flags
        assert changed.total_bytes == one.total


def test_on_this_machine_processes_share_its_memory() -> None:
    one, two = (plan("llama-3.2-1b", device="cpu", tensor_parallel=n) for n in (1, 2))
    assert two.first.device.count == 1
    assert two.first.runtime_bytes == 2 * one.first.runtime_bytes
    assert two.first.speed.decode <= one.first.speed.decode
    assert any("all processes are on this machine" in note for note in two.assumptions)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("llama-3.1-8b", {"tensor_parallel": 3}, "a divisor of the 8 key/value heads"),
        ("llama-3.1-8b", {"tensor_parallel": 2, "devices": 4}, "leave --devices out"),
        ("llama-3.1-8b", {"tensor_parallel": 0}, "--tensor-parallel-size is 0"),
        ("llama-4-behemoth", {"tensor_parallel": 8}, "its matrices are not known"),
    ],
)
def test_what_cannot_be_shared_is_refused(name: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(name, device="h100", **kwargs)


def test_a_cut_through_blocks_is_refused_as_reading_it_would_be(tmp_path: Path) -> None:
    herd.convert(write_folder(tmp_path / "m"), tmp_path / "m.gguf", to="gguf", quant="q8_0", greedy=0)
    store = open_store(tmp_path / "m.gguf")
    part = PartStore(store, Part(store.config, 0, 2))
    cut = [name for name in store.names() if name.endswith(("wo.weight", "w2.weight"))]
    wrong = {name for name in cut if _refused(part, name)}
    if not wrong:
        assert plan(tmp_path / "m.gguf", tensor_parallel=2).setup.shares
        return
    with pytest.raises(ConfigError, match="not whole blocks") as told:
        plan(tmp_path / "m.gguf", tensor_parallel=2)
    assert str(told.value).split()[0] in wrong
    assert plan(tmp_path / "m.gguf", tensor_parallel=2, weights="bf16").setup.shares


def _refused(part: PartStore, name: str) -> bool:
    try:
        part.raw(name)
    except CheckpointError:
        return True
    return False


def test_the_table_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "llama-3.3-70b", "--device", "rtx4090", "-tp", "4"]) == 0
    out = capsys.readouterr().out
    assert "EACH  of 4 processes" in out
    proposed = [line for line in out.splitlines() if line.startswith("herd plan")]
    assert proposed
    assert all("--tensor-parallel-size" in line for line in proposed)
    assert run(["plan", "llama-3.3-70b", "--device", "rtx4090", "--tensor-parallel-size", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["each"]["total_bytes"] > 0

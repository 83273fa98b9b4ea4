"""Findings about a machine: each remedy appears exactly when there is something to remedy."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from herd.bench import checkup as module
from herd.bench.capacity import FORMS, Rates, capacities
from herd.bench.checkup import Finding, checkup
from herd.planning.devices import GIB


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTEN", 0.01)
    monkeypatch.setattr(module.Pulse, "stop", lambda self: 0.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def named(findings: list[Finding], name: str) -> Finding:
    return next(one for one in findings if one.name == name)


def test_everything_that_is_not_good_says_why(tmp_path: Path) -> None:
    findings = checkup(tmp_path)
    assert {one.area for one in findings} == {"processor", "memory", "graphics", "software", "disk"}
    assert all(one.why for one in findings if one.level in ("slow", "broken"))
    assert not any(one.fix and one.level == "good" for one in findings)


@pytest.mark.parametrize(
    ("said", "level", "words"),
    [
        (None, "good", ""),
        ("1", "slow", "idle"),
        ("64", "slow", "wait"),
        ("many", "note", "no number"),
        ("0", "note", "no number"),
    ],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, level: str, words: str) -> None:
    device = module.this_machine()
    source = device.source.rsplit(maxsplit=2)[0] + " 2 cores"
    monkeypatch.setattr(module, "this_machine", lambda: replace(device, source=source))
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    found = named(checkup(tmp_path), "threads")
    assert (found.level, words in found.why) == (level, True)
    assert bool(found.fix) == (level != "good")


def test_absent_native_kernels_are_slow_and_told_how_to_get(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "loaded", lambda: (None, None, "herd was installed without its native kernels"))
    found = named(checkup(tmp_path), "native kernels")
    assert found.level == "slow"
    assert "compiler" in found.fix


def test_a_worse_instruction_set_than_the_processor_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "loaded", lambda: (object(), "scalar", None))
    monkeypatch.setattr(module, "_best_isa", lambda can: "avx2")
    monkeypatch.setenv("HERD_ISA", "scalar")
    found = named(checkup(tmp_path), "native kernels")
    assert (found.level, found.fix) == ("slow", "unset HERD_ISA")


def test_other_programs_and_full_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.Pulse, "stop", lambda self: 0.5)
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 20)
    findings = checkup(tmp_path)
    assert named(findings, "other programs").level == "slow"
    assert named(findings, "free").level == "note"


def test_a_small_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: usage(1, 1, 1 << 20))
    assert named(checkup(tmp_path / "absent" / "hub"), "downloads").level == "note"


def test_what_fits_follows_memory_and_limits() -> None:
    little = capacities(8 * GIB, None)
    slow, fast = (capacities(1 << 44, Rates(rate, 1e11, 2e11)) for rate in (1e10, 2e10))
    assert [one.model for one in little] == [one.model for one in slow]
    assert all(form.fits for one in slow for form in one.forms)
    assert [form.name for form in little[0].forms] == list(FORMS)
    row = next(one for one in little if one.model == "llama-3.1-8b")
    assert [form.fits for form in row.forms] == [False, False, True]
    assert (row.forms[0].decode, row.same) == (None, ("llama-guard-3-8b",))
    for one, other in zip(slow, fast, strict=True):
        assert one.forms[2].decode is not None
        assert one.forms[2].decode < (other.forms[2].decode or 0)
        assert one.forms[0].prefill == other.forms[0].prefill

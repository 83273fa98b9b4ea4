"""`herd verify`: equal checkpoints pass, in any format; every kind of damage fails with the line that names it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

import herd
from herd.checkpoint.open import open_store
from herd.cli.main import run
from herd.convert.report import WIDTH, Report
from tests.build import TINY, build
from tests.checkpoint.folders import write_meta
from tests.convert.damaged import DAMAGE, copy_of_nano
from tests.modes.test_formats import FORMATS

Captured = pytest.CaptureFixture[str]


NUMBERS = ("wrong rope theta", "wrong eps")


def failures(report: Report) -> str:
    """What the report says is wrong, in one text."""
    lines = [f"{t.name}: {t.why}" for t in report.failed_tensors]
    return "\n".join([*lines, *(line for check in report.checks if check.passed is False for line in check.lines)])


@pytest.mark.parametrize("name", TINY)
def test_the_same_model_in_two_formats_passes(name: str, tmp_path: Path) -> None:
    folders = {}
    for word, write in FORMATS.items():
        (tmp_path / word).mkdir()
        folders[word] = write(tmp_path / word, name)
    for a, b in (("hugging-face", "meta"), ("meta", "gguf")):
        report = herd.verify(folders[a], folders[b], greedy=2)
        assert report.passed, report.text()
        assert report.counts["exact"] == len(report.tensors) == len(set(open_store(folders[a]).names()))
        logits = next(check for check in report.checks if check.name == "logits")
        assert logits.figures["bitwise"]
        assert logits.figures["mean_kl_nats"] == 0


@pytest.mark.parametrize("what", [what for what in DAMAGE if what not in NUMBERS])
def test_damage_fails_with_the_line_that_names_it(what: str, tmp_path: Path, capsys: Captured) -> None:
    damage, line = DAMAGE[what]
    folder = copy_of_nano(tmp_path)
    damage(folder)
    status = run(["verify", "nano", str(folder), "--greedy", "1"])
    out, err = capsys.readouterr()
    assert status == 1
    assert re.search(line, " ".join((out + err).split())), out + err
    if what != "dropped merge":  # that one cannot be opened at all
        assert out.startswith("FAIL")


@pytest.mark.parametrize("what", NUMBERS)
def test_a_wrong_number_in_the_config_shows_in_the_logits_too(what: str, tmp_path: Path) -> None:
    folder = copy_of_nano(tmp_path)
    damage, line = DAMAGE[what]
    damage(folder)
    report = herd.verify("nano", folder, greedy=0)
    assert not report.passed
    assert not report.failed_tensors
    assert re.search(line, failures(report))
    assert "NOT bitwise equal" in failures(report)


def test_a_model_is_itself_and_the_report_is_plain_data(capsys: Captured, tmp_path: Path) -> None:
    assert run(["verify", "nano", "nano", "--greedy", "2", "--json", "--report", str(tmp_path / "r.json")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "r.json").read_text())
    assert data["passed"]
    assert [check["name"] for check in data["checks"]] == ["config", "tokenizer", "prompts", "logits"]
    assert all(check["passed"] for check in data["checks"])
    assert data["counts"] == {"exact": 56, "encoded": 0, "within": 0, "failed": 0}
    assert data["a"]["bits_per_weight"] == pytest.approx(16, abs=0.01)


def test_the_text_is_80_columns_wide(tmp_path: Path) -> None:
    folder = copy_of_nano(tmp_path)
    for what in ("swapped tensors", "missing special token", "changed template", "wrong eps"):
        DAMAGE[what][0](folder)
    text = herd.verify("nano", folder, greedy=0).text()
    too_wide = [line for line in text.splitlines() if len(line) > WIDTH and str(folder) not in line and "/" not in line]
    assert not too_wide
    assert text.startswith("FAIL")


def test_a_lost_tensor_and_another_shape_are_named(tmp_path: Path) -> None:
    a = write_meta(tmp_path / "a", build("llama-3"))
    b = write_meta(tmp_path / "b", build("llama-2"))
    report = herd.verify(a, b)
    told = failures(report)
    assert "layers.0.attention.wk.weight: has shape (32, 64) in A and (64, 64) in B" in told
    assert "n_kv_heads is 2 in A, 4 in B" in told
    assert "not computed" in told
    assert math.isinf(report.failed_tensors[0].max_error)


def test_tied_and_twice_stored_are_the_same_model(tmp_path: Path) -> None:
    from dataclasses import replace

    tied = build("llama-3.2")
    untied = build(replace(tied.config, tie_embeddings=False))
    untied.load_state_dict(tied.state_dict())
    from tests.checkpoint.folders import write_hf

    write_hf(tmp_path / "tied", tied)
    write_hf(tmp_path / "untied", untied)
    report = herd.verify(tmp_path / "tied", tmp_path / "untied", greedy=2)
    assert report.passed, report.text()
    assert herd.verify(tmp_path / "untied", tmp_path / "tied", greedy=0).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_what_rounding_makes_of_it_and_its_drift_is_told(dtype: torch.dtype, tmp_path: Path) -> None:
    a = write_meta(tmp_path / "a", build("llama-3"))
    b = write_meta(tmp_path / "b", build("llama-3").to(dtype))
    report = herd.verify(a, b, greedy=2)
    assert report.passed, report.text()
    assert report.counts["encoded"] > 0
    assert report.counts["failed"] == report.counts["within"] == 0
    logits = next(check for check in report.checks if check.name == "logits")
    assert logits.figures["max_abs_difference"] > 0
    assert "what encoding makes of A" in logits.lines[0]
    wider = herd.verify(b, a, greedy=0)
    assert not wider.passed, "A is not what widening makes of B"


def test_a_number_too_large_for_the_type_is_named(tmp_path: Path) -> None:
    model = build("llama-3")
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[3, 5] = 1e6
    a = write_meta(tmp_path / "a", model)
    b = write_meta(tmp_path / "b", model.half())
    report = herd.verify(a, b, greedy=0)
    assert [t.name for t in report.failed_tensors] == ["layers.1.feed_forward.w2.weight"]
    assert "too large for F16" in report.failed_tensors[0].why


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    assert run(["verify", "nano", str(tmp_path)]) == 1
    assert "no checkpoint in this folder" in capsys.readouterr().err

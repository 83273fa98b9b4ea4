"""`herd convert`: a result that passed, with its report, or none at all."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import herd
from herd.checkpoint.open import open_store
from herd.checkpoint.write.atomic import PREFIX
from herd.checkpoint.write.planned import Planned
from herd.cli.main import run
from herd.errors import CheckpointError, ConfigError, HerdError
from tests.build import build
from tests.checkpoint.folders import write_hf, write_meta
from tests.convert.damaged import copy_of_nano

Captured = pytest.CaptureFixture[str]

SLOW_COMPARE = """
import sys, time
import herd.convert.driver as driver
def wait(*args, **options):
    print("comparing", flush=True)
    time.sleep(60)
driver.compare = wait
driver.convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
"""
"""A conversion that has written everything and hangs before its proof."""


def test_a_folder_gets_its_report(tmp_path: Path) -> None:
    report = herd.convert("nano", tmp_path / "out", to="hf", shards=2, greedy=1, command="herd convert nano out")
    assert report.passed
    data = json.loads((tmp_path / "out" / "herd-report.json").read_text())
    assert data == json.loads(json.dumps(report.as_dict()))
    assert data["command"] == "herd convert nano out"
    assert {"herd", "torch", "python"} <= data["versions"].keys()
    assert data["b"]["path"] == str(tmp_path / "out")
    listed = {entry["name"]: entry for entry in data["b"]["files"]}
    assert listed.keys() == {f.name for f in (tmp_path / "out").iterdir()} - {"herd-report.json", "herd-report.txt"}
    for name, entry in listed.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert (entry["nbytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (tmp_path / "out" / "herd-report.txt").read_text() == report.text()


def test_a_file_gets_its_report_beside_it(tmp_path: Path, capsys: Captured) -> None:
    assert run(["convert", "nano", str(tmp_path / "n.gguf"), "--to", "gguf", "--greedy", "1"]) == 0
    assert capsys.readouterr().out == (tmp_path / "n.gguf.report.txt").read_text()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["n.gguf", "n.gguf.report.json", "n.gguf.report.txt"]
    notes = json.loads((tmp_path / "n.gguf.report.json").read_text())["notes"]
    assert "13 tensors were cast: F16 to F32" in notes


def test_gguf_parts_lie_in_a_folder(tmp_path: Path, capsys: Captured) -> None:
    assert run(["convert", "nano", str(tmp_path / "parts"), "--to", "gguf", "--shards", "3", "--greedy", "1"]) == 0
    parts = [f"parts-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == ["herd-report.json", "herd-report.txt", *parts]
    whole = herd.verify("nano", tmp_path / "parts", greedy=0)
    assert whole.passed, "the folder opens"
    assert whole.quality is None, "nobody asked"
    assert herd.verify("nano", tmp_path / "parts" / parts[1], greedy=0).passed, "and any part"
    assert capsys.readouterr().out.count("parts-0000") == 0


def test_an_error_names_the_destination_not_its_hidden_place(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="this model has 56 tensors") as caught:
        herd.convert("nano", tmp_path / "out", to="hf", shards=100)
    assert PREFIX not in str(caught.value)


def test_without_a_tokenizer_it_says_so(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", build("llama-3"))
    report = herd.convert(source, tmp_path / "hf", to="hf", greedy=1)
    assert report.passed
    assert [check.name for check in report.checks if check.passed is None] == ["tokenizer", "prompts"]
    assert any("has no tokenizer" in note for note in report.notes)


def test_a_chat_model_keeps_template_tokenizer_and_sampling(tmp_path: Path) -> None:
    assert herd.convert("nano", tmp_path / "n.gguf", to="gguf", greedy=1).passed
    report = herd.convert(tmp_path / "n.gguf", tmp_path / "back", to="hf", greedy=1)
    assert report.passed, report.text()
    assert herd.load_tokenizer("nano").template == herd.load_tokenizer(tmp_path / "back").template
    assert open_store(tmp_path / "back").generation.temperature == 0.6  # type: ignore[attr-defined]


def test_stop_ids_that_metas_format_has_no_place_for_are_said(tmp_path: Path) -> None:
    source = copy_of_nano(tmp_path)
    file = source / "generation_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"eos_token_id": [*said["eos_token_id"], 5]}))
    report = herd.convert(source, tmp_path / "meta", to="meta", greedy=0)
    assert report.passed, report.text()
    assert any("Meta's format has no place for others" in line for check in report.checks for line in check.lines)
    assert not herd.verify(tmp_path / "meta", source, greedy=0).passed, "the other way round it is a difference"


@pytest.mark.parametrize("keep", [False, True])
def test_a_result_that_fails_gets_no_name(keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of one tensor is written wrong: the proof finds it."""
    source = write_meta(tmp_path / "meta", build("llama-3"))
    from herd.checkpoint.write import hf

    plain = hf.planned

    def wrong(*args: Any) -> list[Planned]:
        plans = plain(*args)
        at = next(i for i, plan in enumerate(plans) if plan.name.endswith("layers.1.mlp.up_proj.weight"))
        right = plans[at]
        return [*plans[:at], Planned(right.name, right.shape, right.stored, lambda: _changed(right)), *plans[at + 1 :]]

    def _changed(plan: Planned) -> torch.Tensor:
        tensor = plan.make()
        assert isinstance(tensor, torch.Tensor)
        tensor = tensor.clone()
        tensor[3, 4] += 1
        return tensor

    monkeypatch.setattr(hf, "planned", wrong)
    report = herd.convert(source, tmp_path / "out", to="hf", keep_failed=keep, greedy=0)
    assert not report.passed
    assert [t.name for t in report.failed_tensors] == ["layers.1.feed_forward.w3.weight"]
    assert report.failed_tensors[0].index == (3, 4)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["meta", *(["out.failed"] if keep else [])]
    if keep:
        assert not herd.verify(source, tmp_path / "out.failed", greedy=0).passed


def test_the_exit_status_of_a_failed_proof_is_1(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from herd.convert import driver
    from herd.convert.report import Check

    plain = driver.compare

    def failing(*args: Any, **options: Any) -> Any:
        from dataclasses import replace

        return replace(plain(*args, **options), checks=(Check("logits", False, ("too far away",)),))

    monkeypatch.setattr(driver, "compare", failing)
    assert run(["convert", "nano", str(tmp_path / "out"), "--to", "hf", "--greedy", "0"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL")
    assert "too far away" in out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "name"), [("hf", "out"), pytest.param("gguf", "out.gguf", marks=pytest.mark.slow)])
def test_kill_9_leaves_nothing_at_the_name_and_the_next_run_cleans_up(to: str, name: str, tmp_path: Path) -> None:
    args = [sys.executable, "-c", SLOW_COMPARE, "nano", str(tmp_path / name), to]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "comparing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
    left = [f.name for f in tmp_path.iterdir()]
    assert all(f.startswith(PREFIX) for f in left)
    assert left
    deadline = time.monotonic() + 20
    assert herd.convert("nano", tmp_path / name, to=to, greedy=0).passed  # type: ignore[arg-type]
    assert time.monotonic() < deadline
    assert not any(f.name.startswith(PREFIX) for f in tmp_path.iterdir())


@contextmanager
def small_files() -> Iterator[None]:
    """A system where no file can be larger than a megabyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("to", "name"),
    [("gguf", "out.gguf"), *(pytest.param(to, "out", marks=pytest.mark.slow) for to in ("hf", "meta"))],
)
def test_a_full_disk_leaves_nothing(to: str, name: str, tmp_path: Path, capsys: Captured) -> None:
    source = write_hf_folder(tmp_path / "in") if to == "meta" else "nano"
    (tmp_path / "dst").mkdir()
    with small_files():
        status = run(["convert", str(source), str(tmp_path / "dst" / name), "--to", to])
    assert status == 1
    assert "disk is full" in capsys.readouterr().err
    assert not any((tmp_path / "dst").iterdir())


def write_hf_folder(folder: Path) -> Path:
    """A model of some megabytes without tokenizer."""
    from dataclasses import replace

    write_hf(folder, build(replace(build("llama-3").config, vocab_size=8000)))
    return folder


def test_too_little_room_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    with pytest.raises(CheckpointError, match=r"needs 11 MB|needs 10\.\d MB|needs 1\d MB"):
        herd.convert("nano", tmp_path / "out", to="hf")
    assert not any(tmp_path.iterdir())


def test_an_error_while_writing_is_a_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from herd.checkpoint.write import hf

    def broken(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hf, "write_safetensors", broken)
    with pytest.raises(CheckpointError, match="cannot be written: Input/output error"):
        herd.convert("nano", tmp_path / "out", to="hf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"to": "onnx"}, "no format 'onnx'"),
        ({"to": "hf", "quant": "q8_0"}, "--quant makes GGUF files"),
        ({"to": "gguf"}, r"name it out\.gguf"),
        ({"to": "peft", "shards": 2}, "adapters are written in one piece"),
        ({"to": "hf", "dtype": "int4"}, "dtype 'int4'"),
        ({"to": "meta", "bin": True}, "--bin makes"),
        ({"to": "hf", "shards": 0}, "0 shards"),
        ({"to": "peft"}, "is for LoRA adapters"),
        ({"to": "hf", "base": "nano"}, "--base is for LoRA adapters"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        herd.convert("nano", tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="exclude each other"):
        herd.convert("nano", tmp_path / "out.gguf", to="gguf", dtype="f16", quant="q8_0")
    for named in ({"to": "hf"}, {"to": "gguf", "shards": 2}):
        with pytest.raises(ConfigError, match="to a folder, name it out"):
            herd.convert("nano", tmp_path / "out.gguf", **named)  # type: ignore[arg-type]


def test_an_existing_destination_is_kept_until_the_new_one_has_passed(tmp_path: Path) -> None:
    herd.convert("nano", tmp_path / "out", to="hf", greedy=0)
    with pytest.raises(CheckpointError, match="exists already"):
        herd.convert("nano", tmp_path / "out", to="hf")
    before = (tmp_path / "out" / "model.safetensors").stat().st_ino
    assert herd.convert("nano", tmp_path / "out", to="hf", overwrite=True, greedy=0).passed
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino != before


def test_help_states_the_cost(capsys: Captured) -> None:
    assert run(["convert", "--help"]) == 0
    assert "reads the source about 19 times" in " ".join(capsys.readouterr().out.split())
    assert run(["verify", "--help"]) == 0
    assert "Cost:" in capsys.readouterr().out

"""Curves of runs, as text and as a picture."""

import json

import pytest

from herd.cli.main import run
from herd.errors import ConfigError
from herd.train.plot import CURVES, braille, picture, read_run, smooth


@pytest.fixture
def two(tmp_path):
    for name, slope in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "log.jsonl", "w") as file:
            for step in range(1, 101):
                line = {
                    "event": "step", "step": step, "loss": 10 - slope * step / 50, "norm": 1.0, "rate": 1e-3,
                    "all_tokens": 1e6 * step,
                    "all_seconds": 60.0 * step, "tokens_per_second": 1000.0, "memory_bytes": 2e9,
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
            file.write(json.dumps({"event": "evaluation", "step": 50, "figures": {"bits_per_byte": 1.5}}) + "\n")
            file.write(
                json.dumps({"event": "step", "step": 101, "loss": "nan", "all_tokens": 1, "all_seconds": 1}) + "\n"
            )
            file.write('{"event": "st')
    return tmp_path


@pytest.mark.parametrize(("axis", "last"), [("steps", 100), ("tokens", 100.0), ("time", 100.0)])
def test_curves_are_read_over_each_axis(two, axis, last):
    made = read_run(two / "a", axis)
    assert made.name == "a"
    assert made.curves["loss"].x[-1] == last
    assert made.last("loss") == 8.0
    assert made.last("bits_per_byte") == 1.5
    assert len(made.curves["loss"].y) == 100  # what is no number is no point
    assert read_run(two / "a" / "log.jsonl").last("memory") == 2.0


def test_a_falling_line_falls_in_dots(two):
    lines = braille([read_run(two / "a")], "loss", width=40, height=8)
    assert lines[0] == CURVES["loss"]
    body = [line[10:] for line in lines[1:9]]
    assert all(len(line) <= 40 for line in lines[1:])
    starts = [len(line) - len(line.lstrip(" ⠀")) for line in body]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert starts[-1] > 20
    assert lines[1].strip().startswith("9.9")
    assert lines[8].strip().startswith("8 ")
    assert lines[-1].split() == ["1", "100", "steps"]
    # Every dot of the line is there: no column is empty.
    assert all(any(len(line) > column and line[column] not in " ⠀" for line in body) for column in range(30))


def test_runs_are_told_apart(two):
    runs = [read_run(two / "a"), read_run(two / "b")]
    painted = braille(runs, "loss", 60, 10, lambda text, number: "ab"[number])
    assert "a" in "".join(painted[1:11])
    assert "b" in "".join(painted[1:11])
    assert braille(runs, "bits_per_byte", 60, 10)  # a single point
    empty = read_run(two / "a")
    empty.curves["norm"].x.clear()
    assert braille([empty], "norm") == []


def test_smoothing_never_looks_ahead():
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert smooth([5], 10) == [5]


def test_a_picture_is_drawn(two, capsys):
    image = pytest.importorskip("PIL.Image")
    picture([read_run(two / "a"), read_run(two / "b")], two / "runs.png", "two runs")
    with image.open(two / "runs.png") as drawn:
        assert drawn.size[0] > 1500
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colours
    assert run(["plot", str(two / "a"), "--out", str(two / "no" / "runs.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_command(two, capsys):
    assert run(["plot", str(two / "a"), str(two / "b"), "--by", "tokens", "--curve", "loss,norm"]) == 0
    shown = capsys.readouterr().out
    assert "━━ a" in shown
    assert "tokens (millions)" in shown
    assert run(["plot", str(two / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(two / "a")]["loss"] == 8.0
    assert run(["plot", str(two / "a"), "--curve", "los"]) == 2
    assert "choose of loss" in capsys.readouterr().err
    assert run(["plot", str(two)]) == 1
    assert "log.jsonl is missing" in capsys.readouterr().err
    assert run(["plot", str(two / "a"), "--title", "a title"]) == 2
    assert "--title stands over a picture: give --out, too" in capsys.readouterr().err


def test_a_picture_and_json_are_of_the_curves_that_were_asked_for(two, capsys):
    image = pytest.importorskip("PIL.Image")
    sizes = []
    for curves in ([], ["--curve", "loss,norm"]):
        out = two / "some.png"
        assert run(["plot", str(two / "a"), "--out", str(out), "--json", *curves]) == 0
        told = json.loads(capsys.readouterr().out)[str(two / "a")]
        assert list(told) == (["loss", "norm"] if curves else list(CURVES))
        with image.open(out) as drawn:
            sizes.append(drawn.size)
    assert sizes[0][0] > sizes[1][0]


def test_a_curve_that_no_run_has_is_told(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1, "all_tokens": 5, "loss": 2.0}\n')
    assert run(["plot", str(tmp_path), "--curve", "loss,bits_per_byte"]) == 0
    told = capsys.readouterr()
    assert "bits_per_byte: none of these runs has it" in told.err
    assert "loss" in told.out
    assert run(["plot", str(tmp_path), "--curve", "bits_per_byte", "--out", str(tmp_path / "a.png")]) == 1
    assert "no curve to draw" in capsys.readouterr().err


def test_a_run_without_steps_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "begin", "step": 0}\n')
    with pytest.raises(ConfigError, match="no step is in it yet"):
        read_run(tmp_path)

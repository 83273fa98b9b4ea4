"""herd pull, list, show and rm as they are typed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from herd.cli.downloads import Downloads
from herd.cli.main import run
from herd.cli.sizes import duration, size
from tests.cli.processes import LISTENING
from tests.hub.conftest import cache, home, hub, mirror
from tests.hub.mirror import COMMIT, Fault, Mirror
from tests.hub.repos import BIG, GGUF, REPOS, TAKEN, TINY
from tests.hub.stores import ollama

__all__ = ["cache", "home", "hub", "mirror"]

Captured = pytest.CaptureFixture[str]


def test_pull_says_where_and_what(hub: str, cache: Path, capsys: Captured) -> None:
    assert run(["pull", TINY]) == 0
    out, err = capsys.readouterr()
    assert out == f"{cache}/models--someone--Tiny-Llama/snapshots/{COMMIT}\n"
    assert "downloading 9 files, 2.17 MB" in err
    assert "not downloaded: original/*, the same weights as Meta released them: --include 'original/*'" in err
    assert f"{TINY} at {COMMIT[:12]}: 9 files, 2.17 MB downloaded and checked" in err
    assert run(["pull", TINY, "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["repo"], said["commit"], said["downloaded_bytes"], set(said["files"])) == (TINY, COMMIT, 0, TAKEN)
    assert err == ""


def test_dry_run_downloads_nothing(hub: str, cache: Path, capsys: Captured, mirror: Mirror) -> None:
    assert run(["pull", f"{GGUF}:Q8_0", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [
        "README.md",
        "Tiny-Q8_0-00001-of-00002.gguf",
        "Tiny-Q8_0-00002-of-00002.gguf",
    ]
    assert "6.01 kB to download" in err
    assert not cache.exists()
    assert run(["pull", GGUF, "--quant", "Q8_0", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["download_bytes"] == 6001 + len(REPOS[GGUF]["README.md"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["pull", "someone/Else"], "there is no repository someone/Else"),
        (["pull", TINY, "--offline"], "herd is offline"),
        (["pull", TINY, "--endpoint", "ftp://x"], "is no hub"),
        (["pull", "llama3.2:1b"], "there is no repository meta-llama/Llama-3.2-1B-Instruct"),
        (["pull", "llama3.2:1b-instruct-q4_K_M"], "herd pull ORG/NAME:Q4_K_M"),
        (["pull", "nano"], "nano comes with herd"),
        (["pull", "no-such-model"], "ORG/NAME"),
        (["pull", f"{GGUF}:Q8_0", "--quant", "Q4_K_M"], "asks for the quantization Q8_0, the options for Q4_K_M"),
        (["show", "llama3.2:1b"], "herd pull llama3.2:1b"),
        (["rm", "llama3.2:1b", "--yes"], "is not in"),
        (["rm", "nano", "--yes"], "comes with herd"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_in_one_line(hub: str, capsys: Captured, args: list[str], said: str) -> None:
    assert run(args) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.rstrip().splitlines()[-1].startswith("herd: ")


def test_list_and_show(hub: str, home: Path, capsys: Captured) -> None:
    assert run(["pull", TINY]) == 0
    ollama(home / "home/.ollama/models", "registry.ollama.ai/library/llama3.2/1b")
    (home / "home/.ollama/models/manifests/registry.ollama.ai/library/llama3.2/bad").write_text("{")
    capsys.readouterr()
    assert run(["list"]) == 0
    out, err = capsys.readouterr()
    rows = [re.split(r"  +", line) for line in out.splitlines()]
    assert rows[0] == ["NAME", "FORMAT", "NUMBERS", "SIZE", "MODIFIED", "WHERE"]
    assert [row[0] for row in rows[1:]] == ["nano", TINY, "llama3.2:1b", "llama3.2/bad"]
    assert rows[2][1:] == ["safetensors", "bfloat16", "2.17 MB", "just now", "Hugging Face cache"]
    assert "llama3.2/bad: " in err
    assert run(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed[1]["bytes"] == sum(len(REPOS[TINY][name]) for name in TAKEN)
    assert run(["show", TINY]) == 0
    out, err = capsys.readouterr()
    assert f"repository  {TINY}" in out
    assert re.search(rf"^{re.escape(BIG)} +700 kB$", out, re.MULTILINE)
    assert "problem: " in err, "its weights are noise"
    assert run(["show", "nano", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["where"], said["format"], said["problem"]) == ("herd", "Hugging Face", None)
    assert said["parameters"] > 1_000_000


def test_rm(hub: str, cache: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["pull", TINY]) == 0
    folder = cache / "models--someone--Tiny-Llama"
    capsys.readouterr()
    assert run(["rm", TINY, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out == "2.17 MB would be freed\n"
    assert f"snapshots/{COMMIT}/{BIG}" in err
    assert run(["rm", TINY]) == 2, "nobody is there to be asked"
    assert "--yes" in capsys.readouterr().err
    assert folder.is_dir()
    monkeypatch.setattr("herd.cli.rm.is_terminal", lambda stream: True)
    for answer, status in (("n", 1), ("y", 0)):
        monkeypatch.setattr("click.termui.visible_prompt_func", lambda prompt, answer=answer: answer)
        assert run(["rm", TINY]) == status
        assert folder.is_dir() == (answer == "n")
    assert "freed" in capsys.readouterr().out


def test_rm_leaves_other_tools_alone(hub: str, home: Path, capsys: Captured) -> None:
    blob = ollama(home / "home/.ollama/models", "registry.ollama.ai/library/llama3.2/1b")
    for name in ("llama3.2:1b", "llama3.2:1b@main"):
        assert run(["rm", name, "--yes"]) == 1
    assert "belongs to Ollama: ollama rm llama3.2:1b" in capsys.readouterr().err
    assert blob.is_file()


def test_names_cannot_steer_the_terminal(hub: str, mirror: Mirror, capsys: Captured) -> None:
    mirror.gate = (403, {}, "\x1b]0;evil\x07")
    assert run(["pull", TINY]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_ctrl_c_leaves_what_can_be_gone_on_with(hub: str, cache: Path, mirror: Mirror) -> None:
    mirror.slow = 0.05
    child = subprocess.Popen(
        [sys.executable, "-c", LISTENING, "pull", TINY, "--jobs", "1"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    parts: list[Path] = []
    while not any(part.stat().st_size > 60_000 for part in parts):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        parts = list(cache.rglob("*.incomplete"))
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=10)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert parts[0].stat().st_size > 60_000
    kept = parts[0].stat().st_size
    mirror.slow = 0.0
    assert run(["pull", TINY]) == 0
    assert f"bytes={kept}-" in [seen.range for seen in mirror.seen]


def test_lines_now_and_then_without_a_terminal(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("herd.cli.downloads.time.monotonic", lambda: now[0])
    shown = Downloads()
    shown.begin([("a", 1_000_000_000), ("b", 1_000_000_000)])
    shown.kept("a", 500_000_000)
    for step in range(61):
        now[0] = 100.0 + step
        shown.moved("a", 500_000_000 + step * 5_000_000)
    shown.note("something")
    shown.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "downloading 2 files, 2 GB"
    assert lines[-1] == "something"
    assert len(lines) == 2 + 6, "one every ten seconds"
    assert lines[-2] == " 40% of 2 GB, 5 MB/s, 4:00 left", "what was here before is no part of the rate"


def test_sizes_and_times() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_469_000_000, 999_900_000, 3e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "2.47 GB",
        "1 GB",
        "3 TB",
    ]
    assert [duration(n) for n in (0, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]


@pytest.mark.parametrize("command", ["pull", "list", "show", "rm"])
def test_help_has_examples_and_no_torch(command: str) -> None:
    code = "import sys; from herd.cli.main import run; run([sys.argv[1], '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "Examples:" in done.stdout


def test_faults_do_not_leave_the_terminal_broken(hub: str, mirror: Mirror, capsys: Captured) -> None:
    mirror.fail(BIG, Fault("wrong"))
    assert run(["pull", TINY]) == 1
    assert "expected sha256" in capsys.readouterr().err

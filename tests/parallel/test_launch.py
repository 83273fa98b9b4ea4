"""Processes that are started and ended together, and what is said when one dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from herd.errors import ConfigError
from herd.parallel import launch
from herd.parallel.config import ParallelPart

SPAWN = "import sys, herd.parallel.launch as launch; launch.GRACE = 0.5; sys.exit(launch.spawn([], 2, program=sys.argv[1:]))"
"""The launcher with a program of the test's own."""


def _spawn(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text("import os, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(body))
    return subprocess.run(
        [sys.executable, "-c", SPAWN, str(script)], capture_output=True, text=True, timeout=120, check=False
    )


def test_all_ranks_run_and_only_the_first_speaks(tmp_path: Path) -> None:
    done = _spawn(tmp_path, 'print(f\'{rank} of {os.environ["WORLD_SIZE"]} at {os.environ["MASTER_ADDR"]}\')')
    assert (done.returncode, done.stdout) == (0, "0 of 2 at 127.0.0.1\n")


def test_a_dead_rank_ends_all_with_its_message(tmp_path: Path) -> None:
    body = """
    if rank == 1:
        print("the disk is full", file=sys.stderr)
        sys.exit(3)
    time.sleep(3600)
    """
    began = time.monotonic()
    done = _spawn(tmp_path, body)
    assert done.returncode == 3
    assert "rank 1 ended with status 3" in done.stderr
    assert "the disk is full" in done.stderr
    assert time.monotonic() - began < 100


def test_a_killed_rank_is_told_by_its_signal(tmp_path: Path) -> None:
    done = _spawn(tmp_path, "os.kill(os.getpid(), 9) if rank else None")
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed by signal 9" in done.stderr


def test_signals_reach_every_rank(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open({str(tmp_path)!r} + '/up' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(3600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", SPAWN, str(script)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"up{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_without_a_launcher_it_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert launch.start(ParallelPart()).world == 1
    assert launch.start(ParallelPart(dp_shard=-1)).dp_size == 1
    with pytest.raises(ConfigError, match=r"asks for dp_shard 2 x tp 4, but this is one process.*--nproc"):
        launch.start(ParallelPart(dp_shard=2, tp=4))


def test_slurm_ranks_need_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_LOCALID", "0")):
        monkeypatch.setenv(name, value)
    assert launch.launched()
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        launch.start(ParallelPart(dp_shard=2))

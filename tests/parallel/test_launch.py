"""Processes that are started and ended together, and what is said when one dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from herd.errors import ConfigError, RanksError
from herd.parallel import launch
from herd.parallel.config import ParallelPart
from tests.parallel.test_recipes import described

SPAWN = "import sys, herd.parallel.launch as launch; launch.GRACE = 0.5; sys.exit(launch.spawn([], 2, program=sys.argv[1:]))"
"""The launcher with a program of the test's own."""
TIMEOUT = 300
"""Seconds after which something that should end is held to hang: far beyond what a loaded machine takes."""


def _spawn(folder: Path, body: str, *, grace: float = 0.5) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text("import os, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(body))
    return subprocess.run(
        [sys.executable, "-c", SPAWN.replace("0.5", str(grace)), str(script)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
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
    done = _spawn(tmp_path, body)
    assert done.returncode == 3
    assert "rank 1 ended with status 3" in done.stderr
    assert "the disk is full" in done.stderr


def test_who_loses_another_rank_says_so(tmp_path: Path) -> None:
    body = """
    import torch
    import torch.distributed as dist
    from herd.parallel import launch
    from herd.parallel.config import ParallelPart
    launch.start(ParallelPart(dp_replicate=2))
    dist.barrier()
    if rank == 1:
        os._exit(3)
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        print(launch.lost(error), flush=True)
    """
    done = _spawn(tmp_path, body)
    assert re.fullmatch(
        r"rank 0 lost another one \([^\n]*[Cc]onnection [^\n]*\): that rank ended[^\n]*\n", done.stdout
    ), done


def test_other_errors_lose_nobody() -> None:
    assert launch.lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert launch.lost(ValueError("[/src/gloo/pair.cc:1] no")) is None
    assert "out of reach" in str(launch.lost(dist.DistNetworkError("The client socket has timed out")))
    said = "NCCL error in: x.cpp:1. unhandled\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on 1b000"
    told = str(launch.lost(dist.DistBackendError(said)))
    assert told == f"rank 0 could not exchange with the others: {' '.join(said.split())}"


def test_who_cannot_meet_the_others_says_where_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_meeting", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            RanksError, match=rf"rank 0 could not meet the others at 127.0.0.1:{port}: .*{port}.*EADDRINUSE"
        ):
            launch.start(ParallelPart())


def test_the_others_stay_until_the_main_rank_is_done_and_all_meet_again(tmp_path: Path) -> None:
    """A stage of a run begins with what the main rank made of the stage before, however long that took."""
    body = """
    from herd.parallel import launch
    from herd.parallel.config import ParallelPart
    from herd.parallel.parting import main_alone
    made = os.path.join(os.path.dirname(__file__), "made")
    for number in range(2):
        mesh = launch.start(ParallelPart(dp_replicate=2))
        with main_alone(mesh):
            if mesh.is_main:
                time.sleep(1)
                open(made, "a").write("x")
        assert os.path.getsize(made) == number + 1
    """
    done = _spawn(tmp_path, body)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_stage_begins_when_the_one_before_is_written(tmp_path: Path) -> None:
    made = described(tmp_path, "run", recipe="extend", stages=[{"length": 32}, {"length": 64}])
    body = f"""
    from herd.train import run
    from herd.train.overrides import load_config
    honest = run._write
    run._write = lambda *given: (time.sleep(2), honest(*given))
    with open(__file__ + str(rank), "w") as log:
        run.run_recipe(load_config({str(made)!r}, ["parallel.dp_shard=2"]), tell=lambda text: print(text, file=log))
    """
    done = _spawn(tmp_path, body)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert "stage 2 of 2" in (tmp_path / f"script.py{rank}").read_text()
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["max_position_embeddings"] == 64


def test_nobody_stays_for_a_main_rank_that_failed_or_is_gone(tmp_path: Path) -> None:
    body = """
    from herd.errors import RanksError
    from herd.parallel import launch
    from herd.parallel.config import ParallelPart
    from herd.parallel.parting import main_alone
    for number in range(2):
        mesh = launch.start(ParallelPart(dp_replicate=2))
        try:
            with main_alone(mesh):
                if mesh.is_main and number:
                    os._exit(4)
                if mesh.is_main:
                    raise OSError("the disk is full")
        except OSError:
            assert mesh.is_main
        except RanksError as error:
            open(f"{__file__}.{number}", "w").write(str(error))
    """
    done = _spawn(tmp_path, body, grace=TIMEOUT)
    assert done.returncode == 4, done.stderr
    assert [(tmp_path / f"script.py.{number}").read_text().partition(";")[0] for number in range(2)] == [
        "the main rank could not do what was left to do",
        "the main rank is gone before its work was done",
    ]


def test_a_killed_rank_is_told_by_its_signal(tmp_path: Path) -> None:
    done = _spawn(tmp_path, "os.kill(os.getpid(), 9) if rank else None")
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed by signal 9" in done.stderr


def test_a_group_that_is_started_again_reads_nothing_of_the_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun --max-restarts has one store for all its starts; whoever came first would call at addresses of the dead."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    for name, value in {**said, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    keys = []
    for _ in range(2):
        monkeypatch.setattr(launch, "_meeting", None)  # each start of torchrun is a new process
        launch.start(ParallelPart())
        launch.stop()
        keys.append(server.num_keys())
    assert 0 < keys[0] < keys[1] - 1, "the second start wrote over names of the first"


@contextlib.contextmanager
def _two_ranks(folder: Path, body: str) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher whose two ranks run `body` and have then said so; nothing of it is left behind, whatever happens inside."""
    script = folder / "script.py"
    script.write_text(
        "import os, signal, sys, time\n"
        + textwrap.dedent(body)
        + f"\npath = {str(folder)!r} + '/up' + os.environ['RANK']\n"
        + "open(path + '.new', 'w').write(str(os.getpid()))\n"
        + "os.rename(path + '.new', path)\n"
        + "time.sleep(3600)\n"
    )
    ups = [folder / f"up{rank}" for rank in range(2)]
    process = subprocess.Popen([sys.executable, "-c", SPAWN, str(script)], stderr=subprocess.PIPE)
    try:
        while not all(up.exists() for up in ups):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        for up in ups:
            if up.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(up.read_text()), signal.SIGKILL)
        process.communicate()


def test_signals_reach_every_rank(tmp_path: Path) -> None:
    with _two_ranks(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))") as process:
        process.terminate()
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == 75


def test_ranks_end_with_a_killed_launcher(tmp_path: Path) -> None:
    """As by SIGTERM, for which runs save. Ranks that do not end hold the far end of the pipe, and nothing comes out of it."""
    body = """
    from herd.parallel import launch
    from herd.parallel.config import ParallelPart

    held = os.open(os.path.dirname(__file__) + '/held', os.O_WRONLY)
    signal.signal(signal.SIGTERM, lambda *_: (os.write(held, b'saved\\n'), sys.exit(75)))
    launch.start(ParallelPart(dp_shard=2))
    """
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with _two_ranks(tmp_path, body) as process:
            process.kill()
            os.set_blocking(held, True)
            said = b""
            while select.select([held], [], [], TIMEOUT)[0] and (more := os.read(held, 100)):
                said += more
            assert said == b"saved\nsaved\n"
    finally:
        os.close(held)


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


COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"WORLD_SIZE": None, "MASTER_PORT": None},
            r"RANK is set.*but WORLD_SIZE, MASTER_PORT are not: a launcher sets",
        ),
        ({"MASTER_ADDR": None}, r"but MASTER_ADDR is not"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE is 'two'.*no whole number"),
        ({"RANK": ""}, r"but RANK is not"),
        ({"MASTER_PORT": "http"}, r"MASTER_PORT is 'http'"),
        ({"RANK": "2"}, r"RANK is 2 and WORLD_SIZE 2"),
        ({"RANK": None, "SLURM_PROCID": "0", "SLURM_NTASKS": "2(x3)"}, r"SLURM_NTASKS is '2\(x3\)'"),
        ({"RANK": None, "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, r"SLURM_LOCALID is not: start the ranks with srun"),
    ],
)
def test_half_a_launcher_is_named(changes: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what start sets is undone
        monkeypatch.delenv(name)
    for name, value in (COMPLETE | changes).items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=said):
        launch.start(ParallelPart(dp_shard=2))

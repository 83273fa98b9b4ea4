"""`herd train` on two ranks, from the command to the folder that runs; what they cannot do is refused before they begin."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from herd.train.overrides import load_config
from herd.train.run import run_recipe

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "tie_embeddings": True}
LOSS = 1e-5
"""Of losses of about 8 nats over 3 steps: ranks add in another order."""


def _config(folder: Path, out: str, **more: object) -> Path:
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for i in range(12):
        (texts / f"{i}.txt").write_text(
            f"Once upon a time dog number {i} found a ball in the garden and took it home. " * 3
        )
    run = {
        "recipe": "pretrain",
        "out": str(folder / out),
        "model": {"shape": SHAPE, "tokenizer": "nano"},
        "data": {"sources": [str(texts)], "length": 64, "rows": 4, "held_out": "20%"},
        "train": {
            "budget": {"steps": 3},
            "optim": {"lr": 1e-3},
            "evaluate": {"every_steps": 2, "prompts": ["Once upon"], "max_tokens": 4},
        },
        "threads": 1,
        **more,
    }
    path = folder / f"{out}.json"
    path.write_text(json.dumps(run))
    return path


def _train(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "herd", "train", str(config), *arguments]
    environment = os.environ | {"HERD_CACHE": str(config.parent / "cache")}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)


def _losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_two_ranks_evaluate_save_and_export_a_tied_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP leaves the tied matrix whole after a step and after an evaluation; a checkpoint has to find its parts all the same."""
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    run_recipe(load_config(_config(tmp_path, "one")), tell=lambda text: None)
    two = _train(_config(tmp_path, "two"), "parallel.dp_shard=2", "data.rows=2", "--nproc", "2")
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "two/model/config.json").exists()
    losses, theirs = _losses(tmp_path / "one"), _losses(tmp_path / "two")
    assert len(losses) == len(theirs) == 3
    assert max(abs(a - b) for a, b in zip(losses, theirs, strict=True)) <= LOSS


@pytest.mark.slow
def test_refused_before_the_first_step(tmp_path: Path) -> None:
    done = _train(_config(tmp_path, "run"), "parallel.tp=3", "--nproc", "3")
    assert done.returncode == 1
    assert "tp 3: must be a multiple of the 2 key/value heads" in done.stderr
    assert not (tmp_path / "run/log.jsonl").exists()


def _rank_of(launcher: int, rank: int) -> int | None:
    """The process of `launcher`'s children that is `rank`, by its environment."""
    for place in Path("/proc").iterdir():
        try:
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(launcher) and f"RANK={rank}" in (place / "environ").read_text().split("\0"):
                return int(place.name)
        except (OSError, IndexError):  # not a process, or one that has just ended
            continue
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for ranks in /proc")
def test_torchrun_starts_killed_ranks_again_and_not_a_byte_differs(tmp_path: Path) -> None:
    """Each rank once by kill -9: torchrun ends the other and starts both; they go on from the newest checkpoint."""
    more = ["parallel.dp_shard=2", "data.rows=2", "train.budget.steps=40", "train.save.every_steps=1"]
    straight = _train(_config(tmp_path, "straight"), *more, "--nproc", "2")
    assert straight.returncode == 0, straight.stderr
    config, log = _config(tmp_path, "killed"), tmp_path / "killed/log.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3", "--standalone"]
    environment = os.environ | {"HERD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    killed: list[int] = []
    with (
        open(tmp_path / "said", "w") as said,
        subprocess.Popen([*torchrun, "-m", "herd", "train", str(config), *more], env=environment, stderr=said) as run,
    ):
        while run.poll() is None and len(killed) < 2:
            time.sleep(0.05)
            steps = log.read_text().count('"event": "step"') if log.exists() else 0  # its last line may be half there
            rank = _rank_of(run.pid, len(killed))
            if steps > 5 * (1 + 2 * len(killed)) and rank is not None and rank not in killed:
                os.kill(rank, signal.SIGKILL)
                killed.append(rank)
        assert run.wait(timeout=500) == 0, (tmp_path / "said").read_text()[-3000:]
    assert len(killed) == 2, "the run was over before its ranks were killed"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    begun = [event["step"] for event in events if event["event"] == "begin"]
    assert begun[0] == 0
    assert len(begun) == 3
    assert all(0 < step < 40 for step in begun[1:])
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "straight")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed/model" / name).read_bytes() == (tmp_path / "straight/model" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for ranks in /proc")
def test_a_main_rank_killed_while_it_writes_the_result_leaves_none_and_the_next_start_makes_it(tmp_path: Path) -> None:
    """The other rank has left by then, or is ended: nobody waits in an exchange."""
    shape = {"dim": 256, "n_layers": 6, "n_heads": 4, "tie_embeddings": False}
    more = ["parallel.dp_shard=2", "data.rows=2", "train.evaluate.prompts=[]", "train.budget.steps=1", "--nproc", "2"]
    model = {"shape": shape, "tokenizer": "nano", "save_dtype": "float32"}
    assert _train(_config(tmp_path, "straight", model=model), *more).returncode == 0
    config, out = _config(tmp_path, "killed", model=model), tmp_path / "killed"
    command = [sys.executable, "-m", "herd", "train", str(config), *more]
    environment = os.environ | {"HERD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
        main = None
        while run.poll() is None:
            main = main or _rank_of(run.pid, 0)
            if main is not None and list(out.glob(".herd-new-*/model/*.safetensors")):
                os.kill(main, signal.SIGKILL)
                break
            time.sleep(0.001)
        assert run.wait(timeout=500) == 128 + signal.SIGKILL, "the run was over before it was killed"
        assert run.stderr is not None
        assert "rank 0 was killed by signal 9" in run.stderr.read()
    assert not (out / "model").exists()
    again = _train(config, *more)
    assert again.returncode == 0, again.stderr
    assert not list(out.glob(".herd-new-*"))
    for file in (tmp_path / "straight/model").iterdir():
        assert (out / "model" / file.name).read_bytes() == file.read_bytes(), file.name

"""Checkpoints on a disk that fails: torn ones are passed over and told, full disks leave the old ones; one writer only."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from herd.errors import CheckpointError, ConfigError
from herd.parallel.mesh import Mesh
from herd.train.config import SavePart
from herd.train.lock import LOCK, alone
from herd.train.payload import OneFile
from herd.train.run import result
from herd.train.state import Checkpoints, damage, latest, read_rank, read_state
from herd.train.stop import SaveError
from tests.train.loop import fingerprint, trainer, weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}


def keeper(out: Path, keep: int = 2, payload: Any = None) -> tuple[Checkpoints, list[str]]:
    told: list[str] = []
    made = Checkpoints(out, payload or OneFile(), keep, Mesh.single(), told.append)
    made.prepare(100)
    return made, told


def save(saves: Checkpoints, step: int) -> Path:
    return saves.save(step, TENSORS, {"step": step}, {"seed": step})


def names(out: Path) -> list[str]:
    return sorted(entry.name for entry in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int16,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
    ],
)
def test_tensors_of_every_type_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(24).remainder(2 if dtype == torch.bool else 23).to(dtype)
    given: dict[str, Tensor] = {"matrix": values.view(4, 6).t(), "scalar": values[1], "empty": values[:0]}
    OneFile().write(tmp_path, given)
    room = {name: torch.empty_like(tensor) for name, tensor in given.items()}
    OneFile().read(tmp_path, room)
    assert all(torch.equal(room[n].float(), given[n].float()) and room[n].dtype == dtype for n in given)
    with pytest.raises(CheckpointError, match="lacks 1 tensors, other among them"):
        OneFile().read(tmp_path, {"other": values})
    with pytest.raises(CheckpointError, match=r"is wanted"):
        OneFile().read(tmp_path, {"matrix": torch.zeros(2, 2, dtype=dtype)})


def test_what_was_saved_is_found_and_the_oldest_go(tmp_path: Path) -> None:
    saves, _ = keeper(tmp_path)
    assert latest(tmp_path) is None
    for step in (9, 10, 100):
        assert save(saves, step).name == f"step-{step:08d}"
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    place = latest(tmp_path)
    assert place is not None
    assert place.name == "step-00000100"
    assert read_state(place) == {"step": 100}
    assert read_rank(place, 0) == {"seed": 100}
    assert read_rank(place, 1) is None
    assert sorted(p.name for p in place.iterdir()) == [
        "manifest.json", "rank-00000.json", "state.json", "tensors.safetensors",
    ]  # fmt: skip


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    saves, _ = keeper(tmp_path)
    for step in (1, 2):
        save(saves, step)
    os.utime(tmp_path / "checkpoints/step-00000001", (4e9, 4e9))
    assert latest(tmp_path) == tmp_path / "checkpoints/step-00000002"


def flip(path: Path) -> None:
    """One bit of the last byte: the size stays."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, tuple[Any, str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no such file"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "not JSON"),
    "half a manifest": (lambda p: (p / "manifest.json").write_text('{"version": 1, "files": {'), "not JSON"),
    "another manifest": (lambda p: (p / "manifest.json").write_text('{"version": 1, "files": 3}'), "is not one"),
    "a later version": (lambda p: (p / "manifest.json").write_text('{"version": 2, "files": {}}'), "version 2"),
    "a path that leads out": (
        lambda p: (p / "manifest.json").write_text('{"version": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}'), "outside",
    ),
    "tensors cut": (lambda p: os.truncate(p / "tensors.safetensors", 50), "50 bytes instead of"),
    "tensors empty": (lambda p: os.truncate(p / "tensors.safetensors", 0), "0 bytes instead of"),
    "tensors gone": (lambda p: (p / "tensors.safetensors").unlink(), "is missing"),
    "a bit of the tensors": (lambda p: flip(p / "tensors.safetensors"), "SHA-256"),
    "a bit of the state": (lambda p: flip(p / "state.json"), "SHA-256"),
    "a rank gone": (lambda p: (p / "rank-00000.json").unlink(), "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_told(kind: str, tmp_path: Path) -> None:
    saves, _ = keeper(tmp_path)
    for step in (1, 2):
        save(saves, step)
    harm, why = DAMAGE[kind]
    newest = tmp_path / "checkpoints/step-00000002"
    harm(newest)
    told: list[str] = []
    assert latest(tmp_path, told.append) == tmp_path / "checkpoints/step-00000001"
    assert len(told) == 1
    assert why in told[0]
    assert "step-00000002 is not whole" in told[0]


def test_damaged_ones_are_not_counted_when_old_ones_go_and_none_is_an_error(tmp_path: Path) -> None:
    saves, _ = keeper(tmp_path, keep=1)
    save(saves, 1)
    save(saves, 2)
    (tmp_path / "checkpoints/step-00000002/state.json").unlink()
    saves.keep = 1
    saves._rotate()
    assert names(tmp_path) == ["step-00000002"]
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        latest(tmp_path)
    save(saves, 3)
    (tmp_path / "checkpoints/step-00000004").mkdir()
    saves._rotate()
    assert latest(tmp_path) == tmp_path / "checkpoints/step-00000003"
    save(saves, 4)  # takes the place of the damaged one
    assert damage(tmp_path / "checkpoints/step-00000004", deep=True) is None


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    saves, _ = keeper(tmp_path)
    save(saves, 1)
    for name in (".new-step-00000002", ".old-step-00000000"):
        shutil.copytree(tmp_path / "checkpoints/step-00000001", tmp_path / "checkpoints" / name)
    assert latest(tmp_path) == tmp_path / "checkpoints/step-00000001"
    keeper(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


class Failing(OneFile):
    """A disk that fails in the middle of the tensors."""

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, folder: Path, tensors: Any) -> None:
        super().write(folder, tensors)
        os.truncate(folder / "tensors.safetensors", 70)
        raise OSError(self.number, os.strerror(self.number), str(folder))


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "the disk is full .* needs .* are free now"),
        (errno.EFBIG, r"no file may be so large here \(ulimit -f.*: a checkpoint needs"),
        (errno.EDQUOT, "full"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_disk_that_fails_leaves_the_old_checkpoint_and_ends_with_3(number: int, told: str, tmp_path: Path) -> None:
    run, _ = trainer(6, tmp_path)
    run.fit(until=2)
    kept = names(tmp_path)
    assert run.keeper.saves is not None
    run.keeper.saves.payload = Failing(number)
    with pytest.raises(SaveError, match=told) as caught:
        run.fit()
    assert caught.value.exit_code == 3
    assert names(tmp_path) == kept == ["step-00000002"]
    again, seen = trainer(6, tmp_path)
    again.fit()
    assert seen.steps[0].step == 3
    whole, _ = trainer(6)
    whole.fit()
    assert fingerprint(again) == fingerprint(whole)


def test_a_disk_that_is_nearly_full_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    run, _ = trainer(6, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SaveError, match="and 1,000 bytes are free on this disk") as caught:
        run.fit()
    assert caught.value.need is not None
    assert caught.value.need > 8e6
    assert caught.value.free == 1000
    assert run.step == 0


TMPFS = """
import os, sys
from pathlib import Path
import torch
from herd.parallel.mesh import Mesh
from herd.train.payload import OneFile
from herd.train import state
from herd.train.stop import SaveError
state.RESERVE = -10**9  # the check beforehand would be right: here the disk itself has to say no
saves = state.Checkpoints(Path(sys.argv[1]), OneFile(), 2, Mesh.single(), print)
saves.prepare(0)
small, large = {"a": torch.ones(500_000)}, {"a": torch.ones(8_000_000)}
saves.save(1, small, {}, {})
try:
    saves.save(2, large, {}, {})
except SaveError as error:
    print("told:", error)
print(sorted(p.name for p in saves.folder.iterdir()), state.latest(Path(sys.argv[1])).name)
saves.save(3, small, {}, {})
print(state.latest(Path(sys.argv[1])).name, os.statvfs(sys.argv[1]).f_blocks * os.statvfs(sys.argv[1]).f_frsize)
"""


def test_a_real_full_disk(tmp_path: Path) -> None:
    """16 MiB of memory as a file system, in a namespace of its own."""
    script = tmp_path / "save.py"
    script.write_text(TMPFS)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o size=16m none {disk} && {sys.executable} {script} {disk}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[:100]}")
    assert "told: " in done.stdout, done.stderr
    assert "the disk is full" in done.stdout
    assert "['step-00000001'] step-00000001" in done.stdout
    assert "step-00000003 16777216" in done.stdout


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run, _ = trainer(2, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        run.fit()
    run, _ = trainer(2, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("in the way")
    with pytest.raises(SaveError, match="could not be written"):
        run.fit()


def test_a_read_only_folder_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the call that fails, for root may write anywhere."""
    run, _ = trainer(6, tmp_path)
    run.fit(until=2)
    make = Path.mkdir

    def refuse(path: Path, *given: Any, **named: Any) -> None:
        if path.name.startswith(".new-"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SaveError, match="Read-only file system"):
        run.fit()
    assert latest(tmp_path) == tmp_path / "checkpoints/step-00000002"


def test_two_writers_of_one_folder_are_refused(tmp_path: Path) -> None:
    run, _ = trainer(2, tmp_path)
    with alone(tmp_path, print):
        with pytest.raises(ConfigError, match="another run of this process"):
            run.fit()
        code = (
            "import sys; from pathlib import Path; from herd.train.lock import alone\n"
            "try:\n    alone(Path(sys.argv[1]), print).__enter__()\nexcept Exception as error:\n    print(error)"
        )
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        assert f"another run is writing there (process {os.getpid()} on " in other.stdout
    run.fit()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_the_folder_is_held_while_the_result_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run could remove the checkpoint that the result is made of."""
    run, _ = trainer(2, tmp_path)
    run.fit()
    config: Any = SimpleNamespace(out=str(tmp_path), method=SimpleNamespace(qat=None))
    written: list[Path] = []

    def write(*given: object) -> None:
        with pytest.raises(ConfigError, match="another run of this process"), alone(tmp_path, print):
            pass
        written.append(tmp_path)

    monkeypatch.setattr("herd.train.run._write", write)
    result(run, cast(Any, None), config, print)
    assert written
    with alone(tmp_path, print), pytest.raises(ConfigError, match="another run"):
        result(run, cast(Any, None), config, print)
    assert len(written) == 1


def test_the_lock_of_a_killed_process_is_free_even_when_its_children_live(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from herd.train.lock import alone\n"
        "held = alone(Path(sys.argv[1]), print)\nheld.__enter__()\n"
        "if os.fork() == 0:\n    print('ready', flush=True)\n    time.sleep(30)\n    os._exit(0)\n"
        "time.sleep(30)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(ConfigError, match="another run is writing"), alone(tmp_path, print):
            pass
        other.kill()
        other.wait()
        try:
            with alone(tmp_path, print):
                pass
        finally:
            os.killpg(other.pid, 9)


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("herd.train.lock._take", refuse)
    told: list[str] = []
    with alone(tmp_path, told.append):
        assert "no locks" in told[0]


def test_a_lock_on_a_full_disk_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with alone(tmp_path, print), pytest.raises(ConfigError, match="another run"), alone(tmp_path, print):
        pass


def test_a_run_in_another_thread_takes_no_signals(tmp_path: Path) -> None:
    run, _ = trainer(2, tmp_path)
    thread = threading.Thread(target=run.fit)
    thread.start()
    thread.join()
    assert run.step == 2


def test_saves_are_made_by_steps_and_at_the_end(tmp_path: Path) -> None:
    run, _ = trainer(5, tmp_path, changes={"save": SavePart(every_steps=2, every_minutes=None, keep=9)})
    run.fit()
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    before = weights(run)
    again, seen = trainer(5, tmp_path, changes={"save": SavePart(every_steps=2, every_minutes=None, keep=9)})
    again.fit()
    assert seen.steps == []
    assert all(torch.equal(before[name], now) for name, now in weights(again).items())

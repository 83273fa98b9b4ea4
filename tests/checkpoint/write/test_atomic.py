"""Results appear whole or not at all: kill -9 at any moment, full disks, destinations that must not be touched."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write import atomic
from herd.checkpoint.write.atomic import PREFIX, YOUNG, new_file, new_folder, remove_leftovers
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.meta import write_meta
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.errors import CheckpointError
from tests.build import build

FILES, PIECES, PIECE = 3, 40, b"x" * 5000

CHILD = f"""
import sys, time
from herd.checkpoint.write.atomic import new_folder
print("ready", flush=True)
with new_folder(sys.argv[1], overwrite=True) as folder:
    for number in range({FILES}):
        with open(folder / f"model-{{number}}.bin", "wb") as file:
            for _ in range({PIECES}):
                file.write({PIECE!r})
                time.sleep(0.0004)
"""


def hidden(folder: Path) -> list[Path]:
    return list(folder.glob(PREFIX + "*"))


def locked(folder: Path) -> list[Path]:
    """Hidden folders with a lock. One without was killed before it had it, or while it gave it up: it stays while YOUNG."""
    return [found for found in hidden(folder) if (found / "herd.lock").exists()]


def age(folder: Path) -> None:
    """Hidden folders look as if nobody had touched them for longer than YOUNG."""
    then = time.time() - 2 * YOUNG
    for found in hidden(folder):
        os.utime(found, (then, then))


def whole(folder: Path) -> bool:
    return [p.stat().st_size for p in folder.iterdir()] == [PIECES * len(PIECE)] * FILES


def start(dst: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(dst)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("before", [False, True])
def test_kill_at_any_moment(tmp_path: Path, before: bool) -> None:
    """The destination is absent or the old one, or it is complete; the next run removes what the killed ones left."""
    dst = tmp_path / "result"
    if before:
        dst.mkdir()
        (dst / "config.json").write_text("old")
    seen = set()
    for number in range(8):
        child = start(dst)
        time.sleep(random.uniform(0, 0.015 * (number + 1)))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if dst.exists():
            old = before and [p.name for p in dst.iterdir()] == ["config.json"]
            assert old or whole(dst)
            seen.add("old" if old else "new")
        else:
            assert not before
            seen.add("absent")
        assert len(locked(tmp_path)) <= 1  # each run cleans up after the one before
    for left in (locked, hidden):
        if left is hidden:
            age(tmp_path)
        last = start(dst)
        last.communicate()
        assert last.returncode == 0
        assert whole(dst)
        assert left(tmp_path) == []
    assert seen & {"old", "absent"}, "no kill came early enough to test anything"


def test_a_live_run_is_left_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "one") as folder:
        (folder / "a").write_text("a")
        assert remove_leftovers(tmp_path) == 0
        with new_file(tmp_path / "two") as file:
            file.write_text("b")
    assert (tmp_path / "one" / "a").read_text() == "a"
    assert (tmp_path / "two").read_text() == "b"
    assert hidden(tmp_path) == []


def test_killed_before_its_lock(tmp_path: Path) -> None:
    """It may belong to a run that is just starting, until it is old."""
    (tmp_path / (PREFIX + "abc")).mkdir()
    assert remove_leftovers(tmp_path) == 0
    age(tmp_path)
    assert remove_leftovers(tmp_path) == 1
    assert hidden(tmp_path) == []


def test_killed_between_two_renames(tmp_path: Path) -> None:
    """Where two names cannot be exchanged in one step: the old result is put back."""
    dead = tmp_path / (PREFIX + "abc")
    (dead / "herd.old").mkdir(parents=True)
    (dead / "herd.old" / "config.json").write_text("old")
    (dead / "herd.lock").write_text("result")
    (dead / "result").mkdir()
    assert remove_leftovers(tmp_path) == 1
    assert (tmp_path / "result" / "config.json").read_text() == "old"
    assert hidden(tmp_path) == []


def test_a_lock_may_not_name_a_place_elsewhere(tmp_path: Path) -> None:
    dead = tmp_path / "inner" / (PREFIX + "abc")
    (dead / "herd.old").mkdir(parents=True)
    (dead / "herd.lock").write_text("../outside")
    remove_leftovers(tmp_path / "inner")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    dst = tmp_path / "result"
    dst.mkdir()
    (dst / "config.json").write_text("old")
    with new_folder(dst, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (dst / "config.json").read_text() == "old"
    assert (dst / "config.json").read_text() == "new"
    file = tmp_path / "a.gguf"
    file.write_text("old")
    with new_file(file, overwrite=True) as path:
        path.write_text("new")
    assert file.read_text() == "new"
    assert hidden(tmp_path) == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    for make in (new_file, new_folder):
        with pytest.raises(KeyError), make(tmp_path / "result") as path:
            (path / "a" if path.is_dir() else path).write_text("a")
            raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"needs 1000000000\.00 GB, but only .* are free"),
        new_file(tmp_path / "a", size=10**18),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 123])
def test_a_disk_that_fills_up(tmp_path: Path, size: int) -> None:
    with (
        pytest.raises(CheckpointError, match=r"the disk is full.*nothing was left behind.* free") as caught,
        new_folder(tmp_path / "result", size=size) as folder,
    ):
        (folder / "a").write_text("a")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert ("needs 123 bytes" in str(caught.value)) == (size == 123)
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, signal, sys
from herd.checkpoint.write.atomic import new_file
from herd.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with new_file(sys.argv[1], size=200_000) as path, open(path, "wb") as file:
        for _ in range(200):
            file.write(bytes(1000))
except CheckpointError as error:
    print(error)
"""


def test_a_real_limit(tmp_path: Path) -> None:
    assert resource.RLIMIT_FSIZE is not None
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "a")], capture_output=True, text=True, check=True
    ).stdout
    assert "the disk is full (File too large), nothing was left behind. The result needs 200,000 bytes" in out
    assert list(tmp_path.iterdir()) == []


def test_refused_destinations(tmp_path: Path) -> None:
    src, file = tmp_path / "src", tmp_path / "src" / "model.gguf"
    src.mkdir()
    file.write_text("weights")
    (tmp_path / "link").symlink_to(src)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "summer.jpg").write_text("")

    def refused(why: str, dst: Path, make=new_folder, **more: object) -> None:
        with pytest.raises(CheckpointError, match=why), make(dst, **more):
            raise AssertionError("nothing may be written")

    refused("exists already: choose another name, or replace it with --overwrite", src)
    refused("exists already", file, new_file)
    refused("symbolic link", tmp_path / "link", overwrite=True)
    refused("symbolic link", tmp_path / "dangling", new_file)
    refused("is also the source", src, overwrite=True, inputs=[src])
    refused("is also the source", file, new_file, overwrite=True, inputs=[file])
    refused("lies inside of the source", src / "out", inputs=[src])
    refused("lies inside of the source", tmp_path / "link" / "out", inputs=[src])
    refused("holds the source", src, overwrite=True, inputs=[file])
    refused("is a folder, and the result is a file", src, new_file, overwrite=True)
    refused("is a file, and the result is a folder", file, overwrite=True)
    refused("does not look like a checkpoint", tmp_path / "photos", overwrite=True)
    refused("is no name", tmp_path / "..")
    refused("cannot be written", file / "out")
    assert file.read_text() == "weights"
    assert hidden(tmp_path) == []
    with new_file(src / "other.gguf", inputs=[file]) as path:  # a file beside the source file is fine
        path.write_text("x")


def test_a_name_that_is_taken_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"), new_file(tmp_path / "a") as path:
        path.write_text("mine")
        (tmp_path / "a").write_text("theirs")
    assert (tmp_path / "a").read_text() == "theirs"
    assert hidden(tmp_path) == []


def test_parents_are_made(tmp_path: Path) -> None:
    with new_file(tmp_path / "a" / "b" / "c") as path:
        path.write_text("x")
    assert (tmp_path / "a" / "b" / "c").read_text() == "x"
    assert os.listdir(tmp_path / "a" / "b") == ["c"]


@pytest.mark.parametrize("write", [write_hf, write_meta, partial(write_hf, bin=True)])
def test_a_disk_that_fills_up_under_a_writer(tmp_path: Path, write: Callable[..., Any]) -> None:
    """In the middle of the weights; with --overwrite the old result stays."""
    source = Source(ModelStore(build("llama-3")), None, GenerationDefaults(), None)
    dst = tmp_path / "result"
    dst.mkdir()
    (dst / "config.json").write_text("old")
    left = 300_000

    def tick(nbytes: int) -> None:
        nonlocal left
        left -= nbytes
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="the disk is full"), new_folder(dst, overwrite=True) as folder:
        write(source, folder, tick=tick)
    assert [path.name for path in tmp_path.rglob("*")] == ["result", "config.json"]

"""No payload of a pickle maker is ever run: the canary stays away, no process starts, no module is imported."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from herd.checkpoint.inspect import inspect
from herd.checkpoint.open import open_store
from herd.checkpoint.torchfile import TorchFile
from herd.checkpoint.vocabulary import load_tokenizer
from herd.errors import HerdError
from tests.checkpoint.test_pickle_attacks import CONFIG
from tests.hostile.audit import listening
from tests.hostile.reduced import variants

NAMES = ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.safetensors", "model.gguf", "tokenizer.model")


def doors(folder: Path, content: bytes) -> list[str]:
    """Every way in, with `content` under every name; the errors."""
    said: list[str] = []
    for name in NAMES:
        for stale in folder.iterdir():
            if stale.name in NAMES:
                stale.unlink()
        file = folder / name
        file.write_bytes(content)
        openings = [open_store, inspect] if name != "tokenizer.model" else [load_tokenizer]
        if name == "model.pt":
            openings = [TorchFile]
        for opening in openings:
            path = folder if name == "consolidated.00.pth" else file
            try:
                opening(path)
            except HerdError as error:
                said.append(str(error))
    assert all(str(folder) in message for message in said)
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "params.json").write_text("{}")
    return tmp_path


def check(folder: Path, step: int) -> int:
    canary = folder / "canary"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        doors(folder, b"\x80\x02}.")  # the readers' own imports happen here
        count = 0
        for name, bare, boxed in list(variants(canary))[::step]:
            for content in (bare, boxed):
                start = time.process_time()
                with listening() as heard:
                    said = doors(folder, content)
                acts = [event for event in heard if event[0] != "open" and not own(event, folder)]
                assert acts == [], name
                outside = {path for event, path in heard if event == "open" and not path.startswith(str(folder))}
                assert not any("canary" in path for path in outside), name
                assert len(said) >= len(NAMES), name
                assert not canary.exists(), name
                assert time.process_time() - start < 1.0 * len(NAMES), name
            count += 1
    return count


def own(event: tuple[str, str], folder: Path) -> bool:
    """What the test itself does between two openings."""
    return event[0] == "os.remove" and event[1].startswith(str(folder))


def test_a_sample_is_refused(folder: Path) -> None:
    assert check(folder, 12) == 20


@pytest.mark.slow
def test_all_are_refused(folder: Path) -> None:
    assert check(folder, 1) == 240


def test_the_payloads_are_real(tmp_path: Path) -> None:
    """Unpickled by Python in another process, calls of os.system in every protocol touch the canary."""
    touched = 0
    for name, bare, _ in variants(tmp_path / "canary", 61 * 3):
        if ": posix.system" in name and "nest" in name:
            subprocess.run(
                [sys.executable, "-c", "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"],
                input=bare,
                stderr=subprocess.DEVNULL,
                check=False,  # a call with state or items fails after it ran
            )
            touched += (tmp_path / "canary").exists()
            (tmp_path / "canary").unlink(missing_ok=True)
    assert touched >= 1
    assert len({bare for _, bare, _ in variants(tmp_path / "canary")}) > 200
    assert pickle.DEFAULT_PROTOCOL >= 4


def test_the_ear_hears(tmp_path: Path) -> None:
    with listening() as heard:
        subprocess.run(["true"], check=True)
        (tmp_path / "x").write_text("x")
        eval("1")
    events = {event for event, _ in heard}
    assert {"subprocess.Popen", "open", "exec"} <= events
    with listening() as heard:
        pass
    assert heard == []

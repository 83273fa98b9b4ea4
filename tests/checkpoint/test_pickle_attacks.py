"""No byte of a torch file is ever executed: every payload is refused by name, and nothing on the machine moves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from herd.checkpoint.open import open_store
from herd.checkpoint.torchfile import TorchFile
from herd.errors import CheckpointError
from tests.checkpoint.payloads import as_torch_zip, payloads

NAMES = list(payloads(Path("canary")))
WATCHED = {"os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen", "pty.spawn", "socket.connect"}
WATCHED |= {
    "exec",
    "compile",
    "import",
    "ctypes.dlopen",
    "shutil.rmtree",
    "webbrowser.open",
    "marshal.loads",
    "pickle.find_class",
}

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
CONFIG |= {"intermediate_size": 8, "vocab_size": 8}

seen: list[str] = []
watching = False


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook (cannot be removed, so it listens only while asked)."""
    if watching and (event in WATCHED or (event == "open" and "canary" in str(arguments[0]))):
        seen.append(f"{event} {arguments}")


sys.addaudithook(watch)


@pytest.fixture
def nothing_happens(tmp_path: Path) -> Iterator[None]:
    """Fails when code runs, a process starts, a module is imported or the canary appears."""
    global watching
    list(refusals(tmp_path, b"\x80\x02}."))  # imports of the readers themselves happen here
    seen.clear()
    watching = True
    yield
    watching = False
    assert seen == []
    assert not (tmp_path / "canary").exists()


def refusals(folder: Path, program: bytes) -> Iterator[CheckpointError]:
    """Open the payload archived and bare, as a file, as Meta's shard and as Hugging Face's weights."""
    bare, archived = program, as_torch_zip(program)
    (folder / "payload.pt").write_bytes(bare)
    meta, hf = folder / "meta", folder / "hf"
    meta.mkdir(exist_ok=True)
    hf.mkdir(exist_ok=True)
    (meta / "params.json").write_text("{}")
    (meta / "consolidated.00.pth").write_bytes(archived)
    (hf / "config.json").write_text(json.dumps(CONFIG))
    for name, content in (("pytorch_model.bin", archived), ("adapter.bin", bare)):
        (hf / name).write_bytes(content)
    openings = (
        (TorchFile, folder / "payload.pt"),
        (open_store, meta),
        (open_store, hf),
        (open_store, hf / "adapter.bin"),
    )
    for opening, path in openings:
        with pytest.raises(CheckpointError) as caught:
            opening(path)
        yield caught.value


@pytest.mark.parametrize("name", NAMES)
def test_refused(tmp_path: Path, nothing_happens: None, name: str) -> None:
    program, culprit = payloads(tmp_path / "canary")[name]
    began = time.process_time()  # the machine may be busy
    for error in refusals(tmp_path, program):
        assert error.path is not None
        assert str(tmp_path) in str(error)
        assert culprit is None or culprit in str(error), str(error)
    assert time.process_time() - began < 4  # four openings


def test_renamed_to_safetensors(tmp_path: Path, nothing_happens: None) -> None:
    program, _ = payloads(tmp_path / "canary")["os.system"]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for content in (program, as_torch_zip(program)):
        file = tmp_path / "model.safetensors"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
            open_store(file)


def test_the_canary_works(tmp_path: Path) -> None:
    """The payloads are real: unpickled by Python, in another process, the plain one touches the canary."""
    program, _ = payloads(tmp_path / "canary")["os.system"]
    subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"], input=program, check=True
    )
    assert (tmp_path / "canary").exists()

"""Names that come from outside open no file outside their folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.checkpoint.open import open_store
from herd.errors import CheckpointError
from herd.files import safe_join
from tests.build import build
from tests.checkpoint.folders import write_hf
from tests.hostile.audit import listening
from tests.hostile.names import hostile_names

NAMES = hostile_names()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with links that lead out of it, and a secret beside it."""
    secret = tmp_path / "secret"
    secret.mkdir()
    for place in (secret / "secret.safetensors", tmp_path / "secret.safetensors", secret / "model.safetensors"):
        place.write_bytes(b"secret")
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(secret)
    (folder / "link.safetensors").symlink_to(secret / "secret.safetensors")
    (folder / "loop").symlink_to("loop")
    return folder


def test_joined_names_stay_inside(home: Path) -> None:
    assert len(NAMES) >= 500
    refused: list[str] = []
    for name in NAMES:
        try:
            path = safe_join(home, name)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        assert path.resolve().is_relative_to(home.resolve()), name
        assert ".." not in path.parts, name
    assert len(refused) > 250
    assert max(map(len, refused)) < 1_000


def test_good_names_are_accepted(home: Path) -> None:
    for name in (
        "model.safetensors",
        "sub/x.bin",
        "model-00001-of-00002.safetensors",
        "a b.bin",
        "ü/模型.bin",
        "..x",
        "x..y",
        "con2",
    ):
        assert safe_join(home, name) == home / name


def test_shards_outside_are_never_opened(home: Path) -> None:
    write_hf(home, build("llama-3"))
    weights = (home / "model.safetensors").read_bytes()
    size = int.from_bytes(weights[:8], "little")
    tensors = [name for name in json.loads(weights[8 : 8 + size]) if name != "__metadata__"]
    (home / "model.safetensors").rename(home / "part.safetensors")
    index = home / "model.safetensors.index.json"
    whole = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    index.write_text(json.dumps(whole))
    open_store(home)
    for name in NAMES:
        whole["weight_map"][tensors[0]] = name
        index.write_text(json.dumps(whole))
        with listening() as heard, pytest.raises(CheckpointError):
            open_store(home)
        opened = [path for event, path in heard if event == "open"]
        assert opened, name
        assert all(Path(path).resolve().is_relative_to(home.resolve()) for path in opened), (name, opened)

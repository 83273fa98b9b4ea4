"""Packed copies: used when they are right, made anew when they are not, and never needed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from herd.checkpoint import packed
from herd.checkpoint.load import load_model
from herd.cli.main import herd
from herd.errors import ConfigError
from herd.kernels import native
from herd.model.llama import Llama
from herd.quant.linear import QuantExperts, QuantLinear
from herd.quant.matrix import Matrix
from tests.build import tokens
from tests.checkpoint.gguf_files import EXPERTS, GGML, WIDE, transformers_model, write_gguf
from tests.quant.wide import TIED

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no native kernels: {native.missing()}")

CONFIGS = {"wide": WIDE, "tied": TIED, "experts": EXPERTS}
SCOUT_KEYS = {"llama4.use_qk_norm": True, "llama4.attention.temperature_length": 8, "llama4.attention.chunk_size": 16}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HERD_PACKED", str(folder))
    monkeypatch.setattr(packed, "LEAST", 0)
    return folder


def gguf(folder: Path, kind: GGML = GGML.Q4_0, name: str = "tied", seed: int = 0) -> Path:
    keys = SCOUT_KEYS if name == "experts" else {}
    return write_gguf(folder / "model.gguf", transformers_model(CONFIGS[name], seed), kind, metadata=keys)


def matrices(model: Llama) -> list[Matrix]:
    modules = [module for module in model.modules() if isinstance(module, QuantLinear | QuantExperts)]
    return [matrix for module in modules for matrix in module.matrices()]


def panels(model: Llama) -> list[torch.Tensor]:
    found = []
    for matrix in matrices(model):
        assert matrix.panels is not None
        found.append(matrix.panels.storage)
    return found


def same(one: Llama, other: Llama) -> bool:
    return all(torch.equal(a, b) for a, b in zip(panels(one), panels(other), strict=True))


def in_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """What loading gives without any copy."""
    with monkeypatch.context() as patch:
        patch.setenv("HERD_PACKED", "off")
        return load_model(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("wide", kind) for kind in (GGML.Q4_0, GGML.Q8_0, GGML.Q4_K, GGML.Q5_K, GGML.Q6_K)),
        *((name, kind) for name in ("tied", "experts") for kind in (GGML.Q8_0, GGML.Q4_K)),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name in ("tied", "experts")
            for kind in (GGML.Q4_0, GGML.Q5_K, GGML.Q6_K)
        ),
    ],
)
def test_the_copy_is_what_packing_gives(
    name: str, kind: GGML, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf(tmp_path, kind, name)
    first = load_model(path)
    (copy,) = cache.glob("*.packed")
    made = copy.stat().st_ino
    pack = native.pack
    monkeypatch.setattr(native, "pack", _known_only(native.pack))
    second = load_model(path)
    monkeypatch.setattr(native, "pack", pack)
    assert copy.stat().st_ino == made, "the second load made it again"
    expected = in_memory(path, monkeypatch)
    assert same(first, expected)
    assert same(second, expected)
    ids = tokens(first.config, 7)
    assert torch.equal(second(ids), expected(ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_rounded_activations_read_the_same_copy(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """w8a8 of a file that is Q8_0: nothing is packed that was packed before."""
    path = gguf(tmp_path, GGML.Q8_0, name)
    plain = load_model(path)
    (copy,) = cache.glob("*.packed")
    with monkeypatch.context() as patch:
        patch.setattr(native, "pack", _known_only(native.pack))
        rounded = load_model(path, weights="w8a8")
    assert list(cache.glob("*.packed")) == [copy]
    assert same(plain, rounded)
    assert all(matrix.activations == 8 for matrix in matrices(rounded))


def _known_only(pack: Callable[..., native.Weight]) -> Callable[..., native.Weight]:
    """Packing of known blocks only: 17 rows, with which the layout is recognised."""

    def only_known(type_id: int, blocks: torch.Tensor, columns: int) -> native.Weight:
        assert blocks.shape[0] == 17, "a matrix was packed although there is a copy"
        return pack(type_id, blocks, columns)

    return only_known


def test_damage_is_found_and_repaired(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit anywhere, a short file, another file's header: the copy is made anew, the model is right every time."""
    path = gguf(tmp_path)
    expected = in_memory(path, monkeypatch)
    load_model(path)
    (copy,) = cache.glob("*.packed")
    good = copy.read_bytes()

    def flipped(at: int) -> bytes:
        return good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]

    spots = [0, 9, 45, 60, packed.HEADER, packed.HEADER + len(good) // 3, len(good) - 200]
    for bad in [*map(flipped, spots), good[:-1], good[:100], b"", good + b"\0"]:
        copy.write_bytes(bad)
        assert same(load_model(path), expected)
        assert copy.read_bytes() == good


def test_another_model_at_the_same_place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same name, same size, same time: only the numbers differ."""
    path = gguf(tmp_path, seed=1)
    about = path.stat()
    load_model(path)
    gguf(tmp_path, seed=2)
    assert path.stat().st_size == about.st_size
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert same(load_model(path), in_memory(path, monkeypatch))
    assert len(list(cache.glob("*.packed"))) == 2


def test_another_layout_finds_no_old_copy(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf(tmp_path)
    load_model(path)
    pack = native.pack

    def other(type_id: int, blocks: torch.Tensor, columns: int) -> native.Weight:
        weight = pack(type_id, blocks, columns)
        return native.Weight(weight.storage.flip(0), type_id, weight.rows, weight.columns)

    monkeypatch.setattr(native, "pack", other)
    load_model(path)
    assert len(list(cache.glob("*.packed"))) == 2


def test_nothing_is_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off, small models, a folder that cannot be made, a full disk, a limit that is too small: the model loads all the same."""
    path = gguf(tmp_path)
    monkeypatch.setenv("HERD_PACKED", "off")
    load_model(path)
    monkeypatch.setenv("HERD_PACKED", str(cache))
    monkeypatch.setenv("HERD_PACKED_LIMIT", "1 KiB")
    load_model(path)
    monkeypatch.delenv("HERD_PACKED_LIMIT")
    monkeypatch.setattr(packed, "SPARE", 1 << 60)
    load_model(path)
    monkeypatch.undo()
    monkeypatch.setenv("HERD_PACKED", str(cache))
    load_model(path)  # far below LEAST
    assert not cache.exists() or not list(cache.iterdir())
    monkeypatch.setattr(packed, "LEAST", 0)
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("HERD_PACKED", str(blocked / "cache"))
    load_model(path)
    monkeypatch.setenv("HERD_PACKED", str(cache))
    monkeypatch.setenv("HERD_PACKED_LIMIT", "a lot")
    with pytest.raises(ConfigError, match="HERD_PACKED_LIMIT"):
        load_model(path)


def test_the_oldest_go_first(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, kind in enumerate((GGML.Q4_0, GGML.Q8_0)):
        (tmp_path / str(i)).mkdir()
        load_model(gguf(tmp_path / str(i), kind))
    small, large = sorted(packed.copies(), key=lambda copy: copy.size)
    os.utime(large.path, (1, 1))
    (tmp_path / "2").mkdir()
    monkeypatch.setenv("HERD_PACKED_LIMIT", str(small.size + large.size + 1))
    load_model(gguf(tmp_path / "2", GGML.Q4_0, seed=5))
    left = {copy.path for copy in packed.copies()}
    assert large.path not in left
    assert small.path in left
    assert len(left) == 2


def test_the_command(tmp_path: Path, cache: Path) -> None:
    run = CliRunner()
    path = gguf(tmp_path)
    load_model(path)
    (cache / "stranger.packed").write_bytes(b"of somebody else" * 1000)
    (told,) = json.loads(run.invoke(herd, ["cache", "--json"]).stdout)
    assert told["source"] == str(path)
    assert told["bytes"] == Path(told["path"]).stat().st_size
    assert told["name"] in run.invoke(herd, ["cache"]).stdout
    assert run.invoke(herd, ["cache", "--rm", "nobody"]).exception is not None
    assert Path(told["path"]).exists()
    assert "freed" in run.invoke(herd, ["cache", "--rm", told["name"]]).stdout
    assert [file.name for file in cache.glob("*.packed")] == ["stranger.packed"]

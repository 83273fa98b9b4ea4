"""Files that are written in large pages: the bytes of an ordinary file, in writes of whole pages."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

from herd.checkpoint.fill import fill
from herd.checkpoint.mapped import MappedFile
from herd.checkpoint.open import open_store
from herd.checkpoint.write import large
from herd.checkpoint.write.large import PAGE, LargeFile
from tests.checkpoint.gguf_files import GGML, WIDE, transformers_model, write_gguf


def written(path: Path, parts: list[bytes]) -> bytes:
    with LargeFile(path) as file:
        for part in parts:
            before = file.tell()
            assert file.write(part) == len(part)
            assert file.tell() == before + len(part)
        file.sync()
    return path.read_bytes()


def test_the_bytes_are_those_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "PAGE", 64)
    draw = random.Random(1)
    for _ in range(200):
        parts = [draw.randbytes(draw.choice((0, 1, 7, 63, 64, 65, 128, 1000))) for _ in range(draw.randrange(8))]
        assert written(tmp_path / "file", parts) == b"".join(parts)


def test_every_write_but_the_last_is_a_whole_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    put = io.FileIO.write

    class Watched(io.FileIO):
        def write(self, data: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
            sizes.append(len(data))
            return put(self, data[: PAGE // 2] if len(sizes) == 2 else data)  # a system may take a part

    monkeypatch.setattr(large, "open", lambda path, mode, buffering: Watched(path, "w"), raising=False)
    parts = [b"head", bytes(3 * PAGE), b"x" * 100, bytes(PAGE - 104), b"tail"]
    assert written(tmp_path / "file", parts) == b"".join(parts)
    assert sizes == [PAGE, PAGE, PAGE // 2, PAGE, PAGE, 4]


def test_the_beginning_can_be_replaced_at_the_end(tmp_path: Path) -> None:
    with LargeFile(tmp_path / "file") as file:
        file.write(bytes(10))
        file.sync()
        file.overwrite(b"abc")
    assert (tmp_path / "file").read_bytes() == b"abc" + bytes(7)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error() -> None:
    with LargeFile("/dev/full") as file, pytest.raises(OSError, match="space"):
        file.write(bytes(PAGE))


@pytest.mark.parametrize("quantized", [False, True])
def test_weights_that_stay_mapped_ask_for_large_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(MappedFile, "large_pages", lambda self: asked.append(self.path))
    path = tmp_path / "model.gguf"
    write_gguf(path, transformers_model(WIDE), GGML.Q8_0 if quantized else GGML.BF16)
    fill(open_store(path), weights="stored" if quantized else "auto")
    assert asked == ([] if quantized else [path])

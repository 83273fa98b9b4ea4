"""The low-level writers: read back by torch, by the safetensors package, by Python's zipfile and by herd."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from herd.checkpoint.safetensors import SafetensorsFile
from herd.checkpoint.torchfile import TorchFile
from herd.checkpoint.write import torchfile
from herd.checkpoint.write.pieces import pieces
from herd.checkpoint.write.planned import Planned
from herd.checkpoint.write.safetensors import write_safetensors
from herd.checkpoint.write.torchfile import write_torch_file
from herd.errors import CheckpointError

WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def tensors() -> dict[str, Tensor]:
    return {
        "narrow": torch.randn(7).bfloat16(),  # odd: what follows would be misaligned
        "wide.weight": torch.randn(5, 3),
        "half": torch.randn(3, 5, 2).half(),
        "turned": torch.randn(300, 70).t(),
        "experts": torch.randn(4, 30, 20).transpose(1, 2),
        "double": torch.randn(3, dtype=torch.float64),
        "scalar": torch.randn(()),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "größe/名": torch.ones(1),
    }


def plans(given: dict[str, Tensor]) -> list[Planned]:
    return [Planned(name, tuple(t.shape), WORDS[t.dtype], lambda t=t: t) for name, t in given.items()]


def same(one: Tensor, other: Tensor) -> bool:
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*bits)


def test_safetensors(tmp_path: Path) -> None:
    file, given, told = tmp_path / "a.safetensors", tensors(), []
    write_safetensors(file, plans(given), {"format": "pt"}, told.append)
    assert sum(told) == sum(t.numel() * t.itemsize for t in given.values())
    theirs, ours = load_file(file), SafetensorsFile(file)
    assert set(theirs) == set(given) == set(ours.names())
    for name, tensor in given.items():
        assert same(theirs[name], tensor), name
        assert same(ours.tensor(name), tensor), name
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % given[name].itemsize == 0, name


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it(tmp_path: Path, mmap: bool) -> None:
    file, given, told = tmp_path / "consolidated.00.pth", tensors(), []
    write_torch_file(file, plans(given), told.append, {"again": "wide.weight"})
    assert sum(told) == sum(t.numel() * t.itemsize for t in given.values())
    found = torch.load(file, weights_only=True, mmap=mmap)
    assert list(found) == [*given, "again"]
    for name, tensor in given.items():
        assert same(found[name], tensor), name
        assert found[name].is_contiguous()
        assert not found[name].requires_grad
    assert found["again"].data_ptr() == found["wide.weight"].data_ptr()


def test_herd_and_zipfile_read_it(tmp_path: Path) -> None:
    file, given = tmp_path / "model.v1.bin", tensors()
    write_torch_file(file, plans(given), lambda n: None)
    ours = TorchFile(file)
    assert ours.saved_as == "model.v1"
    for name, tensor in given.items():
        assert same(ours.tensor(name), tensor), name
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None  # checksums
        assert archive.read("model.v1/byteorder") == b"little"
        for entry in archive.infolist():
            local = file.read_bytes()[entry.header_offset :][:30]
            extra = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            assert (entry.header_offset + 30 + extra) % 64 == 0


def test_large_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zip64 fields, written as if everything above 300 bytes were above 4 GB."""
    monkeypatch.setattr(torchfile, "_WIDE", 300)
    given = {f"t{i}": torch.randn(8 * i) for i in range(1, 20)}
    packed = torchfile.struct.pack

    def narrow(form: str, *values: object) -> bytes:
        """In the real thing the 32-bit fields hold the mark, 0xFFFFFFFF."""
        values = tuple(
            0xFFFFFFFF if v == 300 and form in ("<4sHHHHHIIIHH", "<HHHHHIII", "<HHHHHII", "<4sHHHHIIH") else v
            for v in values
        )
        return packed(form, *values)

    monkeypatch.setattr(torchfile.struct, "pack", narrow)
    file = tmp_path / "a.pth"
    write_torch_file(file, plans(given), lambda n: None)
    monkeypatch.undo()
    for found in (torch.load(file, weights_only=True), {n: TorchFile(file).tensor(n) for n in given}):
        assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


@pytest.mark.slow
def test_more_than_four_gigabytes(tmp_path: Path) -> None:
    """A sparse 4.4 GB tensor between two small ones."""
    rows = 1100 * 1024
    big = torch.zeros(1, dtype=torch.float32).expand(rows, 1024)
    small = torch.randn(5)
    given = [
        Planned("first", (5,), "F32", lambda: small),
        Planned("big", (rows, 1024), "F32", lambda: big),
        Planned("last", (5,), "F32", lambda: small),
    ]
    file = tmp_path / "a.pth"
    write_torch_file(file, given, lambda n: None)
    for found in (
        torch.load(file, weights_only=True, mmap=True),
        {n: TorchFile(file).tensor(n) for n in ("last", "big")},
    ):
        assert torch.equal(found["last"], small)
        assert found["big"].shape == (rows, 1024)
        assert not found["big"][-1].any()


def test_refusals(tmp_path: Path) -> None:
    twice = [Planned("a", (2,), "F32", lambda: torch.ones(2))] * 2
    blocks = [Planned("a", (32,), "Q8_0", lambda: torch.ones(2))]

    def both(planned: Sequence[Planned], why: str) -> None:
        with pytest.raises(CheckpointError, match=why):
            write_torch_file(tmp_path / "a", planned, lambda n: None)
        with pytest.raises(CheckpointError, match=why):
            write_safetensors(tmp_path / "b", planned, {}, lambda n: None)

    both(twice, "tensor 'a': this tensor would be written twice")
    both(blocks, "hold no Q8_0 blocks: choose a dtype, or write GGUF")
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_planned_is_written() -> None:
    plan = Planned("a", (2, 3), "F32", lambda: torch.ones(2, 3))
    for wrong in (torch.ones(3, 2), torch.ones(2, 3).half()):
        with pytest.raises(AssertionError):
            list(pieces(plan, wrong))
    assert b"".join(pieces(plan, torch.ones(3, 2).t())) == torch.ones(6).numpy().tobytes()

"""torch.save files: tensors come out as torch reads them; damaged and lying archives are refused in bounded memory."""

from __future__ import annotations

import io
import random
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from herd.checkpoint.torchfile import TorchFile
from herd.errors import CheckpointError
from tests.checkpoint.payloads import as_torch_zip, glob, text

MUTANTS = 400


def saved(data: object, **options: object) -> bytes:
    """What torch.save writes."""
    made = io.BytesIO()
    torch.save(data, made, **options)  # pyright: ignore[reportArgumentType]
    return made.getvalue()


def rezip(content: bytes, compression: int = zipfile.ZIP_STORED, **changes: bytes | None) -> bytes:
    """The archive again, with entries (by last name) replaced, or dropped when None."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", compression) as new:
        for name in old.namelist():
            entry = changes.get(name.rpartition("/")[2].replace(".", "_"), old.read(name))
            if entry is not None:
                new.writestr(name, entry)
    return made.getvalue()


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    began = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path)
    assert time.process_time() - began < 1
    assert str(path) in str(caught.value)
    return str(caught.value)


STATE = {
    "float32": torch.randn(4, 3),
    "bfloat16": torch.randn(5).bfloat16(),
    "float16": torch.randn(2, 2, 2).half(),
    "float64": torch.randn(3).double(),
    "int64": torch.arange(3),
    "int8": torch.arange(3).to(torch.int8),
    "bool": torch.tensor([True, False]),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "uint16": torch.arange(3).to(torch.uint16),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.randn(3)),
    "transposed": torch.randn(4, 6).T,
    "sliced": torch.randn(10, 10)[2:5, ::2],
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_reads(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(saved(STATE, pickle_protocol=protocol))
    file = TorchFile(path)
    assert list(file.names()) == list(STATE)
    for name, tensor in STATE.items():
        found = file.tensor(name)
        assert found.dtype == tensor.dtype
        assert found.stride() == tensor.stride()
        assert torch.equal(found.float(), tensor.float())
        assert file.describe(name).shape == tuple(tensor.shape)


def test_state_dicts_and_shared_storage(tmp_path: Path) -> None:
    """A module's state dict (OrderedDict with _metadata), two names for one storage, and entries that are no tensors."""
    state = torch.nn.Linear(4, 4).state_dict()
    state["tied"] = state["weight"]
    state["step"] = 3  # pyright: ignore[reportArgumentType]
    state["shape"] = torch.Size([1, 2])  # pyright: ignore[reportArgumentType]
    assert isinstance(state, OrderedDict)
    path = tmp_path / "x.bin"
    torch.save(state, path)
    file = TorchFile(path)
    assert list(file.names()) == ["weight", "bias", "tied"]
    assert file.specs["tied"] == file.specs["weight"]
    assert file.tensor("tied").data_ptr() == file.tensor("weight").data_ptr()
    assert file.saved_as == "x"


GOOD = saved({"w": torch.randn(8, 8)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"PK", "no zip archive"),
        (b"version https://git-lfs", "no zip archive"),
        (GOOD[:-1], "truncated"),
        (GOOD[: len(GOOD) // 2], "truncated"),
        (GOOD[1:], "no zip archive"),
        (saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False), "before 2020"),
        (saved(torch.ones(2)), "holds a TensorSpec, expected a dict"),
        (saved([torch.ones(2)]), "holds a list, expected a dict"),
        (saved({"model": {"w": torch.ones(2)}}), "no tensors at its top level"),
        (saved({}), "no tensors"),
        (rezip(GOOD, zipfile.ZIP_DEFLATED), "compressed"),
        (rezip(GOOD, zipfile.ZIP_BZIP2), "compressed"),
        (rezip(GOOD, byteorder=b"big"), "big-endian"),
        (rezip(GOOD, data_pkl=None), "no single data.pkl"),
        (rezip(GOOD, **{"0": None}), "its data is not in the archive"),
        (rezip(GOOD, **{"0": b"\0" * 255}), "256 bytes, the archive has 255"),
        (saved({"w": torch.ones(2).to_sparse()}), "_rebuild_sparse_tensor"),
        (saved({"w": torch.ones(2, dtype=torch.complex64)}), "torch.ComplexFloatStorage"),
    ],
)
def test_refusals(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refusal(tmp_path / "x.pth", content)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../../evil", "outside of the archive"),
        ("x/../../evil", "outside of the archive"),
        ("/etc/evil", "outside of the archive"),
        ("C:\\evil", "outside of the archive"),
        ("C:/evil", "outside of the archive"),
        ("x/data.pkl", "twice"),
        ("y/data.pkl", "no single data.pkl"),
        ("x/constants.pkl", "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entry_names(tmp_path: Path, name: str, words: str) -> None:
    made = io.BytesIO(as_torch_zip(b"\x80\x02}.", "x"))
    with zipfile.ZipFile(made, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.filename = name  # ZipInfo cleans names up
        archive.writestr(info, b"x")
    assert words in refusal(tmp_path / "x.pth", made.getvalue())


def tensor_program(offset: bytes, shape: bytes, strides: bytes, count: bytes = b"K\x04", tail: bytes = b"") -> bytes:
    """A dict with one tensor over the archive's storage of four numbers."""
    storage = b"(" + text("storage") + glob("torch", "FloatStorage") + text("0") + text("cpu") + count + b"tQ"
    hooks = glob("collections", "OrderedDict") + b")R"
    parts = storage + offset + shape + strides + b"\x89" + hooks + tail
    return b"\x80\x02}" + text("w") + glob("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + b"tRs."


ONE, FOUR, BIG = b"K\x01\x85", b"K\x04\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x0f"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (tensor_program(b"K\x00", b"K\x05\x85", ONE), "leaves its storage"),
        (tensor_program(b"K\x01", FOUR, ONE), "leaves its storage"),
        (tensor_program(b"J\xff\xff\xff\xff", FOUR, ONE), "not sizes"),
        (tensor_program(b"K\x00", b"J\xff\xff\xff\xff\x85", ONE), "not sizes"),
        (tensor_program(b"K\x00", FOUR, b"J\xff\xff\xff\xff\x85"), "not sizes"),
        (tensor_program(b"K\x00", FOUR, b"K\x02\x85"), "leaves its storage"),
        (tensor_program(b"K\x00", b"K\x05\x85", b"K\x00\x85"), "leaves its storage"),  # one number seen five times
        (tensor_program(b"K\x00", BIG + b"\x85", ONE), "leaves its storage"),
        (tensor_program(BIG, FOUR, ONE), "leaves its storage"),
        (tensor_program(b"K\x00", b"K\x02K\x02\x86", ONE), "not sizes"),
        (tensor_program(b"K\x00", b"K\x00" + BIG + b"\x86", b"K\x01K\x01\x86"), "leaves its storage"),
        (tensor_program(b"K\x00", b"N", ONE), "not sizes"),
        (tensor_program(b"N", FOUR, ONE), "not sizes"),
        (
            tensor_program(b"K\x00", FOUR, ONE, b"K\x05"),
            "20 bytes, the archive has 16",
        ),  # a storage that claims more than its entry
        (tensor_program(b"K\x00", FOUR, ONE, BIG), "the archive has 16"),
        (tensor_program(b"K\x00", FOUR, ONE, b"J\xff\xff\xff\xff"), "no torch storage"),
        (tensor_program(b"K\x00", FOUR, ONE, tail=b"}" + text("neg") + b"\x88s"), "flags"),
    ],
)
def test_lying_tensors(tmp_path: Path, program: bytes, words: str) -> None:
    assert words in refusal(tmp_path / "x.pth", as_torch_zip(program))


def test_many_views_of_one_storage(tmp_path: Path) -> None:
    """A small file must not stand for gigabytes once its tensors are copied."""
    names = b"".join(
        text(f"w{i}") + tensor_program(b"K\x00", FOUR, ONE)[len(b"\x80\x02}" + text("w")) : -2] for i in range(2000)
    )
    program = b"\x80\x02}(" + names + b"u."
    file = tmp_path / "x.pth"
    file.write_bytes(as_torch_zip(program))
    assert len(TorchFile(file).specs) == 2000  # the pickle itself is larger than what they claim
    large = torch.zeros(100_000)
    torch.save({f"w{i}": large for i in range(50)}, file)
    with pytest.raises(CheckpointError, match="claim 20000000 bytes"):
        TorchFile(file)


def test_bombs_cost_no_memory(tmp_path: Path) -> None:
    """A quarter of a gigabyte deflated, 100,001 entries, a directory that claims 2^64 of them, and overlapping entries."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = tensor_program(b"K\x00", FOUR, ONE)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", program)
        with archive.open("x/data/0", "w", force_zip64=True) as entry:
            for _ in range(256):
                entry.write(bytes(1 << 20))
    assert len(made.getvalue()) < 2 << 20
    assert "compressed" in refusal(tmp_path / "deflated.pth", made.getvalue())

    record = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    for count in (100_001, (1 << 64) - 1):
        zip64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(record), 4)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 4 + len(record), 1)
        end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        assert "more than 100000" in refusal(tmp_path / "many.pth", b"PK\x03\x04" + record + zip64 + locator + end)

    overlapping = bytearray(GOOD)
    first = overlapping.find(b"PK\x01\x02")
    second = overlapping.find(b"PK\x01\x02", first + 4)
    third = overlapping.find(b"PK\x01\x02", second + 4)
    overlapping[third + 42 : third + 46] = overlapping[second + 42 : second + 46]
    assert "does not lie" in refusal(tmp_path / "overlap.pth", bytes(overlapping))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_mutants(tmp_path: Path) -> None:
    """Damaged copies either give tensors inside the file or a CheckpointError, nothing else."""
    rng = random.Random(0)
    good = saved({name: tensor for name, tensor in STATE.items() if tensor.numel() < 30})
    outcomes = [0, 0]
    for _ in range(MUTANTS):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            match rng.randrange(4):
                case 0:
                    data[rng.randrange(len(data))] = rng.randrange(256)
                case 1:
                    data[rng.randrange(min(1500, len(data)))] ^= 1 << rng.randrange(8)
                case 2:
                    del data[rng.randrange(len(data)) :]
                case 3:
                    where = rng.randrange(len(data) + 1)
                    data[where:where] = rng.randbytes(rng.randrange(1, 9))
            data = data or bytearray(b"P")
        path = tmp_path / "x.pth"
        path.write_bytes(data)
        began = time.process_time()
        try:
            file = TorchFile(path)
            for name in file.names():
                _ = file.tensor(name).float().sum()
            outcomes[1] += 1
        except CheckpointError:
            outcomes[0] += 1
        assert time.process_time() - began < 1
    assert min(outcomes) > 20

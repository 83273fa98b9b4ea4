"""The safetensors reader accepts and refuses exactly what the format's own package does, and reads the same bytes."""

from __future__ import annotations

import json
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from herd.checkpoint.safetensors import SafetensorsFile
from herd.errors import CheckpointError

MUTANTS = 700


def pack(header: bytes | object, data: bytes = b"1234") -> bytes:
    """A file with this header (an object is written as JSON) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one(data: bytes = b"1234", **changes: object) -> bytes:
    """A file with one tensor `a`, some fields replaced."""
    return pack({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}, data)


def field(text: bytes) -> bytes:
    """A file with one tensor whose header entry is this JSON text."""
    return pack(b'{"a":' + text + b"}")


GOOD = b'"shape":[1],"data_offsets":[0,4]}'
F32 = b'{"dtype":"F32",'
T = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

CASES: dict[str, bytes] = {
    "good": one(),
    "no bytes": b"",
    "seven bytes": b"\0" * 7,
    "zero length": struct.pack("<Q", 0),
    "length beyond the file": struct.pack("<Q", 100) + b"{}",
    "length 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "length -1": b"\xff" * 8 + b"{}",
    "length above 100 MB": struct.pack("<Q", 100_000_001) + b"{}",
    "no tensors": pack({}, b""),
    "no tensors, but data": pack({}, b"12"),
    "space before": pack(b" " + json.dumps({"a": T}).encode()),
    "space behind": pack(json.dumps({"a": T}).encode() + b" \n\t"),
    "zero byte behind": pack(json.dumps({"a": T}).encode() + b"\0"),
    "byte order mark": pack(b"\xef\xbb\xbf" + json.dumps({"a": T}).encode()),
    "form feed": pack(b"{\x0c" + json.dumps({"a": T}).encode()[1:]),
    "not UTF-8": pack(b'{"\xff":' + json.dumps(T).encode() + b"}"),
    "overlong UTF-8": pack(b'{"\xc0\x80":' + json.dumps(T).encode() + b"}"),
    "half a surrogate pair": pack(b'{"\\ud800":' + json.dumps(T).encode() + b"}"),
    "a surrogate pair": pack(b'{"\\ud83d\\ude00":' + json.dumps(T).encode() + b"}"),
    "half a pair in an unknown field": field(F32 + b'"x":"\\udfff",' + GOOD),
    "control character": pack(b'{"a\x01":' + json.dumps(T).encode() + b"}"),
    "unknown escape": pack(b'{"a\\x":' + json.dumps(T).encode() + b"}"),
    "empty name": pack({"": T}),
    "list": pack([]),
    "number": pack(b"7"),
    "cut JSON": pack(b'{"a":'),
    "trailing comma": pack(b'{"a":' + json.dumps(T).encode() + b",}"),
    "entry is a list": pack({"a": ["F32", [1], [0, 4]]}),
    "entry is a list of four": pack({"a": ["F32", [1], [0, 4], 0]}),
    "entry is a list of two": pack({"a": ["F32", [1]]}),
    "entry is null": pack({"a": None}),
    "dtype twice": field(b'{"dtype":"F32",' + F32[1:] + GOOD),
    "unknown field": field(F32 + b'"x":{"y":[1]},' + GOOD),
    "NaN in an unknown field": field(F32 + b'"x":NaN,' + GOOD),
    "deep unknown field": field(F32 + b'"x":' + b"[" * 5000 + b"]" * 5000 + b"," + GOOD),
    "metadata null": pack({"__metadata__": None, "a": T}),
    "metadata": pack({"__metadata__": {"format": "pt"}, "a": T}),
    "metadata with a number": pack({"__metadata__": {"a": 1}, "a": T}),
    "metadata is a list": pack({"__metadata__": [], "a": T}),
    "metadata twice": pack(b'{"__metadata__":{},"__metadata__":{},"a":' + json.dumps(T).encode() + b"}"),
    "no shape": pack({"a": {"dtype": "F32", "data_offsets": [0, 4]}}),
    "no offsets": pack({"a": {"dtype": "F32", "shape": [1]}}),
    "no dtype": pack({"a": {"shape": [1], "data_offsets": [0, 4]}}),
    "scalar": one(shape=[]),
    "100 dimensions": one(shape=[1] * 100),
    "negative size": one(shape=[-1]),
    "fractional size": field(F32 + b'"shape":[1.0],"data_offsets":[0,4]}'),
    "size with exponent": field(F32 + b'"shape":[1e0],"data_offsets":[0,4]}'),
    "size -0": field(F32 + b'"shape":[-0],"data_offsets":[0,4]}'),
    "size 01": field(F32 + b'"shape":[01],"data_offsets":[0,4]}'),
    "size true": one(shape=[True]),
    "size as text": one(shape=["1"]),
    "size 2^64": one(shape=[1 << 64]),
    "size of 5000 digits": field(F32 + b'"shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}'),
    "product overflows": one(shape=[1 << 40, 1 << 40]),
    "product wraps to 4 bytes": one(shape=[1 << 32, 1 << 32, 1]),
    "bits overflow": one(dtype="U8", shape=[1 << 61], data_offsets=[0, 1 << 61]),
    "shape is null": one(shape=None),
    "three offsets": one(data_offsets=[0, 4, 8]),
    "one offset": one(data_offsets=[4]),
    "offsets reversed": one(data_offsets=[4, 0]),
    "negative offset": one(data_offsets=[-4, 0]),
    "offset 2^64 - 1": one(data_offsets=[0, (1 << 64) - 1]),
    "offset past the end": one(data_offsets=[0, 8], shape=[2]),
    "starts late": one(data_offsets=[4, 8], data=b"12345678"),
    "bytes left over": one(data=b"12345"),
    "bytes missing": one(data=b"123"),
    "unknown dtype": one(dtype="F33"),
    "dtype in lower case": one(dtype="f32"),
    "dtype is a number": one(dtype=7),
    "booleans": one(dtype="BOOL", shape=[4]),
    "4-bit": one(dtype="F4", shape=[8]),
    "4-bit, odd count": one(dtype="F4", shape=[7]),
    "6-bit": one(dtype="F6_E2M3", shape=[4], data_offsets=[0, 3], data=b"123"),
    "6-bit, not whole bytes": one(dtype="F6_E3M2", shape=[5], data_offsets=[0, 4]),
    "zero elements": pack({"a": EMPTY}, b""),
    "two empty tensors": pack({"a": EMPTY, "b": EMPTY, "c": T}),
    "empty tensor at the end": pack({"c": T, "b": EMPTY | {"data_offsets": [4, 4]}}),
    "empty tensor inside another": pack({"c": T, "b": EMPTY | {"data_offsets": [2, 2]}}),
    "overlap": pack({"a": T, "b": T}),
    "hole": pack({"a": T, "b": T | {"data_offsets": [8, 12]}}, b"123456789abc"),
    "two tensors": pack({"b": T | {"data_offsets": [4, 8]}, "a": T}, b"12345678"),
}

STRICTER = {
    "same name twice": pack(b'{"a":' + json.dumps(T).encode() + b',"a":' + json.dumps(T).encode() + b"}"),
    "same metadata key twice": pack(b'{"__metadata__":{"x":"1","x":"2"},"a":' + json.dumps(T).encode() + b"}"),
}


def theirs(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What the package sees: dtype and shape by name; None when it refuses."""
    try:
        with safe_open(path, "pt") as file:
            return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def ours(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What herd sees; None when it refuses, which must be a CheckpointError that names the file, in well under a second."""
    began = time.process_time()
    try:
        file = SafetensorsFile(path)
        return {name: (entry.dtype, list(entry.shape)) for name, entry in file.entries.items()}
    except CheckpointError as error:
        refusal = str(error)
    finally:
        assert time.process_time() - began < 1
    assert str(path) in refusal
    assert len(refusal) < 2000
    return None


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_package(tmp_path: Path, name: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(CASES[name])
    assert ours(file) == theirs(file)


@pytest.mark.parametrize("name", STRICTER)
def test_repeated_names_are_refused(tmp_path: Path, name: str) -> None:
    """The one place where herd is stricter: the package keeps the last of two equal names."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(STRICTER[name])
    assert theirs(file) is not None
    assert ours(file) is None


def sample() -> bytes:
    """A small file with several dtypes."""
    return save(
        {
            "tok.weight": torch.randn(4, 3),
            "norm": torch.randn(5).bfloat16(),
            "ids": torch.arange(3),
            "flag": torch.tensor([True, False]),
            "half": torch.randn(2, 2).half(),
        },
        {"format": "pt"},
    )


def flip(rng: random.Random, data: bytearray, header: int) -> None:
    """One byte anywhere, more often in the header."""
    where = rng.randrange(8 + header if rng.random() < 0.9 else len(data))
    data[where] = rng.randrange(256)


def digit(rng: random.Random, data: bytearray, header: int) -> None:
    """Another digit in a shape or offset."""
    digits = [i for i in range(8, 8 + header) if 48 <= data[i] < 58]
    data[rng.choice(digits)] = rng.randrange(48, 58)


def cut(rng: random.Random, data: bytearray, header: int) -> None:
    """The end is missing."""
    del data[rng.randrange(len(data)) :]


def length(rng: random.Random, data: bytearray, header: int) -> None:
    """The header length is another."""
    near = max(0, header + rng.randrange(-3, 4))
    data[:8] = struct.pack("<Q", rng.choice([near, near, rng.getrandbits(64), rng.getrandbits(20), 0]))


def grow(rng: random.Random, data: bytearray, header: int) -> None:
    """Bytes inserted somewhere, the length kept or corrected."""
    extra = bytes(rng.choice(b'0123456789{}[],:"\\ \xff') for _ in range(rng.randrange(1, 4)))
    where = rng.randrange(8, 8 + header)
    data[where:where] = extra
    if rng.random() < 0.7:
        data[:8] = struct.pack("<Q", header + len(extra))


def remove(rng: random.Random, data: bytearray, header: int) -> None:
    """Bytes taken out of the header, the length kept or corrected."""
    where, count = rng.randrange(8, 8 + header), rng.randrange(1, 4)
    del data[where : where + count]
    if rng.random() < 0.7:
        data[:8] = struct.pack("<Q", header - count)


def reorder(rng: random.Random, data: bytearray, header: int) -> None:
    """Fields exchanged between tensors, and harmless changes such as another order: some of these stay valid."""
    table = json.loads(bytes(data[8 : 8 + header]))
    names = [name for name in table if name != "__metadata__"]
    a, b = rng.sample(names, 2)
    key = rng.choice(["dtype", "shape", "data_offsets", "all", "order"])
    if key == "order":
        rng.shuffle(names)
        table = {name: table[name] for name in names}
    elif key == "all":
        table[a], table[b] = table[b], table[a]
    else:
        table[a][key], table[b][key] = table[b][key], table[a][key]
    raw = json.dumps(table).encode()
    data[:] = struct.pack("<Q", len(raw)) + raw + data[8 + header :]


MUTATIONS: list[Callable[[random.Random, bytearray, int], None]] = [flip, digit, cut, length, grow, remove, reorder]


def mutants(count: int, seed: int = 0, good: bytes | None = None) -> Iterator[bytes]:
    """`count` damaged copies of the sample or of `good`, the same ones in every run."""
    rng = random.Random(seed)
    good = sample() if good is None else good
    (header,) = struct.unpack("<Q", good[:8])
    for i in range(count):
        data = bytearray(good)
        MUTATIONS[i % len(MUTATIONS)](rng, data, header)
        yield bytes(data)


def repeated(data: bytes) -> bool:
    """Whether the header names something twice, the one place where herd is stricter."""
    found = False

    def look(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal found
        found = found or len(dict(pairs)) != len(pairs)
        return dict(pairs)

    (size,) = struct.unpack("<Q", data[:8])
    json.loads(data[8 : 8 + size], object_pairs_hook=look)
    return found


def test_mutants_are_judged_as_the_package_does(tmp_path: Path) -> None:
    file, accepted = tmp_path / "x.safetensors", 0
    for number, data in enumerate(mutants(MUTANTS)):
        file.write_bytes(data)
        expected, found = theirs(file), ours(file)
        if expected is not None and found is None:
            assert repeated(data), number
        else:
            assert found == expected, number
        accepted += found is not None
    assert 20 < accepted < MUTANTS - 400  # both outcomes are exercised


def test_tensors_equal(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(sample())
    mine = SafetensorsFile(file)
    with safe_open(file, "pt") as package:
        for name in package.keys():  # noqa: SIM118
            assert torch.equal(mine.tensor(name), package.get_tensor(name))
            assert mine.tensor(name).dtype == package.get_tensor(name).dtype
    assert mine.metadata == {"format": "pt"}


def test_misaligned_data(tmp_path: Path) -> None:
    """A header of odd length puts 4-byte numbers at odd offsets: they are copied, not read askew."""
    for pad in range(4):
        raw = json.dumps({"a": T | {"shape": [2], "data_offsets": [0, 8]}}).encode() + b" " * pad
        file = tmp_path / f"{pad}.safetensors"
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + struct.pack("<ff", 1.5, -2.0))
        tensor = SafetensorsFile(file).tensor("a")
        assert tensor.tolist() == [1.5, -2.0]
        assert tensor.data_ptr() % 4 == 0


def test_unreadable_dtypes_and_absurd_empty_shapes_are_refused_when_read(tmp_path: Path) -> None:
    """The package opens these too; only the tensor itself cannot exist."""
    for data in (one(dtype="F4", shape=[8]), one(shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0], data=b"")):
        file = tmp_path / "x.safetensors"
        file.write_bytes(data)
        opened = SafetensorsFile(file)
        with pytest.raises(CheckpointError):
            opened.tensor("a")


def test_claims_cost_no_memory(tmp_path: Path) -> None:
    """Headers that promise exabytes are refused without allocating them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in (1 << 40, 1 << 50, 1 << 58):
        file = tmp_path / "x.safetensors"
        file.write_bytes(one(shape=[size], data_offsets=[0, 4 * size]))
        assert ours(file) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10

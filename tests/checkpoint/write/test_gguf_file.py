"""The GGUF file writer against the gguf package's reader, and against herd's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType

from herd.checkpoint.gguf import GGUFFile
from herd.checkpoint.write.gguf import Encoded, Typed, encoded, write_gguf_file
from herd.checkpoint.write.planned import Planned
from herd.errors import CheckpointError
from herd.quant.scheme import QuantTensor, block_type

V = GGUFValueType
NUMBERS = {
    "u8": (V.UINT8, 255),
    "i8": (V.INT8, -128),
    "u16": (V.UINT16, 65_535),
    "i16": (V.INT16, -32_768),
    "u32": (V.UINT32, 2**32 - 1),
    "i32": (V.INT32, -(2**31)),
    "f32": (V.FLOAT32, 0.5),
    "bool": (V.BOOL, True),
    "u64": (V.UINT64, 2**64 - 1),
    "i64": (V.INT64, -(2**63)),
    "f64": (V.FLOAT64, 1e-5),
}

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def plan(name: str, value: torch.Tensor | QuantTensor) -> Planned:
    stored = value.type.name if isinstance(value, QuantTensor) else plain(value.dtype)
    return Planned(name, tuple(value.shape), stored, lambda: value)


def plain(dtype: torch.dtype) -> str:
    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]


def noise(name: str, *shape: int) -> QuantTensor:
    kind = block_type(name)
    assert kind is not None
    blocks = torch.randint(0, 256, (*shape[:-1], kind.row_bytes(shape[-1])), dtype=torch.uint8)
    return QuantTensor(blocks, kind, shape)


def write(path: Path, metadata: dict[str, Any], plans: list[Planned], **more: Any) -> gguf.GGUFReader:
    write_gguf_file(path, {"general.architecture": "llama"} | metadata, plans, lambda n: None, **more)
    return gguf.GGUFReader(path)


def raw(tensor: Any) -> bytes:
    return np.ascontiguousarray(tensor.data).tobytes()


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_every_type(kind: str, tmp_path: Path) -> None:
    theirs, value = NUMBERS[kind]
    read = write(tmp_path / "a.gguf", {"one": Typed(kind, value), "many": Typed(kind, [value, value])}, [])
    one, many = read.get_field("one"), read.get_field("many")
    assert one.types == [theirs]
    assert many.types == [V.ARRAY, theirs]
    assert one.contents() == value
    assert many.contents() == [value, value]
    ours = GGUFFile(tmp_path / "a.gguf").metadata
    assert (ours["one"], ours["many"]) == (value, [value, value])


def test_plain_values_have_llama_cpps_types(tmp_path: Path) -> None:
    values = {
        "count": 7, "size": 0.25, "yes": True, "text": "Grüße, 世界", "texts": ["a", "", "ß"], "ids": [1, -1],
        "scores": [0.0, -1.5], "flags": [True, False],
    }  # fmt: skip
    read = write(tmp_path / "a.gguf", values, [])
    types = [[V.UINT32], [V.FLOAT32], [V.BOOL], [V.STRING]]
    types += [[V.ARRAY, kind] for kind in (V.STRING, V.INT32, V.FLOAT32, V.BOOL)]
    ours = GGUFFile(tmp_path / "a.gguf").metadata
    for (key, value), kind in zip(values.items(), types, strict=True):
        field = read.get_field(key)
        assert field.types == kind, key
        assert field.contents() == value == ours[key]
    assert list(ours) == ["general.architecture", *values]  # in the order given


@pytest.mark.parametrize(
    "value",
    [-1, 2**32, 1e39, [], [1, 1.5], [1, "a"], [[1]], None, "\ud800", {"a": 1}, Typed("u8", 256), Typed("u16", 1.5)],
    ids=repr,
)
def test_values_without_a_place_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'the key' cannot be written"):
        write(tmp_path / "a.gguf", {"the key": value}, [])


def test_infinity_may_be_a_score(tmp_path: Path) -> None:
    values = [float("-inf"), float("inf"), 3.0e38]
    read = write(tmp_path / "a.gguf", {"scores": values}, [])
    assert read.get_field("scores").contents() == pytest.approx(values)


def test_encoded_values_are_kept(tmp_path: Path) -> None:
    value = Typed("u16", [1, 2])
    read = write(tmp_path / "a.gguf", {"key": Encoded(encoded(value))}, [])
    assert read.get_field("key").types == [V.ARRAY, V.UINT16]


@pytest.mark.parametrize("alignment", [32, 8, 64, 4096])
def test_tensors_of_all_types_and_shapes(alignment: int, tmp_path: Path) -> None:
    values: dict[str, torch.Tensor | QuantTensor] = {
        "vector": torch.randn(7),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(2, 3, 5).bfloat16(),
        "turned": torch.randn(5, 3).T,
        "four": torch.randn(2, 1, 3, 4),
    }
    values |= {name: noise(name, 2, 3, 512) for name in QUANTIZED}
    values["one block"] = noise("Q8_0", 1, 32)
    ticks: list[int] = []
    path = tmp_path / "a.gguf"
    plans = [plan(name, value) for name, value in values.items()]
    write_gguf_file(path, {"general.architecture": "llama"}, plans, ticks.append, alignment)
    assert sum(ticks) == sum(p.nbytes for p in plans)
    file = GGUFFile(path)
    assert (file.version, file.alignment) == (3, alignment)
    assert list(file.names()) == list(values)
    for name, value in values.items():
        entry, ours = file.entries[name], file.raw(name)
        assert entry.shape == tuple(value.shape), name
        assert entry.start % alignment == 0
        if isinstance(value, QuantTensor):
            assert isinstance(ours, QuantTensor)
            assert torch.equal(ours.blocks, value.blocks)
        else:
            assert isinstance(ours, torch.Tensor)
            assert torch.equal(ours, value)
    for tensor in gguf.GGUFReader(path).tensors:
        value, entry = values[tensor.name], file.entries[tensor.name]
        assert tensor.data_offset == entry.start
        assert tuple(reversed(tensor.shape.tolist())) == tuple(value.shape)
        assert tensor.tensor_type.name == entry.type.name
        stored = value.blocks if isinstance(value, QuantTensor) else value.contiguous()
        assert raw(tensor) == stored.view(torch.uint8).numpy().tobytes(), tensor.name


def test_the_same_bytes_as_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "▁a"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.0])
    values = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    for name, value in values.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = {
        "llama.block_count": 2,
        "llama.rope.freq_base": 1e4,
        "tokenizer.ggml.tokens": ["<s>", "▁a"],
        "tokenizer.ggml.scores": [0.0, -1.0],
    }
    write(tmp_path / "ours.gguf", ours, [plan(name, value) for name, value in values.items()])
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        return torch.zeros(4)

    plans = [Planned(name, (4,), "F32", lambda name=name: make(name)) for name in "abc"]
    seen: list[list[str]] = []
    write_gguf_file(tmp_path / "a.gguf", {"general.architecture": "llama"}, plans, lambda n: seen.append(list(made)))
    assert seen == [["a"], ["a", "b"], ["a", "b", "c"]]


@pytest.mark.parametrize(
    ("plans", "why"),
    [
        ([plan("a", torch.zeros(1)), plan("a", torch.zeros(1))], "twice"),
        ([plan("", torch.zeros(1))], "1 to 63 bytes"),
        ([plan("é" * 32, torch.zeros(1))], "1 to 63 bytes"),
        ([plan("a", torch.zeros(()))], "0 dimensions"),
        ([plan("a", torch.zeros(1, 1, 1, 1, 1))], "5 dimensions"),
    ],
    ids=["twice", "empty", "long", "scalar", "five"],
)
def test_tensors_without_a_place_are_refused(plans: list[Planned], why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=why):
        write(tmp_path / "a.gguf", {}, plans)


def test_a_wrong_maker_is_our_bug(tmp_path: Path) -> None:
    wrong = Planned("a", (4,), "F32", lambda: torch.zeros(4, dtype=torch.float16))
    with pytest.raises(AssertionError):
        write(tmp_path / "a.gguf", {}, [wrong])


def test_a_list_of_no_strings_needs_its_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="an empty list has no type"):
        write(tmp_path / "a.gguf", {"none": []}, [])
    read = write(tmp_path / "a.gguf", {"none": Typed("str", []), "one": Typed("str", ["a"])}, [])
    assert read.fields["none"].types == [V.ARRAY]  # the reader tells the type of elements only when there are some
    assert GGUFFile(tmp_path / "a.gguf").metadata["none"] == []
    assert GGUFFile(tmp_path / "a.gguf").metadata["one"] == ["a"]

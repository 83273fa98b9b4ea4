"""Whole models as GGUF files, read by the gguf package and by herd."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from herd.checkpoint.gguf_config import ROPE_TABLE
from herd.checkpoint.gguf_store import GGUFStore
from herd.checkpoint.hf import HFStore
from herd.checkpoint.store import GenerationDefaults, TensorStore
from herd.checkpoint.vocabulary import tokenizer_of
from herd.checkpoint.write.gguf_model import shard_names, write_gguf
from herd.checkpoint.write.source import Source
from herd.errors import CheckpointError, ConfigError
from herd.quant.encode import encode
from herd.quant.mix import mix
from herd.quant.scheme import QuantTensor
from herd.tokenizer.special import SpecialTokens
from herd.tokenizer.tiktoken import TiktokenTokenizer
from herd.tokenizer.tokenizer import Tokenizer
from tests.build import DENSE, build
from tests.checkpoint import gguf_files
from tests.checkpoint.folders import write_hf
from tests.checkpoint.gguf_files import EXPERTS, GGML, LLAMA_CPP, MODELS, WIDE, oracle, transformers_model
from tests.vocabularies import pieces_of, trained_pieces

GENERATION = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=50, min_p=0.05, repetition_penalty=1.1)
QUANTS = ("q8_0", "q4_0", "q4_k_m", "Q6_K")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"

_SCOUT = LLAMA_CPP["llama-4-scout as llama.cpp has it"]
WIDE_SCOUT = replace(EXPERTS, layers=_SCOUT.layers, temper=_SCOUT.temper)


def source(store: TensorStore, tokenizer: Tokenizer | None = None) -> Source:
    return Source(store, tokenizer, GENERATION, TEMPLATE if tokenizer is not None else None)


def hf_source(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Source:
    write_hf(folder, build(config).to(dtype))
    return source(HFStore(folder))


def quiet(given: Source, file: Path, **more: Any) -> list[Path]:
    """The warnings about a file without a tokenizer are tested once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(no tokenizer|only herd reads|without experts)")
        return write_gguf(given, file, **more)


HALVED = ("llama-2", "llama-3.2", "llama-4-scout", "llama-4-maverick as llama.cpp has it")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in MODELS),
        *(pytest.param(name, torch.bfloat16, marks=[] if name in HALVED else pytest.mark.slow) for name in MODELS),
    ],
)
def test_every_generation_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    given = hf_source(tmp_path / "hf", MODELS[name], dtype)
    file = tmp_path / "tiny.gguf"
    quiet(given, file, herd_only=name not in LLAMA_CPP)
    store, theirs = GGUFStore(file), oracle(file)
    assert store.config == given.store.config
    assert list(store.names()) == list(given.store.names())
    small = {"norm", "router"}
    for parameter in store.names():
        values = given.store.read(parameter)
        assert torch.equal(store.read(parameter).float(), values.float()), parameter
        assert torch.equal(theirs[store._homes[parameter]], values.float()), parameter
        wide = values.ndim == 1 or parameter.split(".")[-2] in small
        assert store.info(parameter).stored == ("F32" if wide or dtype == torch.float32 else "BF16"), parameter
    extra = {ROPE_TABLE} if given.store.config.rope_scaling is not None else set()
    assert set(theirs) == {store._homes[parameter] for parameter in store.names()} | extra


@pytest.mark.parametrize("name", [*DENSE, *LLAMA_CPP])
def test_the_same_numbers_and_tensors_as_an_independent_hand(name: str, tmp_path: Path) -> None:
    """tests/checkpoint/gguf_files.py follows llama.cpp's converter and goes through none of herd's tables."""
    config = MODELS[name]
    gguf_files.write_gguf(tmp_path / "theirs.gguf", transformers_model(config))
    quiet(hf_source(tmp_path / "hf", config), tmp_path / "ours.gguf")
    ours, theirs = gguf.GGUFReader(tmp_path / "ours.gguf"), gguf.GGUFReader(tmp_path / "theirs.gguf")
    for key, field in theirs.fields.items():
        if not key.startswith(("GGUF.", "general.name", "llama4.expert_used_count")):
            mine = ours.get_field(key)
            assert mine is not None, key
            assert (mine.types, mine.contents()) == (field.types, field.contents()), key
    mine = {t.name: t for t in ours.tensors}
    assert set(mine) == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        assert mine[tensor.name].tensor_type == tensor.tensor_type, tensor.name
        assert mine[tensor.name].shape.tolist() == tensor.shape.tolist(), tensor.name
        assert np.array_equal(mine[tensor.name].data, tensor.data), tensor.name


def test_dtypes_round_once(tmp_path: Path) -> None:
    given = hf_source(tmp_path / "hf", DENSE["llama-3"])
    for dtype, kind in ((torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")):
        quiet(given, tmp_path / f"{kind}.gguf", dtype=dtype)
        store = GGUFStore(tmp_path / f"{kind}.gguf")
        for name in store.names():
            values = given.store.read(name)
            assert torch.equal(store.read(name), values if values.ndim == 1 else values.to(dtype)), name
        assert (
            store.metadata()["general.file_type"]
            == gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"]
        )


def test_numbers_beyond_f16_are_refused(tmp_path: Path) -> None:
    model = build(DENSE["llama-3"]).to(torch.bfloat16)
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[3, 5] = 70_000.0
    write_hf(tmp_path / "hf", model)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight.*too large for float16"):
        quiet(source(HFStore(tmp_path / "hf")), tmp_path / "a.gguf", dtype=torch.float16)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        *((WIDE, kind) for kind in ("Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K")),
        *((WIDE_SCOUT, kind) for kind in ("Q8_0", "Q4_K")),
        *(pytest.param(WIDE_SCOUT, kind, marks=pytest.mark.slow) for kind in ("Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q6_K")),
    ],
)
def test_blocks_of_another_file_are_copied(kind: str, config: Any, tmp_path: Path) -> None:
    path = gguf_files.write_gguf(
        tmp_path / "theirs.gguf",
        transformers_model(config),
        GGML[kind],
        metadata={"general.file_type": 7, "general.url": "x"},
    )
    quiet(source(GGUFStore(path)), tmp_path / "ours.gguf")
    ours, theirs = gguf.GGUFReader(tmp_path / "ours.gguf"), gguf.GGUFReader(path)
    mine = {t.name: t for t in ours.tensors}
    for tensor in theirs.tensors:
        if "ffn_gate_inp" in tensor.name:
            assert mine[tensor.name].tensor_type == GGML.F32
            continue
        assert mine[tensor.name].tensor_type == tensor.tensor_type
        assert np.array_equal(mine[tensor.name].data, tensor.data), tensor.name
    for key in ("general.name", "general.url", "general.file_type"):
        assert ours.get_field(key).contents() == theirs.get_field(key).contents()  # pyright: ignore[reportOptionalMemberAccess]


TIED = replace(WIDE, tie_embeddings=True)


@pytest.mark.parametrize(
    ("config", "quant", "dtype"),
    [
        *((WIDE, quant, dtype) for quant in QUANTS for dtype in (torch.float32, torch.bfloat16)),
        *((TIED, quant, torch.float32) for quant in QUANTS),
        *(pytest.param(TIED, quant, torch.bfloat16, marks=pytest.mark.slow) for quant in QUANTS),
        (WIDE_SCOUT, "q8_0", torch.float32),
        (WIDE_SCOUT, "q4_k_m", torch.bfloat16),
        *(
            pytest.param(WIDE_SCOUT, quant, torch.bfloat16, marks=pytest.mark.slow)
            for quant in ("q8_0", "q4_0", "Q6_K")
        ),
        *(
            pytest.param(WIDE_SCOUT, quant, torch.float32, marks=pytest.mark.slow)
            for quant in ("q4_0", "q4_k_m", "Q6_K")
        ),
    ],
)
def test_quantized_matrices(quant: str, config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Types by the mix, blocks by the encoder, whatever dtype the source has; the gguf package decodes the same values."""
    given = hf_source(tmp_path / "hf", config, dtype)
    file = tmp_path / "a.gguf"
    quiet(given, file, quant=quant)
    store, theirs = GGUFStore(file), oracle(file)
    assert store.metadata()["general.file_type"] == mix(quant).file_type
    for name in store.names():
        values, kind = given.store.read(name), store.info(name).stored
        assert kind == mix(quant).kind(name, tuple(values.shape), config).kind, name
        raw = store.raw(name)
        if isinstance(raw, QuantTensor):
            made = encode(values.float(), kind)
            assert isinstance(made, QuantTensor)
            assert torch.equal(raw.blocks, made.blocks), name
        else:
            assert torch.equal(raw, values.float()), name
        assert torch.equal(store.read(name).float(), theirs[store._homes[name]]), name


def test_blocks_that_do_not_fit_and_second_rounding_are_said(tmp_path: Path) -> None:
    given = hf_source(tmp_path / "hf", DENSE["llama-3"])  # rows of 64 values
    assert "rows of 64 values are not whole Q4_K blocks of 256; stored as Q5_0" in said(given, tmp_path, "q4_k_m")
    assert "Q8_0 blocks are decoded and rounded again" in said(source(GGUFStore(q8(tmp_path))), tmp_path, "q4_0")
    assert not said(source(GGUFStore(q8(tmp_path))), tmp_path, "q8_0")  # the blocks as they are


def said(given: Source, folder: Path, quant: str) -> str:
    """What is warned of, the missing tokenizer apart."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        write_gguf(given, folder / "out.gguf", quant=quant)
    return "; ".join(text for w in seen if "tokenizer" not in (text := str(w.message)))


def q8(folder: Path) -> Path:
    return gguf_files.write_gguf(folder / "q8.gguf", transformers_model(WIDE), GGML.Q8_0)


def test_blocks_become_numbers_when_a_dtype_is_asked_for(tmp_path: Path) -> None:
    path = gguf_files.write_gguf(tmp_path / "theirs.gguf", transformers_model(WIDE), GGML.Q6_K)
    quiet(source(GGUFStore(path)), tmp_path / "ours.gguf", dtype=torch.float32)
    before, after = GGUFStore(path), GGUFStore(tmp_path / "ours.gguf")
    for name in before.names():
        assert torch.equal(after.read(name), before.read(name))
    assert after.metadata()["general.file_type"] == 0


def test_a_gguf_file_is_carried_over_byte_for_byte(tmp_path: Path) -> None:
    """Also the types of its values, unknown keys, and a tokenizer that herd would write otherwise."""
    more: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "general.author": "someone",
    }
    path = gguf_files.write_gguf(
        tmp_path / "a.gguf", transformers_model(DENSE["llama-2"]), metadata=more | odd_tokens(320)
    )
    quiet(source(GGUFStore(path)), tmp_path / "b.gguf")
    before, after = GGUFStore(path).metadata(), GGUFStore(tmp_path / "b.gguf").metadata()
    for key in before:
        assert after.encoded(key) == before.encoded(key), key  # pyright: ignore[reportAttributeAccessIssue]
    quiet(source(GGUFStore(tmp_path / "b.gguf")), tmp_path / "c.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def odd_tokens(size: int) -> dict[str, Any]:
    return {
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(size)],
        "tokenizer.ggml.scores": [-float(i) for i in range(size)],
        "tokenizer.ggml.token_type": [1] * size,
    }


@pytest.mark.parametrize("shards", [2, 5])
def test_parts_open_as_one(shards: int, tmp_path: Path) -> None:
    given = hf_source(tmp_path / "hf", DENSE["llama-3.1"])
    quiet(given, tmp_path / "whole.gguf")
    paths = quiet(given, tmp_path / "cut.gguf", shards=shards)
    assert paths == shard_names(tmp_path / "cut.gguf", shards)
    assert not (tmp_path / "cut.gguf").exists()
    whole = {t.name: t for t in gguf.GGUFReader(tmp_path / "whole.gguf").tensors}
    seen: list[str] = []
    for number, path in enumerate(paths):
        part = gguf.GGUFReader(path)
        keys = {key: part.get_field(f"split.{key}") for key in ("no", "count", "tensors.count")}
        assert [field.contents() for field in keys.values() if field] == [number, shards, len(whole)]
        assert [field.types[0].name for field in keys.values() if field] == ["UINT16", "UINT16", "INT32"]
        assert part.tensors
        for tensor in part.tensors:
            assert np.array_equal(tensor.data, whole[tensor.name].data)
            seen.append(tensor.name)
    assert seen == list(whole)
    for path in paths:
        store = GGUFStore(path)
        assert store.config == given.store.config
        assert torch.equal(store.read("norm.weight"), given.store.read("norm.weight"))


def test_missing_and_swapped_parts_are_named(tmp_path: Path) -> None:
    one, two, three = quiet(hf_source(tmp_path / "hf", DENSE["llama-3"]), tmp_path / "cut.gguf", shards=3)
    moved = two.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"cut-00002-of-00003\.gguf: is missing"):
        GGUFStore(one)
    three.rename(two)
    moved.rename(three)
    with pytest.raises(CheckpointError, match=r"cut-00002-of-00003\.gguf.*part 2 of 3: are parts swapped"):
        GGUFStore(one)


@pytest.mark.parametrize("shards", [0, -1, 10_000])
def test_impossible_parts_are_refused(shards: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="parts: this model can be cut"):
        quiet(hf_source(tmp_path / "hf", DENSE["llama-2"]), tmp_path / "cut.gguf", shards=shards)


def test_tokenizer_template_name_and_sampling(tmp_path: Path) -> None:
    tokenizer = pieces_of(trained_pieces()).tokenizer
    config = replace(DENSE["llama-2"], vocab_size=tokenizer.vocab_size + 4)
    write_hf(tmp_path / "Llama-7x-0.1M-Chat", build(config))
    given = source(HFStore(tmp_path / "Llama-7x-0.1M-Chat"), tokenizer)
    write_gguf(given, tmp_path / "a.gguf")
    store = GGUFStore(tmp_path / "a.gguf")
    said = store.metadata()
    assert said["tokenizer.chat_template"] == TEMPLATE
    assert len(said["tokenizer.ggml.tokens"]) == config.vocab_size
    assert said["tokenizer.ggml.tokens"][-1] == f"[PAD{config.vocab_size - 1}]"
    assert tokenizer_of(store).encode("Hello, wörld") == tokenizer.encode("Hello, wörld")
    assert store.generation == GENERATION
    names = {
        key.removeprefix("general."): said[key] for key in said if key.startswith("general.") and "sampling" not in key
    }
    assert names == {
        "architecture": "llama", "type": "model", "name": "Llama 7x 0.1M Chat", "finetune": "Chat", "basename": "Llama-7x",
        "size_label": "216K", "file_type": 0, "quantization_version": 2,
    }  # fmt: skip


def test_a_file_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    given = hf_source(tmp_path / "hf", DENSE["llama-2"])
    with pytest.warns(UserWarning, match=r"no tokenizer, and llama\.cpp opens no file without one"):
        write_gguf(given, tmp_path / "a.gguf")


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    given = hf_source(tmp_path / "hf", DENSE["llama-2"])
    with pytest.raises(ConfigError, match="either a dtype or a quantization"):
        quiet(given, tmp_path / "a.gguf", dtype=torch.float16, quant="q8_0")
    with pytest.raises(ConfigError, match="float64 is no GGUF type"):
        quiet(given, tmp_path / "a.gguf", dtype=torch.float64)
    assert not (tmp_path / "a.gguf").exists()


def test_memory_is_given_back_tensor_by_tensor(tmp_path: Path) -> None:
    given = hf_source(tmp_path / "hf", DENSE["llama-3"])
    ticks: list[int] = []
    quiet(given, tmp_path / "a.gguf", tick=ticks.append)
    assert len(ticks) == len(list(given.store.names()))
    raw = GGUFStore(tmp_path / "a.gguf").raw("norm.weight")
    assert not isinstance(raw, QuantTensor)


def test_a_vocabulary_without_merges(tmp_path: Path) -> None:
    """256 bytes and nothing else: GGUF wants the list all the same."""
    special = SpecialTokens(
        ids={"<|begin_of_text|>": 256, "<|end_of_text|>": 257}, bos=256, eos=257, stop=frozenset({257})
    )
    tokenizer = TiktokenTokenizer([bytes([i]) for i in range(256)], "llama3", special)
    given = replace(hf_source(tmp_path / "hf", DENSE["llama-3"]), tokenizer=tokenizer)
    quiet(given, tmp_path / "a.gguf")
    store = GGUFStore(tmp_path / "a.gguf")
    assert store.metadata()["tokenizer.ggml.merges"] == []
    assert tokenizer_of(store).encode("a b", bos=True) == [256, 97, 32, 98]

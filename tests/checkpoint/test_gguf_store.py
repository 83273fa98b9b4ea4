"""GGUF files written by the gguf package open to the same model: config, weights and logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from herd.checkpoint.gguf_store import GGUFStore
from herd.checkpoint.store import GenerationDefaults
from herd.errors import CheckpointError
from herd.model.config import ModelConfig, RopeScaling, plain
from herd.model.llama import Llama
from herd.quant.scheme import QuantTensor
from tests.build import DENSE, build, tokens
from tests.checkpoint.gguf_files import EXPERTS, GGML, MODELS, WIDE, loaded, oracle, transformers_model, write_gguf

KINDS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FEW = ("BF16", "Q8_0", "Q4_K")
"""Numbers, blocks of 32 and of 256: what matters where experts are stacked."""


def logits(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("name", MODELS)
def test_fp32_files_give_transformers_logits(
    name: str, tmp_path: Path, measured: Callable[[str, str, float], None]
) -> None:
    config = MODELS[name]
    hf = transformers_model(config)
    store = GGUFStore(write_gguf(tmp_path / "tiny.gguf", hf))
    assert store.config == config
    original = build(config).state_dict()
    for parameter in store.names():
        assert torch.equal(store.read(parameter), original[parameter]), parameter
    ids = tokens(config, 40)
    with torch.no_grad():
        theirs = hf(ids, use_cache=False).logits
    difference = float((logits(loaded(store), ids) - theirs).abs().max())
    measured("GGUF F32 file against transformers, max abs logit difference", name, difference)
    assert difference <= 1e-5


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        *(pytest.param(WIDE, kind, id=f"{kind}-dense") for kind in KINDS),
        *(
            pytest.param(EXPERTS, kind, id=f"{kind}-experts", marks=[] if kind in FEW else pytest.mark.slow)
            for kind in KINDS
        ),
    ],
)
def test_other_types_equal_their_dequantized_twin(kind: str, config: ModelConfig, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", transformers_model(config), GGML[kind])
    store, theirs = GGUFStore(path), oracle(path)
    assert store.config == config
    twin = Llama(config).eval()
    state = {name: theirs[store._homes[name]] for name in store.names()}
    twin.load_state_dict(state)
    for name, values in state.items():
        info, read = store.info(name), store.read(name)
        assert torch.equal(read.float(), values), name
        assert (info.shape, info.dtype) == (tuple(read.shape), read.dtype)
        assert info.stored == ("F32" if read.ndim == 1 else kind)
    ids = tokens(config, 24)
    ours = logits(loaded(store), ids)
    assert torch.equal(ours, logits(twin, ids))
    assert ours.isfinite().all()


def test_quantized_weights_can_be_had_as_they_are(tmp_path: Path) -> None:
    store = GGUFStore(write_gguf(tmp_path / "tiny.gguf", transformers_model(EXPERTS), GGML.Q6_K))
    name = "layers.0.feed_forward.experts.w2"
    raw = store.raw(name)
    assert isinstance(raw, QuantTensor)
    assert raw.type.name == "Q6_K"
    assert raw.shape == store.info(name).shape == (4, 256, 256)
    assert raw.nbytes == store.info(name).nbytes
    assert torch.equal(raw.dequantize(), store.read(name))
    one = QuantTensor(raw.blocks[1], raw.type, raw.shape[1:])
    assert torch.equal(one.dequantize(), store.read(name)[1])
    norm = store.raw("norm.weight")
    assert isinstance(norm, torch.Tensor)
    store.release(name)
    assert torch.equal(raw.dequantize(), store.read(name))


def test_a_mix_of_types_in_one_file(tmp_path: Path) -> None:
    def mixed(name: str) -> GGML:
        return GGML.Q6_K if "attn_v" in name or name == "output.weight" else GGML.Q4_K

    path = write_gguf(tmp_path / "tiny.gguf", transformers_model(WIDE), mixed)
    store = GGUFStore(path)
    assert store.info("layers.1.attention.wv.weight").stored == "Q6_K"
    assert store.info("layers.1.attention.wq.weight").stored == "Q4_K"
    for name, values in oracle(path).items():
        ours = next(c for c, foreign in store._homes.items() if foreign == name)
        assert torch.equal(store.read(ours), values)


def test_plain_tensors_are_views_and_writing_to_them_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", transformers_model(DENSE["llama-2"]), GGML.BF16)
    before = path.read_bytes()
    store = GGUFStore(path)
    weight = store.read("layers.0.attention.wq.weight")
    assert weight.dtype == torch.bfloat16
    assert weight.data_ptr() == store.read("layers.0.attention.wq.weight").data_ptr()
    weight.zero_()
    assert path.read_bytes() == before


def test_metadata_reads_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    extra = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"▁t{i}" if i % 3 else "🦙" * (i % 5) for i in range(320)],
        "tokenizer.ggml.scores": [-float(i) / 7 for i in range(320)],
        "tokenizer.ggml.token_type": [1] * 320,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ 'é' }}\n",
    }
    path = write_gguf(tmp_path / "tiny.gguf", transformers_model(DENSE["llama-2"]), metadata=extra)
    ours, reader = GGUFStore(path).metadata(), gguf.GGUFReader(path)
    keys = [k for k in reader.fields if not k.startswith("GGUF.")]
    assert list(ours) == keys
    assert len(ours) == len(keys)
    for key in keys:
        assert ours[key] == reader.fields[key].contents(), key
    assert ours["tokenizer.ggml.tokens"] == extra["tokenizer.ggml.tokens"]
    assert ours["tokenizer.ggml.add_bos_token"] is True
    assert "no.such.key" not in ours


def test_sampling_defaults_of_the_file(tmp_path: Path) -> None:
    keys = {"general.sampling.temp": 0.6, "general.sampling.top_p": 0.9, "general.sampling.top_k": 40}
    keys["general.sampling.min_p"] = 0.25
    hf = transformers_model(DENSE["llama-2"])
    found = GGUFStore(write_gguf(tmp_path / "with.gguf", hf, metadata=keys)).generation
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.6, 0.9, 40, 0.25)
    mirostat = write_gguf(tmp_path / "more.gguf", hf, metadata=keys | {"general.sampling.mirostat": 2})
    with pytest.warns(UserWarning, match=r"more\.gguf: not honoured: 'mirostat' of general\.sampling\.\*"):
        assert GGUFStore(mirostat).generation.extra == {"mirostat": 2}
    assert GGUFStore(write_gguf(tmp_path / "without.gguf", hf)).generation == GenerationDefaults()


def test_a_split_model_opens_from_any_part(tmp_path: Path) -> None:
    hf = transformers_model(DENSE["llama-3.1"])
    whole = GGUFStore(write_gguf(tmp_path / "whole.gguf", hf))
    write_gguf(tmp_path / "tiny.gguf", hf, parts=8)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) == 3
    for part in parts:
        store = GGUFStore(part)
        assert store.config == whole.config
        assert all(torch.equal(store.read(name), whole.read(name)) for name in whole.names())
    assert {store.file_of(name) for name in store.names()} == set(parts)


def test_a_split_model_with_a_missing_renamed_or_swapped_part(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", transformers_model(DENSE["llama-2"]), parts=8)
    first, second, third = sorted(tmp_path.glob("tiny-*.gguf"))
    renamed = tmp_path / "model.gguf"
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="one of 3 parts, so its name must end"):
        GGUFStore(renamed)
    kept = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf.*split.no.*part 2 of 3"):
        GGUFStore(first)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf: is missing: all 3 parts"):
        GGUFStore(first)
    second.write_bytes(kept)
    assert GGUFStore(third).config.n_layers == 2


def test_ollama_keys_of_llama_4(tmp_path: Path) -> None:
    config = MODELS["llama-4-maverick"]
    hf = transformers_model(config)
    keys = {
        "llama4.feed_forward_length": 96,
        "llama4.intermediate_size": config.hidden_dim,
        "llama4.intermediate_size_moe": 96,
        "llama4.use_qk_norm": False,
    }
    path = write_gguf(tmp_path / "tiny.gguf", hf, metadata=keys, without=["llama4.expert_feed_forward_length"])
    config = GGUFStore(path).config
    assert (config.hidden_dim, config.moe and config.moe.hidden_dim) == (192, 96)
    assert [spec.chunk for spec in config.layers] == [16, 16, 16, None]
    assert {spec.placement for spec in config.layers} == {"rope", "tempered"}


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    config = replace(DENSE["llama-1"], n_kv_heads=4)
    absent = ["attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size",
              "rope.dimension_count", "rope.freq_base"]  # fmt: skip
    hf = transformers_model(config)
    assert GGUFStore(write_gguf(tmp_path / "a.gguf", hf, without=[f"llama.{key}" for key in absent])).config == config


@pytest.mark.parametrize(
    ("scaling", "head_dim", "theta"),
    [
        (RopeScaling(factor=8.0), 128, 5e5),
        (RopeScaling(factor=32.0), 64, 5e5),
        (RopeScaling(factor=32.0), 128, 5e5),
        (RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0), 128, 5e5),
        (RopeScaling(factor=4.0, low_freq_factor=2.0, high_freq_factor=8.0), 128, 1e6),
        (RopeScaling(factor=8.0), 8, 1e4),  # the lowest frequency is only blended
    ],
)
def test_scaling_is_recovered_exactly(scaling: RopeScaling, head_dim: int, theta: float, tmp_path: Path) -> None:
    config = replace(
        DENSE["llama-3.1"],
        dim=2 * head_dim, n_heads=2, n_kv_heads=1, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling,
        layers=plain(1),
    )  # fmt: skip
    assert GGUFStore(write_gguf(tmp_path / "tiny.gguf", transformers_model(config))).config == config

"""Quantized checkpoints loaded without dequantizing, and checkpoints quantized while they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from herd.checkpoint.load import load_model
from herd.errors import ConfigError
from herd.kernels import native
from herd.model.llama import Llama
from herd.quant.apply import dequantize, kind_of, quantize
from herd.quant.linear import QuantEmbedding, QuantLinear
from tests.build import build, tokens
from tests.checkpoint.folders import write_hf
from tests.checkpoint.gguf_files import EXPERTS, GGML, WIDE, oracle, transformers_model, write_gguf
from tests.quant.wide import TIED

needs_native = pytest.mark.skipif(native.isa() is None, reason=f"no native kernels: {native.missing()}")

KINDS = (GGML.Q4_0, GGML.Q8_0, GGML.Q4_K, GGML.Q5_K, GGML.Q6_K)
CONFIGS = {"wide": WIDE, "tied": TIED, "experts": EXPERTS}
SCOUT_KEYS = {"llama4.use_qk_norm": True, "llama4.attention.temperature_length": 8, "llama4.attention.chunk_size": 16}


def gguf(folder: Path, name: str, kind: GGML) -> Path:
    keys = SCOUT_KEYS if name == "experts" else {}
    return write_gguf(folder / "model.gguf", transformers_model(CONFIGS[name]), kind, metadata=keys)


def same_values(model: Llama, plain: Llama) -> None:
    for (name, value), (_, expected) in zip(
        dequantize(model).state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert torch.equal(value, expected), name


@needs_native
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("wide", kind) for kind in KINDS),
        *((name, kind) for name in ("tied", "experts") for kind in (GGML.Q8_0, GGML.Q4_K)),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name in ("tied", "experts")
            for kind in (GGML.Q4_0, GGML.Q5_K, GGML.Q6_K)
        ),
    ],
)
def test_a_quantized_file_stays_quantized(name: str, kind: GGML, tmp_path: Path) -> None:
    path = gguf(tmp_path, name, kind)
    model = load_model(path)
    assert kind_of(model) == kind.name
    assert model.norm.weight.dtype == torch.float32
    same_values(model, load_model(path, dtype="float32"))


@pytest.mark.parametrize("kind", [GGML.Q4_K, GGML.Q5_0, GGML.Q3_K])
def test_stored_keeps_every_type(kind: GGML, tmp_path: Path) -> None:
    """Values against the gguf package's own arithmetic."""
    path = gguf(tmp_path, "wide", kind)
    model = load_model(path, weights="stored")
    assert kind_of(model) == kind.name
    expected = oracle(path)
    assert torch.equal(model.output.matrix.dequantize(), expected["output.weight"])
    ids = torch.tensor([[0, 5, 259]])
    assert torch.equal(model.embed(ids), expected["token_embd.weight"][ids])


@needs_native
def test_types_without_kernels_become_bfloat16(tmp_path: Path) -> None:
    path = gguf(tmp_path, "wide", GGML.Q5_0)
    model = load_model(path)
    assert model.output.matrix.type.name == "BF16"
    assert isinstance(model.tok_embeddings, QuantEmbedding)
    assert model.tok_embeddings.matrix.type.name == "Q5_0", "rows are looked up, not multiplied"
    values = load_model(path, weights="plain").output.weight
    assert torch.equal(model.output.matrix.dequantize(torch.bfloat16), values)


def test_plain_weights_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf(tmp_path, "wide", GGML.Q4_0)
    for options, dtype in (
        ({"weights": "plain"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"weights": "plain", "dtype": "float16"}, torch.float16),
    ):
        model = load_model(path, **options)
        assert kind_of(model) is None
        assert model.output.weight.dtype == dtype
    monkeypatch.setattr(native, "isa", lambda: None)
    assert kind_of(load_model(path)) is None, "torch alone multiplies bfloat16 faster than blocks"


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        *((WIDE, weights) for weights in ("int8", "int4", "q4_k_m", "w8a8", "fp8")),
        *((TIED, weights) for weights in ("int8", "q4_k_m", "fp8")),
        *(pytest.param(TIED, weights, marks=pytest.mark.slow) for weights in ("int4", "w8a8")),
    ],
)
def test_quantized_while_loading(config, weights: str, tmp_path: Path) -> None:
    built = build(config)
    write_hf(tmp_path, built)
    model = load_model(tmp_path, weights=weights)
    quantize(built, weights)
    for (name, value), (_, expected) in zip(
        dequantize(model).state_dict().items(), dequantize(built).state_dict().items(), strict=True
    ):
        assert torch.equal(value, expected), name


def test_blocks_that_fit_the_mix_are_kept(tmp_path: Path) -> None:
    path = gguf(tmp_path, "wide", GGML.Q4_0)
    model = load_model(path, weights="q4_0")
    stored = load_model(path, weights="stored")
    assert torch.equal(
        model.layers[0].attention.wq.matrix.dequantize(), stored.layers[0].attention.wq.matrix.dequantize()
    )
    assert model.output.matrix.type.name == "Q6_K"


def test_from_one_quantized_type_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the plain float32 model had been quantized, whatever the size of the pieces that are worked on."""
    path = gguf(tmp_path, "experts", GGML.Q8_0)
    monkeypatch.setattr(
        "herd.checkpoint.fill.slices", lambda tensor: (slice(i, i + 29) for i in range(0, len(tensor), 29))
    )
    model = load_model(path, weights="q4_k_m")
    expected = load_model(path, dtype="float32")
    assert quantize(expected, "q4_k_m") == []
    same_values(model, dequantize(expected))


def test_other_rows_are_said(tmp_path: Path) -> None:
    write_hf(tmp_path, build("llama-3"))
    with pytest.warns(UserWarning, match=r"not whole Q8_0 blocks.*and \d+ more"):
        model = load_model(tmp_path, weights="int8")
    assert isinstance(model.layers[0].attention.wq, QuantLinear)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    path = gguf(tmp_path, "wide", GGML.Q4_0)
    with pytest.raises(ConfigError, match="choose one of auto, plain, stored, int8"):
        load_model(path, weights="int3")
    with pytest.raises(ConfigError, match="float64"):
        load_model(path, dtype=torch.float64, weights="stored")


def test_progress_ends_at_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = gguf(tmp_path, "tied", GGML.Q8_0)
    seen: list[tuple[int, int]] = []
    load_model(path, tick=lambda done, total: seen.append((done, total)))
    done = [at for at, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {done[-1]}
    assert 0.9 * path.stat().st_size < done[-1] <= path.stat().st_size


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_do_not_depend_on_neighbours(name: str, tmp_path: Path) -> None:
    model = load_model(gguf(tmp_path, name, GGML.Q4_K))
    ids = tokens(model.config, 9, batch=3)
    with torch.no_grad():
        assert torch.equal(model.output(model.embed(ids))[1:2], model.output(model.embed(ids[1:2])))

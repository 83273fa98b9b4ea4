"""`load` on GGUF files with vocabularies: model, tokenizer and peak memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from herd.checkpoint.load import load, load_model
from herd.checkpoint.open import open_store
from herd.checkpoint.vocabulary import load_tokenizer
from herd.model.config import plain
from tests import vocabularies
from tests.build import DENSE, tokens
from tests.checkpoint.gguf_files import GGML, WIDE, transformers_model, write_gguf, write_noise
from tests.checkpoint.peaks import needs_peaks, run

TEXT = "The llamas' wool - 1234567 strands, naïve 漢字 🦙!\n\n\tdef f(x): return x"


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def llama3_vocabulary() -> dict[str, object]:
    """Llama 3's tokens as llama.cpp's converter writes them, from Meta's package."""
    meta = vocabularies.meta3()
    alphabet = byte_alphabet()
    ranks = meta.model._mergeable_ranks
    words = ["".join(alphabet[b] for b in word) for word, _ in sorted(ranks.items(), key=lambda item: item[1])]
    special = sorted(meta.special_tokens, key=meta.special_tokens.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": words + special,
        "tokenizer.ggml.token_type": [1] * len(words) + [3] * len(special),
        "tokenizer.ggml.merges": ["a b"],  # herd takes the order of the tokens, as tiktoken does
        "tokenizer.ggml.bos_token_id": 128000,
        "tokenizer.ggml.eos_token_id": 128009,
        "tokenizer.chat_template": "{{ bos_token }}",
    }


def test_a_file_with_llama_3s_vocabulary_loads_whole(tmp_path: Path) -> None:
    config = replace(
        DENSE["llama-3.2"], dim=32, n_heads=2, n_kv_heads=1, hidden_dim=64, vocab_size=128256, layers=plain(1)
    )
    hf = transformers_model(config)
    path = write_gguf(tmp_path / "tiny.gguf", hf, GGML.Q8_0, metadata=llama3_vocabulary())
    model, tokenizer = load(path)
    ids = tokenizer.encode(TEXT)
    assert ids == vocabularies.meta3().encode(TEXT, bos=False, eos=False)
    assert tokenizer.decode(ids) == TEXT
    assert load_tokenizer(path).encode(TEXT) == ids
    blob = path.rename(tmp_path / "sha256-0123")  # Ollama's files have no suffix
    assert load(blob)[1].encode(TEXT) == load_tokenizer(blob).encode(TEXT) == ids
    assert model.config == config
    with torch.no_grad():
        assert model(torch.tensor([ids])).isfinite().all()


def test_a_quantized_file_loads_in_any_dtype(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", transformers_model(WIDE), GGML.Q4_K)
    wide, narrow = load_model(path, torch.float32), load_model(path, weights="plain")
    for name, weight in wide.state_dict().items():
        assert weight.dtype == torch.float32
        # The default: float32 would be eight times the file.
        assert torch.equal(narrow.state_dict()[name], weight.bfloat16())
    ids = tokens(WIDE, 16)
    with torch.no_grad():
        assert (wide(ids) - narrow(ids).float()).abs().max() < 0.2 * wide(ids).abs().max()


MEASURE = """
import torch
from herd.checkpoint.open import open_store
from herd.checkpoint.load import load_model
load_model(sys.argv[1], torch.bfloat16)  # everything is imported
for path, dtype in zip(sys.argv[2::2], sys.argv[3::2]):
    before = restart()
    model = load_model(path, None if dtype == "None" else getattr(torch, dtype))
    print(peak() - before, sum(w.nbytes for w in model.parameters()))
    del model
"""


@needs_peaks
@pytest.mark.parametrize(
    "cases",
    [
        [("Q8_0", "bfloat16"), ("F16", "bfloat16")],
        pytest.param([("Q8_0", "float32"), ("Q4_0", "bfloat16"), ("BF16", "None")], marks=pytest.mark.slow),
    ],
)
def test_loading_takes_little_more_memory_than_the_model(cases: list[tuple[str, str]], tmp_path: Path) -> None:
    """A third of the numbers are the embedding's, as in the small Llama 3.2."""
    shape = {"dim": 1024, "n_heads": 16, "n_kv_heads": 4, "hidden_dim": 3072, "vocab_size": 32_000}
    config = replace(WIDE, **shape, layers=plain(5), tie_embeddings=True)
    asked: list[object] = [write_noise(tmp_path / "small.gguf", WIDE, GGML.Q8_0)]
    for kind, dtype in cases:
        asked += [write_noise(tmp_path / f"{kind}.gguf", config, GGML[kind]), dtype]
    lines = run(MEASURE, *asked)
    assert len(lines) == len(cases)
    for line in lines:
        grown, weights = map(int, line.split())
        assert weights > 100 << 20
        assert grown <= 1.2 * weights


def test_open_store_finds_the_file_in_a_folder(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", transformers_model(DENSE["llama-2"]))
    assert open_store(tmp_path).kind == open_store(tmp_path / "model.gguf").kind == "gguf"
    assert gguf.GGUFReader(tmp_path / "model.gguf").tensors

"""Names that are found in other tools' stores, in the documented order, and what is said when nothing is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from herd.checkpoint.load import load_model
from herd.checkpoint.resolve import resolve
from herd.errors import CheckpointError, UnknownModelError
from tests.build import tiny, tokens
from tests.checkpoint.gguf_files import transformers_model, write_gguf
from tests.checkpoint.test_resolve import cached, places
from tests.hub.stores import folder, ollama

__all__ = ["places"]

LIBRARY = "registry.ollama.ai/library"


def test_ollama_by_its_own_names(places: Path) -> None:
    store = places / "home/.ollama/models"
    blob = ollama(store, f"{LIBRARY}/llama3.2/1b")
    mine = ollama(store, f"{LIBRARY}/mine/latest", b"GGUF mine")
    quantized = ollama(store, f"{LIBRARY}/llama3.2/1b-instruct-q4_K_M", b"GGUF q4")
    assert resolve("llama3.2:1b") == resolve("llama-3.2-1b") == blob
    assert resolve("mine") == resolve("mine:latest") == mine
    assert resolve("llama3.2:1b-instruct-q4_K_M") == quantized
    with pytest.raises(CheckpointError, match=r"herd pull meta-llama/Llama-3\.2-1B"):
        resolve("meta-llama/Llama-3.2-1B")  # released files were asked for, and a quantized copy is something else
    with pytest.raises(CheckpointError, match="not on this machine"):
        resolve("llama3.2:1b-instruct-q8_0")


def test_the_order(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face cache, Meta's folder, Ollama, LM Studio."""
    name, home = "llama3.2:1b", places / "home"
    lm = folder(home / ".lmstudio/models/meta-llama/Llama-3.2-1B-Instruct", "model.safetensors")
    assert resolve(name) == lm
    blob = ollama(home / ".ollama/models", f"{LIBRARY}/llama3.2/1b")
    assert resolve(name) == blob
    meta = folder(home / ".llama/checkpoints/Llama3.2-1B-Instruct", "params.json")
    assert resolve(name) == meta
    hub = cached(home / ".cache/huggingface/hub", "meta-llama/Llama-3.2-1B-Instruct", {"aaa": True}, main="aaa")
    assert resolve(name) == hub / "aaa"
    here = folder(places / name, "config.json")
    assert resolve(name).absolute() == here


def test_revisions_and_quantizations(places: Path) -> None:
    root = places / "home/.cache/huggingface/hub"
    found = cached(root, "someone/Their-Llama", {"aaa": True, "bbb": True}, main="bbb")
    (found.parent / "refs/v1").write_text("aaa")
    assert resolve("someone/Their-Llama") == found / "bbb"
    assert resolve("someone/Their-Llama@v1") == resolve("someone/Their-Llama@aaa") == found / "aaa"
    long = cached(root, "someone/Other", {"0123456789abcdef": True})
    assert resolve("someone/Other@0123456789ab") == long / "0123456789abcdef"
    for wrong in ("v2", "../snapshots/aaa", ".."):
        with pytest.raises(UnknownModelError):
            resolve(f"someone/Their-Llama@{wrong}")
    folder(found / "bbb", "Their-Q4_K_M.gguf", "Their-Q8_0.gguf")
    assert resolve("someone/Their-Llama:Q8_0") == found / "bbb/Their-Q8_0.gguf"
    lm = folder(places / "home/.lmstudio/models/pub/One-GGUF", "One-Q4_K_M.gguf", "One-Q6_K.gguf")
    assert resolve("pub/One-GGUF:Q6_K") == lm / "One-Q6_K.gguf"


def test_nothing_is_found(places: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"Llama 3\.2 1B is not on this machine: download it with herd pull llama3\.2:1b\."
    ):
        resolve("llama3.2:1b")


def test_a_model_of_ollama_runs(places: Path) -> None:
    """The blob has no ending that says what it is: its content does."""
    config = tiny("llama-3.2")
    model = transformers_model(config)
    file = write_gguf(places / "tiny.gguf", model)
    blob = ollama(places / "home/.ollama/models", f"{LIBRARY}/llama3.2/1b", file.read_bytes())
    assert resolve("llama3.2:1b") == blob
    ours = load_model("llama3.2:1b", "float32")
    ids = tokens(config, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), load_model(file, "float32")(ids), rtol=0, atol=0)

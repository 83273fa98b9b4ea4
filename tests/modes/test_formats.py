"""A model read from any file format is the same model: the same weights bit for bit, the same logits in every mode.

Logits may differ in the last bits: expert matrices stay views of the file, and the matrix product adds a transposed matrix in
another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from herd.checkpoint.load import load_model
from herd.engine.cache import StaticCache
from tests.build import TINY, build, tiny, tokens
from tests.checkpoint.folders import oracle, write_hf, write_meta
from tests.checkpoint.gguf_files import write_gguf
from tests.modes.test_modes import MODES_BOUND


def as_hf(folder: Path, name: str) -> Path:
    write_hf(folder, build(name))
    return folder


def as_meta(folder: Path, name: str) -> Path:
    return write_meta(folder, build(name))


def as_gguf(folder: Path, name: str) -> Path:
    """llama.cpp takes some of Llama 4's numbers for granted; a tiny model has to say its own."""
    config = tiny(name)
    metadata: dict[str, Any] = {}
    if config.temper is not None:
        first = config.layers[0]
        metadata["llama4.use_qk_norm"] = first.placement == "rope_norm"
        metadata["llama4.attention.temperature_length"] = int(config.temper.floor_scale)
        if first.chunk is not None:
            metadata["llama4.attention.chunk_size"] = first.chunk
    return write_gguf(folder / "model.gguf", oracle(build(name)), metadata=metadata)


FORMATS = {"hugging-face": as_hf, "meta": as_meta, "gguf": as_gguf}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("format", FORMATS)
def test_loaded_equals_built(format: str, name: str, tmp_path: Path) -> None:
    built = build(name)
    loaded = load_model(FORMATS[format](tmp_path, name))
    ids = tokens(built.config, 40, batch=2)
    kv = StaticCache(loaded.config, batch=2, max_len=40)
    for (key, expected), (_, found) in zip(built.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(found, expected), key
    assert torch.equal(loaded.rope.inv_freq, built.rope.inv_freq)
    with torch.no_grad():
        logits = built(ids)
        assert (loaded(ids) - logits).abs().max() <= MODES_BOUND
        for pieces in (torch.arange(25), torch.arange(25, 40)):
            stepped = loaded(ids[:, pieces], pieces, kv.bind(pieces))
            assert (stepped - logits[:, pieces]).abs().max() <= MODES_BOUND

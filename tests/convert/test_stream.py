"""The streamed model is the model: layer by layer from a store it gives what the whole model gives."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from herd.chat.params import SamplingParams
from herd.checkpoint.open import open_store
from herd.convert import stream
from herd.convert.stream import Streamed, greedy, logits, of_store
from herd.engine.session import Session
from tests.build import TINY, build, tokens
from tests.modes.test_formats import FORMATS
from tests.modes.test_modes import MODES_BOUND


@pytest.mark.parametrize("name", TINY)
def test_streamed_logits_are_the_models_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = build(name)
    prompts = [tokens(model.config, length, seed=length)[0].tolist() for length in (1, 40)]
    store = open_store(FORMATS["hugging-face"](tmp_path, name))
    found = logits(of_store(store), prompts)
    with torch.no_grad():
        expected = [model(torch.tensor([prompt]))[0] for prompt in prompts]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= MODES_BOUND
        assert torch.equal(one.argmax(-1), other.argmax(-1))


@pytest.mark.parametrize("name", ["llama-3.2", "llama-4-scout", "llama-4-maverick"])
def test_streamed_greedy_tokens_are_the_sessions(name: str, tmp_path: Path) -> None:
    model = build(name)
    prompts = [tokens(model.config, length, seed=length)[0].tolist() for length in (3, 14)]
    store = open_store(FORMATS["meta"](tmp_path, name))
    found = greedy(of_store(store), prompts, 8)
    for prompt, ids in zip(prompts, found, strict=True):
        params = SamplingParams(temperature=0, max_tokens=8)
        assert ids == list(Session(model).generate(prompt, params))


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []
    most = 0
    plain = Streamed.block

    def watched(self: Streamed, layer: int) -> torch.nn.Module:
        nonlocal most
        block = plain(self, layer)
        alive.append(weakref.ref(block))
        most = max(most, sum(one() is not None for one in alive))
        return block

    monkeypatch.setattr(stream.Streamed, "block", watched)
    logits(of_store(open_store(FORMATS["hugging-face"](tmp_path, "llama-4-scout"))), [[1, 2, 3]])
    assert len(alive) == 4
    assert most == 1


def test_every_byte_read_is_told(tmp_path: Path) -> None:
    store = open_store(FORMATS["hugging-face"](tmp_path, "llama-3"))
    told: list[int] = []
    logits(of_store(store, tick=told.append), [[1, 2]])
    assert sum(told) == sum(store.info(name).nbytes for name in store.names())

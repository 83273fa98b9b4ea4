from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from herd.chat.params import SamplingParams
from herd.engine.blocks import BlockPool
from herd.engine.llm import LLM
from herd.engine.pack import pack
from herd.engine.paged import PagedCache
from herd.engine.prompt_cache import fingerprint, load_prompt, save_prompt
from herd.engine.request import Request
from herd.engine.runner import TorchRunner
from herd.engine.scheduler import Scheduler
from herd.errors import CheckpointError, ConfigError, HerdError
from herd.model.llama import Llama
from herd.quant.apply import quantize
from tests.build import build, tiny, tokens
from tests.modes.test_modes import MODES_BOUND

PROMPT = 45


class Run:
    """A scheduler, a cache and a model, and one request at a time."""

    def __init__(self, model: Llama, *, size: int = 8, blocks: int = 16, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.pool = BlockPool(blocks, size)
        self.scheduler = Scheduler(self.pool, max_seqs=2, max_tokens=64, max_len=blocks * size)
        self.cache = PagedCache(model.config, blocks=blocks, block_size=size, dtype=dtype)
        self.cached = 0

    def logits(self, prompt: list[int], salt: str = "") -> Tensor:
        """Of the last prompt token."""
        (sequence,) = self.scheduler.add(Request("a", tuple(prompt), SamplingParams(max_tokens=1), salt=salt))
        last = torch.empty(0)
        while not self.scheduler.idle:
            plan = self.scheduler.plan()
            last = TorchRunner(self.model).logits(pack(plan, self.pool.block_size), self.cache)
            self.scheduler.commit(plan, [[0] if chunk.sample else [] for chunk in plan.rows])
            self.scheduler.check()
        self.cached = sequence.cached_tokens or 0
        return last[-1]


def saved(path: Path, model: Llama, dtype: torch.dtype = torch.float32) -> list[int]:
    """A prompt and the file that keeps it."""
    prompt = tokens(model.config, PROMPT).tolist()[0]
    run = Run(model, dtype=dtype)
    run.logits(prompt)
    assert save_prompt(path, prompt, run.cache, run.pool, fingerprint(model)) == 40
    return prompt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [8, 3, 16])
@pytest.mark.parametrize("name", ["llama-3.2", "llama-4-scout"])
def test_a_prompt_from_disk(tmp_path: Path, name: str, size: int, dtype: torch.dtype) -> None:
    model = build(name)
    prompt = saved(tmp_path / "prompt.safetensors", model, dtype)
    fresh, run = Run(model, size=size, dtype=dtype), Run(model, size=size, dtype=dtype)
    there = load_prompt(tmp_path / "prompt.safetensors", run.cache, run.pool, fingerprint(model))
    assert there == prompt[: 40 // size * size]
    assert run.pool.counts["used"] == 0
    run.pool.check([])
    assert (run.logits(prompt) - fresh.logits(prompt)).abs().max() <= MODES_BOUND
    assert run.cached == len(there)
    assert load_prompt(tmp_path / "prompt.safetensors", run.cache, run.pool, fingerprint(model)) == there
    run.pool.check([])


def test_salts_stay_apart(tmp_path: Path) -> None:
    model, path = build("llama-3"), tmp_path / "p"
    prompt = saved(path, model)
    run = Run(model)
    load_prompt(path, run.cache, run.pool, fingerprint(model), salt="tenant")
    run.logits(prompt)
    assert run.cached == 0
    run.logits(prompt, salt="tenant")
    assert run.cached == 40


def test_the_file_is_safetensors(tmp_path: Path) -> None:
    prompt = saved(tmp_path / "p", build("llama-3"))
    tensors = safetensors.torch.load_file(tmp_path / "p")
    assert tensors["tokens"].tolist() == prompt[:40]
    assert tensors["k.1"].shape == (40, 2, 16)
    assert len(tensors) == 5


def test_wrong_models_dtypes_and_files_are_refused(tmp_path: Path) -> None:
    model, path = build("llama-3"), tmp_path / "p"
    prompt = saved(path, model)
    mark = fingerprint(model)

    def load(file: Path = path, mark: str = mark, **how: object) -> None:
        run = Run(model, **how)  # type: ignore[arg-type]
        try:
            load_prompt(file, run.cache, run.pool, mark)
        finally:
            run.pool.check([])

    with pytest.raises(CheckpointError, match="another model or other weights"):
        load(mark=fingerprint(build("llama-3", seed=1)))
    with pytest.raises(CheckpointError, match="keeps keys and values as float32, and this cache as int8"):
        load(dtype=torch.int8)
    with pytest.raises(ConfigError, match="needs 5 more blocks of 8, and 4 are free"):
        load(blocks=4)
    tensors = safetensors.torch.load_file(path)
    meta = {"format": "herd prompt cache", "version": "1", "model": mark, "dtype": "float32"}
    bad_ids = tensors["tokens"].clone()
    bad_ids[3] = 400
    for change, says in (
        ({"tokens": None}, "tensor 'tokens': the tensor is missing"),
        ({"v.1": None}, "tensor 'v.1': the tensor is missing"),
        ({"v.1": tensors["v.1"][:39].clone()}, r"is F32 \[39, 2, 16\], expected F32 \[40, 2, 16\]"),
        ({"v.1": tensors["v.1"].half()}, "is F16"),
        ({"tokens": tensors["tokens"][None].clone()}, "tensor 'tokens': is I32"),
        ({"tokens": bad_ids}, "ids outside"),
        ({"v.2": tensors["v.1"].clone()}, "does not belong"),
    ):
        made = {name: t for name, t in (tensors | change).items() if t is not None}
        safetensors.torch.save_file(made, tmp_path / "bad", meta)
        with pytest.raises(CheckpointError, match=says):
            load(tmp_path / "bad")
    safetensors.torch.save_file(tensors, tmp_path / "bad", meta | {"version": "2"})
    with pytest.raises(CheckpointError, match="another version"):
        load(tmp_path / "bad")
    safetensors.torch.save_file(tensors, tmp_path / "bad")
    with pytest.raises(CheckpointError, match="not a prompt cache"):
        load(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load(tmp_path / "bad")
    with pytest.raises(CheckpointError, match="exists already"):
        saved(path, model)
    run = Run(model)
    with pytest.raises(ConfigError, match="nothing of this prompt of 45 tokens"):
        save_prompt(tmp_path / "new", prompt, run.cache, run.pool, mark)
    assert not (tmp_path / "new").exists()
    assert json.loads(path.read_bytes()[8:].split(b"}}")[0].decode() + "}}")["__metadata__"]["model"] == mark


def test_fingerprints() -> None:
    model = build("llama-4-scout")
    mark = fingerprint(model)
    assert fingerprint(build("llama-4-scout")) == mark
    assert fingerprint(build("llama-4-scout").to(torch.bfloat16)) != mark
    assert fingerprint(build(replace(tiny("llama-4-scout"), rope_theta=1e4))) != mark
    for name, weight in model.named_parameters():
        with torch.no_grad():
            kept = weight.clone()
            weight.mul_(1.001)
            assert fingerprint(model) != mark, name
            weight.copy_(kept)
    assert fingerprint(model) == mark


def test_fingerprint_of_quantized_weights() -> None:
    one, other = build("llama-2"), build("llama-2", seed=1)
    plain = fingerprint(one)
    for model in (one, other):
        quantize(model, "int8")
    assert len({plain, fingerprint(one), fingerprint(other)}) == 3
    again = build("llama-2")
    quantize(again, "int8")
    assert fingerprint(again) == fingerprint(one)


def test_through_the_library(tmp_path: Path) -> None:
    """A system prompt of one process in the next: the same reply, and its tokens are not computed."""
    path, params = tmp_path / "system", SamplingParams(temperature=0, max_tokens=12)
    text = "Once there was a dog. The dog was red and liked to run in the park with a ball and a small cat. "
    with LLM("nano", max_len=200, max_seqs=2) as llm:
        expected = llm.generate(text + "One day", params)[0]
    with LLM("nano", max_len=200, max_seqs=2) as llm:
        saved_tokens = llm.save_prompt(path, text)
        assert saved_tokens >= 16
        with pytest.raises(CheckpointError, match="exists already"):
            llm.save_prompt(path, text)
        assert llm.save_prompt(path, text, overwrite=True) == saved_tokens
        with pytest.raises(ConfigError, match="nothing of this prompt"):
            llm.save_prompt(tmp_path / "short", "Hi")
    with LLM("nano", max_len=200, max_seqs=2) as llm:
        assert llm.load_prompt(path) == saved_tokens
        again = llm.generate(text + "One day", params)[0]
        assert llm.stats().cached_tokens == saved_tokens
    assert again.text == expected.text
    with pytest.raises(HerdError, match="closed"):
        llm.load_prompt(path)

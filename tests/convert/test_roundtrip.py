"""Meta -> Hugging Face -> GGUF -> Hugging Face -> Meta: every tensor comes back with the same bytes.

Bytes are compared with torch.load and the safetensors package, on files that the tests wrote from the format's description.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import herd
from herd.checkpoint.mapped import same_bytes
from tests.build import TINY, build
from tests.checkpoint.folders import write_hf, write_meta

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
NO_PARAMETER = ("rope.freqs", "_extra_state", "running_gate_stats_3E")
BY_COLUMNS = ("llama-1", "llama-2", "code-llama")
"""Generations whose embedding Meta cuts in columns."""
MODELS = TINY | {"llama-4 of two heads": replace(TINY["llama-4-scout"], n_heads=4, n_kv_heads=2)}
"""And experts that can be cut for two ranks."""
SAMPLE = [("llama-1", "f32", 1), ("llama-3", "bf16", 2), ("llama-3.2", "f16", 1), ("llama-4 of two heads", "bf16", 2)]


def ranks_of(name: str) -> list[int]:
    """Model-parallel sizes that the tiny model can be cut for."""
    config = MODELS[name]
    return [n for n in (1, 2) if config.n_kv_heads % n == 0 and config.n_heads % n == 0]


EVERY = [(n, d, r) for n, d in product(MODELS, DTYPES) for r in ranks_of(n) if (n, d, r) not in SAMPLE]


def meta_bytes(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The parameters of each rank's file, as torch reads them."""
    ranks = [torch.load(file, weights_only=True) for file in sorted(folder.glob("consolidated.*.pth"))]
    return [{k: v for k, v in rank.items() if not k.endswith(NO_PARAMETER)} for rank in ranks]


def hf_bytes(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, shards joined."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def round_trip(folder: Path, name: str, dtype: str, ranks: int) -> None:
    """There and back through five conversions, each with its proof."""
    columns = ranks > 1 and name.startswith(BY_COLUMNS)
    start = write_meta(folder / "meta", build(MODELS[name]).to(DTYPES[dtype]), ranks, columns=columns)
    steps = {
        "hf": {"to": "hf", "shards": ranks},
        "model.gguf": {"to": "gguf", "herd_only": True},
        "hf-2": {"to": "hf", "shards": 3 - ranks, "bin": ranks == 2},
        "meta-2": {"to": "meta", "shards": ranks},
    }
    last = start
    for step, options in steps.items():
        report = herd.convert(last, folder / step, greedy=1, **options)
        assert report.passed, report.text()
        assert report.counts["exact"] == len(report.tensors)
        last = folder / step
    for first, back in zip(meta_bytes(start), meta_bytes(last), strict=True):
        assert first.keys() - {"output.weight"} == back.keys() - {"output.weight"}
        for key in first.keys() & back.keys():
            assert same_bytes(first[key], back[key]), key
    if ranks == 1:
        report = herd.convert(last, folder / "hf-3", to="hf", greedy=0)
        assert report.passed
        one, other = hf_bytes(folder / "hf"), hf_bytes(folder / "hf-3")
        assert one.keys() == other.keys()
        assert all(same_bytes(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("name", "dtype", "ranks"), SAMPLE)
def test_there_and_back(name: str, dtype: str, ranks: int, tmp_path: Path) -> None:
    round_trip(tmp_path, name, dtype, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "ranks"), EVERY)
def test_there_and_back_for_every_model(name: str, dtype: str, ranks: int, tmp_path: Path) -> None:
    round_trip(tmp_path, name, dtype, ranks)


@pytest.mark.parametrize("name", ["llama-3.2", "llama-4-scout"])
def test_transformers_own_file_comes_back_from_every_format(name: str, tmp_path: Path) -> None:
    """A start that herd did not write: transformers' safetensors, through Meta and GGUF."""
    write_hf(tmp_path / "hf", build(name))
    last = tmp_path / "hf"
    for step, options in (("m", {"to": "meta"}), ("g.gguf", {"to": "gguf", "herd_only": True}), ("back", {"to": "hf"})):
        assert herd.convert(last, tmp_path / step, greedy=0, **options).passed
        last = tmp_path / step
    theirs, ours = hf_bytes(tmp_path / "hf"), hf_bytes(last)
    assert theirs.keys() - {"lm_head.weight"} == ours.keys() - {"lm_head.weight"}
    assert all(same_bytes(theirs[key], ours[key]) for key in ours)
    index = json.loads((last / "herd-report.json").read_text())
    assert index["passed"]

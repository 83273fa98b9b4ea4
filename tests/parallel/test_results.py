"""Results of many ranks: to the byte what one process writes that holds the whole model, which is never in one place here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.checkpoint.names import shapes
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.vocabulary import load_tokenizer
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.parallel.checkpoint import Sharded
from herd.parallel.mesh import Mesh
from herd.train.export import export
from herd.train.overrides import load_config
from herd.train.run import payload_of
from herd.train.start import adapt, start
from herd.train.trainer import load_weights
from tests.build import build, tiny
from tests.parallel.crew import Crew, crew
from tests.parallel.test_recipes import AVERAGE, EXPERTS, SHAPE, described, on_ranks

MIB = 1 << 20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    """A model with routed experts to adapt, whose rows are whole blocks of NF4 for two ranks, too."""
    vocabulary = load_tokenizer("nano")
    sizes: dict[str, Any] = {"dim": 128, "n_heads": 8, "n_kv_heads": 4, "head_dim": 16, "hidden_dim": 256}
    for name, kind in (("base", "llama-3"), ("routed", "llama-4-maverick")):
        geometry = tiny(kind)
        model = build(replace(geometry, vocab_size=vocabulary.vocab_size, **({} if geometry.moe else sizes)))
        kept = GenerationDefaults(vocabulary.special.stop)
        write_hf(Source(ModelStore(model), vocabulary, kept, None), home / name)
    return home


def _gathered(config: Path, overrides: list[str], out: Path) -> Path:
    """The plain twin: the whole model in this process, filled from the run's last checkpoint, and exported. Its result."""
    run = load_config(config, overrides)
    begun = start(run, torch.device("cpu"))
    model = adapt(begun.model, run.method, run.model.seed)
    payload = payload_of(model.config, Mesh.single(torch.device("cpu")))
    load_weights(Path(run.out), model, payload, averaged=run.train.average is not None)
    return export(model, begun, replace(run, out=str(out))).path


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("spread", "more", "overrides"),
    [
        ({"dp_shard": 2}, {}, [AVERAGE]),
        ({"pp": 2}, {"model": {"shape": SHAPE, "tokenizer": "nano"}}, []),
        ({"tp": 2}, EXPERTS, []),
        ({"dp_shard": 2}, {"method": {"kind": "dora", "rank": 4}}, ["base"]),
        ({"dp_shard": 2}, {"method": {"kind": "lora", "rank": 4, "targets": ["experts", "wq"]}}, ["routed"]),
        pytest.param({"dp_replicate": 2}, EXPERTS, [], marks=pytest.mark.slow),
        pytest.param({"cp": 2}, {}, ["method.qat=Q8_0"], marks=pytest.mark.slow),
        pytest.param({"dp_shard": 2, "tp": 2}, {}, [AVERAGE], marks=pytest.mark.slow),
        pytest.param({"pp": 2, "tp": 2}, {}, [AVERAGE], marks=pytest.mark.slow),
        pytest.param({"pp": 2, "dp_shard": 2}, EXPERTS, [], marks=pytest.mark.slow),
        pytest.param({"tp": 2}, {"method": {"kind": "qlora", "rank": 4}}, ["base"], marks=pytest.mark.slow),
        pytest.param({"pp": 2}, {"method": {"kind": "lora", "rank": 4}}, ["base"], marks=pytest.mark.slow),
        pytest.param({"tp": 2}, {"method": {"kind": "prefix", "tokens": 4}}, ["base"], marks=pytest.mark.slow),
        pytest.param({"tp": 2}, {"method": {"kind": "prompt", "tokens": 4}}, ["base"], marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_to_the_byte_what_one_process_exports(
    ranks: Crew,
    home: Path,
    base: Path,
    spread: dict[str, int],
    more: dict[str, Any],
    overrides: list[str],
    request: Any,
) -> None:
    name = "-".join(
        [*(f"{key}{count}" for key, count in spread.items()), *(str(part) for part in more.values()), *overrides]
    )
    name = hashlib.sha256(name.encode()).hexdigest()[:12]
    if overrides in (["base"], ["routed"]):
        more, overrides = more | {"model": {"source": str(base / overrides[0])}}, []
    over = [*overrides, "train.budget.steps=2", "train.evaluate.prompts=[]"]
    config = described(home, name, **more)
    split = [f"parallel.{key}={value}" for key, value in spread.items()]
    split += ["data.rows=1"] if prod(v for k, v in spread.items() if k.startswith("dp")) > 1 else []
    on_ranks(ranks, prod(spread.values()), config, [*over, *split])
    result = home / name / ("adapter" if "method" in more else "model")
    wanted = _files(_gathered(config, [*over, *split], home / f"{name}-gathered"))
    found = _files(result)
    assert found.keys() == wanted.keys()
    for file, content in wanted.items():
        assert found[file] == content, file


def _large(home: Path, name: str) -> tuple[Path, list[int]]:
    """The configuration of a run of a model of many matrices, and the bytes of its tensors in float32."""
    shape = {"dim": 384, "n_layers": 4, "n_heads": 8, "n_kv_heads": 8, "hidden_dim": 1536, "tie_embeddings": False}
    config = described(home, name, model={"shape": shape, "tokenizer": "nano"})
    run = load_config(config)
    geometry = start(run, torch.device("cpu"), later=True).model.config
    return config, [4 * prod(size) for size in shapes(geometry).values()]


SMALL = 16 * MIB
"""The tokenizer (4 to 9), imported modules, pieces that are written or read, holes that small things leave. Measured: 9."""
TENSORS = 2
"""Of the largest tensor in float32: itself, and what it is read from or was read back. Measured with matrices of 34 MB: 2.1."""


@pytest.mark.parametrize(
    ("spread", "stored"),
    [
        ({"dp_shard": 2}, "bfloat16"),
        pytest.param({"pp": 2}, "float32", marks=pytest.mark.slow),
        pytest.param({"dp_shard": 4}, "float32", marks=pytest.mark.slow),
        pytest.param({"dp_shard": 2, "tp": 2}, "bfloat16", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_main_rank_takes_memory_for_a_few_tensors(tmp_path: Path, spread: dict[str, int], stored: str) -> None:
    """On top of its share, which the run has held before."""
    config, sizes = _large(tmp_path, "run")
    over = [f"model.save_dtype={stored}", "train.budget.steps=1", "train.evaluate.prompts=[]"]
    over += ["data.rows=1", "data.length=16", "train.accumulate=2", *(f"parallel.{k}={v}" for k, v in spread.items())]
    world = prod(spread.values())
    with crew() as fresh:
        found = fresh.run("tests.parallel.results:peak", world, config, over)[0]
    assert found["share"] < sum(sizes) * 0.6
    assert found["most"] <= TENSORS * max(sizes) + SMALL < sum(sizes) * 0.6
    assert found["most"] > max(sizes) // 2, "the peak was not seen"


def test_a_full_disk_ends_all_and_the_same_command_makes_the_result(ranks: Crew, home: Path) -> None:
    config = described(home, "full")
    over = ["parallel.dp_shard=2", "data.rows=1", "train.budget.steps=2", "train.evaluate.prompts=[]"]
    said = ranks.run("tests.parallel.results:full_disk", 2, config, over)
    assert "the disk is full" in said[0]
    assert "nothing was left behind" in said[0]
    assert said[1] == "the main rank could not do what was left to do; what it printed says why"
    assert sorted(p.name for p in (home / "full").iterdir() if p.is_dir()) == ["checkpoints", "tensorboard"]
    on_ranks(ranks, 2, config, over)
    assert _files(home / "full/model") == _files(_gathered(config, over, home / "full-gathered"))
    steps = [json.loads(line) for line in (home / "full/log.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "step" for line in steps) == 2, "steps were done again"


def test_what_is_read_often_is_opened_once(ranks: Crew, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of contents of a large run takes minutes to read: once for a result, not once for a tensor."""
    config = described(home, "table")
    over = ["parallel.tp=2", "train.budget.steps=1", "train.evaluate.prompts=[]"]
    on_ranks(ranks, 2, config, over)
    place = home / "table/checkpoints/step-00000001"
    read = Sharded(tied=True).opened(place)
    (place / ".metadata").rename(place / "hidden")
    store = open_store(home / "table/model")
    for name in list(store.names())[:3]:
        found = torch.empty(store.info(name).shape)
        read({f"model.{name}": found})
        assert torch.equal(found, store.read(name).float())

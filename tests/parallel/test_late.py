"""Every rank makes what it holds: the numbers of one process, whatever is cut, and hardly more memory than they take."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.checkpoint.names import shapes
from herd.checkpoint.open import open_store
from herd.checkpoint.portion import copy_portion
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.gguf_model import write_gguf
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.meta import write_meta
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.model.config import ModelConfig, MoEConfig, irope, plain
from herd.model.init import drawn, init_weights
from herd.model.llama import Llama
from herd.parallel.config import ParallelPart
from herd.parallel.settle import settle
from herd.train.config import MethodPart
from herd.train.start import adapt
from tests.parallel import cases, late
from tests.parallel.crew import Crew, crew
from tests.parallel.late import Base

LORA: dict[str, Any] = {"rank": 4, "targets": ("wq", "wo", "w2", "tok_embeddings")}
METHODS = {
    "full": MethodPart(kind="full"),
    "lora": MethodPart(kind="lora", **LORA),
    "dora": MethodPart(kind="dora", **LORA),
    "qlora": MethodPart(kind="qlora", **LORA),
    "prefix": MethodPart(kind="prefix", tokens=4),
    "prompt": MethodPart(kind="prompt", tokens=4),
    "experts": MethodPart(kind="lora", rank=4, targets=("experts", "wq")),
    "qexperts": MethodPart(kind="qlora", rank=4, targets=("experts",)),
}
MIB = 1 << 20


def _alone(base: Base, method: MethodPart) -> dict[str, torch.Tensor]:
    """The numbers of one process that reads or draws every tensor whole."""
    model = base.model(later=False)
    if base.path is None:
        settle(model)
    return late.numbers(adapt(model, method, late.SEED))


def _name(value: Any) -> str | None:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def _same(ranks: Crew, base: Base, spread: dict[str, Any], method: str) -> None:
    part, expected, seen = ParallelPart(**spread), _alone(base, METHODS[method]), set()
    for found in ranks.run("tests.parallel.late:held", part.world, base, part, METHODS[method]):
        for name, values in found.items():
            whole = torch.from_numpy(values)
            if (
                whole.shape != expected[name].shape
            ):  # a matrix that is cut without being a parameter: its rank alone knows where
                assert method in ("qlora", "dora")
                seen.add(name)
                continue
            assert torch.equal(whole, expected[name]), name
            seen.add(name)
    assert seen == set(expected)


@pytest.mark.parametrize(
    ("name", "spread", "method"),
    [
        ("tied", {"dp_shard": 2, "tp": 2}, "full"),
        ("llama4", {"dp_shard": 2, "tp": 2, "experts": "number"}, "full"),
        ("tied", {"pp": 2, "tp": 2}, "full"),
        ("llama3", {"dp_shard": 2}, "dora"),
        ("llama3", {"tp": 2}, "prefix"),
        ("llama4", {"dp_shard": 2}, "experts"),
        pytest.param("llama4", {"tp": 2}, "experts", marks=pytest.mark.slow),
        pytest.param("llama4", {"pp": 2, "tp": 2, "experts": "number"}, "experts", marks=pytest.mark.slow),
        pytest.param("few", {"pp": 2, "tp": 2}, "prefix", marks=pytest.mark.slow),
        pytest.param("llama3", {"pp": 2}, "prompt", marks=pytest.mark.slow),
        pytest.param("few", {"tp": 4}, "full", marks=pytest.mark.slow),
        pytest.param("llama4", {"cp": 2, "tp": 2}, "full", marks=pytest.mark.slow),
        pytest.param("llama3", {"dp_shard": 4}, "full", marks=pytest.mark.slow),
        pytest.param("few", {"tp": 4}, "lora", marks=pytest.mark.slow),
        pytest.param("llama3", {"dp_shard": 2, "tp": 2}, "lora", marks=pytest.mark.slow),
        pytest.param("llama3", {"pp": 2}, "lora", marks=pytest.mark.slow),
        pytest.param("llama3", {"dp_shard": 2}, "prompt", marks=pytest.mark.slow),
    ],
    ids=_name,
)
def test_random_weights_do_not_depend_on_the_spread(
    ranks: Crew, name: str, spread: dict[str, Any], method: str
) -> None:
    _same(ranks, Base(cases.CONFIGS[name]), spread, method)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every kind of file: heads paired in another order, two files joined, blocks of eight bits."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(3)
    geometry = replace(cases.CONFIGS["wide"], vocab_size=256, tie_embeddings=False)
    store = ModelStore(init_weights(Llama(geometry)))
    source = Source(store, None, GenerationDefaults(), None)
    write_hf(source, folder / "hf")
    write_meta(source, folder / "meta", shards=2)
    with pytest.warns(UserWarning, match="no tokenizer"):
        write_gguf(source, folder / "q8.gguf", quant="Q8_0")
    return {"hf": folder / "hf", "meta": folder / "meta", "gguf": folder / "q8.gguf"}


@pytest.mark.parametrize(
    ("kind", "spread", "method"),
    [
        ("hf", {"dp_shard": 2, "tp": 2}, "full"),
        ("gguf", {"dp_shard": 2, "tp": 2}, "full"),
        ("meta", {"dp_shard": 4}, "full"),
        ("hf", {"tp": 2}, "qlora"),
        pytest.param("gguf", {"pp": 2}, "qlora", marks=pytest.mark.slow),
        pytest.param("meta", {"pp": 2, "tp": 2}, "full", marks=pytest.mark.slow),
        pytest.param("hf", {"dp_shard": 2}, "prefix", marks=pytest.mark.slow),
    ],
    ids=_name,
)
def test_files_are_read_in_parts(
    ranks: Crew, files: dict[str, Path], kind: str, spread: dict[str, Any], method: str
) -> None:
    _same(ranks, Base(path=files[kind], weights="nf4" if method == "qlora" else "plain"), spread, method)


def experts_held(base: Base, part: ParallelPart) -> list[list[Any]]:
    """w1, w2, w3 of every expert of the second layer that this rank has, as numpy."""
    module: Any = late.spread_later(base, part, METHODS["qexperts"]).model.layers[1].feed_forward
    return [[m.dequantize().numpy() for m in getattr(module.experts.base, field)] for field in ("w1", "w2", "w3")]


def test_quantized_experts_are_made_in_parts(ranks: Crew, tmp_path: Path) -> None:
    """Units of each, and whole ones; the numbers of a block are those of the whole tensor."""
    torch.manual_seed(3)
    geometry = replace(cases.CONFIGS["wide4"], vocab_size=256)
    write_hf(Source(ModelStore(init_weights(Llama(geometry))), None, GenerationDefaults(), None), tmp_path / "hf")
    base = Base(path=tmp_path / "hf", weights="nf4")
    module: Any = base.model(later=False).layers[1].feed_forward
    whole = [[m.dequantize() for m in getattr(module.experts, field)] for field in ("w1", "w2", "w3")]
    for experts in ("width", "number"):
        part = ParallelPart(tp=2, experts=experts)  # type: ignore[arg-type]
        for rank, found in enumerate(ranks.run("tests.parallel.test_late:experts_held", 2, base, part)):
            for dim, every, own in zip((0, 1, 0), whole, found, strict=True):
                wanted = [m.chunk(2, dim)[rank] for m in every] if experts == "width" else every[2 * rank :][:2]
                assert len(own) == len(wanted)
                for one, other in zip(own, wanted, strict=True):
                    assert torch.equal(torch.from_numpy(one), other)


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf"])
def test_a_part_of_a_file_is_the_part_of_the_whole(files: dict[str, Path], kind: str) -> None:
    """Cuts through heads, through blocks, of both dimensions, and of nothing."""
    store, random = open_store(files[kind]), torch.Generator().manual_seed(0)
    for name, shape in shapes(store.config).items():
        whole = store.read(name)
        for _ in range(6):
            ends = [sorted(torch.randint(size + 1, (2,), generator=random).tolist()) for size in shape]
            index = tuple(slice(first, last) for first, last in ends)
            out = torch.empty([last - first for first, last in ends])
            copy_portion(store, name, index, out)
            assert torch.equal(out, whole[index].float()), (name, index)


def test_parts_of_drawn_matrices_are_parts_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.model.init.BLOCK", 1000)  # many blocks
    config, random = cases.CONFIGS["llama4"], torch.Generator().manual_seed(0)
    for name, shape in (("layers.0.attention.wo.weight", (300, 70)), ("layers.1.feed_forward.experts.w2", (4, 30, 50))):
        whole = drawn(3, name, shape, config)
        assert not torch.equal(whole, drawn(4, name, shape, config))
        for _ in range(50):
            ends = [sorted(torch.randint(size + 1, (2,), generator=random).tolist()) for size in shape]
            index = tuple(slice(first, last) for first, last in ends)
            assert torch.equal(drawn(3, name, shape, config, index), whole[index])


LARGE = ModelConfig(dim=512, n_heads=8, n_kv_heads=8, head_dim=64, hidden_dim=2048, vocab_size=8192, layers=plain(4))
SMALL_CHANGE = 12 * MIB
"""Blocks that are drawn or read (8 MiB at most), and holes of the heap."""
ENCODING = 4 * prod((LARGE.vocab_size, LARGE.dim))
"""What the encoder of Q8_0, in which QLoRA holds embedding and output, has beside a tensor that it encodes: as much again."""


ROUTED = ModelConfig(
    dim=512, n_heads=8, n_kv_heads=8, head_dim=64, hidden_dim=512, vocab_size=512,
    layers=irope(4, chunk=None, moe_layers=range(4), temper=False), moe=MoEConfig(n_experts=8, hidden_dim=512),
)  # fmt: skip


@pytest.mark.slow
def test_factors_of_experts_are_drawn_by_who_holds_them() -> None:
    """Of 8 experts a layer, 168 MB of factors: two experts' at a rank, beside a quarter of the base."""
    largest = 4 * 8 * 1024 * 500
    method = MethodPart(kind="lora", rank=500, targets=("experts",))
    with crew() as fresh:
        found = fresh.run("tests.parallel.late:peak", 4, Base(ROUTED), ParallelPart(dp_shard=4), method)
    for most, share in found:
        assert share // 2 < most <= share + largest + SMALL_CHANGE < 4 * share - largest


@pytest.mark.parametrize(
    ("spread", "method", "source"),
    [
        ({"dp_shard": 4}, "full", "random"),
        ({"dp_shard": 2, "tp": 2}, "full", "hf"),
        pytest.param({"pp": 4}, "full", "random", marks=pytest.mark.slow),
        pytest.param({"dp_shard": 4}, "lora", "hf", marks=pytest.mark.slow),
        pytest.param({"dp_shard": 4}, "dora", "random", marks=pytest.mark.slow),
        pytest.param({"pp": 2, "tp": 2}, "qlora", "hf", marks=pytest.mark.slow),
        pytest.param({"tp": 4}, "prefix", "random", marks=pytest.mark.slow),
    ],
    ids=_name,
)
def test_a_rank_takes_memory_for_its_share_and_one_tensor(
    tmp_path: Path, spread: dict[str, Any], method: str, source: str
) -> None:
    """Resident memory of four processes, each of which was to hold the whole model, 96 MiB, at a time."""
    sizes = [4 * prod(shape) for shape in shapes(LARGE).values()]
    base = Base(LARGE)
    if source == "hf":
        model = base.model()
        settle(model)
        write_hf(Source(ModelStore(model), None, GenerationDefaults(), None), tmp_path / "hf")
        del model
        base = Base(path=tmp_path / "hf", weights="nf4" if method == "qlora" else "plain")
    with crew() as fresh:  # the heap of earlier cases has room that would not be seen
        found = fresh.run("tests.parallel.late:peak", 4, base, ParallelPart(**spread), METHODS[method])
    for most, share in found:
        assert share < sum(sizes) // 2
        assert most <= share + max(sizes) + SMALL_CHANGE + (ENCODING if method == "qlora" else 0)
        assert most > share // 2, "the peak was not seen"

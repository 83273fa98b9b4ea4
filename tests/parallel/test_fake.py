"""405B on 512 and 16,384 ranks that do not exist: meshes, shapes, memory of a rank, exchanges of a step, as golden numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from herd.adapters.prefix import tune_prompt
from herd.errors import ConfigError
from herd.model.config import ModelConfig, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.model.shapes import LLAMA_31_8B, LLAMA_31_70B, LLAMA_31_405B, SCOUT
from herd.parallel.config import ParallelPart
from herd.parallel.fake import Trial, pretend, trial
from herd.parallel.mesh import Mesh
from herd.parallel.prepare import prepare

GIB = 2**30
TITAN = ParallelPart(dp_shard=8, tp=8, pp=8)  # torchtitan's 405B on 512
META = ParallelPart(dp_shard=128, tp=8, pp=16)  # Llama 3 405B on 16,384
LONG = ParallelPart(dp_shard=8, cp=16, tp=8, pp=16)  # the same for 131,072 tokens


def _exchanges(layers: int, tp: bool, first: bool, last: bool, cp: bool = False, kept: bool = True) -> dict[str, int]:
    """What a micro-batch exchanges, by counting on paper.

    A block under tp: gathered before attention and feed-forward, and in the backward pass of the two scatters after them; two
    norms whose gradients are summed. FSDP: a block is gathered once (again for backward when it was given back), its gradients
    are scattered once; so are the ends, and the root with the final norm.
    """
    units = layers + first + last + last  # blocks, embedding, output, and the root where it has the norm
    again = 0 if kept else layers + first + (first and last)  # blocks, embedding; a whole model's root is entered twice
    gathers = units + again
    scatters, sums = units, 0
    if tp:
        gathers += 4 * layers
        scatters += 4 * layers
        sums += 2 * layers
        if first:
            scatters, gathers = scatters + 1, gathers + 1  # the embedding's summands, and its backward
        if last:
            gathers, scatters, sums = (
                gathers + 1,
                scatters + 1,
                sums + 3,
            )  # final norm; its gradient; the loss: largest, sums
    if cp:
        gathers, scatters = gathers + layers, scatters + layers
    found = {"gather": gathers, "scatter": scatters}
    return found | ({"sum": sums} if sums else {})


@pytest.mark.parametrize(
    ("config", "part", "rank", "layers", "states", "kept"),
    [
        pytest.param(LLAMA_31_8B, ParallelPart(dp_shard=8), 3, range(32), 14.96, False, marks=pytest.mark.slow),
        pytest.param(
            LLAMA_31_70B, ParallelPart(dp_shard=32, tp=8), 100, range(80), 4.11, False, marks=pytest.mark.slow
        ),
        pytest.param(LLAMA_31_405B, TITAN, 200, range(47, 63), 11.88, False, marks=pytest.mark.slow),
        pytest.param(LLAMA_31_405B, TITAN, 0, range(15), 11.62, False, marks=pytest.mark.slow),
        pytest.param(LLAMA_31_405B, TITAN, 511, range(111, 126), 11.62, False, marks=pytest.mark.slow),
        (LLAMA_31_405B, META, 9000, range(63, 71), 0.37, False),
        pytest.param(LLAMA_31_405B, LONG, 9000, range(63, 71), 0.37, False, marks=pytest.mark.slow),
    ],
    ids=["8b on 8", "70b on 256", "405b on 512", "405b, first", "405b, last", "405b on 16384", "405b, 131072 tokens"],
)
def test_golden_numbers(
    config: ModelConfig, part: ParallelPart, rank: int, layers: range, states: float, kept: bool
) -> None:
    found = trial(config, part, rank, length=131_072 if part.cp > 1 else 8192)
    assert found.layers == layers
    assert found.states / GIB == pytest.approx(states, abs=0.01)
    first, last = layers.start == 0, layers.stop == config.n_layers
    assert found.exchanges == _exchanges(len(layers), part.tp > 1, first, last, part.cp > 1, kept)


@pytest.mark.slow
def test_exchanges_of_a_stage_on_512_ranks() -> None:
    """As torchtitan's interleaved run, with four stages a rank: what the first of them sends. Whole ranks are slow tests."""
    found = trial(LLAMA_31_405B, replace(TITAN, schedule="interleaved", stages=4), 200)
    assert found.exchanges == _exchanges(4, tp=True, first=False, last=False, kept=False)
    assert found.states / GIB == pytest.approx(11.88, abs=0.01)


SMALL = ModelConfig(dim=64, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=96, vocab_size=128, layers=plain(4))
KINDS = ("dp_replicate", "dp_shard", "tp", "cp", "pp")


def test_exchanges_of_the_first_of_two_stages_of_a_rank() -> None:
    found = trial(SMALL, ParallelPart(dp_shard=2, tp=2, pp=2, schedule="interleaved", stages=2), 0, length=64)
    assert found.exchanges == _exchanges(1, tp=True, first=True, last=False, kept=False)
    whole = SMALL.vocab_size * SMALL.dim // 4
    assert found.shapes["tok_embeddings.weight"] == (SMALL.vocab_size // 4, SMALL.dim)
    assert sum(math.prod(shape) for name, shape in found.shapes.items() if "layers" not in name) == whole
    assert {name.split(".")[1] for name in found.shapes if "layers" in name} == {"0", "2"}


def _marked(kinds: tuple[str, ...]) -> Any:
    """Those of four and five have each kind, and miss each one, too."""
    return pytest.param(kinds, marks=pytest.mark.slow) if len(kinds) == 3 else kinds


@pytest.mark.parametrize(
    "kinds", [_marked(kinds) for count in (3, 4, 5) for kinds in combinations(KINDS, count)], ids="-".join
)
def test_every_combination(kinds: tuple[str, ...]) -> None:
    """Three, four and five kinds at once: each number is held as often as it should be, and sent as counted on paper."""
    part = ParallelPart(**dict.fromkeys(kinds, 2))
    each, held = part.world // part.pp, 0
    names: set[str] = set()
    for stage in range(part.pp):
        found = trial(SMALL, part, (stage + 1) * each - 1, length=64)
        first, last = stage == 0, stage == part.pp - 1
        layers = len(found.layers)
        assert layers == 4 // part.pp
        expected = _exchanges(layers, part.tp > 1, first, last, part.cp > 1, kept=False)
        assert found.exchanges == _of_copies(expected, part, layers, first, last)
        assert not names & set(found.shapes)
        names |= set(found.shapes)
        for name, shape in found.shapes.items():
            count = math.prod(shape)
            ranks = part.dp_shard * part.cp * (1 if name.endswith("norm.weight") else part.tp)
            held += count * ranks
    assert held == sum(weight.numel() for weight in Llama(SMALL).parameters())


def _of_copies(expected: dict[str, int], part: ParallelPart, layers: int, first: bool, last: bool) -> dict[str, int]:
    """With copies (dp_replicate) the gradients of every unit are summed over them, too; without shards that is all."""
    if part.dp_replicate == 1:
        return expected
    units = layers + first + 2 * last
    found = expected | {"sum": expected.get("sum", 0) + units}
    if part.dp_shard * part.cp == 1:
        found["gather"] -= units + layers + first + (first and last)
        found["scatter"] -= units
    return {kind: count for kind, count in found.items() if count}


@pytest.mark.slow
def test_every_parameter_is_somewhere_once() -> None:
    """The stages of a pipeline, each rank's part times the ranks that share it: together the whole model, 405,853,388,800."""
    total = 0
    names: set[str] = set()
    for stage in range(8):
        found = trial(LLAMA_31_405B, TITAN, stage * 64, step=False)
        at_an_end = stage in (0, 7)  # 15 layers with the embedding or the output, otherwise 16
        assert found.states / GIB == pytest.approx(11.62 if at_an_end else 11.88, abs=0.01)
        assert not names & set(found.shapes)
        names |= set(found.shapes)
        for name, shape in found.shapes.items():
            whole = name.endswith("norm.weight")
            total += math.prod(shape) * 8 * (1 if whole else 8)
    assert total == 405_853_388_800


def test_shapes_of_a_rank() -> None:
    found = trial(replace(LLAMA_31_405B, layers=plain(16)), META, 0, step=False)
    shapes = {
        "tok_embeddings.weight": (126, 16384),
        "layers.0.attention.wq.weight": (16, 16384),
        "layers.0.attention.wk.weight": (1, 16384),
        "layers.0.attention.wo.weight": (128, 2048),
        "layers.0.feed_forward.w1.weight": (52, 16384),
        "layers.0.feed_forward.w2.weight": (128, 6656),
        "layers.0.attention_norm.weight": (128,),
    }
    assert {name: found.shapes[name] for name in shapes} == shapes
    assert "output.weight" not in found.shapes


def test_experts_are_dealt_out() -> None:
    few = replace(SCOUT, layers=SCOUT.layers[:4])
    found: Trial = trial(few, ParallelPart(dp_shard=4, tp=8, experts="number"), 9, step=False)
    assert found.shapes["layers.0.feed_forward.experts.w1"] == (1, 8192, 5120)  # 16 experts over 8 ranks, then over 4
    assert found.shapes["layers.0.feed_forward.router.weight"] == (4, 5120)


def test_ranks_of_the_largest_mesh() -> None:
    with pretend(16_384, 9000):
        mesh = Mesh.of(LONG)
        assert mesh.devices is not None
        assert tuple(mesh.devices.get_coordinate() or ()) == (8, 0, 101, 0)  # 9000 = 8 x 1024 + 101 x 8
        assert (mesh.dp_rank, mesh.dp_size) == (101 // 16, 8)
        assert mesh.sequences is not None
        assert mesh.sequences.rank() == 101 % 16
        assert not mesh.is_main


@pytest.mark.parametrize(
    ("config", "part", "match"),
    [
        (LLAMA_31_8B, ParallelPart(tp=3), "tp 3: must be a divisor of the 8 key/value heads"),
        (LLAMA_31_8B, ParallelPart(tp=12), "tp 12: must be a multiple of the 8"),
        (LLAMA_31_8B, ParallelPart(pp=33), "33 stages needs as many layers: there are 32"),
    ],
)
def test_what_cannot_be_shared(config: ModelConfig, part: ParallelPart, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        trial(config, part, 0, step=False)


def test_a_tied_matrix_is_held_once() -> None:
    tied = replace(LLAMA_31_8B, dim=64, hidden_dim=96, vocab_size=128, layers=plain(1), tie_embeddings=True)
    found = trial(tied, ParallelPart(dp_shard=2), 0)
    assert found.held == 2 * sum(weight.numel() for weight in Llama(tied).parameters())  # half of it, four bytes each
    assert found.shapes["tok_embeddings.weight"] == (64, 64)
    assert "output.weight" not in found.shapes


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"tp": 0}, "parallel.tp is 0: expected a whole number from 1"),
        ({"dp_shard": -2}, "parallel.dp_shard is -2"),
        ({"schedule": "zigzag"}, "choose gpipe, 1f1b, interleaved"),
        ({"stages": 2}, "only parallel.schedule=interleaved"),
        ({"schedule": "interleaved"}, "needs parallel.stages of 2 or more"),
        ({"experts": "half"}, "choose width, number"),
    ],
)
def test_configs_that_make_no_sense(wrong: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ParallelPart(**wrong)  # type: ignore[arg-type]


def test_virtual_tokens_are_shared_evenly() -> None:
    model = tune_prompt(init_weights(Llama(SMALL)), 5)
    with (
        pretend(2, 0),
        pytest.raises(ConfigError, match=r"5 virtual tokens cannot be shared by parallel\.tp=2: method\.tokens"),
    ):
        prepare(model, Mesh.of(ParallelPart(tp=2)))


def test_worlds_that_do_not_fit() -> None:
    assert ParallelPart(dp_shard=-1, tp=8).of_world(512).dp_shard == 64
    with pytest.raises(ConfigError, match="12 processes cannot be shared"):
        ParallelPart(dp_shard=-1, tp=8).of_world(12)
    with pytest.raises(ConfigError, match=r"asks for 16 processes .*but 8 run"):
        ParallelPart(dp_shard=2, tp=8).of_world(8)
    with pytest.raises(ConfigError, match=r"is for one process, but 2 run: set parallel\.dp_shard=-1 .*, or start one"):
        ParallelPart().of_world(2)
    with pytest.raises(ConfigError, match=r"asks for 2 processes \(tp 2\), but one runs: start 2$"):
        ParallelPart(tp=2).of_world(1)
    with pytest.raises(ConfigError, match=r"^one process cannot be shared by .*tp 2"):
        ParallelPart(dp_shard=-1, tp=2).of_world(1)

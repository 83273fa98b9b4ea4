"""`train.exact_accumulation` over ranks: how the rows of a step are cut does not show in a single bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from torch import Tensor

from herd.data.batch import Loader
from herd.parallel.checkpoint import Sharded
from herd.parallel.config import ParallelPart
from herd.parallel.mesh import Mesh
from herd.train.objective import NextToken
from tests.parallel.crew import Crew
from tests.train.loop import fingerprint, rows, trainer, weights
from tests.train.test_accumulation import CLIPPED, STEP, told


def spread_over(part: dict[str, Any], lora: bool) -> tuple[list[str], list[Any], dict[str, Tensor]]:
    """What each way to cut a step of six rows gives on these ranks: fingerprints, what was told, weights."""
    prints, heard, left = [], [], {}
    mesh = Mesh.of(ParallelPart(**part))
    mine = STEP // mesh.dp_size
    for size in (mine, 1):
        changes = {"optim": CLIPPED, "accumulate": mine // size, "exact_accumulation": True}
        run, seen = trainer(
            3,
            lora=lora,
            changes=changes,
            mesh=mesh,
            payload=Sharded(tied=True),
            objective=NextToken(attend=mesh.packed),
            loader=Loader(rows(), size, seed=1, rank=mesh.dp_rank, world=mesh.dp_size),
        )
        run.fit()
        run.spread.give_back()
        prints.append(fingerprint(run))
        heard.append(told(seen))
        left = weights(run)
    return prints, heard, {name: weight for name, weight in left.items() if type(weight) is Tensor}


@pytest.mark.parametrize(
    ("part", "lora"),
    [
        ({"dp_shard": 2}, False),
        pytest.param({"dp_replicate": 2}, True, marks=pytest.mark.slow),
        pytest.param({"cp": 2}, False, marks=pytest.mark.slow),
        pytest.param({"tp": 2}, False, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "schedule": "gpipe"}, False, marks=pytest.mark.slow),
    ],
    ids=["dp_shard", "dp_replicate", "cp", "tp", "pp"],
)
def test_two_ranks_have_the_same_bits_however_their_rows_are_cut(ranks: Crew, part: dict[str, Any], lora: bool) -> None:
    found = ranks.run("tests.parallel.test_accumulation:spread_over", 2, part, lora)
    for prints, heard, _ in found:
        assert all(a == b for a, b in pairwise(prints))
        assert all(a == b for a, b in pairwise(heard))

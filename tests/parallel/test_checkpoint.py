"""What many ranks wrote, any other number of ranks reads, to the bit; a table of contents that is more than one is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from herd.errors import CheckpointError
from herd.parallel.checkpoint import Sharded
from herd.parallel.config import ParallelPart
from herd.parallel.mesh import Mesh
from herd.parallel.prepare import prepare
from tests.parallel import cases
from tests.parallel.crew import Crew


def write(name: str, part: ParallelPart, folder: Path) -> None:
    spread = prepare(cases.fresh(name), Mesh.of(part))
    Sharded(tied=cases.CONFIGS[name].tie_embeddings).write(folder, dict(spread.model.named_parameters()))


def read(name: str, part: ParallelPart, folder: Path) -> dict[str, Any]:
    """This rank's parameters as they are after reading into zeros."""
    spread = prepare(cases.fresh(name), Mesh.of(part))
    targets = dict(spread.model.named_parameters())
    with torch.no_grad():
        for weight in targets.values():
            weight.zero_()
    Sharded(tied=cases.CONFIGS[name].tie_embeddings).read(folder, targets)
    return {name: (w.full_tensor() if isinstance(w, DTensor) else w).detach().numpy() for name, w in targets.items()}


@pytest.mark.parametrize(
    ("name", "wrote", "reads"),
    [
        ("llama3", {"dp_shard": 2, "tp": 2}, {"dp_shard": 2}),
        ("tied", {"pp": 2}, {"tp": 2}),
        ("tied", {"dp_shard": 2}, {"pp": 2}),
        ("llama4", {"tp": 2, "experts": "number"}, {}),
    ],
)
def test_reloads_on_another_world(
    ranks: Crew, tmp_path: Path, name: str, wrote: dict[str, Any], reads: dict[str, Any]
) -> None:
    first, second = ParallelPart(**wrote), ParallelPart(**reads)
    ranks.run("tests.parallel.test_checkpoint:write", first.world, name, first, tmp_path)
    expected = dict(cases.fresh(name).named_parameters())
    if second.world == 1:
        found = [read(name, second, tmp_path)]
    else:
        found = ranks.run("tests.parallel.test_checkpoint:read", second.world, name, second, tmp_path)
    seen = set()
    for weights in found:
        for key, weight in weights.items():
            wanted = expected["tok_embeddings.weight" if key == "output.weight" and key not in expected else key]
            assert torch.equal(torch.from_numpy(weight), wanted), key
            seen.add(key)
    assert seen >= set(expected)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


def test_a_table_of_contents_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    payload = Sharded()
    payload.write(tmp_path, {"a": torch.ones(3)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"speaks of builtins\.print"):
        payload.read(tmp_path, {"a": torch.zeros(3)})
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    payload = Sharded()
    payload.write(tmp_path, {"a": torch.ones(300)})
    target = torch.zeros(300)
    if damage == "missing":
        (tmp_path / "__0_0.distcp").unlink()
    elif damage == "cut":
        data = (tmp_path / "__0_0.distcp").read_bytes()
        (tmp_path / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        payload.read(tmp_path, {"b": target} if damage == "other" else {"a": target})

"""Which runner an engine gets, by where its model lies and what its configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from herd.engine.config import EngineConfig
from herd.engine.native import runner_for
from herd.engine.paged import PagedCache
from herd.engine.runner import Runner, TorchRunner
from herd.engine.tiles import TiledRunner
from herd.model.llama import Llama

if TYPE_CHECKING:
    from herd.engine.ahead import Ahead
    from herd.engine.cuda_runner import CudaRunner

__all__ = ["fastest_runner", "steps_ahead"]


def fastest_runner(model: Llama, config: EngineConfig) -> Runner:
    """The fastest runner that does what `config` asks for."""
    if model.norm.weight.is_cuda and not config.deterministic:
        from herd.engine.cuda_runner import CudaRunner  # a CPU pays for no GPU

        return CudaRunner(model, max_seqs=config.max_seqs, max_len=config.max_len, graphs=config.graphs)
    runner = runner_for(model, deterministic=config.deterministic)
    return TiledRunner(model) if config.deterministic and isinstance(runner, TorchRunner) else runner


def steps_ahead(runner: Runner, cache: PagedCache) -> Ahead | None:
    """Steps that the device does whole, where the runner records any."""
    if not getattr(runner, "records", False):
        return None
    from herd.engine.ahead import Ahead

    return Ahead(cast("CudaRunner", runner), cache)

"""Virtual tokens in the cache of an engine: put there when their adapter is loaded, taken back when it goes, made anew when the
model's weights change. Everything here happens between two steps.
"""

from __future__ import annotations

from herd.adapters.prefix import Prompt, Virtual
from herd.engine.adapters import AdapterSet, LoadedAdapter
from herd.engine.paged import PagedCache
from herd.engine.scheduler import Scheduler
from herd.engine.virtual import virtual_tokens

__all__ = ["Residents"]


class Residents:
    """The adapters of virtual tokens among `adapters`, whose keys and values lie in blocks of `scheduler` and `cache`."""

    def __init__(self, adapters: AdapterSet, scheduler: Scheduler, cache: PagedCache) -> None:
        self.adapters, self.scheduler, self.cache = adapters, scheduler, cache

    def load(self, name: str, adapter: Virtual) -> LoadedAdapter:
        """Make `adapter` available as `name`. Raises CheckpointError or ConfigError, and then nothing has changed."""
        self.adapters.free(name)
        tokens = virtual_tokens(self.adapters.base, adapter)
        self.scheduler.settle(self.cache.copy)  # a copy that is still due may go into a block that is free by now
        blocks = self.scheduler.pin(name, tokens.count)
        try:
            tokens.put(self.cache, blocks)
            return self.adapters.add(name, tokens)
        except BaseException:
            self.scheduler.unpin(name)
            raise

    def unload(self, name: str) -> None:
        """Give the blocks of an adapter back that `adapters` has forgotten. None of its requests may be unfinished."""
        self.scheduler.unpin(name)

    def renew(self) -> None:
        """The model's weights are other ones: what its layers make of prompts is, too."""
        for name, old in self.adapters.virtual.items():
            held = self.scheduler.pins.of(name)
            assert held is not None
            if isinstance(old.adapter, Prompt):
                self.adapters.virtual[name] = new = virtual_tokens(self.adapters.base, old.adapter)
                new.put(self.cache, held.blocks)

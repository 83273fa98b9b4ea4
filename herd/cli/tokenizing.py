"""The bars of a build of shards: one while files are read for their checksums, one while they are tokenized. No torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from herd.cli.progress import Tick, progress

if TYPE_CHECKING:
    from herd.data.build import Progress

__all__ = ["tokenizing"]


@contextlib.contextmanager
def tokenizing() -> Iterator[Callable[[Progress], None]]:
    """Gives what `Build` and `open_data` take as `tick`: bytes of the sources with rate and time left, documents and tokens."""
    with contextlib.ExitStack() as bars:
        drawn: dict[str, Tick] = {}
        begun: dict[str, float] = {}
        last: list[Progress] = []

        def beside() -> str:
            made = last[-1]
            gone = max(1e-9, time.monotonic() - begun[made.doing])
            return f"{made.documents:,} documents, {made.tokens:,} tokens, {made.tokens / gone:,.0f} tokens/s"

        def tick(made: Progress) -> None:
            last[:] = [made]
            if made.doing not in drawn:
                bars.close()
                begun[made.doing] = time.monotonic()
                say = beside if made.doing == "tokenizing" else None
                drawn[made.doing] = bars.enter_context(progress(made.doing, "bytes", say))
            drawn[made.doing](made.done, made.total)

        yield tick

"""Bars before a run or in a build of shards: a model is loaded, files are read for their checksums, and tokenized. No torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from herd.cli.progress import Tick, progress

if TYPE_CHECKING:
    from herd.data.build import Progress

__all__ = ["pace", "tokenizing"]


@contextlib.contextmanager
def tokenizing() -> Iterator[Callable[[Progress], None]]:
    """Gives what `Build` and `open_data` take as `tick`: bytes of the sources with rate and time left, and tokens a second."""
    with contextlib.ExitStack() as bars:
        drawn: dict[str, Tick] = {}
        begun: dict[str, float] = {}
        last: list[Progress] = []

        def beside() -> str:
            return pace(last[-1].tokens, time.monotonic() - begun[last[-1].doing])

        def tick(made: Progress) -> None:
            if not last or last[0].doing != made.doing:
                bars.close()
                begun[made.doing] = time.monotonic()
                say = beside if made.doing == "tokenizing" else None
                drawn[made.doing] = bars.enter_context(progress(made.doing, "bytes", say))
            last[:] = [made]
            drawn[made.doing](made.done, made.total)

        yield tick


def pace(tokens: int, seconds: float) -> str:
    """Tokens a second in few letters: with size, rate and time left they share a line of 80."""
    rate = tokens / max(1e-9, seconds)
    return f"{rate / 1e6:.1f}M tokens/s" if rate >= 1e6 else f"{rate / 1e3:.0f}K tokens/s"

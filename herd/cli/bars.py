"""One bar after another for work in several stages, each with its own name. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from herd.cli.progress import Tick, progress

__all__ = ["stages"]


@contextlib.contextmanager
def stages(unit: str = "bytes") -> Iterator[Callable[[str, int, int], None]]:
    """Gives watch(what, done, total): a new `what` ends the bar before and begins its own."""
    with contextlib.ExitStack() as stack:
        current: list[tuple[str, Tick]] = []

        def watch(what: str, done: int, total: int) -> None:
            if not current or current[0][0] != what:
                stack.close()
                current[:] = [(what, stack.enter_context(progress(what[:1].upper() + what[1:], unit)))]
            current[0][1](done, total)

        yield watch

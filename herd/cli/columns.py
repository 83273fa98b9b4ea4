"""Tables of plain text: aligned columns with a bold head, the last one as wide as it wants. Nothing heavy is imported."""

from __future__ import annotations

import sys
from collections.abc import Container, Sequence

from herd.cli.console import styled

__all__ = ["columns"]


def columns(rows: Sequence[Sequence[str]], right: Container[int] = (), gap: str = "  ") -> str:
    """`rows`, the first of which is the head; the columns `right` are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        gap.join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([styled(lines[0], "bold", sys.stdout), *lines[1:]])

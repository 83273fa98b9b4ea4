"""Which kind of rows a data file holds, told by their fields. No torch.

The kind is decided once for each file from its first rows, and said; a file whose first rows fit two kinds, or disagree, is
refused until the caller names one. A row of another kind further down is refused in the same way (`herd.data.adapt`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal, get_args

from herd.data.read import Row
from herd.errors import DataError

__all__ = ["KINDS", "Kind", "looks_like", "one_kind", "recognise"]

Kind = Literal["text", "messages", "sharegpt", "alpaca", "completion", "preference", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_LOOKS = "the row looks like "

_ONE_KIND = (
    "a file holds rows of one kind (--kind, or kind in the config, says which; rows of other kinds are then bad rows)"
)


def looks_like(fields: Mapping[str, Any], kind: Kind) -> str:
    """What to put before the reason why a row of `kind` is bad: that it fits another kind. Empty when it does not."""
    fitting = _fitting(fields)
    return "" if not fitting or kind in fitting else f"{_LOOKS}{' and '.join(fitting)}, not {kind}: "


def one_kind(reason: str) -> str | None:
    """What a file whose kind was recognised is refused with for a bad row of `reason`; None when the row is just bad.

    Leaving rows of another kind out, because the first ones were of this, would drop data that nothing is wrong with.
    """
    return f"{reason.partition(': ')[0]} as before: {_ONE_KIND}" if reason.startswith(_LOOKS) else None


def recognise(rows: Sequence[Row]) -> Kind:
    """The kind that the fields of `rows`, the first of a file, agree on; rows that fit none are passed over.

    Raises DataError when no row fits a kind, a row fits two, or two rows fit different ones.
    """
    found: dict[Kind, Row] = {}
    for row in rows:
        _refuse(row)
        fitting = _fitting(row.fields)
        if len(fitting) > 1:
            raise DataError(
                f"{row.where}: the fields {_named(row.fields)} fit {' and '.join(fitting)}: "
                "say which is meant (--kind, or kind in the config)"
            )
        for kind in fitting:
            found.setdefault(kind, row)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise DataError(f"{first.where} looks like {one} and {second.where} like {other}: {_ONE_KIND}")
    if not found:
        raise DataError(
            f"{rows[0].where}: the fields {_named(rows[0].fields)} are of no kind that is known: "
            "text, messages, conversations, instruction and output, prompt (and completion), chosen and rejected"
        )
    return next(iter(found))


def _there(fields: Mapping[str, Any], *names: str) -> bool:
    return all(fields.get(name) is not None for name in names)


def _fitting(fields: Mapping[str, Any]) -> list[Kind]:
    strong: list[Kind] = [kind for kind, names in _STRONG.items() if _there(fields, *names)]
    return strong or [kind for kind in _WEAK if _there(fields, kind)]


_STRONG: Mapping[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
}
_WEAK: tuple[Kind, ...] = ("text", "prompt")
"""Fields that rows of the other kinds often have, too."""


def _refuse(row: Row) -> None:
    """Raise DataError for rows that hold verdicts, or a reply of another name."""
    fields = row.fields
    if isinstance(fields.get("label"), bool) and (_there(fields, "messages") or _there(fields, "prompt", "completion")):
        raise DataError(
            f"{row.where}: a label of true and false says which replies are good (unpaired preferences): training on all "
            "of them would learn the bad ones; keep the good rows, without the label"
        )
    if _there(fields, "prompt", "completions"):
        raise DataError(
            f"{row.where}: a verdict on each step of a reply (completions and labels): nothing in herd trains on that; a whole "
            "reply is called completion"
        )
    if _fitting(fields) == ["prompt"] and (replies := [name for name in _REPLIES if _there(fields, name)]):
        raise DataError(
            f"{row.where}: the fields {_named(fields)} look like a prompt and its reply: rename {replies[0]!r} to completion "
            "(or say --kind prompt when only the prompt is meant)"
        )


_REPLIES = ("response", "output", "reply", "target", "completion_text")
"""What other data sets call a reply. A prompt alone teaches nothing, so leaving one of these out in silence is never meant."""


def _named(fields: Mapping[str, Any]) -> str:
    names = [repr(name[:40]) for name in islice(fields, 8)]
    return ", ".join(names) + (", ..." if len(fields) > 8 else "") if names else "(none)"

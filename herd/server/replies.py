"""Deltas of a reply as the pieces that are sent. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from herd.chat.format import Delta
from herd.server.protocol import Piece, TokenInfo, ToolPiece

__all__ = ["pieces_of"]


def pieces_of(
    call: str,
    index: int,
    deltas: Sequence[Delta],
    tokens: tuple[TokenInfo, ...],
    number: int,
    new_id: Callable[[], str],
) -> list[Piece]:
    """What a step of choice `index` says; `number` tool calls were there before. The first piece tells the tokens."""
    out: list[Piece] = []
    for delta in deltas:
        told, tokens = tokens, ()
        if delta.text:
            out.append(Piece(call, index, delta.text, None, told))
        elif delta.tool_call is not None:
            arguments = json.dumps(dict(delta.tool_call.arguments), ensure_ascii=False)
            out.append(Piece(call, index, "", ToolPiece(number, new_id(), delta.tool_call.name), told))
            out.append(Piece(call, index, "", ToolPiece(number, arguments=arguments)))
            number += 1
        else:
            tokens = told
    if tokens:
        out.append(Piece(call, index, tokens=tokens))
    return out

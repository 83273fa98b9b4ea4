"""Deltas of a choice as the pieces that are sent. No torch."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from herd.chat.format import Delta
from herd.server.protocol import Piece, TokenInfo, ToolPiece

__all__ = ["Teller"]


class Teller:
    """Makes pieces of the deltas of choice `index` of `call`. `calls` are its finished tool calls."""

    def __init__(self, call: str, index: int) -> None:
        self.calls = 0
        self._call, self._index = call, index
        self._told: dict[int, bool] = {}
        """Numbers of calls whose name was told -> whether their arguments were, too."""

    def pieces(self, deltas: Sequence[Delta], tokens: tuple[TokenInfo, ...]) -> list[Piece]:
        """What a step says. The first piece tells the tokens."""
        tools: list[tuple[str, ToolPiece | None]] = []
        for delta in deltas:
            if delta.text:
                tools.append((delta.text, None))
            elif delta.part is not None:
                tools += self._part(delta.part.number, delta.part.name, delta.part.arguments)
            elif delta.tool_call is not None:
                number, self.calls = self.calls, self.calls + 1
                if number not in self._told:
                    tools += self._part(number, delta.tool_call.name, "")
                if not self._told[number]:
                    arguments = json.dumps(dict(delta.tool_call.arguments), ensure_ascii=False)
                    tools += self._part(number, None, arguments)
        if not tools:
            return [Piece(self._call, self._index, tokens=tokens)] if tokens else []
        text, tool = tools[0]
        first = Piece(self._call, self._index, text, tool, tokens)
        return [first, *(Piece(self._call, self._index, text, tool) for text, tool in tools[1:])]

    def _part(self, number: int, name: str | None, arguments: str) -> list[tuple[str, ToolPiece | None]]:
        out: list[tuple[str, ToolPiece | None]] = []
        if name is not None:
            self._told[number] = False
            out.append(("", ToolPiece(number, f"call_{secrets.token_hex(12)}", name)))
        if arguments:
            self._told[number] = True
            out.append(("", ToolPiece(number, arguments=arguments)))
        return out

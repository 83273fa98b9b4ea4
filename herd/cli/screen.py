"""Text on the screen while it is being made: whole words, and a live status behind the cursor."""

from __future__ import annotations

import os
import shutil
from typing import TextIO

from herd.cli.console import coloured, is_terminal, safe, styled

__all__ = ["Screen"]

FENCE = "```"
"""Begins and ends code, whose lines are left to the terminal: a copied program must not have new line ends."""


class Screen:
    """Text on a stream. On a terminal with `live`, words that would be cut at the edge move to the next line, and a dim status
    stands behind the cursor until more text comes.

    The status is only drawn where the rest of the line holds it, so it never wraps and never covers text.
    """

    def __init__(self, stream: TextIO, *, live: bool) -> None:
        self.stream = stream
        self._terminal = is_terminal(stream)
        self._live = live and self._terminal and os.environ.get("TERM") != "dumb"
        self._status = False
        self._column = 0
        self._word = ""
        self._word_width = 0
        self._line = ""  # how the line begins, as far as it matters
        self._code = False

    def text(self, piece: str) -> None:
        """Write a piece of text."""
        piece = safe(piece) if self._terminal else piece
        if self._live:
            erase = "\x1b[K" if self._status else ""
            self.stream.write(erase + self._placed(piece))
            self._status = False
        else:
            self.stream.write(piece)
            self._column = 0 if piece.endswith("\n") else 1 if piece else self._column
        self.stream.flush()

    def status(self, text: str) -> None:
        """Show `text` behind the cursor, which stays where it is; nothing without colours, where it could pass for a word."""
        room = shutil.get_terminal_size().columns - self._column
        if not self._live or not coloured(self.stream) or room < len(text) + 4:
            return
        self.stream.write(f"\x1b7\x1b[K  {styled(text, 'dim', self.stream)}\x1b8")
        self.stream.flush()
        self._status = True

    def end(self) -> None:
        """Remove the status and begin a new line, unless the cursor is at the start of one."""
        if self._status or self._column:
            self.text("\n" if self._column else "")

    def _placed(self, piece: str) -> str:
        """`piece` with words moved to the next line where the line ends; keeps track of the cursor."""
        from rich.cells import get_character_cell_size

        width = shutil.get_terminal_size().columns
        out: list[str] = []
        for char in piece:
            if char == "\n":
                self._new_line(code=self._code)
                out.append(char)
                continue
            wide = 8 - self._column % 8 if char == "\t" else get_character_cell_size(char)
            # The last column stays free: a cursor there may not move back.
            if self._column + wide >= width and not self._code:
                if char == " ":
                    self._new_line(code=False)
                    out.append("\n")
                    continue
                if 0 < self._word_width < width // 2:
                    out.append(f"\x1b[{self._word_width}D\x1b[K\n{self._word}")
                    self._column = self._word_width
            self._column = self._column + wide if self._column + wide <= width else wide
            out.append(char)
            self._remember(char, wide)
        return "".join(out)

    def _new_line(self, *, code: bool) -> None:
        self._column, self._word, self._word_width, self._line, self._code = 0, "", 0, "", code

    def _remember(self, char: str, wide: int) -> None:
        if char.isspace():
            self._word, self._word_width = "", 0
        else:
            self._word += char
            self._word_width += wide
        if len(self._line) < len(FENCE):
            self._line += char
            if self._line == FENCE:
                self._code = not self._code

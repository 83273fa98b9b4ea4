"""A reply that a grammar holds to calls, read so that each call is told while it is written. No torch.

Under such a grammar (`herd.chat.callgrammar`) the beginning of a call can be nothing else, so its name is told at once, and in
JSON dialects its arguments as they come. Without that promise a call is told when it is complete: until then it may be text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from herd.chat.extent import Extent
from herd.chat.format import CallPart, Delta, StreamParser
from herd.chat.messages import Message
from herd.tokenizer.stream import Detokenizer
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["PromisedCalls"]

_JSON = re.compile(r'\}?[;\s]*\{(?:"type": "function", )?"name": "([^"\\]+)", "parameters": (?=\{)')
_TAG = re.compile(r"(?:</function>)?\s*<function=([^>]+)>(?=\{)")
_PYTHON = re.compile(r"\s*\[\s*([\w.-]+)\(")


class PromisedCalls:
    """A StreamParser around the format's own. `part` deltas come before the `tool_call` delta of the same call.

    `names` are the functions. A call that a limit cuts short has been told as far as it goes, and is not told as text again.
    """

    def __init__(self, parser: StreamParser, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        self._parser = parser
        self._detokenizer = Detokenizer(tokenizer)
        self._names = frozenset(names)
        self._text = ""
        """Since the last call, or the arguments of the one that is being told."""
        self._extent: Extent | None = None
        self._told = 0
        """Characters of its arguments."""
        self._number = 0
        self._begun = 0
        """Calls whose name was told."""
        self._watching = True

    def push(self, id: int) -> list[Delta]:
        """Take one generated id."""
        parts = self._parts(self._detokenizer.push(id)) if self._watching else []
        return parts + self._passed(self._parser.push(id))

    def close(self) -> list[Delta]:
        """No more ids."""
        return self._passed(self._parser.close())

    def message(self) -> Message:
        """The assistant message so far."""
        return self._parser.message()

    def _passed(self, deltas: list[Delta]) -> list[Delta]:
        """What the parser says, without the text of a call that was told already."""
        out = []
        for delta in deltas:
            if delta.tool_call is not None:
                self._number += 1
            elif delta.text is not None:
                if self._begun > self._number:
                    continue
                self._watching = False  # a reply that begins as text is text to its end
            out.append(delta)
        return out

    def _parts(self, text: str) -> list[Delta]:
        self._text += text
        out: list[Delta] = []
        while self._watching:
            if self._extent is None:
                found = _JSON.match(self._text) or _TAG.match(self._text)
                if found is None:
                    return out + self._python()
                if found[1] not in self._names:
                    self._watching = False
                    return out
                out.append(Delta(part=CallPart(self._begun, found[1])))
                self._begun += 1
                self._text, self._told = self._text[found.end() :], 0
                self._extent = Extent(0, python=False)
            end, _ = self._extent.run(self._text)
            upto = len(self._text) if end is None else end
            if upto > self._told:
                out.append(Delta(part=CallPart(self._begun - 1, None, self._text[self._told : upto])))
                self._told = upto
            if end is None:
                return out
            self._text = self._text[end:]
            self._extent = None
            if not self._text:
                return out
        return out

    def _python(self) -> list[Delta]:
        """The first call of a list: where the others begin is known when the list is complete."""
        found = _PYTHON.match(self._text) if self._begun == 0 else None
        if found is None or found[1] not in self._names:
            return []
        self._begun, self._watching = 1, False
        return [Delta(part=CallPart(0, found[1]))]

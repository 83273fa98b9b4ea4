"""Tool calls inside the text a model writes: finding them while the text arrives, in every Llama dialect. No torch.

    {"name": "f", "parameters": {...}}          JSON, also "arguments", {"type": "function", ...}, [ {...}, {...} ],
                                                several calls separated by ; , or white space
    <function=f>{...}</function>                function tags
    [f(a=1), g(b="x")]                          Python lists
    brave_search.call(query="...")              built-in tools

A call is looked for at the start of the reply, directly behind another call, and at the start of a line; a function tag
anywhere. It counts only when it is well formed and names a given tool: everything else, however much it looks like a call, is
text. Text is passed on as soon as it cannot be part of a call any more, and what is passed on depends on the text alone, never
on how it was cut into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal

from herd.chat.extent import Extent
from herd.chat.jsoncalls import CALL_KEYS, json_value, parse_json_calls
from herd.chat.messages import ToolCall
from herd.chat.pycalls import FUNCTION_NAME, parse_dotted_call, parse_python_calls

__all__ = ["CallScanner", "parse_calls"]

Head = Literal["no", "maybe", "json", "python", "tag", "dotted"]

TAG = "<function="
TAG_END = "</function>"
_SPACE = " \t\r\n"
_PIECE = 4096
_HEAD = 512  # a call says what it is within this many characters, so endless white space does not hold text back
_NAME = re.compile(r"\w[\w.-]*")


def parse_calls(text: str) -> list[ToolCall] | None:
    """The calls of a text that holds nothing else, in any dialect and with any tool names; None for any other text."""
    scanner = CallScanner(None)
    calls: list[ToolCall] = []
    for item in scanner.feed(text) + scanner.finish():
        if isinstance(item, str):
            return None
        calls.append(item)
    return calls or None


class CallScanner:
    """Text in, in any pieces; text and complete calls out, in order.

    `names` are the tools whose calls are looked for; None accepts any name, an empty collection finds nothing. With
    `leading_only`, a reply that begins as text is text to its end.
    """

    def __init__(self, names: Collection[str] | None, *, leading_only: bool = False) -> None:
        self._names = None if names is None else frozenset(names)
        self._leading_only = leading_only
        self._text = ""  # not passed on yet
        self._gap = ""  # ignorable text since the start or the last call: dropped before a call, else text
        self._leading = True  # at the start, or behind a call
        self._calls = 0
        self._tag_open = False  # the last call was a function tag whose end has not come
        self._eligible = True  # a call may start at the first character of _text
        self._kind: Head = "no"  # of the candidate at the start of _text, once known
        self._extent: Extent | None = None

    def feed(self, text: str) -> list[str | ToolCall]:
        """Take more text."""
        if self._names is not None and not self._names:
            return [text] if text else []
        out: list[str | ToolCall] = []
        # What is passed on is cut off the front of the text, which is cheap as long as the text is short.
        for i in range(0, len(text), _PIECE):
            self._text += text[i : i + _PIECE]
            out += self._advance(final=False)
        return _joined(out)

    def finish(self) -> list[str | ToolCall]:
        """No more text: what was held back. White space around calls is dropped."""
        out = self._advance(final=True)
        if not self._calls:
            out.append(self._gap)
        self._gap = ""
        return _joined(out)

    def _advance(self, final: bool) -> list[str | ToolCall]:
        out: list[str | ToolCall] = []
        while self._text:
            if self._extent is not None:
                if not self._close_candidate(out, final):
                    break
                continue
            if self._leading:
                self._skip_gap()
                if self._tag_open and self._text.startswith(TAG_END):
                    self._text, self._tag_open = self._text[len(TAG_END) :], False
                    continue
                if not self._text or (self._tag_open and not final and TAG_END.startswith(self._text)):
                    break
            elif not self._eligible:
                self._pass_text(out)
                continue
            head, offset = self._head()
            if head == "maybe" and not final and len(self._text) < _HEAD:
                break
            if head in ("no", "maybe"):
                self._leave_lead(out)
                out.append(self._text[0])
                self._eligible = self._text[0] == "\n"
                self._text = self._text[1:]
            else:
                self._kind, self._extent = head, Extent(offset, python=head in ("python", "dotted"))
        return _joined(out)

    def _skip_gap(self) -> None:
        """Move what may stand around calls into the gap."""
        rest = self._text.lstrip(_SPACE + (";," if self._calls else ""))
        self._gap += self._text[: len(self._text) - len(rest)]
        self._text = rest

    def _pass_text(self, out: list[str | ToolCall]) -> None:
        """Pass on text up to the next place where a call may start."""
        line = self._text.find("\n") + 1 or len(self._text) + 1
        tag = self._text.find("<")
        stop = min(line, tag if tag >= 0 else line, len(self._text))
        out.append(self._text[:stop])
        self._text = self._text[stop:]
        self._eligible = stop in (line, tag)

    def _leave_lead(self, out: list[str | ToolCall]) -> None:
        """The text at hand is no call: the gap was text too."""
        if self._leading:
            out.append(self._gap)
            self._gap, self._leading, self._tag_open = "", False, False
            if self._leading_only:
                self._names = frozenset()

    def _close_candidate(self, out: list[str | ToolCall], final: bool) -> bool:
        """Follow the candidate; True when it was decided (and taken out of the text), False when more text is needed."""
        assert self._extent is not None
        end, whole = self._extent.run(self._text)
        if end is None:
            if not final:
                return False
            end = len(self._text)
        region, kind = self._text[:end], self._kind
        self._text, self._extent, self._eligible = self._text[end:], None, False
        calls = self._read(kind, region) if whole else None
        if calls is None:
            self._leave_lead(out)
            out.append(region)
            self._eligible = region.endswith("\n")
            return True
        out.extend(calls)
        self._calls += len(calls)
        self._gap, self._leading, self._eligible, self._tag_open = "", True, True, kind == "tag"
        return True

    def _read(self, kind: Head, region: str) -> list[ToolCall] | None:
        """The calls of a candidate, or None when it is malformed or names a tool that was not given."""
        found: list[tuple[str, dict[str, Any]]] | None = None
        if kind == "json":
            found = parse_json_calls(region)
        elif kind == "python":
            found = parse_python_calls(region)
        elif kind == "dotted":
            call = parse_dotted_call(region)
            found = None if call is None else [call]
        elif kind == "tag":
            name, _, body = region.removeprefix(TAG).partition(">")
            arguments = json_value(body)
            found = [(name, arguments)] if isinstance(arguments, dict) else None
        if found is None or any(not self._known(name) for name, _ in found):
            return None
        return [ToolCall(name, arguments) for name, arguments in found]

    def _known(self, name: str) -> bool:
        return FUNCTION_NAME.fullmatch(name) is not None if self._names is None else name in self._names

    def _may_become(self, part: str, ending: str = "") -> bool:
        """Whether `part` is the beginning of a tool's name followed by `ending`."""
        if self._names is None:
            return not part or _NAME.fullmatch(part) is not None
        return any((name + ending).startswith(part) for name in self._names)

    def _head(self) -> tuple[Head, int]:
        """What may start here, and where its brackets begin. 'maybe': more text will tell."""
        text = self._text[:_HEAD]
        if text[0] == "{":
            return self._json_head(text, 1), 0
        if text[0] == "[":
            at = _skip(text, 1)
            if at == len(text):
                return "maybe", 0
            return (self._json_head(text, at + 1) if text[at] == "{" else self._list_head(text, at)), 0
        if text[0] == "<":
            return self._tag_head(text)
        head = self._dotted_head(text)
        return head, (text.index("(") if head == "dotted" else 0)

    def _tag_head(self, text: str) -> tuple[Head, int]:
        if not text.startswith(TAG):
            return ("maybe" if TAG.startswith(text) else "no"), 0
        end = text.find(">")
        if end < 0:
            return ("maybe" if self._may_become(text[len(TAG) :]) else "no"), 0
        at = _skip(text, end + 1)
        if not self._known(text[len(TAG) : end]):
            return "no", 0
        if at == len(text):
            return "maybe", 0
        return ("tag" if text[at] == "{" else "no"), at

    def _json_head(self, text: str, at: int) -> Head:
        """`at` is behind the brace: the first key must be one of a call, and a first key "name" must name a tool."""
        key, at = _string_at(text, at)
        if at < 0:
            return "maybe" if key is None or any(known.startswith(key) for known in CALL_KEYS) else "no"
        if key not in CALL_KEYS:
            return "no"
        if key != "name":
            return "json"
        at = _skip(text, at)
        if at == len(text):
            return "maybe"
        if text[at] != ":":
            return "no"
        name, at = _string_at(text, at + 1)
        if at < 0:
            return "maybe" if name is None or self._may_become(name) else "no"
        return "json" if name is not None and self._known(name) else "no"

    def _list_head(self, text: str, at: int) -> Head:
        """A tool's name and an opening parenthesis."""
        match = _NAME.match(text, at)
        if match is None:
            return "no"
        if match.end() == len(text):
            return "maybe" if self._may_become(match.group()) else "no"
        if not self._known(match.group()):
            return "no"
        at = _skip(text, match.end())
        if at == len(text):
            return "maybe"
        return "python" if text[at] == "(" else "no"

    def _dotted_head(self, text: str) -> Head:
        """A tool's name and `.call(`."""
        match = _NAME.match(text)
        if match is None:
            return "no"
        if match.end() == len(text):
            return "maybe" if self._may_become(match.group(), ".call") else "no"
        name = match.group()
        called = name.endswith(".call") and text[match.end()] == "("
        return "dotted" if called and self._known(name.removesuffix(".call")) else "no"


def _skip(text: str, at: int) -> int:
    """The next position from `at` on that is not white space."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _string_at(text: str, at: int) -> tuple[str | None, int]:
    """The string behind white space at `at` and the position behind it; position -1 when the text ends before its end,
    (None, position) when something else stands there. Escapes are not looked at: names and keys have none."""
    at = _skip(text, at)
    if at == len(text):
        return None, -1
    if text[at] != '"':
        return None, at
    end = text.find('"', at + 1)
    return (text[at + 1 :], -1) if end < 0 else (text[at + 1 : end], end + 1)


def _joined(items: list[str | ToolCall]) -> list[str | ToolCall]:
    """Adjacent texts as one."""
    out: list[str | ToolCall] = []
    for item in items:
        if isinstance(item, str) and out and isinstance(out[-1], str):
            out[-1] += item
        elif item:
            out.append(item)
    return out

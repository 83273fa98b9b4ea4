"""The log: one line for each event, as text or as JSON, with the request it belongs to. No torch.

Nothing in a line can begin another or colour a terminal: control characters are written as escapes, whoever they came from.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from herd.server.caller import CALLER

__all__ = ["JsonLines", "TextLines", "frames", "logged", "plain"]

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\\\\]")

NOISY = ("uvicorn", "asyncio", "httpx", "httpcore")
"""Loggers that tell warnings only."""


def frames(error: BaseException) -> list[str]:
    """Where an error happened, the innermost call first: files, lines and functions, and nothing of what it says."""
    found = reversed(traceback.extract_tb(error.__traceback__))
    return [f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in found]


def plain(text: str) -> str:
    """`text` in one line of printable characters; what is not is escaped as in Python."""
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape", "surrogatepass").decode(), text)


class _Lines(logging.Formatter):
    """Tracebacks without messages: those of errors that nobody foresaw can repeat what a request says."""

    def formatException(self, ei: Any) -> str:
        """The places and the kind; of the system's own errors the system's own words."""
        kind, error, places = ei
        words = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
        return "".join(traceback.format_tb(places)) + f"{getattr(kind, '__name__', kind)}{words}"


class TextLines(_Lines):
    """`2026-11-21 12:00:00,000 INFO herd.access [req-...]: ...`"""

    def format(self, record: logging.LogRecord) -> str:
        """As logging's."""
        caller = CALLER.get()
        who = f" [{caller.request}]" if caller is not None and caller.request else ""
        fields = getattr(record, "fields", None)
        more = "".join(f" {key}={value}" for key, value in (fields or {}).items() if value is not None)
        when = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))},{int(record.msecs):03d}"
        line = plain(f"{record.getMessage()}{more}")
        if record.exc_info:  # ours, several lines: text of a request is never in one but as repr
            line += "".join("\n    " + plain(part) for part in self.formatException(record.exc_info).splitlines())
        return f"{when} {record.levelname} {record.name}{who}: {line}"


class JsonLines(_Lines):
    """One JSON object a line: time (UTC), level, logger, message, request, and the fields of a request's record."""

    def format(self, record: logging.LogRecord) -> str:
        """As logging's."""
        caller = CALLER.get()
        when = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
        out = {"time": when, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if caller is not None and caller.request:
            out["request"] = caller.request
        out |= {key: value for key, value in (getattr(record, "fields", None) or {}).items() if value is not None}
        if record.exc_info:
            out["exception"] = self.formatException(record.exc_info)
        return json.dumps(out, ensure_ascii=True, default=str)


@contextmanager
def logged(level: str, form: str = "text", stream: TextIO | None = None) -> Iterator[None]:
    """Inside, herd's log goes to `stream` (stderr) from `level` on; `form` is "text" or "json". Afterwards all is as it was: a
    stream that somebody closes then gets no more lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root, noisy = logging.getLogger(), [logging.getLogger(name) for name in NOISY]
    handlers, levels = root.handlers[:], [(one, one.level) for one in (root, *noisy)]
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for one in noisy:
        one.setLevel(max(logging.WARNING, root.level))
    try:
        yield
    finally:
        root.handlers[:] = handlers
        for one, before in levels:
            one.setLevel(before)

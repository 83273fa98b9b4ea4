"""The console: results go to stdout, everything else to stderr, and colours only where somebody looks.

Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

__all__ = [
    "coloured",
    "is_interactive",
    "is_terminal",
    "note",
    "safe",
    "silent_keys",
    "styled",
]

CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    127: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""Control characters to their printable pictures: a model's text must not be able to steer the terminal."""


def is_terminal(stream: TextIO) -> bool:
    """Whether a person is at the other end of `stream` (closed and missing streams are not)."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def is_interactive() -> bool:
    """Whether a person can type here and see what comes back."""
    return is_terminal(sys.stdin) and is_terminal(sys.stdout) and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    """Whether to style what is written to `stream`: a terminal that is not dumb, and no NO_COLOR (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO) -> str:
    """`text` in one of the styles of CODES (`""`: none) where `stream` takes colours, else as it is."""
    return f"\x1b[{CODES[style]}m{text}\x1b[0m" if style and coloured(stream) else text


def note(text: str, style: str = "dim") -> None:
    """One line beside the results, on stderr."""
    print(styled(text, style, sys.stderr), file=sys.stderr, flush=True)


def safe(text: str) -> str:
    """`text` with control characters made visible, newline and tab excepted."""
    return text.translate(CONTROLS)


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Inside, the terminal does not echo keys into what is shown; what is typed waits for the next prompt."""
    try:
        import termios
    except ImportError:  # not a Unix
        yield
        return
    if not is_terminal(sys.stdin):
        yield
        return
    before = termios.tcgetattr(sys.stdin.fileno())
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)

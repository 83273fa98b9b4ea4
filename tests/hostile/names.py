"""Five hundred file names that come from outside and must not lead out of their folder."""

from __future__ import annotations

import random

__all__ = ["hostile_names"]

_UP = [
    "..",
    "../..",
    "..\\..",
    "%2e%2e",
    "..%2f",
    "%2e%2e%2f",
    "..%5c",
    "..%c0%af",
    "．．",
    "..;",
    ".. ",
    "..\0",
    "....//",
    "..\u2215",
]
_TARGETS = ["etc/passwd", "secret.safetensors", "secret/model.safetensors", "config.json", "windows/win.ini", ""]
_PLAIN = [
    "", ".", "..", "/", "//", "///etc/passwd", "\\", "~", "~/x.safetensors", "~root/x", "/etc/passwd",
    "/proc/self/environ", "/dev/zero",
    "/dev/stdin", "C:\\x", "C:/x", "c:x", "\\\\host\\share\\x", "//host/share/x", "\\\\?\\C:\\x",
    "file:///etc/passwd", "http://x/y",
    "a\0b", "a\nb", "a\rb", "a\x1bb", "a\x7fb", "\ud800", "a/./b", "a//b", "./a", "a/", "a/..", "a/../b", "a/../../b",
    "CON", "con",
    "NUL.safetensors", "aux.json", "COM1", "LPT9.bin", "prn/x", "x/CON", "x" * 256, "x" * 4096, "x/" * 300 + "y",
    "é" * 4096,
    "link.safetensors", "link/secret.safetensors", "loop", "loop/loop/x", "$HOME/x", "${HOME}", "`id`", "$(id)",
    "|id", ";id", "&id",
    "-rf", "--help", "*", "?", "[a-z]", "{a,b}", "\u202excod.safetensors", "\u2066x\u2069", "\ufeffx", "x\u200b",
    "model.safetensors ",
    "model.safetensors.", "model.safetensors:stream", "MODEL.SAFETENSORS", "<script>", "' OR 1=1", "\u0000",
    "\u2028x", "x\u0085",
]  # fmt: skip


def hostile_names(count: int = 500) -> list[str]:
    """The plain ones, every way up before every target, and mixtures of them from a seed."""
    names = [*_PLAIN, *(f"{up}/{target}" for up in _UP for target in _TARGETS)]
    names += [f"sub/{up}/{up}/{target}" for up in _UP for target in _TARGETS]
    rng = random.Random(5)
    pieces = [*_UP, "sub", "link", "loop", "secret.safetensors", "CON", "x", "~", "", "C:"]
    while len(names) < count:
        names.append(rng.choice(["/", "\\"]).join(rng.choices(pieces, k=rng.randrange(2, 7))))
    return names

"""An ear for what Python does: processes started, code run, modules imported, files opened. Only while asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["listening"]

_ACTS = {
    "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty", "os.putenv", "os.remove", "os.rename",
    "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.startfile", "subprocess.Popen", "pty.spawn",
    "socket.connect",
    "socket.bind", "socket.getaddrinfo", "exec", "compile", "import", "ctypes.dlopen", "shutil.rmtree", "shutil.copyfile",
    "webbrowser.open", "marshal.loads", "pickle.find_class", "urllib.Request", "code.__new__", "object.__setattr__",
}  # fmt: skip

_heard: list[tuple[str, str]] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _heard is not None and (event in _ACTS or event == "open"):
        first = arguments[0] if arguments else ""
        _heard.append(
            (event, os.fsdecode(first) if isinstance(first, bytes | str | os.PathLike) else repr(first)[:200])
        )


sys.addaudithook(_hook)  # cannot be taken off again


@contextmanager
def listening() -> Iterator[list[tuple[str, str]]]:
    """(event, first argument) of everything that happens inside the block."""
    global _heard
    _heard = []
    try:
        yield _heard
    finally:
        _heard = None

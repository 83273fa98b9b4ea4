"""What training asks of the C library: a process that never asked to keep memory has its settings as they were."""

from __future__ import annotations

import sys

import pytest

from herd.train import memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_only_what_was_kept_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    class Library:
        def mallopt(self, name: int, value: int) -> int:
            called.append("mallopt")
            return 1

        def malloc_trim(self, pad: int) -> int:
            called.append("trim")
            return 1

    monkeypatch.setattr(memory, "_kept", False)
    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    memory.return_freed_memory()
    assert called == ["trim"]
    assert memory.keep_freed_memory()
    called.clear()
    memory.return_freed_memory()
    memory.return_freed_memory()
    assert called == ["mallopt", "mallopt", "mallopt", "trim", "trim"]

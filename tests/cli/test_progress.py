"""Progress where stderr is no terminal: plain lines, seldom, and none for short work."""

from __future__ import annotations

import pytest

from herd.cli import progress as module
from herd.cli.bars import stages


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with stages() as watch:
        for second in range(25):
            now = 100.0 + second
            watch("writing", second * 10**6, 40 * 10**6)
        now += 30
        watch("writing", 40 * 10**6, 40 * 10**6)
        watch("comparing tensors", 1, 2)
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.splitlines() == [
        "Writing: 25%, 10 of 40 MB, 10 s, about 30 s left",
        "Writing: 50%, 20 of 40 MB, 20 s, about 20 s left",
    ]


def test_nothing_done_yet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN", -1.0)
    with module.progress("reading", "tokens") as tick:
        tick(0, 7)
        tick(0, 0)
        tick(7, 7)
    assert capsys.readouterr().err.startswith("reading: 0%, 0 of 7 tokens, 0 s")

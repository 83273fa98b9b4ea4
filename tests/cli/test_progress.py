"""Progress where stderr is no terminal: plain lines, seldom, and none for short work."""

from __future__ import annotations

import pytest
from rich.console import Console

from herd.cli import progress as module
from herd.cli.bars import stages
from herd.cli.tokenizing import pace


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with stages() as watch:
        for second in range(25):
            now = 100.0 + second
            watch("writing", second * 10**6, 40 * 10**6)
        now += 30
        watch("writing", 40 * 10**6, 40 * 10**6)
        watch("by GPT: Mixed.jsonl", 0, 2 * 10**6)
        now += 10
        watch("by GPT: Mixed.jsonl", 10**6, 2 * 10**6)
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.splitlines() == [
        "Writing: 25%, 10 of 40 MB, 10 s, about 30 s left",
        "Writing: 50%, 20 of 40 MB, 20 s, about 20 s left",
        "By GPT: Mixed.jsonl: 50%, 1.0 of 2.0 MB, 10 s, about 10 s left",
    ]


def test_nothing_done_yet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN", -1.0)
    with module.progress("reading", "tokens") as tick:
        tick(0, 7)
        tick(0, 0)
        tick(7, 7)
    assert capsys.readouterr().err.startswith("reading: 0%, 0 of 7 tokens, 0 s")


def test_a_bar_of_tokenizing_is_one_line_of_eighty() -> None:
    drawn = module._bar("tokenizing", "bytes", lambda: pace(8_765_432_100, 3600))
    drawn.update(drawn.task_ids[0], completed=523.4e6, total=925.4e6)
    lines = Console(width=80).render_lines(drawn.get_renderable(), pad=False)
    assert ["".join(part.text for part in line).rstrip() for line in lines if "2.4M tokens/s" in str(line)]
    assert len(lines) == 1
    assert pace(123_456, 1) == "123K tokens/s"

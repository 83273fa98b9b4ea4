"""`herd tokens` and what it shows."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from herd.checkpoint import vocabulary
from herd.cli.main import run
from herd.tokenizer.explain import explain
from tests.tokenizer.conftest import model_path, opened

LLAMA3 = str(model_path("llama3"))


@pytest.fixture(scope="module", autouse=True)
def _opened_once() -> Iterator[None]:
    """The command opens Llama 3's file in its own way, the first time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "tokenizer_at", cache(vocabulary.tokenizer_at))
        yield


def shown(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> str:
    """Standard output of `herd tokens ARGS`, or standard error when it is to fail."""
    assert run(["tokens", *args]) == status
    out, err = capsys.readouterr()
    return err if status else out


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.fixture
def conversation(tmp_path: Path) -> Path:
    path = tmp_path / "chat.json"
    turns = [{"role": "user", "content": "Hi <|eot_id|>"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps(turns), encoding="utf-8")
    return path


def test_explain_rows() -> None:
    tokenizer = opened("llama3")
    rows = explain(tokenizer, [128000, *tokenizer.encode("a 漢")], [False, True, True, False])
    assert [(row.id, row.piece, row.special, row.learn) for row in rows] == [
        (128000, "<|begin_of_text|>", True, False),
        (64, "a", False, True),
        (110385, " \\xe6\\xbc", False, True),
        (95, "\\xa2", False, False),
    ]
    assert b"".join(row.data for row in rows).decode() == "a 漢"


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, LLAMA3, "Hello world\n", "--bos")
    assert out.splitlines() == [
        "0  128000  <|begin_of_text|>",
        '1    9906  "Hello"',
        '2    1917  " world"',
        '3     198  "\\n"',
    ]


def test_text_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(shown(capsys, LLAMA3, "a<|eot_id|>", "--special", "--json"))
    assert answer["ids"] == [64, 128009]
    assert answer["tokens"][1] == {"id": 128009, "piece": "<|eot_id|>", "bytes": "", "special": True}
    assert (answer["family"], answer["vocab_size"]) == ("llama3", 128_256)
    assert "loss_mask" not in answer


def test_special_names_in_text_are_plain_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(capsys, LLAMA3, "<|eot_id|>", "--json"))["ids"] == [27, 91, 68, 354, 851, 91, 29]


@pytest.mark.parametrize("args", [["-"], []])
def test_piped_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    piped(monkeypatch, "é\r\n".encode())
    assert json.loads(shown(capsys, LLAMA3, *args, "--json"))["ids"] == opened("llama3").encode("é\r\n")


def test_conversation_with_loss_mask(capsys: pytest.CaptureFixture[str], conversation: Path) -> None:
    answer = json.loads(shown(capsys, LLAMA3, "--messages", str(conversation), "--format", "llama3", "--json"))
    learnt = [id for id, learn in zip(answer["ids"], answer["loss_mask"], strict=True) if learn]
    assert learnt == [9906, 128009]
    assert answer["ids"].count(128009) == 2  # the name in the user's text is only text
    assert answer["format"] == "llama3"
    out = shown(capsys, LLAMA3, "--messages", str(conversation), "--format", "llama3")
    assert [line.split()[1] for line in out.splitlines() if " * " in line] == ["9906", "128009"]


def test_a_reply_is_opened_after_a_user(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "open.json"
    path.write_text(json.dumps({"system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}]}))
    answer = json.loads(shown(capsys, LLAMA3, "--messages", str(path), "--format", "llama3", "--json"))
    pieces = [token["piece"] for token in answer["tokens"]]
    assert pieces[-3:] == ["assistant", "<|end_header_id|>", "\\n\\n"]
    assert "system" in pieces
    assert not any(answer["loss_mask"])


def test_colours_only_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in shown(capsys, LLAMA3, "Hello world", "--bos")
    monkeypatch.setattr("herd.cli.console.is_terminal", lambda stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = shown(capsys, LLAMA3, "Hello world\nx", "--bos")
    first, second = out.splitlines()[:2]
    assert first == "\x1b[33m<|begin_of_text|>\x1b[0m\x1b[32mHello\x1b[0m\x1b[36m world\x1b[0m\x1b[32m\\n\x1b[0m"
    assert second == "\x1b[36mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(capsys, LLAMA3, "Hello world")


@pytest.mark.parametrize(
    ("args", "content", "message"),
    [
        (["--messages", "FILE"], "{", "is not JSON text"),
        (["--messages", "FILE"], "[]", "holds no conversation"),
        (["--messages", "FILE"], '{"messages": 3}', "holds no conversation"),
        (["--messages", "FILE"], '[{"role": "king", "content": "x"}]', "king"),
        (["--messages", "FILE", "--format", "none"], '[{"role": "user", "content": "x"}]', "no prompt format"),
        (["--messages", "FILE"], '[{"role": "user", "content": "x"}]', "base model|--format"),
    ],
)
def test_conversations_that_cannot_be_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], content: str, message: str
) -> None:
    path = tmp_path / "chat.json"
    path.write_text(content)
    err = shown(capsys, LLAMA3, *(str(path) if arg == "FILE" else arg for arg in args), status=1)
    assert any(part in err for part in message.split("|"))
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "args", [["x", "--format", "llama3"], ["x", "--messages", "FILE"], ["--messages", "FILE", "--bos"]]
)
def test_impossible_flags(capsys: pytest.CaptureFixture[str], conversation: Path, args: list[str]) -> None:
    err = shown(capsys, LLAMA3, *(str(conversation) if arg == "FILE" else arg for arg in args), status=2)
    assert "herd tokens --help" in err


def test_bad_model_and_bad_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "tokenizer.model" in shown(capsys, str(tmp_path), "x", status=1)
    piped(monkeypatch, b"ab\xff")
    assert "not UTF-8: byte 2" in shown(capsys, LLAMA3, "-", status=1)


def test_no_torch_for_a_tokenizer_file() -> None:
    code = (
        "import sys; from herd.cli.main import run; "
        f"status = run(['tokens', {LLAMA3!r}, 'Hello']); "
        "sys.exit(status or [m for m in ('torch', 'transformers', 'llama_models') if m in sys.modules] or 0)"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, '0  9906  "Hello"\n'), done.stderr

"""`herd generate`: every row is answered or says why not, and a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from herd.checkpoint.load import load_model
from herd.checkpoint.peft import write_peft
from herd.cli.batch import answered, read_rows
from herd.cli.main import run
from herd.errors import HerdError
from herd.hub.created import Created, save
from tests.engine.test_adapters import adapter

CHAT = [{"role": "user", "content": "Hi"}]


def write(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def openai(id: str, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    given = {"messages": CHAT} if url.startswith("/v1/chat") else {"prompt": "abc"}
    return {"custom_id": id, "method": "POST", "url": url, "body": {"model": "m", **given, **body}}


def generate(model: str, source: str, out: Path, *more: str) -> tuple[int, dict[Any, Any]]:
    status = run(["generate", model, "--batch-file", source, "--out", str(out), "-n", "6", *more])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    found = {row.get("custom_id", row["id"]): row for row in rows}
    assert len(found) == len(rows)
    return status, found


def test_rows_of_every_kind(chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"prompt": "abc", "temperature": 0},
        {"messages": CHAT, "id": "chat", "max_tokens": 3, "metadata": {"part": 1}},
        "",
        {"prompt": [1, 2, 3], "seed": 1, "stop": ["x"], "logit_bias": {"5": -100}},
        openai("o1", temperature=0, max_completion_tokens=4, stream=False, user="me", n=1),
        openai("o2", "/v1/completions", max_tokens=2, stop="\n"),
    )
    status, rows = generate(chat_model, source, tmp_path / "out.jsonl")
    assert status == 0
    assert sorted(rows, key=str) == [1, 4, "chat", "o1", "o2"]
    assert rows[1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    assert rows[1]["finish_reason"] == "length"
    assert rows["chat"]["metadata"] == {"part": 1}
    assert rows["chat"]["usage"]["completion_tokens"] <= 3
    answer = rows["o1"]["response"]
    assert (answer["status_code"], rows["o1"]["error"], answer["body"]["object"]) == (200, None, "chat.completion")
    assert answer["body"]["choices"][0]["message"]["role"] == "assistant"
    assert isinstance(rows["o2"]["response"]["body"]["choices"][0]["text"], str)
    said = capsys.readouterr().err
    assert "KV cache: " in said
    assert "5 rows in 0:0" in said
    assert "tokens/s" in said


def test_a_row_is_what_a_single_prompt_gives(
    chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], piped: Callable[[str], None]
) -> None:
    piped("")
    source = write(tmp_path / "in.jsonl", *({"prompt": f"{i} abc"} for i in range(20)))
    _, rows = generate(chat_model, source, tmp_path / "out.jsonl", "--temp", "0")
    capsys.readouterr()
    assert run(["run", "--raw", chat_model, "7 abc", "--temp", "0", "-n", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == rows[8]["text"]


def test_errors_stay_with_their_rows(chat_model: str, tmp_path: Path) -> None:
    bad: list[tuple[Any, str]] = [
        ("nonsense", "is not JSON"),
        ([1], "not a JSON object"),
        ({"id": "a"}, "either a 'prompt' or 'messages'"),
        ({"id": "b", "prompt": "x", "messages": CHAT}, "either a 'prompt' or 'messages'"),
        ({"id": "c", "prompt": ""}, "neither is empty"),
        ({"id": "d", "prompt": "x", "temprature": 1}, "'temprature' is not known"),
        ({"id": "e", "prompt": "x", "temperature": -1}, "temperature is -1"),
        ({"id": "f", "prompt": "x" * 300}, "301 tokens and the context holds 256"),
        ({"id": "g", "messages": [{"role": "nobody", "content": "x"}]}, "role is 'nobody'"),
        ({"id": "h", "prompt": [1, 999]}, "token id 999"),
        ({"id": "i", "prompt": [1, "x"]}, "token ids"),
        ({"id": "j", "prompt": "x", "tools": [{"name": "f"}]}, "without tools"),
        (openai("k", n=2), "n 2 is not supported"),
        (openai("l", url="/v1/embeddings"), "url is '/v1/embeddings'"),
        (openai("m", best=2), "field 'best'"),
        ({"id": ["n"], "prompt": "x"}, "neither text nor an integer"),
    ]
    source = write(tmp_path / "in.jsonl", {"prompt": "good"}, *(row for row, _ in bad))
    status, rows = generate(chat_model, source, tmp_path / "out.jsonl")
    assert status == 1
    assert "error" not in rows[1]
    for line, (row, why) in enumerate(bad, 2):
        id = row.get("custom_id", row.get("id")) if isinstance(row, dict) else line
        error = rows[line if isinstance(id, list) else id]["error"]
        assert why in (error if isinstance(error, str) else error["message"])


def test_a_stopped_run_goes_on(chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(
        tmp_path / "in.jsonl", *({"prompt": f"{i}", "id": f"r{i}"} for i in range(9)), {"id": "bad", "prompt": ""}
    )
    out = tmp_path / "out.jsonl"
    status, first = generate(chat_model, source, out, "--temp", "0")
    assert status == 1
    lines = [json.dumps(row) for row in first.values() if "text" in row]
    out.write_text("\n".join([*lines[:4], json.dumps(first["bad"]), lines[4][:-9]]))
    capsys.readouterr()
    status, again = generate(chat_model, source, out, "--temp", "0", "--resume")
    assert status == 1  # the bad row is tried again
    assert "4 of 10 rows are answered already" in capsys.readouterr().err
    assert again == first
    write(tmp_path / "in.jsonl", *({"prompt": f"{i}", "id": f"r{i}"} for i in range(9)))
    before = out.read_text()
    assert generate(chat_model, source, out, "--resume")[0] == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        row for line in before.splitlines() if "error" not in (row := json.loads(line))
    ]


@pytest.mark.parametrize(
    ("rows", "more", "why"),
    [
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], (), "line 2 has the id '1' of an earlier row"),
        ([], (), "has no rows"),
        ([{"prompt": "a"}], ("--temp", "-1"), "temperature"),
        ([{"prompt": "a"}], ("--resume", "--overwrite"), "leave --overwrite out"),
        ([{"prompt": "a"}], ("--kv", "int3"), "int3"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_is_loaded(
    chat_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: Sequence[Any],
    more: Sequence[str],
    why: str,
) -> None:
    source = write(tmp_path / "in.jsonl", *rows)
    status, _ = generate(chat_model, source, tmp_path / "out.jsonl", *more)
    assert status in (1, 2)
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_is_not_overwritten_unasked(
    chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a"})
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    assert run(["generate", chat_model, "--batch-file", source, "--out", str(out)]) == 1
    assert run(["generate", chat_model, "--batch-file", source, "--out", str(out), "--resume"]) == 1
    assert run(["generate", chat_model, "--batch-file", source, "--out", source]) == 1
    assert out.read_text() == "precious\n"
    assert "no answer of an earlier run" in capsys.readouterr().err
    assert generate(chat_model, source, out, "--overwrite")[0] == 0


def test_to_standard_output(chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a"})
    assert run(["generate", chat_model, "--batch-file", source, "--out", "-", "-n", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == 1


def test_a_file_that_is_no_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\xff\xfe\x00\n")
    (row,) = read_rows(tmp_path / "in")
    assert "is not JSON" in (row.error or "")
    with pytest.raises(HerdError, match="cannot be read"):
        list(read_rows(tmp_path / "missing"))
    assert answered(tmp_path / "missing") == set()


def test_adapter_and_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is answered with the adapter, and guessing changes no greedy answer."""
    model = load_model("nano", dtype="float32")
    (tmp_path / "lora").mkdir()
    write_peft(adapter(model), tmp_path / "lora", model.config, lambda _: None)
    source = write(tmp_path / "in.jsonl", {"prompt": "Once upon a time"}, {"prompt": "The dog"})
    greedy = ("--temp", "0")
    _, base = generate("nano", source, tmp_path / "base.jsonl", *greedy)
    _, tuned = generate("nano", source, tmp_path / "tuned.jsonl", *greedy, "--adapter", str(tmp_path / "lora"))
    _, guessed = generate("nano", source, tmp_path / "guessed.jsonl", *greedy, "--draft", "lookup", "--deterministic")
    assert [base[n]["text"] for n in (1, 2)] != [tuned[n]["text"] for n in (1, 2)]
    assert [base[n]["text"] for n in (1, 2)] == [guessed[n]["text"] for n in (1, 2)]
    wrong = ["generate", "nano", "--batch-file", source, "--out", str(tmp_path / "x.jsonl"), "--draft", "nonesuch"]
    assert run(wrong) == 1
    assert "nonesuch" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def test_what_a_created_model_was_made_with_is_not_forgotten(
    chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its adapter and context are used, as by herd run; a system prompt, which rows cannot be given, is refused by name."""
    monkeypatch.setenv("HERD_HOME", str(tmp_path / "home"))
    source = write(tmp_path / "in.jsonl", {"prompt": "abc", "temperature": 0}, {"prompt": "a" * 60})
    model = load_model(chat_model, dtype="float32")
    (tmp_path / "lora").mkdir()
    write_peft(adapter(model), tmp_path / "lora", model.config, lambda _: None)
    save(Created("mine", chat_model, context=40, adapter=str(tmp_path / "lora")))
    status, rows = generate("mine", source, tmp_path / "out.jsonl")
    assert status == 1
    assert "40" in rows[2]["error"], "it does not fit the context that the model was made with"
    _, given = generate(chat_model, source, tmp_path / "given.jsonl", "--adapter", str(tmp_path / "lora"))
    _, plain = generate(chat_model, source, tmp_path / "plain.jsonl")
    assert rows[1]["text"] == given[1]["text"] != plain[1]["text"]
    save(Created("kind", chat_model, system="Be kind."))
    assert run(["generate", "kind", "--batch-file", source, "--out", str(tmp_path / "kind.jsonl")]) == 1
    assert "was made with a system prompt" in capsys.readouterr().err

"""`herd run` and `herd chat` with a real, tiny model: answers, options, and every bad input in one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.cli.main import run
from tests.cli.processes import LISTENING
from tests.cli.tiny import CONTEXT, tiny_config, tokenizer, write_folder

Piped = Callable[[str | bytes], None]
Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("no_input_on_a_cpu")


def expected(prompt: str, params: SamplingParams, system: str = "") -> str:
    """What the engine says without the command line."""
    from herd.engine.local import generate
    from tests.build import build

    messages = ([Message("system", system)] if system else []) + [Message("user", prompt)]
    return generate(build(tiny_config()), tokenizer(), messages, params).text


GREEDY = ("--temp", "0", "-n", "12")


def test_an_answer_goes_to_stdout_and_nothing_else_does(chat_model: str, capsys: Captured) -> None:
    assert run(["run", chat_model, "Hello", *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out == expected("Hello", SamplingParams(temperature=0, max_tokens=12)) + "\n"
    assert err == "[cut at 12 tokens: --max-tokens allows more]\n"


def test_every_sampling_option_reaches_the_model(chat_model: str, capsys: Captured) -> None:
    options = {"--temp": 1.3, "--top-p": 0.7, "--top-k": 60, "--min-p": 0.01, "--repeat-penalty": 1.2, "--seed": 5}
    flags = [str(part) for pair in options.items() for part in pair]
    assert run(["run", chat_model, "Hello", "--system", "Be brief.", "-n", "20", *flags]) == 0
    params = SamplingParams(
        temperature=1.3, top_p=0.7, top_k=60, min_p=0.01, repetition_penalty=1.2, max_tokens=20, seed=5
    )
    assert capsys.readouterr().out == expected("Hello", params, "Be brief.") + "\n"


def test_the_checkpoint_gives_the_defaults(chat_model: str, capsys: Captured) -> None:
    assert run(["run", chat_model, "Hello", "--seed", "3", "-n", "20"]) == 0
    params = SamplingParams(temperature=0.7, top_p=0.8, max_tokens=20, seed=3)  # as in its generation_config.json
    assert capsys.readouterr().out == expected("Hello", params) + "\n"


@pytest.mark.parametrize(
    ("prompt", "data", "asked"),
    [
        (["Hello"], "", "Hello"),
        (["Explain:"], "some text\n", "Explain:\n\nsome text"),
        ([], "Hello\n", "Hello"),
        (["-"], "Hello", "Hello"),
        ([], "\ufeffcaf\u00e9\r\n", "caf\u00e9"),
    ],
)
def test_the_prompt_is_the_argument_then_what_is_piped_in(
    chat_model: str, prompt: list[str], data: str, asked: str, piped: Piped, capsys: Captured
) -> None:
    piped(data)
    assert run(["run", chat_model, *prompt, *GREEDY]) == 0
    assert capsys.readouterr().out == expected(asked, SamplingParams(temperature=0, max_tokens=12)) + "\n"


def test_json_is_one_object(chat_model: str, capsys: Captured) -> None:
    assert run(["run", chat_model, "Hello", *GREEDY, "--json"]) == 0
    out, _ = capsys.readouterr()
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert answer["text"] == expected("Hello", SamplingParams(temperature=0, max_tokens=12))
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 12
    assert answer["timings"]["tokens_per_second"] > 0
    assert answer["timings"]["load_seconds"] > 0


def test_verbose_gives_durations_and_rates_on_stderr(chat_model: str, capsys: Captured) -> None:
    assert run(["run", chat_model, "Hello", *GREEDY, "--verbose"]) == 0
    out, err = capsys.readouterr()
    assert "duration" not in out
    for name in (
        "total duration:",
        "load duration:",
        "prompt eval rate:",
        "eval count:           12 tokens",
        "eval rate:",
    ):
        assert name in err


def test_a_stop_string_ends_the_answer(chat_model: str, capsys: Captured) -> None:
    text = expected("Hello", SamplingParams(temperature=0, max_tokens=12))
    stop = next(c for c in text if c.isascii() and c.isprintable() and c not in "\\")
    assert run(["run", chat_model, "Hello", *GREEDY, "--stop", stop]) == 0
    out, err = capsys.readouterr()
    assert out == text.split(stop)[0] + "\n"
    assert err == ""


def test_a_full_context_is_said(chat_model: str, capsys: Captured) -> None:
    assert run(["run", chat_model, "Hello", "--temp", "0", "-c", "40"]) == 0
    assert "[cut: the context of 40 tokens is full]" in capsys.readouterr().err


def test_a_base_model_continues_text_with_raw(base_model: str, capsys: Captured) -> None:
    assert run(["run", base_model, "--raw", "Once upon", *GREEDY]) == 0
    assert len(capsys.readouterr().out) > 1
    for args in (["run", base_model, "Once upon"], ["chat", base_model]):
        assert run(args) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert f"the files of {base_model} do not say whether it chats" in err
        assert f'herd run --raw {base_model} "TEXT"' in err


def test_a_base_model_chats_in_a_format_that_is_named(base_model: str, chat_model: str, capsys: Captured) -> None:
    assert run(["run", base_model, "Hello", "--format", "llama3", *GREEDY]) == 0
    named = capsys.readouterr().out
    assert run(["run", chat_model, "Hello", *GREEDY]) == 0
    assert capsys.readouterr().out == named


def one_line_error(args: list[str], capsys: Captured) -> str:
    """Runs a command that must fail; its one line."""
    status = run(args)
    out, err = capsys.readouterr()
    assert status == 1, err
    assert out == ""
    assert err.startswith("herd: ")
    assert err.count("\n") == 1
    assert "bug in herd" not in err
    return err


def test_wrong_paths_and_names(tmp_path: Path, capsys: Captured) -> None:
    assert "no such file or folder" in one_line_error(["run", "./no/such/folder", "Hi"], capsys)
    assert "no such file or folder" in one_line_error(["run", str(tmp_path / "none.gguf"), "Hi"], capsys)
    assert "llama-3.2-1b," in one_line_error(["run", "llama-3.2-1bb", "Hi"], capsys)
    assert "xyzzy" in one_line_error(["chat", "xyzzy"], capsys)
    assert "not on this machine" in one_line_error(["run", "llama3.1:405b", "Hi"], capsys)
    assert "cannot be run yet" in one_line_error(["run", "llama-3.2-11b-vision", "Hi"], capsys)


def test_wrong_formats(tmp_path: Path, chat_model: str, capsys: Captured) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert "not a checkpoint" in one_line_error(["run", str(text), "Hi"], capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in one_line_error(["run", str(empty), "Hi"], capsys)
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"not a gguf file")
    assert "fake.gguf" in one_line_error(["chat", str(fake)], capsys)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(chat_model).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in one_line_error(["run", str(broken), "Hi"], capsys)
    (broken / "config.json").write_text("{")
    assert "config.json" in one_line_error(["run", str(broken), "Hi"], capsys)


def test_impossible_requests(chat_model: str, capsys: Captured) -> None:
    run_it = ["run", chat_model, "Hi"]
    assert f"made for {CONTEXT}" in one_line_error([*run_it, "-c", "1000000000"], capsys)
    assert "there is no prompt format 'klingon'" in one_line_error([*run_it, "--format", "klingon"], capsys)
    assert "no device 'warp'" in one_line_error([*run_it, "--device", "warp"], capsys)
    assert "no device 'cuda:99'" in one_line_error([*run_it, "--device", "cuda:99"], capsys)


def test_a_prompt_longer_than_the_context(chat_model: str, base_model: str, piped: Piped, capsys: Captured) -> None:
    for args in (["run", chat_model, "x" * 1000], ["run", base_model, "--raw", "x" * 1000]):
        assert f"the context holds {CONTEXT}" in one_line_error(args, capsys)
    piped("y" * 1000)
    assert "no room for a reply" in one_line_error(["run", chat_model], capsys)


def test_input_that_is_not_text(chat_model: str, piped: Piped, capsys: Captured) -> None:
    piped(b"ab\xff")
    assert "standard input is not UTF-8 text: byte 2 is 0xff" in one_line_error(["run", chat_model], capsys)
    assert "surrogate" in one_line_error(["run", chat_model, "caf\udce9"], capsys)


def test_a_chat_through_a_pipe(chat_model: str, piped: Piped, capsys: Captured, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    piped(f'Hello\n/save {saved}\n"""two\nlines"""\n/show\n')
    assert run(["chat", chat_model, *GREEDY, "--verbose"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(expected("Hello", SamplingParams(temperature=0, max_tokens=12)) + "\n")
    assert "used," in err
    first = out
    piped(f'/load {saved}\n"""two\nlines"""\n')
    assert run(["chat", chat_model, *GREEDY]) == 0
    assert first.endswith(capsys.readouterr().out)


def test_a_chat_through_a_pipe_fails_when_a_turn_failed(chat_model: str, piped: Piped, capsys: Captured) -> None:
    piped("x" * 1000 + "\n/clear\nHello\n")
    assert run(["chat", chat_model, *GREEDY]) == 1
    out, err = capsys.readouterr()
    assert out == expected("Hello", SamplingParams(temperature=0, max_tokens=12)) + "\n"
    assert "/undo takes back the last exchange" in err


def test_run_without_a_prompt_needs_one_for_json(chat_model: str, capsys: Captured) -> None:
    assert run(["run", chat_model, "--json"]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_the_embedded_model_answers_and_stops_by_itself(capsys: Captured) -> None:
    assert run(["run", "nano", "Tell me a story about a dog.", "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) > 3
    assert out.isprintable() or "\n" in out
    assert err == ""


def test_a_real_process_answers_and_stops_at_ctrl_c(chat_model: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "long", context=65_536, endless=True)
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, "run", str(folder), "Hello", "--temp", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(5)  # it streams: the answer is shown long before it is complete
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err

"""`--adapter` of `herd run` and `herd chat`: the merged model's answer, and refusals in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from herd.chat.formats import detect
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.checkpoint.gguf_lora import write_gguf_lora
from herd.checkpoint.peft import write_peft
from herd.checkpoint.peft_virtual import write_virtual
from herd.cli.main import run
from herd.engine.local import generate
from herd.train.samples import continuation
from tests.build import build
from tests.cli.tiny import tiny_config, tokenizer
from tests.engine.test_adapters import adapter, merged
from tests.engine.test_virtual import random_adapter, trained

Captured = pytest.CaptureFixture[str]
OPTIONS = ("--temp", "0", "-n", "12", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(autouse=True)
def _empty_input(piped: Callable[[str | bytes], None]) -> None:
    piped("")


@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_the_answer_of_the_merged_model(kind: str, chat_model: str, tmp_path: Path, capsys: Captured) -> None:
    model = build(tiny_config())
    change, place = adapter(model, 1, only="layers"), tmp_path / ("lora.gguf" if kind == "gguf" else "lora")
    if kind == "peft":
        place.mkdir()
        write_peft(change, place, model.config, lambda _: None)
    else:
        write_gguf_lora(change, place, model.config, lambda _: None)
    assert run(["run", chat_model, "Hello", *OPTIONS, "--adapter", str(place)]) == 0
    params = SamplingParams(temperature=0, max_tokens=12)
    told = [
        generate(one, tokenizer(), [Message("user", "Hello")], params).text for one in (merged(model, change), model)
    ]
    assert capsys.readouterr().out == told[0] + "\n"
    assert told[0] != told[1]


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens(
    kind: str, chat_model: str, tmp_path: Path, capsys: Captured, piped: Callable[[str | bytes], None]
) -> None:
    """What the model says that trains them; /show names them."""
    model = build(tiny_config())
    virtual = random_adapter(model, kind, 5)
    write_virtual(virtual, tmp_path, model.config, lambda _: None)
    assert run(["run", chat_model, "Hello", *OPTIONS, "--adapter", str(tmp_path)]) == 0
    format = detect(tokenizer())
    prompt = format.render([Message("user", "Hello")]).tokens
    ids = list(continuation(trained(model, virtual), prompt, format.stop_ids, 12))
    assert capsys.readouterr().out == tokenizer().decode(ids) + "\n"
    assert ids != list(continuation(model, prompt, format.stop_ids, 12))
    piped("/show\n")
    assert run(["chat", chat_model, *OPTIONS, "--adapter", str(tmp_path)]) == 0
    assert f"{tmp_path}, a {kind} of 5 virtual tokens" in "".join(capsys.readouterr())


def test_show_names_it(chat_model: str, tmp_path: Path, capsys: Captured, piped: Callable[[str | bytes], None]) -> None:
    model = build(tiny_config())
    write_peft(adapter(model, 1, only="attention.wq"), tmp_path, model.config, lambda _: None)
    piped("/show\n")
    assert run(["chat", chat_model, *OPTIONS, "--adapter", str(tmp_path)]) == 0
    assert f"{tmp_path}, rank 3, {model.config.n_layers} matrices" in "".join(capsys.readouterr())


def test_one_that_changes_nothing_says_so(chat_model: str, tmp_path: Path, capsys: Captured) -> None:
    model = build(tiny_config())
    change = adapter(model, 1, only="attention.wq")
    zero = replace(change, factors={name: replace(pair, b=pair.b * 0) for name, pair in change.factors.items()})
    write_peft(zero, tmp_path, model.config, lambda _: None)
    assert run(["run", chat_model, "Hello", *OPTIONS, "--adapter", str(tmp_path)]) == 0
    assert "changes nothing" in capsys.readouterr().err


def test_refusals(chat_model: str, tmp_path: Path, capsys: Captured) -> None:
    assert run(["run", chat_model, "Hello", "--adapter", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "is no adapter" in err
    assert err.count("\n") == 1
    other = build("llama-4-scout")
    write_peft(adapter(other, 1, only="attention.wq"), tmp_path, other.config, lambda _: None)
    assert run(["run", chat_model, "Hello", "--adapter", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run(["run", chat_model, "Hello", "--adapter", str(tmp_path / "missing")]) == 2

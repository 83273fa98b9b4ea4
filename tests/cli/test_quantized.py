"""herd run and herd chat with quantized files, and what they say about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from herd.cli.main import run
from herd.convert.driver import convert
from herd.kernels import native

Piped = Callable[[str | bytes], None]
Captured = pytest.CaptureFixture[str]
GREEDY = ("--temp", "0", "-n", "12")

pytestmark = [
    pytest.mark.usefixtures("no_input_on_a_cpu"),
    pytest.mark.skipif(native.isa() is None, reason=f"no native kernels: {native.missing()}"),
]


@pytest.fixture(scope="module")
def nano_q8(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("quantized") / "nano.gguf"
    convert("nano", path, to="gguf", quant="q8_0")
    return str(path)


def test_a_quantized_file_answers_as_it_is(nano_q8: str, piped: Piped, capsys: Captured) -> None:
    question = "Tell me a story about a dog."
    assert run(["run", nano_q8, question, *GREEDY, "--verbose"]) == 0
    stored, err = capsys.readouterr()
    assert "Q8_0, activations float32 on cpu" in err
    assert f"native {native.isa()}" in err
    piped("")
    assert run(["run", nano_q8, question, *GREEDY, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == stored, "8 bits do not change twelve clear choices"


def test_show_says_what_runs(nano_q8: str, piped: Piped, capsys: Captured) -> None:
    for flags, numbers in (([], "Q8_0, activations float32"), (["--weights", "plain"], "bfloat16 on cpu")):
        piped("/show\n")
        assert run(["chat", nano_q8, *flags]) == 0
        err = capsys.readouterr().err
        assert numbers in err
        assert f"native {native.isa()}" in err


def test_weights_are_quantized_on_request(piped: Piped, capsys: Captured) -> None:
    assert run(["run", "nano", "Hello", *GREEDY, "--weights", "int8", "--verbose"]) == 0
    assert "Q8_0, activations float32 on cpu" in capsys.readouterr().err
    piped("")
    assert run(["run", "nano", "Hello", "--weights", "int3"]) == 1
    assert "choose one of auto, plain, stored, int8, int4" in capsys.readouterr().err


def test_missing_kernels_are_said_once(monkeypatch: pytest.MonkeyPatch, piped: Piped, capsys: Captured) -> None:
    monkeypatch.setattr(native, "missing", lambda: "there was no compiler")
    monkeypatch.setattr(native, "isa", lambda: None)
    piped("Hi\nHello\n/show\n")
    assert run(["chat", "nano", *GREEDY]) == 0
    err = capsys.readouterr().err
    assert err.count("[slower than it could be: there was no compiler]") == 1
    assert "torch\n  no native kernels" in err

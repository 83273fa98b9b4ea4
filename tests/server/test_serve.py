"""`herd serve` as a program: what it says, how it ends, what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from herd.cli.main import run

READY_SECONDS = 120.0
HI = {"model": "nano", "messages": [{"role": "user", "content": "Tell me a story."}]}


class Program:
    """A running `herd serve`; `said` is what it wrote."""

    def __init__(self, *args: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "herd", "serve", "--port", "0", *args],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        self.said: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)

    def wait_for(self, pattern: str) -> str:
        """What the program says that matches, when it has."""
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            if (found := re.search(pattern, "".join(self.said))) is not None:
                return found[1] if found.groups() else found[0]
            assert self.process.poll() is None, self.said
            time.sleep(0.02)
        raise AssertionError(f"no {pattern} in {self.said}")


@contextmanager
def program(*args: str) -> Iterator[Program]:
    made = Program(*args)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        made.reader.join()
        assert made.process.stdout is not None
        made.process.stdout.close()


def test_replies_end_before_the_server_does() -> None:
    with program("nano") as made:
        url = made.wait_for(r"herd serves at (\S+)")
        made.wait_for(r"ready +nano: 5\.\d M parameters in float32")
        made.wait_for(r"KV cache: ")
        assert httpx.get(f"{url}/health").status_code == 200
        body = HI | {"stream": True, "ignore_eos": True, "max_tokens": 400}
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            os.kill(made.process.pid, signal.SIGTERM)
            time.sleep(0.2)
            refused = httpx.post(f"{url}/v1/chat/completions", json=HI)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert made.process.wait(20) == 0
        host, port = url.removeprefix("http://").split(":")
        with socket.create_server((host, int(port))):
            pass  # the port is free again


@pytest.mark.slow
def test_what_does_not_end_in_time_ends_with_an_error() -> None:
    with program("nano", "--drain", "0", "-c", "512") as made:
        url = made.wait_for(r"herd serves at (\S+)")
        made.wait_for("ready +nano")
        body = HI | {"stream": True, "ignore_eos": True, "n": 12}
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            began = time.monotonic()
            os.kill(made.process.pid, signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert "shutting down" in rest[-2]
        assert made.process.wait(20) == 0
        assert time.monotonic() - began < 10, "the bar is 4 s on a machine of its own"


def test_what_cannot_be_opened_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for wrong in ("no-such-model", str(tmp_path)):
        assert run(["serve", wrong]) == 1
        assert wrong in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_program() -> None:
    """Its headers are fine; that its cache does not fit is found out later."""
    with program("nano", "--memory", "10 kB") as made:
        assert made.process.wait(READY_SECONDS) == 1
        made.reader.join()
        assert "Traceback" not in "".join(made.said)
        assert "nano cannot be loaded" in made.said[-1]


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "nano", "--port", str(port)]) == 1
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--pipeline-parallel-size", "2"], "--tensor-parallel-size"),
        (["nano", "-tp", "2", "--lora-modules", "x=y"], "merge them"),
        (["--gpu-memory-utilization=0.9"], "--memory"),
        (["-ngl", "99"], "--device"),
        (["--nonsense"], "--nonsense"),
        (["nano", "nano2=nano", "--served-model-name", "x"], "one MODEL"),
        (["nano", "--lora-modules", "x"], "NAME=PATH"),
        (["nano", "--lora-modules", "x=/nowhere"], "/nowhere"),
        (["nano", "--keep-alive", "soon"], "--keep-alive"),
        (["--port", "99999"], "99999"),
    ],
)
def test_flags_that_make_no_sense(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert run(["serve", *args]) == 2
    assert said in capsys.readouterr().err


def test_flags_become_settings() -> None:
    from herd.cli.serve import command, settings_from

    context = command.make_context(
        "serve", ["a=nano", "b=nano", "-c", "256", "--quantization", "int8", "--keep-alive", "5m"]
    )
    settings = settings_from(context.params.pop("models"), context.params)
    assert [(m.name, m.source, m.keep_alive) for m in settings.models] == [("a", "nano", 300.0), ("b", "nano", 300.0)]
    assert settings.models[0].options.arguments() == {"max_len": 256, "weights": "int8", "seed": None}
    context = command.make_context(
        "serve", ["nano", "--served-model-name", "x", "--served-model-name", "y", "--seed", "3"]
    )
    settings = settings_from(context.params.pop("models"), context.params)
    assert (settings.models[0].name, settings.models[0].aliases, settings.models[0].options.seed) == ("x", ("y",), 3)
    context = command.make_context("serve", [])
    settings = settings_from(context.params.pop("models"), context.params)
    assert settings.any_model
    assert settings.keep_alive == 300.0

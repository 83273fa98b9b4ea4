"""What the log says of errors: everything that helps to find them, and nothing of what requests say."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import pytest

from herd.cli.main import run
from herd.server.errors import told
from herd.server.logs import logged
from herd.server.process import WorkerError
from herd.server.protocol import Began, Piece
from herd.server.settings import ModelSpec
from tests.server.conftest import faked

SECRET = "the words of a prompt"
MESSAGES = [{"role": "user", "content": "Hi"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "Hi"},
}


def bug() -> WorkerError:
    """A bug in a worker, as it comes here: its message may repeat anything."""
    return WorkerError(f"ValueError: {SECRET}", kind="Bug")


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_in_the_log_with_its_place_and_without_its_words(
    path: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with faked(lambda call: [Began("", 3), Piece("", 0, "Hel"), bug()]) as fake:
            answer = await fake.client.post(path, json={"model": "fake", "stream": stream} | ASKED[path])
            assert answer.status_code == (200 if stream else 500)
            assert "the server's log says more" in answer.text
            assert SECRET not in answer.text

    with caplog.at_level(logging.ERROR, "herd.server"):
        asyncio.run(run())
    [record] = [one for one in caplog.records if one.name == "herd.server"]
    said = record.getMessage()
    assert "Bug" in said
    assert ".py:" in said, "where it happened"
    assert SECRET not in caplog.text


def test_what_is_the_clients_own_is_not_logged_and_what_models_miss_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "herd.server"):
        assert told(WorkerError(SECRET, kind="PromptError"), "here").status == 400
        assert not caplog.records
        assert told(WorkerError("a.gguf is cut short", kind="NotLoaded"), "here").status == 503
        assert told(KeyError(SECRET), "here").status == 500
    assert "here: NotLoaded: a.gguf is cut short" in caplog.text
    assert "here: KeyError" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("form", ["text", "json"])
def test_tracebacks_have_no_words_of_requests(form: str) -> None:
    import io

    out = io.StringIO()
    with logged("info", form, out):
        for error in (ValueError(SECRET), OSError(28, "No space left on device", SECRET)):
            try:
                raise error
            except Exception:
                logging.getLogger("herd.server").exception("it broke")
    assert "ValueError" in out.getvalue()
    assert "OSError: No space left on device" in out.getvalue()
    assert "test_told.py" in out.getvalue()
    assert SECRET not in out.getvalue()


def test_the_log_ends_with_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines that came later went to a stream that was closed meanwhile, and each became a traceback on stderr."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.getLogger("uvicorn").level)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", "nano", "--log-level", "debug", "--port", str(taken.getsockname()[1])]) == 1
    assert (root.handlers, root.level, logging.getLogger("uvicorn").level) == before
    assert "cannot listen" in capsys.readouterr().err


def test_no_client_is_told_where_files_lie(caplog: pytest.LogCaptureFixture) -> None:
    place = "/srv/secret/models"
    spec = ModelSpec(source=f"{place}/none", name="fake", adapters=(("a", f"{place}/a"),))

    async def run() -> None:
        async with faked(models=(spec,)) as fake:
            for path in ("/v1/models", "/v1/models/a", "/lora-adapters", "/api/tags", "/api/ps", "/health"):
                answer = await fake.client.get(path)
                assert place not in answer.text, path
            answer = await fake.client.post("/api/show", json={"model": "fake"})
            assert (answer.status_code, place in answer.text) == (503, False)

    with caplog.at_level(logging.ERROR, "herd.server"):
        asyncio.run(run())
    assert "fake cannot be inspected" in caplog.text

"""Every parameter of every API is honoured, refused by name, or known to change nothing; and the page says which."""

from __future__ import annotations

import asyncio

import pytest

from herd.server.app import create_app
from herd.server.settings import ServerSettings
from tests.server.conformance import PAGE, Api, Row, all_rows, apis, page, rows

OTHERS = {
    "/v1/batches/{id}/cancel",
    "/v1/responses/{id}/cancel", "/v1/responses/input_tokens",
    "/lora-adapters", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/v1/messages/count_tokens", "/api/pull", "/api/create", "/api/copy", "/api/show",
    "/api/embed", "/api/embeddings", "/api/push",
}  # fmt: skip
"""Paths that are no calls of a model: their fields are shown by tests of their own."""


@pytest.fixture(scope="module")
def found() -> dict[str, list[Row]]:
    return all_rows()


def test_the_page_is_what_the_server_does(found: dict[str, list[Row]]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(found), (
        "run python -m tests.server.conformance, and read what changed"
    )


def test_every_parameter_of_the_official_clients_is_there(found: dict[str, list[Row]]) -> None:
    for api in apis():
        assert set(api.known) <= {row.name for row in found[api.title]}


def test_what_people_rely_on_is_honoured(found: dict[str, list[Row]]) -> None:
    """The table can be wrong about everything at once: these rows are known without it."""
    honoured = {title: {row.name for row in table if row.verdict == "honoured"} for title, table in found.items()}
    assert {"temperature", "seed", "stop", "tools", "logprobs", "stream", "n"} <= honoured["POST /v1/chat/completions"]
    assert {"prompt", "suffix", "echo", "best_of"} <= honoured["POST /v1/completions"]
    assert {"previous_response_id", "instructions", "text"} <= honoured["POST /v1/responses"]
    assert {"system", "stop_sequences", "top_k"} <= honoured["POST /v1/messages"]
    assert {"input", "dimensions", "encoding_format"} <= honoured["POST /v1/embeddings"]
    assert {"messages", "tools", "prompt"} <= honoured["POST /tokenize"]
    assert {"num_predict", "repeat_penalty"} <= honoured["POST /api/generate, options"]
    assert {"input_file_id", "endpoint", "metadata", "output_expires_after"} <= honoured["POST /v1/batches"]
    assert {"file", "expires_after"} <= honoured["POST /v1/files"]
    assert {"after", "limit", "order", "purpose"} == honoured["GET /v1/files"]
    assert {"after", "limit"} == honoured["GET /v1/batches"]


def test_no_path_is_forgotten() -> None:
    asked = {api.path for api in apis() if api.verb == "POST"}
    posts = {path for path, verbs in create_app(ServerSettings()).openapi()["paths"].items() if "post" in verbs}
    assert asked <= posts
    assert posts - asked <= OTHERS, (
        "add new paths to tests/server/conformance.py, or to OTHERS where they call no model"
    )


def test_the_rows_of_lists_are_the_parameters_of_their_routes() -> None:
    paths = create_app(ServerSettings()).openapi()["paths"]
    for api in apis():
        if api.verb == "GET":
            declared = {one["name"] for one in paths[api.path]["get"]["parameters"] if one["in"] == "query"}
            assert declared == set(api.body.model_fields)


def test_a_parameter_that_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes a field and does nothing with it does not pass."""
    from herd.server.openai import sampling

    real = sampling.sampling_of
    monkeypatch.setattr(
        "herd.server.openai.chat.sampling_of",
        lambda body: {key: value for key, value in real(body).items() if key != "min_p"},
    )
    with pytest.raises(AssertionError, match="min_p is accepted and changes nothing"):
        asyncio.run(rows(_chat()))


def _chat() -> Api:
    return next(api for api in apis() if api.path == "/v1/chat/completions")

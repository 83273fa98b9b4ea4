"""What becomes of every parameter of the APIs: asked of the application itself, one parameter at a time.

`python -m tests.server.conformance` writes docs/server/conformance.md from what it finds; `test_conformance.py` holds the page,
and the rule behind it (honoured, refused by name, or listed here as of no effect), to the application.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import tempfile
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import openai

from herd.server.fields import Body
from herd.server.protocol import Began, Call, Ended, Finished, Piece, TokenInfo, Usage
from herd.server.settings import ModelSpec
from tests.server import fakes
from tests.server.batching import CHAT, jsonl, line, over, uploaded
from tests.server.conftest import Fake, faked
from tests.server.probes import NO_EFFECT, PROBES, THEIRS

PAGE = Path(__file__).parents[2] / "docs" / "server" / "conformance.md"
FOREIGN = "not a value that anybody allows"


@dataclass(frozen=True)
class Api:
    """A path: its body, a smallest request, and the parameters that its own clients know."""

    path: str
    body: type[Body]
    smallest: Mapping[str, Any]
    known: tuple[str, ...]
    within: str | None = None
    """The field whose members are listed, such as Ollama's options."""
    asks: Callable[[openai.AsyncOpenAI, dict[str, Any]], Any] | None = None
    """How OpenAI's own client sends it: what is no call of a model is asked so, and not in JSON of our own."""
    verb: str = "POST"

    @property
    def title(self) -> str:
        return f"{self.verb} {self.path}" + (f", {self.within}" if self.within else "")


class FileForm(Body):
    """The fields of an upload."""

    file: str
    purpose: str
    expires_after: dict[str, Any] | None = None


class FileQuery(Body):
    """What a list of files is asked for with."""

    after: str | None = None
    limit: int | None = None
    order: str | None = None
    purpose: str | None = None


class BatchQuery(Body):
    """What a list of batches is asked for with."""

    after: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Row:
    """What becomes of a parameter."""

    name: str
    verdict: str
    status: int
    words: str


def apis() -> list[Api]:
    """Every path whose requests become calls of a model or questions to one, and that of files."""
    import ollama._types as theirs
    from anthropic.types import message_create_params as messages
    from openai.types import (
        batch_create_params,
        batch_list_params,
        embedding_create_params,
        file_create_params,
        file_list_params,
        moderation_create_params,
    )
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chat
    from openai.types.responses import response_create_params as responses

    from herd.server.anthropic.messages import MessagesBody
    from herd.server.ollama.chat import OllamaChatBody
    from herd.server.ollama.fields import Options
    from herd.server.ollama.generate import GenerateBody
    from herd.server.openai.batches import BatchBody
    from herd.server.openai.chat_body import ChatBody
    from herd.server.openai.completions import CompletionBody
    from herd.server.openai.embeddings import EmbeddingBody
    from herd.server.openai.moderations import ModerationBody
    from herd.server.openai.responses import ResponseBody
    from herd.server.openai.tokenize import DetokenizeBody, TokenizeBody

    talk = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
    text = {"model": "fake", "prompt": "Hi"}
    asked = {"model": "fake", "input": "Hi"}
    return [
        Api("/v1/chat/completions", ChatBody, talk, _typed(chat.CompletionCreateParamsBase)),
        Api("/v1/completions", CompletionBody, text, _typed(completions.CompletionCreateParamsBase)),
        Api("/v1/responses", ResponseBody, asked, _typed(responses.ResponseCreateParamsBase)),
        Api("/v1/embeddings", EmbeddingBody, asked, _typed(embedding_create_params.EmbeddingCreateParams)),
        Api(
            "/v1/moderations", ModerationBody, {"input": "Hi"}, _typed(moderation_create_params.ModerationCreateParams)
        ),
        Api(
            "/v1/files",
            FileForm,
            {"file": "x", "purpose": "batch"},
            _typed(file_create_params.FileCreateParams),
            asks=_upload,
        ),
        Api(
            "/v1/files",
            FileQuery,
            {},
            _typed(file_list_params.FileListParams),
            asks=lambda client, asked: client.files.with_raw_response.list(**asked),
            verb="GET",
        ),
        Api(
            "/v1/batches",
            BatchBody,
            {"input_file_id": "FIRST", "endpoint": CHAT, "completion_window": "24h"},
            _typed(batch_create_params.BatchCreateParams),
            asks=lambda client, asked: client.batches.with_raw_response.create(**asked),
        ),
        Api(
            "/v1/batches",
            BatchQuery,
            {},
            _typed(batch_list_params.BatchListParams),
            asks=lambda client, asked: client.batches.with_raw_response.list(**asked),
            verb="GET",
        ),
        Api("/tokenize", TokenizeBody, text, ()),
        Api("/detokenize", DetokenizeBody, {"model": "fake", "tokens": [5, 6]}, ()),
        Api("/v1/messages", MessagesBody, talk | {"max_tokens": 5}, _typed(messages.MessageCreateParamsBase)),
        Api("/api/chat", OllamaChatBody, talk, tuple(theirs.ChatRequest.model_fields)),
        Api("/api/generate", GenerateBody, text, tuple(theirs.GenerateRequest.model_fields)),
        Api("/api/generate", Options, text, tuple(theirs.Options.model_fields), "options"),
    ]


def _upload(client: openai.AsyncOpenAI, asked: dict[str, Any]) -> Any:
    file = ("in.jsonl", asked["file"].encode())
    return client.files.with_raw_response.create(**{**asked, "file": file})


def _typed(params: Any) -> tuple[str, ...]:
    return tuple(params.__annotations__)


def names(api: Api) -> list[str]:
    """The parameters that herd or the API's own client knows, those of the client first."""
    ours = [field.alias or name for name, field in api.body.model_fields.items()]
    return list(dict.fromkeys([*api.known, *ours, *api.body.neutral, *api.body.refused]))


async def rows(api: Api) -> list[Row]:
    ASKED.clear()
    about = replace(fakes.ABOUT, infill=True)
    with (
        patch.object(fakes, "ABOUT", about),
        patch.object(fakes.Scripted, "ask", _ask),
        tempfile.TemporaryDirectory() as folder,
    ):
        async with faked(_script, any_model=True, models=(GUARD,), guard="guard", state_dir=folder) as fake:
            # Not named when the server was started: how long such a model stays is for clients to say.
            fake.state.models.add(ModelSpec(source="fake", name="fake", adapters=(("a", "path"),)))
            KEPT.clear()
            if api.asks is not None:
                await _kept(fake)
            await _observed(fake, api, {})  # the first answer is the one that took the model's loading
            return [await _row(fake, api, name) for name in names(api)]


def _script(call: Call) -> list[Any]:
    """As many replies as were asked for; the guard finds everything safe."""
    if call.id.startswith("modr-"):
        safe = TokenInfo(5, "safe", b"", -0.1, ((5, "safe", b"", -0.1),))
        return [
            Began("", 3),
            Piece("", 0, "safe", tokens=(safe,)),
            Ended("", 0, "stop", None, 1),
            Finished("", Usage(3)),
        ]
    count = call.sampling.get("n", 1)
    pieces = [
        event for index in range(count) for event in (Piece("", index, "Hello"), Ended("", index, "stop", None, 1))
    ]
    return [Began("", 3), *pieces, Finished("", Usage(3, count, 1, 0.01, 0.02))]


KEPT: dict[str, str] = {}
"""What files and batches that were made before are called in probes -> their ids."""


async def _kept(fake: Fake) -> None:
    """Three files and three batches of one answer each, the newest first in lists; the second of a list stands for `after`."""
    for name in ("FIRST", "OTHER"):
        answer = await uploaded(fake, jsonl(line(name)))
        KEPT[name] = answer.json()["id"]
        asked = {"input_file_id": KEPT[name], "endpoint": CHAT, "completion_window": "24h"}
        for _ in range(2):
            await over(fake, (await fake.client.post("/v1/batches", json=asked)).json()["id"])


GUARD = ModelSpec(source="guard", name="guard")
ASKED: list[Any] = []
"""Questions to the model so far."""


async def _ask(self: fakes.Scripted, what: str, **args: Any) -> Any:
    ASKED.append((self.spec.name, what, args))
    vector = base64.b64encode(array("f", [1.0, 0.0]).tobytes()).decode()
    return {
        "embed": lambda: {"vectors": [vector] * len(args["prompts"]), "tokens": [1] * len(args["prompts"])},
        "guard": lambda: {"categories": {"S1": "Violent Crimes"}, "safe": 5, "unsafe": 6},
        "tokenize": lambda: {
            "count": 2,
            "context": 128,
            "tokens": [5, 6],
            "pieces": ["a", "b"] if args["pieces"] else None,
        },
        "detokenize": lambda: "ab",
    }[what]()


async def _row(fake: Fake, api: Api, name: str) -> Row:
    fields = {field.alias or key for key, field in api.body.model_fields.items()}
    if name in fields:
        asked = THEIRS.get((api.path if api.verb == "POST" else "list", name)) or PROBES.get(name)
        assert asked is not None, f"{api.title}: {name} needs a probe in tests/server/probes.py"
        value = asked.value
        if name == "previous_response_id":
            value = (await fake.client.post(api.path, json=dict(api.smallest))).json()["id"]
        before = await _observed(fake, api, dict(asked.beside))
        after = await _observed(fake, api, {**asked.beside, **asked.instead, name: value})
        assert before.status == 200, f"{api.title}: {name}: a request without it is refused: {before.words}"
        if after.status != 200:
            assert after.status == 400, f"{api.title}: {name}: status {after.status}: {after.words}"
            assert name in after.words, f"{api.title}: {name} is refused without its name: {after.words}"
            return Row(name, "refused", after.status, after.words)
        if after != before:
            return Row(name, "honoured", 200, _bound(api, name))
        why = NO_EFFECT.get(f"{api.path} {name}") or NO_EFFECT.get(name)
        assert why is not None, f"{api.title}: {name} is accepted and changes nothing"
        return Row(name, "no effect", 200, why)
    found = await _observed(fake, api, {name: FOREIGN})
    allowed = [json.dumps(value) for value in api.body.neutral.get(name, ())]
    for value in api.body.neutral.get(name, ()):
        same = await _observed(fake, api, {name: value})
        assert same.status == 200, f"{api.title}: {name}: {value!r} is refused: {same.words}"
    assert found.status == 400, f"{api.title}: {name}: status {found.status} for a value that is not supported"
    assert name in found.words, f"{api.title}: {name} is refused without its name: {found.words}"
    if allowed:
        values = [value for value in allowed if value != "1.0" or "1" not in allowed]
        return Row(name, f"only {' or '.join(values)}", found.status, api.body.refused.get(name, ""))
    return Row(name, "refused", found.status, found.words)


def _bound(api: Api, name: str) -> str:
    field = next(field for key, field in api.body.model_fields.items() if name == (field.alias or key))
    return "required" if field.is_required() else ""


@dataclass(frozen=True)
class Seen:
    """What a request came to: the call that the model got, the answer, and how long the model stays."""

    status: int
    call: str
    answer: str
    stays: float | None
    words: str


async def _observed(fake: Fake, api: Api, more: dict[str, Any]) -> Seen:
    request = {**api.smallest, **({api.within: more} if api.within else more)}
    seen, questions = len(_calls(fake)), len(ASKED)
    if api.asks is not None:
        return await _by_the_client(fake, api, request)
    reply = await fake.client.post(api.path, json=request)
    calls: list[Any] = [replace(call, id="") for call in _calls(fake)[seen:]]
    calls += ASKED[questions:]
    stays = fake.state.models.slots["fake"].keep_alive
    words = "" if reply.status_code == 200 else _words(reply.json())
    return Seen(reply.status_code, repr(calls), _masked(reply.text), stays, words)


def _calls(fake: Fake) -> list[Call]:
    """What all models were asked for so far."""
    return [call for made in fake.made for call in made.seen]


async def _by_the_client(fake: Fake, api: Api, request: dict[str, Any]) -> Seen:
    """As OpenAI's own client asks. A batch is waited for, since part of what it was asked for shows at its end."""
    assert api.asks is not None
    seen = len(_calls(fake))
    asked = {name: KEPT.get(value, value) if isinstance(value, str) else value for name, value in request.items()}
    if asked.get("after") == "SECOND":
        asked["after"] = (await fake.client.get(api.path)).json()["data"][1]["id"]
    client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=fake.client)
    try:
        reply = await api.asks(client, asked)
    except openai.APIStatusError as error:
        return Seen(error.status_code, "", "", None, _words({"error": error.body}))
    made, stays = json.loads(reply.text), None
    if api.verb == "POST" and api.path == "/v1/batches":
        made = await over(fake, made["id"])
        if made["output_file_id"] is not None:
            kept = (await fake.client.get(f"/v1/files/{made['output_file_id']}")).json()
            stays = None if kept["expires_at"] is None else kept["expires_at"] - kept["created_at"]
    elif api.verb == "POST":
        stays = made["expires_at"] - made["created_at"]
    calls = [replace(call, id="") for call in _calls(fake)[seen:]]
    # Files differ in nothing but their ids, and lists in what they have and in which order.
    told = reply.text if api.verb == "GET" else _masked(json.dumps(made))
    return Seen(200, repr(calls), told, stays, "")


def _words(body: Any) -> str:
    error = body["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def _masked(text: str) -> str:
    """An answer without what differs from one to the next: ids, times and durations."""
    text = re.sub(r'(_duration":) ?\d+', r"\1N", text)  # of any length: they may be short
    text = re.sub(r'"[a-z]+[-_][0-9A-Za-z_-]{8,}"', '"ID"', text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[0-9:.]+Z?", "DATE", text)
    return re.sub(r"\d+\.\d+|\d{6,}", "N", text)


HEAD = """\
# Every parameter of every API

Written by `python -m tests.server.conformance` from what the server does: each parameter is sent alone, and the call that the
model gets and the answer are held against those of a request without it. The tests fail when this page is not what they find.

- **honoured**: the call or the answer is another one. What the engine makes of it is shown by the tests of the engine.
- **only ...**: accepted with the value that changes nothing, refused with any other (whose status this is).
- **refused**: an error that names the parameter. Parameters that are not in these tables are refused, too.
- **no effect**: accepted because clients send it, and nothing is lost.

The parameters are those of the official clients (openai, anthropic, ollama), and those that vLLM's and llama.cpp's users send.
Files and batches are asked by the openai client itself, and a batch is waited for: its output is part of the answer.
"""


def page(found: Mapping[str, list[Row]]) -> str:
    parts = [HEAD]
    for title, table in found.items():
        kinds = [row.verdict.split()[0] for row in table]
        said = (
            f"{kinds.count('honoured')} honoured, {kinds.count('only')} with one value, {kinds.count('refused')} refused, "
            f"{kinds.count('no')} without effect."
        )
        lines = [f"## {title}", "", said, "", "| Parameter | | Status | |", "|---|---|---|---|"]
        lines += [f"| `{row.name}` | {row.verdict} | {row.status} | {_cell(row.words)} |" for row in table]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")


def all_rows() -> dict[str, list[Row]]:
    return {api.title: asyncio.run(rows(api)) for api in apis()}


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(all_rows()), encoding="utf-8")
    print(PAGE)

"""Batch files: rows of JSON in, requests out, and rows of answers that a later run can go on with. No torch.

Three kinds of rows, mixed freely, one JSON object a line:

    {"prompt": "Once upon a time", "max_tokens": 50}
    {"messages": [{"role": "user", "content": "Hi"}], "id": "greeting"}
    {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}     as OpenAI's batches

A row may have an `id` (default: its line number, from 1), `tools`, `metadata` (copied to its answer) and any field of
SamplingParams. Nothing else: an unknown field is an error of that row.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.chat.params import SamplingParams
from herd.errors import HerdError

if TYPE_CHECKING:
    from herd.chat.model import Reply

__all__ = ["Row", "answer", "answered", "failure", "read_rows"]

Id = str | int
LONGEST = 64 << 20
"""Bytes of a line, beyond which the file is something else."""
_SAMPLING = {one.name for one in fields(SamplingParams)} - {
    "n",
    "best_of",
    "beams",
    "length_penalty",
    "prompt_logprobs",
    "logprobs",
}
_OWN = {"id", "custom_id", "prompt", "messages", "tools", "metadata"}
_BODY = {
    "max_completion_tokens", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "stream": (False,), "logprobs": (False, 0), "top_logprobs": (0,), "echo": (False,), "best_of": (1,),
    "tool_choice": ("auto",), "parallel_tool_calls": (True,), "response_format": ({"type": "text"},),
}  # fmt: skip
"""Fields of OpenAI's requests -> the values that change nothing; None never does."""
_SAYS_NOTHING = {
    "model",
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "stream_options",
}
_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row: what to continue, or `error`, why that is impossible. `sampling` are fields of SamplingParams.

    `url` is that of an OpenAI row, whose answer has OpenAI's shape; None for the others.
    """

    id: Id
    line: int
    prompt: Any = None
    tools: tuple[Any, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    metadata: Any = None
    url: str | None = None
    error: str | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, empty lines left out. What is wrong with a row is in its `error`. Raises HerdError for the file."""
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
                if len(raw) > LONGEST:
                    raise HerdError(
                        f"{path}: line {line} is longer than {LONGEST >> 20} MiB: expected one JSON object a line"
                    )
                if raw.strip():
                    yield _row(raw, line)
    except OSError as error:
        raise HerdError(f"{path} cannot be read: {error.strerror}") from None


def _row(raw: bytes, line: int) -> Row:
    try:
        content = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        return Row(line, line, error=f"line {line} is not JSON: {error}")
    if not isinstance(content, dict):
        return Row(line, line, error=f"line {line} is not a JSON object")
    id = content.get("custom_id", content.get("id", line))
    if not isinstance(id, str | int) or isinstance(id, bool):
        return Row(line, line, error=f"line {line}: id is neither text nor an integer")
    url = content.get("url") if "body" in content else None
    try:
        return _openai(content, id, line) if "body" in content else _plain(content, id, line)
    except _Wrong as error:
        return Row(id, line, url=url if isinstance(url, str) else None, error=f"line {line}: {error}")


class _Wrong(Exception):
    """What is wrong with a row."""


def _plain(content: dict[str, Any], id: Id, line: int) -> Row:
    sampling = {name: value for name, value in content.items() if name in _SAMPLING and value is not None}
    for name in content:
        if name not in _OWN and name not in _SAMPLING:
            raise _Wrong(f"field {name[:40]!r} is not known: put what the answer should repeat under 'metadata'")
    return Row(id, line, _asked(content), _tools(content), _checked(sampling), content.get("metadata"))


def _openai(content: dict[str, Any], id: Id, line: int) -> Row:
    url, body = content.get("url"), content["body"]
    if url not in _URLS or not isinstance(body, dict):
        raise _Wrong(f"url is {str(url)[:40]!r}, or body is no object: expected {' or '.join(_URLS)} and an object")
    sampling: dict[str, Any] = {}
    for name, value in body.items():
        if name in ("messages", "prompt", "tools") or name in _SAYS_NOTHING or value is None:
            continue
        if name == "response_format" and isinstance(value, Mapping) and value.get("type") == "json_object":
            sampling["json_object"] = True
        elif name == "response_format" and isinstance(value, Mapping) and value.get("type") == "json_schema":
            inner = value.get("json_schema")
            sampling["schema"] = inner.get("schema") if isinstance(inner, Mapping) else None
        elif name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise _Wrong(f"{name} {json.dumps(value)[:60]} is not supported in batches")
        elif name not in _BODY:
            raise _Wrong(f"field {name[:40]!r} of the body is not known")
        elif name == "stop":
            sampling[name] = (value,) if isinstance(value, str) else value
        elif name == "logit_bias" and isinstance(value, Mapping):
            sampling[name] = {_integer(key): bias for key, bias in value.items()}
        else:
            sampling["max_tokens" if name == "max_completion_tokens" else name] = value
    if _URLS[url] not in body:
        raise _Wrong(f"body has no {_URLS[url]}, which {url} needs")
    return Row(id, line, _asked(body), _tools(body), _checked(sampling), url=url)


def _asked(content: Mapping[str, Any]) -> Any:
    """The text, ids or messages of a row."""
    if ("prompt" in content) == ("messages" in content):
        raise _Wrong("a row has either a 'prompt' or 'messages'")
    asked = content.get("prompt", content.get("messages"))
    if not isinstance(asked, list if "messages" in content else list | str) or not asked:
        raise _Wrong("a prompt is a text or a list of token ids, messages are a list, and neither is empty")
    return asked


def _tools(content: Mapping[str, Any]) -> tuple[Any, ...]:
    tools = content.get("tools") or ()
    if not isinstance(tools, list | tuple):
        raise _Wrong("tools is not a list")
    return tuple(tools)


def _checked(sampling: dict[str, Any]) -> dict[str, Any]:
    for name in ("stop", "stop_ids", "choices"):
        if isinstance(value := sampling.get(name), list):
            sampling[name] = tuple(value)
    if isinstance(bias := sampling.get("logit_bias"), Mapping):
        sampling["logit_bias"] = {_integer(key): value for key, value in bias.items()}
    try:
        SamplingParams(**sampling)
    except (HerdError, TypeError) as error:
        raise _Wrong(str(error)) from None
    return sampling


def _integer(key: Any) -> Any:
    """JSON has text keys only."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 19 else key


def answer(row: Row, reply: Reply, model: str) -> dict[str, Any]:
    """The answer to a row, in its own shape."""
    usage = {
        "prompt_tokens": reply.usage.prompt_tokens,
        "completion_tokens": reply.usage.completion_tokens,
        "total_tokens": reply.usage.prompt_tokens + reply.usage.completion_tokens,
    }
    calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in reply.message.tool_calls]
    if row.url is None:
        out: dict[str, Any] = {"id": row.id, "text": reply.text, "finish_reason": reply.finish_reason, "usage": usage}
        if calls:
            out["tool_calls"] = calls
        if reply.notes:
            out["notes"] = list(reply.notes)
        if row.metadata is not None:
            out["metadata"] = row.metadata
        return out
    finish = "tool_calls" if calls else "stop" if reply.finish_reason == "stop" else "length"
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
    if row.url == "/v1/completions":
        choice["text"] = reply.text
    else:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text}
        if calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{i}",
                    "type": "function",
                    "function": {**call, "arguments": json.dumps(call["arguments"])},
                }
                for i, call in enumerate(calls)
            ]
        choice["message"] = message
    body = {
        "id": f"herd-{row.line}",
        "object": "text_completion" if row.url == "/v1/completions" else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": f"herd-{row.line}", "body": body}
    return {"id": f"herd-{row.line}", "custom_id": row.id, "response": response, "error": None}


def failure(row: Row, why: str) -> dict[str, Any]:
    """What stands in the place of an answer."""
    if row.url is None:
        return {"id": row.id, "error": why} | ({} if row.metadata is None else {"metadata": row.metadata})
    return {
        "id": f"herd-{row.line}",
        "custom_id": row.id,
        "response": None,
        "error": {"code": "failed", "message": why},
    }


def answered(path: Path) -> set[Id]:
    """Ids that `path` has answers for. Rows with errors and what is left of a cut line are dropped from the file.

    Raises HerdError when the file is no output of such a run.
    """
    kept: set[Id] = set()
    lines: list[bytes] = []
    dropped = False
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return kept
    for number, line in enumerate(raw.splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            id = row.get("custom_id", row["id"])
            good = row.get("error") is None and line.endswith(b"\n")
        except (ValueError, RecursionError, AttributeError, KeyError):
            if line.endswith(b"\n"):
                raise HerdError(f"{path}: line {number} is no answer of an earlier run: give another --out") from None
            good, id = False, 0
        if good:
            kept.add(id)
            lines.append(line)
        dropped = dropped or not good
    if dropped:
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        with beside.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    return kept

"""The lines of batches' files: requests that come in, answers that go out. All of it is for threads, not for the event loop. No
torch."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from herd.errors import HerdError
from herd.server.jsonbody import strict_json

__all__ = ["MOST_LINES", "Line", "answered", "fault", "following", "looked_through", "put", "usage_of", "written"]

MOST_LINES, MOST_ERRORS = 50_000, 100


@dataclass(frozen=True, slots=True)
class Line:
    """A request: its custom_id, and its body as it is sent."""

    id: str
    body: bytes
    stream: bool


def following(file: BinaryIO, done: set[str]) -> Line | None:
    """The next request that is not `done`."""
    for line in file:
        if line.strip() and (given := strict_json(line))["custom_id"] not in done:
            body = json.dumps(given["body"], ensure_ascii=False).encode()
            return Line(given["custom_id"], body, bool(given["body"].get("stream")))
    return None


def looked_through(path: Path, endpoint: str, most: int) -> tuple[int, str | None, list[dict[str, Any]]]:
    """How many requests a file has, their model if it is the same, and what is wrong with it."""
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    models: set[Any] = set()
    total = 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(most + 1):
            number += 1
            long = len(line) > most
            while len(line) > most and not line.endswith(b"\n"):
                line = file.readline(most + 1) or b"\n"
            if not long and not line.strip():
                continue
            total += 1
            if len(errors) >= MOST_ERRORS:
                break
            if total > MOST_LINES:
                errors.append(fault("too_many_requests", f"a batch has {MOST_LINES:,} requests at most", number))
                break
            if long:
                errors.append(fault("line_too_large", f"the line is larger than {most:,} bytes", number))
                continue
            why = _wrong(line, endpoint, seen, models)
            if why is not None:
                errors.append(fault(*why[:2], number, why[2]))
    if not total:
        errors.append(fault("empty_file", "the input file has no requests"))
    model = models.pop() if len(models) == 1 else None
    return total, model if isinstance(model, str) else None, errors


def _wrong(line: bytes, endpoint: str, seen: set[str], models: set[Any]) -> tuple[str, str, str | None] | None:
    """Code, message and field of what is wrong with a line."""
    try:
        given = strict_json(line)
    except HerdError as error:
        return "invalid_json_line", str(error), None
    if not isinstance(given, dict):
        return "invalid_json_line", "the line is no object", None
    for name in given:
        if name not in ("custom_id", "method", "url", "body"):
            return "unknown_parameter", f"unknown field: {name[:80]!a}", name[:80]
    id = given.get("custom_id")
    if not isinstance(id, str) or not 0 < len(id) <= 512:
        return "invalid_custom_id", "custom_id is a text of 1 to 512 characters", "custom_id"
    if id in seen:
        return "duplicate_custom_id", f"custom_id {id[:80]!a} was there before", "custom_id"
    seen.add(id)
    if given.get("method") != "POST":
        return "invalid_method", "method is 'POST'", "method"
    if given.get("url") != endpoint:
        return "mismatched_url", f"url is that of the batch, {endpoint}", "url"
    if not isinstance(given.get("body"), dict):
        return "invalid_body", "body is an object", "body"
    model = given["body"].get("model")
    models.add(model if isinstance(model, str) else None)
    return None


def fault(code: str, message: str, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": param}


def written(told: dict[str, Any]) -> bytes:
    """A line of an output. The body of an answer is that of the route, still to be read."""
    response = told["response"]
    if response is not None and isinstance(response["body"], bytes):
        told = told | {"response": response | {"body": json.loads(response["body"])}}
    return json.dumps(told, ensure_ascii=False).encode() + b"\n"


def put(file: BinaryIO, line: bytes) -> None:
    """Append a line. Raises OSError, and nothing follows what may be half a line."""
    if file.closed:
        raise OSError(errno.EIO, "closed after an error")
    try:
        _append(file, line)
    except OSError:
        with contextlib.suppress(OSError):
            file.close()
        raise


def _append(file: BinaryIO, line: bytes) -> None:
    file.write(line)
    file.flush()


def answered(output: Path, errors: Path) -> tuple[set[str], int, int]:
    """The requests that have lines in these files, and how many of each. A line that was cut off is removed."""
    done: set[str] = set()
    counts = []
    for path in (output, errors):
        count = whole = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    try:
                        id = json.loads(line)["custom_id"] if line.endswith(b"\n") else None
                    except ValueError:
                        id = None
                    if id is None:
                        break
                    done.add(id)
                    whole += len(line)
                    count += 1
            with path.open("r+b") as file:
                file.truncate(whole)
        counts.append(count)
    return done, counts[0], counts[1]


def usage_of(output: Path) -> dict[str, Any]:
    """The tokens of all answers together."""
    given = cached = made = 0
    if output.exists():
        with output.open("rb") as file:
            for line in file:
                told = json.loads(line)["response"]["body"].get("usage") or {}
                given += told.get("prompt_tokens", told.get("input_tokens", 0))
                made += told.get("completion_tokens", told.get("output_tokens", 0))
                details = told.get("prompt_tokens_details") or told.get("input_tokens_details") or {}
                cached += details.get("cached_tokens", 0)
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": given + made,
    }

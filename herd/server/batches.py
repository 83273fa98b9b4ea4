"""Batches: requests in a file, run beside everything else, their answers in files. No torch.

Every request goes to the route that a client's would. Answers are appended to files as they come, so a server
that is started again goes on with what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from herd.errors import HerdError
from herd.server.caller import Caller, calling
from herd.server.errors import ApiError, api_error, error_body
from herd.server.filestore import Files, Kept, write_json
from herd.server.jsonbody import strict_json
from herd.server.state import new_id
from herd.server.stored import OWNER

__all__ = ["Batch", "Batches", "Handler", "running"]

Handler = Callable[[Request], Awaitable[Response]]

log = logging.getLogger("herd.server")
DAY = 86_400
PARALLEL = 8
"""Requests of all batches together that run at once: clients who wait come first."""
MOST_LINES, MOST_ERRORS = 50_000, 100
TRIES = 5
"""How often a request is tried whose model was not to be had (503). A full queue (429) is waited for."""
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(slots=True)
class Batch:
    """A batch as it is kept. The ids of its files are chosen when it is made, so ending it twice makes no second file."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    output_id: str
    error_id: str
    output_expires_after: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    status: str = "validating"
    times: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    completed: int = 0
    failed: int = 0
    late: bool = False
    model: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    usage: dict[str, Any] | None = None

    def shown(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        times = {
            f"{name}_at": self.times.get(name)
            for name in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        }
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **times,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
            "model": self.model,
            "usage": self.usage,
        }

    def reach(self, status: str) -> None:
        """Take a status."""
        self.status = status
        self.times[status] = int(time.time())


class Batches:
    """All batches of a server, kept below `folder`. `handlers` are the routes that requests may go to."""

    def __init__(self, app: FastAPI, files: Files, folder: Path, handlers: Mapping[str, Handler]) -> None:
        self._app, self._files, self._folder, self._handlers = app, files, folder / "batches", handlers
        self._folder.mkdir(parents=True, exist_ok=True)
        self._turns = asyncio.Semaphore(PARALLEL)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._batches: dict[str, Batch] = {}
        for path in sorted(self._folder.glob("batch_*.json")):
            try:
                found = Batch(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                log.error("the batch %s cannot be read and is left alone: %s", path.name, error)
                continue
            self._batches[found.id] = found

    def resume(self) -> None:
        """Go on with what has not ended."""
        for batch in self._batches.values():
            if batch.status not in ENDED:
                self._begin(batch)

    async def close(self) -> None:
        """Stop; what is missing comes when a server has the folder again."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def create(self, owner: str, source: Kept, endpoint: str, metadata: dict[str, str], keep: int | None) -> Batch:
        """A new batch, which begins at once."""
        now = int(time.time())
        ids = (new_id("file-"), new_id("file-"))
        batch = Batch(new_id("batch_"), owner, endpoint, source.id, now, now + DAY, *ids, keep, metadata)
        self._batches[batch.id] = batch
        self._save(batch)
        self._begin(batch)
        return batch

    def find(self, id: str, owner: str) -> Batch:
        """The batch `id` of `owner`. Raises ApiError (404)."""
        found = self._batches.get(id)
        if found is None or found.owner != owner:
            raise ApiError(404, f"there is no batch {id[:80]!a}")
        return found

    def every(self, owner: str) -> list[Batch]:
        """All of `owner`, the newest first."""
        return sorted((one for one in self._batches.values() if one.owner == owner), key=lambda one: -one.created_at)

    def reader_of(self, file: str) -> str | None:
        """A batch that still reads `file`."""
        return next((b.id for b in self._batches.values() if b.input_file_id == file and b.status not in ENDED), None)

    def cancel(self, batch: Batch) -> None:
        """End a batch; what was answered is kept. Raises ApiError (409) when it has ended."""
        if batch.status in ENDED:
            raise ApiError(409, f"{batch.id} is {batch.status}: there is nothing to cancel", code="invalid_value")
        if batch.status not in ("cancelling", "finalizing"):
            batch.reach("cancelling")
            self._save(batch)
            if (task := self._tasks.get(batch.id)) is not None:
                task.cancel()

    def _begin(self, batch: Batch) -> None:
        task = asyncio.create_task(self._run(batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch.id, None))

    def _save(self, batch: Batch) -> None:
        write_json(self._folder / f"{batch.id}.json", asdict(batch))

    def _path(self, batch: Batch, what: str) -> Path:
        return self._folder / f"{batch.id}.{what}.jsonl"

    async def _run(self, batch: Batch) -> None:
        try:
            try:
                if batch.status == "validating" and not await self._valid(batch):
                    return
                if batch.status == "in_progress":
                    await self._answer(batch)
            except asyncio.CancelledError:
                if batch.status != "cancelling":
                    raise  # the server ends
                current = asyncio.current_task()
                assert current is not None
                current.uncancel()
            await self._finish(batch)
        except ApiError as error:  # its input was deleted
            batch.errors.append(_error("invalid_file", str(error)))
            batch.reach("failed")
            self._save(batch)
        except Exception:
            log.exception("batch %s", batch.id)
            batch.errors.append(_error("internal_error", "this is a bug in herd: the server's log says more"))
            batch.reach("failed")
            self._save(batch)

    async def _valid(self, batch: Batch) -> bool:
        """Look at every line; whether they can be run."""
        try:
            source = self._files.find(batch.input_file_id, batch.owner)
            path = self._files.path(source)
            batch.total, batch.model, batch.errors = await asyncio.to_thread(_checked, path, batch.endpoint)
        except (ApiError, OSError) as error:
            batch.errors = [_error("invalid_file", f"the input file cannot be read: {error}")]
        if batch.status == "cancelling":
            return True
        batch.reach("failed" if batch.errors else "in_progress")
        self._save(batch)
        return not batch.errors

    async def _answer(self, batch: Batch) -> None:
        """Run what has no answer yet."""
        paths = [self._path(batch, what) for what in ("output", "errors")]
        done, batch.completed, batch.failed = await asyncio.to_thread(_answered, *paths)
        source = self._files.path(self._files.find(batch.input_file_id, batch.owner))
        waiting: set[asyncio.Task[None]] = set()
        with paths[0].open("ab") as output, paths[1].open("ab") as errors:
            try:
                for line in _lines(source):
                    if line["custom_id"] in done:
                        continue
                    while len(waiting) >= PARALLEL:
                        ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                        for task in ended:
                            task.result()
                    waiting.add(asyncio.create_task(self._one(batch, line, output, errors)))
                for task in list(waiting):
                    await task
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    async def _one(self, batch: Batch, line: dict[str, Any], output: BinaryIO, errors: BinaryIO) -> None:
        """One request and its line of the output."""
        told: dict[str, Any] = {"id": new_id("batch_req_"), "custom_id": line["custom_id"]}
        request_id = new_id("req_")
        left = batch.expires_at - time.time()
        try:
            async with asyncio.timeout(max(0.0, left)), self._turns:
                status, body = await self._sent(batch, line["body"], request_id)
        except TimeoutError:
            failure = {"code": "batch_expired", "message": "the request did not run before the batch expired"}
            _append(errors, told | {"response": None, "error": failure})
            batch.failed, batch.late = batch.failed + 1, True
            return
        told["response"] = {"status_code": status, "request_id": request_id, "body": body}
        _append(output if status < 400 else errors, told | {"error": None})
        if status < 400:
            batch.completed += 1
        else:
            batch.failed += 1

    async def _sent(self, batch: Batch, body: dict[str, Any], request_id: str) -> tuple[int, Any]:
        """Status and body of the answer to a request. What could not be had is tried again."""
        tries = 0
        while True:
            try:
                with calling(Caller(batch.id, secret=batch.owner)):  # its rates and its share of caches
                    return await self._call(batch, body, request_id)
            except ApiError as error:
                tries += error.status == 503
                if self._app.state.herd.draining:
                    await asyncio.Event().wait()  # until the server ends; the next one runs it
                if error.status not in (429, 503) or tries > TRIES:
                    return error.status, error_body(error, "openai")
                await asyncio.sleep(error.retry_after or 1.0)

    async def _call(self, batch: Batch, body: dict[str, Any], request_id: str) -> tuple[int, Any]:
        """The answer of the application's own route. Raises ApiError."""
        if body.get("stream"):
            return 400, error_body(ApiError(400, "stream: batches are not streamed", param="stream"), "openai")
        data: list[bytes] = [json.dumps(body).encode()]
        scope: dict[str, Any] = {
            "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": batch.endpoint,
            "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": None, "server": None,
            "app": self._app, "state": {}, OWNER: batch.owner,
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            if not data:
                await asyncio.Event().wait()  # this client never goes away
            return {"type": "http.request", "body": data.pop(), "more_body": False}

        try:
            with calling(Caller(request=request_id, secret=batch.owner)):  # and not whoever made the batch
                response = await self._handlers[batch.endpoint](Request(scope, receive))
        except HerdError as error:
            raise api_error(error) from None
        except Exception as error:
            log.exception("a request of batch %s", batch.id)
            raise api_error(error) from None
        return response.status_code, json.loads(bytes(response.body))

    async def _finish(self, batch: Batch) -> None:
        """Make files of what there is."""
        cancelled = batch.status == "cancelling"
        if not cancelled:
            batch.reach("finalizing")
        output, errors = self._path(batch, "output"), self._path(batch, "errors")
        _, batch.completed, batch.failed = await asyncio.to_thread(_answered, output, errors)
        batch.usage = await asyncio.to_thread(_usage, output)
        batch.output_file_id = await asyncio.to_thread(self._keep, batch, output, batch.output_id)
        batch.error_file_id = await asyncio.to_thread(self._keep, batch, errors, batch.error_id)
        batch.reach("cancelled" if cancelled else "expired" if batch.late else "completed")
        self._save(batch)
        output.unlink(missing_ok=True)
        errors.unlink(missing_ok=True)

    def _keep(self, batch: Batch, path: Path, id: str) -> str | None:
        if not path.exists() or not path.stat().st_size:
            return None
        with contextlib.suppress(ApiError), path.open("rb") as source:
            name = f"{batch.id}_{path.name.split('.')[1]}.jsonl"
            # What was computed is kept, even where it is more than clients may upload.
            self._files.add(source, batch.owner, name, "batch_output", batch.output_expires_after, id=id, check=False)
        return id


@contextlib.asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[None]:
    """The files and batches of a server that was given a folder for them, as `app.state.files` and `app.state.batches`."""
    from herd.server.openai import HANDLERS  # they know this module

    settings = app.state.herd.settings
    if settings.state_dir is None:
        yield
        return
    folder = Path(settings.state_dir)
    files = await asyncio.to_thread(Files, folder, settings.max_files)
    try:
        app.state.files, app.state.batches = files, Batches(app, files, folder, HANDLERS)
        app.state.batches.resume()
        try:
            yield
        finally:
            await app.state.batches.close()
    finally:
        files.close()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield strict_json(line)


def _checked(path: Path, endpoint: str) -> tuple[int, str | None, list[dict[str, Any]]]:
    """How many requests a file has, their model if it is the same, and what is wrong with it."""
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    models: set[Any] = set()
    total = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            total += 1
            if len(errors) >= MOST_ERRORS:
                break
            if total > MOST_LINES:
                errors.append(_error("too_many_requests", f"a batch has {MOST_LINES:,} requests at most", number))
                break
            why = _wrong(line, endpoint, seen, models)
            if why is not None:
                errors.append(_error(*why[:2], number, why[2]))
    if not total:
        errors.append(_error("empty_file", "the input file has no requests"))
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


def _error(code: str, message: str, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": param}


def _append(file: BinaryIO, told: dict[str, Any]) -> None:
    file.write(json.dumps(told, ensure_ascii=False).encode() + b"\n")
    file.flush()


def _answered(output: Path, errors: Path) -> tuple[set[str], int, int]:
    """The requests that have lines in these files, and how many of each. A line that was cut off is removed."""
    done: set[str] = set()
    counts = []
    for path in (output, errors):
        count = whole = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    done.add(json.loads(line)["custom_id"])
                    whole += len(line)
                    count += 1
            with path.open("r+b") as file:
                file.truncate(whole)
        counts.append(count)
    return done, counts[0], counts[1]


def _usage(output: Path) -> dict[str, Any]:
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

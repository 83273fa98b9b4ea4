"""Batches: requests in a file, run beside everything else, their answers in files. No torch.

Every request goes to the route that a client's would. Answers are appended to files as they come, so a server
that is started again goes on with what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
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
MOST_ACTIVE, MOST_KEPT = 100, 10_000
"""Batches of one owner that have not ended, and all of them: the ones that ended first are forgotten (their files stay)."""
OPEN = PARALLEL
"""Batches that have their files open. More would only wait for each other."""
DISK_SECONDS = 30.0
"""After how long a batch tries again whose disk took nothing more."""
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


@dataclass(slots=True)
class _Batched(Caller):
    """Who sends the requests of a batch: its key's share of caches, and no key's rates."""

    @property
    def account(self) -> str:
        return "batches"  # nobody's: what is spent here keeps nothing from anyone


class Batches:
    """All batches of a server, kept below `folder`. `handlers` are the routes that requests may go to."""

    def __init__(self, app: FastAPI, files: Files, folder: Path, handlers: Mapping[str, Handler]) -> None:
        self._app, self._files, self._folder, self._handlers = app, files, folder / "batches", handlers
        self._folder.mkdir(parents=True, exist_ok=True)
        self._turns, self._open = asyncio.Semaphore(PARALLEL), asyncio.Semaphore(OPEN)
        self._closing = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._batches: dict[str, Batch] = {}
        for path in sorted(self._folder.glob("batch_*.json")):
            try:
                found = Batch(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                log.error("the batch %s cannot be read and is left alone: %s", path.name, error)
                continue
            self._batches[found.id] = found
            if found.status not in ENDED:
                files.hold(found.input_file_id)

    def resume(self) -> None:
        """Go on with what has not ended."""
        for batch in self._batches.values():
            if batch.status not in ENDED:
                self._begin(batch)

    async def close(self) -> None:
        """Stop; what is missing comes when a server has the folder again."""
        self._closing = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def create(self, owner: str, source: Kept, endpoint: str, metadata: dict[str, str], keep: int | None) -> Batch:
        """A new batch, which begins at once. Raises ApiError (429, 507)."""
        active = sum(one.owner == owner and one.status not in ENDED for one in self._batches.values())
        if active >= MOST_ACTIVE:
            what = f"{active} batches have not ended, which is all that may at once: wait, or cancel some"
            raise ApiError(429, what, code="rate_limit_exceeded", retry_after=60)
        now = int(time.time())
        ids = (new_id("file-"), new_id("file-"))
        batch = Batch(new_id("batch_"), owner, endpoint, source.id, now, now + DAY, *ids, keep, metadata)
        try:
            self._save(batch)
        except OSError as error:
            what = f"the batch cannot be kept: {error.strerror or error}"
            raise ApiError(507, what, code="storage_full") from None
        self._batches[batch.id] = batch
        self._files.hold(source.id)
        self._begin(batch)
        self._forget(owner)
        return batch

    def _forget(self, owner: str) -> None:
        """What ended longest ago, when too many are kept."""
        mine = [one for one in self._batches.values() if one.owner == owner]
        ended = sorted((one for one in mine if one.status in ENDED), key=lambda one: one.created_at)
        for one in ended[: max(0, len(mine) - MOST_KEPT)]:
            del self._batches[one.id]
            with contextlib.suppress(OSError):
                (self._folder / f"{one.id}.json").unlink(missing_ok=True)

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
            if (task := self._tasks.get(batch.id)) is not None:
                task.cancel()
            try:
                self._save(batch)
            except OSError as error:
                log.error("batch %s: that it is cancelled cannot be written yet: %s", batch.id, error.strerror)

    def _begin(self, batch: Batch) -> None:
        task = asyncio.create_task(self._run(batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch.id, None))

    def _save(self, batch: Batch) -> None:
        write_json(self._folder / f"{batch.id}.json", asdict(batch))

    def _path(self, batch: Batch, what: str) -> Path:
        return self._folder / f"{batch.id}.{what}.jsonl"

    async def _run(self, batch: Batch) -> None:
        """Bring a batch to its end. While the disk takes nothing it waits, and nothing that was answered is lost."""
        while True:
            try:
                async with contextlib.nullcontext() if batch.status == "cancelling" else self._open:
                    await self._go(batch)
            except asyncio.CancelledError:
                self._uncancel(batch)
            except OSError as error:
                log.error("batch %s waits, for its folder cannot be used: %s", batch.id, error.strerror or error)
                if self._closing:
                    return
                try:
                    await asyncio.sleep(DISK_SECONDS)
                except asyncio.CancelledError:
                    self._uncancel(batch)
            if batch.status in ENDED:
                self._files.release(batch.input_file_id)
                return

    def _uncancel(self, batch: Batch) -> None:
        """A client's cancelling is taken note of; CancelledError goes on when it is the server that ends."""
        current = asyncio.current_task()
        assert current is not None
        if self._closing or batch.status != "cancelling":
            raise asyncio.CancelledError
        current.uncancel()

    async def _go(self, batch: Batch) -> None:
        try:
            if batch.status == "validating":
                await self._valid(batch)
            if batch.status == "in_progress":
                await self._answer(batch)
            if batch.status not in ENDED:
                await self._finish(batch)
        except OSError:
            raise
        except Exception as error:
            if isinstance(error, ApiError):  # its input is gone
                batch.errors = [_error("invalid_file", str(error))]
            else:
                log.exception("batch %s", batch.id)
                batch.errors = [_error("internal_error", "this is a bug in herd: the server's log says more")]
            try:
                await self._finish(batch, "failed")
            except OSError:
                raise
            except Exception:
                log.exception("the files of batch %s", batch.id)
                self._end(batch, "failed")

    async def _valid(self, batch: Batch) -> None:
        """Look at every line, whether they can be run."""
        most = self._app.state.herd.settings.max_body
        try:
            path = self._files.path(self._files.find(batch.input_file_id, batch.owner))
            batch.total, batch.model, batch.errors = await asyncio.to_thread(_checked, path, batch.endpoint, most)
        except (ApiError, FileNotFoundError) as error:
            what = error.message if isinstance(error, ApiError) else error.strerror
            batch.errors = [_error("invalid_file", f"the input file cannot be read: {what}")]
        if batch.errors:
            self._end(batch, "failed")
        else:
            batch.reach("in_progress")

    async def _answer(self, batch: Batch) -> None:
        """Run what has no answer yet."""
        self._save(batch)  # a disk that is full is found before anything is run
        paths = [self._path(batch, what) for what in ("output", "errors")]
        done, batch.completed, batch.failed = await asyncio.to_thread(_answered, *paths)
        source = self._files.path(self._files.find(batch.input_file_id, batch.owner))
        if not source.exists():
            raise ApiError(404, f"the file {batch.input_file_id} is gone")
        waiting: set[asyncio.Task[None]] = set()
        with source.open("rb") as file, paths[0].open("ab") as output, paths[1].open("ab") as errors:
            try:
                while (line := await asyncio.to_thread(_next, file, done)) is not None:
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

    async def _one(self, batch: Batch, line: _Line, output: BinaryIO, errors: BinaryIO) -> None:
        """One request and its line of the output."""
        told: dict[str, Any] = {"id": new_id("batch_req_"), "custom_id": line.id}
        request_id = new_id("req_")
        left = batch.expires_at - time.time()
        try:
            async with asyncio.timeout(max(0.0, left)), self._turns:
                status, body = await self._sent(batch, line, request_id)
        except TimeoutError:
            failure = {"code": "batch_expired", "message": "the request did not run before the batch expired"}
            _put(errors, _written(told | {"response": None, "error": failure}))
            batch.failed, batch.late = batch.failed + 1, True
            return
        told["response"] = {"status_code": status, "request_id": request_id, "body": body}
        written = await asyncio.to_thread(_written, told | {"error": None})
        _put(output if status < 400 else errors, written)
        if status < 400:
            batch.completed += 1
        else:
            batch.failed += 1

    async def _sent(self, batch: Batch, line: _Line, request_id: str) -> tuple[int, Any]:
        """Status and body of the answer to a request. What could not be had is tried again."""
        tries = 0
        while True:
            try:
                return await self._call(batch, line, request_id)
            except ApiError as error:
                tries += error.status == 503
                if self._app.state.herd.draining:
                    await asyncio.Event().wait()  # until the server ends; the next one runs it
                if error.status not in (429, 503) or tries > TRIES:
                    return error.status, error_body(error, "openai")
                await asyncio.sleep(error.retry_after or 1.0)

    async def _call(self, batch: Batch, line: _Line, request_id: str) -> tuple[int, Any]:
        """The answer of the application's own route, its body as it was sent. Raises ApiError."""
        if line.stream:
            return 400, error_body(ApiError(400, "stream: batches are not streamed", param="stream"), "openai")
        data: list[bytes] = [line.body]
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
            with calling(_Batched(request=request_id, secret=batch.owner)):  # and not whoever made the batch
                response = await self._handlers[batch.endpoint](Request(scope, receive))
        except HerdError as error:
            raise api_error(error) from None
        except Exception as error:
            log.exception("a request of batch %s", batch.id)
            raise api_error(error) from None
        return response.status_code, bytes(response.body)

    async def _finish(self, batch: Batch, status: str | None = None) -> None:
        """Make files of what there is, and end (with `status`). Raises OSError, and it has not ended."""
        cancelled = batch.status == "cancelling"
        if not cancelled and status is None and batch.status != "finalizing":
            batch.reach("finalizing")
        output, errors = self._path(batch, "output"), self._path(batch, "errors")
        _, batch.completed, batch.failed = await asyncio.to_thread(_answered, output, errors)
        batch.usage = await asyncio.to_thread(_usage, output)
        batch.output_file_id = await asyncio.to_thread(self._keep, batch, output, batch.output_id)
        batch.error_file_id = await asyncio.to_thread(self._keep, batch, errors, batch.error_id)
        self._end(batch, status or ("cancelled" if cancelled else "expired" if batch.late else "completed"))
        for path in (output, errors):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _end(self, batch: Batch, status: str) -> None:
        """Take a last status, which is written before it is seen. Raises OSError."""
        ended = replace(batch, times=dict(batch.times))
        ended.reach(status)
        self._save(ended)
        batch.status, batch.times = ended.status, ended.times

    def _keep(self, batch: Batch, path: Path, id: str) -> str | None:
        if not path.exists() or not path.stat().st_size:
            return None
        name = f"{batch.id}_{path.name.split('.')[1]}.jsonl"
        # What was computed is kept, even where it is more than clients may upload.
        self._files.adopt(path, id, batch.owner, name, "batch_output", batch.output_expires_after)
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


@dataclass(frozen=True, slots=True)
class _Line:
    """A request: its custom_id, and its body as it is sent."""

    id: str
    body: bytes
    stream: bool


def _next(file: BinaryIO, done: set[str]) -> _Line | None:
    """The next request that is not `done`."""
    for line in file:
        if line.strip() and (given := strict_json(line))["custom_id"] not in done:
            body = json.dumps(given["body"], ensure_ascii=False).encode()
            return _Line(given["custom_id"], body, bool(given["body"].get("stream")))
    return None


def _checked(path: Path, endpoint: str, most: int) -> tuple[int, str | None, list[dict[str, Any]]]:
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
                errors.append(_error("too_many_requests", f"a batch has {MOST_LINES:,} requests at most", number))
                break
            if long:
                errors.append(_error("line_too_large", f"the line is larger than {most:,} bytes", number))
                continue
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


def _written(told: dict[str, Any]) -> bytes:
    """A line of an output. The body of an answer is that of the route, still to be read."""
    response = told["response"]
    if response is not None and isinstance(response["body"], bytes):
        told = told | {"response": response | {"body": json.loads(response["body"])}}
    return json.dumps(told, ensure_ascii=False).encode() + b"\n"


def _put(file: BinaryIO, line: bytes) -> None:
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


def _answered(output: Path, errors: Path) -> tuple[set[str], int, int]:
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

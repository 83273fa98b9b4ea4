"""Batches: requests in a file, run beside everything else, their answers in files. No torch.

Every request goes to the route that a client's would. Answers are appended to files as they come, so a server
that is started again goes on with what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from herd.errors import HerdError
from herd.server.batchlines import Line, answered, fault, following, looked_through, put, usage_of, written
from herd.server.batchstore import ENDED, Batch, BatchStore
from herd.server.caller import Caller, calling
from herd.server.errors import ApiError, api_error, error_body
from herd.server.filestore import Files, Kept
from herd.server.state import new_id
from herd.server.stored import OWNER

__all__ = ["Batches", "Handler", "running"]

Handler = Callable[[Request], Awaitable[Response]]

log = logging.getLogger("herd.server")
PARALLEL = 8
"""Requests of all batches together that run at once: clients who wait come first."""
TRIES = 5
"""How often a request is tried whose model was not to be had (503). A full queue (429) is waited for."""
OPEN = PARALLEL
"""Batches that have their files open. More would only wait for each other."""
DISK_SECONDS = 30.0
"""After how long a batch tries again whose disk took nothing more."""


@dataclass(slots=True)
class _Batched(Caller):
    """Who sends the requests of a batch: its key's share of caches, and no key's rates."""

    @property
    def account(self) -> str:
        return "batches"  # nobody's: what is spent here keeps nothing from anyone


class Batches:
    """Runs the batches of a server, kept below `folder`. `handlers` are the routes that requests may go to."""

    def __init__(self, app: FastAPI, files: Files, folder: Path, handlers: Mapping[str, Handler]) -> None:
        self._app, self._files, self._handlers = app, files, handlers
        self.store = BatchStore(folder / "batches")
        self._turns, self._open = asyncio.Semaphore(PARALLEL), asyncio.Semaphore(OPEN)
        self._closing = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        for batch in self.store.active():
            files.hold(batch.input_file_id)

    def resume(self) -> None:
        """Go on with what has not ended."""
        for batch in self.store.active():
            self._begin(batch)

    async def close(self) -> None:
        """Stop; what is missing comes when a server has the folder again."""
        self._closing = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def create(self, owner: str, source: Kept, endpoint: str, metadata: dict[str, str], keep: int | None) -> Batch:
        """A new batch, which begins at once. Raises ApiError (429, 507)."""
        batch = self.store.add(owner, source.id, endpoint, metadata, keep)
        self._files.hold(source.id)
        self._begin(batch)
        return batch

    def cancel(self, batch: Batch) -> None:
        """End a batch; what was answered is kept. Raises ApiError (409) when it has ended."""
        if batch.status in ENDED:
            raise ApiError(409, f"{batch.id} is {batch.status}: there is nothing to cancel", code="invalid_value")
        if batch.status not in ("cancelling", "finalizing"):
            batch.reach("cancelling")
            if (task := self._tasks.get(batch.id)) is not None:
                task.cancel()
            try:
                self.store.save(batch)
            except OSError as error:
                log.error("batch %s: that it is cancelled cannot be written yet: %s", batch.id, error.strerror)

    def _begin(self, batch: Batch) -> None:
        task = asyncio.create_task(self._run(batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch.id, None))

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
                batch.errors = [fault("invalid_file", str(error))]
            else:
                log.exception("batch %s", batch.id)
                batch.errors = [fault("internal_error", "this is a bug in herd: the server's log says more")]
            try:
                await self._finish(batch, "failed")
            except OSError:
                raise
            except Exception:
                log.exception("the files of batch %s", batch.id)
                self.store.end(batch, "failed")

    async def _valid(self, batch: Batch) -> None:
        """Look at every line, whether they can be run."""
        most = self._app.state.herd.settings.max_body
        try:
            path = self._files.path(self._files.find(batch.input_file_id, batch.owner))
            batch.total, batch.model, batch.errors = await asyncio.to_thread(looked_through, path, batch.endpoint, most)
        except (ApiError, FileNotFoundError) as error:
            what = error.message if isinstance(error, ApiError) else error.strerror
            batch.errors = [fault("invalid_file", f"the input file cannot be read: {what}")]
        if batch.errors:
            self.store.end(batch, "failed")
        else:
            batch.reach("in_progress")

    async def _answer(self, batch: Batch) -> None:
        """Run what has no answer yet."""
        self.store.save(batch)  # a disk that is full is found before anything is run
        paths = [self.store.path(batch, what) for what in ("output", "errors")]
        done, batch.completed, batch.failed = await asyncio.to_thread(answered, *paths)
        source = self._files.path(self._files.find(batch.input_file_id, batch.owner))
        if not source.exists():
            raise ApiError(404, f"the file {batch.input_file_id} is gone")
        waiting: set[asyncio.Task[None]] = set()
        with source.open("rb") as file, paths[0].open("ab") as output, paths[1].open("ab") as errors:
            try:
                while (line := await asyncio.to_thread(following, file, done)) is not None:
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

    async def _one(self, batch: Batch, line: Line, output: BinaryIO, errors: BinaryIO) -> None:
        """One request and its line of the output."""
        told: dict[str, Any] = {"id": new_id("batch_req_"), "custom_id": line.id}
        request_id = new_id("req_")
        left = batch.expires_at - time.time()
        try:
            async with asyncio.timeout(max(0.0, left)), self._turns:
                status, body = await self._sent(batch, line, request_id)
        except TimeoutError:
            failure = {"code": "batch_expired", "message": "the request did not run before the batch expired"}
            put(errors, written(told | {"response": None, "error": failure}))
            batch.failed, batch.late = batch.failed + 1, True
            return
        told["response"] = {"status_code": status, "request_id": request_id, "body": body}
        line_out = await asyncio.to_thread(written, told | {"error": None})
        put(output if status < 400 else errors, line_out)
        if status < 400:
            batch.completed += 1
        else:
            batch.failed += 1

    async def _sent(self, batch: Batch, line: Line, request_id: str) -> tuple[int, Any]:
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

    async def _call(self, batch: Batch, line: Line, request_id: str) -> tuple[int, Any]:
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

        who = _Batched(request=request_id, secret=batch.owner)  # and not whoever made the batch
        try:
            with calling(who):
                response = await self._handlers[batch.endpoint](Request(scope, receive))
        except HerdError as error:
            raise api_error(error) from None
        except Exception as error:
            log.exception("a request of batch %s", batch.id)
            raise api_error(error) from None
        finally:
            self._app.state.herd.counts.bodies -= who.fetched
        return response.status_code, bytes(response.body)

    async def _finish(self, batch: Batch, status: str | None = None) -> None:
        """Make files of what there is, and end (with `status`). Raises OSError, and it has not ended."""
        cancelled = batch.status == "cancelling"
        if not cancelled and status is None and batch.status != "finalizing":
            batch.reach("finalizing")
        output, errors = self.store.path(batch, "output"), self.store.path(batch, "errors")
        _, batch.completed, batch.failed = await asyncio.to_thread(answered, output, errors)
        batch.usage = await asyncio.to_thread(usage_of, output)
        batch.output_file_id = await asyncio.to_thread(self._keep, batch, output, batch.output_id)
        batch.error_file_id = await asyncio.to_thread(self._keep, batch, errors, batch.error_id)
        self.store.end(batch, status or ("cancelled" if cancelled else "expired" if batch.late else "completed"))
        for path in (output, errors):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

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

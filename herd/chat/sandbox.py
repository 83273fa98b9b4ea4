"""Running chat templates from elsewhere: always in another process, which is killed when it takes too long. No torch, no Jinja.

A template is a program that came with a download. Jinja's own sandbox keeps it from Python's internals, but not from using up
time and memory, and already compiling one can take minutes (constants are computed then). So nothing of a template is parsed,
compiled or run here: `herd.chat.jinja_child` does it, in a process without rights.

| limit                 | Linux     | macOS | Windows |
|-----------------------|-----------|-------|---------|
| wall clock            | yes       | yes   | yes     |
| 256 MiB of memory     | yes       | no    | no      |
| processor time        | yes       | yes   | no      |
| no files, no sockets  | yes       | yes   | no      |
| no other system calls | yes (x86-64, arm64) | no | no |

`Sandbox.limits` says which of them hold.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from herd.errors import PromptError

__all__ = ["MAX_SOURCE", "VARIABLES", "WALL_SECONDS", "Outcome", "Sandbox"]

WALL_SECONDS = 0.5
"""A template that takes longer is stopped. Released ones take a few milliseconds."""

MAX_SOURCE = 256 * 1024
"""Characters of a template. Released ones have up to about ten thousand."""

MAX_REPLY = 64 * 2**20
START_SECONDS = 30.0
RETIRE_CPU = 5.0
"""Seconds of processor time after which a child is replaced: it may use 10 in all."""

VARIABLES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt"),
        *("bos_token", "eos_token", "unk_token", "pad_token"),
        *("date_string", "tools_in_user_message", "builtin_tools", "custom_tools"),
        *("categories", "excluded_category_keys", "enable_thinking"),
    }
)
"""Names of what a template may be given. Others are refused, so that a request cannot set what the caller decides."""

Kind = Literal["text", "raised", "failed", "broken", "refused", "stopped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a template. `kind` is

    text: it wrote `text`. raised: it called raise_exception. failed: it made an error (a name that is not there). broken: it is
    not a Jinja template. refused: it does what no chat template needs; `node` says what. stopped: it took too long or died.

    `message` explains every kind but text; `line` is the template's line, where known.
    """

    kind: Kind
    text: str = ""
    message: str = ""
    node: str = ""
    line: int | None = None

    def explain(self) -> str:
        """One line for people: what happened, and where."""
        where = f"line {self.line}: " if self.line is not None else ""
        what = f"{self.node}: " if self.node else ""
        return f"{where}{what}{self.message}"


class Sandbox:
    """One process that runs templates, one after another; it starts with the first and is replaced when it was stopped.

    Calls from several threads wait for each other. They block without holding Python's lock, so an event loop stays
    responsive when it calls through `asyncio.to_thread`. Use as a context manager, or call `close`.
    """

    def __init__(self, *, wall_seconds: float = WALL_SECONDS) -> None:
        self.wall_seconds = wall_seconds
        self.limits: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, source: str, variables: Mapping[str, Any], *, now: datetime | None = None) -> Outcome:
        """What the template `source` makes of `variables` (names of VARIABLES, JSON values); `now` is its date.

        Raises PromptError for other names or values, and when no process can be started.
        """
        if unknown := sorted(set(variables) - VARIABLES):
            raise PromptError(
                f"a chat template is not given {unknown[0]!r}; it may have {', '.join(sorted(VARIABLES))}"
            )
        moment = now or datetime.now()
        return self._ask(
            source, {"variables": dict(variables), "now": [*moment.timetuple()[:6]]}, limit=self.wall_seconds
        )

    def check(self, source: str) -> Outcome:
        """The template checked and compiled, not run: kind text (and no text) when it may run."""
        return self._ask(source, {"variables": None}, limit=self.wall_seconds)

    def render(self, source: str, variables: Mapping[str, Any], *, now: datetime | None = None) -> str:
        """The text that the template writes; PromptError saying what happened when it writes none."""
        outcome = self.run(source, variables, now=now)
        if outcome.kind != "text":
            said = {
                "raised": "the chat template refuses this conversation",
                "failed": "the chat template makes an error",
                "broken": "the chat template is not a Jinja template",
                "refused": "the chat template does what templates may not do here",
                "stopped": "the chat template was stopped",
            }[outcome.kind]
            raise PromptError(f"{said}: {outcome.explain()}")
        return outcome.text

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    # ---- one request ----------------------------------------------------------------------------------------------

    def _ask(self, source: str, request: Mapping[str, Any], *, limit: float) -> Outcome:
        if len(source) > MAX_SOURCE:
            return Outcome(
                "refused", message=f"has {len(source):,} characters; a chat template has at most {MAX_SOURCE:,}"
            )
        try:
            body = json.dumps({"source": source, **request}, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(f"a chat template is given JSON values only ({error})") from error
        with self._lock:
            reply = self._exchange(body, limit)
            if reply is None:
                self._stop()
                return Outcome("stopped", message=f"took more than {limit:g} s or died, and was stopped")
            if float(reply.get("cpu", 0)) > RETIRE_CPU or reply["kind"] == "refused":
                self._stop()  # a process that met an attack is not used again
        return Outcome(
            reply["kind"],
            str(reply.get("text", "")),
            str(reply.get("message", "")),
            str(reply.get("node", "")),
            reply.get("line"),
        )

    def _exchange(self, body: bytes, limit: float) -> dict[str, Any] | None:
        """Send and receive within `limit` seconds; None when the process was stopped or died."""
        process = self._started()
        # A timer instead of select: pipes cannot be selected on Windows. Killing the child ends the blocking read.
        timer = threading.Timer(limit, process.kill)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdin is not None
            process.stdin.write(len(body).to_bytes(4, "little") + body)
            process.stdin.flush()
            return _receive(process)
        except OSError:
            return None
        finally:
            timer.cancel()
            timer.join()
            if process.poll() is not None:
                self._stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        child = Path(__file__).with_name("jinja_child.py")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(child), *_library_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"SYSTEMROOT": os.environ["SYSTEMROOT"]} if "SYSTEMROOT" in os.environ else {},
            start_new_session=True,  # Ctrl-C is for us
        )
        timer = threading.Timer(START_SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        hello = _receive(process)
        timer.cancel()
        timer.join()
        if hello is None:
            process.kill()
            _close(process)
            raise PromptError("the process that runs chat templates did not start: is jinja2 3.1.6 or newer installed?")
        self.limits = tuple(hello.get("limits", ()))
        self._process = process
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            _close(self._process)
            self._process = None


def _receive(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """One message; None when the pipe ends first or holds something else."""
    assert process.stdout is not None
    head = process.stdout.read(4)
    size = int.from_bytes(head, "little")
    if len(head) < 4 or size > MAX_REPLY:
        return None
    body = process.stdout.read(size)
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


def _library_folders() -> list[str]:
    """Where jinja2 and markupsafe lie, found without importing them."""
    folders: list[str] = []
    for name in ("jinja2", "markupsafe"):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise PromptError(f"chat templates need the package {name}: install it with `pip install jinja2`")
        folder = str(Path(found.origin).parent.parent)
        folders += [] if folder in folders else [folder]
    return folders

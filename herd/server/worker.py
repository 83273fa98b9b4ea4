"""The process of one model: `python -m herd.server.worker FD`, a socket that its parent made, and herd.LLM behind it.

The main thread reads; rendering, tokenizing and questions run in a few threads; the engine's thread steps, and writes the events
of a step together when it has passed them on (`herd.server.outbox`). When the socket closes the process ends at once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from herd import __version__
from herd.chat.model import Usage as EngineUsage
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.engine.choices import ChoicesSink, ChoiceStep
from herd.engine.completion import TokenLogprob
from herd.errors import ConfigError, ContextFullError, HerdError
from herd.server.asks import ASKS, rooms
from herd.server.outbox import Outbox
from herd.server.prepare import Prepared, Preparer
from herd.server.protocol import (
    DOWN,
    Answer,
    Ask,
    Beat,
    Began,
    Broken,
    Call,
    Cancel,
    Ended,
    Failed,
    Finished,
    Gone,
    Load,
    Piece,
    Progress,
    Ready,
    TokenInfo,
    Usage,
)
from herd.server.replies import Teller
from herd.server.wire import HEADER, split_header

if TYPE_CHECKING:
    from herd.engine.llm import LLM
    from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Worker", "main"]

THREADS = 4
"""Calls that are prepared and questions that are answered at once."""
NICE = 5
"""By how much threads that prepare calls stand back."""
BEAT_SECONDS = 1.0
SAYING_SECONDS = 0.5
"""What the last message gets to be written."""
NOTED = 200
"""Lines about a bug from which on its causes are left out."""
SHOWN_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
SWITCH_SECONDS = 0.0005
"""How long a thread may keep Python to itself while others wait: the engine's must not wait long for one that reads a prompt."""


class Worker:
    """Messages in from `connection`, events out to it, until it closes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._out = Outbox(connection, self._too_large, _unheard)
        self._work: dict[str, _Work] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="herd-call", initializer=_behind)
        self._llm: LLM | None = None
        self._preparer: Preparer | None = None

    def run(self) -> None:
        """Serve until the other side is gone."""
        self._out.start()
        with self._connection.makefile("rb") as file:
            while True:
                head = file.read(HEADER)
                if len(head) < HEADER:
                    return
                data = file.read(length := split_header(head))
                if len(data) < length:
                    return
                for message in DOWN.decode(data):
                    self._take(message)

    def send(self, message: Any) -> None:
        """Put a message on its way. From any thread."""
        self._out.put(message)
        self._out.flush()

    def say(self, message: Any) -> None:
        """Put a message on its way with the others of a step. In the engine's thread."""
        self._out.put(message)

    def _too_large(self, message: Any, size: int) -> Failed:
        """What is said instead of `message`; its call ends."""
        self._stop(message.call)
        return Failed(
            message.call, "ConfigError", f"the answer is larger than can be given ({size:,} bytes): ask for less"
        )

    def _take(self, message: Any) -> None:
        match message:
            case Load():
                threading.Thread(target=self._load, args=(message,), name="herd-load", daemon=True).start()
            case Call(id):
                self._work[id] = reading = _Reading(self, message)
                self._pool.submit(self._begin, reading)
            case Ask(id):
                self._work[id] = work = _Work(message)
                self._pool.submit(self._answer, work)
            case Cancel(id):
                if self._stop(id):
                    self.send(Gone(id))

    def _stop(self, id: str) -> bool:
        """Cancel a call or question; whether nobody is at it, who would say Gone at its end."""
        work = self._work.pop(id, None)
        if work is None:
            return True
        idle = work.cancel()
        if isinstance(work, _Reading) and work.submitted and self._llm is not None:
            self._llm.abort(id)
        return idle

    def _load(self, load: Load) -> None:
        try:
            ready = self._opened(load)
        except Exception as error:
            if not isinstance(error, HerdError):
                _note("loading", error)
            self.send(Broken(type(error).__name__, _said(error)))
            return
        self.send(ready)
        while True:
            time.sleep(BEAT_SECONDS)
            assert self._llm is not None
            if (lost := self._llm.lost) is not None:  # the server starts the model anew
                self.send(Broken("Crashed", f"{lost}: the model is started anew when it is asked for"))
                time.sleep(SAYING_SECONDS)
                os._exit(1)
            self.send(Beat(asdict(self._llm.stats()) | {"device_memory": _device_memory(self._llm)}))

    def _opened(self, load: Load) -> Ready:
        self.send(Progress("starting"))
        open_store(resolve(load.source))  # headers only, and no torch: what is wrong with them is said at once
        import torch

        from herd.engine.config import SMALL
        from herd.engine.llm import LLM
        from herd.model.accounting import parameters

        last = 0.0

        def tick(done: int, total: int) -> None:
            nonlocal last
            share = done / total if total else 1.0
            if share - last >= 0.01:
                last = share
                self.send(Progress("reading weights", share))

        self.send(Progress("reading weights", 0.0))
        llm = LLM(load.source, **load.options, created=False, tick=tick)  # the server adds what was created
        if (
            "tensor_parallel" not in load.options
            and parameters(llm.config) <= SMALL
            and "OMP_NUM_THREADS" not in os.environ
        ):
            torch.set_num_threads(1)
        for name, path in load.adapters:
            self.send(Progress(f"loading adapter {name}"))
            llm.load_adapter(name, path)
        self._llm, self._preparer = llm, Preparer(llm)
        llm.after_steps(self._out.flush)
        ready = _ready(load, llm)
        gc.collect()
        gc.freeze()  # what a model consists of stays: looking through it again and again stops all replies for a moment
        return ready

    def _begin(self, reading: _Reading) -> None:
        """Prepare a call and hand it to the engine, unless it was cancelled meanwhile. In a thread of the pool."""
        call = reading.take()
        if call is None:
            return
        try:
            if self._llm is None or self._preparer is None:
                raise HerdError("the model is not loaded yet")
            prepared = self._preparer.prepared(call)
            reading.begin(prepared, self._llm.tokenizer)
            sink = ChoicesSink(prepared.request, prepared.builders, reading, self._llm.tokenizer.bytes_of)
            if reading.cancelled:
                return
            self._llm.begin(prepared.request, sink)
            # Whoever comes second of this and a Cancel sees what the first has written, so that one of them aborts.
            reading.submitted = True
            if reading.cancelled:
                self._llm.abort(call.id)
            # The engine may have been quicker: what it said meanwhile waits behind this.
            reading.open(
                Began(call.id, len(prepared.request.prompt), prepared.notes, prepared.truncated, prepared.prompt_text)
            )
        except Exception as error:
            reading.failed(error)
        finally:
            self._over(call.id, reading)

    def _answer(self, work: _Work) -> None:
        ask = work.take()
        if ask is None:
            return
        try:
            if self._llm is None:
                raise HerdError("the model is not loaded yet")
            if ask.what not in ASKS:
                raise ConfigError(f"there is no question {ask.what!r}")
            said: Any = Answer(ask.id, ASKS[ask.what](self._llm, **ask.args))
        except Exception as error:
            said = _failure(ask.id, error)
        if not work.cancelled:
            self.send(said)
        self.forget(ask.id)
        self._over(ask.id, work)

    def _over(self, id: str, work: _Work) -> None:
        if work.done():
            self.send(Gone(id))

    def forget(self, id: str) -> None:
        """A call or question is over."""
        self._work.pop(id, None)


class _Work:
    """A message for the pool: kept until a thread takes it, and no longer when it is cancelled before."""

    def __init__(self, message: Any) -> None:
        self.cancelled = False
        self._message: Any = message
        self._busy = False
        self._state = threading.Lock()

    def take(self) -> Any:
        """The message, to work on it until `done`; None when it was cancelled."""
        with self._state:
            message, self._message = self._message, None
            self._busy = message is not None
            return message

    def cancel(self) -> bool:
        """It is not wanted any more; whether no thread is working on it."""
        with self._state:
            self.cancelled, self._message = True, None
            return not self._busy

    def done(self) -> bool:
        """The thread lets go of it; whether it was cancelled while it worked."""
        with self._state:
            self._busy = False
            return self.cancelled


class _Reading(_Work):
    """A call, and the `ChoiceReader` that makes messages of what its sink says."""

    def __init__(self, worker: Worker, call: Call) -> None:
        super().__init__(call)
        self.call = call.id
        self.submitted = False
        self._worker, self._only_prompt = worker, call.only_prompt
        self._early: list[Any] | None = []
        self._over = False
        self._lock = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._prompt: tuple[int, ...] = ()
        self._tellers: dict[int, Teller] = {}

    def begin(self, prepared: Prepared, tokenizer: Tokenizer) -> None:
        """What the events to come are about."""
        self._tokenizer, self._prompt = tokenizer, prepared.request.prompt

    def open(self, began: Began) -> None:
        """Say that the call has begun, and then what was said meanwhile."""
        with self._lock:
            early, self._early = self._early or [], None
            for message in () if self._over else (began, *early):
                self._send(message)

    def scored(self, tokens: Sequence[TokenLogprob | None]) -> None:
        """As `ChoiceReader.scored`."""
        told = tuple(
            self._info(one) if one is not None else self._info(TokenLogprob(self._prompt[0], 0.0), known=False)
            for one in tokens
        )
        self._say(Piece(self.call, prompt=told))

    def step(self, step: ChoiceStep) -> None:
        """As `ChoiceReader.step`."""
        index = step.index
        if not self._only_prompt:
            teller = self._tellers.setdefault(index, Teller(self.call, index))
            for piece in teller.pieces(step.deltas, tuple(map(self._info, step.tokens))):
                self._say(piece)
        if step.finish is not None:
            self._say(self._ended(step))

    def finished(self, usage: EngineUsage) -> None:
        """As `ChoiceReader.finished`."""
        made = 0 if self._only_prompt else usage.completion_tokens
        told = Usage(usage.prompt_tokens, made, usage.cached_tokens, usage.prefill_seconds, usage.decode_seconds)
        self._say(Finished(self.call, told))
        self._worker.forget(self.call)

    def failed(self, error: BaseException) -> None:
        """As `ChoiceReader.failed`."""
        with self._lock:
            self._over = True
            self._send(_failure(self.call, error))
        self._worker.forget(self.call)

    def _ended(self, step: ChoiceStep) -> Ended:
        if self._only_prompt:
            return Ended(self.call, step.index, "length")
        reason, detail = step.finish, step.stop
        if reason == "context_full":
            reason, detail = "length", "context_full"
        elif reason == "abort":
            reason, detail = "stop", "abort"
        elif reason == "stop" and step.index in self._tellers and self._tellers[step.index].calls:
            reason = "tool_calls"
        assert reason in ("stop", "length", "tool_calls")
        return Ended(self.call, step.index, reason, detail, step.made)

    def _say(self, message: Any) -> None:
        with self._lock:
            if self._early is not None:
                self._early.append(message)
            elif not self.cancelled:
                self._worker.say(message)

    def _send(self, message: Any) -> None:
        if not self.cancelled:
            self._worker.send(message)

    def _info(self, one: TokenLogprob, known: bool = True) -> TokenInfo:
        top = tuple((i, *self._text(i), logprob) for i, logprob in one.top.items())
        return TokenInfo(one.token, *self._text(one.token), one.logprob if known else None, top)

    def _text(self, token: int) -> tuple[str, bytes]:
        assert self._tokenizer is not None
        data = self._tokenizer.bytes_of(token)
        return (data.decode("utf-8", "replace") if data else self._tokenizer.piece(token)), data


def _unheard(error: BaseException) -> None:
    """Nothing can be said any more: the process ends."""
    if isinstance(error, OSError):
        os._exit(0)  # nobody is there any more
    _note("the process ends, for nothing can be said any more", error)
    os._exit(1)


def _behind() -> None:
    """This thread, and those it starts, let others go first: the replies that grow are more urgent than prompts to come."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)


def _failure(call: str, error: BaseException) -> Failed:
    details = {}
    if isinstance(error, ContextFullError):
        details = {"needed": error.needed, "available": error.available}
    if not isinstance(error, HerdError):
        _note(call, error)
        return Failed(call, "Bug", f"{type(error).__name__}: the lines of the worker in the log say where")
    return Failed(call, type(error).__name__, _said(error).removeprefix(f"request {call!r}: "), details)


def _note(what: str, error: BaseException) -> None:
    """Say on stderr, which the server logs, where a bug is: code only, for the message of an error may quote a prompt."""
    lines = [f"a bug in herd ({what}):"]
    one: BaseException | None = error
    while one is not None and len(lines) < NOTED:
        frames = traceback.format_list(traceback.extract_tb(one.__traceback__))
        lines += [line for frame in frames for line in frame.rstrip().splitlines()] + [f"{type(one).__name__} (above)"]
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, HerdError) else f"{type(error).__name__}: {error}"


def _device_memory(llm: LLM) -> int | None:
    """Bytes that this process holds on a GPU; None where there is none."""
    import torch

    device = llm.model.norm.weight.device
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else None


def _ready(load: Load, llm: LLM) -> Ready:
    from importlib.util import find_spec

    from herd.chat.infill import Infill
    from herd.engine.native import unsupported
    from herd.kernels import native
    from herd.model.accounting import parameters
    from herd.quant.apply import kind_of

    try:
        format = llm.format
    except HerdError:
        format = None
    if format is not None and format.name == "base":
        format = None
    try:
        infill = bool(Infill(llm.tokenizer))
    except HerdError:
        infill = False
    weight = llm.model.norm.weight
    kind = kind_of(llm.model) or str(weight.dtype).removeprefix("torch.")
    kernels = "torch" if unsupported(llm.model) is not None else f"native {native.isa()}"
    told = f"{__version__} {llm.config} {kind} {weight.dtype} {weight.device} {kernels} {llm.budget.kv} {load.options}"
    return Ready(
        source=load.source,
        path=load.source,
        parameters=parameters(llm.config),
        kind=kind,
        context=llm.max_len,
        format=None if format is None else format.name,
        tools=getattr(format, "dialect", None) is not None,
        infill=infill,
        grammar=find_spec("llguidance") is not None,
        seqs=llm.budget.seqs,
        budget=llm.budget.sentence(),
        fingerprint=f"fp_{sha256(told.encode()).hexdigest()[:12]}",
        family=llm.tokenizer.family,
        adapters=tuple(one.name for one in llm.adapters if not one.name.startswith("@")),
        device=str(weight.device),
        defaults={name: getattr(llm.params(), name) for name in SHOWN_DEFAULTS},
        rooms=rooms(llm),
    )


def main() -> None:
    """Serve the socket whose number is the argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it lets replies end first
    sys.setswitchinterval(SWITCH_SECONDS)
    worker = Worker(socket.socket(fileno=int(sys.argv[1])))
    try:
        worker.run()
    except BaseException as error:
        _note("messages cannot be read any more", error)
        os._exit(1)
    os._exit(0)  # at once, whatever threads are doing: nothing here outlives the model


if __name__ == "__main__":
    main()

"""Beam searches beside other requests: each in a thread of its own, asking the engine for one step of all its prefixes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from herd.chat.params import SamplingParams
from herd.engine.beam import Beam, beam_search
from herd.engine.completion import Completion, Output
from herd.engine.loop import Loop
from herd.engine.request import Finish, Request
from herd.engine.sinks import LogitsSink
from herd.errors import HerdError
from herd.tokenizer.stream import Detokenizer
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Searches"]


class Searches:
    """Runs up to `most` beam searches at a time over `loop`; others wait. `room(adapter)`: the most tokens of one."""

    def __init__(self, loop: Loop, tokenizer: Tokenizer, room: Callable[[str | None], int], most: int) -> None:
        self._loop, self._tokenizer, self._room = loop, tokenizer, room
        self._threads = ThreadPoolExecutor(most, "herd-beams")
        self._numbers = itertools.count()
        self._given_up: set[str] = set()
        """Searches that nobody waits for any more."""

    def submit(
        self, request: Request, text: str | None, on_done: Callable[[Completion], None] | None
    ) -> Future[Completion]:
        """Begin a search for `request`, whose params have beams; `text` is its prompt, for the completion."""
        return self._threads.submit(self._search, request, text, on_done)

    def abort(self, request_id: str) -> None:
        """End a search at its next step."""
        self._given_up.add(request_id)

    def close(self) -> None:
        """Begin no more. Those that run end when the loop does."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _search(self, request: Request, text: str | None, on_done: Callable[[Completion], None] | None) -> Completion:
        """A beam search: every step asks the engine for the likeliest next ids of all its prefixes, which it has cached."""
        params, room = request.params, self._room(request.adapter) - len(request.prompt)
        one = SamplingParams(temperature=0, max_tokens=1, ignore_stop_ids=True)

        def step(prefixes: list[tuple[int, ...]]) -> NDArray[np.float32]:
            if request.id in self._given_up:
                raise HerdError("the search was given up")
            sinks = []
            for prefix in prefixes:
                id, prompt = f"{request.id}.{next(self._numbers)}", (*request.prompt, *prefix)
                sinks.append(LogitsSink())
                self._loop.submit(replace(request, id=id, prompt=prompt, params=one, logits=True), sinks[-1])
            return np.stack([sink.future.result() for sink in sinks])

        most = room if params.max_tokens is None else min(room, params.max_tokens)
        try:
            outputs = [
                Output(i, self._text(b.tokens), list(b.tokens), self._finish(b, params), None, b.logprob)
                for i, b in enumerate(beam_search(step, params, request.stops, most))
            ]
        except HerdError as error:
            outputs = [Output(0, "", [], "error", error=str(error))]
        finally:
            self._given_up.discard(request.id)
        completion = Completion(request.id, text, list(request.prompt), outputs)
        if on_done is not None:
            on_done(completion)
        return completion

    def _finish(self, beam: Beam, params: SamplingParams) -> Finish:
        if beam.finish == "stop":
            return "stop"
        return "length" if len(beam.tokens) == params.max_tokens else "context_full"

    def _text(self, tokens: Sequence[int]) -> str:
        detokenizer = Detokenizer(self._tokenizer, follows_text=True)
        return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()

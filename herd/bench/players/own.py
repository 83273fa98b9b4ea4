"""herd itself, as everybody runs it: the engine with its scheduler and its sampler, requests in, tokens out."""

from __future__ import annotations

from typing import Any

import torch

from herd.bench.players.base import Seconds, Setup, Watch
from herd.chat.params import SamplingParams
from herd.checkpoint.load import load_model
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.request import Request
from herd.kernels import native, triton

__all__ = ["open_player"]

BLOCK = 16
GPU_STEP = 8192
"""Tokens of a prompt read at a time on a GPU: enough for every core, as one asks of a server that reads long prompts."""


class Own:
    """One engine. Its prefix cache keeps the prompts of `start`, so that every `decode` begins at the same place."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._gpu = setup.device != "cpu"
        # Blocks of a file stay what they are on a GPU, too.
        model = load_model(
            setup.path, device=setup.device, weights=setup.weights or ("stored" if self._gpu else "auto")
        )
        each = -(-setup.length // BLOCK) + 2
        config = EngineConfig(
            blocks=(setup.sequences + 1) * each,
            max_len=setup.length + BLOCK,
            block_size=BLOCK,
            kv="bf16",
            max_seqs=setup.sequences,
            max_tokens=min(setup.length, GPU_STEP) if self._gpu and setup.length > 512 else 512,
        )
        self._engine = Engine(model, config)
        self._last: Any = None
        self._prompts: list[list[int]] = []
        self._count = 0

    def facts(self) -> dict[str, Any]:
        if self._gpu:
            facts = {"instructions": None, "why_not_native": None, "why_no_kernels": triton.missing()}
        else:
            facts = {"instructions": native.isa(), "why_not_native": native.missing()}
        return {"runner": type(self._engine.runner).__name__, "keys": "bfloat16", **facts}

    def logits(self, prompt: list[int]) -> Any:
        self._add(prompt, 1, salt=f"fresh {self._count}", logits=True)
        self._finish()
        return self._last

    def prefill(self, prompt: list[int]) -> None:
        self._add(prompt, 1, salt=f"fresh {self._count}")
        self._finish()

    def start(self, prompts: list[list[int]]) -> None:
        self._prompts = prompts
        for prompt in prompts:
            self._add(prompt, 1)
        self._finish()

    def decode(self, steps: int) -> list[Seconds]:
        waiting = {self._add(prompt, steps + 1) for prompt in self._prompts}
        while waiting:  # until every sequence has its first token: what decoding starts from
            waiting -= {event.request_id for event in self._step()}
        seconds = []
        while self._engine.busy:
            watch = Watch()
            self._step()
            seconds.append(watch.read())
        return seconds[-steps:]

    def _add(self, prompt: list[int], tokens: int, salt: str = "", *, logits: bool = False) -> str:
        self._count += 1
        name = f"r{self._count}"
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_stop_ids=True)
        self._engine.add(Request(name, tuple(prompt), params, salt=salt, logits=logits))
        return name

    def _step(self) -> list[Any]:
        events = self._engine.step()
        for event in events:
            if event.error is not None:
                raise RuntimeError(event.error)
            self._last = event.logits
        return events

    def _finish(self) -> None:
        while self._engine.busy:
            self._step()


def open_player(setup: Setup) -> Own:
    """Load the checkpoint; quantized files stay quantized."""
    return Own(setup)

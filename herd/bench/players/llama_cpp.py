"""llama.cpp through llama-cpp-python's bare functions: no Python between the steps but the choice of the largest logit."""

from __future__ import annotations

import ctypes
from importlib import import_module
from typing import Any

import numpy as np

from herd.bench.players.base import Seconds, Setup, Watch

__all__ = ["open_player"]

CHUNK = 512


class LlamaCpp:
    """One model and one context, with the defaults of llama.cpp (repacking, flash attention where it thinks it pays)."""

    def __init__(self, setup: Setup) -> None:
        self._lib = lib = import_module("llama_cpp")
        self._quiet = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        how = lib.llama_model_default_params()
        how.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(setup.path.encode(), how)
        if not model:
            raise RuntimeError(f"llama.cpp cannot open {setup.path}")
        run = lib.llama_context_default_params()
        run.n_ctx = -(-setup.length // 256) * 256 * setup.sequences
        run.n_batch = run.n_ubatch = CHUNK
        run.n_seq_max = setup.sequences
        run.n_threads = run.n_threads_batch = setup.threads
        self._context = lib.llama_init_from_model(model, run)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._memory = lib.llama_get_memory(self._context)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._batch = lib.llama_batch_init(max(CHUNK, setup.sequences), 0, 1)
        self._prompt, self._first = 0, [0]

    def facts(self) -> dict[str, Any]:
        said = self._lib.llama_print_system_info().decode()
        return {"version": self._lib.__version__, "system": " ".join(said.split())}

    def logits(self, prompt: list[int]) -> Any:
        self._read(prompt, 0)
        return self._logits(-1).copy()

    def prefill(self, prompt: list[int]) -> None:
        self._read(prompt, 0)
        self._logits(-1).argmax()

    def start(self, prompts: list[list[int]]) -> None:
        self._first = []
        for sequence, prompt in enumerate(prompts):
            self._read(prompt, sequence)
            self._first.append(int(self._logits(-1).argmax()))
        self._prompt = len(prompts[0])

    def decode(self, steps: int) -> list[Seconds]:
        chosen, seconds = list(self._first), []
        for sequence in range(len(chosen)):
            self._lib.llama_memory_seq_rm(self._memory, sequence, self._prompt, -1)
        for step in range(steps):
            watch = Watch()
            self._run([(token, self._prompt + step, s, True) for s, token in enumerate(chosen)])
            chosen = [int(self._logits(row).argmax()) for row in range(len(chosen))]
            seconds.append(watch.read())
        return seconds

    def _read(self, prompt: list[int], sequence: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, sequence, 0, -1)
        rows = [(token, at, sequence, at == len(prompt) - 1) for at, token in enumerate(prompt)]
        for at in range(0, len(rows), CHUNK):
            self._run(rows[at : at + CHUNK])

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave status {status}")

    def _logits(self, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, row), (self._vocabulary,))


def open_player(setup: Setup) -> LlamaCpp:
    """Load the GGUF file."""
    return LlamaCpp(setup)

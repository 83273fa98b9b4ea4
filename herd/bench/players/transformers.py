"""Hugging Face transformers, eager, in bfloat16, with its default cache and attention."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from herd.bench.players.base import Seconds, Setup, Watch

__all__ = ["open_player"]


class Transformers:
    """A LlamaForCausalLM and its cache. The package is looked for only here, when somebody asks for it as a peer."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._lib = import_module("transformers")
        model = self._lib.AutoModelForCausalLM.from_pretrained(setup.path, dtype=torch.bfloat16)
        self._model, self._device = model.eval().to(setup.device), torch.device(setup.device)
        self._prompt, self._first, self._cache = 0, torch.zeros(1, 1, dtype=torch.int64), None

    def facts(self) -> dict[str, Any]:
        return {
            "version": self._lib.__version__,
            "torch": torch.__version__,
            "attention": self._model.config._attn_implementation,
        }

    def logits(self, prompt: list[int]) -> Any:
        return self._read([prompt])[0].float().cpu().numpy()

    def prefill(self, prompt: list[int]) -> None:
        self._read([prompt]).argmax(-1).tolist()

    def start(self, prompts: list[list[int]]) -> None:
        self._first = self._read(prompts).argmax(-1, keepdim=True)
        self._prompt = len(prompts[0])

    @torch.inference_mode()
    def decode(self, steps: int) -> list[Seconds]:
        assert self._cache is not None
        chosen, seconds = self._first, []
        behind = self._cache.get_seq_length() - self._prompt
        if behind:
            self._cache.crop(-behind)
        for _ in range(steps):
            watch = Watch()
            out = self._model(chosen, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
            chosen.tolist()  # a reader gets every token, as herd's does
            seconds.append(watch.read())
        return seconds

    @torch.inference_mode()
    def _read(self, prompts: list[list[int]]) -> torch.Tensor:
        self._cache = self._lib.DynamicCache(config=self._model.config)
        out = self._model(
            torch.tensor(prompts, device=self._device), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1]


def open_player(setup: Setup) -> Transformers:
    """Load the Hugging Face folder."""
    return Transformers(setup)

"""One stream of ids through one model, keeping its keys and values between calls: the naive generate loop.

This is the loop to read, and the one faster engines are checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from herd.chat.params import SamplingParams
from herd.engine.beam import Beam, BeamSearch
from herd.engine.cache import StaticCache
from herd.engine.sampler import RowState, Sampler
from herd.errors import ConfigError, ContextFullError, HerdError
from herd.model.llama import Llama

__all__ = ["Session"]

PREFILL_CHUNK = 512
"""Prompt tokens per forward: bounds the activations and logits held at once."""
FIRST_ALLOCATION = 256


class Session:
    """Generates from prompts of one conversation; a prompt that continues the last one reuses its keys and values.

    `max_len` (positions) defaults to the model's context. Memory grows with use, up to `max_len` positions. `dtype` is what keys
    and values come in, where that is not the dtype of the norms' weights.
    """

    def __init__(self, model: Llama, *, max_len: int | None = None, dtype: torch.dtype | None = None) -> None:
        limit = model.config.max_seq_len
        if max_len is not None and max_len > limit:
            raise ConfigError(f"a context of {max_len} tokens was asked for, but this model was made for {limit}")
        if max_len is not None and max_len < 2:
            raise ConfigError(f"a context of {max_len} tokens holds no prompt and reply: give at least 2")
        self.model = model
        self.max_len = limit if max_len is None else max_len
        weight = model.norm.weight  # every model has it plain, in the dtype of its activations
        first = min(FIRST_ALLOCATION, self.max_len)
        self.cache = StaticCache(model.config, max_len=first, dtype=dtype or weight.dtype, device=weight.device)
        self.tokens: list[int] = []
        """Ids whose keys and values are in the cache."""
        self._turn = 0

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[int]:
        """Ids that follow `prompt`, the stop id included; ends at a stop id, at max_tokens or when the context is full.

        `on_prefill(done, total)` is called as the prompt is read. Raises ContextFullError before any work when the prompt
        leaves no room for a single new token, ConfigError when an id is not in the vocabulary or `params` ask for what one
        plain stream cannot give. An iterator may be left unfinished; one that is resumed after a later call to `generate`
        began raises RuntimeError.
        """
        self._check(prompt)
        _check_params(params)
        self._turn = turn = self._turn + 1
        budget = self.max_len - len(prompt)
        if params.max_tokens is not None:
            budget = min(budget, params.max_tokens)
        stops = frozenset() if params.ignore_stop_ids else stop_ids | params.stop_ids
        vocab_size = self.model.config.vocab_size
        sampler, row = Sampler(), RowState(params, prompt, vocab_size=vocab_size, stop_ids=stops)
        # The loop body must not run inside inference_mode across yields: the mode is thread-wide and would leak out.
        logits = self._prefill(prompt, on_prefill)
        for made in range(1, budget + 1):
            sampled = sampler.sample(logits, [row])[0]
            if (token := sampled.token) is None:
                raise HerdError(sampled.error)
            row.append(token)
            yield token
            if token in stops or made == budget:
                return
            if turn != self._turn:
                raise RuntimeError("this session has begun another reply: an earlier one cannot go on")
            logits = self._forward([token])

    @torch.inference_mode()
    def search(
        self, prompt: Sequence[int], params: SamplingParams, stop_ids: frozenset[int] = frozenset()
    ) -> list[Beam]:
        """The n best replies to `prompt` that beam search finds, best first, stop ids included. Needs `params.beams` above 1.

        The hypotheses have a cache of their own, of `params.beams` times the length; this session's keeps the prompt. Raises
        what `generate` raises, and HerdError when the model's numbers are not finite.
        """
        self._check(prompt)
        if params.beams < 2:
            raise ConfigError(f"beams is {params.beams}: beam search needs at least 2")
        self._turn += 1
        stops = frozenset() if params.ignore_stop_ids else stop_ids | params.stop_ids
        length, budget = len(prompt), self.max_len - len(prompt)
        search = BeamSearch(params, stops, budget if params.max_tokens is None else min(budget, params.max_tokens))
        branches = search.advance(self._prefill(prompt, None).cpu().numpy())
        own, device = self.cache.k[0], self.cache.k[0].device
        room = min(self.max_len, length + FIRST_ALLOCATION)
        cache = StaticCache(self.model.config, batch=params.beams, max_len=room, dtype=own.dtype, device=device)
        for theirs, ours in zip((*cache.k, *cache.v), (*self.cache.k, *self.cache.v), strict=True):
            theirs[:, :length] = ours[:, :length]
        while branches:
            # Every row is computed in every step; those that no hypothesis needs any more repeat the last one.
            filled = branches + [branches[-1]] * (params.beams - len(branches))
            parents = torch.tensor([branch.parent for branch in filled], device=device)
            for tensor in (*cache.k, *cache.v):
                tensor[:, :length] = tensor[parents, :length]
            if length == cache.max_len:
                cache.grow(min(self.max_len, 2 * length))
            positions = torch.tensor([length], device=device)
            tokens = torch.tensor([[branch.token] for branch in filled], device=device)
            length += 1
            h = self.model.hidden(self.model.embed(tokens), positions, cache.bind(positions, kv_len=length))
            branches = search.advance(self.model.output(h[:, -1])[: len(branches)].float().cpu().numpy())
        return search.best()

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ConfigError("the prompt has no tokens: give at least the beginning-of-text id")
        if len(prompt) >= self.max_len:
            raise ContextFullError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.max_len}, so there is no room for a reply: "
                "shorten the prompt or start a new conversation",
                needed=len(prompt) + 1,
                available=self.max_len,
            )
        vocab = self.model.config.vocab_size
        bad = next((t for t in prompt if not 0 <= t < vocab), None)
        if bad is not None:
            raise ConfigError(f"token id {bad} is outside the model's vocabulary of {vocab}")

    def _prefill(self, prompt: Sequence[int], on_prefill: Callable[[int, int], None] | None) -> torch.Tensor:
        """Run what the cache does not hold yet; logits [1, V] of the last position."""
        shared = 0
        limit = min(len(self.tokens), len(prompt) - 1)  # the last token must run: its logits are needed
        while shared < limit and self.tokens[shared] == prompt[shared]:
            shared += 1
        del self.tokens[shared:]
        total = len(prompt)
        logits = None
        for start in range(shared, total, PREFILL_CHUNK):
            logits = self._forward(prompt[start : start + PREFILL_CHUNK])
            if on_prefill is not None:
                on_prefill(min(start + PREFILL_CHUNK, total), total)
        assert logits is not None
        return logits

    @torch.inference_mode()
    def _forward(self, ids: Sequence[int]) -> torch.Tensor:
        """Append `ids` to the cache; logits [1, V] after the last of them."""
        start, stop = len(self.tokens), len(self.tokens) + len(ids)
        if stop > self.cache.max_len:
            self.cache.grow(min(self.max_len, max(stop, 2 * self.cache.max_len)))
        device = self.cache.k[0].device
        positions = torch.arange(start, stop, device=device)
        tokens = torch.tensor([list(ids)], device=device)
        h = self.model.hidden(self.model.embed(tokens), positions, self.cache.bind(positions, kv_len=stop))
        self.tokens.extend(ids)
        return self.model.output(h[:, -1]).float()


def _check_params(params: SamplingParams) -> None:
    """Raise ConfigError for what this loop would ignore."""
    asked = {
        "n": params.n > 1,
        "best_of": params.candidates > 1,
        "beams": params.beams > 1,
        "logprobs": params.logprobs is not None,
        "prompt_logprobs": params.prompt_logprobs is not None,
    }
    names = [name for name, there in asked.items() if there]
    if (constraint := params.constraint) is not None:
        names.append(constraint.kind)
    if names:
        other = "Session.search" if params.beams > 1 else "herd.LLM"
        raise ConfigError(f"a single plain stream does not do {', '.join(names)}: use {other}")

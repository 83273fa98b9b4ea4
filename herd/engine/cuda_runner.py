"""Steps of a model on a GPU: `Runtime` over a paged cache, decode steps from recordings, prompts as they come.

The same code runs on a CPU, without recordings, which is how it is tested where no GPU is.

Letters: T rows, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.engine import cuda
from herd.engine.cuda import Places, Span
from herd.engine.graphs import Capture, CaptureError, CudaCapture, DecodeRow, Flight, Steps
from herd.engine.pack import RaggedBatch
from herd.engine.paged import Layer, PagedCache
from herd.engine.runtime import Runtime
from herd.engine.static_sample import Kind
from herd.errors import ConfigError
from herd.model.config import LayerSpec
from herd.model.llama import Llama

__all__ = ["CudaRunner"]


class CudaRunner:
    """A Runner for a model on a GPU. Its weights move into fused storage, which the model's parameters become views of.

    `max_seqs` and `max_len` are the most rows of a recorded step and the most tokens of a sequence; larger steps run as they are.
    `graphs` off records nothing. After parameters were given other storage (`load_state_dict` copies in place and needs nothing)
    call `refresh`.
    """

    def __init__(
        self,
        model: Llama,
        *,
        max_seqs: int = 16,
        max_len: int | None = None,
        graphs: bool = True,
        capture: Capture | None = None,
    ) -> None:
        self.model, self.max_seqs, self.max_len = model, max_seqs, max_len
        device = model.norm.weight.device
        self.runtime = Runtime(model)
        if capture is None and device.type == "cuda":
            capture = CudaCapture(device)
        self._capture = capture if graphs and self.runtime.capturable else None
        self._steps: Steps | None = None

    @property
    def records(self) -> bool:
        """Whether decode steps are recorded and replayed."""
        return self._capture is not None

    def refresh(self) -> None:
        """Take the model's parameters anew and forget all recordings: after they were given other storage."""
        self.runtime, self._steps = Runtime(self.model), None

    @torch.inference_mode()
    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """See `Runner.logits`. Raises ConfigError for adapters."""
        if batch.adapters is not None:
            raise ConfigError("the GPU runner applies no adapters by itself: herd.engine.adapters runs their rows")
        known = batch.known
        if known is None:
            known = tuple((a, b, c, d) for a, b, c, d in batch.spans.tolist())
        steps = self.steps(cache) if _single(known) == len(known) == len(batch.logit_rows) else None
        if steps is not None and len(known) <= steps.rows:
            try:
                return steps.forward(batch).clone()
            except CaptureError as error:
                self._give_up(error)
        mix = _Ragged.of(batch, known, cache.layers, self.model.config.norm_eps)
        states = self.runtime.hidden(batch.tokens, batch.positions, mix)
        return self.runtime.logits(states[batch.logit_rows])

    def steps(self, cache: PagedCache) -> Steps | None:
        """The recorded decode steps over `cache`; None where nothing is recorded."""
        if self._capture is None or cache.scratch is None:
            return None
        if self._steps is None or self._steps.cache is not cache:
            longest = cache.blocks * cache.block_size
            self._steps = Steps(
                self.runtime,
                cache,
                rows=self.max_seqs,
                max_len=longest if self.max_len is None else min(self.max_len, longest),
                capture=self._capture,
            )
        return self._steps

    def launch(self, rows: Sequence[DecodeRow], kind: Kind, cache: PagedCache) -> Flight | None:
        """A recorded step with its sampling, begun; None where it cannot be recorded."""
        steps = self.steps(cache)
        if steps is None or len(rows) > steps.rows:
            return None
        try:
            return steps.launch(rows, kind)
        except CaptureError as error:
            self._give_up(error)
            return None

    def warm_up(self, cache: PagedCache, tell: Callable[[int, int], None] = lambda done, total: None) -> float:
        """Record all decode steps now; seconds it took."""
        steps = self.steps(cache)
        try:
            return 0.0 if steps is None else steps.warm_up(tell)
        except CaptureError as error:
            self._give_up(error)
            return 0.0

    def _give_up(self, error: CaptureError) -> None:
        """From now on every step runs as it is."""
        self._capture = self._steps = None
        warnings.warn(f"GPU steps are not recorded, which makes them slower: {error}", stacklevel=2)


@dataclass(frozen=True, slots=True)
class _Ragged:
    """The memory of a ragged batch: leading spans of one row together, the others each by itself."""

    layers: Sequence[Layer]
    eps: float
    slots: Tensor
    positions: Tensor
    tables: Tensor
    """Of the leading single rows; `spans` name rows of `every`."""
    spans: tuple[Span, ...]
    on_device: Tensor
    every: Tensor

    @staticmethod
    def of(batch: RaggedBatch, known: Sequence[Span], layers: Sequence[Layer], eps: float) -> _Ragged:
        single = _single(known)
        return _Ragged(
            layers,
            eps,
            batch.slots,
            batch.positions[:single],
            batch.tables[:single],
            tuple((row - single, rows, at, table) for row, rows, at, table in known[single:]),
            batch.spans[single:] - batch.spans.new_tensor([single, 0, 0, 0]) if single else batch.spans,
            batch.tables,
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, places: Places, spec: LayerSpec) -> Tensor:
        own, single = self.layers[layer], len(self.positions)
        q = cuda.place_write(q, k, v, places, self.slots, own, spec, self.eps)
        parts = []
        if single:
            parts.append(cuda.decode_attention(q[:single], own, self.positions, self.tables, spec.chunk))
        if self.spans:
            parts.append(cuda.prompt_attention(q[single:], own, self.spans, self.on_device, self.every, spec.chunk))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _single(known: Sequence[Span]) -> int:
    """How many spans at the beginning are one row each, in the order of their tables."""
    return next((i for i, (row, rows, _, table) in enumerate(known) if (row, rows, table) != (i, 1, i)), len(known))

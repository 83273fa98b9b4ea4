"""Captured decode steps: one row per sequence, in buckets of rows, over buffers that never move.

A GPU begins an operation slower than it does a small one, so a step is recorded once (a CUDA graph) and replayed with new numbers
in the same buffers. `Steps` holds the buffers and the recordings: of the model per bucket of rows, of the sampling per bucket and
kind. Rows that are missing to a bucket write to the cache's scratch block. What comes back is one small copy: token ids and
whether the logits were finite. Ids also stay where they are, so that the next step can begin before anybody has read them.

Letters: B rows of a bucket, R true rows, V vocabulary, W table width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from herd.engine import cuda, static_sample
from herd.engine.cuda import Places
from herd.engine.pack import RaggedBatch
from herd.engine.paged import Layer, PagedCache
from herd.engine.runtime import Runtime
from herd.engine.static_sample import Kind
from herd.model.config import LayerSpec

__all__ = ["Capture", "CaptureError", "CudaCapture", "DecodeRow", "Flight", "Steps", "buckets"]

COLUMNS = 9
"""Numbers of a row, 8 bytes each: token, position, slot, source; uniform, temperature, top_k, top_p, min_p."""
AHEAD = 2
"""Steps that may be under way at once: one is computed while the next is prepared."""


class Capture(Protocol):
    """Records what a function does to tensors."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Something that does the same again, to the same tensors, however often it is called. `run` may be called before."""
        ...


class CaptureError(Exception):
    """A step could not be recorded. The runner goes on without recordings; nobody else sees it."""


class CudaCapture:
    """Recordings are CUDA graphs in one memory pool: they run one after the other, so they may share what they compute in."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._device = device

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # kernels are compiled and libraries take their workspaces outside of the recording
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One position of one sequence. `source` is the row of the last step whose token this is, then `token` is not looked at.

    `uniform` is the random number of the token that follows, `temperature` to `min_p` as in SamplingParams.
    """

    token: int
    position: int
    blocks: Sequence[int]
    source: int = -1
    uniform: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(slots=True)
class Flight:
    """A step under way."""

    rows: int
    outcome: Tensor
    done: Any

    def read(self) -> list[tuple[int, bool]]:
        """The token of every row and whether its logits were finite; waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        return [(token, bool(finite)) for token, finite in self.outcome[: self.rows].tolist()]


def buckets(most: int) -> list[int]:
    """Numbers of rows that steps are recorded for, up to `most`: fine where steps are short, coarse above."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 32)]
    return [size for size in sizes if size < most] + [most]


class Steps:
    """Recorded decode steps of one runtime over one cache, for up to `rows` sequences of up to `max_len` tokens.

    Recordings are made when they are first needed, or all by `warm_up`. `capture` None runs every step as it is.
    """

    def __init__(
        self, runtime: Runtime, cache: PagedCache, *, rows: int, max_len: int, capture: Capture | None
    ) -> None:
        assert cache.scratch is not None, "rows that fill a bucket need a block that is nobody's"
        self.runtime, self.cache, self._capture = runtime, cache, capture
        self._scratch = cache.scratch
        self.sizes = buckets(rows)
        self.width = -(-max_len // cache.block_size)
        device, vocab = cache.device, runtime.model.config.vocab_size
        self._inputs = torch.zeros(rows, COLUMNS, dtype=torch.int64, device=device)
        self._idle = torch.zeros(COLUMNS, dtype=torch.int64, device=device)
        self._idle[2], self._idle[3] = cache.scratch * cache.block_size, -1
        self._tables = torch.full((rows, self.width), cache.scratch, dtype=torch.int32, device=device)
        self._logits = torch.zeros(rows, vocab, device=device)
        self._chosen = torch.zeros(rows, dtype=torch.int64, device=device)
        self._outcome = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self._staged = [_Staging(rows, self.width, device) for _ in range(AHEAD)]
        self._turn = 0
        self._forwards: dict[tuple[int, int], Callable[[], None]] = {}
        self._samplings: dict[tuple[int, Kind], Callable[[], None]] = {}
        self.recorded = 0
        """Recordings made so far."""

    @property
    def rows(self) -> int:
        """The most rows of a step."""
        return self.sizes[-1]

    def bucket(self, rows: int) -> int:
        """The smallest bucket for so many rows."""
        return next(size for size in self.sizes if size >= rows)

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch) -> Tensor:
        """Keys, values and logits of a batch of single rows: logits [R, V] float32, until the next step."""
        rows, used = batch.tables.shape
        size = self.bucket(rows)
        assert len(batch.tokens) == rows, "one row per sequence"
        inputs, tables = self._inputs[:size], self._tables[:size, :used]
        for column, values in enumerate((batch.tokens, batch.positions, batch.slots)):
            inputs[:rows, column].copy_(values)
        inputs[:rows, 3].fill_(-1)
        tables[:rows].copy_(batch.tables)
        if size > rows:
            inputs[rows:].copy_(self._idle)
            tables[rows:].fill_(self._scratch)
        self._forward(size, self._wide(used))
        return self._logits[:rows]

    @torch.inference_mode()
    def launch(self, rows: Sequence[DecodeRow], kind: Kind) -> Flight:
        """A step with its sampling, begun: `read` waits for it. At most AHEAD steps may be unread."""
        size, width = self._fill(rows)
        self._forward(size, width)
        if (size, kind) not in self._samplings:
            self._samplings[size, kind] = self._recorded(lambda: self._sample(size, kind))
        self._samplings[size, kind]()
        staged = self._staged[self._turn]
        staged.outcome[:size].copy_(self._outcome[:size], non_blocking=True)
        return Flight(len(rows), staged.outcome, staged.mark())

    def warm_up(self, tell: Callable[[int, int], None] = lambda done, total: None) -> float:
        """Record every bucket with greedy sampling, the largest first; seconds it took. `tell(done, total)` hears of each."""
        began = time.perf_counter()
        for i, size in enumerate(reversed(self.sizes)):
            filler = [DecodeRow(0, 0, (self._scratch,))] * size
            self.launch(filler, "greedy").read()
            tell(i + 1, len(self.sizes))
        return time.perf_counter() - began

    def _recorded(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        if self._capture is None:
            return run
        try:
            return self._capture(run)
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error

    def _fill(self, rows: Sequence[DecodeRow]) -> tuple[int, int]:
        """The numbers of `rows` into the buffers; the bucket and the width of tables it needs."""
        size, scratch, block_size = self.bucket(len(rows)), self._scratch, self.cache.block_size
        self._turn = (self._turn + 1) % AHEAD
        staged = self._staged[self._turn]
        used = max(len(row.blocks) for row in rows)
        tables = staged.tables[: size * used].reshape(size, used)
        tables[:] = scratch
        for i, row in enumerate(rows):
            at = row.position
            slot = row.blocks[at // block_size] * block_size + at % block_size
            staged.whole[i, :4] = row.token, at, slot, row.source
            staged.real[i, 4:] = row.uniform, row.temperature, row.top_k, row.top_p, row.min_p
            tables[i, : len(row.blocks)] = row.blocks
        staged.whole[len(rows) : size] = 0, 0, scratch * block_size, -1, 0, 0, 0, 0, 0
        self._inputs[:size].copy_(staged.inputs[:size], non_blocking=True)
        flat = staged.flat[: size * used].to(self._tables.device, non_blocking=True)
        self._tables[:size, :used].copy_(flat.view(size, used))
        return size, self._wide(used)

    def _wide(self, used: int) -> int:
        """Columns of tables that a recording for `used` of them reads: kernels stop by themselves, plain torch reads them all."""
        return self.width if cuda.kernels_for(self._logits) else min(self.width, 1 << (used - 1).bit_length())

    def _forward(self, size: int, width: int) -> None:
        """Compute a bucket from what is in the buffers."""
        if (size, width) not in self._forwards:
            self._forwards[size, width] = self._recorded(lambda: self._compute(size, width))
        self._forwards[size, width]()

    def _compute(self, size: int, width: int) -> None:
        """What is recorded of the model."""
        whole = self._inputs[:size, :4].T.contiguous()
        given, positions, slots, source = whole.unbind()
        tokens = self._chosen[source.clamp(min=0)].where(source >= 0, given)
        tables = self._tables[:size, :width]
        eps = self.runtime.model.config.norm_eps
        states = self.runtime.hidden(tokens, positions, _Decode(self.cache.layers, eps, positions, slots, tables))
        self._logits[:size].copy_(self.runtime.logits(states))

    def _sample(self, size: int, kind: Kind) -> None:
        """What is recorded of the sampling."""
        real = self._inputs[:size, 4:].T.contiguous().view(torch.float64)
        tokens, finite = static_sample.choose(self._logits[:size], *real.unbind(), kind=kind)
        self._chosen[:size].copy_(tokens)
        self._outcome[:size].copy_(torch.stack([tokens, finite.long()], -1))


class _Staging:
    """Memory of the host that the device reads from and writes to by itself, with numpy views on it."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.inputs = torch.zeros(rows, COLUMNS, dtype=torch.int64, pin_memory=pinned)
        self.whole: NDArray[np.int64] = self.inputs.numpy()
        self.real: NDArray[np.float64] = self.whole.view(np.float64)
        self.flat = torch.zeros(rows * width, dtype=torch.int32, pin_memory=pinned)
        self.tables: NDArray[np.int32] = self.flat.numpy()
        self.outcome = torch.zeros(rows, 2, dtype=torch.int64, pin_memory=pinned)
        self._event = torch.cuda.Event() if pinned else None

    def mark(self) -> Any:
        """What tells when everything that was begun up to now is done."""
        if self._event is not None:
            self._event.record()
        return self._event


@dataclass(frozen=True, slots=True)
class _Decode:
    """The memory of one row per sequence, see `herd.engine.runtime.Mix`."""

    layers: Sequence[Layer]
    eps: float
    positions: Tensor
    slots: Tensor
    tables: Tensor

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, places: Places, spec: LayerSpec) -> Tensor:
        own = self.layers[layer]
        q = cuda.place_write(q, k, v, places, self.slots, own, spec, self.eps)
        return cuda.decode_attention(q, own, self.positions, self.tables, spec.chunk)

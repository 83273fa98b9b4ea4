"""What a training step is made of, for one layout: memory of the fullest rank and seconds, by arithmetic. Imports no torch.

Time is the sum of what a GPU does one after the other: matrix products and attention at a share of the peak rate, passes over
activations at a share of the memory's bandwidth, exchanges that nothing hides, the optimiser, and the pipeline's bubble on top.
The shares are `Rates`, fitted to published measurements (docs/train/planning.md lists each with the error); they are what a well
tuned run reaches, not a promise.

Letters: L layers, D dim, F hidden_dim, V vocabulary, T length of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from herd.errors import ConfigError
from herd.model.accounting import active_parameters, parameters
from herd.model.config import ModelConfig
from herd.parallel.config import ParallelPart
from herd.parallel.plan import check as check_ranks
from herd.planning.devices import Device

__all__ = ["Cluster", "Estimate", "Layout", "Memory", "Rates", "Time", "check", "estimate"]

Checkpointing = Literal["none", "selective", "half", "full"]
"""What is made again in the backward pass: nothing; half of the products but not attention (torchtitan's "selective op", which
herd train does not have); every second block; every block."""
Precision = Literal["bfloat16", "float8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Shares of a data sheet's numbers that training reaches. The defaults are of torch.compile on a GPU of full power."""

    matrix: float = 0.65
    matrix_fp8: float = 0.55
    attention: float = 0.30
    """Of the bf16 peak, forward and backward together; only what is not masked counts as work."""
    passes: float = 0.95
    """Of the memory's bandwidth, for norms, rotations, activations, residuals and casts."""
    traffic: float = 1.0
    """Bytes that those passes move, times what compiled blocks move: 2.6 without a compiler."""
    links: float = 0.78
    """Of a link's bandwidth, for large exchanges."""
    hidden_tp: float = 0.0
    """Of tensor parallel exchanges, the share that runs beside matrix products (async TP)."""
    hidden_dp: float = 0.89
    """Of FSDP's exchanges, the share that can hide behind arithmetic, as long as there is any."""
    kept: float = 1.09
    """Memory that the allocator holds, times what is in use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """GPUs and what joins them: `inside` bytes/s of one GPU in a node of `node`, `between` bytes/s of one GPU between nodes."""

    device: Device
    inside: float = 450e9
    between: float = 50e9
    node: int = 8
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A step: `part` says how ranks share it. A rank's step has `microbatches` of `rows` rows of `length` tokens.

    `logits` are the bytes that the loss holds for each number of a micro-batch's logits: 14 when all exist in bf16 and several
    times in fp32, 5 when the loss is compiled, 0 when it is chunked or fused.
    """

    part: ParallelPart
    length: int
    rows: int = 1
    microbatches: int = 1
    checkpointing: Checkpointing = "none"
    precision: Precision = "bfloat16"
    logits: float = 0.0
    regather: bool = False
    """Whether what tensor parallel ranks gathered is gathered again for the backward pass (Megatron) instead of kept (herd)."""

    @property
    def tokens(self) -> int:
        """Of one optimiser step, all ranks together."""
        return self.part.dp * self.rows * self.microbatches * self.length

    @property
    def in_flight(self) -> int:
        """Micro-batches whose activations the first rank of a pipeline holds at once, counted in whole ranks."""
        part = self.part
        if part.pp == 1:
            return 1
        if part.schedule == "gpipe":
            return self.microbatches
        if part.schedule == "1f1b":
            return min(part.pp, self.microbatches)
        return min(self.microbatches, math.ceil(((part.pp - 1) * 2 + (part.stages - 1) * part.pp + 1) / part.stages))

    @property
    def bubble(self) -> float:
        """Idle share of a step: (p - 1) / (m v + p - 1)."""
        wait = self.part.pp - 1
        return wait / (self.microbatches * self.part.stages + wait)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on the fullest rank. `states`: fp32 parameters, gradients and two means of AdamW, this rank's part."""

    states: float
    gathered: float
    activations: float
    gradients: float
    """Whole gradients before they are reduced, or the logits of the loss when those are more: they are not there together."""
    allocator: float

    @property
    def total(self) -> float:
        """All of it."""
        return math.fsum(getattr(self, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """Seconds of one optimiser step on a rank; `bubble` waits for other stages."""

    matrices: float
    attention: float
    passes: float
    tp: float
    cp: float
    dp: float
    pp: float
    optimiser: float
    bubble: float

    @property
    def total(self) -> float:
        """All of it."""
        return math.fsum(getattr(self, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a layout takes on a cluster. `flops`, `flops_full`: of training one token, attention causal and counted in full."""

    layout: Layout
    cluster: Cluster
    memory: Memory
    time: Time
    flops: float
    flops_full: float

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's memory is enough."""
        return self.memory.total <= self.cluster.device.memory

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.layout.tokens / self.time.total / self.layout.part.world

    @property
    def mfu(self) -> float:
        """Share of the bf16 peak, causal count, also in fp8."""
        return self.tokens_per_second * self.flops / (self.cluster.device.tflops * 1e12)

    @property
    def mfu_full(self) -> float:
        """The same with attention counted as if nothing were masked (torchtitan's count)."""
        return self.tokens_per_second * self.flops_full / (self.cluster.device.tflops * 1e12)


def estimate(config: ModelConfig, layout: Layout, cluster: Cluster) -> Estimate:
    """Memory and time of a step. Raises ConfigError for layouts that cannot be."""
    check(config, layout)
    work = _Work(config, layout)
    flops = 3 * (2 * work.weights + work.attention(layout.length))
    return Estimate(
        layout=layout,
        cluster=cluster,
        memory=_memory(config, layout, cluster, work),
        time=_time(config, layout, cluster, work),
        flops=flops,
        flops_full=flops + 3 * work.attention(layout.length),
    )


def check(config: ModelConfig, layout: Layout) -> None:
    """Raise ConfigError naming what the ranks of `layout` cannot share."""
    part = layout.part
    check_ranks(config, part.tp, experts=part.experts)
    if part.pp * part.stages > config.n_layers:
        raise ConfigError(
            f"a pipeline of {part.pp * part.stages} stages needs as many layers: there are {config.n_layers}"
        )
    if layout.length % (part.tp * part.cp * (2 if part.cp > 1 else 1)):
        raise ConfigError(f"rows of {layout.length} tokens cannot be shared by cp {part.cp} and tp {part.tp}")


class _Work:
    """Counts of one model that both halves need. Weights in numbers; operations of one token, forward."""

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        looked_up = config.vocab_size * config.dim
        self.config = config
        self.all = parameters(config)
        self.head = looked_up
        norms = (2 * config.n_layers + 1) * config.dim
        self.weights = active_parameters(config) - norms - (0 if config.tie_embeddings else looked_up)
        self.ends = looked_up * (1 if config.tie_embeddings else 2)
        self.layers = self.all - self.ends
        self.layer = self.layers / config.n_layers
        moe = config.moe
        dense = 0.0 if moe is None else sum(spec.moe for spec in config.layers) / config.n_layers
        self.width = config.hidden_dim * (1 - dense) + (0 if moe is None else (1 + moe.top_k) * moe.hidden_dim * dense)
        self.heads = config.n_heads * config.head_dim
        self.kv = config.n_kv_heads * config.head_dim

    def attention(self, length: int) -> float:
        """q k^T and its product with v, causal: a token sees half of its row (or chunk) on average."""
        seen = sum(min(length, spec.chunk or length) / 2 for spec in self.config.layers)
        return 4 * self.heads * seen


def _memory(config: ModelConfig, layout: Layout, cluster: Cluster, work: _Work) -> Memory:
    part = layout.part
    stage = work.layers / (part.tp * part.pp)
    ends = work.ends / part.tp / (1 if part.pp == 1 else 2)  # a pipeline's first and last rank hold one each
    mine = stage + ends
    sharded = part.dp_shard * part.cp
    tokens = layout.rows * layout.length / part.cp  # of a micro-batch, on this rank
    own = tokens / part.tp  # between the matrices
    wide = 2.0  # bytes of an activation
    inner = (work.heads + 2 * work.kv + 3 * work.width) / part.tp  # inside a layer, cut by tp
    kept = tokens * 2 * config.dim * wide if part.tp > 1 and not layout.regather else 0.0
    every = tokens * inner * wide + own * 5 * config.dim * wide + kept
    boundary = own * config.dim * wide
    match layout.checkpointing:
        case "full":
            layer, once = boundary, every
        case "selective":  # attention and every second product are kept
            outputs = tokens * (2 * work.heads + work.kv + 2 * work.width + config.dim) / part.tp * wide
            layer, once = boundary + outputs / 2 + own * config.dim * wide, every
        case "half":
            layer, once = (boundary + every) / 2, every
        case _:
            layer, once = every, 0.0
    layers = config.n_layers / part.pp
    activations = layer * layers * layout.in_flight + once
    last = part.pp == 1 or layout.in_flight == 1
    logits = tokens * config.vocab_size / part.tp * layout.logits if last else 0.0
    spread = sharded > 1
    keep = part.pp > 1 or not part.reshard  # between micro-batches of a pipeline nothing is given back
    gathered = 2.0 * (mine if keep else 2 * work.layer / part.tp + ends) if spread else 2.0 * mine
    gradients = (
        4.0 * (mine if part.pp > 1 and layout.microbatches > 1 else work.layer / part.tp + ends) if spread else 0.0
    )
    gradients = max(gradients, logits)
    used = 16 * mine / sharded + gathered + gradients + activations
    return Memory(
        states=16 * mine / sharded,
        gathered=gathered,
        activations=activations,
        gradients=gradients,
        allocator=used * (cluster.rates.kept - 1),
    )


def _time(config: ModelConfig, layout: Layout, cluster: Cluster, work: _Work) -> Time:
    part, device, rates = layout.part, cluster.device, cluster.rates
    tokens = layout.rows * layout.length * layout.microbatches / part.cp  # of a step, on this rank
    share = part.tp * part.pp
    again = {"none": 0.0, "selective": 0.5, "half": 0.5, "full": 1.0}[layout.checkpointing]
    blocks = 0.0 if layout.checkpointing == "selective" else again  # whole blocks, attention and exchanges with them
    peak = device.tflops * 1e12 * rates.matrix
    quick = peak
    if layout.precision == "float8":
        if device.tflops_fp8 is None:
            raise ConfigError(f"{device.name} has no fp8 units")
        quick = device.tflops_fp8 * 1e12 * rates.matrix_fp8
    inner, head = work.weights - work.head, work.head
    matrices = tokens * 2 * (inner * (3 + again) / quick + head * 3 / peak) / share
    attention = (
        tokens * work.attention(layout.length) * (3.5 + blocks) / share / (device.tflops * 1e12 * rates.attention)
    )
    # Passes: about twelve over D between the matrices, and six over what is inside, in bf16, forward; twice that backward.
    moved = (12 * config.dim + 4 * (work.heads + 2 * work.kv) + 6 * work.width) * 2 / part.tp
    if layout.precision == "float8":
        moved += (3 * config.dim + work.width + work.heads) * 3 / part.tp  # casts and their largest values
    passes = (
        tokens * config.n_layers / part.pp * moved * (3 + again) * rates.traffic / (device.bandwidth * rates.passes)
    )
    passes += tokens * config.vocab_size * 16 / part.tp / part.pp / (device.bandwidth * rates.passes)
    inside, between = cluster.inside * rates.links, cluster.between * rates.links
    exchanged = tokens * config.dim * 2 * (part.tp - 1) / part.tp * config.n_layers / part.pp
    tp = exchanged * (8 + 3 * blocks) / (inside if part.tp <= cluster.node else between) * (1 - rates.hidden_tp)
    keys = tokens * 2 * work.kv / part.tp * 2 * (part.cp - 1) * config.n_layers / part.pp
    cp = keys * 3 / (inside if part.tp * part.cp <= cluster.node else between) if part.cp > 1 else 0.0
    busy = matrices + attention + passes
    mine = work.layers / share + work.ends / part.tp / (1 if part.pp == 1 else 2)
    sharded = part.dp_shard * part.cp
    far = part.tp * part.cp * part.dp_shard > cluster.node
    rounds = 1 if part.pp > 1 or not part.reshard else layout.microbatches
    sent = mine * (sharded - 1) / sharded * (2 * 2 * rounds + 4) + (mine / sharded * 8 if part.dp_replicate > 1 else 0)
    dp = sent / (between if far else inside)
    dp = dp * (1 - rates.hidden_dp) + max(0.0, dp * rates.hidden_dp - busy)
    sends = 2 * layout.rows * layout.microbatches * layout.length / part.cp / part.tp * config.dim * 2 * part.stages
    pp = sends / between * 0.1 if part.pp > 1 else 0.0
    optimiser = mine / sharded * 28 / (device.bandwidth * rates.passes)
    once = busy + tp + cp + pp
    return Time(
        matrices=matrices,
        attention=attention,
        passes=passes,
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        optimiser=optimiser,
        bubble=once * layout.bubble / (1 - layout.bubble),
    )

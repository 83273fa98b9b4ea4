"""Speed from two limits: bytes that have to pass through the memory, and operations that have to be done.

The efficiencies are what good kernels reach of a data sheet's numbers, in published measurements: reading weights for one
token at a time gets 80 % of the bandwidth in 16 bits, 70 % in 8 and 55 % in 4; reading a prompt gets half of the peak.
Weights in fp8 are multiplied in fp8 where the device can, all others in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from herd.model.accounting import flops_per_token
from herd.model.config import ModelConfig
from herd.planning.devices import Device
from herd.planning.memory import KVType, kv_bytes
from herd.planning.weights import Scheme, WeightBytes

__all__ = ["PREFILL_EFFICIENCY", "Load", "Speed", "decode_efficiency", "load_of", "speed"]

PREFILL_EFFICIENCY = 0.5


def decode_efficiency(bits: float) -> float:
    """Of the bandwidth, for weights of `bits`."""
    return 0.8 if bits > 9 else 0.7 if bits > 6.6 else 0.55


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one step costs, apart from the device.

    `dense_bytes` are read once for all sequences; `expert_bytes` are those of all routed experts, of which a token needs
    the fraction `routed`; `kv` are read for each sequence. `flops` per token at the end of the context, `prompt_flops` for the
    whole prompt.
    """

    dense_bytes: float
    expert_bytes: float
    routed: float
    kv: float
    flops: float
    prompt: int
    prompt_flops: float
    bits: float
    fp8: bool = False

    def weights_read(self, batch: int) -> float:
        """Bytes of weights that `batch` tokens need: the expected share of experts that any of them goes to."""
        return self.dense_bytes + self.expert_bytes * (1 - (1 - self.routed) ** batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Tokens per second. `decode` for each sequence, `decode_total` for all, `ceiling` as `decode` with a perfect program.

    `crossover` is the batch from which arithmetic and not memory limits the weights' share; `first_token` seconds
    until all sequences have their first reply token.
    `bound` says what limits decoding.
    """

    decode: float
    decode_total: float
    ceiling: float
    prefill: float
    first_token: float
    crossover: int
    bound: str


def load_of(
    config: ModelConfig, weights: WeightBytes, kv: KVType, context: int, prompt: int, how: Scheme | float
) -> Load:
    """The load of a decoder whose sequences are `context` tokens long. Chunked layers read their chunk only.

    `how`: the scheme of the weights, or the bits of a typical one.
    """
    table = 0 if config.tie_embeddings else weights.embedding  # one row of it is looked up
    moe = config.moe
    average = max((prompt + 1) // 2, 1)  # a prompt's tokens see half of it
    return Load(
        dense_bytes=weights.total - weights.experts - weights.beside - table,
        expert_bytes=weights.experts,
        routed=0.0 if moe is None else moe.top_k / moe.n_experts,
        kv=kv_bytes(config, kv, context, free_chunks=True),
        flops=flops_per_token(config, context),
        prompt=prompt,
        prompt_flops=prompt * flops_per_token(config, average),
        bits=how.bits if isinstance(how, Scheme) else how,
        fp8=isinstance(how, Scheme) and how.name == "fp8",
    )


def speed(load: Load, device: Device, batch: int) -> Speed:
    """How fast `device` decodes and reads with `batch` sequences at once. Several devices share perfectly: an upper bound."""
    efficiency = decode_efficiency(load.bits)
    bandwidth = device.bandwidth * device.count
    peak = 1e12 * device.count * ((load.fp8 and device.tflops_fp8) or device.tflops)
    traffic = load.weights_read(batch) + load.kv * batch
    by_memory, by_compute = traffic / (bandwidth * efficiency), load.flops * batch / (peak * PREFILL_EFFICIENCY)
    step = max(by_memory, by_compute)
    whole = load.weights_read(10**6) / bandwidth
    prompts = max(batch * load.prompt_flops / (peak * PREFILL_EFFICIENCY), whole)
    return Speed(
        decode=1 / step,
        decode_total=batch / step,
        ceiling=1 / max(traffic / bandwidth, load.flops * batch / peak),
        prefill=batch * load.prompt / prompts,
        first_token=prompts + step,
        crossover=_crossover(load, bandwidth * efficiency, peak * PREFILL_EFFICIENCY),
        bound="memory" if by_memory >= by_compute else "arithmetic",
    )


def _crossover(load: Load, bandwidth: float, peak: float) -> int:
    """The first power-of-two-or-between batch whose arithmetic takes as long as reading the weights."""
    low, high = 1, 1
    while load.flops * high / peak < load.weights_read(high) / bandwidth and high < 1 << 24:
        low, high = high, high * 2
    while low < high:
        middle = (low + high) // 2
        if load.flops * middle / peak < load.weights_read(middle) / bandwidth:
            low = middle + 1
        else:
            high = middle
    return high

"""herd.plan(model): what running a model takes on a device, before anything is downloaded or loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from herd.errors import ConfigError
from herd.planning.advice import Advice, advice
from herd.planning.devices import COMMON, Device, custom
from herd.planning.devices import device as device_named
from herd.planning.memory import PREFILL, kv_type
from herd.planning.savings import Savings, savings
from herd.planning.setup import MOST, Setup, largest
from herd.planning.speed import PREFILL_EFFICIENCY, Speed, decode_efficiency, speed
from herd.planning.subject import Subject, subject
from herd.planning.weights import Scheme, scheme

__all__ = ["Fit", "Plan", "plan"]

DEFAULT_CONTEXT = 8192
DEFAULT_PROMPT = 1024
LONGEST = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The plan on one device (or several of a kind).

    `each_bytes` is what the process that has most needs: all, where there is one. `largest_context` and `largest_batch` keep
    everything else as asked; 0: not even one, None: unknown. `cost_input` and `cost_output` are for a million tokens, None
    without a price. `advice` holds flags that make it fit when it does not.
    """

    device: Device
    fits: bool
    total_bytes: int
    each_bytes: int
    runtime_bytes: int
    largest_context: int | None
    largest_batch: int | None
    speed: Speed
    cost_input: float | None
    cost_output: float | None
    advice: tuple[Advice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What was asked, what it takes on every device, and everything that is assumed and not known."""

    setup: Setup
    fits: tuple[Fit, ...]
    savings: Savings | None
    assumptions: tuple[str, ...]

    @property
    def first(self) -> Fit:
        """On the device that was asked for; without one, on this machine."""
        return self.fits[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `herd plan --json` prints it (docs/plan.md has the keys)."""
        setup, first = self.setup, self.first
        own, parts = setup.subject, setup.weight_bytes
        known = own.config is not None or not own.decodes
        return {
            "schema": "herd.plan/1",
            "model": own.name,
            "parameters": own.parameters,
            "active_parameters": own.active,
            "weights": setup.weights.name if setup.weights else own.stored_as,
            "kv": setup.kv.name,
            "context": setup.context,
            "batch": setup.batch,
            "prompt": setup.prompt,
            "weights_bytes": parts.total,
            "kv_bytes_per_token": setup.kv_per_token,
            "kv_bytes": setup.batch * setup.kv_sequence() if known else None,
            "kv_bytes_chunks_freed": setup.batch * setup.kv_sequence(free_chunks=True) if known else None,
            "total_bytes": first.total_bytes,
            "tensor_parallel": setup.ranks,
            "each": None if setup.ranks == 1 else _each_dict(setup, first),
            "flops_per_token": setup.flops,
            "decode_tokens_per_second": first.speed.decode if own.decodes else None,
            "prefill_tokens_per_second": first.speed.prefill,
            "time_to_first_token_seconds": first.speed.first_token if own.decodes else None,
            "fits": first.fits,
            "breakdown": {
                **{f"weights_{name}": value for name, value in asdict(parts).items()},
                "kv": setup.batch * setup.kv_sequence() if known else None,
                "workspace": setup.workspace if known else None,
                "runtime": first.runtime_bytes,
            },
            "devices": [_fit_dict(fit, own) for fit in self.fits],
            "savings": None if self.savings is None else asdict(self.savings),
            "assumptions": list(self.assumptions),
        }


def plan(
    model: str | os.PathLike[str],
    *,
    context: int | None = None,
    batch: int = 1,
    weights: str | None = None,
    kv: str = "bf16",
    device: str | None = None,
    devices: int = 1,
    memory: float | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    prompt: int | None = None,
    price_per_hour: float | None = None,
    tensor_parallel: int = 1,
) -> Plan:
    """Memory, speed and cost of `model` (a path, or any name of the catalog), by arithmetic. No torch, no network.

    `context` tokens per sequence (default: 8,192, or the model's maximum), `batch` sequences, `prompt` tokens of the context
    that are read before the first reply token. `weights`: a name of `herd.planning.weights.SCHEMES`; by default as stored, or
    bf16 for a catalog name. `kv`: bf16, int8, fp8, ... `device`: a name of `herd.planning.devices.DEVICES`, "cpu" (this
    machine) or "custom" with `memory` (GiB), `bandwidth` (GB/s) and `flops` (TFLOP/s); None: several common ones.
    `price_per_hour` is for all `devices` together. `tensor_parallel` processes share the model, as `herd serve` runs it: a device
    for each, or on "cpu" all on this machine; bytes are of all of them, `Setup.share` has those of one. Raises UnknownModelError,
    CheckpointError, ConfigError.
    """
    for name, value in (("context", context), ("batch", batch), ("devices", devices), ("prompt", prompt),
                        ("tensor-parallel-size", tensor_parallel)):  # fmt: skip
        if value is not None and not 1 <= value <= LONGEST:
            raise ConfigError(f"--{name} is {value}: expected a whole number from 1 to {LONGEST}")
    if tensor_parallel > 1 and devices not in (1, tensor_parallel):
        raise ConfigError(
            f"--tensor-parallel-size {tensor_parallel} runs on as many devices, one for each process: leave --devices out"
        )
    asked = _devices(device, devices if device == "cpu" else max(devices, tensor_parallel), memory, bandwidth, flops)
    own = subject(model)
    notes: list[str] = []
    how = _weights(own, weights)
    longest = own.config.max_seq_len if own.config is not None else None
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or (DEFAULT_CONTEXT if own.decodes else 512))
        notes.append(f"context: {context:,} tokens per sequence, since none was given")
    elif longest is not None and context > longest:
        notes.append(f"the model was made for {longest:,} tokens of context, not {context:,}")
    if prompt is not None and prompt > context:
        raise ConfigError(f"a prompt of {prompt} tokens does not fit into a context of {context}")
    setup = Setup(
        subject=own,
        weights=how,
        kv=kv_type(kv),
        context=context,
        batch=batch,
        prompt=prompt or min(DEFAULT_PROMPT, context),
        ranks=tensor_parallel,
    )
    found = tuple(_fit(setup, one, price_per_hour) for one in asked)
    saved = None if own.config is None else savings(own.config, setup.kv, context, batch)
    notes = [*own.assumptions, *notes, *_assumed(setup, found)]
    return Plan(setup=setup, fits=found, savings=saved, assumptions=tuple(notes))


def _weights(own: Subject, weights: str | None) -> Scheme | None:
    if weights is None and own.stored is not None:
        return None
    return scheme(weights or own.suggested or "bf16")


def _devices(
    name: str | None, count: int, memory: float | None, bandwidth: float | None, flops: float | None
) -> list[Device]:
    given = {"--memory": memory, "--bandwidth": bandwidth, "--flops": flops}
    for flag, value in given.items():
        if value is not None and not 0 < value < 1e9:
            raise ConfigError(f"{flag} is {value:g}: expected a positive number")
    if name is None:
        if any(value is not None for value in given.values()):
            raise ConfigError("--memory, --bandwidth and --flops describe a device: add --device custom")
        return [device_named(one).times(1 if one == "cpu" else count) for one in COMMON]
    if name == "custom":
        missing = [flag for flag, value in given.items() if value is None]
        if memory is None or bandwidth is None or flops is None:
            raise ConfigError(f"--device custom needs {', '.join(missing)}")
        return [custom(memory, bandwidth, flops).times(count)]
    if name == "cpu" and count > 1:
        raise ConfigError("--devices counts accelerators: this machine is one")
    return [_with(device_named(name), memory, bandwidth, flops).times(count)]


def _with(device: Device, memory: float | None, bandwidth: float | None, flops: float | None) -> Device:
    """`device` with the numbers that were given instead of its own."""
    if memory is None and bandwidth is None and flops is None:
        return device
    other = custom(memory or 1, bandwidth or 1, flops or 1)
    return replace(
        device,
        memory=device.memory if memory is None else other.memory,
        bandwidth=device.bandwidth if bandwidth is None else other.bandwidth,
        tflops=device.tflops if flops is None else other.tflops,
        tflops_fp8=device.tflops_fp8 if flops is None else None,
        source=f"{device.source}; partly as given",
        assumed=tuple(
            note
            for note in device.assumed
            if not (bandwidth is not None and note.startswith("bandwidth"))
            and not (flops is not None and ("GFLOP" in note or note.startswith("peak")))
            and not (memory is not None and "memory" in note)
        ),
    )


def _fit(setup: Setup, device: Device, price: float | None) -> Fit:
    own = setup.subject
    fits = setup.fits(device)
    pace = speed(setup.load, device, setup.batch)
    context = batch = None
    if own.config is not None:
        longest = max(own.config.max_seq_len, setup.context)
        context = largest(lambda n: replace(setup, context=n, prompt=1).fits(device), longest)
        batch = largest(lambda n: replace(setup, batch=n).fits(device), MOST)
    per_token = None if price is None else price / 3600 * 1e6
    return Fit(
        device=device,
        fits=fits,
        total_bytes=setup.total(device),
        each_bytes=setup.each(device),
        runtime_bytes=setup.runtime(device),
        largest_context=context,
        largest_batch=batch,
        speed=pace,
        cost_input=None if per_token is None else per_token / pace.prefill,
        cost_output=None if per_token is None or not own.decodes else per_token / pace.decode_total,
        advice=() if fits else advice(setup, device),
    )


def _assumed(setup: Setup, fits: Sequence[Fit]) -> list[str]:
    """What the figures rest on that nobody measured here."""
    bits = setup.bits
    own = setup.subject
    notes = ["runtime: 1 GiB per accelerator, 0.5 GiB on a processor"]
    if own.config is not None:
        notes.append(
            f"workspace: activations of one layer over {PREFILL} tokens, fused attention, two copies of float32 logits"
        )
    if own.decodes:
        reached = f"decoding reaches {decode_efficiency(bits):.0%} of the bandwidth at {bits:.3g} bits per weight"
        notes.append(f"{reached}, reading a prompt {PREFILL_EFFICIENCY:.0%} of the peak: what good kernels do")
    else:
        notes.append(f"reading a text reaches {PREFILL_EFFICIENCY:.0%} of the peak")
    if own.parameters < 10**9:
        notes.append("starting kernels is left out: models below a billion parameters are slower than this")
    if setup.weights is not None:
        notes.append(f"weights {setup.weights.name}: {setup.weights.says}")
    for fit in fits:
        notes += [f"{fit.device.name}: {note}" for note in fit.device.assumed]
    if setup.ranks > 1:
        notes.append(
            f"each of {setup.ranks} processes has its part of every matrix and of keys and values; norms, activations and logits "
            "are in all of them" + (", and what is beside the decoder" if own.beside else "")
        )
        if any(fit.device.name == "cpu" for fit in fits):
            notes.append("cpu: all processes are on this machine, and share its memory and its cores")
    if any(fit.device.count > 1 for fit in fits):
        notes.append("several devices share weights and work perfectly, with no time for talking: an upper bound")
    if own.config is not None and own.config.moe is not None and setup.batch > 1:
        notes.append("experts are chosen evenly and independently: a batch reads the expected share of them")
    return notes


def _each_dict(setup: Setup, fit: Fit) -> dict[str, Any]:
    """What the process that has most needs, by part; they add up to its total."""
    share = setup.shares[0]
    parts = {f"weights_{name}": value for name, value in asdict(share.weights).items()}
    runtime = fit.runtime_bytes // setup.ranks
    parts |= {"kv": share.kv, "workspace": share.workspace, "runtime": runtime}
    return {**parts, "total_bytes": setup.each(fit.device)}


def _fit_dict(fit: Fit, own: Subject) -> dict[str, Any]:
    device, pace = fit.device, fit.speed
    return {
        "name": device.name,
        "count": device.count,
        "memory_bytes": device.memory * device.count,
        "bandwidth_bytes_per_second": device.bandwidth * device.count,
        "tflops": device.tflops * device.count,
        "tflops_fp8": None if device.tflops_fp8 is None else device.tflops_fp8 * device.count,
        "tops_int8": None if device.tops_int8 is None else device.tops_int8 * device.count,
        "source": device.source,
        "fits": fit.fits,
        "total_bytes": fit.total_bytes,
        "each_bytes": fit.each_bytes,
        "largest_context": fit.largest_context,
        "largest_batch": fit.largest_batch,
        "decode_tokens_per_second": pace.decode if own.decodes else None,
        "decode_tokens_per_second_all": pace.decode_total if own.decodes else None,
        "decode_tokens_per_second_ceiling": pace.ceiling if own.decodes else None,
        "decode_bound": pace.bound if own.decodes else None,
        "compute_bound_from_batch": pace.crossover if own.decodes else None,
        "prefill_tokens_per_second": pace.prefill,
        "time_to_first_token_seconds": pace.first_token if own.decodes else None,
        "cost_per_million_input_tokens": fit.cost_input,
        "cost_per_million_output_tokens": fit.cost_output,
        "advice": [asdict(one) for one in fit.advice],
    }

"""One way to run a model: number formats, context and batch, and what it then needs and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property

from herd.errors import ConfigError
from herd.model.accounting import flops_per_token, kv_bytes_per_token
from herd.model.config import ModelConfig
from herd.parallel.part import Part
from herd.planning.devices import Device
from herd.planning.memory import RUNTIME, KVType, cross_bytes, kv_bytes, workspace_bytes
from herd.planning.speed import Load, load_of
from herd.planning.subject import Subject
from herd.planning.weights import Scheme, WeightBytes, part_bytes, weight_bytes

__all__ = ["Setup", "Share", "largest"]

MOST = 1 << 20
"""Where the search for the largest batch ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one of several processes holds: bytes of its part of the weights, of its keys and values, of its workspace."""

    weights: WeightBytes
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it, without the program itself."""
        return self.weights.total + self.kv + self.workspace


@dataclass(frozen=True, kw_only=True)
class Setup:
    """`weights` None: as stored in the checkpoint. `context` and `prompt` in tokens per sequence, of which there are `batch`.

    `ranks` processes share the model, each on a device of its own or all on this machine; bytes are those of all together.
    """

    subject: Subject
    weights: Scheme | None
    kv: KVType
    context: int
    batch: int
    prompt: int
    ranks: int = 1

    def share(self, rank: int) -> Share:
        """What process `rank` of `ranks` holds; none holds more than the first. Raises ConfigError when they cannot share it."""
        subject = self.subject
        if subject.config is None:
            raise ConfigError(f"{subject.name} cannot be shared by processes: its matrices are not known")
        part = Part(subject.config, rank, self.ranks)
        if self.weights is None:
            if subject.whole is not None:
                raise ConfigError(f"{subject.name} cannot be shared by processes: it has {subject.whole}")
            weights = part_bytes(subject.kept, part)
        else:
            weights = weight_bytes(part.config, self.weights, subject.beside)
        kv = kv_bytes(part.config, self.kv, self.context)
        kv += cross_bytes(part.config, subject.cross_layers, subject.cross_tokens)
        whole = replace(part.config, vocab_size=subject.config.vocab_size)  # every process has the logits of all tokens
        return Share(weights=weights, kv=self.batch * kv, workspace=workspace_bytes(whole, self.context, self.batch))

    @cached_property
    def shares(self) -> tuple[Share, Share]:
        """Of the first process, which is as all but the last, and of the last: it can have fewer rows of the vocabulary."""
        return self.share(0), self.share(self.ranks - 1)

    @cached_property
    def weight_bytes(self) -> WeightBytes:
        """By part. Without a known geometry everything counts as matrices of the layers."""
        subject = self.subject
        if self.ranks > 1:
            first, last = self.shares
            names = (one.name for one in fields(WeightBytes))
            return WeightBytes(
                **{n: getattr(first.weights, n) * (self.ranks - 1) + getattr(last.weights, n) for n in names}
            )
        if subject.config is None:
            return WeightBytes(0, 0, round(subject.parameters * self.bits / 8), 0, 0)
        if self.weights is None:
            assert subject.stored is not None
            return subject.stored
        return weight_bytes(subject.config, self.weights, subject.beside)

    @property
    def bits(self) -> float:
        """Of a typical weight."""
        if self.weights is not None:
            return self.weights.bits
        assert self.subject.stored is not None
        return 8 * self.subject.stored.total / self.subject.parameters

    @property
    def kv_per_token(self) -> int | float | None:
        """Bytes of keys and values of a token; None where the geometry is unknown, 0 for an encoder."""
        config = self.subject.config
        if config is None:
            return None if self.subject.decodes else 0
        config = self._with_copies(config)
        exact = kv_bytes_per_token(config, self.kv.bytes_per_value(config.head_dim))
        return int(exact) if exact == int(exact) else exact

    def _with_copies(self, config: ModelConfig) -> ModelConfig:
        """With more processes than key/value heads, neighbours keep the same head."""
        return replace(config, n_kv_heads=self.ranks) if self.ranks > config.n_kv_heads else config

    def kv_sequence(self, *, free_chunks: bool = False) -> int:
        """Bytes of keys and values of one sequence, those of an image included; 0 where unknown."""
        subject = self.subject
        if subject.config is None:
            return 0
        config = self._with_copies(subject.config)
        text = kv_bytes(config, self.kv, self.context, free_chunks=free_chunks)
        return text + cross_bytes(config, subject.cross_layers, subject.cross_tokens)

    @property
    def workspace(self) -> int:
        """Activations and logits; 0 where the geometry is unknown."""
        config = self.subject.config
        if self.ranks > 1:
            return self.shares[0].workspace * self.ranks
        return 0 if config is None else workspace_bytes(config, self.context, self.batch)

    def runtime(self, device: Device) -> int:
        """Assumed for the program itself, in every process."""
        return RUNTIME["cpu"] * self.ranks if device.name == "cpu" else RUNTIME["gpu"] * device.count

    def each(self, device: Device) -> int:
        """Bytes of the process that has most; of one process, all."""
        return self.total(device) if self.ranks == 1 else self.shares[0].total + self.runtime(device) // self.ranks

    def total(self, device: Device) -> int:
        """Bytes on all devices together."""
        return self.weight_bytes.total + self.batch * self.kv_sequence() + self.workspace + self.runtime(device)

    def fits(self, device: Device) -> bool:
        """Whether it does: all devices together, or every process on its own device."""
        if self.ranks > 1 and device.name != "cpu":
            return self.each(device) <= device.memory
        return self.total(device) <= device.memory * device.count

    @property
    def flops(self) -> int:
        """Operations for the last token of the context."""
        config = self.subject.config
        return 2 * self.subject.active if config is None else flops_per_token(config, self.context)

    @property
    def load(self) -> Load:
        """What a step costs, apart from the device."""
        subject = self.subject
        if subject.config is not None:
            load = load_of(
                subject.config, self.weight_bytes, self.kv, self.context, self.prompt, self.weights or self.bits
            )
            kept = kv_bytes(self._with_copies(subject.config), self.kv, self.context, free_chunks=True)
            return load if self.ranks == 1 else replace(load, kv=kept)
        return Load(
            dense_bytes=subject.active * self.bits / 8,
            expert_bytes=0,
            routed=0,
            kv=0,
            flops=self.flops,
            prompt=self.prompt,
            prompt_flops=self.prompt * self.flops,
            bits=self.bits,
        )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which `fits` still holds, which must turn false only once; 0: not even 1."""
    if not fits(1):
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low

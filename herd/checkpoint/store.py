"""One view of a checkpoint, whatever its files look like.

A TensorStore names tensors as `herd.model.llama.Llama` does (Meta's names) and gives them in that model's layout: RoPE
rows interleaved, experts stacked [E, out, in]. The Meta, Hugging Face and GGUF stores differ only below this line.
Opening a store and asking it anything but numbers imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from herd.chat.params import SamplingParams
from herd.model.config import ModelConfig
from herd.quant.numbers import torch_dtype

if TYPE_CHECKING:
    import torch

    from herd.checkpoint.mapped import MappedFile, Span
    from herd.checkpoint.quantized.module import Packed, Stored
    from herd.quant.scheme import QuantTensor

__all__ = [
    "GenerationDefaults",
    "HoldsPacked",
    "KeepsBlocks",
    "ReadOften",
    "ReadsInto",
    "ReadsParts",
    "Releases",
    "TensorFile",
    "TensorInfo",
    "TensorStore",
    "origin",
    "packed_of",
]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor before it is read: its final shape, how the file stores it, and its bytes on disk.

    `number` names the torch dtype that `read` returns; `stored` is the file's own word ("BF16", "Q4_K", ...).
    """

    shape: tuple[int, ...]
    number: str
    stored: str
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that `read` returns. Imports torch."""
        return torch_dtype(self.number)


class TensorStore(Protocol):
    """Lazy, read-only access. Opening reads headers only; every failure is a CheckpointError naming file and tensor."""

    kind: str
    """"meta", "hf" or "gguf"."""
    path: str
    config: ModelConfig

    def names(self) -> Iterable[str]:
        """Canonical names present, the tied output excluded."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and stored form, without reading the data."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor in canonical layout, quantized blocks dequantized to float32; a view of the mapped file where possible."""
        ...

    def metadata(self) -> Mapping[str, Any]:
        """The file's own description (params.json, config.json or GGUF keys) as plain data."""
        ...


@runtime_checkable
class Releases(Protocol):
    """A store over mapped files that can let go of their memory after a copy was made."""

    def release(self, name: str) -> None:
        """The file pages behind `name` may leave memory; reading it again is allowed."""
        ...


@runtime_checkable
class ReadOften(Protocol):
    """A store over mapped files whose weights are used where they are mapped."""

    def large_pages(self) -> None:
        """Ask for large pages: the files will be read from front to back, again and again."""
        ...


@runtime_checkable
class ReadsInto(Protocol):
    """A store that can put a tensor straight into its place, without a passing copy of the whole."""

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Copy the tensor into `out`, which has its shape and any dtype and device."""
        ...


@runtime_checkable
class ReadsParts(Protocol):
    """A store that reads a part of a tensor without making the whole of it."""

    def read_part(self, name: str, dim: int, start: int, count: int) -> torch.Tensor:
        """As `read(name).narrow(dim, start, count)`; parts of heads are whole heads."""
        ...


@runtime_checkable
class KeepsBlocks(Protocol):
    """A store whose files can hold quantized blocks."""

    def raw(self, name: str) -> torch.Tensor | QuantTensor:
        """As `read`, but quantized blocks as they are: a QuantTensor over a view of the file."""
        ...


@runtime_checkable
class HoldsPacked(Protocol):
    """A store whose files can hold matrices as other tools quantized them (`herd.checkpoint.quantized`)."""

    dequantized: str
    """The name of the 16-bit dtype of its plain tensors: what such matrices become where no kind holds them."""

    def packed(self, name: str) -> Packed | None:
        """The matrix in that tool's form; None for plain ones."""
        ...

    def held(self, name: str, kind: str) -> Stored:
        """Its values in `kind`, which its form `holds`."""
        ...


def packed_of(store: TensorStore, name: str) -> Packed | None:
    """The tensor `name` as another tool quantized it; None for plain tensors and for GGUF's blocks."""
    return store.packed(name) if isinstance(store, HoldsPacked) else None


def origin(store: TensorStore) -> TensorStore:
    """The store over files whose own tokenizer, config and keys go with `store`: itself, or what it changes weights of."""
    return getattr(store, "origin", store)


class TensorFile(Protocol):
    """One file of named tensors, in its own names: what the Meta and Hugging Face stores are built from."""

    path: Path
    map: MappedFile

    def names(self) -> Iterable[str]: ...

    def describe(self, name: str) -> TensorInfo: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor, a view of the mapped file."""
        ...

    def span(self, name: str) -> Span | None:
        """Where the tensor's bytes lie, row-major; None when it is stored with other strides."""
        ...

    def release(self, name: str) -> None:
        """Let go of the file pages behind a tensor that has been copied."""
        ...


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json says: stop ids and sampling defaults, each None when it is silent.

    Named as in SamplingParams; `extra` holds what would change sampling but is not honoured, `chosen` fields of SamplingParams
    that somebody set for this model (`herd create`).
    """

    stop_ids: frozenset[int] = frozenset()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)

    def params(self, **chosen: Any) -> SamplingParams:
        """`chosen` over what was set for the model, over the checkpoint's own defaults, over Meta's.

        Raises ConfigError naming a wrong field.
        """
        own = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        return SamplingParams(**(own | dict(self.chosen) | chosen))


_SAMPLING = ("stop_ids", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")

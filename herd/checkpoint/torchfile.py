"""Reader for torch.save files (.pth, .bin, .pt) that reads tensors and nothing else.

The pickle inside is interpreted, never executed (`herd.checkpoint.unpickle`), and storages are views of the mapped file.
The old format from before torch 1.6, a bare pickle followed by data, is refused: no Llama was released in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from herd.checkpoint.archive import read_archive
from herd.checkpoint.mapped import MappedFile, Span
from herd.checkpoint.store import TensorInfo
from herd.checkpoint.unpickle import ForbiddenGlobalError, TensorSpec, unpickle
from herd.errors import CheckpointError
from herd.quant.numbers import torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["TorchFile"]

MAX_PICKLE = 32 << 20
"""Bytes of the largest pickle worth interpreting: 405B's is a quarter of a megabyte."""

_ALIASING = 4
"""Tensors may share storage (tied weights do), but not claim more than this many times the file's size together."""

_WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


class TorchFile:
    """An opened file: the top-level tensors of its dict by name, each checked against its storage. Raises CheckpointError.

    `saved_as` is the folder inside the archive: torch.save names it after the file it first wrote, without the suffix.
    """

    kind = "torch"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.map = MappedFile(path)
        self.path = self.map.path
        self._spans = self._open()
        self._root, data = self._program()
        self.saved_as = self._root.rstrip("/")
        if not isinstance(data, dict):
            raise CheckpointError(f"holds a {type(data).__name__}, expected a dict of tensors", path=self.path)
        self.specs = {str(name): spec for name, spec in data.items() if isinstance(spec, TensorSpec)}
        if not self.specs:
            raise CheckpointError("holds no tensors at its top level", path=self.path)
        total = 0
        for name, spec in self.specs.items():
            self._place(name, spec)
            total += spec.nbytes
        if total > _ALIASING * self.map.size:
            raise CheckpointError(f"its tensors claim {total} bytes, the file has {self.map.size}", path=self.path)

    def names(self) -> Iterable[str]:
        """Names in the order of the dict."""
        return self.specs

    def describe(self, name: str) -> TensorInfo:
        """Shape, dtype and size, without touching the data."""
        spec = self.specs[name]
        return TensorInfo(spec.shape, spec.number, _WORDS.get(spec.number, spec.number.upper()), spec.nbytes)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, a view of the file with the strides it was saved with."""
        spec = self.specs[name]
        span = self._place(name, spec)
        flat = self.map.tensor(span.start, torch_dtype(spec.number), (spec.storage.nbytes // spec.itemsize,))
        try:
            return flat.as_strided(spec.shape, spec.strides, flat.storage_offset() + spec.offset)
        except (RuntimeError, OverflowError) as error:  # empty, with absurd sizes beside the zero
            raise CheckpointError(f"shape {spec.shape} overflows", path=self.path, tensor=name[:200]) from error

    def span(self, name: str) -> Span | None:
        """Where the bytes of `name` lie; None when it was saved with strides of its own."""
        spec = self.specs[name]
        if not spec.contiguous:
            return None
        return Span(self._place(name, spec).start + spec.offset * spec.itemsize, spec.nbytes)

    def release(self, name: str) -> None:
        """Drop the memory behind a tensor that has been copied."""
        span = self._place(name, self.specs[name])
        self.map.release(span.start, span.size)

    def _open(self) -> dict[str, Span]:
        head = self.map.bytes(0, min(4, self.map.size))
        if head == b"PK\x03\x04":
            return read_archive(self.map)
        try:  # refused in any case, but people should know what a bare pickle asks for
            unpickle(self.map.bytes(0, min(self.map.size, MAX_PICKLE)), self.path)
        except ForbiddenGlobalError:
            raise
        except CheckpointError:
            if head[:1] != b"\x80":
                raise CheckpointError("not a torch.save file: it is no zip archive", path=self.path, offset=0) from None
        raise CheckpointError(
            "a torch file in the format of before 2020, or another bare pickle: "
            "save it again with torch.save, or better as safetensors",
            path=self.path,
        )

    def _program(self) -> tuple[str, Any]:
        """(folder inside the archive, the interpreted data.pkl)."""
        found = [name for name in self._spans if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise CheckpointError("not a torch.save file: the archive has no single data.pkl", path=self.path)
        root = found[0].removesuffix("data.pkl")
        if root + "constants.pkl" in self._spans:
            raise CheckpointError("a TorchScript program, not a checkpoint", path=self.path)
        order = self._spans.get(root + "byteorder")
        if order is not None and self.map.bytes(order.start, min(order.size, 16)) != b"little":
            raise CheckpointError("saved on a big-endian machine, which herd does not read", path=self.path)
        span = self._spans[found[0]]
        if span.size > MAX_PICKLE:
            raise CheckpointError(f"its data.pkl is larger than {MAX_PICKLE} bytes", path=self.path, offset=span.start)
        return root, unpickle(self.map.bytes(*span), self.path, span.start)

    def _place(self, name: str, spec: TensorSpec) -> Span:
        """Where the storage of `spec` lies, checked to hold it."""
        span = self._spans.get(f"{self._root}data/{spec.storage.key}")
        if span is None:
            raise CheckpointError("its data is not in the archive", path=self.path, tensor=name[:200])
        if spec.storage.nbytes > span.size:
            raise CheckpointError(
                f"its storage should have {spec.storage.nbytes} bytes, the archive has {span.size}",
                path=self.path,
                tensor=name[:200],
                offset=span.start,
            )
        return span

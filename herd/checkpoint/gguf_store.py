"""GGUF files as a TensorStore: one file, or all parts of a split one.

Attention rows lie as in Meta's checkpoints (llama.cpp undoes Hugging Face's permutation for `llama` and never had one for
`llama4`), experts are [E, out, in] and the router [E, in]: every tensor is canonical as it is, and plain types are read as
views of the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from herd.checkpoint.gguf import GGUFFile
from herd.checkpoint.gguf_config import ROPE_TABLE, read_config, read_sampling
from herd.checkpoint.mapped import slices
from herd.checkpoint.names import homes, ignored, shapes
from herd.checkpoint.store import TensorInfo
from herd.errors import CheckpointError
from herd.files import short
from herd.quant.scheme import BLOCK_TYPES, QuantTensor

if TYPE_CHECKING:
    import torch

__all__ = ["GGUFStore"]

PLAIN = ("F32", "F16", "BF16")
MAX_PARTS = 4096

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_VISION = ("v.", "mm.")  # Ollama keeps Llama 4's vision half in the same file


class GGUFStore:
    """A TensorStore over the file `path`; of a split file any part may be given. Raises CheckpointError.

    `skipped` names tensors of the vision half of a Llama 4 file, which the text model does not use. `generation` holds the
    sampling defaults that came with the model.
    """

    kind = "gguf"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._parts = _open_parts(Path(path))
        self._files = {name: part for part in self._parts for name in part.entries}
        self._metadata = self._parts[0].metadata
        found = {name: part.entries[name].shape for name, part in self._files.items()}
        self.config = read_config(self._metadata, found, self._rope_table())
        self._homes = {name: home.name for name, home in homes(self.config, "gguf").items()}
        early_fusion = self._metadata["general.architecture"] == "llama4"
        self.skipped = tuple(name for name in found if early_fusion and name.startswith(_VISION))
        self.generation = read_sampling(self._metadata)
        self._check()

    def names(self) -> Iterable[str]:
        """Canonical names, the tied output excluded."""
        return self._homes

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype that `read` gives, GGML type and bytes in the file."""
        file, foreign = self._home(name)
        return file.describe(foreign)

    def read(self, name: str) -> torch.Tensor:
        """A view of the file for F32, F16 and BF16; quantized blocks dequantized to a float32 tensor of its own."""
        file, foreign = self._home(name)
        tensor = file.tensor(foreign)
        if file.entries[foreign].type.decodable:
            file.release(foreign)
        return tensor

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Decode or copy into `out`, of the tensor's shape and any dtype and device, a few rows at a time: neither a passing
        copy nor many pages of the file are in memory at once."""
        file, foreign = self._home(name)
        stored = file.raw(foreign)
        for rows in slices(out):
            part = out[rows]
            if isinstance(stored, QuantTensor):
                part.copy_(QuantTensor(stored.blocks[rows], stored.type, tuple(part.shape)).dequantize(out.dtype))
            else:
                part.copy_(stored[rows])
            file.release(foreign)

    def raw(self, name: str) -> torch.Tensor | QuantTensor:
        """As `read`, but quantized blocks as they are: a QuantTensor over a view of the file."""
        file, foreign = self._home(name)
        return file.raw(foreign)

    def release(self, name: str) -> None:
        """Let go of the file pages behind `name`."""
        file, foreign = self._home(name)
        file.release(foreign)

    def large_pages(self) -> None:
        """Ask for large pages for every part."""
        for file in {id(file): file for file in self._files.values()}.values():
            file.map.large_pages()

    def metadata(self) -> Mapping[str, Any]:
        """All GGUF keys, tokenizer included; arrays become lists when asked for."""
        return self._metadata

    def file_of(self, name: str) -> Path:
        """The file that holds the canonical tensor `name`."""
        return self._home(name)[0].path

    def _rope_table(self) -> np.ndarray | None:
        """The divisors of Llama 3.1's frequencies, when the file has them."""
        part = self._files.get(ROPE_TABLE)
        if part is None:
            return None
        entry = part.entries[ROPE_TABLE]
        if entry.type.name != "F32":
            raise CheckpointError(f"type {entry.type.name}: expected F32", path=part.path, tensor=ROPE_TABLE)
        return np.frombuffer(part.map.bytes(entry.start, entry.stop - entry.start), "<f4").reshape(entry.shape)

    def _home(self, name: str) -> tuple[GGUFFile, str]:
        foreign = self._homes.get(name)
        if foreign is None:
            raise CheckpointError("there is no such parameter in this model", path=self.path, tensor=name)
        return self._files[foreign], foreign

    def _check(self) -> None:
        """Every parameter is there once, in its shape and in a type that herd reads; nothing else is there."""
        missing = [foreign for foreign in self._homes.values() if foreign not in self._files]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(f"missing{more}, but the metadata describes it", path=self.path, tensor=missing[0])
        expected = set(self._homes.values())
        for name, file in self._files.items():
            if name not in expected and name not in self.skipped and not ignored("gguf", name):
                raise CheckpointError(
                    "the model that the metadata describes has no such parameter", path=file.path, tensor=name
                )
        for name, shape in shapes(self.config).items():
            file, foreign = self._home(name)
            entry = file.entries[foreign]
            if entry.shape != shape:
                raise CheckpointError(
                    f"shape {entry.shape}, but the metadata describes {shape}", path=file.path, tensor=foreign
                )
            if not entry.type.decodable and entry.type.name not in PLAIN:
                readable = ", ".join(t.name for t in BLOCK_TYPES if t.decodable or t.name in PLAIN)
                raise CheckpointError(
                    f"type {entry.type.name} cannot be read: herd reads {readable}", path=file.path, tensor=foreign
                )


def _open_parts(path: Path) -> list[GGUFFile]:
    """The file, or all parts of a split model in order. Raises CheckpointError for missing and foreign parts."""
    given = GGUFFile(path)
    count = _small(given, "split.count", 1)
    if count <= 1:
        return [given]
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        why = f"is one of {count} parts, so its name must end in -00001-of-{count:05d}.gguf and the like: rename the parts back"
        raise CheckpointError(why, path=path, offset=given.metadata.offset("split.count"))
    parts = []
    for number in range(1, count + 1):
        sibling = path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        parts.append(given if sibling == path else _open_part(sibling, count))
        if _small(parts[-1], "split.no", -1) != number - 1 or _small(parts[-1], "split.count", 1) != count:
            parts[-1].metadata.fail(
                "split.no", f"does not say that this is part {number} of {count}: are parts swapped?"
            )
    _check_parts(parts)
    return parts


def _open_part(path: Path, count: int) -> GGUFFile:
    if not path.is_file():
        raise CheckpointError(f"is missing: all {count} parts of the model must be in one folder", path=path)
    return GGUFFile(path)


def _check_parts(parts: list[GGUFFile]) -> None:
    """No tensor in two parts, and as many as the first part announces."""
    seen: dict[str, GGUFFile] = {}
    for part in parts:
        for name in part.entries:
            if name in seen:
                raise CheckpointError(f"is also in {seen[name].path.name}", path=part.path, tensor=name)
            seen[name] = part
    announced = _small(parts[0], "split.tensors.count", len(seen))
    if announced != len(seen):
        parts[0].metadata.fail("split.tensors.count", f"is {announced}, but the parts hold {len(seen)} tensors")


def _small(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or not -1 <= value <= 1 << 16 or (key == "split.count" and value > MAX_PARTS):
        file.metadata.fail(key, f"is {short(value)}: expected a small number")
    return value

"""Packed copies: a model's matrices as the native library reads them, in a file of their own that the next start maps.

Quantized files lie row by row, and the library multiplies with panels (`csrc/formats.h`). Making panels takes about a second per
gigabyte and memory of the process's own; a mapped copy takes neither, is shared by processes, and goes when memory is short.

A copy is found by what its panels depend on: size, time and sampled bytes of the source files, names, shapes and types of the
tensors, and what this build of the library makes of a known matrix, so that a new layout finds no old copies. It is used only
when its checksum is right, and made anew otherwise. Losing one costs the time of making it.

    header  HEADER bytes: MAGIC, key (32), checksum (16), bytes of the panels (8), length and text of the source's path
    panels  of one tensor after the other in the model's order, each at a multiple of ALIGN

HERD_PACKED names another folder (default: herd/packed in XDG_CACHE_HOME or ~/.cache), or is `off`. HERD_PACKED_LIMIT is how many
bytes all copies may take (default 32 GiB): those that were not used for longest go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from herd.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from herd.checkpoint.store import TensorStore
    from herd.quant.scheme import BlockType

__all__ = ["LEAST", "Copy", "PackedCopy", "copies", "folder", "limit", "open_packed"]

MAGIC = b"HERDPK01"
HEADER = 4096
ALIGN = 64
SUFFIX = ".packed"

LEAST = 64 << 20
"""Bytes of panels from which on a copy is kept: smaller models are packed in a moment."""

SPARE = 4
"""A copy is made where so many times its size is free on the disk."""

SAMPLES, SAMPLE = 256, 4096
"""Parts of a source file that are looked at, and their bytes: files of one size and time still differ there."""

_FIXED = struct.Struct("<8s32s16sQI")


@dataclass(frozen=True, slots=True)
class Copy:
    """A packed copy on the disk, as it describes itself. `used`: when it was made or opened last, seconds since the epoch."""

    path: Path
    source: str
    size: int
    used: float


class PackedCopy:
    """A mapped copy. `panels` gives those of a tensor by its canonical name."""

    def __init__(self, path: Path, places: Mapping[str, tuple[int, int]]) -> None:
        from herd.checkpoint.mapped import MappedFile

        self.path, self._places = path, places
        self._file = MappedFile(path)
        self._file.large_pages()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def panels(self, name: str) -> torch.Tensor:
        """A view of the file, uint8."""
        import torch

        offset, size = self._places[name]
        return self._file.tensor(HEADER + offset, torch.uint8, (size,))

    def checksum(self) -> bytes:
        """Of all panels; reads them, so that they are in memory afterwards."""
        from herd.kernels import native

        sums = b"".join(native.checksum(self.panels(name)).to_bytes(8, "little") for name in self._places)
        return hashlib.blake2b(sums, digest_size=16).digest()


def folder() -> Path | None:
    """Where copies lie; None when they are switched off."""
    said = os.environ.get("HERD_PACKED", "")
    if said.lower() in ("off", "0", "no", "false", "none"):
        return None
    if said:
        return Path(said).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "herd" / "packed"


def limit() -> int:
    """Bytes that all copies together may take. Raises ConfigError for a limit that is none."""
    said = os.environ.get("HERD_PACKED_LIMIT", "32 GiB")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", said, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"HERD_PACKED_LIMIT is {said[:40]!r}: expected bytes such as 20 GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))


def copies(where: Path | None = None) -> list[Copy]:
    """Every copy in `where` (default: `folder()`), the one used last first. Files that are no copies are left out."""
    where = folder() if where is None else where
    found = []
    for path in where.glob(f"*{SUFFIX}") if where is not None else ():
        with contextlib.suppress(OSError):
            head = _head(path)
            about = path.stat()
            if head is not None:
                found.append(Copy(path, head[3], about.st_size, about.st_mtime))
    return sorted(found, key=lambda copy: -copy.used)


def open_packed(
    store: TensorStore, kinds: Mapping[str, BlockType], tick: Callable[[str], None] = lambda name: None
) -> PackedCopy | None:
    """The copy of those matrices in `kinds` that are stored in that very type, made now when there is none.

    `tick` is told each tensor that was packed. None when copies are switched off, when the model is small, and when none can be
    kept (a folder that cannot be written, a full disk): the caller then packs in memory. Raises ConfigError for a limit that is
    none.
    """
    where = folder()
    if where is None:
        return None
    sizes, names = _sizes(store, kinds), []
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = (end, size)
        names.append(f"{name} {store.info(name).shape} {kinds[name].name}")
        end += -(-size // ALIGN) * ALIGN
    if end < LEAST:
        return None
    try:
        key = _key(store, sizes, [kinds[name] for name in sizes], names)
    except (AttributeError, OSError):  # a store without files, a file that just went
        return None
    path = where / f"{_stem(store)}-{key.hex()[:16]}{SUFFIX}"
    with contextlib.suppress(OSError, CheckpointError):
        copy = _opened(path, places, end, key)
        if copy is not None:
            return copy
    try:
        if not _room(where, end):
            return None
        _make(path, store, kinds, places, end, key, tick)
        return PackedCopy(path, places)
    except (OSError, CheckpointError):
        return None


def _opened(path: Path, places: Mapping[str, tuple[int, int]], size: int, key: bytes) -> PackedCopy | None:
    """The copy at `path`; None when there is none, or one of something else, or a damaged one."""
    head = _head(path)
    if head is None or head[0] != key or head[2] != size or path.stat().st_size != HEADER + size:
        return None
    copy = PackedCopy(path, places)
    if copy.checksum() != head[1]:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return copy


def _head(path: Path) -> tuple[bytes, bytes, int, str] | None:
    """Key, checksum, bytes of the panels and source of a copy; None for another file. Raises OSError."""
    with open(path, "rb") as file:
        data = file.read(HEADER)
    if len(data) < HEADER or not data.startswith(MAGIC):
        return None
    _, key, checksum, size, length = _FIXED.unpack_from(data)
    return key, checksum, size, data[_FIXED.size : _FIXED.size + min(length, HEADER)].decode(errors="replace")


def _make(
    path: Path,
    store: TensorStore,
    kinds: Mapping[str, BlockType],
    places: Mapping[str, tuple[int, int]],
    size: int,
    key: bytes,
    tick: Callable[[str], None],
) -> None:
    from herd.checkpoint.write.atomic import new_file
    from herd.checkpoint.write.large import LargeFile
    from herd.kernels import native

    path.parent.mkdir(parents=True, exist_ok=True)
    source = str(Path(store.path).resolve()).encode(errors="replace")[: HEADER - _FIXED.size]
    sums = []
    with new_file(path, size=HEADER + size, overwrite=True) as growing, LargeFile(growing) as file:
        file.write(bytes(HEADER))
        for name, (offset, _) in places.items():
            file.write(bytes(HEADER + offset - file.tell()))
            panels = _packed(store, name, kinds[name])
            sums.append(native.checksum(panels).to_bytes(8, "little"))
            file.write(panels.numpy().data)
            tick(name)
        file.write(bytes(HEADER + size - file.tell()))
        checksum = hashlib.blake2b(b"".join(sums), digest_size=16).digest()
        file.sync()
        file.overwrite(_FIXED.pack(MAGIC, key, checksum, size, len(source)) + source)


def _packed(store: TensorStore, name: str, kind: BlockType) -> torch.Tensor:
    """The panels of one tensor (of all its matrices, one after the other)."""
    import torch

    from herd.checkpoint.store import KeepsBlocks, Releases
    from herd.kernels import native
    from herd.quant.scheme import QuantTensor

    assert isinstance(store, KeepsBlocks)
    raw = store.raw(name)
    assert isinstance(raw, QuantTensor)
    assert raw.type == kind
    blocks = raw.blocks.reshape(-1, *raw.blocks.shape[-2:])
    made = [native.pack(kind.id, each.contiguous(), raw.shape[-1]).storage for each in blocks]
    if isinstance(store, Releases):
        store.release(name)
    return made[0] if len(made) == 1 else torch.cat(made)


def _sizes(store: TensorStore, kinds: Mapping[str, BlockType]) -> dict[str, int]:
    """Bytes of panels of each tensor that a copy holds, in the model's order."""
    from herd.checkpoint.names import shapes
    from herd.checkpoint.store import KeepsBlocks
    from herd.kernels import native

    found: dict[str, int] = {}
    if not isinstance(store, KeepsBlocks):
        return found
    for name, shape in shapes(store.config).items():
        kind = kinds.get(name)
        if kind is None or kind.dtype is not None or store.info(name).stored != kind.name or not native.packs(kind.id):
            continue
        if name == "tok_embeddings.weight" and not store.config.tie_embeddings:
            continue  # rows alone need no panels
        found[name] = (shape[0] if len(shape) == 3 else 1) * native.packed_bytes(kind.id, *shape[-2:])
    return found


def _key(store: TensorStore, sizes: Mapping[str, int], kinds: list[BlockType], names: list[str]) -> bytes:
    """What the panels depend on. Raises OSError and, for a store that is no files, AttributeError."""
    digest = hashlib.blake2b(MAGIC, digest_size=32)
    for kind in sorted({kind.id for kind in kinds}):
        digest.update(_layout(kind))
    digest.update("\n".join(names).encode())
    files = sorted({store.file_of(name) for name in sizes})  # type: ignore[attr-defined]
    for path in files:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            digest.update(struct.pack("<QQ", about.st_size, about.st_mtime_ns))
            for i in range(SAMPLES):
                file.seek(i * max(about.st_size - SAMPLE, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.digest()


def _layout(type_id: int) -> bytes:
    """What the library makes of known blocks: another layout gives other bytes."""
    import torch

    from herd.kernels import native
    from herd.quant.scheme import BLOCK_TYPES

    kind = next(kind for kind in BLOCK_TYPES if kind.id == type_id)
    columns = 2 * max(kind.values, 128)
    count = 17 * kind.row_bytes(columns)
    blocks = (torch.arange(count, dtype=torch.int64) * 2654435761 >> 11 & 255).to(torch.uint8).view(17, -1)
    return hashlib.blake2b(native.pack(type_id, blocks, columns).storage.numpy().tobytes()).digest()


def _stem(store: TensorStore) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(store.path).stem)[:60].strip("-.") or "model"


def _room(where: Path, size: int) -> bool:
    """Whether a copy of `size` bytes may be made; copies that were not used for longest are removed for it."""
    import shutil

    if size > limit():
        return False
    where.mkdir(parents=True, exist_ok=True)
    there = copies(where)
    total = sum(copy.size for copy in there)
    while there and total + size > limit():
        oldest = there.pop()
        oldest.path.unlink(missing_ok=True)
        total -= oldest.size
    return shutil.disk_usage(where).free >= SPARE * size

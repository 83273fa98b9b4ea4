"""Meta's own checkpoints: params.json beside consolidated.NN.pth, one file per model-parallel rank.

Each rank's piece is brought into canonical layout and the pieces are joined along the dimension that the name table gives,
when the tensor is read and not before. With a single file every tensor is a view of it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from herd.checkpoint.fields import Fields
from herd.checkpoint.layout import fitting
from herd.checkpoint.mapped import same_bytes
from herd.checkpoint.meta_config import read_params
from herd.checkpoint.names import Column, Home, homes, ignored, shapes
from herd.checkpoint.quantized.meta import PackedRank, int4_scheme, packed_rank
from herd.checkpoint.store import GenerationDefaults, TensorInfo
from herd.checkpoint.torchfile import TorchFile
from herd.checkpoint.twins import same_stored
from herd.errors import CheckpointError, ConfigFileError
from herd.files import read_json, short
from herd.quant.numbers import NUMBER_BYTES

if TYPE_CHECKING:
    import torch

    from herd.checkpoint.quantized.module import Packed, Stored
    from herd.quant.scheme import QuantTensor

__all__ = ["MetaStore"]

MAX_RANKS = 256
_SHARD = re.compile(r"consolidated\.(\d{2,3})\.pth")
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_FUSED = "layers.0.attention.wqkv.weight"
_VISION = ("vision_embeddings.", "vision_projection.")
_KV = re.compile(r"layers\.\d+\.attention\.w[kv]\.weight")


class MetaStore:
    """A TensorStore over a folder. Raises CheckpointError or ConfigError.

    `skipped` names tensors of the vision half of a Llama 4 checkpoint, which the text model does not use. `headers_only` and
    `sampled`: as in HFStore, and so are `form` and `notes`, for Meta's quantized releases.
    """

    kind = "meta"
    dequantized = "bfloat16"
    form: str | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, path: str | os.PathLike[str], *, headers_only: bool = False) -> None:
        self.folder = Path(path)
        self._headers_only = headers_only
        self.sampled: tuple[str, ...] = ()
        self.path = str(path)
        self.generation = GenerationDefaults()
        self._params = self.folder / "params.json"
        self._data = _read_params_json(self._params)
        self._ranks = self._unpacked(_open_ranks(self.folder))
        first = self._ranks[0]
        self._column: Column = "meta4" if _FUSED in first.specs else "meta"
        self._copies = 1
        self.config = read_params(
            self._data,
            str(self._params),
            fused=self._column == "meta4",
            rows=self._embedding_rows(),
            output=_OUTPUT in first.specs,
        )
        self._homes: dict[str, Home] = {}
        self._tie()
        self._merge_copied_heads()
        self._homes = homes(self.config, self._column)
        self.skipped = tuple(n for n in first.names() if self._column == "meta4" and n.startswith(_VISION))
        self._check()

    def names(self) -> Iterable[str]:
        """Canonical names, the tied output excluded."""
        return self._homes

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the joined tensor, from the headers."""
        home = self._home(name)
        stored = self._ranks[0].describe(home.name)
        with self._fitting(home, 0, stored.shape):
            shape = list(home.read_shape(stored.shape, self.config))
        dim = self._dim(home, shape)
        if dim is not None and len(shape) > dim:
            shape[dim] *= len(self._ranks)
        if _KV.fullmatch(name):
            shape[0] //= self._copies
        nbytes = NUMBER_BYTES[stored.number] * math.prod(shape)
        if self.packed(name) is not None:
            nbytes = sum(rank.describe(home.name).nbytes for rank in self._ranks)
        return TensorInfo(tuple(shape), stored.number, stored.stored, nbytes)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in canonical layout: a view with one rank, joined anew with several."""
        home = self._home(name)
        if len(self._ranks) == 1:
            return self._piece(home, 0)
        import torch

        info = self.info(name)
        joined = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, joined)
        return joined

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Copy the tensor into `out`, of its shape and any dtype and device, rank by rank: no joined copy in between."""
        home = self._home(name)
        first = self._piece(home, 0)
        dim = self._dim(home, first.shape)
        if dim is None:
            out.copy_(first)
            for rank in range(1, len(self._ranks)):
                if not same_bytes(self._piece(home, rank), first):
                    self._fail(
                        "differs from the first rank's, but all hold it whole: is it from elsewhere?", home, rank
                    )
        elif self._copies > 1 and _KV.fullmatch(name):
            import torch

            joined = torch.cat([self._piece(home, rank) for rank in range(len(self._ranks))], dim)
            out.copy_(self._one_of_copies(home, joined))
        else:
            for rank, part in enumerate(out.chunk(len(self._ranks), dim)):
                part.copy_(self._piece(home, rank))

    def read_part(self, name: str, dim: int, start: int, count: int) -> torch.Tensor:
        """As `read(name).narrow(dim, start, count)`, joined of nothing but the pieces that it lies in."""
        home = self._home(name)
        joined = self._dim(home, self._piece(home, 0).shape)
        if len(self._ranks) == 1 or joined is None or (self._copies > 1 and _KV.fullmatch(name)):
            return self.read(name).narrow(dim, start, count)
        import torch

        parts, at = [], 0
        for rank in range(len(self._ranks)):
            piece = self._piece(home, rank)
            if joined != dim:
                parts.append(piece.narrow(dim, start, count))
                continue
            first, last = max(start, at), min(start + count, at + piece.shape[dim])
            if first < last:
                parts.append(piece.narrow(dim, first - at, last - first))
            at += piece.shape[dim]
        return parts[0] if len(parts) == 1 else torch.cat(parts, joined)

    def packed(self, name: str) -> Packed | None:
        """The matrix `name` (the first rank's piece) as Meta quantized it; None for plain ones."""
        rank = self._ranks[0]
        return rank.packed_tensor(self._home(name).name) if isinstance(rank, PackedRank) else None

    def held(self, name: str, kind: str) -> Stored:
        """The values of the quantized matrix `name` in `kind`, which its form `holds`."""
        packed, home = self.packed(name), self._home(name)
        assert packed is not None
        assert not home.cell.steps, name
        assert len(self._ranks) == 1, name
        return packed.blocks(kind)

    def raw(self, name: str) -> torch.Tensor | QuantTensor:
        """As `read`, but a quantized matrix as the blocks that hold its values exactly, where there are such blocks."""
        packed = self.packed(name)
        kind = None if packed is None else packed.holder()
        return self.read(name) if kind is None else self.held(name, kind)  # pyright: ignore[reportReturnType] (never FP8)

    def release(self, name: str) -> None:
        """Let go of the file pages behind `name`."""
        for rank in self._ranks:
            rank.release(self._home(name).name)

    def large_pages(self) -> None:
        """Ask for large pages for every rank's file."""
        for rank in self._ranks:
            rank.map.large_pages()

    def metadata(self) -> Mapping[str, Any]:
        """params.json as it is."""
        return self._data

    def file_of(self, name: str) -> Path:
        """The file (of the first rank) that holds the canonical tensor `name`."""
        return self._ranks[0].path if name in self._homes else self.folder

    def _unpacked(self, ranks: list[TorchFile]) -> list[TorchFile | PackedRank]:
        """`ranks` with quantized tensors as the weights that they stand for."""
        fields = Fields(self._data, str(self._params))
        scheme, moe = int4_scheme(fields), fields.object("moe_args")
        experts = None if moe is None else moe.whole("num_experts")
        found = [packed_rank(file, rank, scheme, experts) for rank, file in enumerate(ranks)]
        if scheme is not None:
            self.form = "Meta int4"
        elif any(isinstance(rank, PackedRank) for rank in found):
            self.form = "Meta FP8"
        if self.form is not None:
            kind = "int8" if scheme is not None else "FP8"
            self.notes = (
                f"the release rounds activations to {kind} when it runs; herd does not round them for this form",
            )
        return found

    def _home(self, name: str) -> Home:
        home = self._homes.get(name)
        if home is None:
            raise CheckpointError("there is no such parameter in this model", path=self.path, tensor=name)
        return home

    def _piece(self, home: Home, rank: int) -> torch.Tensor:
        tensor = self._ranks[rank].tensor(home.name)
        with self._fitting(home, rank, tuple(tensor.shape)):
            return home.read(tensor, self.config)

    def _fitting(self, home: Home, rank: int, shape: tuple[int, ...]) -> AbstractContextManager[None]:
        path = self._ranks[rank].path
        return fitting(shape, home.canonical, config="params.json", path=path, tensor=home.name)

    def _dim(self, home: Home, shape: Sequence[int]) -> int | None:
        """The dimension to join along; embeddings are cut in columns up to Llama 2 and in rows since Llama 3."""
        if home.canonical == _EMBEDDING and len(shape) == 2 and shape[1] != self.config.dim:
            return 1
        return home.shard

    def _fail(self, why: str, home: Home, rank: int) -> NoReturn:
        raise CheckpointError(why, path=self._ranks[rank].path, tensor=home.name)

    def _embedding_rows(self) -> int:
        """Rows of the whole embedding."""
        found = self._ranks[0].specs.get(_EMBEDDING)
        if found is None or len(found.shape) != 2:
            vision = any(name.startswith(("text_model.", "vision_model.")) for name in self._ranks[0].names())
            why = (
                "Llama 3.2 Vision is not runnable yet: herd reads text models" if vision else "missing, or not a matrix"
            )
            raise CheckpointError(why, path=self._ranks[0].path, tensor=_EMBEDDING)
        rows, columns = found.shape
        by_rows = columns == self._data.get("dim")
        return rows * len(self._ranks) if by_rows else rows

    def _tie(self) -> None:
        """Tied models store the output as a second name or a copy of the embedding: it is dropped when it is the same."""
        if all(_OUTPUT in rank.specs and _EMBEDDING in rank.specs for rank in self._ranks):
            alone = self._headers_only
            same = all(same_stored(rank, _OUTPUT, rank, _EMBEDDING, sampled=alone) for rank in self._ranks)
            if alone and same and any(rank.span(_OUTPUT) != rank.span(_EMBEDDING) for rank in self._ranks):
                self.sampled = (_OUTPUT,)
            if self.config.tie_embeddings and not same:
                raise CheckpointError(
                    "differs from the embedding, but params.json ties them", path=self._ranks[0].path, tensor=_OUTPUT
                )
            self.config = replace(self.config, tie_embeddings=same)

    def _merge_copied_heads(self) -> None:
        """405B for 16 ranks has its 8 key/value heads twice: keep every second one."""
        ranks, config = len(self._ranks), self.config
        piece = self._ranks[0].specs.get("layers.0.attention.wk.weight")
        if ranks == 1 or piece is None or len(piece.shape) != 2:
            return
        copies, rest = divmod(piece.shape[0] * ranks, config.n_kv_heads * config.head_dim)
        if copies > 1 and not rest:
            self._copies = copies
        elif config.n_kv_heads == ranks and ranks % 2 == 0 and self._heads_come_in_pairs():
            self._copies = 2
            self.config = replace(config, n_kv_heads=ranks // 2)

    def _heads_come_in_pairs(self) -> bool:
        name = "layers.0.attention.wk.weight"
        holders = [rank for rank in self._ranks if name in rank.specs]
        return all(same_stored(a, name, b, name) for a, b in zip(holders[::2], holders[1::2], strict=False))

    def _one_of_copies(self, home: Home, joined: torch.Tensor) -> torch.Tensor:
        heads = joined.unflatten(0, (self.config.n_kv_heads, self._copies, -1))
        if not all(same_bytes(heads[:, 0], heads[:, i]) for i in range(1, self._copies)):
            self._fail("more key/value heads than params.json says, and they are not copies", home, 0)
        return heads[:, 0].flatten(0, 1)

    def _check(self) -> None:
        """Every rank holds the same tensors in the same shapes, and joined they are the model in params.json."""
        expected = {home.name for home in self._homes.values()}
        for number, rank in enumerate(self._ranks):
            for home in self._homes.values():
                if home.name not in rank.specs:
                    self._fail("missing, but params.json describes it", home, number)
                if rank.specs[home.name].shape != self._ranks[0].specs[home.name].shape:
                    self._fail(f"shape {rank.specs[home.name].shape} differs from the first rank's", home, number)
                if rank.specs[home.name].number != self._ranks[0].specs[home.name].number:
                    self._fail(f"{rank.specs[home.name].number} differs from the first rank's dtype", home, number)
            for name in rank.names():
                tied = name == _OUTPUT and self.config.tie_embeddings
                if not (name in expected or name in self.skipped or tied or ignored(self._column, name)):
                    raise CheckpointError(
                        "no parameter of the model in params.json has this name", path=rank.path, tensor=name
                    )
        self._check_shapes()

    def _check_shapes(self) -> None:
        ranks, cuts = len(self._ranks), set()
        wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        for name, shape in shapes(self.config).items():
            found, dim = self.info(name).shape, self._homes[name].shard
            if found != shape:
                wrong.append((name, found, shape))
            if dim is not None and name.startswith("layers.") and len(found) > dim:
                cuts.add(shape[dim] * ranks / max(found[dim], 1))
        if not wrong:
            return
        name, found, shape = wrong[0]
        meant = cuts.pop() if len(cuts) == 1 else ranks
        if meant != ranks and meant == int(meant):
            raise CheckpointError(
                f"{'missing' if meant > ranks else 'one too many'}: cut for {int(meant)} ranks, but there are {ranks}",
                path=self.folder / f"consolidated.{min(ranks, int(meant)):02d}.pth",
                tensor=self._homes[name].name,
            )
        raise CheckpointError(
            f"joined from {ranks} shards, {name} has shape {found}, but params.json describes {shape}",
            path=self._ranks[0].path,
            tensor=self._homes[name].name,
        )


def _read_params_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError("params.json is missing: a Meta checkpoint cannot be read without it", path=path)
    try:
        return read_json(path)
    except CheckpointError as error:
        raise ConfigFileError(str(error).removeprefix(f"{path}: "), path=path) from error


def _open_ranks(folder: Path) -> list[TorchFile]:
    """The shards in rank order. Raises CheckpointError naming a missing or swapped one."""
    found = {int(match[1]): p for p in folder.iterdir() if (match := _SHARD.fullmatch(p.name))}
    if not found:
        raise CheckpointError(
            f"no consolidated.NN.pth: there is {short(sorted(p.name for p in folder.iterdir()))}", path=folder
        )
    if len(found) > MAX_RANKS:
        raise CheckpointError(f"{len(found)} shards: no Llama has more than {MAX_RANKS}", path=folder)
    missing = next((rank for rank in range(max(found) + 1) if rank not in found), None)
    if missing is not None:
        raise CheckpointError("this shard is missing", path=folder / f"consolidated.{missing:02d}.pth")
    ranks = [TorchFile(found[rank]) for rank in sorted(found)]
    for number, rank in enumerate(ranks):
        saved = _SHARD.fullmatch(rank.saved_as + ".pth")  # torch.save keeps the file's first name inside
        if len(ranks) > 1 and saved is not None and int(saved[1]) != number:
            raise CheckpointError(f"was saved as {rank.saved_as}.pth: are shards swapped?", path=rank.path)
    return ranks

"""Hugging Face checkpoints: config.json beside safetensors or pytorch_model.bin, whole or in indexed shards.

Everything that headers can tell is checked when the store opens: a shard that is missing, truncated or swapped, and a
tensor that is missing, extra, listed twice or of the wrong shape, is a CheckpointError that names it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.checkpoint.generation import read_generation
from herd.checkpoint.hf_config import read_config
from herd.checkpoint.layout import Interleave, fitting
from herd.checkpoint.names import Column, Home, homes, ignored, shapes
from herd.checkpoint.quantized.files import PackedFile, rearranged, unpacked
from herd.checkpoint.quantized.module import Packed
from herd.checkpoint.quantized.recognise import scheme_of
from herd.checkpoint.safetensors import SafetensorsFile
from herd.checkpoint.store import TensorFile, TensorInfo
from herd.checkpoint.torchfile import TorchFile
from herd.checkpoint.twins import same_stored
from herd.errors import CheckpointError, ConfigFileError
from herd.files import read_json, safe_join, short
from herd.quant.scheme import block_type

if TYPE_CHECKING:
    import torch

    from herd.checkpoint.quantized.module import Stored
    from herd.quant.scheme import QuantTensor

__all__ = ["HFStore"]

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where the weights may be, in the order transformers looks."""

_VISION = ("vision_model.", "multi_modal_projector.")


class HFStore:
    """A TensorStore over a folder (or one of its files). Raises CheckpointError or ConfigError.

    `skipped` names tensors of the vision half of a Llama 4 checkpoint, which the text model does not use. `generation`
    holds the sampling defaults that came with the checkpoint. `headers_only` compares samples where opening would hold the
    data of two tensors against each other; `sampled` names those. Matrices that another tool quantized (`form`) read as the
    float32 values they stand for; `notes` say what that form asks of a runtime and herd does in another way.
    """

    kind = "hf"

    def __init__(self, path: str | os.PathLike[str], *, headers_only: bool = False) -> None:
        given = Path(path)
        self.folder = given if given.is_dir() else given.parent
        self.path = str(given)
        self._config_path = self.folder / "config.json"
        self._data = _config_json(self._config_path)
        read = read_config(self._data, str(self._config_path))
        self.config, prefix = read.config, read.prefix
        self._column: Column = read.column
        self.generation = read_generation(self.folder, self._data)
        self._files, self._where = _open_files(self.folder, given)
        self._homes = {name: (prefix + home.name, home) for name, home in homes(self.config, self._column).items()}
        scheme = scheme_of(self._data, self.folder, str(self._config_path))
        self.form, self.notes = (None, ()) if scheme is None else (scheme.name, scheme.notes)
        self.dequantized = "bfloat16"
        if scheme is not None:
            self.dequantized = _half(self._files)
            self._files, self._homes = unpacked(scheme, self._files, self._homes, self.config, self._where)
        self.skipped = tuple(n for n in self._files if prefix and n.startswith(_VISION))
        self.sampled: tuple[str, ...] = ()
        self._headers_only = headers_only
        self._check(prefix)

    def names(self) -> Iterable[str]:
        """Canonical names, the tied output excluded."""
        return self._homes

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype from the headers."""
        foreign, home = self._home(name)
        stored = self._files[foreign].describe(foreign)
        with self._fitting(foreign, home, stored.shape):
            shape = home.read_shape(stored.shape, self.config)
        whole = math.prod(stored.shape)
        nbytes = stored.nbytes * math.prod(shape) // whole if whole else 0  # of a fused tensor, the share of this part
        return TensorInfo(shape, stored.number, stored.stored, nbytes)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in canonical layout; a view of the file except for the re-paired q and k rows and for quantized matrices,
        whose values are float32."""
        foreign, home = self._home(name)
        tensor = self._files[foreign].tensor(foreign)
        with self._fitting(foreign, home, tuple(tensor.shape)):
            return home.read(tensor, self.config)

    def read_part(self, name: str, dim: int, start: int, count: int) -> torch.Tensor:
        """As `read(name).narrow(dim, start, count)`; only the heads of a part are re-paired."""
        foreign, home = self._home(name)
        steps, width = home.cell.steps, self.config.head_dim
        if dim or home.cell.fused is not None or not steps or not all(isinstance(step, Interleave) for step in steps):
            return self.read(name).narrow(dim, start, count)
        assert start % width == count % width == 0, "heads are not cut"
        part = replace(self.config, n_heads=count // width, n_kv_heads=count // width)
        return home.read(self._files[foreign].tensor(foreign).narrow(0, start, count), part)

    def packed(self, name: str) -> Packed | None:
        """The matrix `name` in the form of the tool that quantized it; None for plain ones."""
        file = self._files[self._home(name)[0]]
        return file.packed if isinstance(file, PackedFile) else None

    def held(self, name: str, kind: str) -> Stored:
        """The values of the quantized matrix `name` in `kind`, which its form `holds`."""
        packed, (foreign, home) = self.packed(name), self._home(name)
        assert packed is not None
        with self._fitting(foreign, home, packed.shape):
            return rearranged(packed.blocks(kind), home, self.config)

    def raw(self, name: str) -> torch.Tensor | QuantTensor:
        """As `read`, but a quantized matrix as the blocks that hold its values exactly, where there are such blocks."""
        packed = self.packed(name)
        kind = None if packed is None else packed.holder()
        if kind is None or block_type(kind) is None:
            return self.read(name)
        return self.held(name, kind)  # pyright: ignore[reportReturnType] (FP8 is no block type)

    def release(self, name: str) -> None:
        """Let go of the file pages behind `name`."""
        foreign, _ = self._home(name)
        self._files[foreign].release(foreign)

    def large_pages(self) -> None:
        """Ask for large pages for every file."""
        for file in {id(file): file for file in self._files.values()}.values():
            file.map.large_pages()

    def metadata(self) -> Mapping[str, Any]:
        """config.json as it is."""
        return self._data

    def file_of(self, name: str) -> Path:
        """The file that holds the canonical tensor `name`."""
        foreign, _ = self._home(name)
        return self._files[foreign].path

    def _home(self, name: str) -> tuple[str, Home]:
        try:
            return self._homes[name]
        except KeyError:
            raise CheckpointError("there is no such parameter in this model", path=self.path, tensor=name) from None

    def _fitting(self, foreign: str, home: Home, shape: tuple[int, ...]) -> AbstractContextManager[None]:
        path, config = self._files[foreign].path, self._config_path.name
        return fitting(shape, home.canonical, config=config, path=path, tensor=foreign)

    def _check(self, prefix: str) -> None:
        expected = {foreign for foreign, _ in self._homes.values()}
        missing = [foreign for foreign, _ in self._homes.values() if foreign not in self._files]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            hint = " Set tie_word_embeddings if the output shares the embedding." if "lm_head" in missing[0] else ""
            raise CheckpointError(
                f"missing{more}, but {self._config_path.name} describes it.{hint}", path=self._where, tensor=missing[0]
            )
        twin = prefix + "lm_head.weight"
        for name in self._files:
            if name in expected or name in self.skipped or ignored(self._column, name.removeprefix(prefix)):
                continue
            if name == twin and self.config.tie_embeddings:
                self._check_twin(twin, prefix + "model.embed_tokens.weight")
                continue
            raise CheckpointError(
                f"no parameter of the model in {self._config_path.name} has this name",
                path=self._files[name].path,
                tensor=name,
            )
        for name, shape in shapes(self.config).items():
            found = self.info(name).shape
            if found != shape:
                foreign, _ = self._homes[name]
                raise CheckpointError(
                    f"{name} would have shape {found}, but {self._config_path.name} describes {shape}",
                    path=self._files[foreign].path,
                    tensor=foreign,
                )

    def _check_twin(self, twin: str, source: str) -> None:
        """A tied checkpoint may still carry the output matrix; it must equal the embedding."""
        files, self.sampled = self._files, (twin,) if self._headers_only else ()
        if not same_stored(files[source], source, files[twin], twin, sampled=self._headers_only):
            raise CheckpointError(
                "differs from the embedding, but config.json sets tie_word_embeddings: one of them is wrong",
                path=files[twin].path,
                tensor=twin,
            )


def _half(files: Mapping[str, TensorFile]) -> str:
    """The 16-bit dtype that most plain numbers have: what the model was computed in before its matrices were quantized."""
    counts: Counter[str] = Counter(float16=0, bfloat16=1)
    for name, file in files.items():
        info = file.describe(name)
        if info.number in counts and not name.endswith(("scales", "_scale")):
            counts[info.number] += info.nbytes
    return counts.most_common(1)[0][0]


def _config_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError("config.json is missing: a Hugging Face checkpoint cannot be read without it", path=path)
    try:
        return read_json(path)
    except CheckpointError as error:
        raise ConfigFileError(str(error).removeprefix(f"{path}: "), path=path) from error


def _open_files(folder: Path, given: Path) -> tuple[dict[str, TensorFile], Path]:
    """(tensor name -> its file, the path to name when a tensor is missing)."""
    if given.is_file() and given.name not in WEIGHTS and given.suffix in (".safetensors", ".bin"):
        indexes = [folder / name for name in WEIGHTS if name.endswith(".index.json") and (folder / name).is_file()]
        source = next((index for index in indexes if given.name in _weight_map(index).values()), given)
    else:
        named = given if given.name in WEIGHTS else None
        source = named or next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if source is None:
        there = sorted(p.name for p in folder.iterdir())
        shards = any("-of-" in name and name.endswith((".safetensors", ".bin")) for name in there)
        what = "there are shards but no index (*.index.json)" if shards else f"there is {short(there)}"
        raise CheckpointError(f"no weights: {what}; expected one of {', '.join(WEIGHTS)}", path=folder)
    if source.name.endswith(".index.json"):
        return _open_shards(folder, source), source
    file = _open_file(source)
    return dict.fromkeys(file.names(), file), source


def _open_file(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError("weight_map is not a map from tensor names to file names", path=index)
    return found


def _open_shards(folder: Path, index: Path) -> dict[str, TensorFile]:
    """Tensor name -> file, after index and shards have been held against each other."""
    listed = _weight_map(index)
    shards: dict[str, TensorFile] = {}
    for shard in dict.fromkeys(listed.values()):
        path = safe_join(folder, shard)
        if path.suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"the shard {short(shard)} is neither .safetensors nor .bin", path=index)
        if not path.is_file():
            tensor = next(name for name, file in listed.items() if file == shard)
            raise CheckpointError(f"this shard is missing; {index.name} says it holds {short(tensor)}", path=path)
        shards[shard] = _open_file(path)
    for shard, file in shards.items():
        for name in file.names():
            home = listed.get(name)
            if home is None:
                if ignored("hf", name):
                    continue
                raise CheckpointError(f"this tensor is not listed in {index.name}", path=file.path, tensor=name)
            if home != shard:
                raise CheckpointError(
                    f"this tensor is in {shard}, but {index.name} puts it in {home}: swapped or repeated shards?",
                    path=file.path,
                    tensor=name,
                )
    held = {shard: set(file.names()) for shard, file in shards.items()}
    for name, shard in listed.items():
        if name not in held[shard]:
            raise CheckpointError(
                f"{index.name} puts this tensor here, but it is not", path=shards[shard].path, tensor=name
            )
    return {name: shards[shard] for name, shard in listed.items()}

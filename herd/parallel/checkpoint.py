"""Tensors of many ranks in one folder, by torch.distributed.checkpoint: each writes what it holds, any number of ranks reads.

Torch keeps the table of contents as a pickle. It is read here by an unpickler that knows the few classes of such a table and runs
nothing else; tensors are read with `weights_only`.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from herd.errors import CheckpointError

__all__ = ["Sharded", "local", "own_part"]

_TABLE = ".metadata"
_DAMAGE = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError, pickle.UnpicklingError)
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "int8", "bool"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
}
"""What a table of contents may speak of."""


class Sharded:
    """A payload (`herd.train.payload`) of a run on several ranks. `tied`: the output, where it is alone, is the embedding."""

    def __init__(self, *, tied: bool = False) -> None:
        self.tied = tied

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write this rank's part of `tensors` into `folder`, flushed to disk. All ranks have to call it."""
        writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        with _silence():
            save(self.named(tensors), storage_writer=writer, no_dist=not dist.is_initialized())

    def read(self, folder: Path, targets: Mapping[str, Tensor]) -> None:
        """Fill `targets` in place from what any number of ranks wrote. Raises CheckpointError for what is missing or damaged."""
        self.opened(folder)(targets)

    def opened(self, folder: Path) -> Callable[[Mapping[str, Tensor]], None]:
        """`read` of `folder` for many calls: the table of contents, as long as tensors times ranks, is read once, now."""
        reader = _Reader(folder)

        def read(targets: Mapping[str, Tensor]) -> None:
            with _told(folder), _silence():
                load(self.named(targets), storage_reader=reader, no_dist=not dist.is_initialized())

        with _told(folder):
            reader.read_metadata()  # torch up to 2.12 says no more of a table it cannot read than that there is none
        return read

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """With the last stage's output called by the name of the embedding that it is a copy of."""
        if not self.tied:
            return dict(tensors)
        return {name.replace("output.weight", "tok_embeddings.weight"): tensor for name, tensor in tensors.items()}


def local(tensor: Tensor) -> Tensor:
    """What of `tensor` is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole`, which every rank has, cut as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    shape, start = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(first, first + count) for first, count in zip(start, shape, strict=True))]


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What goes wrong inside as a CheckpointError about `folder`."""
    try:
        yield
    except (*_DAMAGE, CheckpointException) as error:
        raise CheckpointError(f"cannot be read: {_first_line(error)}", path=folder) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Torch warns that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class _Reader(FileSystemReader):
    _read: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._read is not None:
            return self._read
        with (Path(self.path) / _TABLE).open("rb") as file:
            table = _Table(file).load()
        if not isinstance(table, Metadata):
            raise pickle.UnpicklingError("the table of contents is something else")
        self._read = table
        return table


class _Table(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"the table of contents speaks of {module}.{name}, which it has no need of")
        return super().find_class(module, name)


def _first_line(error: BaseException) -> str:
    """What went wrong on the first rank that failed, in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]

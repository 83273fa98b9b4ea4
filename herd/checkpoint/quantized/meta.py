"""Meta's own quantized releases: int4 of Llama 3.2 (SpinQuant, QLoRA), and FP8 of Llama 3.1 405B and Llama 4 Maverick.

int4: `weight` int8 [out, in] from -8 to 7 with `scales` [out, in / 32] (and perhaps `zeros`); embedding and output int8 [V, D]
with one scale per row. QLoRA adds `adaptor.A.weight` [r, in] and `adaptor.B.weight` [out, r]: W + scale * B A. SpinQuant's
rotations are merged into the weights except for one: the input of every w2 goes through a Hadamard transform, which is
symmetric, so here its product with w2 is the weight. FP8: float8_e4m3fn in consolidated.NN.pth with float32 scales per output in
fp8_scales_NN.pt, under keys of their own. Source: llama-models models/llama3/quantization and models/llama4/quantization,
ExecuTorch's pre_quantization.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.checkpoint.fields import Fields
from herd.checkpoint.mapped import Span
from herd.checkpoint.quantized.module import INTEGERS, WIDE, Module, Packed
from herd.checkpoint.store import TensorFile, TensorInfo
from herd.checkpoint.torchfile import TorchFile
from herd.errors import CheckpointError
from herd.files import short

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Int4Scheme", "PackedRank", "int4_scheme", "packed_rank"]

_SCHEME = "int4_weight_int8_dynamic_activation"
_SCALES = re.compile(r"fp8_scales_(\d{1,3})\.pt")
_INT4_SCALES = re.compile(r"int4_scales_(\d{1,3})\.pt")
_W2 = re.compile(r"layers\.\d+\.feed_forward\.w2")
_DENSE = re.compile(r"(\d+)_feed_forward\.(w[123])_(\d+)")
_EXPERTS = re.compile(r"layers\.(\d+)\.feed_forward\.experts\.(w[123])")
_MOE = {"w1": "moe_w_in_eD_F", "w2": "moe_w_out_eF_D", "w3": "moe_w_swiglu_eD_F"}


@dataclass(frozen=True, slots=True)
class Int4Scheme:
    """`quantization_args` and `lora_args` of params.json."""

    rotated: bool
    lora_rank: int | None
    lora_scale: float


def int4_scheme(f: Fields) -> Int4Scheme | None:
    """What params.json says of int4 weights; None for plain ones. Raises ConfigError for what herd cannot read."""
    said, lora = f.object("quantization_args"), f.object("lora_args")
    if said is None:
        if lora is not None:
            f.fail("lora_args", "without quantization_args: adapters beside plain weights cannot be read")
        return None
    scheme = said.text("scheme", _SCHEME)
    if scheme != _SCHEME:
        said.fail("scheme", f"is {short(scheme)}: herd reads {_SCHEME}")
    said.whole("group_size", 32)
    rotated = said.flag("spinquant", lora is None)
    if lora is None and not said.has("spinquant"):
        warnings.warn(
            f'{f.where}: taken for a SpinQuant release, whose w2 expects rotated inputs; if it is none, write "spinquant": false '
            "into quantization_args",
            stacklevel=4,
        )
    if lora is None:
        return Int4Scheme(rotated, None, 1.0)
    return Int4Scheme(rotated, lora.whole("rank"), lora.number("scale"))


class PackedRank:
    """One consolidated.NN.pth whose quantized tensors read as the float32 weights they stand for."""

    kind = "torch"

    def __init__(self, file: TorchFile, packed: Mapping[str, Packed], gone: Iterable[str]) -> None:
        self.path, self.map, self.saved_as = file.path, file.map, file.saved_as
        self.file, self.packed = file, dict(packed)
        hidden = set(gone) - self.packed.keys()
        self.specs: dict[str, Any] = {
            name: self._info(name) if name in self.packed else spec
            for name, spec in file.specs.items()
            if name not in hidden
        }

    def names(self) -> Iterable[str]:
        """Weights and plain tensors, without scales."""
        return self.specs

    def describe(self, name: str) -> TensorInfo:
        """Shape, form and bytes."""
        return self._info(name) if name in self.packed else self.file.describe(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The values: float32 for quantized tensors, else a view of the file."""
        return self.packed[name].values() if name in self.packed else self.file.tensor(name)

    def span(self, name: str) -> Span | None:
        """Where a plain tensor lies; None for quantized ones."""
        return None if name in self.packed else self.file.span(name)

    def release(self, name: str) -> None:
        """Let go of the file pages behind `name`."""
        if name in self.packed:
            self.packed[name].release()
        else:
            self.file.release(name)

    def packed_tensor(self, name: str) -> Packed | None:
        """The tensor `name` in its quantized form; None for plain ones."""
        return self.packed.get(name)

    def _info(self, name: str) -> TensorInfo:
        one = self.packed[name]
        return TensorInfo(one.shape, "float32", one.word, one.nbytes)


def packed_rank(file: TorchFile, rank: int, scheme: Int4Scheme | None, experts: int | None) -> TorchFile | PackedRank:
    """`file` itself when its weights are plain. `experts`: how many params.json describes. Raises CheckpointError for tensors
    that do not go together."""
    if scheme is not None:
        if rank:
            raise CheckpointError("Meta's int4 releases are one file, and this is another", path=file.path)
        return _int4(file, scheme)
    folder = file.path.parent
    if any(_INT4_SCALES.fullmatch(path.name) for path in folder.iterdir()):
        raise CheckpointError(
            "Llama 4 in Meta's int4 cannot be read yet: take the bfloat16 or FP8 release", path=folder
        )
    beside = folder / f"fp8_scales_{rank}.pt"
    if beside.is_file():
        return _fp8(file, TorchFile(beside), rank, experts)
    if any(_SCALES.fullmatch(path.name) for path in folder.iterdir()):
        raise CheckpointError("is missing, but other ranks have their scales", path=beside)
    return file


def _int4(file: TorchFile, scheme: Int4Scheme) -> PackedRank:
    packed: dict[str, Packed] = {}
    gone: set[str] = set()
    files = dict.fromkeys(file.names(), file)
    for name in file.names():
        base, _, last = name.rpartition(".")
        if last == "weight" and (f"{base}.scales" in files or file.specs[name].number == "int8"):
            module = Module(base, file.specs[name].shape, files, file.path)
            packed[name] = _one(module, scheme)
            gone.update(module.taken)
    if not packed:
        raise CheckpointError("params.json has quantization_args, but no tensor here has scales", path=file.path)
    return PackedRank(file, packed, gone)


def _one(module: Module, scheme: Int4Scheme) -> Packed:
    whole = module.name in ("tok_embeddings", "output")
    base = Int4(module, whole=whole)
    if module.has("adaptor.A.weight") or module.has("adaptor.B.weight"):
        if scheme.lora_rank is None:
            module.fail("adaptor.A.weight", "is here, but params.json has no lora_args")
        return Changed(base, scheme.lora_rank, scheme.lora_scale, rotated=False)
    if scheme.rotated and _W2.fullmatch(module.name):
        return Changed(base, None, 1.0, rotated=True)
    return base


class Int4(Packed):
    """One matrix of small integers in int8, with scales per group of columns, or per row where `whole`."""

    def __init__(self, module: Module, *, whole: bool) -> None:
        super().__init__(module)
        if len(module.shape) != 2:
            module.fail("weight", f"has shape {module.shape}: expected a matrix")
        rows, columns = module.shape
        module.expect("weight", ("int8",))
        self.word = "INT8" if whole else "INT4"
        self.lowest, self.highest = (-128, 127) if whole else (-8, 7)
        found = module.expect("scales", WIDE).shape
        self._groups = 1 if whole or found == (rows,) else (found[1] if len(found) == 2 else 0)
        if not self._groups or columns % self._groups:
            module.fail("scales", f"has shape {found}, which does not divide rows of {columns} values into groups")
        shapes = ((rows,), (rows, 1)) if self._groups == 1 else ((rows, self._groups),)
        module.expect("scales", WIDE, *shapes)
        if module.has("zeros"):
            module.expect("zeros", (*WIDE, *INTEGERS), *shapes)

    @property
    def likely(self) -> str | None:
        return None if self.shape[1] // self._groups % 32 else "Q8_0" if self.word == "INT8" else "Q4_0"

    def numbers(self) -> Tensor:
        numbers = self.module.tensor("weight")
        if self.word == "INT4" and bool(((numbers < -8) | (numbers > 7)).any()):
            self.module.fail("weight", "holds an integer outside of -8 to 7: is this the int4 release?")
        return numbers

    def scaling(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows = self.shape[0]
        zeros = self.module.tensor("zeros").reshape(rows, -1) if self.module.has("zeros") else None
        if zeros is not None and not bool(zeros.any()):
            zeros = None
        return self.module.finite("scales").reshape(rows, -1), zeros, None


class Changed(Packed):
    """An int4 matrix with its LoRA added, or multiplied by the Hadamard matrix that its input would go through."""

    def __init__(self, base: Int4, rank: int | None, scale: float, *, rotated: bool) -> None:
        super().__init__(base.module)
        self._base, self._scale, self._rotated = base, scale, rotated
        self.word = base.word + ("+H" if rotated else "+LoRA")
        rows, columns = base.shape
        if rotated and columns & (columns - 1):
            base.module.fail("weight", f"has {columns} columns: a Hadamard transform needs a power of two")
        if rank is not None:
            base.module.expect("adaptor.A.weight", WIDE, (rank, columns))
            base.module.expect("adaptor.B.weight", WIDE, (rows, rank))

    def values(self) -> Tensor:
        values = self._base.values()
        if self._rotated:
            return hadamard(values)
        a, b = (self.module.finite(f"adaptor.{side}.weight").float() for side in "AB")
        return values.addmm_(b, a, alpha=self._scale)

    def holder(self) -> str | None:
        return None

    def why_not(self) -> str:
        return "w2 carries SpinQuant's rotation" if self._rotated else "the LoRA of the release is added"


def hadamard(values: Tensor) -> Tensor:
    """Rows times the normalized Hadamard matrix of Sylvester, in float32. The width is a power of two."""
    import torch

    rows, columns = values.shape
    half = 1
    while half < columns:
        pairs = values.view(rows, -1, 2, half)
        values = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).view(
            rows, columns
        )
        half *= 2
    return values / columns**0.5


def _fp8(file: TorchFile, scales: TorchFile, rank: int, experts: int | None) -> PackedRank:
    packed: dict[str, Packed] = {}
    for key in scales.names():
        dense, routed = _DENSE.fullmatch(key), _EXPERTS.fullmatch(key)
        if dense is not None and int(dense[3]) == rank:
            name = f"layers.{dense[1]}.feed_forward.{dense[2]}.weight"
        elif routed is not None:
            name = f"layers.{routed[1]}.feed_forward.experts.{_MOE[routed[2]]}"
        else:
            raise CheckpointError(
                "is no scale of a feed-forward matrix of this rank", path=scales.path, tensor=key[:200]
            )
        if name not in file.specs:
            raise CheckpointError(f"has scales in {scales.path.name}, but is missing", path=file.path, tensor=name)
        packed[name] = Rows(name, key, file, scales, experts if routed else None)
    for name, spec in file.specs.items():
        if spec.number == "float8_e4m3fn" and name not in packed:
            raise CheckpointError(f"is FP8, but {scales.path.name} has no scales for it", path=file.path, tensor=name)
    return PackedRank(file, packed, ())


class Rows(Packed):
    """An FP8 matrix with a scale per output; experts are [E * in, out] with scales [E, out]."""

    word = "F8_E4M3"

    def __init__(self, name: str, key: str, file: TorchFile, scales: TorchFile, experts: int | None) -> None:
        shape = file.specs[name].shape
        files: dict[str, TensorFile] = {f"rank.{name}": _As(file, name), f"rank.{key}": _As(scales, key)}
        super().__init__(Module("rank", shape, files, file.path))
        self._name, self._key, self._experts = name, key, experts
        self.module.expect(name, ("float8_e4m3fn", *WIDE))  # some releases keep the 8-bit numbers in a wider type
        if len(shape) != 2 or (experts is not None and shape[0] % experts):
            self.module.fail(
                name, f"has shape {shape}: expected a matrix{'' if experts is None else f' of {experts} experts'}"
            )
        outs, flat = (shape[0],), (shape[0], 1)
        if experts is not None:
            outs, flat = (experts, shape[1]), (experts * shape[1],)
        self.module.expect(key, ("float32", "bfloat16"), outs, flat, (*outs, 1))

    def values(self) -> Tensor:
        import torch

        weight = self.module.tensor(self._name)
        small = weight if weight.dtype == torch.float8_e4m3fn else weight.to(torch.float8_e4m3fn)
        scales = self.module.finite(self._key).float()
        if self._experts is None:
            return small.float().mul_(scales.view(-1, 1))
        experts = self._experts
        return small.float().view(experts, -1, self.shape[1]).mul_(scales.view(experts, 1, -1)).flatten(0, 1)

    def holder(self) -> str | None:
        return None

    def why_not(self) -> str:
        return "FP8 of several ranks is joined"


class _As:
    """A tensor of a file under another name."""

    def __init__(self, file: TorchFile, name: str) -> None:
        self.path: Path = file.path
        self.map, self._file, self._name = file.map, file, name

    def names(self) -> Iterable[str]:
        return (self._name,)

    def describe(self, name: str) -> TensorInfo:
        return self._file.describe(self._name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.tensor(self._name)

    def span(self, name: str) -> Span | None:
        return self._file.span(self._name)

    def release(self, name: str) -> None:
        self._file.release(self._name)

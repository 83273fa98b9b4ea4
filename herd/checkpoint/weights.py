"""In which form each weight of a checkpoint is loaded: plain numbers, the blocks of the file, or blocks made on the way.

| `weights`           | matrices                                                                                            |
|---------------------|-----------------------------------------------------------------------------------------------------|
| `auto`              | `stored` for quantized files on a CPU with herd's native kernels and no dtype asked for, else `plain` |
| `plain`             | all in one dtype: quantized blocks are dequantized                                                  |
| `stored`            | quantized blocks stay as they are in the file                                                       |
| `int8`              | Q8_0: 8 bits, a 16-bit scale per 32 values. Activations as the device multiplies: on a CPU with     |
|                     | native kernels rounded to 8 bits before each product, elsewhere float                               |
| `int4`              | Q4_0: 4 bits, a 16-bit scale per 32 values (the output matrix Q6_K). Activations as with `int8`     |
| `w8a8`              | the weights of `int8`, and activations rounded to 8 bits (a scale per 128 columns) everywhere: what |
|                     | native kernels do anyway, and torch does in float32 where there are none                            |
| `fp8`               | float8_e4m3fn with a float32 scale per row for the layers' matrices; embedding, output, routers and |
|                     | norms plain. Activations float (on a CPU: dequantized for each product, for trying, not for speed)  |
| `nf4`               | what QLoRA trains on (`herd.quant.nf4`): NF4 with double quantization for the layers' matrices, Q8_0 |
|                     | for embedding and output. Dequantized for each product: the least memory that trains, not speed     |
| `q4_k_m`, `q8_0`, … | llama.cpp's mixes (`herd.quant.mix`)                                                                |

The last six quantize while loading, whatever the file holds; blocks that already have the wanted type stay as they are.
Matrices whose rows are not whole blocks get another form, and `Plan.notes` says which.

With `auto`, blocks of a type that the kernels do not multiply with (Q5_0, Q3_K, ...) become bfloat16.

Matrices that another tool quantized (GPTQ, AWQ, NF4, ...) are `stored` as the kind that holds their values exactly: Q4_0,
Q8_0 or FP8 rows. Without one, and with `auto` where kernels lack it, they become the 16-bit dtype of the checkpoint, and
`Plan.notes` says so. Only a quantization that was asked for by name rounds them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from herd.checkpoint.names import shapes
from herd.checkpoint.store import HoldsPacked, TensorStore, packed_of
from herd.errors import CheckpointError, ConfigError
from herd.kernels import native
from herd.model.llama import Llama
from herd.quant.apply import WEIGHTS, held, rule_named
from herd.quant.fp8 import FP8
from herd.quant.nf4 import NF4
from herd.quant.numbers import torch_dtype
from herd.quant.scheme import BlockType, block_type

if TYPE_CHECKING:
    from herd.checkpoint.quantized.module import Packed

__all__ = ["FLOATS", "FORMS", "Plan", "changed", "is_quantized", "meaningless", "plan_weights", "stored_dtype"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_OF_HERD = {FP8.name: FP8, NF4.name: NF4}

FORMS: tuple[str, ...] = ("auto", "plain", "stored", *WEIGHTS)
"""What `weights` may be."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`kinds`: canonical name -> stored form, for matrices that are not plain in `dtype`; `dtype` is also that of activations.

    `notes` say what became another form than was asked for. `activations` is as for `herd.quant.matrix.Matrix`.
    """

    dtype: torch.dtype
    kinds: dict[str, BlockType] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    activations: int | None = None


def plan_weights(
    store: TensorStore,
    weights: str,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Plan:
    """The form of every weight of `store`. Raises ConfigError for an unknown name, CheckpointError for unreadable types."""
    cpu = device.type == "cpu"
    quantized = is_quantized(store)
    usual = stored_dtype(store) if dtype is None else dtype
    if weights == "auto" and not (quantized and cpu and dtype is None and native.isa() is not None):
        if dtype is not None:  # who asks for a dtype asks for plain numbers
            return Plan(dtype)
        why = "weights='stored' keeps those that can be kept exactly"
        found = [one for name in shapes(store.config) if (one := packed_of(store, name)) is not None]
        return Plan(usual, notes=_becomes(Counter((one.word, why) for one in found), usual))
    if weights == "plain" or (weights == "stored" and not quantized):
        return Plan(usual)
    if dtype == torch.float64:
        raise ConfigError(f"quantized weights do not run in float64: leave dtype out, or weights={weights!r}")
    if weights in ("auto", "stored"):
        wide = torch.float32 if dtype is None and cpu else usual
        return _as_stored(store, wide, all_types=weights == "stored")
    try:
        rule = rule_named(weights)
    except ConfigError as error:
        raise ConfigError(f"no weights are called {weights[:40]!r}: choose one of {', '.join(FORMS)}") from error
    runs_native = cpu and native.isa() is not None and rule.base not in (FP8.name, NF4.name)
    wide = torch.float32 if dtype is None and runs_native else usual
    kinds, notes = {}, []
    for name, shape in shapes(store.config).items():
        choice = rule.kind(name, shape, store.config)
        kind = _OF_HERD.get(choice.kind) or _known(choice.kind)
        if choice.note is not None:
            stays = "" if kind.dtype is None else f" (here: {str(wide).removeprefix('torch.')})"
            notes.append(f"{name}: {choice.note}{stays}")
        if kind.dtype is None or kind is FP8:
            kinds[name] = kind
    return Plan(wide, _whole_experts(kinds, store, wide), tuple(notes), rule.activations)


def changed(store: TensorStore, model: Llama) -> str:
    """What loading made of the weights, in a line: kinds and bytes in the files, kinds and bytes in memory."""
    before: Counter[str] = Counter()
    for name in shapes(store.config):
        before[store.info(name).stored] += store.info(name).nbytes
    return f"{_sizes(before)} in the files; {_sizes(held(model))} in memory"


def _sizes(sizes: Mapping[str, int]) -> str:
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    total = sum(sizes.values())
    kinds = ", ".join(f"{kind} {nbytes / 2**20:,.1f}" for kind, nbytes in ordered)
    return f"{total / 2**20:,.1f} MiB ({kinds})" if len(ordered) > 1 else f"{kinds} MiB"


def stored_dtype(store: TensorStore) -> torch.dtype:
    """The floating dtype that most numbers of `store` are stored in; for quantized ones, whose exact float32 values would take
    eight times their file, bfloat16 or the 16-bit dtype beside them. Raises CheckpointError when there is none."""
    counts: Counter[torch.dtype] = Counter()
    for name in shapes(store.config):
        info = store.info(name)
        if info.dtype not in FLOATS:
            raise meaningless(store, name)
        count = torch.Size(info.shape).numel()
        packed = info.nbytes < count * info.dtype.itemsize
        counts[_half(store) if packed else info.dtype] += count
    return counts.most_common(1)[0][0]


def meaningless(store: TensorStore, name: str) -> CheckpointError:
    """The refusal of a stored type that needs scales from elsewhere."""
    stored = store.info(name).stored
    return CheckpointError(f"is stored as {stored}, which has no meaning without scales", path=store.path, tensor=name)


def is_quantized(store: TensorStore) -> bool:
    """Whether some matrix of `store` is blocks, or was quantized by another tool."""
    if isinstance(store, HoldsPacked) and any(store.packed(name) is not None for name in shapes(store.config)):
        return True
    kinds = (block_type(store.info(name).stored) for name in shapes(store.config))
    return any(kind is not None and kind.dtype is None for kind in kinds)


def _as_stored(store: TensorStore, dtype: torch.dtype, *, all_types: bool) -> Plan:
    """Every matrix in its stored type; with `all_types` off, types without kernels in 16 bits. Routers are plain."""
    kinds: dict[str, BlockType] = {}
    lost: Counter[tuple[str, str]] = Counter()
    for name, shape in shapes(store.config).items():
        packed = packed_of(store, name)
        kind = block_type(store.info(name).stored) if packed is None else _holder(packed, name)
        if len(shape) < 2 or name.endswith("router.weight") or (kind is None and packed is None):
            continue
        looked_up = name == "tok_embeddings.weight" and not store.config.tie_embeddings
        runs = kind is not None and (all_types or looked_up or kind is FP8 or native.packs(kind.id))
        if packed is not None and (kind is None or not runs or (kind is FP8 and not all_types)):
            why = (
                "weights='stored' keeps FP8 rows as they are, for slower products" if kind is FP8 else packed.why_not()
            )
            lost[packed.word, why] += 1
            kind = _known(_WORDS[_half(store)])
        elif kind is not None and kind.dtype is None and not runs:
            kind = _known("BF16")
        if kind is not None and kind.dtype != dtype:
            kinds[name] = kind
    return Plan(dtype, _whole_experts(kinds, store, dtype), _becomes(lost, _half(store)))


def _holder(packed: Packed, name: str) -> BlockType | None:
    """The kind that holds the values of `packed` exactly. Embeddings are looked up in blocks or plain."""
    kind = packed.holder()
    if kind == FP8.name:
        return None if name == "tok_embeddings.weight" else FP8
    return None if kind is None else _known(kind)


def _becomes(lost: Mapping[tuple[str, str], int], dtype: torch.dtype) -> tuple[str, ...]:
    """What is said of matrices that another tool quantized and that are dequantized: (form, why) -> how many."""
    if not lost:
        return ()
    listed = ", ".join(f"{count} {word} matrices ({why})" for (word, why), count in lost.items())
    kind = str(dtype).removeprefix("torch.")
    return (f"dequantized to {kind}: {listed}; weights='int8' or 'int4' would round them again",)


def _half(store: TensorStore) -> torch.dtype:
    """What quantized matrices of `store` become when they are dequantized."""
    return torch_dtype(store.dequantized) if isinstance(store, HoldsPacked) else torch.bfloat16


def _whole_experts(kinds: dict[str, BlockType], store: TensorStore, dtype: torch.dtype) -> dict[str, BlockType]:
    """The three tensors of a layer's experts are one module: when one is stored, the others are, too."""
    homes = {name.rpartition(".")[0] for name in kinds if ".experts." in name}
    rest = [name for name in shapes(store.config) if name.rpartition(".")[0] in homes and name not in kinds]
    return kinds | {name: _known(_WORDS[dtype]) for name in rest}


def _known(name: str) -> BlockType:
    kind = block_type(name)
    assert kind is not None
    return kind

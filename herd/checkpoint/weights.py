"""In which form each weight of a checkpoint is loaded: plain numbers, the blocks of the file, or blocks made on the way.

| `weights`           | matrices                                                                                            |
|---------------------|-----------------------------------------------------------------------------------------------------|
| `auto`              | `stored` for quantized files on a CPU with herd's native kernels and no dtype asked for, else `plain` |
| `plain`             | all in one dtype: quantized blocks are dequantized                                                  |
| `stored`            | quantized blocks stay as they are in the file                                                       |
| int8, int4, q4_k_m… | quantized while loading, see `herd.quant.apply.rule_named`; blocks that fit stay as they are        |

With `auto`, blocks of a type that the kernels do not multiply with (Q5_0, Q3_K, ...) become bfloat16.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from herd.checkpoint.names import shapes
from herd.checkpoint.store import TensorStore
from herd.errors import CheckpointError, ConfigError
from herd.kernels import native
from herd.quant.apply import WEIGHTS, rule_named
from herd.quant.scheme import BlockType, block_type

__all__ = ["FLOATS", "FORMS", "Plan", "is_quantized", "meaningless", "plan_weights", "stored_dtype"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

FORMS: tuple[str, ...] = ("auto", "plain", "stored", *WEIGHTS)
"""What `weights` may be."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`kinds`: canonical name -> stored form, for matrices that are not plain in `dtype`; `dtype` is also that of activations.

    `notes` say what became another form than was asked for.
    """

    dtype: torch.dtype
    kinds: dict[str, BlockType] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_weights(
    store: TensorStore,
    weights: str,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Plan:
    """The form of every weight of `store`. Raises ConfigError for an unknown name, CheckpointError for unreadable types."""
    cpu = device.type == "cpu"
    quantized = is_quantized(store)
    if weights == "auto" and not (quantized and cpu and dtype is None and native.isa() is not None):
        weights = "plain"
    usual = stored_dtype(store) if dtype is None else dtype
    if weights == "plain" or (weights == "stored" and not quantized):
        return Plan(usual)
    if dtype == torch.float64:
        raise ConfigError(f"quantized weights do not run in float64: leave dtype out, or weights={weights!r}")
    if weights in ("auto", "stored"):
        wide = torch.float32 if dtype is None and cpu else usual
        return Plan(wide, _as_stored(store, wide, all_types=weights == "stored"))
    if weights not in FORMS and weights.lower() != "fp8":  # which rule_named refuses with its reason
        raise ConfigError(f"no weights are called {weights[:40]!r}: choose one of {', '.join(FORMS)}")
    rule = rule_named(weights, device)
    wide = torch.float32 if dtype is None and cpu and native.isa() is not None else usual
    kinds, notes = {}, []
    for name, shape in shapes(store.config).items():
        choice = rule.kind(name, shape, store.config)
        kind = block_type(choice.kind)
        assert kind is not None
        if choice.note is not None:
            stays = "" if kind.dtype is None else f" (here: {str(wide).removeprefix('torch.')})"
            notes.append(f"{name}: {choice.note}{stays}")
        if kind.dtype is None:
            kinds[name] = kind
    return Plan(wide, _whole_experts(kinds, store, wide), tuple(notes))


def stored_dtype(store: TensorStore) -> torch.dtype:
    """The floating dtype that most numbers of `store` are stored in; bfloat16 for quantized ones, whose exact float32 values
    would take eight times their file. Raises CheckpointError when there is none."""
    counts: Counter[torch.dtype] = Counter()
    for name in shapes(store.config):
        info = store.info(name)
        if info.dtype not in FLOATS:
            raise meaningless(store, name)
        count = torch.Size(info.shape).numel()
        packed = info.nbytes < count * info.dtype.itemsize
        counts[torch.bfloat16 if packed else info.dtype] += count
    return counts.most_common(1)[0][0]


def meaningless(store: TensorStore, name: str) -> CheckpointError:
    """The refusal of a stored type that needs scales from elsewhere."""
    stored = store.info(name).stored
    return CheckpointError(f"is stored as {stored}, which has no meaning without scales", path=store.path, tensor=name)


def is_quantized(store: TensorStore) -> bool:
    """Whether some matrix of `store` is blocks."""
    kinds = (block_type(store.info(name).stored) for name in shapes(store.config))
    return any(kind is not None and kind.dtype is None for kind in kinds)


def _as_stored(store: TensorStore, dtype: torch.dtype, *, all_types: bool) -> dict[str, BlockType]:
    """Every matrix in its stored type; with `all_types` off, types without kernels as bfloat16. Routers are plain."""
    kinds = {}
    for name, shape in shapes(store.config).items():
        kind = block_type(store.info(name).stored)
        if len(shape) < 2 or name.endswith("router.weight") or kind is None:
            continue
        looked_up = name == "tok_embeddings.weight" and not store.config.tie_embeddings
        if kind.dtype is None and not (all_types or looked_up or native.packs(kind.id)):
            kind = _known("BF16")
        if kind.dtype != dtype:
            kinds[name] = kind
    return _whole_experts(kinds, store, dtype)


def _whole_experts(kinds: dict[str, BlockType], store: TensorStore, dtype: torch.dtype) -> dict[str, BlockType]:
    """The three tensors of a layer's experts are one module: when one is stored, the others are, too."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    homes = {name.rpartition(".")[0] for name in kinds if ".experts." in name}
    rest = [name for name in shapes(store.config) if name.rpartition(".")[0] in homes and name not in kinds]
    return kinds | {name: _known(names[dtype]) for name in rest}


def _known(name: str) -> BlockType:
    kind = block_type(name)
    assert kind is not None
    return kind

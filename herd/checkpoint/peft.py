"""PEFT's LoRA folders: adapter_config.json beside adapter_model.safetensors (or, older, adapter_model.bin).

Names go through the one name table (`herd.checkpoint.names`): PEFT's are those of the Hugging Face model behind
`base_model.model.`, and the rows of B of queries and keys are re-paired as those of the matrices themselves. What is in the
tensor file is the adapter; the config adds scales, and is refused where it says something that herd would not do. How factors
of routed experts lie is in `herd.checkpoint.peft_experts`.
Source: peft LoraConfig, and utils/save_and_load.py.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import regex
from torch import Tensor

from herd.adapters.lora import EMBEDDING, Factors, LoraAdapter
from herd.checkpoint.fields import Fields
from herd.checkpoint.layout import Interleave
from herd.checkpoint.names import Column, Home, homes, shapes
from herd.checkpoint.peft_experts import VERSION, outer, stacked, written
from herd.checkpoint.safetensors import SafetensorsFile
from herd.checkpoint.store import TensorFile
from herd.checkpoint.torchfile import TorchFile
from herd.checkpoint.write.gguf_config import architecture
from herd.checkpoint.write.planned import Planned, Tick
from herd.checkpoint.write.safetensors import FORMAT, write_safetensors
from herd.errors import CheckpointError
from herd.files import read_json, short
from herd.model.config import ModelConfig

__all__ = ["CONFIG", "WEIGHTS", "hf_column", "open_weights", "plain_rows", "read_peft", "write_peft"]

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+?)\.(?:(?P<low>lora_(?:(?:embedding_)?[AB]|magnitude_vector))(?:\.(?!weight$)\w+)?(?:\.weight)?"
    r"|(?:modules_to_save\.(?:\w+\.)?|base_layer\.)?weight)"
)

_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "alpha_pattern",
    "rank_pattern",
    "base_model_name_or_path",
    "use_dora",
    "target_parameters",
    "peft_version",
}
_HARMLESS = {
    # what the tensor file says by itself, training, and bookkeeping
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "lora_dropout",
    "inference_mode", "task_type", "auto_mapping", "revision", "runtime_config", "megatron_core",
    "qalora_group_size", "eva_config", "lora_ga_config", "ensure_weight_tying",
}  # fmt: skip
_NEUTRAL = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": None,
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights with which training began by changing the base: W + B A on the published base is another model."""

_TIMEOUT = 0.05
"""Seconds for one pattern of a file on one name: patterns come from outside."""


def read_peft(path: str | os.PathLike[str], base: ModelConfig) -> LoraAdapter:
    """The adapter in the folder `path`, for a base of config `base`; its tensors are views of the file.

    Raises CheckpointError or ConfigError: damage, a tensor that fits no parameter of the base, and every setting that would
    change the result and that herd does not do (biases, transposed layers, ...), by name.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    data = read_json(folder / CONFIG)
    fields = Fields(data, str(folder / CONFIG))
    _check_config(data, fields)
    file = open_weights(folder)
    version = data.get("peft_version")
    parts = _parts(file, base, version if isinstance(version, str) else None)
    rank, alpha, rslora = fields.whole("r"), fields.number("lora_alpha"), fields.flag("use_rslora", False)
    dora = fields.flag("use_dora", False)
    alphas, ranks = _patterns(fields, "alpha_pattern"), _patterns(fields, "rank_pattern")
    parameters = _parameters(fields)
    factors = {}
    for canonical, (module, low) in parts.low.items():
        missing = [word for word in ("A", "B") if word not in low]
        if missing:
            raise CheckpointError(f"has no lora_{missing[0]}", path=file.path, tensor=module)
        if ("magnitude" in low) != dora:
            told = "has no magnitude" if dora else "has a magnitude"
            raise CheckpointError(f"{told}, and {CONFIG} says use_dora {dora}", path=file.path, tensor=module)
        if f".{module}.weight".endswith(parameters):  # patterns are held against what was named
            module += ".weight"
        alpha_here = float(_by_pattern(alphas, module, alpha, fields, "alpha_pattern"))
        pair = Factors(low["A"], low["B"], alpha_here, low.get("magnitude"))
        expected = _by_pattern(ranks, module, rank, fields, "rank_pattern")
        if pair.rank != expected:
            why = f"has rank {pair.rank}, {CONFIG} says {expected:g}"
            raise CheckpointError(why, path=file.path, tensor=module)
        factors[canonical] = pair
    name = data.get("base_model_name_or_path")
    adapter = LoraAdapter(factors, rank, alpha, rslora, parts.whole, name if isinstance(name, str) and name else None)
    adapter.check(shapes(base), file.path)
    return adapter


def write_peft(adapter: LoraAdapter, folder: str | os.PathLike[str], base: ModelConfig, tick: Tick) -> None:
    """Fill `folder` with the files that PEFT loads. Tensors keep their dtype.

    Modules are named in full where the adapter does not have a kind of matrix in every layer. Raises CheckpointError when a
    parameter is no matrix of its own in the Hugging Face model, and OSError.
    """
    adapter.check(shapes(base))
    found = homes(base, hf_column(base))
    planned: list[Planned] = []
    modules: dict[str, str] = {}
    tensors, parameters = written(adapter, found)
    planned += [_plan(PREFIX + name, tensor) for name, tensor in tensors.items()]
    for name, pair in adapter.factors.items():
        home = found[name]
        if pair.a.ndim == 3:  # of experts
            continue
        modules[name] = module = home.name.removesuffix(".weight")
        if name == EMBEDDING:
            planned += [
                _plan(f"{PREFIX}{module}.lora_embedding_A", pair.b.T),
                _plan(f"{PREFIX}{module}.lora_embedding_B", pair.a.T),
            ]
        else:
            planned += [
                _plan(f"{PREFIX}{module}.lora_A.weight", pair.a),
                _plan(f"{PREFIX}{module}.lora_B.weight", _rows(home, pair.b, base, write=True)),
            ]
        if pair.magnitude is not None:
            lengths = pair.magnitude if name == EMBEDDING else _rows(home, pair.magnitude[:, None], base, write=True)
            planned.append(_plan(f"{PREFIX}{module}.lora_magnitude_vector", lengths.flatten()))
    for name, tensor in adapter.whole.items():
        home = found[name]
        module = home.name.removesuffix(".weight")
        inner = ".base_layer" if name in adapter.factors else ""
        planned.append(_plan(f"{PREFIX}{module}{inner}.weight", _rows(home, tensor, base, write=True)))
    place = Path(folder)
    write_safetensors(place / WEIGHTS, planned, FORMAT, tick)
    text = json.dumps(_config(adapter, modules, parameters, found), indent=2) + "\n"
    (place / CONFIG).write_text(text, encoding="utf-8")


def hf_column(config: ModelConfig) -> Column:
    """Which Hugging Face architecture a model of this config is."""
    return "hf" if architecture(config) == "llama" else "hf4"


def plain_rows(home: Home) -> bool:
    """Whether the parameter is a matrix of its own in that format, at most with re-paired rows: what LoRA needs."""
    return home.cell.fused is None and all(isinstance(step, Interleave) for step in home.cell.steps)


class _Parts:
    """What the tensor file holds, by canonical name."""

    def __init__(self) -> None:
        self.low: dict[str, tuple[str, dict[str, Tensor]]] = {}
        self.whole: dict[str, Tensor] = {}


def _parts(file: TensorFile, base: ModelConfig, version: str | None) -> _Parts:
    found = homes(base, hf_column(base))
    canonical, experts = {home.name: home for home in found.values()}, stacked(found)
    parts = _Parts()
    routed: dict[str, dict[str, Tensor]] = {}
    for foreign in file.names():
        match = _PART.fullmatch(foreign)
        if match is None:
            raise CheckpointError("is neither a LoRA factor nor a whole weight", path=file.path, tensor=foreign[:200])
        module = match["module"].removeprefix(PREFIX)
        if outer(_inner(module)) in experts and match["low"] in ("lora_A", "lora_B"):
            if match["low"] in routed.setdefault(module, {}):
                raise CheckpointError(
                    f"there are two {match['low']} of one module", path=file.path, tensor=foreign[:200]
                )
            routed[module][match["low"]] = file.tensor(foreign)
            continue
        home = canonical.get(_inner(module) + ".weight")
        if home is None or not plain_rows(home):
            why = "belongs to no matrix of the base model that herd can adapt"
            raise CheckpointError(why, path=file.path, tensor=foreign[:200])
        tensor = file.tensor(foreign)
        low = match["low"]
        if low is None:
            parts.whole[home.canonical] = _rows(home, tensor, base, write=False, path=file.path)
            continue
        _, pair = parts.low.setdefault(home.canonical, (module, {}))
        if "magnitude" in low:
            if tensor.ndim != 1:
                why = f"is a magnitude of shape {tuple(tensor.shape)}"
                raise CheckpointError(why, path=file.path, tensor=foreign[:200])
            embeds = home.canonical == EMBEDDING
            column = tensor[:, None]
            turned = column if embeds else _rows(home, column, base, write=False, path=file.path)
            pair["magnitude"] = turned.flatten()
            continue
        if (home.canonical == EMBEDDING) != ("embedding" in low) or tensor.ndim != 2:
            raise CheckpointError(f"is a {low} of shape {tuple(tensor.shape)}", path=file.path, tensor=foreign[:200])
        word = low[-1]
        if "embedding" in low:
            word, tensor = ("B" if word == "A" else "A"), tensor.T
        elif word == "B":
            tensor = _rows(home, tensor, base, write=False, path=file.path)
        if word in pair:
            raise CheckpointError(f"there are two lora_{word} of one module", path=file.path, tensor=foreign[:200])
        pair[word] = tensor
    for module, low in routed.items():
        missing = [word for word in ("lora_A", "lora_B") if word not in low]
        if missing:
            raise CheckpointError(f"has no {missing[0]}", path=file.path, tensor=module)
        there = experts[outer(_inner(module))]
        full, pairs = there.read(low["lora_A"], low["lora_B"], base, version, file.path)
        for name, (a, b) in pairs.items():
            if name in parts.low:
                raise CheckpointError("there are two pairs of factors of one parameter", path=file.path, tensor=full)
            parts.low[name] = f"{outer(module)}.{full.rpartition('.')[2]}", {"A": a, "B": b}
    return parts


def _inner(module: str) -> str:
    """The module's name in a text model: a vision model's has a prefix."""
    for prefix in ("language_model.", "model.language_model."):
        if module.startswith(prefix):
            rest = module.removeprefix(prefix)
            return rest if rest.startswith(("model.", "lm_head")) else "model." + rest
    return module


def _rows(home: Home, tensor: Tensor, base: ModelConfig, *, write: bool, path: Path | None = None) -> Tensor:
    """Rows re-paired as those of the parameter: B [out, r] and whole weights alike."""
    if not plain_rows(home):
        why = "is no matrix of its own in the Hugging Face model: LoRA cannot be stored for it"
        raise CheckpointError(why, path=path, tensor=home.canonical)
    for step in home.cell.steps:
        try:
            tensor = step.write(tensor, base) if write else step.read(tensor, base)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"shape {tuple(tensor.shape)} does not fit the base model", path=path, tensor=home.name
            ) from error
    return tensor


def open_weights(folder: Path) -> TensorFile:
    """The tensor file of a PEFT folder, the newer one first. Raises CheckpointError when there is none."""
    if (folder / WEIGHTS).is_file():
        return SafetensorsFile(folder / WEIGHTS)
    if (folder / OLD_WEIGHTS).is_file():
        return TorchFile(folder / OLD_WEIGHTS)
    raise CheckpointError(f"there is neither {WEIGHTS} nor {OLD_WEIGHTS}", path=folder)


def _check_config(data: Mapping[str, Any], fields: Fields) -> None:
    kind = data.get("peft_type", "LORA")
    if kind != "LORA":
        virtual = kind in ("PREFIX_TUNING", "PROMPT_TUNING")
        told = "virtual tokens are served beside their base, they cannot be merged or converted"
        fields.fail("peft_type", f"is {short(kind)}: {told if virtual else 'herd reads LORA adapters'}")
    start = data.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        fields.fail(
            "init_lora_weights",
            f"is {short(start)}: such training changes the base first, so the adapter does not fit the published weights; "
            "save it with PEFT's path_initial_model_for_weight_conversion",
        )
    for key, value in data.items():
        if key in _READ or key in _HARMLESS or key == "init_lora_weights":
            continue
        if value in (None, False, [], {}, "") or (key in _NEUTRAL and value == _NEUTRAL[key]):
            continue
        fields.fail(key, f"is {short(value)}: herd does not do this, and ignoring it would change the model")


def _parameters(fields: Fields) -> tuple[str, ...]:
    """How the names of those end that were adapted as parameters and not as modules."""
    named = fields.data.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(one, str) and one for one in named):
        fields.fail("target_parameters", f"is {short(named)}: expected a list of names")
    return tuple("." + one for one in named)


def _patterns(fields: Fields, key: str) -> dict[str, float]:
    found = fields.object(key)
    if found is None:
        return {}
    return {pattern: found.number(pattern) for pattern in found.data}


def _by_pattern(patterns: Mapping[str, float], module: str, default: float, fields: Fields, key: str) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, from a dot on."""
    for pattern, value in patterns.items():
        if module == pattern or module.endswith("." + pattern):
            return value
        try:
            if len(pattern) < 512 and regex.match(rf"(.*\.)?({pattern})$", module, timeout=_TIMEOUT):
                return value
        except (regex.error, TimeoutError):
            fields.fail(key, f"holds {short(pattern)}, which is no usable pattern")
    return default


def _plan(name: str, tensor: Tensor) -> Planned:
    word = {4: "F32", 8: "F64"}.get(tensor.dtype.itemsize) or ("BF16" if "bf" in str(tensor.dtype) else "F16")
    return Planned(name, tuple(tensor.shape), word, partial(Tensor.contiguous, tensor))


def _config(
    adapter: LoraAdapter, modules: Mapping[str, str], parameters: Mapping[str, Factors], found: Mapping[str, Home]
) -> dict[str, Any]:
    named = {module: adapter.factors[name] for name, module in modules.items()} | dict(parameters)
    own_alpha = {name: _whole(p.alpha) for name, p in named.items() if p.alpha != adapter.alpha}
    own_rank = {name: p.rank for name, p in named.items() if p.rank != adapter.rank}
    experts = {"target_parameters": _target_parameters(parameters, found), "peft_version": VERSION}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": _whole(adapter.alpha),
        "use_rslora": adapter.rslora,
        "rank_pattern": own_rank,
        "alpha_pattern": own_alpha,
        "target_modules": _targets(modules.values(), found),
        **(experts if parameters else {}),
        "modules_to_save": _saved(adapter, found),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": adapter.dora,
        "inference_mode": True,
    }


def _targets(modules: Iterable[str], found: Mapping[str, Home]) -> list[str]:
    """Short names ("q_proj") where they mean exactly these modules, else names in full."""
    wanted = set(modules)
    every = [home.name.removesuffix(".weight") for home in found.values() if home.name.endswith(".weight")]
    every = [name for name in every if "norm" not in name]
    short_names = {name.rpartition(".")[2] for name in wanted}
    exact = {name for name in every if name.rpartition(".")[2] in short_names} == wanted
    return sorted(short_names if exact else wanted)


def _target_parameters(parameters: Mapping[str, object], found: Mapping[str, Home]) -> list[str]:
    """Names from the layer on where every layer with experts has them, else names in full."""
    ends = {name.partition(".layers.")[2].partition(".")[2] for name in parameters}
    every = {home.name for home in found.values() if home.name.endswith(tuple(ends))}
    return sorted(ends if every == set(parameters) else parameters)


def _saved(adapter: LoraAdapter, found: Mapping[str, Home]) -> list[str] | None:
    names = [found[name].name.removesuffix(".weight") for name in adapter.whole if name not in adapter.factors]
    return sorted(name.rpartition(".")[2] if name.startswith("lm_head") else name for name in names) or None


def _whole(value: float) -> float | int:
    return int(value) if value == math.floor(value) else value

"""Checkpoints that are no text Llama but belong to the family: recognised by a few keys, described, not opened. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.errors import HerdError
from herd.files import read_json, short

if TYPE_CHECKING:
    from herd.checkpoint.gguf import GGUFFile
    from herd.checkpoint.store import TensorFile

__all__ = ["Foreign", "foreign_at", "stored_tensors"]

Stored = tuple[str, tuple[int, ...], str, int, str]
"""Name in the file, shape, type, bytes, file name."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """`kind` for programs, `what` for people, `facts` as key -> value, `tensors` as the files hold them."""

    kind: str
    what: str
    facts: Mapping[str, Any]
    tensors: tuple[Stored, ...] = ()
    notes: tuple[str, ...] = ()


def foreign_at(path: Path) -> Foreign | None:
    """What lies at `path` when it is one of these; None for everything else, damaged files included."""
    if path.is_dir():
        for name, look in (
            ("adapter_config.json", _peft),
            ("config.json", _config),
            ("params.json", _params),
        ):
            if (path / name).is_file() and not (name == "adapter_config.json" and (path / "config.json").is_file()):
                found = look(path, read_json(path / name))
                if found is not None:
                    return found
        ggufs = sorted(path.glob("*.gguf"))
        return _gguf(ggufs[0]) if len(ggufs) == 1 else None
    if path.suffix == ".gguf" or _starts(path, b"GGUF"):
        return _gguf(path)
    return None


def stored_tensors(path: Path) -> tuple[tuple[Stored, ...], tuple[str, ...]]:
    """(all tensors of the weight files in the folder `path`, or of that file, under their own names; what could not be read)."""
    tensors: list[Stored] = []
    notes: list[str] = []
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix not in _WEIGHTS or file.name.startswith("training_args"):
            continue
        try:
            opened = _open(file)
            for name in opened.names():
                info = opened.describe(name)
                tensors.append((name, info.shape, info.stored, info.nbytes, file.name))
        except HerdError as error:
            notes.append(str(error))
    return tuple(tensors), tuple(notes)


def _open(file: Path) -> TensorFile | GGUFFile:
    """One weight file. Each format's reader is imported when it is needed."""
    if file.suffix == ".safetensors":
        from herd.checkpoint.safetensors import SafetensorsFile

        return SafetensorsFile(file)
    if file.suffix == ".gguf":
        from herd.checkpoint.gguf import GGUFFile

        return GGUFFile(file)
    from herd.checkpoint.torchfile import TorchFile

    return TorchFile(file)


def _peft(folder: Path, data: Mapping[str, Any]) -> Foreign:
    tensors, notes = stored_tensors(folder)
    facts = {
        "base_model": data.get("base_model_name_or_path"),
        "type": data.get("peft_type"),
        "rank": data.get("r"),
        "alpha": data.get("lora_alpha"),
        "targets": data.get("target_modules"),
        **({"parameters": data["target_parameters"]} if data.get("target_parameters") else {}),
        "dora": bool(data.get("use_dora")),
        "rslora": bool(data.get("use_rslora")),
    }
    base = facts["base_model"]
    return Foreign(
        "adapter",
        f"a PEFT adapter ({short(facts['type'])}) for {short(base)}, not a model: it needs that base",
        facts,
        tensors,
        notes,
    )


def _config(folder: Path, data: Mapping[str, Any]) -> Foreign | None:
    kind = data.get("model_type")
    if kind == "mllama":
        text = data.get("text_config")
        facts = _numbers(text if isinstance(text, Mapping) else {}, _HF)
        tensors, notes = stored_tensors(folder)
        return Foreign("mllama", _VISION_32, facts, tensors, notes)
    if kind == "deberta-v2":
        tensors, notes = stored_tensors(folder)
        facts = _numbers(data, _HF)
        what = "a DeBERTa classifier such as Llama Prompt Guard: not runnable yet"
        return Foreign("deberta-v2-classifier", what, facts, tensors, notes)
    if kind not in ("llama", "llama4", "llama4_text", None):
        tensors, notes = stored_tensors(folder)
        return Foreign(
            "other", f"no Llama: config.json says model_type {short(kind)}", _numbers(data, _HF), tensors, notes
        )
    return None


def _params(folder: Path, data: Mapping[str, Any]) -> Foreign | None:
    layers = data.get("vision_num_cross_attention_layers")
    if type(layers) is int and layers > 0:
        tensors, notes = stored_tensors(folder)
        return Foreign("mllama", _VISION_32, _numbers(data, _META), tensors, notes)
    return None


def _gguf(file: Path) -> Foreign | None:
    from herd.checkpoint.gguf import GGUFFile

    try:
        opened = GGUFFile(file)
    except HerdError:
        return None  # opening it says what is wrong
    meta = opened.metadata
    kind, arch = meta.get("general.type"), meta.get("general.architecture")
    what = {
        "adapter": "a GGUF LoRA adapter, not a model: it needs its base",
        "mmproj": "the vision half of a model (mmproj), to be used beside the text model's file",
        "imatrix": "an importance matrix, not a model",
        "vocab": "only a vocabulary, no weights",
    }.get(kind if isinstance(kind, str) else "")
    if what is None and arch == "clip":
        kind, what = "mmproj", "the vision half of a model (mmproj), to be used beside the text model's file"
    if what is None and arch == "mllama":
        kind, what = "mllama", _VISION_32
    if what is None and arch not in ("llama", "llama4", None):
        kind, what = "other", f"no Llama: general.architecture is {short(arch)}"
    if what is None:
        return None
    facts = {key: meta[key] for key in _GGUF if key in meta and isinstance(meta[key], str | int | float | bool)}
    tensors, notes = stored_tensors(file)
    return Foreign(str(kind), what, facts, tensors, notes)


_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pth")
_VISION_32 = "Llama 3.2 Vision (image encoder and cross-attention layers): not runnable yet"
_HF = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "num_labels",
)  # fmt: skip
_META = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "vision_chunk_size",
    "vision_num_cross_attention_layers",
)
_GGUF = (
    "general.name", "general.basename", "general.base_model.0.name", "adapter.type", "adapter.lora.alpha",
    "clip.projector_type", "clip.vision.image_size", "clip.vision.block_count",
)  # fmt: skip


def _numbers(data: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    found = {key: data[key] for key in keys if type(data.get(key)) is int}
    labels = data.get("id2label")
    return found | ({"labels": len(labels)} if isinstance(labels, Mapping) else {})


def _starts(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False

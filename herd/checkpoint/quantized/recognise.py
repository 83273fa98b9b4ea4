"""Which form the weights of a Hugging Face folder are in: a table of `quant_method`s, and what the others are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from herd.checkpoint.fields import Fields
from herd.checkpoint.quantized.awq import AwqScheme
from herd.checkpoint.quantized.bnb import BnbScheme
from herd.checkpoint.quantized.compressed import CompressedScheme
from herd.checkpoint.quantized.fp8 import FbgemmScheme, Fp8Scheme
from herd.checkpoint.quantized.gptq import GptqScheme
from herd.checkpoint.quantized.module import Module, Packed
from herd.files import read_json, short

__all__ = ["SCHEMES", "Scheme", "scheme_of"]


class Scheme(Protocol):
    """How the weights of a checkpoint are quantized, as its config says."""

    name: str
    notes: tuple[str, ...]
    """What the form asks of a runtime that herd does in another way."""

    def open(self, module: Module) -> Packed | None:
        """The module as it is stored; None when its weight is plain. Raises CheckpointError when tensors do not go together."""
        ...


SCHEMES: dict[str, Callable[[Fields], Scheme]] = {
    "gptq": GptqScheme,
    "awq": AwqScheme,
    "bitsandbytes": BnbScheme,
    "compressed-tensors": CompressedScheme,
    "fbgemm_fp8": FbgemmScheme,
    "fp8": Fp8Scheme,
}

_BESIDE = {"quantize_config.json": GptqScheme, "quant_config.json": AwqScheme}
"""Files of the first AutoGPTQ and AutoAWQ, from before config.json said it."""

_KEYS = ("quantization_config", "compression_config")


def scheme_of(data: Mapping[str, Any], folder: Path, where: str) -> Scheme | None:
    """The form that config.json, parsed as `data` from the file `where`, or a file of older tools in `folder` describes; None for
    plain weights. Raises ConfigError for forms that herd cannot read."""
    top = Fields(data, where)
    inner = top.object("text_config")
    for holder in (top, inner):
        for key in _KEYS:
            said = None if holder is None else holder.object(key)
            if said is not None and said.data:
                return _named(said)
    for name, scheme in _BESIDE.items():
        if (folder / name).is_file():
            return scheme(Fields(read_json(folder / name), str(folder / name)))
    return None


def _named(f: Fields) -> Scheme:
    method = f.text("quant_method", "")
    if not method:
        method = "bitsandbytes" if f.has("load_in_4bit") or f.has("load_in_8bit") else ""
        method = "compressed-tensors" if not method and f.has("config_groups") else method
    make = SCHEMES.get(method)
    if make is None:
        f.fail(
            "quant_method",
            f"is {short(method or None)}: herd reads {', '.join(SCHEMES)}; take the model in one of these or as GGUF",
        )
    return make(f)

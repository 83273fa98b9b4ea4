"""Copies of the embedded model with one thing wrong: what `herd verify` must find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from herd.checkpoint.resolve import resolve

__all__ = ["DAMAGE", "copy_of_nano"]

LAYER = "model.layers.{}.self_attn.q_proj.weight"


def copy_of_nano(folder: Path) -> Path:
    """The embedded model in a folder of its own."""
    return Path(shutil.copytree(resolve("nano"), folder / "nano"))


def _json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})


def swapped(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        one, other = LAYER.format(0), LAYER.format(1)
        state[one], state[other] = state[other], state[one]

    _tensors(folder, change)


def not_permuted(folder: Path) -> None:
    """Queries of one layer left as Meta has them: neighbouring pairs instead of halves."""

    def change(state: dict[str, torch.Tensor]) -> None:
        name = LAYER.format(2)
        state[name] = state[name].unflatten(0, (4, 2, -1)).transpose(1, 2).flatten(0, 2)

    _tensors(folder, change)


def flipped(folder: Path) -> None:
    """The lowest bit of one byte near the end of the file."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1001] ^= 1
    file.write_bytes(data)


def theta(folder: Path) -> None:
    _json(folder / "config.json", lambda data: data.update(rope_theta=500_000.0))


def eps(folder: Path) -> None:
    _json(folder / "config.json", lambda data: data.update(rms_norm_eps=1e-6))


def dropped_merge(folder: Path) -> None:
    """No two pieces form the token of merge 1000 any more."""

    def change(data: dict[str, Any]) -> None:
        merges = data["model"]["merges"]
        lost = "".join(merges[1000])
        data["model"]["merges"] = [merge for merge in merges if "".join(merge) != lost]

    _json(folder / "tokenizer.json", change)


def changed_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("<|eot_id|>", "<|eom_id|>", 1), encoding="utf-8")


def lost_special(folder: Path) -> None:
    _json(
        folder / "tokenizer.json",
        lambda data: data.update(added_tokens=[t for t in data["added_tokens"] if t["content"] != "<|eom_id|>"]),
    )
    _json(  # which has them a second time
        folder / "tokenizer_config.json",
        lambda data: data.update(
            added_tokens_decoder={i: t for i, t in data["added_tokens_decoder"].items() if t["content"] != "<|eom_id|>"}
        ),
    )


def other_piece(folder: Path) -> None:
    """Two letters of the vocabulary exchanged."""

    def change(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        vocab["q"], vocab["z"] = vocab["z"], vocab["q"]

    _json(folder / "tokenizer.json", change)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "swapped tensors": (swapped, r"layers\.0\.attention\.wq\.weight: \d+ of 65536 numbers differ"),
    "rope not permuted": (not_permuted, r"layers\.2\.attention\.wq\.weight: \d+ of 65536 numbers differ"),
    "one flipped bit": (flipped, r": 1 of \d+ numbers differ: at \["),
    "wrong rope theta": (theta, r"rope_theta is 10000\.0 in A, 500000\.0 in B"),
    "wrong eps": (eps, r"norm_eps is 1e-05 in A, 1e-06 in B"),
    "dropped merge": (dropped_merge, r"model\.merges never forms token"),
    "changed template": (changed_template, r"the chat template differs from character \d+ on"),
    "missing special token": (lost_special, r"1 special tokens are missing in B: <\|eom_id\|>"),
    "exchanged pieces": (other_piece, r"2 pieces differ, the first is id \d+"),
}
"""What is wrong -> how it is done, and the line that must say it."""

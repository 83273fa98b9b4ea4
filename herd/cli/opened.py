"""A model opened for the terminal: found by name, loaded, and ready to be talked to. Imports torch."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from herd.adapters.lora import LoraAdapter
from herd.chat.formats import FORMATS
from herd.chat.guard import GuardFormat
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.checkpoint.adapter import read_adapter
from herd.checkpoint.fill import fill
from herd.checkpoint.load import Checkpoint, read_checkpoint
from herd.checkpoint.open import open_store
from herd.checkpoint.placement import device_named, dtype_named
from herd.checkpoint.resolve import resolve
from herd.checkpoint.weights import changed, is_quantized
from herd.cli.console import note
from herd.engine.adapters import OneAdapter
from herd.engine.local import LocalChat
from herd.engine.native import unsupported
from herd.engine.opening import ranks_for
from herd.engine.ranks import Ranks
from herd.engine.virtual import virtual_tokens
from herd.errors import ConfigError, PromptError
from herd.hub.created import find
from herd.kernels import native
from herd.model.accounting import parameters
from herd.quant.apply import kind_of

__all__ = ["Opened", "open_model"]

SMALL = 50_000_000
"""Parameters of a model that a CPU runs best in float32 on one thread, where neither is asked for.

Its matrices are so small that threads wait for each other longer than they work, and casting costs more than reading. Nano on
one quiet core: 460 tokens/s in float32, 310 in bfloat16, 205 in float16; 380 in float32 with two threads on that core. On two
cores with a training run beside it: 250 with one thread, 2 with two.
"""


@dataclass(frozen=True, slots=True)
class Opened:
    """A model in memory. `name` is what the user called it; `adapter` says which one lies on top."""

    name: str
    checkpoint: Checkpoint
    chat: LocalChat
    adapter: str | None = None
    ranks: Ranks | None = None

    def params(self, chosen: Mapping[str, Any]) -> SamplingParams:
        """The user's choices over the checkpoint's own defaults over Meta's."""
        return self.checkpoint.defaults.params(**chosen)

    @property
    def system(self) -> str:
        """The system prompt that `herd create` gave the model, or none."""
        return "" if self.checkpoint.made is None else self.checkpoint.made.system

    @property
    def beginning(self) -> list[Message]:
        """The turns that every conversation with a created model begins with."""
        said = () if self.checkpoint.made is None else self.checkpoint.made.messages
        return [Message(role, text) for role, text in said]  # type: ignore[arg-type]

    @property
    def is_guard(self) -> bool:
        """Whether the model judges messages instead of answering them."""
        return isinstance(self.chat.format, GuardFormat)

    def require_format(self) -> None:
        """Raises PromptError when nothing says that the model chats, saying how it is used."""
        if self.chat.format.name == "base":
            raise PromptError(
                f"the files of {self.name} do not say whether it chats: let it continue a text with "
                f'herd run --raw {self.name} "TEXT", or name the prompt format it was tuned for with --format'
            )

    def about(self) -> dict[str, str]:
        """The facts of /show, by name."""
        model = self.chat.session.model
        weight = model.norm.weight
        numbers = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
        kind = kind_of(model)
        format = self.chat.format.name
        if self.checkpoint.chat_format_from == "catalog" and format == self.checkpoint.tokenizer.chat_format:
            format += " (by the name of its folder: its files do not say)"
        return {
            "model": self.name,
            "path": str(self.checkpoint.path),
            "parameters": short_count(parameters(model.config if self.ranks is None else self.checkpoint.store.config)),
            "numbers": numbers if kind is None else f"{kind}, activations {numbers}",
            **(
                {} if self.ranks is None else {"processes": f"{self.ranks.count}, of which this one has the first part"}
            ),
            "weights": changed(self.checkpoint.store, model),
            "kernels": "torch" if (why := unsupported(model)) is not None else f"native {native.isa()}",
            **({"no native kernels": why} if why is not None and weight.device.type == "cpu" else {}),
            "format": format,
            **({} if self.adapter is None else {"adapter": self.adapter}),
            **({} if self.checkpoint.made is None else {"made from": self.checkpoint.made.base}),
        }


def open_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    weights: str = "auto",
    max_len: int | None = None,
    format_name: str | None = None,
    adapter: str | None = None,
    tensor_parallel: int = 1,
    tick: Callable[[int, int], None] | None = None,
) -> Opened:
    """Find and load `name` (a catalog name, a folder or a file). Raises a HerdError that says what to change.

    `adapter` is an adapter to use on top (LoRA, DoRA, prefix or prompt tuning). `tensor_parallel` processes share the model.
    `weights` is as for `herd.load`; `tick(done, total)` hears of the bytes read.
    Says once when native kernels are missing.
    """
    if format_name is not None and format_name not in FORMATS:  # before gigabytes are read
        raise PromptError(f"there is no prompt format {format_name!r}; choose one of {', '.join(FORMATS)}")
    where = device_named(device)
    path, made = resolve(name), find(name)
    if made is not None:
        max_len, format_name, adapter = max_len or made.context, format_name or made.format, adapter or made.adapter
    store = open_store(path)  # headers only: how large the model is decides how it is loaded
    small = where.type == "cpu" and parameters(store.config) <= SMALL
    if (
        where.type == "cpu"
        and (why := native.missing()) is not None
        and os.environ.get("HERD_ISA", "").lower() != "none"
    ):
        note(f"[slower than it could be: {why}]")
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if tensor_parallel > 1 and adapter is not None:
        raise ConfigError(
            "adapters are not possible with --tensor-parallel-size: merge a LoRA adapter first (herd merge); virtual tokens need "
            "one process"
        )
    ranks = ranks_for(tensor_parallel, path, where)
    if ranks is not None:
        atexit.register(ranks.close)
        where = ranks.device
    stays = native.isa() is not None and is_quantized(store)
    wanted = dtype_named(dtype, torch.float32 if small and not stays else None)
    filled = fill if ranks is None else ranks.filled
    checkpoint = read_checkpoint(path, store, wanted, where, weights=weights, tick=tick, made=made, filled=filled)
    if ranks is not None:
        longest = min(max_len or checkpoint.model.config.max_seq_len, checkpoint.model.config.max_seq_len)
        chat = LocalChat(
            checkpoint.model, checkpoint.tokenizer, format=format_name, max_len=max_len, runner=ranks.session(longest)
        )
        return Opened(name, checkpoint, chat, ranks=ranks)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if adapter is None:
        return Opened(name, checkpoint, LocalChat(model, tokenizer, format=format_name, max_len=max_len))
    change = read_adapter(adapter, model.config)
    if not isinstance(change, LoraAdapter):
        tokens = virtual_tokens(model, change)
        chat = LocalChat(model, tokenizer, format=format_name, max_len=max_len, virtual=tokens)
        return Opened(name, checkpoint, chat, f"{adapter}, a {tokens.kind} of {tokens.count} virtual tokens")
    runner = OneAdapter(model, change)
    chat = LocalChat(model, tokenizer, format=format_name, max_len=max_len, runner=runner)
    if runner.loaded.change == 0:
        note(f"[the adapter {adapter} changes nothing: all of its B matrices are zero]")
    return Opened(name, checkpoint, chat, f"{adapter}, rank {runner.loaded.rank}, {runner.loaded.matrices} matrices")


def short_count(count: int) -> str:
    """A number of parameters as people say it: 1.24B, 35.1M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)

"""A trained model as a Hugging Face folder, an adapter as a PEFT folder, both read back and held against what was trained.

Of a model whose numbers are promised (`herd.model.late`) they are made when their turn comes, one tensor after the other, for
writing and for reading back alike: a model of many ranks never has to be in one place (ADR 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from herd.adapters.apply import LowRankEmbedding, LowRankLinear, adapter_of, apply_adapter
from herd.adapters.experts import LowRankExperts
from herd.adapters.lora import LoraAdapter
from herd.adapters.prefix import Prefix, PrefixTuned, PromptTuned, Virtual
from herd.chat.base import BaseFormat
from herd.chat.templates import template_of
from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.checkpoint.peft import read_peft, write_peft
from herd.checkpoint.peft_virtual import read_virtual, write_virtual
from herd.checkpoint.store import Releases, TensorStore
from herd.checkpoint.write.atomic import new_folder
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.planned import Tick
from herd.checkpoint.write.source import Source
from herd.errors import CheckpointError
from herd.model.accounting import parameters
from herd.model.late import lent, lives_on
from herd.model.llama import Llama
from herd.train.config import RunConfig
from herd.train.memory import return_freed_memory
from herd.train.start import Start, start

__all__ = ["Exported", "export"]

LARGE = 1_500_000_000
"""Parameters above which the result is compared by its numbers alone: a second model beside the trained one costs too much."""
EQUAL = 1e-4
"""Logits of a reloaded float32 result, as a share of the largest: the same numbers through the same code, in another memory
layout, which may change the order in which a kernel adds."""
ROUNDED = 0.1
"""Nats between the trained model and its copy in 16 bits, on average over CHECKED random tokens: rounding weights to bfloat16
costs some 1e-4, and a result that is of another model costs whole nats."""
CHECKED = 64


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written where. `drift`: mean KL divergence in nats between the trained model and the reloaded result, None when
    that was not measured. `notes` say what to know about it.
    """

    path: Path
    kind: str
    drift: float | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = (
            "read back and compared"
            if self.drift is None
            else f"read back: KL {self.drift:.1e} nats from the trained one"
        )
        return "\n".join([f"{self.kind} written to {self.path} ({how})", *self.notes])


def export(
    model: Llama,
    begun: Start,
    config: RunConfig,
    watch: Callable[[str, int, int], None] = lambda doing, done, total: None,
) -> Exported:
    """Write the result of a run into its folder: `model`, or `adapter`. An earlier result there is replaced.

    The numbers of `model` may be promised, but for those of an adapter. `watch` is told what is being done to a model, and how
    many bytes of how many are done.

    Raises CheckpointError when what was written is not what was trained, and as the writers do.
    """
    out, device = Path(config.out), lives_on(model)
    if config.method.adapts:
        return _adapter(model, begun, config, out / "adapter", device)
    folder = out / "model"
    chat = None if isinstance(begun.format, BaseFormat) else begun.format
    # Of random weights: who lent the vocabulary chats, they do not.
    template = begun.tokenizer.template if begun.base else None
    if chat is not None and (template is None or config.data.chat_format is not None):
        template = template_of(chat.name)
    stops = begun.generation.stop_ids | (frozenset() if chat is None else chat.stop_ids) | begun.tokenizer.special.stop
    source = Source(ModelStore(model), begun.tokenizer, replace(begun.generation, stop_ids=stops), template)
    size = sum(weight.numel() for weight in model.parameters()) * begun.stored.itemsize
    with new_folder(folder, size=size, overwrite=True) as place:
        notes = write_hf(source, place, dtype=begun.stored, tick=_counting(watch, "writing", size))
    _same_weights(model, folder, begun.stored, _counting(watch, "reading back", size))
    drift = None
    if parameters(model.config) <= LARGE:
        written = open_store(folder)
        again = fill(written, torch.float32, device, later=_late(model))
        exact = begun.stored == torch.float32 == model.norm.weight.dtype
        drift = _compare(model, again, folder, exact=exact, read=written)
    return Exported(folder, "model", drift, tuple(notes))


def _adapter(model: Llama, begun: Start, config: RunConfig, folder: Path, device: torch.device) -> Exported:
    notes: tuple[str, ...] = ()
    small = parameters(model.config) <= LARGE
    again: Llama | None = None
    with new_folder(folder, overwrite=True) as place:
        if isinstance(model, PrefixTuned | PromptTuned):
            write_virtual(model.adapter(begun.base), place, model.config, lambda nbytes: None)
        else:
            write_peft(adapter_of(model, begun.base), place, model.config, lambda nbytes: None)
    if isinstance(model, PrefixTuned | PromptTuned):
        kept = read_virtual(folder, model.config)
        _same_virtual(model.adapter(), kept, folder)
        if small:
            base = start(config, device, later=_late(model)).model
            again = PrefixTuned(base, kept) if isinstance(kept, Prefix) else PromptTuned(base, kept)
    else:
        adapter = read_peft(folder, model.config)
        _same_factors(adapter_of(model), adapter, folder)
        if small:
            again = start(config, device, later=_late(model)).model
            apply_adapter(again, adapter)
    drift = None if again is None else _compare(model, again, folder, exact=model.norm.weight.dtype == torch.float32)
    return Exported(folder, "adapter", drift, notes)


def _counting(watch: Callable[[str, int, int], None], doing: str, size: int) -> Tick:
    """Bytes since the last call, summed up for `watch`."""
    done = 0

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        watch(doing, done, size)

    return tick


def _same_weights(model: Llama, folder: Path, stored: torch.dtype, tick: Tick) -> None:
    """Every number that was written is the trained one, rounded to `stored`."""
    store, kept = open_store(folder), ModelStore(model)
    for name in kept.names():
        if not _same(store, kept, name, stored):
            raise _other(folder, name)
        tick(math.prod(kept.info(name).shape) * stored.itemsize)


def _same(store: TensorStore, kept: TensorStore, name: str, stored: torch.dtype) -> bool:
    """One tensor, of which nothing is held afterwards."""
    want = kept.read(name).to(stored)
    same = torch.equal(store.read(name).to(stored), want)
    if isinstance(store, Releases):
        store.release(name)
    return same


def _late(model: Llama) -> bool:
    """Whether the numbers of a model (of an adapter: of its base) are promised."""
    return model.norm.weight.is_meta


def _same_factors(trained: LoraAdapter, kept: LoraAdapter, folder: Path) -> None:
    for name, pair in trained.factors.items():
        other = kept.factors[name]
        for part in ("a", "b", "magnitude"):
            one, two = getattr(pair, part), getattr(other, part)
            if (one is None) != (two is None) or (one is not None and not torch.equal(one.cpu(), two.cpu())):
                raise _other(folder, name)


def _same_virtual(trained: Virtual, kept: Virtual, folder: Path) -> None:
    for part in ("keys", "values") if isinstance(trained, Prefix) else ("embeddings",):
        if type(trained) is not type(kept) or not torch.equal(getattr(trained, part).cpu(), getattr(kept, part)):
            raise _other(folder, part)


def _other(folder: Path, name: str) -> CheckpointError:
    return CheckpointError("holds other numbers than were trained: is the disk damaged?", path=folder, tensor=name)


@torch.no_grad()
def _compare(trained: Llama, again: Llama, folder: Path, *, exact: bool, read: TensorStore | None = None) -> float:
    """Mean KL divergence of the reloaded result on random tokens, in nats. Raises CheckpointError when it is another model."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, trained.config.vocab_size, (1, CHECKED), generator=random).to(lives_on(trained))
    with torch.compiler.set_stance("force_eager"):
        one, two = _logits(trained, ids), _logits(again, ids, read)
    drift = float(
        torch.nn.functional.kl_div(two.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .mean()
    )
    largest = float((one - two).abs().max())
    if (
        (exact and largest > EQUAL * max(1.0, float(one.abs().max())))
        or not drift <= ROUNDED
        or not math.isfinite(largest)
    ):
        raise CheckpointError(
            f"gives other logits than the trained model (up to {largest:.3g} apart, KL {drift:.3g} nats): this is a bug in herd; "
            "the checkpoint of the run is whole",
            path=folder,
        )
    return max(0.0, drift)


def _logits(model: Llama, ids: Tensor, read: TensorStore | None = None) -> Tensor:
    """Of a model whose numbers are promised each module has its own for its call: of the files `read`, no pages stay."""

    def let_go() -> None:
        return_freed_memory()
        if isinstance(read, Releases):
            for name in read.names():
                read.release(name)

    was = model.training
    try:
        adapted = any(
            isinstance(module, LowRankLinear | LowRankEmbedding | LowRankExperts) for module in model.modules()
        )
        units = [model.tok_embeddings, *model.layers, model.output] if adapted else []
        with lent(model, units, let_go):
            return model.eval()(ids)[0].float()
    finally:
        model.train(was)

"""Adapters served beside their base: each request chooses one, and one step runs rows of several. How LoRA is computed.

The set of adapters has those of virtual tokens, too; what they do is in `herd.engine.virtual`. With LoRA the base model is not
touched. Its twin shares every weight, and has a `LoraLinear` where some adapter changes a matrix: for the rows of adapter a,
y += scale * B_a (A_a x). Which rows those are stands in a `Rows` that the modules were handed when they were made, and that
`AdapterRunner` fills before each forward. With DoRA outputs also get a gain, magnitude over length of the changed row:
y = gain * (y + scale * B_a (A_a x)), made once when the adapter is loaded. Routed experts with changes are computed once more
for the rows that have them (`LoraMoE`).

Letters: T rows, R rows whose logits are wanted, r rank.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from herd.adapters.experts import fused, homes_of
from herd.adapters.lora import Factors, LoraAdapter, lengths
from herd.checkpoint.adapter import read_adapter
from herd.checkpoint.names import shapes
from herd.engine.adapted import LoraEmbedding, LoraLinear, LoraMoE, LowRank, Rows
from herd.engine.pack import RaggedBatch
from herd.engine.paged import PagedCache
from herd.engine.runner import Runner, TorchRunner
from herd.engine.tiles import TiledRunner
from herd.engine.virtual import VirtualTokens
from herd.errors import CheckpointError, ConfigError
from herd.model.llama import Llama
from herd.model.moe import Experts, MoE
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear

__all__ = ["AdapterRunner", "AdapterSet", "LoadedAdapter", "OneAdapter"]

MAX_RANK = 1024
"""Above this an adapter is not thin, and a merged model is the better way."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that requests can choose. `rank` is the largest, `matrices` how many it changes, `nbytes` what it takes.

    `change` is the Frobenius norm of all its changes scale * B A together (of DoRA without its lengths): 0 for one that was never
    trained. `base` is the model it says it was made for. `kind` is "lora", "prefix" or "prompt". The last two have `virtual`
    tokens, no rank and no matrices; `change` is the norm of their keys and values (at 0 they still take a part of the attention).
    """

    name: str
    rank: int
    matrices: int
    nbytes: int
    change: float
    base: str | None
    kind: str = "lora"
    virtual: int = 0


class AdapterSet:
    """The adapters of one model, by name. `load` and `unload` from any thread, beside a running engine.

    `model` is the twin that has them all; None while there is none.
    """

    def __init__(self, base: Llama) -> None:
        self.base = base
        self.model: Llama | None = None
        self.hidden_rows, self.output_rows = Rows(), Rows()
        self.virtual: dict[str, VirtualTokens] = {}
        """Those of prefix and prompt tuning; what runs their rows has put them into its cache."""
        self._loaded: dict[str, LoadedAdapter] = {}
        self._lock = threading.Lock()
        self._shapes = shapes(base.config)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that requests can choose."""
        return tuple(self._loaded)

    @property
    def loaded(self) -> tuple[LoadedAdapter, ...]:
        """What is known of each."""
        return tuple(self._loaded.values())

    def check(self, name: str) -> None:
        """Raise ConfigError when there is no such adapter."""
        if name not in self._loaded:
            known = ", ".join(sorted(self._loaded)) or "none"
            raise ConfigError(f"there is no adapter {name[:80]!r}: loaded are {known}")

    def load(self, name: str, source: str | os.PathLike[str] | LoraAdapter) -> LoadedAdapter:
        """Make the adapter at `source` (a PEFT folder, a GGUF file, or opened) available as `name`.

        Everything is checked first, and nothing changes when it does not fit. Raises CheckpointError or ConfigError: another
        base, matrices that are not served, numbers that are not finite, a name that is taken, virtual tokens (see `add`).
        """
        if not name:
            raise ConfigError("an adapter needs a name")
        adapter = source if isinstance(source, LoraAdapter) else read_adapter(source, self.base.config)
        if not isinstance(adapter, LoraAdapter):
            raise ConfigError("virtual tokens stand in a cache: load them with Engine.load_adapter")
        path = None if isinstance(source, LoraAdapter) else source
        self._refuse(adapter, path)
        experts = homes_of(adapter.factors)
        routed = {
            home: {part: (*self._copied(f"{home}.{part}", pair, adapter, path), 1.0) for part, pair in parts.items()}
            for home in experts
            if (parts := fused(adapter, home))
        }
        factors = {}
        for parameter, pair in adapter.factors.items():
            if parameter.rpartition(".")[0] in experts:
                continue
            a, b = self._copied(parameter, pair, adapter, path)
            gain = None
            if pair.magnitude is not None:
                weight = _values(self.base, parameter)
                gain = pair.magnitude.to(a.device, torch.float32) / lengths(parameter, weight, a, b, 1.0)
                if not gain.isfinite().all():
                    raise CheckpointError("has a magnitude that is not finite here", path=path, tensor=parameter)
            factors[parameter] = LowRank(a, b, gain)
        pairs = [(one.a, one.b) for one in factors.values()]
        pairs += [(a, b) for parts in routed.values() for a, b, _ in parts.values()]
        loaded = LoadedAdapter(
            name,
            max(pair.rank for pair in adapter.factors.values()),
            len(adapter.factors),
            sum(one.nbytes for one in factors.values()) + sum(a.nbytes + b.nbytes for a, b in pairs[len(factors) :]),
            sum(float(_square(a, b)) for a, b in pairs) ** 0.5,
            adapter.base,
        )
        with self._lock:
            self._free(name)
            twin = _twin(self.base) if self.model is None else self.model
            for parameter, one in factors.items():
                self._place(twin, parameter).factors[name] = one
            for home, parts in routed.items():
                self._layer(twin, home).factors[name] = parts
            self.model = twin
            self._loaded[name] = loaded
        return loaded

    def add(self, name: str, tokens: VirtualTokens) -> LoadedAdapter:
        """Virtual tokens that are in a cache by now, as an adapter to choose. Raises ConfigError for a name that is taken."""
        norm = float(torch.stack([tokens.keys.float().norm(), tokens.values.float().norm()]).norm())
        loaded = LoadedAdapter(
            name, 0, 0, tokens.nbytes, norm, tokens.adapter.base, kind=tokens.kind, virtual=tokens.count
        )
        with self._lock:
            self._free(name)
            self.virtual[name], self._loaded[name] = tokens, loaded
        return loaded

    def free(self, name: str) -> None:
        """Raise ConfigError when no adapter can be loaded as `name`."""
        if not name:
            raise ConfigError("an adapter needs a name")
        with self._lock:
            self._free(name)

    def _free(self, name: str) -> None:
        if name in self._loaded:
            raise ConfigError(f"adapter {name!r} is loaded already: unload it first, or choose another name")

    def unload(self, name: str) -> None:
        """Forget an adapter; no running request may have it. Raises ConfigError when there is none of that name."""
        with self._lock:
            self.check(name)
            del self._loaded[name]
            if self.virtual.pop(name, None) is not None:
                return
            assert self.model is not None
            for module in self.model.modules():
                if isinstance(module, LoraLinear | LoraEmbedding | LoraMoE):
                    module.factors.pop(name, None)

    @contextmanager
    def bound(self, hidden: Rows, output: Rows) -> Iterator[Llama]:
        """The twin, for one forward with these rows; `output` counts rows whose logits are wanted."""
        assert self.model is not None
        self.hidden_rows.groups, self.output_rows.groups = hidden.groups, output.groups
        try:
            yield self.model
        finally:
            self.hidden_rows.groups = self.output_rows.groups = ()

    def _refuse(self, adapter: LoraAdapter, path: str | os.PathLike[str] | None) -> None:
        """Raise what speaks against serving `adapter`."""
        adapter.check(self._shapes, path)
        if adapter.whole:
            some = ", ".join(list(adapter.whole)[:3])
            raise ConfigError(
                f"this adapter replaces whole weights ({some}), which cannot differ from request to request: merge it into the "
                "base model, or train it without modules_to_save"
            )
        if not adapter.factors:
            raise CheckpointError("changes nothing: it holds no factors", path=path)
        for parameter, pair in adapter.factors.items():
            if pair.rank > MAX_RANK:
                why = f"has rank {pair.rank}, and at most {MAX_RANK} are served: merge it into the base model"
                raise CheckpointError(why, path=path, tensor=parameter)
            if not (pair.a.is_floating_point() and pair.b.is_floating_point()):
                raise CheckpointError(f"is stored as {pair.a.dtype}: expected floats", path=path, tensor=parameter)
            home, _, _ = parameter.rpartition(".")
            module = _module(self.base, home if home.endswith(".experts") else parameter)
            if not isinstance(module, nn.Linear | QuantLinear | nn.Embedding | QuantEmbedding | Experts | QuantExperts):
                why = "is no matrix that an adapter can change while others use the base: merge it into the base model"
                raise CheckpointError(why, path=path, tensor=parameter)

    def _copied(
        self, name: str, pair: Factors, adapter: LoraAdapter, path: str | os.PathLike[str] | None
    ) -> tuple[Tensor, Tensor]:
        """A and scale * B, float32 on the model's device. Raises CheckpointError for numbers that are not finite."""
        device = self.base.norm.weight.device
        a = pair.a.to(device, torch.float32, copy=True).contiguous()
        b = (pair.b.to(device, torch.float32) * adapter.scale_of(pair)).contiguous()
        if not (a.isfinite().all() and b.isfinite().all()):
            raise CheckpointError("holds numbers that are not finite", path=path, tensor=name)
        return a, b

    def _layer(self, twin: Llama, home: str) -> LoraMoE:
        """The layer of `twin` whose experts are `home`, as one that holds changes of them."""
        layer = twin.get_submodule(home.removesuffix(".experts"))
        assert isinstance(layer, MoE)
        if not isinstance(layer, LoraMoE):
            LoraMoE.lend(layer, self.hidden_rows)
        assert isinstance(layer, LoraMoE)
        return layer

    def _place(self, twin: Llama, parameter: str) -> LoraLinear | LoraEmbedding:
        """The module of `twin` that holds factors for `parameter`, put there when it is the first."""
        path, _, child = parameter.removesuffix(".weight").rpartition(".")
        parent = twin.get_submodule(path)
        module = getattr(parent, child)
        if isinstance(module, LoraLinear | LoraEmbedding):
            return module
        if isinstance(module, nn.Embedding | QuantEmbedding):
            module = LoraEmbedding(module, self.hidden_rows)
        else:
            module = LoraLinear(module, self.output_rows if parameter == "output.weight" else self.hidden_rows)
        setattr(parent, child, module.eval())
        return module


class AdapterRunner:
    """A Runner for rows with and without adapters. Without any it is `base`, which also runs the rows that have none.

    Rows with adapters go through torch on the twin: all of them together, and the others with them when `base` is torch as well.
    `deterministic` runs each adapter's rows apart, in tiles, so that their bits depend on nothing beside them.
    """

    def __init__(self, base: Runner, adapters: AdapterSet, *, deterministic: bool = False) -> None:
        self.base, self.adapters, self.deterministic = base, adapters, deterministic

    @torch.inference_mode()
    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """As `Runner.logits`. Raises ConfigError for an adapter that is not loaded."""
        if batch.adapters is None:
            return self.base.logits(batch, cache)
        names = dict.fromkeys(name for name in batch.adapters if name is not None)
        for name in names:
            self.adapters.check(name)
        if not self.deterministic and isinstance(self.base, TorchRunner):
            return self._mixed(batch, cache)
        groups = [[name] for name in names] if self.deterministic else [list(names)]
        parts = [(self._plain, _spans(batch, [None]))]
        parts += [(self._tiled if self.deterministic else self._mixed, _spans(batch, group)) for group in groups]
        out: Tensor | None = None
        for run, spans in parts:
            if not spans:
                continue
            part, wanted = _part(batch, spans)
            logits = run(part, cache)
            if out is None:
                out = logits.new_empty(len(batch.logit_rows), logits.shape[-1])
            out[wanted] = logits
        assert out is not None
        return out

    def _plain(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        return self.base.logits(replace(batch, adapters=None), cache)

    def _mixed(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """Rows of any adapters and none in one forward."""
        hidden, output = _rows(batch)
        with self.adapters.bound(hidden, output) as model:
            return TorchRunner(model).logits(batch, cache)

    def _tiled(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """Rows of one adapter."""
        assert batch.adapters is not None
        name = batch.adapters[0]
        assert name is not None
        every = Rows(((name, None),))
        with self.adapters.bound(every, every) as model:
            return TiledRunner(model).logits(replace(batch, adapters=None), cache)


class OneAdapter:
    """A Runner for `model` with one adapter for every row: a chat with a tuned model. `loaded` says what it is.

    Raises CheckpointError or ConfigError when the adapter at `source` does not fit.
    """

    def __init__(self, model: Llama, source: str | os.PathLike[str] | LoraAdapter) -> None:
        adapters = AdapterSet(model)
        self.loaded = adapters.load("adapter", source)
        self._runner = AdapterRunner(TorchRunner(model), adapters)

    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """As `Runner.logits`."""
        return self._runner.logits(replace(batch, adapters=(self.loaded.name,) * len(batch.spans)), cache)


def _spans(batch: RaggedBatch, names: list[str | None] | list[str]) -> list[int]:
    """Which spans have one of these adapters."""
    assert batch.adapters is not None
    return [i for i, name in enumerate(batch.adapters) if name in names]


def _owners(batch: RaggedBatch) -> Tensor:
    """The span of each row, [T] int64."""
    count = torch.arange(len(batch.spans), device=batch.spans.device)
    return count.repeat_interleave(batch.spans[:, 1])


def _part(batch: RaggedBatch, spans: list[int]) -> tuple[RaggedBatch, Tensor]:
    """A batch of some spans, and which logits [n] int64 of the whole its logits are."""
    assert batch.adapters is not None
    device = batch.spans.device
    chosen = torch.tensor(spans, device=device)
    owner = _owners(batch)
    inside = torch.zeros(len(batch.spans), dtype=torch.bool, device=device)
    inside[chosen] = True
    rows = inside[owner].nonzero().squeeze(-1)
    wanted = inside[owner[batch.logit_rows]].nonzero().squeeze(-1)
    place = torch.zeros_like(owner)
    place[rows] = torch.arange(len(rows), device=device)
    own = batch.spans[chosen]
    first = own[:, 1].cumsum(0) - own[:, 1]
    table = torch.arange(len(spans), device=device)
    return RaggedBatch(
        tokens=batch.tokens[rows],
        positions=batch.positions[rows],
        slots=batch.slots[rows],
        spans=torch.stack([first, own[:, 1], own[:, 2], table], 1),
        tables=batch.tables[own[:, 3]],
        logit_rows=place[batch.logit_rows[wanted]],
        adapters=tuple(batch.adapters[i] for i in spans),
    ), wanted


def _rows(batch: RaggedBatch) -> tuple[Rows, Rows]:
    """Rows of each adapter among all rows, and among those whose logits are wanted."""
    assert batch.adapters is not None
    owner = _owners(batch)
    names = list(dict.fromkeys(name for name in batch.adapters if name is not None))
    kinds = torch.tensor(
        [names.index(name) if name is not None else -1 for name in batch.adapters], device=owner.device
    )
    of_row = kinds[owner]
    of_logit = of_row[batch.logit_rows]
    hidden, output = (
        Rows(tuple((name, found) for i, name in enumerate(names) if len(found := (of == i).nonzero().squeeze(-1))))
        for of in (of_row, of_logit)
    )
    return hidden, output


def _module(model: Llama, parameter: str) -> nn.Module | None:
    try:
        return model.get_submodule(parameter.removesuffix(".weight"))
    except AttributeError:
        return None


def _values(model: Llama, parameter: str) -> Tensor:
    """A matrix of the base in plain numbers, float32."""
    module = _module(model, parameter)
    if isinstance(module, QuantLinear | QuantEmbedding):
        return module.matrix.dequantize()
    assert isinstance(module, nn.Linear | nn.Embedding)
    return module.weight.detach().float()


def _square(a: Tensor, b: Tensor) -> Tensor:
    """|B A|^2 (Frobenius) without the product: the trace of (B^T B)(A A^T); of experts all together."""
    a, b = a.double(), b.double()
    return ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)


def _twin(module: Any) -> Any:
    """The same modules anew, over the same parameters and buffers: children of the twin can be replaced."""
    twin = module.__new__(type(module))
    twin.__dict__ = module.__dict__.copy()
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = module.__dict__[kind].copy()
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child) for name, child in module.__dict__["_modules"].items()
    }
    return twin

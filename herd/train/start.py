"""The model that a run begins with, as `ModelPart` and `MethodPart` say: weights, tokenizer, prompt format, and what trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from herd.adapters.apply import LINEAR, LoraConfig, apply_lora
from herd.adapters.prefix import tune_prefix, tune_prompt
from herd.chat.format import ChatFormat
from herd.chat.formats import detect, format_named
from herd.checkpoint.fill import fill, without_storage
from herd.checkpoint.names import shapes
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.vocabulary import load_tokenizer, tokenizer_of
from herd.errors import ConfigError, HerdError
from herd.model.config import LayerSpec, ModelConfig, MoEConfig, RopeScaling, hidden_dim_of, irope, plain
from herd.model.init import drawn
from herd.model.late import Index, outline, promise, promises
from herd.model.llama import Llama
from herd.model.presets import find
from herd.model.rope import Rope
from herd.parallel.settle import settle
from herd.tokenizer.tokenizer import Tokenizer
from herd.train.config import MethodPart, ModelPart, RunConfig
from herd.train.typed import nearest

__all__ = [
    "Start", "adapt", "device_of", "format_of", "model_config", "random_model", "shape_config", "start", "stored_dtype",
    "unknown_format",
]  # fmt: skip

SHAPE_KEYS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "rope_theta", "rope_scaling",
    "max_seq_len", "tie_embeddings", "moe", "chunk",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Start:
    """`model` on its device, in the dtype it trains in; all parameters frozen but those that the method trains.

    `base` names what an adapter lies on (empty for random weights), `stored` is the dtype that the result is written in.
    """

    model: Llama
    tokenizer: Tokenizer
    format: ChatFormat
    generation: GenerationDefaults
    base: str
    stored: torch.dtype


def device_of(name: str) -> torch.device:
    """The device that a run's `device` means. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is none: write auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {name}, but torch finds no GPU here: use device=cpu, or install a CUDA build of torch"
        )
    return device


def start(
    config: RunConfig,
    device: torch.device,
    tick: Callable[[int, int], None] | None = None,
    *,
    later: bool = False,
) -> Start:
    """Open or make the model of a run. Raises ConfigError, CheckpointError, UnknownModelError and TokenizerError.

    `tick(done, total)` is told the bytes that were read or made. With `later` its numbers are promised (`herd.model.late`):
    `herd.parallel.prepare` makes those that this rank holds.
    """
    part, method = config.model, config.method
    if part.source:
        begun = _opened(config, device, tick, later=later)
    else:
        tokenizer = load_tokenizer(part.tokenizer)
        geometry = model_config(part, tokenizer, config.data.length)
        model = random_model(geometry, part.seed, _dtype(part, method, device), device)
        if not later:
            settle(model, tick=tick)
        stop = GenerationDefaults(tokenizer.special.stop)
        begun = Start(model, tokenizer, format_of(config, tokenizer), stop, "", torch.bfloat16)
    if part.save_dtype is not None:
        begun = replace(begun, stored=getattr(torch, part.save_dtype))
    return begun


def format_of(config: RunConfig, tokenizer: Tokenizer) -> ChatFormat:
    """The prompt format of a run: `data.chat_format`, else the model's own; that of a base model when herd knows none.

    Raises ConfigError for a name that is none, and for a vocabulary without the format's tokens.
    """
    name = config.data.chat_format
    if name is not None:
        try:
            return format_named(name, tokenizer)
        except HerdError as error:
            raise ConfigError(f"data.chat_format: {error}") from error
    if config.model.source:
        with contextlib.suppress(HerdError):  # its template is of a format that herd does not know
            return detect(tokenizer)
    return format_named("base", tokenizer)


def unknown_format(config: RunConfig) -> ConfigError:
    """That nothing says in which prompt format conversations are to be learned."""
    return ConfigError(
        f"data.chat_format: the files of {config.model.source or config.model.tokenizer} do not say how it chats: name the "
        "prompt format that it is to learn, for example data.chat_format=llama3"
    )


def random_model(config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device) -> Llama:
    """A model of random weights that are promised: they depend on the seed and on where they are in the model alone."""
    with without_storage():
        model = Llama(config)
    with torch.device(device):
        model.rope = Rope(config)

    def make(name: str, shape: tuple[int, ...], index: Index | None = None) -> Tensor:
        return drawn(seed, name, shape, config, index).to(device, dtype)

    for name, shape in shapes(config).items():
        home, _, field = name.rpartition(".")
        module = model.get_submodule(home)
        module.register_parameter(field, outline(shape, dtype, trains=True))
        promise(module, field, partial(make, name, shape))
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
        promise(model.output, "weight", promises(model.tok_embeddings)["weight"])
    return model


def adapt(model: Llama, method: MethodPart, seed: int) -> Llama:
    """`model` with what `method` trains requiring gradients, and nothing else. Raises ConfigError."""
    torch.manual_seed(seed)
    if method.kind == "full":
        return model.requires_grad_(True)
    if method.kind == "prefix":
        return tune_prefix(model, method.tokens)
    if method.kind == "prompt":
        return tune_prompt(model, method.tokens)
    lora = LoraConfig(
        rank=method.rank,
        alpha=method.alpha,
        dropout=method.dropout,
        targets=method.targets or LINEAR,
        use_dora=method.kind == "dora",
        use_rslora=method.rslora,
    )
    apply_lora(model, lora)
    return model


def model_config(part: ModelPart, tokenizer: Tokenizer, length: int) -> ModelConfig:
    """The geometry of a model with random weights. Raises ConfigError."""
    vocab = tokenizer.vocab_size
    context = part.max_seq_len or length
    if isinstance(part.shape, str):
        found = find(part.shape).config
        if not isinstance(found, ModelConfig):
            raise ConfigError(f"model.shape: {part.shape} is not a text Llama; herd trains those")
        made = replace(found, vocab_size=vocab, max_seq_len=context)
    else:
        made = shape_config({"max_seq_len": context, **(part.shape or {})}, vocab)
    return _reshaped(made, part)


def stored_dtype(part: ModelPart) -> Any:
    """The name of the dtype that a result is written in when `save_dtype` does not say. Reads headers alone."""
    dtype = _stored(open_store(resolve(part.source))) if part.source else torch.bfloat16
    return str(dtype).removeprefix("torch.")


def shape_config(shape: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    """A ModelConfig from a few numbers; what is left out follows. `n_layers` is needed, and `dim`.

    n_heads dim / 64; n_kv_heads n_heads; head_dim dim / n_heads; hidden_dim Meta's rule, rounded up to 64; tie_embeddings below
    dim 2048; `moe: {n_experts, top_k, hidden_dim}` with `chunk` makes Llama 4's layers, experts in every second one.
    """
    for key in shape:
        if key not in SHAPE_KEYS:
            raise ConfigError(f"model.shape.{key}: there is no such key; {nearest(key, SHAPE_KEYS)}")
    values: dict[str, Any] = {key: value for key, value in shape.items() if value is not None}
    try:
        dim, n_layers = values.pop("dim"), values.pop("n_layers")
    except KeyError as error:
        raise ConfigError(f"model.shape.{error.args[0]} is missing") from None
    for name, value in (("dim", dim), ("n_layers", n_layers)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"model.shape.{name}: {value!r} must be a whole number above 0")
    heads = values.setdefault("n_heads", max(1, dim // 64))
    values.setdefault("n_kv_heads", heads)
    values.setdefault("head_dim", dim // heads if isinstance(heads, int) and heads > 0 else 0)
    values.setdefault("hidden_dim", hidden_dim_of(dim, multiple_of=64))
    values.setdefault("tie_embeddings", dim < 2048)
    moe, chunk = values.pop("moe", None), values.pop("chunk", None)
    layers: tuple[LayerSpec, ...] = plain(n_layers)
    try:
        if moe is not None or chunk is not None:
            layers = irope(n_layers, chunk=chunk, moe_layers=range(1, n_layers, 2) if moe else (), temper=False)
        if moe is not None:
            values["moe"] = MoEConfig(**{"hidden_dim": values["hidden_dim"], **moe})
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return ModelConfig(dim=dim, vocab_size=vocab_size, layers=layers, **values)
    except TypeError as error:
        raise ConfigError(f"model.shape: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"model.shape: {error}") from error


def _opened(config: RunConfig, device: torch.device, tick: Any, *, later: bool) -> Start:
    part, method = config.model, config.method
    path = resolve(part.source)
    store = open_store(path)
    stored = _stored(store)
    weights = "nf4" if method.kind == "qlora" else "plain"
    model = fill(store, _dtype(part, method, device), device, weights=weights, tick=tick, later=later)
    changed = _reshaped(model.config, part)
    if changed != model.config:
        model.config = changed
        with torch.device(device):
            model.rope = Rope(changed)
    if method.kind == "full" and not later:
        _own(model)
    tokenizer = tokenizer_of(store)
    generation = getattr(store, "generation", GenerationDefaults())
    return Start(model, tokenizer, format_of(config, tokenizer), generation, _named(part.source, path), stored)


def _own(model: nn.Module) -> None:
    """Give every parameter memory of its own: loaded ones may be views of the file."""
    for weight in model.parameters():
        weight.data = weight.data.clone()


def _dtype(part: ModelPart, method: MethodPart, device: torch.device) -> torch.dtype:
    if part.dtype is not None:
        return getattr(torch, part.dtype)
    return torch.bfloat16 if method.adapts and device.type == "cuda" else torch.float32


def _stored(store: Any) -> torch.dtype:
    """The dtype of the largest tensors of a checkpoint, 16 bits for anything quantized."""
    dtypes = {store.info(name).number for name in store.names() if len(store.info(name).shape) > 1}
    if dtypes <= {"float32", "float64"}:
        return torch.float32
    return torch.float16 if dtypes == {"float16"} else torch.bfloat16


def _reshaped(config: ModelConfig, part: ModelPart) -> ModelConfig:
    changes: dict[str, Any] = {}
    if part.rope_theta is not None:
        changes["rope_theta"] = part.rope_theta
    if part.rope_scaling is not None:
        # What is stretched is the context that the model was made for, or the one that was stretched before.
        before = config.max_seq_len if config.rope_scaling is None else config.rope_scaling.original_max_seq_len
        try:
            changes["rope_scaling"] = RopeScaling(**{"original_max_seq_len": before, **part.rope_scaling})
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"model.rope_scaling: {error}") from error
    if part.max_seq_len is not None:
        changes["max_seq_len"] = part.max_seq_len
    return replace(config, **changes) if changes else config


def _named(source: str, path: Path) -> str:
    """What an adapter calls its base: a folder or file in full, since it is looked for from elsewhere; else the name."""
    return str(path.resolve()) if Path(source).expanduser().exists() else source

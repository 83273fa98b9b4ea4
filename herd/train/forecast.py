"""What a run will be, from its configuration and the headers of its model alone: sizes, steps, memory. No weights are read.

Memory is an estimate of one process without parallelism: numbers that are kept (exact); what a step needs on top (the tensors
that the backward pass of each block wants, which are counted, the logits of a chunk, and a share for what lives briefly); and,
on a CPU, the process itself. Measured runs of a few hundred MB lie within 30 percent. `herd plan train` plans many devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from herd.checkpoint.names import shapes
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.checkpoint.vocabulary import load_tokenizer
from herd.model.accounting import parameters
from herd.model.config import ModelConfig
from herd.train.config import MethodPart, RunConfig
from herd.train.unused import alone, unused

__all__ = ["Forecast", "forecast"]

LINEAR = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
PROCESS = 450_000_000
"""Bytes of Python with torch and all libraries, measured on Linux with a CPU build of torch."""
MOMENTARY = 1.35
"""What a step holds at its peak, over what it keeps for the backward pass: results of one operation, and memory the allocator
keeps. Measured with herd-nano in rows of 512: 1.3 in full tuning, 1.5 with LoRA."""
NF4_BYTES = 0.5157
"""Bytes a weight in NF4 with double quantization (`herd.quant.nf4`)."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Numbers of a run. Bytes: `weights`, `gradients`, `optimiser`, `activations` (of a micro-batch), `process` (0 on a GPU), and
    `saved` (a checkpoint). `tokens`: of a step. `warnings`: what is probably not meant.
    """

    what: str
    parameters: int
    trained: int
    tokens: int
    steps: str
    weights: int
    gradients: int
    optimiser: int
    activations: int
    process: int
    saved: int
    out: str
    warnings: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.process

    def lines(self) -> list[str]:
        """For people."""
        share = f", {_count(self.trained)} of them trained" if self.trained != self.parameters else ", all trained"
        process = f", the process {_size(self.process)}" if self.process else ""
        parts = f"weights {_size(self.weights)}, gradients {_size(self.gradients)}, optimiser {_size(self.optimiser)}"
        return [
            f"{self.what}: {_count(self.parameters)} parameters{share}",
            f"{self.steps}; a step has {self.tokens:,} tokens",
            f"memory about {_size(self.memory)}: {parts}, a step {_size(self.activations)}{process}",
            f"a checkpoint has {_size(self.saved)}",
            f"into {self.out}",
            *(f"warning: {text}" for text in self.warnings),
        ]


def forecast(config: RunConfig, dp: int = 1) -> Forecast:
    """The numbers of `config` with `dp` ranks that see different rows; memory is that of one rank that holds everything.

    Raises a HerdError for a model that is not there.
    """
    geometry, name = _geometry(config)
    count = parameters(geometry)
    trained = _trained(config, geometry, count)
    narrow = config.model.dtype or ("bfloat16" if config.method.adapts and not _on_cpu(config) else "float32")
    number = 2 if narrow == "bfloat16" else 4
    if config.method.kind == "qlora":
        inner = count - geometry.vocab_size * geometry.dim * (1 if geometry.tie_embeddings else 2)
        weights = round(inner * NF4_BYTES + (count - inner) * 1.07) + 4 * trained
    else:
        weights = number * count + (4 * trained if config.method.adapts else 0)
    states = {"adamw": 8.0, "adamw8bit": 2.1, "muon": 4.5}[config.train.optim.kind]
    tokens = config.data.rows * config.data.length * config.train.accumulate * dp
    optimiser = round(states * trained)
    return Forecast(
        what=f"{_method(config)} of {name}",
        parameters=count + (trained if config.method.adapts else 0),
        trained=trained,
        tokens=tokens,
        steps=_steps(config, tokens),
        weights=weights,
        gradients=4 * trained,
        optimiser=optimiser,
        activations=round(MOMENTARY * _activations(config, geometry, number)),
        process=PROCESS if _on_cpu(config) else 0,
        saved=4 * trained + optimiser,
        out=config.out,
        warnings=tuple(_warnings(config, geometry, tokens, narrow)),
    )


def _on_cpu(config: RunConfig) -> bool:
    if config.device != "auto":
        return config.device == "cpu"
    import torch

    return not torch.cuda.is_available()


def _geometry(config: RunConfig) -> tuple[ModelConfig, str]:
    if config.model.source:
        return open_store(resolve(config.model.source)).config, config.model.source
    from herd.train.start import model_config

    name = config.model.shape if isinstance(config.model.shape, str) else "a new model"
    return model_config(config.model, load_tokenizer(config.model.tokenizer), config.data.length), name


def _trained(config: RunConfig, geometry: ModelConfig, count: int) -> int:
    """Numbers that require gradients."""
    method, kv = config.method, geometry.n_kv_heads * geometry.head_dim
    if method.kind == "full":
        return count
    if method.kind == "prefix":
        return 2 * geometry.n_layers * method.tokens * kv
    if method.kind == "prompt":
        return method.tokens * geometry.dim
    return sum(_factors(name, shape, method) for name, shape in shapes(geometry).items())


def _factors(name: str, shape: tuple[int, ...], method: MethodPart) -> int:
    """Numbers that LoRA trains beside the parameter `name`, an embedding's magnitude among them."""
    home, targets = name.removesuffix(".weight"), method.targets or LINEAR
    if len(shape) == 3:  # gate and up of experts share the factor that reads x: it is counted with gate
        owner, _, key = home.rpartition(".")
        part = f"{owner}.w2" if key == "w2" else f"{owner}.w13"
        if not {"experts", owner, part, part.partition("feed_forward.")[2]} & set(targets):
            return 0
        return shape[0] * method.rank * (shape[1] if key == "w3" else shape[1] + shape[2])
    last = home.rpartition(".")[2]
    if len(shape) != 2 or last == "router" or not {home, last} & set(targets):
        return 0
    lengths = shape[1] if last == "tok_embeddings" else shape[0]
    return method.rank * sum(shape) + (lengths if method.kind == "dora" else 0)


def _activations(config: RunConfig, geometry: ModelConfig, held: int) -> int:
    """Bytes of one micro-batch: what blocks keep for the backward pass, and the logits of a chunk with their gradient.

    `held`: bytes of a weight. Products of weights that are held in 16 bits are of 16 bits whatever the precision says.
    """
    tokens = config.data.length * (1 if config.train.exact_accumulation else config.data.rows)
    number = min(held, 4 if config.train.precision == "float32" else 2)
    heads = geometry.n_heads * geometry.head_dim
    kv = geometry.n_kv_heads * geometry.head_dim
    block = 5 * geometry.dim + 3 * heads + 4 * kv + 4 * geometry.hidden_dim
    kept, checkpointing = geometry.n_layers * block, config.train.checkpointing
    if checkpointing == "full":
        kept = geometry.n_layers * geometry.dim + block
    elif checkpointing == "attention":
        kept -= geometry.n_layers * (2 * heads + 4 * kv)
    elif isinstance(checkpointing, int):
        kept -= (geometry.n_layers // checkpointing) * (block - geometry.dim)
    chunk = min(tokens, config.train.loss_chunk or 1024)
    return number * tokens * kept + 2 * 4 * chunk * geometry.vocab_size


def _steps(config: RunConfig, tokens: int) -> str:
    budget, ends = config.train.budget, []
    if budget.steps is not None:
        ends.append(f"{_steps_of(budget.steps)} ({_count(budget.steps * tokens)} tokens)")
    if budget.tokens is not None:
        ends.append(f"{_count(budget.tokens)} tokens (about {_steps_of(-(-budget.tokens // tokens))})")
    if budget.minutes is not None:
        ends.append(f"{budget.minutes:g} minutes")
    return ends[0] if len(ends) == 1 else " or ".join(ends) + ", whichever is first"


def _steps_of(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _warnings(config: RunConfig, geometry: ModelConfig, tokens: int, held: str) -> Iterator[str]:
    """What is probably not meant, though it can be done. `held`: the dtype of weights."""
    yield from _warm_up(config, tokens)
    yield from unused(config)
    yield from alone(config)
    train, length = config.train, config.data.length
    if held == "bfloat16" and train.precision == "float32" and config.model.dtype is not None:
        yield "model.dtype=bfloat16: products of weights of 16 bits are of 16 bits, whatever train.precision=float32 says"
    known = config.model.max_seq_len or geometry.max_seq_len
    if not config.stages and length > known:
        yield (
            f"data.length is {length:,}, and the model is made for {known:,} positions: longer documents train "
            f"positions that it does not know, and the result still says {known:,} (model.max_seq_len; "
            "herd train extend makes contexts longer)"
        )
    judge = train.evaluate
    if judge.every_steps is not None and config.data.held_out is None and not judge.prompts:
        yield (
            "train.evaluate.every_steps: there is nothing to evaluate: data.held_out names rows that are kept for it, "
            "train.evaluate.prompts what is answered"
        )


def _warm_up(config: RunConfig, tokens: int) -> Iterator[str]:
    """What is wrong with a warm-up that is not over when the run is (a budget of minutes alone has no number of steps)."""
    budget, warm = config.train.budget, config.train.schedule.warmup_steps
    ends = [budget.steps] if budget.steps is not None else []
    if budget.tokens is not None:
        ends.append(-(-budget.tokens // tokens))
    if not ends or warm == 0:
        return
    shares = [stage.share for stage in config.stages] or [1.0]
    steps = max(1, round(min(ends) * min(shares) / sum(shares)))
    if warm < steps:
        return
    who = "the shortest stage" if config.stages else "the run"
    yield (
        f"the warm-up takes {warm:,} steps, and {who} has {steps:,}: the learning rate gets to at most {steps / warm:.0%} of "
        "its peak; train.schedule.warmup_steps sets it"
    )


def _method(config: RunConfig) -> str:
    if config.recipe == "extend":
        return f"extension to {config.stages[-1].length:,} positions in {len(config.stages)} stages"
    names = {"full": "full tuning", "lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA", "prefix": "prefix tuning"}
    if config.recipe == "pretrain" and config.method.kind == "full":
        return "pretraining"
    return names.get(config.method.kind, "prompt tuning")


def _count(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{max(1, round(number / 1e6)):,} MB"

"""What a training run is told. One `RunConfig` is one YAML file is one run; `herd.train.overrides` reads and writes it.

The text under a field is its documentation everywhere: `herd recipes cp --all` writes it as the comment of the key, errors show
it, and a test refuses a field without one. This module imports no torch, so a configuration is checked before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from herd.data.config import DataPart
from herd.errors import ConfigError
from herd.parallel.config import ParallelPart

__all__ = [
    "AveragePart", "Budget", "EvaluatePart", "LengthStage", "MethodPart", "ModelPart", "OptimConfig", "ReportPart",
    "RunConfig", "SavePart", "ScheduleConfig", "TrainConfig",
]  # fmt: skip

Precision = Literal["float32", "bfloat16", "float8"]
Checkpointing = Literal["none", "full", "attention"]
Method = Literal["full", "lora", "dora", "qlora", "prefix", "prompt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """When the run ends: whichever of these comes first; at least one is given.

    A run limited by steps or tokens is reproducible bit for bit; one limited by minutes ends on time whatever the machine does.
    """

    steps: int | None = None
    """Optimiser steps."""
    minutes: float | None = None
    """Minutes of wall clock, the time of earlier parts of a resumed run included."""
    tokens: int | None = None
    """Tokens read, all ranks together, padding not counted."""

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None and self.tokens is None:
            raise ConfigError(
                "train.budget: give steps, minutes or tokens (of several, the first that is reached ends the run)"
            )
        for name in ("steps", "minutes", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"train.budget.{name}: {value} must be positive")

    def progress(self, step: int, seconds: float, tokens: int = 0) -> float:
        """How much of the budget is used, 0 to 1."""
        by_step = 0.0 if self.steps is None else step / self.steps
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        by_token = 0.0 if self.tokens is None else tokens / self.tokens
        return min(1.0, max(by_step, by_time, by_token))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over the budget: warm-up, then the shape that `kind` names."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """wsd: constant, then linear decay over the last `decay_fraction`. cosine, linear: decay from the end of the warm-up on.
    constant: no decay."""
    warmup_steps: int = 100
    """Steps in which the rate climbs linearly from zero."""
    decay_fraction: float = 0.3
    """wsd: the share of the budget that is decay; 1 decays from the start."""
    final: float = 0.0
    """The rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        _one_of(self, "train.schedule", "kind", ("wsd", "cosine", "linear", "constant"))
        _from_to(self, "train.schedule", "decay_fraction", 0, 1)
        _from_to(self, "train.schedule", "final", 0, 1)
        _from_to(self, "train.schedule", "warmup_steps", 0, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimiser and its numbers."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw: fused where the device can. adamw8bit: the same with states of 8 bits. muon: Muon for the matrices inside layers,
    AdamW for embeddings, output and norms."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """muon: peak rate of the matrices inside layers."""
    muon_momentum: float = 0.95
    """muon: momentum."""
    muon_dtype: Literal["float32", "bfloat16"] | None = None
    """muon: what its iteration is computed in. null: bfloat16 on a GPU, float32 on a CPU (bfloat16 is twice as fast on one that
    has instructions for it)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW: how slowly the means of gradients and of their squares move."""
    eps: float = 1e-8
    """AdamW: added to the root in the divisor."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. Norms are never decayed."""
    decay_embeddings: bool = True
    """Decay the embedding table and the output matrix, too."""
    clip: float | None = 1.0
    """The norm of all gradients together is cut to this; null never cuts (the norm is still told)."""

    def __post_init__(self) -> None:
        _one_of(self, "train.optim", "kind", ("adamw", "adamw8bit", "muon"))
        if self.muon_dtype is not None:
            _one_of(self, "train.optim", "muon_dtype", ("float32", "bfloat16"))
        for name in ("lr", "muon_lr", "weight_decay", "eps"):
            _from_to(self, "train.optim", name, 0, math.inf)
        _from_to(self, "train.optim", "muon_momentum", 0, 1)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.optim.betas: {self.betas}: both must be from 0 to below 1")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"train.optim.clip: {self.clip} must be positive (null for no clipping)")


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePart:
    """When the run saves its state; it always does at the end, and on SIGTERM, SIGINT and SIGUSR1."""

    every_steps: int | None = None
    """Save after so many steps."""
    every_minutes: float | None = 15.0
    """Save after so many minutes."""
    keep: int = 2
    """How many of the newest states stay. The last good one is never removed."""

    def __post_init__(self) -> None:
        _every(self, "train.save")
        _from_to(self, "train.save", "keep", 1, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatePart:
    """When held-out text is measured and samples are written; always at the end."""

    every_steps: int | None = None
    """Evaluate after so many steps."""
    every_minutes: float | None = 10.0
    """Evaluate after so many minutes."""
    prompts: tuple[str, ...] = ()
    """Texts (for a chat model: questions) that are answered at each evaluation, greedily, and written to the log."""
    max_tokens: int = 64
    """Length of these answers, in tokens."""

    def __post_init__(self) -> None:
        _every(self, "train.evaluate")
        _from_to(self, "train.evaluate", "max_tokens", 1, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragePart:
    """An average of the weights along the run, which is exported in place of the last ones."""

    kind: Literal["ema", "tail"] = "ema"
    """ema: exponential moving average. tail: the plain mean of the last part of the run."""
    decay: float = 0.999
    """ema: the share of the old average that stays at each update."""
    start: float = 0.8
    """tail: the share of the budget after which averaging begins."""
    every_steps: int = 1
    """Steps between updates."""

    def __post_init__(self) -> None:
        _one_of(self, "train.average", "kind", ("ema", "tail"))
        if not 0 <= self.decay < 1 or not 0 <= self.start < 1:
            raise ConfigError(f"train.average: decay {self.decay} and start {self.start} must be from 0 to below 1")
        _from_to(self, "train.average", "every_steps", 1, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What `Trainer` takes: everything about the loop, nothing about the model's or the data's origin."""

    budget: Budget
    """When the run ends."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over time."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    accumulate: int = 1
    """Micro-batches of one optimiser step. The loss is the mean over the learned tokens of all of them."""
    exact_accumulation: bool = False
    """Compute row by row, and deal rows to ranks one by one: one micro-batch of B rows is then the same step as B of one row, bit
    for bit (false: within rounding). Rows of 512 tokens take 5 % longer at 66 M, 22 % at herd-nano's size. Not on a GPU."""
    precision: Precision = "float32"
    """What matrix products are computed in: float32, bfloat16 (weights stay float32), float8 (needs a GPU that has it). Weights
    that are held in bfloat16 (model.dtype) multiply in bfloat16 in any case."""
    compile: bool = False
    """torch.compile, block by block."""
    checkpointing: Checkpointing | int = "none"
    """Activations that are made again in the backward pass instead of kept: none, full (of every block), attention, or a
    number n for every n-th block."""
    loss_chunk: int | None = None
    """Logits are made for so many positions at a time. null: a number that bounds their memory."""
    router_aux: float = 0.0
    """Experts: weight of the load-balancing loss."""
    router_z: float = 0.0
    """Experts: weight of the router's z-loss."""
    seed: int = 0
    """Of dropout and of everything random in the loop. Weights and data have their own."""
    save: SavePart = field(default_factory=SavePart)
    """When the state is saved."""
    evaluate: EvaluatePart = field(default_factory=EvaluatePart)
    """When held-out text is measured."""
    log_every: int = 10
    """Steps between printed lines. The log file has every step."""
    average: AveragePart | None = None
    """An average of the weights along the run; null exports the last weights."""

    def __post_init__(self) -> None:
        for name in ("accumulate", "log_every"):
            _from_to(self, "train", name, 1, math.inf)
        for name in ("router_aux", "router_z"):
            _from_to(self, "train", name, 0, math.inf)
        _one_of(self, "train", "precision", get_args(Precision))
        if isinstance(self.checkpointing, int):
            _from_to(self, "train", "checkpointing", 1, math.inf)
        else:
            _one_of(self, "train", "checkpointing", get_args(Checkpointing))
        if self.loss_chunk is not None:
            _from_to(self, "train", "loss_chunk", 1, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """The model that is trained: an existing one (`source`), or one with random weights (`shape` and `tokenizer`)."""

    source: str = ""
    """A checkpoint to go on from: a folder or file in any format herd reads, or a name of the catalog. Empty: use `shape`."""
    shape: str | dict[str, Any] | None = None
    """Random weights instead: a name of the catalog whose geometry is taken, or the geometry itself, for example
    {dim: 256, n_layers: 6, n_heads: 4}; what is left out follows from the rest. The vocabulary is the tokenizer's."""
    tokenizer: str = ""
    """With `shape`: the folder, file or model whose tokenizer is used. With `source` it is the source's own."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What weights are held in while training. null: float32; the frozen ones of an adapter on a GPU in bfloat16. Adapters
    themselves are float32 always."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the trained model is written in. null: as the source is stored (quantized ones: bfloat16); random weights bfloat16."""
    rope_theta: float | None = None
    """Another base of the rotary frequencies (long contexts). null: the model's own."""
    rope_scaling: dict[str, Any] | None = None
    """Llama 3.1's scaling of the rotary frequencies, for example {factor: 8.0, original_max_seq_len: 8192}; the latter is the
    model's context when it is left out. null: its own."""
    max_seq_len: int | None = None
    """The longest context that is written into the result. null: the model's own (with `shape`: the length of a row)."""
    seed: int = 0
    """Of random weights."""

    def __post_init__(self) -> None:
        if self.source and self.shape is not None:
            raise ConfigError(
                "model: give source (an existing model) or shape (random weights), not both; model.shape=null model.tokenizer= "
                "takes away what a recipe or file has"
            )
        if self.shape is not None and not self.tokenizer:
            raise ConfigError(
                "model.tokenizer: a model with random weights needs one: a folder, a file or a model's name"
            )
        if self.source and self.tokenizer:
            raise ConfigError("model.tokenizer: a model of model.source keeps its own; give it only with model.shape")
        for name in ("rope_theta", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"model.{name}: {value} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodPart:
    """Which parameters are trained."""

    kind: Method = "full"
    """full: all weights. lora, dora: low-rank factors beside frozen matrices. qlora: lora over a base held in 4 bits (NF4).
    prefix: keys and values before each layer. prompt: embeddings before the text."""
    rank: int = 16
    """lora, dora, qlora: the rank of the factors."""
    alpha: float = 32.0
    """lora, dora, qlora: their product is scaled by alpha / rank."""
    dropout: float = 0.0
    """lora, dora, qlora: dropout on what goes into the factors."""
    targets: tuple[str, ...] = ()
    """lora, dora, qlora: kinds of matrices (wq wk wv wo w1 w2 w3 tok_embeddings output; in lora and qlora without dropout:
    experts, or of them experts.w13, which is gate with up, and experts.w2), or single ones by name. Empty: the first seven, of
    every layer; of a layer with experts w1 w2 w3 are the shared expert's."""
    rslora: bool = False
    """lora, dora, qlora: scale by alpha / sqrt(rank) instead."""
    tokens: int = 20
    """prefix, prompt: how many virtual tokens."""
    save_merged: bool = False
    """lora, dora, qlora: write the merged model beside the adapter."""
    qat: str | None = None
    """full: train with the rounding of a quantized form in the forward pass (for example q4_0, q8_0, int8-int4), so that the
    model served in that form is the one that was trained."""

    def __post_init__(self) -> None:
        _one_of(self, "method", "kind", get_args(Method))
        for name in ("rank", "tokens"):
            _from_to(self, "method", name, 1, math.inf)
        if not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ConfigError(f"method: alpha {self.alpha} must be positive, dropout {self.dropout} from 0 to below 1")
        if self.qat is not None and self.kind != "full":
            raise ConfigError(
                f"method.qat: only method.kind full trains the weights that are rounded, this is {self.kind}"
            )
        if self.save_merged and self.kind not in ("lora", "dora", "qlora"):
            raise ConfigError(f"method.save_merged: there is nothing to merge with method.kind {self.kind}")

    @property
    def adapts(self) -> bool:
        """Whether the base stays frozen and an adapter is the result."""
        return self.kind != "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthStage:
    """A part of an extension to long contexts: a run of its own, which starts from the weights of the one before."""

    length: int
    """Positions of a row, and the longest context of the model after this stage."""
    share: float = 1.0
    """Its share of the budget, relative to the other stages."""
    rows: int | None = None
    """Rows of a micro-batch; null keeps the positions of data.rows x data.length (at least one row)."""
    rope_theta: float | None = None
    """The base of the rotary frequencies from here on; null keeps it."""
    rope_scaling: dict[str, Any] | None = None
    """Llama 3.1's scaling from here on, for example {factor: 8.0, original_max_seq_len: 8192}; null keeps it."""

    def __post_init__(self) -> None:
        _from_to(self, "stages", "length", 2, math.inf)
        if not 0 < self.share < math.inf:
            raise ConfigError(f"stages.share: {self.share} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPart:
    """Who is told how the run goes. `log.jsonl` and TensorBoard's files are written into the run's folder in any case."""

    to: tuple[Literal["trackio", "wandb", "mlflow"], ...] = ()
    """Trackers that are told, too; each is a package of its own (pip install "herd[trackio]" and so on)."""
    project: str = "herd"
    """The project (MLflow: experiment) that trackers file the run under."""
    name: str = ""
    """The run's name there. Empty: the name of the folder `out`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run, as one YAML file describes it."""

    recipe: Literal["pretrain", "sft", "extend"]
    """pretrain: on texts, from random weights or further on. sft: on conversations, loss on the replies. extend: on texts, in
    stages of growing length."""
    out: str
    """The folder of the run: its configuration, log, states and the result. Made when it is not there."""
    model: ModelPart = field(default_factory=ModelPart)
    """The model that is trained."""
    data: DataPart
    """What it is trained on."""
    method: MethodPart = field(default_factory=MethodPart)
    """Which parameters are trained."""
    train: TrainConfig
    """The loop: budget, rates, precision, when to save and to evaluate."""
    parallel: ParallelPart = field(default_factory=ParallelPart)
    """How the run is spread over processes."""
    stages: tuple[LengthStage, ...] = ()
    """extend: the stages, in order."""
    report: ReportPart = field(default_factory=ReportPart)
    """Who is told how the run goes."""
    device: str = "auto"
    """auto takes a GPU when there is one; or cpu, cuda, cuda:1."""
    threads: int | None = None
    """Processor threads of each process. null: as many as torch takes. The same bytes need the same number."""

    def __post_init__(self) -> None:
        _one_of(self, "run", "recipe", ("pretrain", "sft", "extend"))
        if not self.out:
            raise ConfigError("out: name the folder of the run")
        if not self.model.source and self.model.shape is None:
            raise ConfigError("model: give source (an existing model), or shape and tokenizer (random weights)")
        if bool(self.stages) != (self.recipe == "extend"):
            wanted = "needs at least one" if self.recipe == "extend" else "has none; use recipe: extend"
            raise ConfigError(f"stages: the recipe {self.recipe} {wanted}")
        if self.threads is not None:
            _from_to(self, "run", "threads", 1, math.inf)
        if self.method.adapts and not self.model.source:
            raise ConfigError(f"method.kind: {self.method.kind} adapts an existing model; give model.source")
        turned = self.model.rope_theta is not None or self.model.rope_scaling is not None or bool(self.stages)
        if self.method.adapts and turned:
            raise ConfigError(
                f"method.kind: an adapter ({self.method.kind}) cannot carry changed rotary frequencies (model.rope_theta, "
                "model.rope_scaling, stages); use method.kind=full"
            )


def _from_to(part: Any, where: str, name: str, low: float, high: float) -> None:
    value = getattr(part, name)
    if not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{where}.{name}: {value} must be {wanted}")


def _one_of(part: Any, where: str, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(part, name)
    if value not in choices:
        raise ConfigError(f"{where}.{name}: {value!r} is not one of {', '.join(choices)}")


def _every(part: SavePart | EvaluatePart, where: str) -> None:
    for name in ("every_steps", "every_minutes"):
        value = getattr(part, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{where}.{name}: {value} must be positive (null for never)")

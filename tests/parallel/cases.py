"""What the ranks of the crew do: the same steps on the same rows, however the run is spread."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from herd.adapters.apply import ATTENTION, LINEAR, LoraConfig, apply_lora
from herd.adapters.prefix import tune_prefix, tune_prompt
from herd.model.attend import packed
from herd.model.config import ModelConfig, MoEConfig, Temper, irope, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.parallel.config import ParallelPart
from herd.parallel.mesh import Mesh
from herd.parallel.prepare import prepare
from herd.quant.apply import quantize
from herd.train.losses import next_token_loss

ROWS, LENGTH, CLIP = 8, 32, 0.5
FEW, STEPS = 3, 10
"""Steps of default tests, of which the second has moved weights and the third moved moments; and of slow ones."""
IGNORE = -100
EPS = 1e-6
"""AdamW divides a gradient by itself. Of those that are zero but for rounding the usual 1e-8 makes whole steps, and ten of them
move the norm of the tied model by 2e-5; so they stay small."""

_BASE: dict[str, Any] = {"dim": 64, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "hidden_dim": 96, "vocab_size": 130}
_BLOCKS = {"dim": 128, "head_dim": 16, "hidden_dim": 128}
CONFIGS = {
    "llama3": ModelConfig(**_BASE, layers=plain(4)),
    "tied": ModelConfig(**_BASE, layers=plain(4), tie_embeddings=True),
    "few": ModelConfig(**{**_BASE, "n_kv_heads": 1}, layers=plain(4)),  # fewer key/value heads than ranks
    "llama4": ModelConfig(
        **_BASE,
        layers=irope(4, nope_every=2, chunk=8, moe_layers=(1, 3)),
        moe=MoEConfig(n_experts=4, top_k=1, hidden_dim=48),
        temper=Temper(floor_scale=8.0),
    ),
    # NF4 takes 64 weights of a row as a block: a share of a row has whole ones.
    "wide": ModelConfig(**(_BASE | _BLOCKS), layers=plain(2)),
    "wide4": ModelConfig(
        **(_BASE | _BLOCKS),
        layers=irope(4, nope_every=2, chunk=8, moe_layers=(1, 3)),
        moe=MoEConfig(n_experts=4, top_k=1, hidden_dim=128),
        temper=Temper(floor_scale=8.0),
    ),
}
ENDS = ("tok_embeddings", "output")
_LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0}
METHODS: dict[str, LoraConfig] = {
    "lora": LoraConfig(**_LORA, targets=(*LINEAR, *ENDS)),
    "dora": LoraConfig(**_LORA, targets=(*LINEAR, *ENDS), use_dora=True),
    "inner": LoraConfig(**_LORA),
    "dropout": LoraConfig(**_LORA, dropout=0.5),
    "experts": LoraConfig(**_LORA, targets=(*LINEAR, "experts")),
    "qexperts": LoraConfig(**_LORA, targets=("experts",)),
    "late": LoraConfig(**_LORA, targets=("layers.3.attention.wq",)),
    "early": LoraConfig(**_LORA, targets=("layers.0.attention.wq",)),
    "down": LoraConfig(**_LORA, targets=("experts.w2",)),
    "sparse": LoraConfig(**_LORA, targets=("layers.1.attention.wq", "layers.2.attention.wo")),
    "qlora": LoraConfig(**_LORA, targets=(*ATTENTION, "w2", *ENDS)),
    "qdora": LoraConfig(**_LORA, targets=(*LINEAR, *ENDS), use_dora=True),
}


def rows(step: int, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels, positions [ROWS, LENGTH]: documents of random lengths, some labels masked."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=random)
    labels = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=random)
    labels[torch.rand(ROWS, LENGTH, generator=random) < 0.3] = IGNORE
    begins = torch.rand(ROWS, LENGTH, generator=random) < 0.1
    begins[:, 0] = True
    index = torch.arange(LENGTH).expand(ROWS, LENGTH)
    positions = index - torch.where(begins, index, 0).cummax(-1).values
    return tokens, labels, positions


def fresh(name: str, method: str = "full") -> Llama:
    """The model that all begin with; with a method, frozen but for an adapter that changes something already."""
    torch.manual_seed(1)
    model = init_weights(Llama(CONFIGS[name]))
    if method.startswith("q"):
        quantize(model, "nf4")
    if method in ("prefix", "prompt"):
        return (tune_prefix if method == "prefix" else tune_prompt)(model, 4)
    if method in METHODS:
        how = METHODS[method]
        if CONFIGS[name].tie_embeddings:
            how = replace(how, targets=tuple(target for target in how.targets if target != "output"))
        apply_lora(model, how)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.rpartition(".")[2] in ("b", "b13", "b2"):
                    weight.normal_(std=0.1)
    return model


def losses(name: str, part: ParallelPart, method: str = "full", steps: int = STEPS) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    mesh = Mesh.of(part)
    model = fresh(name, method)
    spread = prepare(model, mesh)
    optimiser = moved(spread)
    torch.manual_seed(2 + mesh.draws)
    return [_step(spread, optimiser, *rows(step, model.config)) for step in range(steps)]


def moved(spread: Any) -> AdamW:
    """What moves this rank's parameters; a stage of a pipeline may have none that train."""
    own = list(spread.parameters())
    return AdamW(own or [torch.zeros(())], lr=3e-3, eps=EPS)


def _step(spread: Any, optimiser: AdamW, tokens: Tensor, labels: Tensor, positions: Tensor) -> tuple[float, float]:
    mesh: Mesh = spread.mesh
    own = [part.chunk(mesh.dp_size)[mesh.dp_rank] for part in (tokens, labels, positions)]
    batches = list(zip(*(mesh.cut(part).chunk(2) for part in own), strict=True))
    supervised = int(mesh.sum(sum((b[1] != IGNORE).sum() for b in batches)))

    def loss_of(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        hidden = model.hidden(model.embed(batch[0]), batch[2], mesh.packed(model.config, batch[2]))
        return next_token_loss(hidden, batch[1], model.output, 16) / supervised

    total = torch.zeros(())
    if spread.pipeline is not None:

        def counted(model: Any, i: int) -> tuple[Tensor, Tensor]:
            loss = loss_of(model, batches[i])
            return loss, loss.detach()

        kept = spread.pipeline.backward([(tokens, positions) for tokens, _, positions in batches], counted)
        total = spread.pipeline.whole(sum(kept, torch.zeros(())))
    else:
        for i, batch in enumerate(batches):
            spread.last(i == len(batches) - 1)
            loss = loss_of(spread.model, batch)
            loss.backward()
            total += loss.detach()
    norm = spread.clip(CLIP)
    optimiser.step()
    optimiser.zero_grad()
    return float(mesh.sum(total)), float(norm)


def reference(name: str, method: str = "full", steps: int = STEPS) -> list[tuple[float, float]]:
    """The same with nothing of herd.parallel: one process, all rows at once."""
    model = fresh(name, method)
    optimiser = AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, eps=EPS)
    found = []
    for step in range(steps):
        tokens, labels, positions = rows(step, model.config)
        hidden = model.hidden(model.embed(tokens), positions, packed(model.config, positions))
        loss = next_token_loss(hidden, labels, model.output) / (labels != IGNORE).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        found.append((float(loss.detach()), float(norm)))
    return found

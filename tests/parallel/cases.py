"""What the ranks of the crew do: the same ten steps on the same rows, however the run is spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from herd.model.attend import packed
from herd.model.config import ModelConfig, MoEConfig, Temper, irope, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.parallel.config import ParallelPart
from herd.parallel.mesh import Mesh
from herd.parallel.prepare import prepare
from herd.train.losses import next_token_loss

ROWS, LENGTH, STEPS, CLIP = 8, 32, 10, 0.5
IGNORE = -100

_BASE: dict[str, Any] = {"dim": 64, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "hidden_dim": 96, "vocab_size": 130}
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


def fresh(name: str) -> Llama:
    torch.manual_seed(1)
    return init_weights(Llama(CONFIGS[name]))


def losses(name: str, part: ParallelPart, micro: int = 2, dtype: str | None = None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    mesh = Mesh.of(part)
    model = fresh(name)
    spread = prepare(model, mesh, dtype=None if dtype is None else getattr(torch, dtype))
    optimiser = AdamW(list(spread.parameters()), lr=3e-3)
    return [_step(spread, optimiser, *rows(step, model.config)) for step in range(STEPS)]


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


def reference(name: str) -> list[tuple[float, float]]:
    """The same with nothing of herd.parallel: one process, all rows at once."""
    model = fresh(name)
    optimiser = AdamW(model.parameters(), lr=3e-3)
    found = []
    for step in range(STEPS):
        tokens, labels, positions = rows(step, model.config)
        hidden = model.hidden(model.embed(tokens), positions, packed(model.config, positions))
        loss = next_token_loss(hidden, labels, model.output) / (labels != IGNORE).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        found.append((float(loss.detach()), float(norm)))
    return found

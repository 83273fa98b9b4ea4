"""Weight initialisation: one function, read like a table.

| parameter                                   | distribution                            |
|---------------------------------------------|-----------------------------------------|
| norm weights                                | 1                                       |
| tok_embeddings                              | normal, std 1 (0.02 when tied)          |
| output (untied)                             | normal, std dim^-0.5, cut at 3 std      |
| wq wk wv, w1, router, experts w1            | normal, std 0.02, cut at 3 std          |
| wo w2 w3, experts w2 w3                     | normal, std 0.02 / sqrt(2 * n_layers)   |

The depth-scaled residual writers keep the sum over layers at the scale of one layer, as in torchtitan's and GPT-2's init.
"""

from __future__ import annotations

from torch import nn

from herd.model.llama import Llama

__all__ = ["init_weights"]

STD = 0.02
RESIDUAL = ("wo.weight", "w2.weight", "w3.weight", "experts.w2", "experts.w3")


def init_weights(model: Llama) -> Llama:
    """Fill every parameter of `model` in place from the global random state; returns it."""
    config = model.config
    depth = STD / (2 * config.n_layers) ** 0.5
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            nn.init.ones_(weight)
        elif name == "tok_embeddings.weight":
            nn.init.normal_(weight, std=STD if config.tie_embeddings else 1.0)
        elif name == "output.weight":
            _cut_normal(weight, config.dim**-0.5)
        else:
            _cut_normal(weight, depth if name.endswith(RESIDUAL) else STD)
    return model


def _cut_normal(weight: nn.Parameter, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

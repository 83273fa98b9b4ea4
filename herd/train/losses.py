"""Next-token loss from hidden states, whole or in chunks that never hold all logits at once.

Letters: T positions (flattened), D dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from herd.data.encode import IGNORE

__all__ = ["next_token_loss"]

Output = Callable[[Tensor], Tensor]
"""Hidden states [T, D] -> logits [T, V], for example `Llama.output`."""


def next_token_loss(hidden: Tensor, labels: Tensor, output: Output, chunk: int | None = None) -> Tensor:
    """Sum over learned positions of -log p(label), in fp32 nats. hidden [..., D], labels [...] (already shifted).

    With `chunk`, logits are made for that many positions at a time and made again in the backward pass: memory falls from
    T*V to chunk*V for about one more output projection. The sum, not the mean, is returned, so that batches with unequal
    numbers of learned positions can be accumulated exactly.
    """
    flat, wanted = hidden.flatten(0, -2), labels.flatten()
    if chunk is None or chunk >= len(wanted):
        return _summed(flat, wanted, output)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(wanted), chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(_summed, flat[part], wanted[part], output, use_reentrant=False)
    return total


def _summed(hidden: Tensor, labels: Tensor, output: Output) -> Tensor:
    return cross_entropy(output(hidden).float(), labels, ignore_index=IGNORE, reduction="sum")

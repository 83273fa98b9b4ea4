"""Next-token loss from hidden states: all logits never exist at once.

`linear_cross_entropy` takes the fused operation where the output is a plain matrix (tied to the embeddings or not, of any
float dtype, trained or frozen), and otherwise, with adapters, quantized or sharded outputs, calls the output a chunk at a time
and makes the chunk again in the backward pass. Under tensor parallelism the output has to be called (its weight is sharded),
which the second way does.

Letters: T positions (flattened), D dim, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from herd.data.encode import IGNORE
from herd.kernels.nll import linear_nll
from herd.parallel.loss import nll_sum

__all__ = ["CHUNK_BYTES", "chunk_for", "linear_cross_entropy", "next_token_loss"]

Output = Callable[[Tensor], Tensor]
"""Hidden states [T, D] -> logits [T, V], for example `Llama.output`."""

CHUNK_BYTES = 64 << 20
"""float32 logits of a chunk on a CPU when nobody says how many positions it has."""
CHUNK_BYTES_GPU = 512 << 20
"""The same on a GPU, where short products waste the machine."""
SMALLEST_CHUNK = 256
"""Below this many rows a product reads the matrix more than it multiplies."""


def chunk_for(vocab_size: int, device: torch.device) -> int:
    """Positions of a chunk when none are asked for: CHUNK_BYTES of float32 logits, at least SMALLEST_CHUNK positions."""
    budget = CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_GPU
    return max(SMALLEST_CHUNK, budget // (4 * vocab_size))


def linear_cross_entropy(hidden: Tensor, labels: Tensor, output: Output, chunk: int | None = None) -> Tensor:
    """Sum over learned positions of -log p(label), in float32 nats. hidden [..., D], labels [...] (already shifted).

    `chunk` bounds the logits held at once, in positions; None chooses (`chunk_for`). Positions whose label is IGNORE are not even
    multiplied. The sum, not the mean, is returned, so that batches with unequal numbers of learned positions can be accumulated
    exactly. With the fused operation gradients are made together with the loss, and one backward pass is all it allows.
    """
    flat, wanted = hidden.flatten(0, -2), labels.flatten()
    weight = _plain_matrix(output)
    if weight is None:
        return next_token_loss(hidden, labels, output, chunk or SMALLEST_CHUNK)
    size = chunk_for(len(weight), weight.device) if chunk is None else chunk
    return _LinearNll.apply(flat, weight, wanted, size)


def next_token_loss(hidden: Tensor, labels: Tensor, output: Output, chunk: int | None = None) -> Tensor:
    """The same for any `output`, by autograd: whole without `chunk`, which is the definition.

    With `chunk`, logits are made for that many positions at a time and made again in the backward pass: memory falls from
    T*V to chunk*V for one more output projection.
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
    logits = output(hidden)
    if isinstance(logits, DTensor):
        return nll_sum(logits, labels, IGNORE)
    return cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


def _plain_matrix(output: Output) -> Tensor | None:
    """The weight of an output that is one matrix product and nothing else."""
    if not isinstance(output, nn.Linear) or output.bias is not None or not getattr(output, "plain", True):
        return None
    hooked = output._forward_hooks or output._forward_pre_hooks or output._backward_hooks
    if hooked or type(output.weight) not in (nn.Parameter, Tensor):
        return None
    made = getattr(output, "effective_weight", None)  # rounded, in quantization-aware training
    return output.weight if made is None else made()


class _LinearNll(torch.autograd.Function):
    """`linear_nll` as autograd sees it: the gradients are there already, and are only scaled."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        total, by_hidden, by_weight = linear_nll(
            hidden, weight, labels, IGNORE, chunk, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        )
        ctx.save_for_backward(by_hidden, by_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        by_hidden, by_weight = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        if torch.compiler.is_compiling():
            return by_hidden * grad if for_hidden else None, by_weight * grad if for_weight else None, None, None
        # In place: the gradient of a large output would otherwise exist twice. A second pass is refused by autograd.
        return by_hidden.mul_(grad) if for_hidden else None, by_weight.mul_(grad) if for_weight else None, None, None

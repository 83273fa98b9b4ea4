"""bf16 models: as close to their fp32 twin as transformers is, and close to transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from herd.model.llama import Llama
from tests.build import TINY, build, tokens
from tests.parity.oracles import hf_logits
from tests.parity.test_transformers import oracle

Measured = Callable[[str, str, float], None]

BF16_BOUND = 0.03
"""Root mean square difference over the standard deviation of the logits. bf16 keeps 8 bits: one rounding is 2^-9, about
0.001 rms, and some 20 to 60 of them (independent, so adding as squares) lie between token and logit: 0.005 to 0.01.
Two implementations differ by both their errors. The bound leaves a factor of two."""
NO_WORSE = 1.25
"""Our distance from fp32 over transformers' distance: the same roundings at the same places, up to chance."""

TABLE = "bf16 logits, rms difference / std"


def per_token(a: Tensor, b: Tensor) -> Tensor:
    """Relative rms difference of each token's logits, sorted."""
    return ((a - b).pow(2).mean(-1).sqrt() / b.std()).flatten().sort().values


@pytest.mark.parametrize("name", TINY)
def test_bf16_logits(name: str, measured: Measured) -> None:
    """With experts, the last decile of tokens is left out.

    A token whose two best router logits are closer than a rounding goes to another expert, in any implementation: such a
    token's logits are different, not imprecise. Without experts every token counts.
    """
    half = build(name).to(torch.bfloat16)
    wide = Llama(half.config).eval()
    wide.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    ids = tokens(half.config, 60, batch=4)
    with torch.no_grad():
        ours, truth = half(ids), wide(ids)
    assert ours.dtype == torch.bfloat16
    theirs = hf_logits(oracle(half), ids).float()
    kept = int(0.9 * ids.numel()) if half.config.moe else ids.numel()
    apart, our_error, their_error = (
        float(per_token(a, b)[:kept].pow(2).mean().sqrt())
        for a, b in ((ours.float(), theirs), (ours.float(), truth), (theirs, truth))
    )
    measured(TABLE, f"{name}, herd to transformers", apart)
    measured(TABLE, f"{name}, herd to fp32", our_error)
    measured(TABLE, f"{name}, transformers to fp32", their_error)
    assert apart <= BF16_BOUND
    assert our_error <= NO_WORSE * their_error

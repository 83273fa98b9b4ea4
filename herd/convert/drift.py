"""What the two checkpoints answer: logits at every position of fixed prompts, and the tokens each would choose.

Everything is float32 and streamed (`herd.convert.stream`), so equal numbers and equal configs give equal bits. Where B's types
are lower, B must still be exactly what encoding made of A: its logits are held against those of A's config with the encoded
weights, bit for bit, and how far they have drifted from A's own is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from herd.checkpoint.fill import FLOATS
from herd.checkpoint.store import TensorStore
from herd.checkpoint.vocabulary import MissingTokenizer
from herd.convert.report import Check, TensorResult
from herd.convert.stream import Tick, Weights, greedy, logits, of_store
from herd.convert.weights import tensor_bytes, weights_of
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["BIG", "FEW", "GREEDY", "check_logits", "greedy_count", "readings"]

GREEDY = 16
FEW = 4
BIG = 1 << 30
"""Bytes of weights from which on only FEW greedy tokens are compared: every one reads all of A once more."""

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time there was a small llama who lived on a hill. One day",
    "1 2 3 5 8 13 21 34",
)
LONGEST = 64
"""Tokens of a prompt; those without a tokenizer are this long, so that short chunks of attention are crossed."""


def greedy_count(store: TensorStore, asked: int | None = None) -> int:
    """How many greedy tokens are compared: `asked`, or GREEDY, or FEW for a big model."""
    if asked is not None:
        return asked
    return GREEDY if tensor_bytes(store) <= BIG else FEW


def readings(count: int) -> int:
    """How often A's weights are read for `count` greedy tokens; B's are read once or twice."""
    return count + 1


def check_logits(
    a: TensorStore, b: TensorStore, tensors: Sequence[TensorResult], tokenizer: Tokenizer, count: int, tick: Tick
) -> Check:
    """The logits check, after `tensors` were compared. Failed when a tensor does not lie in its bound, too."""
    trouble = _cannot(a, b, tensors)
    if trouble is not None:
        return Check("logits", False, (trouble,))
    prompts = _prompts(a, tokenizer, count)
    weights_a, weights_b = of_store(a, tick=tick), of_store(b, tick=tick)
    chosen = greedy(weights_a, prompts, count) if count else [[] for _ in prompts]
    full = [prompt + made for prompt, made in zip(prompts, chosen, strict=True)]
    of_a, of_b = logits(weights_a, full), logits(weights_b, full)
    drift = _drift(of_a, of_b, prompts, count)
    states = {t.status for t in tensors}
    lines, passed = [drift.line(len(prompts), count)], True
    if not all(bool(x.isfinite().all()) for x in of_b):
        lines.append("some logits of B are not finite numbers")
    if "failed" in states:
        lines.insert(0, "tensors differ, so the logits are not expected to agree; against A:")
        passed = drift.bitwise
    elif states <= {"exact"}:
        lines.insert(0, "bitwise equal" if drift.bitwise else "NOT bitwise equal, though the tensors are exact")
        passed = drift.bitwise
    elif "within" in states:
        lines.insert(0, "B was encoded by another program, inside the bounds; against A:")
    else:
        expected = logits(_encoded_a(a, b, tensors, tick), full)
        passed = all(_same_bits(x, y) for x, y in zip(expected, of_b, strict=True))
        told = "B is bit for bit what encoding makes of A; against A itself:"
        lines.insert(0, told if passed else "NOT what encoding makes of A")
    return Check("logits", passed, tuple(lines), drift.figures())


@dataclass(frozen=True)
class _Drift:
    """How far B's logits are from A's."""

    bitwise: bool
    positions: int
    agree: int
    largest: float
    kl: float
    greedy: int
    """Leading greedy tokens that B would choose as A does, over all prompts."""

    def line(self, prompts: int, count: int) -> str:
        """One sentence."""
        tokens = prompts * count
        same = f"{self.greedy} of {tokens} greedy tokens the same, counted up to the first difference of each prompt"
        greedy = f"; all {tokens} greedy tokens the same" if self.greedy == tokens else f"; {same}"
        return (
            f"{self.positions} positions of {prompts} prompts: largest difference {self.largest:.3g}, mean KL {self.kl:.3g} "
            f"nats, same choice at {self.agree} of {self.positions}{greedy if count else ''}"
        )

    def figures(self) -> dict[str, float | int | bool]:
        """For JSON."""
        return {
            "bitwise": self.bitwise,
            "positions": self.positions,
            "argmax_agree": self.agree,
            "max_abs_difference": self.largest,
            "mean_kl_nats": self.kl,
            "greedy_agree": self.greedy,
        }


def _drift(of_a: Sequence[Tensor], of_b: Sequence[Tensor], prompts: Sequence[Sequence[int]], count: int) -> _Drift:
    agree = positions = leading = 0
    largest = total = 0.0
    for x, y, prompt in zip(of_a, of_b, prompts, strict=True):
        chosen_a, chosen_b = x.argmax(-1), y.argmax(-1)
        agree += int((chosen_a == chosen_b).sum())
        positions += len(x)
        difference = float((x - y).abs().max())
        largest = difference if math.isnan(difference) else max(largest, difference)
        p, q = log_softmax(x.double(), -1), log_softmax(y.double(), -1)
        total += float((p.exp() * (p - q)).sum())
        same = (chosen_a == chosen_b)[len(prompt) - 1 : len(prompt) - 1 + count].long()
        leading += int(same.cumprod(0).sum())
    bitwise = all(_same_bits(x, y) for x, y in zip(of_a, of_b, strict=True))
    return _Drift(bitwise, positions, agree, largest, max(total / positions, 0.0), leading)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


def _cannot(a: TensorStore, b: TensorStore, tensors: Sequence[TensorResult]) -> str | None:
    """Why logits cannot be compared."""
    held_a, held_b = weights_of(a), weights_of(b)
    if held_a.keys() != held_b.keys():
        return "not computed: the two do not hold the same tensors"
    for t in tensors:
        if t.name in held_a and (a.info(held_a[t.name]).shape != b.info(held_b[t.name]).shape):
            return f"not computed: {t.name} has another shape in B"
        if any(s.info(h[t.name]).dtype not in FLOATS for s, h in ((a, held_a), (b, held_b)) if t.name in h):
            return f"not computed: {t.name} is stored in a type without meaning"
    if len(a.config.layers) != len(b.config.layers) or a.config.vocab_size != b.config.vocab_size:
        return "not computed: the configs are of different models"
    return None


def _prompts(a: TensorStore, tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Fixed prompts that leave room for `count` tokens; ids drawn by rule where there is no tokenizer."""
    config = a.config
    room = max(1, min(LONGEST, config.max_seq_len - count))
    if isinstance(tokenizer, MissingTokenizer):
        draws = torch.Generator().manual_seed(0)
        return [torch.randint(config.vocab_size, (room,), generator=draws).tolist() for _ in range(2)]
    found = [tokenizer.encode(text, bos=True)[:room] for text in TEXTS]
    long = tokenizer.encode("\n".join(TEXTS), bos=True)[:room]
    return [[id for id in ids if id < config.vocab_size] for ids in (*found, long)]


def _encoded_a(a: TensorStore, b: TensorStore, tensors: Sequence[TensorResult], tick: Tick) -> Weights:
    """A's config with A's weights as B's types hold them: the tensors were found to be just that, so they are read from B
    instead of being encoded again."""
    from_a, from_b = of_store(a, tick=tick), of_store(b, tick=tick)
    exact = {t.name for t in tensors if t.status == "exact"}

    def put(name: str, out: Tensor) -> None:
        (from_a if name in exact else from_b).put(name, out)

    return Weights(replace(a.config, tie_embeddings=b.config.tie_embeddings), put)

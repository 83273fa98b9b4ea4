"""Held-out bits per byte: a language-model score that does not depend on the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from herd.model.llama import Llama

__all__ = ["bits_per_byte"]


@torch.no_grad()
def bits_per_byte(model: Llama, documents: Sequence[tuple[Sequence[int], int]], bos: int, length: int) -> float:
    """Bits per UTF-8 byte over `documents`, each (ids of the text, bytes of the text).

    A document longer than `length` positions is read in windows that do not see each other, each after `bos`: a figure on the
    high side, and the same for every model. The end-of-text token is not counted.
    """
    nats, size = 0.0, 0
    for ids, n_bytes in documents:
        size += n_bytes
        for start in range(0, len(ids), length):
            window: Tensor = torch.tensor([bos, *ids[start : start + length]])
            with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
                logits = model(window[None, :-1])[0]
            nats += float(cross_entropy(logits.float(), window[1:], reduction="sum"))
    return nats / math.log(2) / size

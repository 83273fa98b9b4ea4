"""Where a number that is not finite came from: looked for only when there is one, and before anything was changed by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from herd.adapters.apply import trained
from herd.train.moment import not_finite

__all__ = ["culprit"]

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def culprit(model: nn.Module, again: Callable[[], Tensor] | None) -> tuple[str, str]:
    """(module or weight, what is wrong with it), the first in the order of computing.

    `again` computes the losses of the step once more, and gives their sum; it is called without gradients (None: it cannot be
    asked, and only weights and gradients are looked at). The gradients of the step are still in place.
    """
    bad = not_finite({name: weight.detach() for name, weight in model.named_parameters()})
    if bad is not None:
        return _plain(bad.split(" ")[0]), f"the weight {_plain(bad)} is not finite"
    forward = None if again is None else _first_output(model, again)
    if forward is not None:
        return forward
    gradients = {name: _local(weight.grad) for name, weight in trained(model).items() if weight.grad is not None}
    # Gradients are made from the output to the embedding, so the last bad one in the order of computing is the first made.
    for name, gradient in reversed(_computing_order(model, gradients)):
        wrong = int((~gradient.isfinite()).sum())
        if wrong:
            return _plain(name), f"the gradient of {_plain(name)} is not finite ({wrong} of {gradient.numel()} values)"
    return (
        "the gradients",
        "the norm of all gradients is not finite, though each of them is: they are too large together",
    )


def _first_output(model: nn.Module, again: Callable[[], Tensor]) -> tuple[str, str] | None:
    """The first module whose result is not finite, though all it was given is; else the objective when the loss is not."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, given: Any, result: Any) -> None:
            if not found and not _fine(result) and all(_fine(part) for part in given):
                found.append(name)

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        # A compiled block would not call hooks that come after it was compiled.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            loss = again()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return _plain(found[0]), f"the output of {_plain(found[0])} is not finite, though its input is"
    return None if _fine(loss) else ("the loss", "the loss is not finite, though everything that the model gave is")


def _computing_order(model: nn.Module, gradients: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """As in the model, but a tied embedding counts as the output: both uses add to one gradient."""
    tied = "output.weight" not in dict(model.named_parameters())
    named = list(gradients.items())
    return sorted(named, key=lambda item: tied and item[0].endswith("tok_embeddings.weight"))


def _fine(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_fine(part) for part in value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(_local(value).isfinite().all())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name)

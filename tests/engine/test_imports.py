"""What a start brings in: one process, looked at after each stage."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

STAGES: dict[str, tuple[str, set[str]]] = {
    "planning": ("import herd.engine.request, herd.engine.blocks, herd.engine.scheduler", {"torch"}),
    # A process on a CPU pays for no GPU and no compiler.
    "an engine": ("import herd.engine.engine", {"herd.engine.cuda", "herd.engine.graphs", "sympy", "triton"}),
    # torch's compiler and sympy are a second and 80 MB of every start.
    "a command": (
        "import herd.engine.llm, herd.checkpoint.load, herd.cli.run",
        {"torch._dynamo", "sympy", "triton"},
    ),
    "the first attention": (
        "import torch, herd.kernels.paged as p\n"
        "q, k, spans = torch.zeros(1, 2, 16), torch.zeros(1, 4, 1, 16), torch.tensor([[0, 1, 0, 0]])\n"
        "p.paged_attention(q, k, k, spans, torch.zeros(1, 1, dtype=torch.int32), None)",
        {"torch._dynamo"},
    ),
    "experts, forward and backward": (
        "import torch, herd.kernels.grouped as g\n"
        "x, w = torch.ones(3, 4, requires_grad=True), torch.ones(2, 5, 4, requires_grad=True)\n"
        "g.grouped_linear(x, w, torch.tensor([1, 2])).sum().backward()\n"
        "assert x.grad is not None and w.grad is not None",
        {"torch._dynamo"},
    ),
}
"""Stage -> what happens in it, and what the process has not imported then."""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """The names of all modules after each stage."""
    code = "".join(f"{code}\nfound[{name!r}] = [*sys.modules]\n" for name, (code, _) in STAGES.items())
    code = f"import json, sys\nfound = {{}}\n{code}print(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_imported_that_is_not_needed(stage: str, imported: dict[str, list[str]]) -> None:
    assert "herd.engine.scheduler" in imported[stage]
    assert not STAGES[stage][1] & set(imported[stage])

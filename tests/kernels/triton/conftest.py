"""Every kernel is tested twice: interpreted on a CPU, and compiled on a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run."""
    pytest.importorskip("triton", reason="triton is for Linux")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "cpu":
        if not interpreted:
            pytest.skip("kernels are compiled in this run: select 'not gpu' for the interpreter")
    else:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if interpreted:
            pytest.skip("TRITON_INTERPRET is set: run with -m gpu")
    return request.param

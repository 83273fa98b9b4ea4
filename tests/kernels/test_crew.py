"""The crew of threads (csrc/crew.h): a thread that is away holds nobody up, and every item is written once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from herd.kernels import native
from tests.build import TINY, build, tokens
from tests.kernels.native import Paged, offered, packed

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_nobody_waits_for_a_thread_that_sleeps(tmp_path: Path) -> None:
    """Two of three threads sleep 0.3 s, one with an item in its hands: the third is through 40 phases before they wake up."""
    program = tmp_path / "crew"
    assert COMPILER is not None
    command = [COMPILER, "-std=c++20", "-O2", "-Wall", "-Wextra", "-pthread", f"-I{SOURCES}", str(HERE / "crew.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    for _ in range(3):  # a machine that is busy itself may have been away
        ran = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=60)
        assert ran.returncode == 0, ran.stdout
        took, away = map(int, ran.stdout.split())
        if took < away:
            return
    raise AssertionError(f"{took / 1e6:.0f} ms, as long as the others slept")


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "bf16"])
def test_the_same_bits_on_any_number_of_threads(kind: str) -> None:
    """More threads than cores, so that items change hands; rows of the matrix end within a panel."""
    offered()
    torch.manual_seed(0)
    matrix = torch.randn(1000, 512) * 0.02
    weight = native.plain(matrix.bfloat16()) if kind == "bf16" else packed(kind)(matrix)
    before = torch.get_num_threads()
    try:
        for rows in (1, 17, 250):
            x = torch.randn(rows, 512)
            torch.set_num_threads(1)
            alone = native.matmul(weight, x)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                for _ in range(5):
                    assert torch.equal(native.matmul(weight, x), alone), (rows, threads)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
@pytest.mark.parametrize("name", TINY)
def test_whole_steps_on_any_number_of_threads(name: str) -> None:
    """Layers with and without experts, a prompt and single rows."""
    offered()
    model = build(name)
    x = model.embed(tokens(model.config, 40)[0])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            torch.manual_seed(0)  # the same places in the cache
            paged = Paged(model)
            found.append(
                torch.cat(
                    [
                        paged.step([(0, 0, x[:37])])[0],
                        *(paged.step([(0, at, x[at : at + 1])])[0] for at in range(37, 40)),
                    ]
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)

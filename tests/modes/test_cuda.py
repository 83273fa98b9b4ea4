"""The GPU's runtime equals the model's own forward, for every generation: here on a CPU, its recordings on a tape, and on a GPU
where there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from herd.engine import cuda
from herd.engine.cuda_runner import CudaRunner
from herd.model.llama import Llama
from tests.build import TINY, build, fill, tiny
from tests.engine.tape import Tape
from tests.modes.pairs import pairs
from tests.modes.test_modes import LENGTH, MODES_BOUND, TABLE
from tests.modes.test_paged import HALF_BOUND, INT8_BOUND, Rounded, run, texts, whole

Measured = Callable[[str, str, float], None]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GPU_BOUND = 1e-4
"""Another device's float32 kernels, against a forward on the CPU."""


def fresh(name: str) -> Llama:
    """A model of its own: its weights are moved."""
    return fill(Llama(tiny(name))).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TINY)
def test_any_mix_equals_the_full_forward(name: str, device: str, measured: Measured) -> None:
    model = fresh(name).to(device)
    seen = run(name, whole(name), model=model, runner=CudaRunner(model, graphs=False), seed=8, device=device)
    measured(TABLE, f"{name}, GPU runtime on {device}", seen.worst)
    assert seen.worst <= (MODES_BOUND if device == "cpu" else GPU_BOUND)
    assert seen.mixed
    assert seen.cached
    assert seen.drafted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TINY)
def test_recorded_steps_equal_the_full_forward(name: str, device: str, measured: Measured) -> None:
    """Without drafts, so that steps of single rows are frequent; few blocks, so that they move."""
    model, tape = fresh(name).to(device), Tape()
    runner = CudaRunner(model, max_seqs=4, max_len=LENGTH + 4, capture=tape if device == "cpu" else None)
    seen = run(
        name, whole(name), model=model, runner=runner, seed=9, drafts=False, scratch=True, late=True, device=device
    )
    measured(TABLE, f"{name}, recorded GPU steps on {device}", seen.worst)
    assert seen.worst <= (MODES_BOUND if device == "cpu" else GPU_BOUND)
    if device == "cpu":
        assert tape.replays > 3 * tape.made


@pytest.mark.parametrize(("name", "kv"), pairs(TINY, [torch.float32, torch.int8]))
def test_calls_of_the_kernels(name: str, kv: torch.dtype, monkeypatch: pytest.MonkeyPatch, measured: Measured) -> None:
    """What a GPU with Triton runs, with the plain definitions of its kernels in their place: arguments and layouts are right."""
    monkeypatch.setattr(cuda, "kernels_for", lambda x: True)
    model = fresh(name)
    with torch.no_grad():
        see = [Rounded()] * model.config.n_layers if kv == torch.int8 else None
        expected = [build(name)(torch.tensor([ids]), None, see)[0] for ids in texts(name)]
    seen = run(name, expected, model=model, runner=CudaRunner(model), seed=10, dtype=kv)
    measured(TABLE, f"{name}, GPU runtime through its kernels' definitions, {kv}", seen.worst)
    assert seen.worst <= (2 * INT8_BOUND if kv == torch.int8 else MODES_BOUND)  # two flips now and then


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "dtype"), pairs(["llama-2", "llama-3.2", "llama-guard-4"], [torch.bfloat16, torch.float16])
)
def test_half_precision(name: str, device: str, dtype: torch.dtype, measured: Measured) -> None:
    model = fresh(name).to(device, dtype)
    runner = CudaRunner(model, max_seqs=4, max_len=LENGTH + 4, capture=Tape() if device == "cpu" else None)
    seen = run(
        name, whole(name, dtype), model=model, runner=runner, dtype=dtype, device=device, scratch=True, late=True
    )
    measured(f"{dtype} logits against the full forward, max abs difference", f"{name}, GPU runtime", seen.worst)
    assert seen.worst <= HALF_BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TINY)
def test_int8_cache(name: str, device: str, measured: Measured) -> None:
    model, twin = fresh(name).to(device), build(name)
    with torch.no_grad():
        expected = [twin(torch.tensor([ids]), None, [Rounded()] * twin.config.n_layers)[0] for ids in texts(name)]
    runner = CudaRunner(model, max_seqs=4, max_len=LENGTH + 4, capture=Tape() if device == "cpu" else None)
    seen = run(
        name,
        expected,
        model=model,
        runner=runner,
        dtype=torch.int8,
        device=device,
        drafts=False,
        scratch=True,
        late=True,
    )
    measured(TABLE, f"{name}, GPU runtime on {device}, int8 keys", seen.worst)
    assert seen.worst <= INT8_BOUND


def test_weights_are_moved_not_copied() -> None:
    """The model's parameters are views of the fused storage; a second runtime makes no other one; changes are seen."""
    model, twin = fresh("llama-3"), build("llama-3")
    CudaRunner(model)
    attention = model.layers[0].attention
    storage = attention.wq.weight.untyped_storage()
    assert storage.data_ptr() == attention.wv.weight.untyped_storage().data_ptr()
    assert storage.nbytes() == sum(w.weight.nbytes for w in (attention.wq, attention.wk, attention.wv))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    runner = CudaRunner(model)
    assert attention.wq.weight.untyped_storage().data_ptr() == storage.data_ptr()
    fill(model, seed=3)
    assert not runner.runtime.stale
    other = fill(Llama(tiny("llama-3")), seed=3).eval()
    with torch.no_grad():
        expected = [other(torch.tensor([ids]))[0] for ids in texts("llama-3")]
    assert run("llama-3", expected, model=model, runner=runner).worst <= MODES_BOUND
    attention.wk.weight = torch.nn.Parameter(attention.wk.weight.clone())
    assert runner.runtime.stale
    runner.refresh()
    assert not runner.runtime.stale

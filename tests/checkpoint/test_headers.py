"""Opening a checkpoint and describing every tensor needs no torch; shapes without data are those that torch would give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.checkpoint.open import open_store
from herd.checkpoint.outline import Outline
from tests.build import build
from tests.checkpoint.folders import save_bin, write_hf, write_meta
from tests.checkpoint.gguf_files import GGML, WIDE, transformers_model, write_gguf, write_noise

ASK = """
import sys
from herd.checkpoint.open import open_store
for path in sys.argv[1:]:
    store = open_store(path)
    infos = [store.info(name) for name in store.names()]
    assert infos and store.config.dim and store.metadata() and store.generation is not None, path
    print(len(infos), sum(info.nbytes for info in infos), infos[0].stored, store.kind)
assert "torch" not in sys.modules, sorted(name for name in sys.modules if name.startswith("herd"))
"""


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    """Every kind of file, several ranks with copied heads, tied outputs stored twice, the rope table and blocks."""
    tied, scout = build("llama-3.2"), build("llama-4-scout")
    write_hf(tmp_path / "hf", tied)
    write_hf(tmp_path / "hf4", scout, "200KB")
    (tmp_path / "bin").mkdir()
    save_bin(tmp_path / "bin", build("llama-2"), shards=2)
    write_meta(tmp_path / "meta", tied)
    write_meta(tmp_path / "meta2", build("llama-3"), 2)
    write_meta(tmp_path / "meta4", scout)
    write_gguf(tmp_path / "a.gguf", transformers_model(tied.config))
    write_gguf(tmp_path / "b.gguf", transformers_model(scout.config))
    write_noise(tmp_path / "c.gguf", WIDE, GGML.Q4_K)
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    asked = [sys.executable, "-W", "ignore", "-c", ASK, *paths]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        store = open_store(path)
        infos = [store.info(name) for name in store.names()]
        tensor = store.read(next(iter(store.names())))
        assert line == f"{len(infos)} {sum(info.nbytes for info in infos)} {infos[0].stored} {store.kind}"
        assert (tuple(tensor.shape), tensor.dtype) == (infos[0].shape, infos[0].dtype)


SIZES = st.lists(st.integers(0, 6), max_size=4).map(tuple)
CALLS = st.one_of(
    st.tuples(
        st.just("unflatten"), st.integers(-5, 5), st.lists(st.sampled_from([-1, 0, 1, 2, 3]), min_size=1, max_size=3)
    ),
    st.tuples(st.just("flatten"), st.integers(-5, 5), st.integers(-5, 5)),
    st.tuples(st.just("transpose"), st.integers(-5, 5), st.integers(-5, 5)),
    st.tuples(st.just("narrow"), st.integers(-5, 5), st.integers(0, 6), st.integers(0, 6)),
)


@settings(max_examples=200, deadline=None)
@given(SIZES, CALLS)
def test_an_outline_is_the_shape_of_a_tensor(shape: tuple[int, ...], call: tuple) -> None:
    name, *arguments = call
    if name == "unflatten" and arguments[1].count(-1) > 1:
        return
    if not shape:  # torch lets some dimensions of a single number be named; no weight is one
        return
    errors = (RuntimeError, IndexError)
    try:
        wanted = tuple(getattr(torch.empty(shape, device="meta"), name)(*arguments).shape)
    except errors:
        with pytest.raises(errors):
            getattr(Outline(shape), name)(*arguments)
    else:
        assert getattr(Outline(shape), name)(*arguments).shape == wanted


def test_an_outline_cannot_be_larger_than_memory() -> None:
    with pytest.raises(OverflowError):
        Outline((1 << 40, 1 << 40))

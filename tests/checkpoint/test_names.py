"""The name table: every parameter of every released model, exactly once in every column, there and back."""

from __future__ import annotations

import pytest
import torch

from herd.checkpoint.layout import Fused, Interleave, Stack, Transpose
from herd.checkpoint.names import COLUMNS, ROWS, Cell, Column, Home, homes, ignored, join, shapes, shards, sources
from herd.errors import CheckpointError
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.model.presets import RELEASES
from tests.build import TINY, build, tiny

RUNNABLE = {release.id: release.config for release in RELEASES if release.config is not None}
KINDS: dict[object, str] = {}
for _release in sorted(RELEASES, key=lambda r: r.config.n_layers if r.config is not None else 0):
    if (_config := _release.config) is not None:
        _shared = _config.n_kv_heads < _config.n_heads
        KINDS.setdefault((_release.generation, _shared, _config.tie_embeddings, _config.moe is None), _release.id)
"""The model with the fewest layers of every generation and kind: the others differ in sizes."""


def columns(config: ModelConfig) -> tuple[Column, ...]:
    """The columns that can hold a model: Llama 4's layers exist in its own columns only."""
    return ("meta4", "hf4", "gguf") if config.temper is not None or config.moe else ("meta", "hf", "gguf")


@pytest.mark.parametrize(
    "release", [pytest.param(id, marks=[] if id in KINDS.values() else pytest.mark.slow) for id in RUNNABLE]
)
def test_every_parameter_is_named_once_in_every_column(release: str) -> None:
    config = RUNNABLE[release]
    assert config is not None
    with torch.device("meta"):
        model = Llama(config)
    parameters = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert shapes(config) == parameters
    assert list(shards(config)) == list(parameters)
    for column in columns(config):
        placed = homes(config, column)
        assert list(placed) == list(parameters)
        spots = [(home.name, home.cell.fused.index if home.cell.fused else 0) for home in placed.values()]
        assert len(set(spots)) == len(spots)
        assert not any(ignored(column, home.name) for home in placed.values())
        for name, group in sources(config, column).items():
            assert all(home.name == name for home in group)
            fused = group[0].cell.fused
            assert len(group) == (1 if fused is None else len(fused.shares))
            outline = join(group, [torch.empty(parameters[home.canonical], device="meta") for home in group], config)
            for home in group:
                assert home.read_shape(tuple(outline.shape), config) == parameters[home.canonical]


@pytest.mark.parametrize("name", TINY)
def test_reading_undoes_writing(name: str) -> None:
    model = build(name)
    state = model.state_dict()
    for column in columns(model.config):
        for group in sources(model.config, column).values():
            foreign = join(group, [state[home.canonical] for home in group], model.config)
            for home in group:
                assert torch.equal(home.read(foreign, model.config), state[home.canonical])


@pytest.mark.parametrize(
    "name", [name for name in TINY if tiny(name).n_heads % 2 == 0 and tiny(name).n_kv_heads % 2 == 0]
)
def test_cutting_along_the_shard_dimension(name: str) -> None:
    """Each rank's piece, written and read alone, joins with the others to the whole."""
    config, state = tiny(name), build(name).state_dict()
    for home in homes(config, columns(config)[0]).values():
        whole, dim = state[home.canonical], home.shard
        assert dim == shards(config)[home.canonical]
        pieces = [whole] if dim is None else list(whole.chunk(2, dim))
        part = Home(home.canonical, home.name, Cell(home.name, home.cell.steps), dim)  # alone, not fused with others
        back = [part.read(part.write(piece, config), config) for piece in pieces]
        assert torch.equal(back[0] if dim is None else torch.cat(back, dim), whole)


def test_experts_have_no_place_in_dense_formats() -> None:
    for column in ("meta", "hf"):
        with pytest.raises(CheckpointError, match="experts"):
            homes(tiny("llama-4-scout"), column)


def test_interleave_is_the_pairing_of_the_reference() -> None:
    """Row 2j of a head is half-split row j, row 2j + 1 is row j + d/2."""
    config = tiny("llama-3")
    rows = torch.arange(config.n_heads * config.head_dim)[:, None]
    half_split = Interleave("n_heads").write(rows, config)[:, 0]
    d = config.head_dim
    for head in range(config.n_heads):
        for j in range(d // 2):
            assert half_split[head * d + j] == head * d + 2 * j
            assert half_split[head * d + d // 2 + j] == head * d + 2 * j + 1
    assert torch.equal(Interleave("n_heads").read(half_split[:, None], config), rows)


def test_steps_are_views() -> None:
    """Nothing but the re-pairing costs memory."""
    config = tiny("llama-4-scout")
    whole = torch.randn(4 * 80, 96)
    assert Stack().read(whole, config).data_ptr() == whole.data_ptr()
    assert Transpose().read(whole, config).data_ptr() == whole.data_ptr()
    assert Fused(axis=-1, index=0, shares=(1, 1)).cut(whole, config).data_ptr() == whole.data_ptr()


def test_shapes_that_cannot_be_cut() -> None:
    config = tiny("llama-4-scout")
    with pytest.raises(CheckpointError, match="proportions 5:1:1"):
        Fused(axis=0, index=1, shares=("n_heads", "n_kv_heads", "n_kv_heads")).cut(torch.zeros(13, 2), config)
    home = homes(config, "meta4")["layers.0.feed_forward.experts.w1"]
    for shape in ((7, 3), (3,), (), (0, 1 << 62, 1 << 62)):
        with pytest.raises(CheckpointError):
            home.read_shape(shape, config)


def test_ignored_names() -> None:
    ignorable: dict[Column, tuple[str, ...]] = {
        "meta": ("rope.freqs",),
        "meta4": ("layers.3.attention.wqkv._extra_state", "layers.0.feed_forward.running_gate_stats_3E", "rope.freqs"),
        "hf": ("model.layers.31.self_attn.rotary_emb.inv_freq",),
        "gguf": ("rope_freqs.weight",),
    }
    for column, names in ignorable.items():
        assert all(ignored(column, name) for name in names)
    for column in COLUMNS:
        assert not ignored(column, "model.layers.0.self_attn.q_proj.bias")
        assert not ignored(column, "lm_head.weight")


def test_rows_are_unique() -> None:
    assert len({(row.name, row.when) for row in ROWS}) == len(ROWS)

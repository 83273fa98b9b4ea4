"""params.json: reads back as the same config, gives Meta's own classes the same numbers, and holds no key that they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from llama_models.llama3.args import ModelArgs as Args3
from llama_models.llama4.args import ModelArgs as Args4

from herd.checkpoint.meta_config import read_params
from herd.checkpoint.write.hf_config import is_dense
from herd.checkpoint.write.meta_params import params_json
from herd.errors import ConfigError
from herd.model.config import ModelConfig, MoEConfig, hidden_dim_of, irope
from herd.model.presets import RELEASES
from tests.build import TINY, tiny
from tests.checkpoint.write.test_hf_config import ODD

RELEASED = {r.id: r.config for r in RELEASES if r.config is not None}
MORE: dict[str, ModelConfig] = {
    "experts wider than dense layers": replace(tiny("llama-4-maverick"), moe=MoEConfig(n_experts=2, hidden_dim=300)),
    "experts as wide": replace(tiny("llama-4-maverick"), moe=MoEConfig(n_experts=2, hidden_dim=192)),
    "experts a third as wide": replace(tiny("llama-4-maverick"), moe=MoEConfig(n_experts=2, hidden_dim=65)),
    "prime widths": replace(tiny("llama-4-maverick"), hidden_dim=193, moe=MoEConfig(n_experts=2, hidden_dim=31)),
    "llama 4 without experts": replace(tiny("llama-guard-4"), hidden_dim=97),
    "chunks everywhere": replace(tiny("llama-3"), layers=irope(2, nope=(), chunk=5, qk_norm=False, temper=False)),
}
ALL = RELEASED | TINY | ODD | MORE


def read(data: dict[str, Any], c: ModelConfig) -> ModelConfig:
    return read_params(data, "params.json", fused=not is_dense(c), rows=c.vocab_size, output=not c.tie_embeddings)


@pytest.mark.parametrize("name", ALL)
def test_reads_back(name: str) -> None:
    c = ALL[name]
    data = json.loads(json.dumps(params_json(c).data))
    assert read(data, c) == c


@pytest.mark.parametrize("name", ALL)
def test_metas_classes(name: str) -> None:
    """Meta's generation.py passes max_seq_len and max_batch_size beside the file's keys."""
    c = ALL[name]
    params = params_json(c)
    meta = (Args3 if is_dense(c) else Args4)(max_seq_len=128, max_batch_size=1, **params.data)
    same = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps"}
    assert {key: getattr(meta, key) for key in same} == {key: getattr(c, key) for key in same}
    assert meta.use_scaled_rope == (c.rope_scaling is not None)
    width = hidden_dim_of(c.dim, multiple_of=meta.multiple_of, ffn_dim_multiplier=meta.ffn_dim_multiplier)
    assert width == c.hidden_dim
    if not is_dense(c) and c.moe and "moe" not in params.only_herd:
        moe = meta.moe_args
        hidden = int(meta.ffn_dim_multiplier * int(2 * int(meta.ffn_exp * c.dim) / 3))  # moe.py
        hidden = int(hidden / (moe.capacity_factor + 1)) if moe.auto_scale_F else hidden
        assert hidden + -hidden % meta.multiple_of == c.moe.hidden_dim
        assert (moe.num_experts, moe.top_k) == (c.moe.n_experts, c.moe.top_k)


@pytest.mark.parametrize("name", RELEASED)
def test_releases_need_nothing_of_herds(name: str) -> None:
    """But for the context, which Meta's files never say, every release is said in Meta's own keys."""
    params = params_json(RELEASED[name])
    assert params.only_herd == ()
    assert set(params.data.get("herd", ())) <= {"max_seq_len"}
    if RELEASED[name].vocab_size < 100_000:  # the dataclass of Llama 1 and 2 (and Code Llama's rope_theta)
        known = {
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "vocab_size",
            "multiple_of",
            "ffn_dim_multiplier",
            "norm_eps",
        }
        assert set(params.data) - {"herd"} <= known | {"rope_theta"}
        assert "herd" not in params.data
        assert ("rope_theta" in params.data) == (RELEASED[name].rope_theta != 10_000)


def test_what_only_herd_reads_is_named() -> None:
    assert "layers" in params_json(ODD["irregular llama 4"]).only_herd
    assert params_json(ODD["odd scaling"]).only_herd == ("rope_scaling", "rope_scaling_factor", "rope_high_freq_factor")
    assert params_json(ODD["wide heads"]).only_herd == ("head_dim",)
    assert params_json(MORE["experts wider than dense layers"]).only_herd == ("moe",)
    assert params_json(tiny("llama-3.1")).only_herd == ()


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"hidden_dim": -1}, r"herd\.hidden_dim is -1: expected a positive integer"),
        ({"hidden_dim": 1 << 40}, "hidden_dim is 1099511627776: no Llama is larger"),
        ({"expert_hidden_dim": 5}, r"herd\.expert_hidden_dim is given, but this model has no experts"),
        ({"layers": [["rope", None, False]]}, r"herd\.layers has 1 entries for 2 layers"),
        ({"layers": [["rope", None, 1], ["rope", None, False]]}, "moe is 1: expected True or False"),
        ({"layers": 7}, "layers is 7"),
        ({"wool": 7}, "has the unknown entry 'wool'"),
        ([], "herd is .*expected an object"),
    ],
)
def test_damaged_facts(own: Any, why: str) -> None:
    data = params_json(tiny("llama-3")).data | {"herd": own}
    with pytest.raises(ConfigError, match=why):
        read(data, tiny("llama-3"))


def test_deep_nesting() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ConfigError, match="nested too deeply"):
        read(params_json(tiny("llama-3")).data | {"herd": {"layers": deep}}, tiny("llama-3"))

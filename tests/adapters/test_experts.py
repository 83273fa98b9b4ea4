"""LoRA on routed experts: PEFT's logits and losses, its files there and back in both of its layouts, and refusals by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu

from herd.adapters.apply import LoraConfig, adapter_of, apply_adapter, apply_lora, trained
from herd.adapters.experts import LowRankExperts, fused
from herd.adapters.lora import Factors, LoraAdapter
from herd.checkpoint.peft import read_peft, write_peft
from herd.errors import CheckpointError, ConfigError
from herd.model.llama import Llama
from herd.model.moe import Experts
from herd.quant.apply import dequantize, quantize
from tests.adapters.steps import losses
from tests.adapters.test_apply import frozen, train, write
from tests.build import build, tiny, tokens
from tests.checkpoint.folders import oracle
from tests.checkpoint.test_adapters import saved_by_peft, with_adapter

pytestmark = [
    # PEFT asks transformers under a name that is going away; nothing in herd can change it.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # It holds patterns against names of modules alone when it warns, and uses those of parameters all the same.
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]

LOGITS = 1e-5
"""Largest difference of float32 logits of order one, computed in another order."""
LOSSES = 1e-4
"""Of a loss of about 6 nats after 20 steps of AdamW, whose first steps make signs of gradients that are nearly zero."""
GRADIENTS = 1e-5
"""Of the largest number: float32 sums in another order."""

GATE_UP, DOWN = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"
SETTINGS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": [GATE_UP, DOWN]},
    "gate and up": {"target_parameters": [GATE_UP], "use_rslora": True},
    "down": {"target_parameters": ["experts.down_proj"]},
    "beside modules": {
        "target_parameters": [GATE_UP, DOWN],
        "target_modules": ["q_proj", "o_proj", "shared_expert.up_proj"],
        "alpha_pattern": {"experts.gate_up_proj": 3},
        "rank_pattern": {r"layers\.1\.feed_forward\.experts\.down_proj": 2, "q_proj": 3},
    },
    "one of each": {"target_parameters": [f"model.layers.0.{GATE_UP}", f"model.layers.1.{DOWN}"]},
    "a matrix as a parameter": {
        "target_parameters": ["self_attn.q_proj.weight", DOWN],
        "alpha_pattern": {r"q_proj\.weight": 3, "q_proj": 100},
    },
}
MODELS = ["llama-4-scout", "llama-4-maverick"]
"""Experts in every layer, and in every second one."""


def by_peft(folder: Path, model: Llama, **settings: Any) -> Any:
    return saved_by_peft(folder, model, **{"target_modules": []} | settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [(MODELS[0], settings) for settings in SETTINGS] + [(MODELS[1], s) for s in SETTINGS if s != "one of each"],
)  # layer 0 of the second has no experts
def test_what_peft_saved_has_the_same_logits_and_goes_back(name: str, settings: str, tmp_path: Path) -> None:
    model = build(name)
    ids = tokens(model.config, 24)
    theirs = by_peft(tmp_path / "theirs", model, **SETTINGS[settings])
    with torch.no_grad():
        expected, plain = theirs(input_ids=ids).logits, model(ids)
    adapter = read_peft(tmp_path / "theirs", model.config)
    apply_adapter(model, adapter)
    with torch.no_grad():
        assert (model(ids) - expected).abs().max() <= LOGITS
        assert (with_adapter(build(name), adapter)(ids) - expected).abs().max() <= LOGITS
    assert (plain - expected).abs().max() > 100 * LOGITS, "the adapter does something"
    ours = write(adapter_of(model), tmp_path / "ours", model)
    back = peft.PeftModel.from_pretrained(oracle(build(name)), ours).eval()
    with torch.no_grad():
        assert (back(input_ids=ids).logits - expected).abs().max() <= LOGITS
    one, other = (load_file(side / "adapter_model.safetensors") for side in (tmp_path / "theirs", ours))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("targets", [("experts",), ("experts.w13", "wq"), ("experts.w2",)], ids="+".join)
def test_what_herd_trained_is_opened_by_peft(targets: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("llama-4-scout")
    ids = tokens(model.config, 24)
    plain = model(ids).detach()
    apply_lora(model, LoraConfig(4, 8.0, targets=targets))
    assert (model(ids) - plain).abs().max() <= LOGITS, "training starts from the base"
    train(model, 3)
    folder = write(adapter_of(model.eval()), tmp_path / "ours", model)
    theirs = peft.PeftModel.from_pretrained(oracle(build("llama-4-scout")), folder).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert (model(ids) - expected).abs().max() <= LOGITS
    assert (plain - expected).abs().max() > 100 * LOGITS


def test_the_layout_before_0_19_1_is_the_same_change(tmp_path: Path) -> None:
    """A had the inputs then: lora_B A is what it was, read along the other dimension of the parameter."""
    model = build("llama-4-scout")
    by_peft(tmp_path, model, target_parameters=[GATE_UP, DOWN])
    expected = read_peft(tmp_path, model.config)
    _turn(tmp_path / "adapter_model.safetensors", model.config.moe.n_experts)  # type: ignore[union-attr]
    found = read_peft(tmp_path, model.config)
    for name, pair in expected.factors.items():
        assert torch.equal(found.factors[name].a, pair.a)
        assert torch.equal(found.factors[name].b, pair.b)


def _turn(file: Path, experts: int) -> None:
    """Exchange the two sides of every change in PEFT's file, by its own description."""
    state, turned = load_file(file), {}
    for name in [n for n in state if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        rank = len(state[name]) // experts
        a = torch.stack([state[name][e * rank : (e + 1) * rank] for e in range(experts)])  # [E, r, x]
        b = torch.stack([state[other][:, e::experts] for e in range(experts)])  # [E, y, r]
        turned[name] = torch.cat([one.T for one in b]).contiguous()
        turned[other] = torch.stack([one.T for one in a], -1).flatten(1).contiguous()
    save_file(turned, file)


def test_square_experts_are_told_apart_by_the_version(tmp_path: Path) -> None:
    base = tiny("llama-4-scout")
    assert base.moe is not None
    config = replace(base, moe=replace(base.moe, hidden_dim=base.dim))
    model = build(config)
    ids = tokens(config, 24)
    theirs = by_peft(tmp_path, model, target_parameters=[DOWN])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert (with_adapter(build(config), read_peft(tmp_path, config))(ids) - expected).abs().max() <= LOGITS
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        _turn(tmp_path / "adapter_model.safetensors", base.moe.n_experts)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_version": "0.18.1"}))
        assert (with_adapter(build(config), read_peft(tmp_path, config))(ids) - expected).abs().max() <= LOGITS
    del settings["peft_version"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="no peft_version that tells"):
        read_peft(tmp_path, config)


def test_twenty_steps_lose_what_peft_loses(tmp_path: Path) -> None:
    model = build("llama-4-scout")
    theirs = by_peft(tmp_path, model, target_parameters=[GATE_UP, DOWN], target_modules=["q_proj"]).train()
    mine = apply_adapter(model, read_peft(tmp_path, model.config))
    model.train()
    expected = losses(lambda ids: theirs(input_ids=ids).logits, theirs.parameters(), model.config)
    found = losses(model, mine, model.config)
    assert max(abs(x - y) for x, y in zip(expected, found, strict=True)) <= LOSSES
    assert expected[0] != expected[1]


def pairs(experts: int = 3, dim: int = 16, width: int = 24, rank: int = 2) -> dict[str, Factors]:
    torch.manual_seed(0)
    return {
        "w13": Factors(torch.randn(experts, rank, dim), torch.randn(experts, 2 * width, rank), 4.0),
        "w2": Factors(torch.randn(experts, rank, width), torch.randn(experts, dim, rank), 4.0),
    }


def plain_twin(base: Experts, changes: dict[str, tuple[Tensor, Tensor]], x: Tensor, counts: list[int]) -> Tensor:
    """Expert after expert, with matrices that are changed as a whole."""
    out = []
    for e, rows in enumerate(x.split(counts)):
        w1, w2, w3 = (getattr(base, key)[e].to(x.dtype) for key in ("w1", "w2", "w3"))
        if "w13" in changes:
            a, b = changes["w13"]
            gate, up = (b[e] @ a[e] * 2).chunk(2)
            w1, w3 = w1 + gate, w3 + up
        if "w2" in changes:
            a, b = changes["w2"]
            w2 = w2 + b[e] @ a[e] * 2
        out.append((silu(rows @ w1.T) * (rows @ w3.T)) @ w2.T)
    return torch.cat(out)


@pytest.mark.parametrize("parts", [("w13", "w2"), ("w13",), ("w2",)], ids="+".join)
def test_outputs_and_gradients_are_those_of_the_plain_twin(parts: tuple[str, ...]) -> None:
    """One of the experts has no rows."""
    chosen = {part: pair for part, pair in pairs().items() if part in parts}
    base = Experts(16, 24, 3).requires_grad_(False)
    layer = LowRankExperts("layers.0.feed_forward.experts", base, chosen, dict.fromkeys(chosen, 2.0))
    x = torch.randn(7, 16, requires_grad=True)
    grad = torch.randn(7, 16)
    found = layer(x, torch.tensor([3, 0, 4]))
    own = torch.autograd.grad(found, [x, *layer.parameters(recurse=False)], grad)
    exact_x = x.detach().double().requires_grad_()
    exact = {p: tuple(t.double().requires_grad_() for t in (pair.a, pair.b)) for p, pair in chosen.items()}
    expected = plain_twin(base, exact, exact_x, [3, 0, 4])  # type: ignore[arg-type]
    flat = [tensor for part in chosen for tensor in exact[part]]
    wanted = torch.autograd.grad(expected, [exact_x, *flat], grad.double())
    for one, other in zip((expected, *wanted), (found, *own), strict=True):
        other = other.view_as(one)  # gate and up of b13 have a dimension of their own
        assert (one - other).abs().max() <= GRADIENTS * one.abs().max()


def test_routers_have_the_gradients_of_the_merged_model() -> None:
    torch.manual_seed(0)
    model = build("llama-4-scout")
    apply_lora(model, LoraConfig(4, targets=("experts",)))
    with torch.no_grad():
        for name, weight in trained(model).items():
            if ".b" in name:
                weight.normal_(std=0.05)
    merged = with_adapter(build("llama-4-scout"), adapter_of(model))
    ids = tokens(model.config, 24)
    gradients = []
    for one in (model, merged):
        for name, weight in one.named_parameters():
            weight.requires_grad_(name.endswith("router.weight"))
        one(ids).square().mean().backward()
        gradients.append([p.grad for n, p in one.named_parameters() if n.endswith("router.weight")])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert float(one.abs().max()) > 0
        assert (one - other).abs().max() <= 10 * GRADIENTS * other.abs().max()


@pytest.mark.parametrize("base", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16", "nf4", "int8"])
def test_the_trainer_teaches_experts_of_every_base(base: str) -> None:
    model = build("llama-4-scout")
    if base in ("nf4", "int8"):
        quantize(model, base)
    else:
        model.to(getattr(torch, base))
    before = frozen(model)
    torch.manual_seed(0)
    made = apply_lora(model, LoraConfig(4, 8.0, targets=("experts",)))
    assert {id(p) for p in trained(model).values()} == {id(p) for p in made}
    losses = train(model, 25)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    own = {id(p) for p in made}
    plain = [p.detach().clone() for p in model.parameters() if id(p) not in own]
    assert all(torch.equal(x, y) for x, y in zip(before, plain + frozen(model)[len(plain) + len(own) :], strict=True))


def test_gradients_through_quantized_experts_are_those_of_their_plain_twin() -> None:
    torch.manual_seed(0)
    model = build("llama-4-scout")
    quantize(model, "nf4")
    twin = dequantize(model)
    apply_lora(model, LoraConfig(4, targets=("experts",)))
    with torch.no_grad():
        for name, weight in trained(model).items():
            if ".b" in name:
                weight.normal_(std=0.05)
    apply_adapter(twin, adapter_of(model))
    ids = tokens(model.config, 16)
    for one in (model, twin):
        one(ids).square().mean().backward()
    for (name, x), y in zip(trained(model).items(), trained(twin).values(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gate_and_up_of_their_own_lie_side_by_side(tmp_path: Path) -> None:
    """What a GGUF file may hold: two factors that read x, two ranks, two scales, or one of the two alone."""
    model = build("llama-4-scout")
    config = model.config
    assert config.moe is not None
    torch.manual_seed(0)

    def pair(rank: int, alpha: float) -> Factors:
        a = torch.randn(config.moe.n_experts, rank, config.dim) * 0.1  # type: ignore[union-attr]
        return Factors(a, torch.randn(config.moe.n_experts, config.moe.hidden_dim, rank) * 0.1, alpha)  # type: ignore[union-attr]

    home = "layers.0.feed_forward.experts"
    other = "layers.1.feed_forward.experts"
    factors = {f"{home}.w1": pair(2, 8.0), f"{home}.w3": pair(3, 6.0), f"{other}.w3": pair(2, 8.0)}
    ids = tokens(config, 16)
    for rslora in (False, True):
        adapter = LoraAdapter(factors, 2, 8.0, rslora)
        assert fused(adapter, home)["w13"].rank == 5
        with torch.no_grad():
            expected = with_adapter(build("llama-4-scout"), adapter)(ids)
            tuned = build("llama-4-scout")
            apply_adapter(tuned, adapter)
            assert (tuned(ids) - expected).abs().max() <= LOGITS
            folder = write(adapter, tmp_path / f"ours {rslora}", model)
            theirs = peft.PeftModel.from_pretrained(oracle(model), folder).eval()
            assert (theirs(input_ids=ids).logits - expected).abs().max() <= LOGITS


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("llama-4-scout", {"targets": ("experts",), "use_dora": True}, "DoRA is not possible on routed experts"),
        ("llama-4-scout", {"targets": ("wq", "experts.w2"), "dropout": 0.1}, "dropout 0.1 is not possible on routed"),
        ("llama-4-scout", {"targets": ("experts.w1",)}, "choose experts.w13"),
        ("llama-4-scout", {"targets": ("layers.0.feed_forward.experts.w3",)}, "choose experts.w13"),
        ("llama-4-scout", {"targets": ("experts.gate_up_proj",)}, "no matrix .* choose some of .*experts.w13"),
        ("llama-4-maverick", {"targets": ("layers.0.feed_forward.experts",)}, "no matrix of this model"),
        ("llama-4-scout", {"targets": ("experts",), "rank": 80}, "not thin"),
        ("llama-3", {"targets": ("experts",)}, "this model has no routed experts"),
    ],
)
def test_refusals_change_nothing(name: str, settings: dict[str, Any], told: str) -> None:
    model = build(name)
    names = list(model.state_dict())
    with pytest.raises(ConfigError, match=told):
        apply_lora(model, LoraConfig(**{"rank": 4, **settings}))
    assert list(model.state_dict()) == names


def test_more_refusals(tmp_path: Path) -> None:
    model = build("llama-4-scout")
    apply_lora(model, LoraConfig(4, targets=("layers.1.feed_forward.experts.w2",)))
    assert set(trained(model)) == {"layers.1.feed_forward.experts.a2", "layers.1.feed_forward.experts.b2"}
    adapter = adapter_of(model)
    with pytest.raises(ConfigError, match="already"):
        apply_lora(model, LoraConfig(4))
    with pytest.raises(ConfigError, match=r"dropout 0\.5 is not possible"):
        apply_adapter(build("llama-4-scout"), adapter, dropout=0.5)
    with pytest.raises(CheckpointError, match="no such parameter"):
        apply_adapter(build("llama-3"), adapter)
    (name, pair), *_ = adapter.factors.items()
    with pytest.raises(CheckpointError, match="do not fit together"):
        LoraAdapter({name: replace(pair, b=pair.b[:2])}, 4, 8.0)
    with pytest.raises(CheckpointError, match="magnitude of shape"):
        LoraAdapter({name: replace(pair, magnitude=torch.ones(pair.b.shape[1]))}, 4, 8.0)


@pytest.mark.parametrize("damage", ["lost", "rows", "width", "twice", "rank"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    model = build("llama-4-scout")
    by_peft(tmp_path, model, target_parameters=[GATE_UP, DOWN])
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    first = "base_model.model.model.layers.0.feed_forward.experts."
    a, b = f"{first}lora_A.weight", f"{first}lora_B.weight"
    match damage:
        case "lost":
            del state[b]
        case "rows":
            state[a], state[b] = state[a][:-1].clone(), state[b][:, :-1].clone()
        case "width":
            state[a] = state[a][:, :-1].clone()
        case "twice":
            for word in ("A", "B"):
                state[f"{first}base_layer.lora_{word}.weight"] = state[f"{first}lora_{word}.weight"].clone()
        case _:
            half = len(state[a]) // 2
            state[a], state[b] = state[a][:half].clone(), state[b][:, :half].clone()
    save_file(state, file)
    told = {
        "lost": "has no lora_B", "rows": "fit neither of", "width": "fit neither of", "twice": "two pairs", "rank": "says 4",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=told[damage]):
        read_peft(tmp_path, model.config)


def test_dora_with_parameters_is_refused_when_it_is_read(tmp_path: Path) -> None:
    model = build("llama-4-scout")
    by_peft(tmp_path, model, target_parameters=[DOWN])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="no magnitude"):
        read_peft(tmp_path, model.config)


def test_writing_says_what_is_adapted(tmp_path: Path) -> None:
    model = build("llama-4-maverick")
    torch.manual_seed(0)
    apply_lora(model, LoraConfig(4, targets=("experts",)))
    folder = tmp_path / "ours"
    folder.mkdir()
    write_peft(adapter_of(model), folder, model.config, lambda _: None)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == [DOWN, GATE_UP]

"""LoRA, DoRA and QLoRA while they train: PEFT's logits and losses, files there and back, and refusals that change nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from herd.adapters.apply import LINEAR, LoraConfig, LowRankLinear, adapter_of, apply_adapter, apply_lora, trained
from herd.adapters.lora import Factors, LoraAdapter
from herd.checkpoint.peft import read_peft, write_peft
from herd.data.batch import Loader
from herd.data.encode import encode_text
from herd.data.pack import pack_stream
from herd.errors import CheckpointError, ConfigError
from herd.model.llama import Llama
from herd.quant.apply import dequantize, held, quantize
from herd.train.config import Budget, OptimConfig, ScheduleConfig, TrainConfig
from herd.train.objective import NextToken
from herd.train.trainer import Trainer
from herd.train.watch import Recorder
from tests.adapters.steps import losses
from tests.build import build, tokens
from tests.checkpoint.folders import oracle
from tests.checkpoint.test_adapters import SETTINGS, saved_by_peft

# PEFT asks transformers under a name that is going away; nothing in herd can change it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning"),
]

LOGITS = 1e-5
"""Largest difference of float32 logits of order one, computed in another order."""
LOSSES = 1e-4
"""Of a loss of about 6 nats after 20 steps of AdamW, whose first steps make signs of gradients that are nearly zero."""
QLORA = 0.35
"""Bytes of an NF4 base for each byte of the same in bfloat16, at most."""

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}
BASES = ("float32", "bfloat16", "nf4", "int8")
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(adapter: LoraAdapter, folder: Path, model: Llama) -> Path:
    folder.mkdir()
    write_peft(adapter, folder, model.config, lambda _: None)
    return folder


@pytest.mark.parametrize("settings", [s for s in SETTINGS if "whole" not in s])
def test_what_peft_saved_has_the_same_logits_in_training_and_goes_back(settings: str, tmp_path: Path) -> None:
    model = build("llama-3")
    ids = tokens(model.config, 24)
    theirs = saved_by_peft(tmp_path / "theirs", model, **SETTINGS[settings])
    adapter = read_peft(tmp_path / "theirs", model.config)
    made = apply_adapter(model, adapter)
    assert [p for p in model.parameters() if p.requires_grad] != []
    assert {id(p) for p in trained(model).values()} == {id(p) for p in made}
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    assert (model(ids) - expected).abs().max() <= LOGITS
    back = peft.PeftModel.from_pretrained(
        oracle(build("llama-3")), write(adapter_of(model), tmp_path / "ours", model)
    ).eval()
    with torch.no_grad():
        assert (back(input_ids=ids).logits - model(ids)).abs().max() <= LOGITS


@pytest.mark.parametrize(
    ("tied", "kind"),
    [
        (False, "lora"),
        (True, "dora"),
        (True, "rslora"),
        pytest.param(True, "lora", marks=pytest.mark.slow),
        pytest.param(False, "dora", marks=pytest.mark.slow),
        pytest.param(False, "rslora", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_lose_what_peft_loses(tied: bool, kind: str, tmp_path: Path) -> None:
    model = build("llama-3.2" if tied else "llama-3")
    settings = KINDS[kind] | {"target_modules": [*NAMES, "embed_tokens"] if tied else NAMES}
    theirs = saved_by_peft(tmp_path, model, **settings).train()
    with torch.no_grad():  # B is zero at the start of a training
        for name, weight in theirs.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                weight.zero_()
    adapter = read_peft(tmp_path, model.config)
    pairs = {n: Factors(p.a, torch.zeros_like(p.b), p.alpha, p.magnitude) for n, p in adapter.factors.items()}
    mine = apply_adapter(model, LoraAdapter(pairs, adapter.rank, adapter.alpha, adapter.rslora))
    model.train()
    expected = losses(lambda ids: theirs(input_ids=ids).logits, theirs.parameters(), model.config)
    found = losses(model, mine, model.config)
    assert max(abs(x - y) for x, y in zip(expected, found, strict=True)) <= LOSSES
    assert expected[0] != expected[1]


def test_dropout_falls_only_while_training_and_as_in_peft(tmp_path: Path) -> None:
    model = build("llama-3")
    ids = tokens(model.config, 24)
    theirs = saved_by_peft(tmp_path, model, target_modules=NAMES, use_dora=True, lora_dropout=0.3).train()
    apply_adapter(model, read_peft(tmp_path, model.config), dropout=0.3)
    with torch.no_grad():
        calm = model(ids)
        torch.manual_seed(0)
        shaken = model.train()(ids)
        torch.manual_seed(0)
        expected = theirs(input_ids=ids).logits
    assert (shaken - expected).abs().max() <= LOGITS
    assert (shaken - calm).abs().max() > 100 * LOGITS


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_the_base_itself(kind: str) -> None:
    model = build("llama-3.2")
    plain = model(tokens(model.config, 16))
    apply_lora(model, LoraConfig(4, 8.0, targets=(*LINEAR, "tok_embeddings"), **KINDS[kind]))
    assert (model(tokens(model.config, 16)) - plain).abs().max() <= LOGITS


def test_single_matrices_by_name_and_one_kind() -> None:
    model = build("llama-3")
    apply_lora(model, LoraConfig(2, targets=("layers.1.attention.wq", "output")))
    assert set(trained(model)) == {
        f"{home}.{part}" for home in ("layers.1.attention.wq", "output") for part in ("a", "b")
    }
    model = build("llama-4-scout")
    apply_lora(model, LoraConfig(2, targets=("w1",)))
    assert all("shared_expert" in name for name in trained(model))


def train(model: Llama, steps: int, rate: float = 2e-2) -> list[float]:
    """The losses of `steps` steps."""
    documents = [encode_text([3 + (i * d) % 200 for i in range(40)], bos=1, eos=2) for d in range(1, 12)]
    config = TrainConfig(
        budget=Budget(steps=steps),
        schedule=ScheduleConfig(warmup_steps=2, decay_fraction=0.0),
        optim=OptimConfig(lr=rate, weight_decay=0.0),
        log_every=1,
    )
    seen = Recorder()
    Trainer(model, NextToken(), Loader(pack_stream(documents, 32), 4, seed=1), config, watchers=[seen]).fit()
    return [report.loss for report in seen.steps]


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        *(("lora", base) for base in BASES),
        ("dora", "nf4"),
        *(pytest.param("dora", base, marks=pytest.mark.slow) for base in BASES if base != "nf4"),
    ],
)
def test_the_trainer_teaches_adapters_of_every_base(kind: str, base: str) -> None:
    model = build("llama-3")
    if base in ("nf4", "int8"):
        quantize(model, base)
    else:
        model.to(getattr(torch, base))
    before = frozen(model)
    torch.manual_seed(0)
    apply_lora(model, LoraConfig(4, 8.0, 0.1, use_dora=kind == "dora"))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    losses = train(model, 25)
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    assert all(torch.equal(x, y) for x, y in zip(before, frozen(model), strict=True))


def frozen(model: Llama) -> list[Tensor]:
    """What must not move: plain weights, and quantized ones as values."""
    own = {id(p) for p in trained(model).values()} if any(n.endswith(".a") for n in trained(model)) else set()
    plain = [p.detach().clone() for p in model.parameters() if id(p) not in own]
    quantized = [
        matrix.dequantize()
        for module in model.modules()
        if callable(getattr(module, "matrices", None))
        for matrix in module.matrices()  # pyright: ignore[reportCallIssue]
    ]
    return plain + quantized


def test_gradients_through_a_quantized_base_are_those_of_its_plain_twin() -> None:
    torch.manual_seed(0)
    model = build("llama-3")
    quantize(model, "nf4")
    twin = dequantize(model)
    torch.manual_seed(1)
    apply_lora(model, LoraConfig(4))
    apply_adapter(twin, adapter_of(model))
    ids = tokens(model.config, 16)
    for one in (model, twin):
        with torch.no_grad():
            for name, weight in trained(one).items():
                if name.endswith(".b"):
                    weight.copy_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
        one(ids).square().mean().backward()
    for (name, x), y in zip(trained(model).items(), trained(twin).values(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6, msg=name)


AT_ONCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Of the largest number: other sums, and roundings of results only."""


@pytest.mark.parametrize("first", [False, True], ids=["inside", "first"])
@pytest.mark.parametrize("dtype", AT_ONCE)
def test_the_sum_at_once_and_its_gradients_are_those_of_the_definition(dtype: torch.dtype, first: bool) -> None:
    """`first`: what nothing before it learns from."""
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=False, dtype=dtype).requires_grad_(False)
    layer = LowRankLinear("w", base, Factors(torch.randn(4, 24), torch.randn(40, 4), 8.0), 2.0, 0.0)
    layer.a.data, layer.b.data = layer.a.data.to(dtype), layer.b.data.to(dtype)
    x = torch.randn(2, 5, 24, dtype=dtype).requires_grad_(not first)
    grad = torch.randn(2, 5, 40, dtype=dtype)
    found = layer.at_once(x)
    assert found is not None

    exact = [t.detach().double().requires_grad_() for t in (x, layer.a, layer.b)]
    wanted = linear(exact[0], base.weight.double()) + linear(linear(exact[0], exact[1]), exact[2]) * 2
    start = 1 if first else 0
    gradients = torch.autograd.grad(wanted, exact[start:], grad.double())
    own = torch.autograd.grad(found, [x, layer.a, layer.b][start:], grad)
    for a, b in zip((wanted, *gradients), (found, *own), strict=True):
        assert (a - b).abs().max() <= AT_ONCE[dtype] * a.abs().max()


def test_what_is_not_summed_at_once() -> None:
    pair = Factors(torch.randn(4, 24), torch.randn(40, 4), 8.0)
    base = nn.Linear(24, 40, bias=False).requires_grad_(False)
    x = torch.randn(3, 24)
    assert LowRankLinear("w", base, pair, 2.0, 0.0).at_once(x) is not None
    assert LowRankLinear("w", base, pair, 2.0, 0.5).train().at_once(x) is None
    assert LowRankLinear("w", base, replace(pair, magnitude=torch.ones(40)), 2.0, 0.0).at_once(x) is None
    assert LowRankLinear("w", base.bfloat16(), pair, 2.0, 0.0).at_once(x.bfloat16()) is None
    assert LowRankLinear("w", nn.Linear(24, 40), pair, 2.0, 0.0).at_once(x) is None
    with torch.no_grad():
        assert LowRankLinear("w", base.float(), pair, 2.0, 0.0).at_once(x) is None


def test_an_nf4_base_takes_a_third_of_bfloat16(tmp_path: Path) -> None:
    """At the proportions of Llama 3.2 1B (a fifth of it tied embedding), the worst of the family."""
    from dataclasses import replace

    from tests.build import tiny

    config = replace(tiny("llama-3.2"), dim=256, hidden_dim=1024, n_heads=8, n_kv_heads=2, head_dim=32, vocab_size=2048)
    model = build(config)
    plain = 2 * sum(p.numel() for p in model.parameters())
    quantize(model, "nf4")
    sizes = held(model)
    assert {"NF4", "Q8_0"} <= sizes.keys()
    assert sum(sizes.values()) <= QLORA * plain


def test_going_on_from_a_saved_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = build("llama-3")
    apply_lora(first, LoraConfig(4, 8.0, use_dora=True))
    train(first, 5)
    folder = write(adapter_of(first, "a base"), tmp_path / "saved", first)
    second = build("llama-3")
    adapter = read_peft(folder, second.config)
    assert adapter.base == "a base"
    apply_adapter(second, adapter)
    ids = tokens(first.config, 16)
    assert torch.equal(first.eval()(ids), second(ids))
    assert all(torch.equal(x, y) for x, y in zip(trained(first).values(), trained(second).values(), strict=True))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "rank 0"), ({"rank": 2.5}, "rank 2.5"), ({"rank": 64}, "not thin"), ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"), ({"targets": ()}, "targets"), ({"targets": "wq"}, "targets"),
        ({"targets": ("q_proj",)}, "no matrix of this model is called 'q_proj'"), ({"targets": ("output",)}, "tied"),
        ({"targets": ("layers.9.attention.wq",)}, "no matrix"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named_and_change_nothing(settings: dict[str, Any], told: str) -> None:
    model = build("llama-3.2")
    names = list(model.state_dict())
    with pytest.raises(ConfigError, match=told):
        apply_lora(model, LoraConfig(**settings))
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_more_refusals() -> None:
    model = build("llama-3")
    with pytest.raises(ConfigError, match="no LoRA layers"):
        adapter_of(model)
    pair = Factors(torch.zeros(2, 8), torch.zeros(8, 2), 4.0)
    with pytest.raises(CheckpointError, match="changes a matrix of shape"):
        apply_adapter(model, LoraAdapter({"layers.0.attention.wq.weight": pair}, 2, 4.0))
    whole = LoraAdapter({}, 2, 4.0, whole={"norm.weight": torch.ones(64)})
    with pytest.raises((ConfigError, CheckpointError), match=r"norm\.weight"):
        apply_adapter(model, whole)
    apply_lora(model, LoraConfig(2))
    for again in (
        lambda: apply_lora(model, LoraConfig(2)),
        lambda: apply_adapter(model, adapter_of(copy.deepcopy(model))),
    ):
        with pytest.raises(ConfigError, match="already"):
            again()
    with pytest.raises(CheckpointError, match="no magnitude"):
        LoraAdapter(
            {"a.weight": Factors(torch.zeros(2, 8), torch.zeros(8, 2), 4.0, torch.ones(8)), "b.weight": pair}, 2, 4.0
        )
    with pytest.raises(CheckpointError, match="magnitude of shape"):
        LoraAdapter({"a.weight": Factors(torch.zeros(2, 8), torch.zeros(8, 2), 4.0, torch.ones(7))}, 2, 4.0)

import gguf
import pytest
import torch
from torch import nn

from herd.adapters.apply import LoraConfig, apply_lora
from herd.errors import ConfigError
from herd.model.config import LayerSpec, ModelConfig, MoEConfig, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.train.config import Budget, TrainConfig
from herd.train.losses import linear_cross_entropy, next_token_loss
from herd.train.prepare import prepare_model, unprepared
from herd.train.qat import prepare_qat, remove_qat, round_tokens, round_weight

SHAPE = {"dim": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32, "hidden_dim": 96, "vocab_size": 64}
TOKENS = torch.arange(24).reshape(2, 12)


def build(tied=True, experts=False):
    torch.manual_seed(0)
    layers = (LayerSpec(placement="rope", moe=True),) if experts else plain(2)
    moe = MoEConfig(n_experts=4, top_k=1, hidden_dim=64) if experts else None
    return init_weights(Llama(ModelConfig(**SHAPE, layers=layers, moe=moe, tie_embeddings=tied)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_weights_are_those_that_the_gguf_package_stores(kind):
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    number = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number)
    assert torch.equal(round_weight(weight, kind), torch.from_numpy(expected))


def test_the_integer_scheme_by_its_description():
    torch.manual_seed(0)
    weight = torch.randn(3, 64)
    found = round_weight(weight, "int4")
    for row in range(3):
        for start in (0, 32):
            group = weight[row, start : start + 32]
            scale = group.abs().max() / 7.5
            expected = torch.clamp(torch.round(group / scale), -8, 7) * scale
            torch.testing.assert_close(found[row, start : start + 32], expected)
    assert (round_weight(weight, "int8") - weight).abs().max() <= weight.abs().max() / 127.5
    x = torch.cat([torch.randn(5, 64), torch.rand(1, 64), torch.zeros(1, 64)])
    rounded = round_tokens(x)
    step = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / 255
    assert ((rounded - x).abs() <= 1.01 * step[:, None] + 1e-7).all()
    assert (rounded.unique(dim=-1).shape[-1]) <= 256
    assert torch.equal(rounded[-1], x[-1])


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "int8-int4"])
@pytest.mark.parametrize("experts", [False, True])
def test_trained_and_served_forms_agree(kind, experts):
    """Logits while training are those of a model whose weights were rounded beforehand."""
    model = build(experts=experts)
    names = set(model.state_dict())
    notes = prepare_qat(model, kind)
    assert all("tok_embeddings" in note or "output" in note for note in notes)
    served = build(experts=experts)
    with torch.no_grad():
        for name, weight in served.named_parameters():
            if weight.ndim < 2 or "router" in name:
                continue
            outer = name == "tok_embeddings.weight"
            # llama.cpp's rule: Q6_K for the output where its rows are blocks of 256, which 64 is not: then Q8_0.
            stored = ("int8" if outer else "int4") if kind == "int8-int4" else ("Q8_0" if outer else kind.upper())
            weight.copy_(round_weight(weight, stored))
    if kind == "int8-int4":
        for module in served.modules():
            if isinstance(module, nn.Linear) and module.out_features != 4:
                module.register_forward_pre_hook(lambda m, args: (round_tokens(args[0]),))
    expected = served(TOKENS)
    assert torch.equal(model(TOKENS), expected)
    assert set(model.state_dict()) == names
    remove_qat(model)
    assert torch.equal(model(TOKENS), build(experts=experts)(TOKENS))
    assert type(model.output) is nn.Linear


@pytest.mark.parametrize("kind", ["q4_0", "int8-int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_go_straight_through_and_the_loss_sees_the_rounding(kind, tied):
    model = build(tied)
    prepare_qat(model, kind)
    labels = (TOKENS + 1) % 64

    def run(loss):
        model.zero_grad()
        value = loss(model.hidden(model.embed(TOKENS)), labels, model.output)
        value.backward()
        return value.detach(), [p.grad.clone() for p in model.parameters()]

    (one, expected), (two, found) = run(next_token_loss), run(linear_cross_entropy)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    for a, b in zip(expected, found, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_it_learns_what_rounding_takes_away():
    """Steps towards the logits of the float model, taken with rounding, repair most of what rounding did."""
    model = build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and name.startswith("layers"):
                p.mul_(5)
    wanted = model(TOKENS).detach()
    prepare_qat(model, "q4_0")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (model(TOKENS) - wanted).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_with_bfloat16_and_checkpointing():
    model = build()
    prepare_qat(model, "q8_0")
    exact = model(TOKENS)
    prepare_model(model, TrainConfig(budget=Budget(steps=1), precision="bfloat16", checkpointing="full"))
    found = model(TOKENS)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()
    found.float().sum().backward()
    remove_qat(unprepared(model))
    assert type(model.tok_embeddings) is nn.Embedding


def half(size):
    return size // 2, size // 2


def test_parts_that_would_be_rounded_in_another_way_are_refused():
    """Blocks that are cut, and rows of what goes in of which a rank has a part; rows of weights may be shared."""
    model = build(experts=True)
    prepare_qat(model, "q8_0")
    layer = model.layers[0]
    for module, dims in ((layer.attention.wo, (0, 1)), (layer.feed_forward.experts, (0, 1))):
        for dim in dims:
            module.share(dim, half, None)
    with pytest.raises(ConfigError, match="24 values, is no whole number of Q8_0's blocks of 32"):
        layer.feed_forward.experts.share(1, lambda size: (24, 24), None)
    with pytest.raises(ConfigError, match="16 values, is no whole number of Q8_0's blocks of 32"):
        layer.attention.wo.share(1, lambda size: (16, 16), None)
    dynamic = build()
    prepare_qat(dynamic, "int8-int4")
    dynamic.layers[0].attention.wq.share(0, half, None)
    with pytest.raises(ConfigError, match=r"int8-int4 rounds whole rows .* use parallel.dp_shard, cp or pp"):
        dynamic.layers[0].attention.wo.share(1, half, None)


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ConfigError, match="not one of"):
        prepare_qat(build(), "q9_0")
    adapted = build()
    apply_lora(adapted, LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="plain"):
        prepare_qat(adapted, "q4_0")
    odd = Llama(ModelConfig(dim=40, n_heads=2, n_kv_heads=1, head_dim=20, hidden_dim=64, vocab_size=8, layers=plain(1)))
    with pytest.raises(ConfigError, match="groups of 32"):
        prepare_qat(odd, "int8-int4")
    assert type(odd.layers[0].attention.wq) is nn.Linear

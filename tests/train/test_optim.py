import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from herd.adapters.apply import LoraConfig, apply_lora, trained
from herd.errors import ConfigError
from herd.model.config import LayerSpec, ModelConfig, MoEConfig, plain
from herd.model.llama import Llama
from herd.train.config import OptimConfig
from herd.train.muon import Muon
from herd.train.optim import make_optimisers, set_rate

FUSED = 1e-6
"""torch's fused and plain AdamW differ in the order of three multiplications."""
CONFIG = ModelConfig(dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=32, layers=plain(2))
KINDS = ("adamw", "adamw8bit", "muon")


def held(optimisers):
    return [p for o in optimisers for group in o.param_groups for p in group["params"]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_optimised_once(tied, kind):
    config = ModelConfig(
        dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=32, layers=plain(2), tie_embeddings=tied
    )
    model = Llama(config)
    optimisers = make_optimisers(model, OptimConfig(kind=kind))
    every = held(optimisers)
    assert len(every) == len({id(p) for p in every}) == len(list(model.parameters()))
    assert all(p.ndim == 1 for o in optimisers for g in o.param_groups if g["weight_decay"] == 0 for p in g["params"])
    set_rate(optimisers, 0.5)
    assert all(group["lr"] == 0.5 * group["peak"] for o in optimisers for group in o.param_groups)


def test_embeddings_are_decayed_by_choice():
    model = Llama(CONFIG)
    (adamw,) = make_optimisers(model, OptimConfig(decay_embeddings=False))
    plain = {id(p) for g in adamw.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert {id(model.tok_embeddings.weight), id(model.output.weight), id(model.norm.weight)} <= plain
    assert id(model.layers[0].attention.wq.weight) not in plain


def test_muon_takes_matrices_and_experts_and_no_router_or_adapter():
    experts = ModelConfig(
        dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=32,
        layers=(LayerSpec(placement="rope", moe=True),), moe=MoEConfig(n_experts=4, top_k=1, hidden_dim=24),
    )  # fmt: skip
    model = Llama(experts)
    _, muon = make_optimisers(model, OptimConfig(kind="muon"))
    names = {n for n, p in model.named_parameters() if any(p is q for q in held([muon]))}
    assert "layers.0.feed_forward.experts.w1" in names
    assert "layers.0.feed_forward.shared_expert.w2.weight" in names
    assert not any("router" in n or "embeddings" in n or "output" in n or "norm" in n for n in names)
    tuned = Llama(CONFIG)
    apply_lora(tuned, LoraConfig(rank=2))
    optimisers = make_optimisers(tuned, OptimConfig(kind="muon"))
    assert not any(isinstance(o, Muon) for o in optimisers)
    assert {id(p) for p in held(optimisers)} == {id(p) for p in trained(tuned).values()}


def test_fused_adamw_is_torchs_adamw():
    torch.manual_seed(0)
    ours = Llama(CONFIG)
    theirs = Llama(CONFIG)
    theirs.load_state_dict(ours.state_dict())
    one = make_optimisers(ours, OptimConfig(lr=1e-2, weight_decay=0.1))
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    norms = [p for p in theirs.parameters() if p.ndim == 1]
    other = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False,
    )  # fmt: skip
    for _ in range(4):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one[0].step()
        other.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=FUSED, atol=FUSED)


@pytest.mark.parametrize("kind", KINDS)
def test_states_save_and_load_exactly(kind):
    def run(again: bool):
        torch.manual_seed(0)
        model = Llama(
            ModelConfig(dim=64, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=72, vocab_size=70, layers=plain(1))
        )
        config = OptimConfig(kind=kind)
        optimisers = make_optimisers(model, config)
        for step in range(4):
            if again and step == 2:
                file = io.BytesIO()
                torch.save([o.state_dict() for o in optimisers], file)
                file.seek(0)
                optimisers = make_optimisers(model, config)
                for optimiser, state in zip(optimisers, torch.load(file, weights_only=True), strict=True):
                    optimiser.load_state_dict(state)
            random = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=random)
            for optimiser in optimisers:
                optimiser.step()
        assert all(optimiser.state for optimiser in optimisers)
        return list(model.parameters())

    for p, q in zip(run(False), run(True), strict=True):
        assert torch.equal(p, q)


def test_weights_of_sixteen_bits_are_refused_where_updates_would_be_lost():
    model = Llama(CONFIG).to(torch.bfloat16)
    for kind in ("adamw", "muon"):
        with pytest.raises(ConfigError, match="adamw8bit"):
            make_optimisers(model, OptimConfig(kind=kind))
    assert make_optimisers(model, OptimConfig(kind="adamw8bit"))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="no parameter"):
        make_optimisers(Llama(CONFIG).requires_grad_(False), OptimConfig())


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_parameters_get_the_numbers_of_whole_ones(kind, mesh):
    torch.manual_seed(0)

    def model(sharded: bool):
        torch.manual_seed(0)
        made = nn.Module()
        made.layers = nn.ModuleList([nn.Module()])
        made.layers[0].wq = nn.Linear(512, 24, bias=False)
        made.norm = nn.RMSNorm(24)
        if sharded:
            for module in (made.layers[0].wq, made.norm):
                module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh, [Shard(0)]))
        return made

    one, two = model(False), model(True)
    plain, sharded = make_optimisers(one, OptimConfig(kind=kind)), make_optimisers(two, OptimConfig(kind=kind))
    for _ in range(3):
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        for optimiser in (*plain, *sharded):
            optimiser.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert isinstance(q.data, DTensor)
        torch.testing.assert_close(p.data, q.data.full_tensor(), rtol=1e-6, atol=1e-7)
    states = [v for o in sharded for s in o.state.values() for k, v in s.items() if k != "step"]
    assert all(isinstance(v, DTensor) for v in states)

"""`herd train lora` on routed experts: what is forecast, trained, gone on with, merged and served."""

from dataclasses import replace

import pytest
import torch

import herd
from herd.adapters.apply import apply_adapter
from herd.checkpoint.open import open_store
from herd.checkpoint.peft import read_peft
from herd.errors import ConfigError
from herd.train.forecast import forecast
from herd.train.run import run_recipe
from herd.train.start import adapt, start
from herd.train.watch import Recorder
from tests.train.test_recipes import MERGED, config, done, talks, written


@pytest.mark.parametrize("targets", ["[]", "[experts]", "[w2,experts.w13]", "[layers.1.feed_forward.experts.w2,wq]"])
def test_the_forecast_counts_experts(targets, tmp_path):
    made = config(
        tmp_path, "lora", f"model.source={written(tmp_path, 'llama-4-maverick')}", f"data.sources={talks(tmp_path)}",
        "method.rank=4", f"method.targets={targets}",
    )  # fmt: skip
    model = adapt(start(made, torch.device("cpu")).model, made.method, 0)
    assert forecast(made).trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("kind", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_adapters_of_experts_from_a_run_to_what_serves_them(kind, tmp_path):
    """Trained with the router's losses, stopped and gone on with, read back, merged beside it, and served by request."""
    folder = written(tmp_path, "llama-4-maverick", dim=128, hidden_dim=192, n_heads=4, n_kv_heads=2, head_dim=32)
    options = (
        f"model.source={folder}", f"data.sources={talks(tmp_path)}", f"method.kind={kind}", "method.rank=4",
        "method.targets=[experts,wq]", "train.optim.lr=1e-2", "train.router_aux=0.01", "train.router_z=0.001",
        "method.save_merged=true",
    )  # fmt: skip
    made = config(tmp_path, "lora", *options)
    recorder, first, rest = Recorder(), Recorder(), Recorder()
    done(replace(made, out=str(tmp_path / "straight")), watchers=[recorder])
    run_recipe(made, tell=lambda _: None, watchers=[first], until=2)
    done(made, watchers=[rest])
    assert [s.loss for s in (*first.steps, *rest.steps)] == [s.loss for s in recorder.steps]
    one, two = (read_peft(tmp_path / run / "adapter", open_store(folder).config) for run in ("straight", "run"))
    for name, pair in one.factors.items():
        assert torch.equal(pair.a, two.factors[name].a)
        assert torch.equal(pair.b, two.factors[name].b)
    assert sorted({name.rpartition(".")[2] for name in one.factors}) == ["w1", "w2", "w3", "weight"]
    assert all(bool(pair.b.any()) for pair in one.factors.values())
    model, merged = herd.load(folder, "float32")[0], herd.load(tmp_path / "run" / "model", "float32")[0]
    ids = torch.arange(5, 40)[None]
    plain = model(ids)
    apply_adapter(model, one)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids), model(ids), rtol=0, atol=MERGED)
        assert float((model(ids) - plain).abs().max()) > 100 * MERGED
    prompt = [5, 6, 7, 8]
    with herd.LLM(folder, dtype="float32", max_len=64, max_seqs=2) as llm:
        llm.load_adapter("tuned", tmp_path / "run" / "adapter")
        found = llm.generate([prompt], llm.params(max_tokens=4, temperature=0), adapter="tuned")[0].outputs[0].tokens
    expected = list(prompt)
    with torch.no_grad():
        for _ in found:
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(found) == expected[len(prompt) :]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method.kind=dora"], "DoRA is not possible on routed experts"),
        (["method.dropout=0.1"], "dropout 0.1 is not possible on routed experts"),
        (["method.targets=[experts.w3]"], "choose experts.w13"),
    ],
)
def test_what_experts_cannot_have_is_refused_before_the_first_step(overrides, told, tmp_path):
    folder, chats = written(tmp_path, "llama-4-maverick"), talks(tmp_path)
    common = [f"model.source={folder}", f"data.sources={chats}", "method.targets=[experts]"]
    with pytest.raises(ConfigError, match=told):
        done(config(tmp_path, "lora", *common, *overrides))

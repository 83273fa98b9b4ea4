import pytest
import torch

from herd.data.batch import Loader
from herd.data.encode import encode_text
from herd.data.pack import pack_stream
from herd.errors import CheckpointError
from herd.model.config import ModelConfig, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.train.config import Budget, OptimConfig, ScheduleConfig, TrainConfig
from herd.train.measure import bits_per_byte
from herd.train.trainer import Trainer

CONFIG = ModelConfig(
    dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=40, layers=plain(2), tie_embeddings=True
)


def rows():
    return pack_stream([encode_text([3 + (i * d) % 30 for i in range(20)], bos=1, eos=2) for d in range(1, 12)], 16)


def trainer(steps, path=None, log=None, accumulate=2):
    torch.manual_seed(0)
    model = init_weights(Llama(CONFIG))
    config = TrainConfig(
        budget=Budget(steps=steps),
        optim=OptimConfig(kind="muon", lr=3e-3),
        schedule=ScheduleConfig(warmup_steps=2, decay_fraction=0.0),
        accumulate=accumulate,
        log_every=5,
    )
    return Trainer(model, Loader(rows(), 4, seed=1), config, path=path, log=log or (lambda line: None))


def test_training_lowers_the_loss_and_reports():
    lines = []
    run = trainer(40, log=lines.append)
    run.run()
    assert run.history[-1]["loss"] < run.history[0]["loss"] - 0.5
    assert "tok/s" in lines[0]
    assert "eta" in lines[0]


def test_a_resumed_run_has_the_same_bytes(tmp_path):
    whole = trainer(10)
    whole.run()
    trainer(6, tmp_path / "run.pt").run()
    resumed = trainer(10, tmp_path / "run.pt")
    assert resumed.step == 6
    resumed.run()
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.tokens == whole.tokens


def test_accumulation_equals_a_larger_batch():
    small, large = trainer(1, accumulate=2), trainer(1, accumulate=1)
    large.loader.batch_rows = 8
    small.train_step()
    large.train_step()
    for a, b in zip(small.model.parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_the_next_phase_starts_counting_anew(tmp_path):
    trainer(3, tmp_path / "first.pt").run()
    second = trainer(5)
    second.adopt(tmp_path / "first.pt")
    assert (second.step, second.progress) == (0, 0)
    second.run()


def test_a_foreign_checkpoint_is_named(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt"):
        trainer(3, tmp_path / "other.pt")


def test_evaluation_is_called_at_the_end():
    run = trainer(2)
    run.evaluate = lambda model: {"mode": float(model.training)}
    assert run.run() == {"mode": 0.0}
    assert run.model.training


def test_packed_documents_do_not_see_each_other():
    run = trainer(1)
    tokens = torch.randint(3, 40, (1, 8))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    labels = torch.full((1, 8), -100)
    labels[0, 4:7] = tokens[0, 5:]
    loss = run._summed_loss(tokens, labels, positions)
    other = tokens.clone()
    other[0, :4] = 5
    torch.testing.assert_close(loss, run._summed_loss(other, labels, positions), rtol=0, atol=1e-5)


def test_bits_per_byte_of_a_uniform_model_is_the_size_of_its_vocabulary():
    model = Llama(CONFIG)
    with torch.no_grad():
        model.norm.weight.zero_()  # all logits are equal
    documents = [(list(range(3, 30)), 27), ([4, 5, 6], 3)]
    assert bits_per_byte(model, documents, bos=1, length=10) == pytest.approx(torch.log2(torch.tensor(40.0)).item())

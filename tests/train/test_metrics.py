"""The log and the speeds of a run."""

import json
from types import SimpleNamespace

import pytest
import torch

from herd.model.config import ModelConfig, MoEConfig, irope, plain
from herd.model.llama import Llama
from herd.planning.devices import DEVICES
from herd.train.config import Budget, TrainConfig
from herd.train.metrics import Board, Figures, JsonLines, read_log, tags
from herd.train.stop import SaveError
from herd.train.throughput import Peak, duration, peak_of, work_of
from herd.train.watch import Begin, StepReport

CONFIG = ModelConfig(dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=40, layers=plain(2))


def begin(step=0):
    return Begin(
        step=step, tokens=0, seconds=0.0, parameters=10, trained=10, config=TrainConfig(budget=Budget(steps=9)),
        out=None, resumed=None, world=1, threads=1,
    )  # fmt: skip


def step(number, loss=1.0):
    return StepReport(
        step=number, loss=loss, norm=0.5, rate=1e-3, tokens=100, supervised=80, seconds=0.5, all_tokens=100 * number,
        all_seconds=0.5 * number, progress=number / 9, memory_bytes=10**9, metrics={"router_z": 2.0},
    )  # fmt: skip


def figures(peak=1e9, world=1):
    return Figures(work_of(CONFIG, 8), None if peak is None else Peak(peak, "test"), world)


def test_work_counts_what_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = Llama(CONFIG)
    tokens = torch.randint(0, 40, (1, 8))
    with FlopCounterMode(display=False) as counted:
        model(tokens).sum().backward()
    # torch counts matrix products; what the first layer would give on to the embedding's input is not computed twice there.
    # The CPU's fused attention is not counted as matrix products by torch, so the countings are compared without it.
    products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert 8 * work_of(CONFIG, 8).weights == products


def test_attention_is_counted_causally_and_chunk_by_chunk():
    work = work_of(CONFIG, 9)
    seen = sum(range(1, 10)) / 9
    assert work.attention - work.weights == pytest.approx(3 * 2 * (4 * 2 * 8) * seen)
    four = ModelConfig(
        dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=40,
        layers=irope(2, nope=[1], chunk=4, moe_layers=[1], temper=False),
        moe=MoEConfig(n_experts=4, hidden_dim=24),
    )  # fmt: skip
    chunked = work_of(four, 10)
    local, whole = (2 * (1 + 2 + 3 + 4) + (1 + 2)) / 10, 5.5
    assert chunked.attention - chunked.weights == pytest.approx(3 * (4 * 2 * 8) * (local + whole))


def test_an_adapter_costs_two_thirds_and_itself():
    full, adapter = work_of(CONFIG, 8), work_of(CONFIG, 8, trained=100)
    assert adapter.weights == pytest.approx(full.weights * 2 / 3 + 600)
    assert adapter.attention - adapter.weights == pytest.approx(full.attention - full.weights)


def test_shares_of_the_peak_are_over_all_devices():
    one, two = figures().of(step(1)), figures(world=2).of(step(1))
    assert one["tokens_per_second"] == 200
    assert one["mfu"] == pytest.approx(200 * work_of(CONFIG, 8).weights / 1e9)
    assert two["mfu"] == pytest.approx(one["mfu"] / 2)
    assert one["mfu_attention"] > one["mfu"]
    assert figures(None).of(step(1))["mfu"] is None
    assert "train/mfu" not in tags(step(1), figures(None).of(step(1)))


def test_the_peak_of_a_processor_is_measured():
    peak = peak_of(torch.device("cpu"), torch.float32)
    assert peak is not None
    assert peak.flops > 1e9
    assert "measured" in peak.source


def test_the_peak_of_a_busy_processor_is_not_that_of_its_queue(monkeypatch):
    wall, spent, plain = [0.0], [0.0], torch.mm

    def waits(a, b):  # 0.02 s of work of each thread, and 0.1 s of waiting for others
        wall[0] += 0.12
        spent[0] += 0.02 * torch.get_num_threads()
        return plain(a, b)

    clocks = SimpleNamespace(perf_counter=lambda: wall[0], process_time=lambda: spent[0])
    monkeypatch.setattr("herd.train.throughput.time", clocks)
    monkeypatch.setattr(torch, "mm", waits)
    assert peak_of(torch.device("cpu"), torch.float32).flops == pytest.approx(2 * 1024**3 / 0.02)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"), ("NVIDIA L4", "l4"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA A100-PCIE-40GB", "a100-40gb"), ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA L40S", "l40s"), ("Tesla T4", "t4"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        # Others, with other peaks, whose names hold one that is known.
        ("NVIDIA L40", None), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA A10", None), ("NVIDIA GB200", None), ("", None),
    ],
)  # fmt: skip
def test_devices_are_known_by_what_drivers_call_them(said, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: said)
    peak = peak_of(torch.device("cuda"), torch.bfloat16)
    assert (peak and (peak.flops, peak.source)) == (name and (DEVICES[name].tflops * 1e12, f"{name}'s data sheet"))
    assert peak_of(torch.device("cuda"), torch.float32) is None


def test_a_log_that_cannot_be_written_ends_the_run_as_a_full_disk_does(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("")
    for watcher, path in (
        (JsonLines(tmp_path / "log.jsonl", figures()), "log.jsonl"),
        (Board(tmp_path / "tensorboard", figures()), "tensorboard"),
    ):
        with pytest.raises(
            SaveError, match=rf"{path}: cannot be written: .*last checkpoint is whole.*--resume auto"
        ) as error:
            watcher.on_begin(begin())
        assert error.value.exit_code == 3


def test_the_log_has_every_line_and_drops_what_is_done_again(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", figures())
    log.on_begin(begin())
    for number in range(1, 6):
        log.on_step(step(number, loss=float("nan") if number == 5 else number))
    log.on_evaluation(4, {"bits_per_byte": 1.5})
    log.on_text(4, "Hi", "Grüße\n")
    log.on_note("a note")
    log.on_end({})
    first = list(read_log(tmp_path / "log.jsonl"))
    assert [line["event"] for line in first] == ["begin", *["step"] * 5, "evaluation", "text", "note", "end"]
    assert first[1]["metrics"] == {"router_z": 2.0}
    assert first[5]["loss"] == "nan"
    json.loads((tmp_path / "log.jsonl").read_text().splitlines()[5], parse_constant=lambda name: pytest.fail(name))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "step", "st')  # killed while writing
    again = JsonLines(tmp_path / "log.jsonl", figures())
    again.on_begin(begin(step=3))
    again.on_step(step(4, loss=9.0))
    second = list(read_log(tmp_path / "log.jsonl"))
    assert [(line["event"], line["step"]) for line in second] == [
        ("begin", 0), ("step", 1), ("step", 2), ("step", 3), ("begin", 3), ("step", 4)
    ]  # fmt: skip
    assert second[-1]["loss"] == 9.0


def test_the_board_is_written_beside_it(tmp_path):
    board = Board(tmp_path / "tensorboard", figures())
    board.on_begin(begin())
    board.on_step(step(1))
    board.on_evaluation(1, {"bits_per_byte": 1.5})
    board.on_text(1, "Hi", "Hello")
    board.on_end({})
    content = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    for tag in (b"train/loss", b"train/grad_norm", b"train/router_z", b"eval/bits_per_byte", b"samples/Hi"):
        assert tag in content


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3000, "50 min"), (7260, "2 h 01 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said

"""The planner of training against published runs, its own bookkeeping, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml

from herd.cli.main import run
from herd.errors import ConfigError
from herd.model.config import ModelConfig
from herd.model.shapes import LLAMA_31_8B, LLAMA_31_70B, LLAMA_31_405B, LLAMA_32_3B, SCOUT
from herd.parallel.config import ParallelPart
from herd.planning.devices import DEVICES, GIB
from herd.planning.train import cluster_of, compute_optimal, plan_train
from herd.planning.train_layout import Cluster, Layout, Rates, estimate
from herd.train.overrides import load_config

TIME, MEMORY = 0.15, 0.10
"""What the issue asks for: within 15 % of published time and 10 % of published memory."""

# Meta's Grand Teton: H100 with 96 GB of HBM2e, limited to 500 W. The limit costs a sixth of an H100's arithmetic (fitted).
LIMITED = replace(DEVICES["h100"], memory=96 * GIB, bandwidth=2.4e12)
POWER = 0.84
MEGATRON = 1.12  # Transformer Engine's fused layers over compiled ones (fitted)
ASYNC = 0.2  # of tensor parallel exchanges that async TP hides (fitted)


def _titan(**rates: float) -> Cluster:
    own = Rates()
    limited = Rates(
        matrix=own.matrix * POWER, matrix_fp8=own.matrix_fp8 * POWER, attention=own.attention * POWER, **rates
    )
    return Cluster(device=LIMITED, rates=limited)


def _megatron() -> Cluster:
    own = Rates()
    faster = Rates(
        matrix=own.matrix * MEGATRON,
        matrix_fp8=own.matrix_fp8 * MEGATRON,
        attention=own.attention * MEGATRON,
        hidden_tp=ASYNC,
    )
    return Cluster(device=DEVICES["h100"], rates=faster)


def _layout(
    part: ParallelPart, rows: int, count: int, kind: str, fp8: bool = False, logits: float = 14, **more: object
) -> Layout:
    return Layout(
        part=part,
        length=more.pop("length", 8192),  # type: ignore[arg-type]
        rows=rows,
        microbatches=count,
        checkpointing=kind,  # type: ignore[arg-type]
        precision="float8" if fp8 else "bfloat16",
        logits=logits,
        **more,  # type: ignore[arg-type]
    )


def _stages(stages: int, **sizes: int) -> ParallelPart:
    return ParallelPart(stages=stages, schedule="interleaved", **sizes)  # type: ignore[arg-type]


def _meta(tflops: float, length: int) -> float:
    """Tokens/s of a GPU from TFLOP/s of a GPU, attention counted in full."""
    whole = estimate(LLAMA_31_405B, Layout(part=ParallelPart(), length=length), cluster_of("h100")).flops_full
    return tflops * 1e12 / whole


FSDP8, FSDP128 = ParallelPart(dp_shard=8), ParallelPart(dp_shard=128)
TWO = ParallelPart(dp_shard=32, tp=8)
THREE = {"dp_shard": 8, "tp": 8, "pp": 8}
# name, model, layout, cluster, tokens/s of a GPU, GiB. torchtitan benchmarks/ (2024-12, 2025-06), NVIDIA Megatron-Bridge 25.11,
# the Llama 3 paper's table 4, torchtune's README. Micro-batches of the 405B runs: torchtitan's default is one a stage. Global
# batches of Megatron-Bridge: 128, 128, 512 rows. Stages a rank that Meta does not tell: 7.
ROWS = [
    ("8B eager", LLAMA_31_8B, _layout(FSDP8, 2, 1, "selective"), _titan(traffic=2.6), 5762, 82.4),
    ("8B compile", LLAMA_31_8B, _layout(FSDP8, 2, 1, "selective"), _titan(), 6667, 77.0),
    ("8B float8", LLAMA_31_8B, _layout(FSDP8, 2, 1, "selective", True), _titan(), 8532, 76.8),
    ("8B eager, 128", LLAMA_31_8B, _layout(FSDP128, 2, 1, "selective"), _titan(traffic=2.6), 5605, 67.0),
    ("8B compile, 128", LLAMA_31_8B, _layout(FSDP128, 2, 1, "selective"), _titan(), 6514, 62.0),
    ("8B float8, 128", LLAMA_31_8B, _layout(FSDP128, 2, 1, "selective", True), _titan(), 8380, 61.8),
    (
        "8B float8, 32 H200",
        LLAMA_31_8B,
        _layout(ParallelPart(dp_shard=32), 2, 1, "selective", True, 5),
        cluster_of("h200"),
        10938,
        47.96,
    ),
    ("70B, 256", LLAMA_31_70B, _layout(TWO, 16, 1, "full"), _titan(), 597, None),
    ("70B, async TP", LLAMA_31_70B, _layout(TWO, 16, 1, "full"), _titan(hidden_tp=ASYNC), 652, None),
    ("70B float8", LLAMA_31_70B, _layout(TWO, 16, 1, "full", True), _titan(), 829, 71.9),
    ("70B float8, async TP", LLAMA_31_70B, _layout(TWO, 16, 1, "full", True), _titan(hidden_tp=ASYNC), 942, 67.6),
    (
        "405B 1F1B",
        LLAMA_31_405B,
        _layout(ParallelPart(**THREE), 4, 8, "full", True),
        _titan(hidden_tp=ASYNC),
        100,
        82.5,
    ),
    (
        "405B interleaved",
        LLAMA_31_405B,
        _layout(_stages(2, **THREE), 4, 8, "full", True),
        _titan(hidden_tp=ASYNC),
        128,
        72.7,
    ),
    ("Megatron 8B", LLAMA_31_8B, _layout(FSDP8, 1, 16, "none", True, 0), _megatron(), 14451, None),
    (
        "Megatron 70B",
        LLAMA_31_70B,
        _layout(_stages(5, dp_shard=2, tp=4, pp=8), 1, 64, "none", True, 0),
        _megatron(),
        1602,
        None,
    ),
    (
        "Megatron 405B",
        LLAMA_31_405B,
        _layout(_stages(8, dp_shard=8, tp=8, cp=2, pp=8), 1, 64, "none", True, 0),
        _megatron(),
        292,
        None,
    ),
    (
        "Meta 8,192",
        LLAMA_31_405B,
        _layout(_stages(7, dp_shard=64, tp=8, pp=16), 1, 32, "none"),
        cluster_of("h100"),
        _meta(430, 8192),
        None,
    ),
    (
        "Meta 16,384",
        LLAMA_31_405B,
        _layout(_stages(7, dp_shard=128, tp=8, pp=16), 1, 16, "none"),
        cluster_of("h100"),
        _meta(400, 8192),
        None,
    ),
    (
        "Meta 131,072 tokens",
        LLAMA_31_405B,
        _layout(_stages(7, dp_shard=8, cp=16, tp=8, pp=16), 1, 16, "none", length=131_072),
        cluster_of("h100"),
        _meta(380, 131_072),
        None,
    ),
    (
        "torchtune 3B, one A100",
        LLAMA_32_3B,
        _layout(ParallelPart(), 4, 1, "none", logits=0, length=4096),
        cluster_of("a100-80gb"),
        9174,
        None,
    ),
]


@pytest.mark.parametrize(("name", "config", "layout", "cluster", "tokens", "gib"), ROWS, ids=[row[0] for row in ROWS])
def test_published_runs(
    name: str, config: ModelConfig, layout: Layout, cluster: Cluster, tokens: float, gib: float | None
) -> None:
    found = estimate(config, layout, cluster)
    assert found.tokens_per_second == pytest.approx(tokens, rel=TIME)
    if gib is not None:
        assert found.memory.total / GIB == pytest.approx(gib, rel=MEMORY)


def test_compute_optimal_is_what_llama_3_says() -> None:
    parameters, tokens = compute_optimal(3.8e25)
    # The paper: 402B and 16.55T, by a fit whose printed digits are few.
    assert parameters == pytest.approx(402e9, rel=0.6)
    assert tokens == pytest.approx(16.55e12, rel=0.4)
    assert compute_optimal(1e22)[0] < parameters


def test_405b_on_16384_fits_and_takes_what_meta_took() -> None:
    plan = plan_train("405b", LLAMA_31_405B, cluster_of("h100"), 16_384, batch=2**24, tokens=15.6e12)
    best = plan.fits[0]
    assert best.memory.total <= 80 * GIB
    assert 0.3 < best.mfu < 0.5
    seconds = plan.seconds(best)
    assert seconds is not None
    assert 60 < seconds / 86400 < 110  # Meta: 30.84 million GPU hours, 78 days of 16,384
    assert plan.budget is not None
    assert plan.budget.ratio > 1
    speeds = [one.tokens_per_second for one in plan.fits]
    assert speeds == sorted(speeds, reverse=True)


def test_what_does_not_fit_is_said() -> None:
    plan = plan_train("70b", LLAMA_31_70B, cluster_of("h100"), 4)
    assert not plan.fits
    assert plan.nearest is not None
    assert plan.nearest.memory.states == pytest.approx(16 * 70.55e9 / 4, rel=0.01)


def test_more_of_anything_costs_what_it_should() -> None:
    base = Layout(part=ParallelPart(dp_shard=8), length=8192)
    cluster = cluster_of("h100")
    one = estimate(LLAMA_31_8B, base, cluster)
    assert estimate(LLAMA_31_8B, replace(base, rows=2), cluster).memory.activations == 2 * one.memory.activations
    assert (
        estimate(LLAMA_31_8B, replace(base, part=ParallelPart(dp_shard=16)), cluster).memory.states
        == one.memory.states / 2
    )
    full = estimate(LLAMA_31_8B, replace(base, checkpointing="full"), cluster)
    assert full.memory.activations < one.memory.activations / 10
    assert full.time.total > one.time.total
    assert one.flops_full > one.flops
    # torchtitan's and Megatron's counts of Llama 3.1 8B at 8,192 tokens
    assert one.flops == pytest.approx(51.5e9, rel=0.01)
    assert one.flops_full == pytest.approx(57.9e9, rel=0.01)
    pipe = ParallelPart(dp_shard=1, pp=8)
    assert Layout(part=pipe, length=8192, microbatches=8).bubble == pytest.approx(7 / 15)


def test_experts_count_what_a_token_passes_through() -> None:
    found = estimate(SCOUT, Layout(part=ParallelPart(dp_shard=64), length=8192), cluster_of("h100"))
    assert found.flops < 6.5 * 17.2e9
    assert found.memory.states == pytest.approx(16 * 107.77e9 / 64, rel=0.02)


@pytest.mark.parametrize(
    ("part", "length", "match"),
    [
        ({"tp": 3}, 8192, "tp 3: must be a divisor of the 8 key/value heads"),
        ({"pp": 64}, 8192, "as many layers: there are 32"),
        ({"cp": 16}, 8200, "cannot be shared by cp 16"),
    ],
)
def test_layouts_that_cannot_be(part: dict[str, int], length: int, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        estimate(LLAMA_31_8B, Layout(part=ParallelPart(**part), length=length), cluster_of("h100"))


def _run(*words: str, status: int = 0) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        assert run(["plan", *words]) == status
    return said.getvalue()


def test_the_command_as_table_and_json() -> None:
    text = _run("train", "--model", "405b", "--gpus", "16384", "--tokens", "15.6T")
    assert "405.85B parameters" in text
    assert "over-trained" in text
    assert "GPU hours" in text
    found = json.loads(_run("train", "--model", "8b", "--gpus", "8", "--json"))
    assert found["layouts"][0]["mfu_causal"] < found["layouts"][0]["mfu_full"]
    assert "best spent on" in _run("train", "--compute", "1e21")
    assert "parameters" in _run("llama-3.2-1b")  # the command that was there before


@pytest.mark.parametrize(
    "words",
    [
        ("405b", "16384", "--tokens", "15.6T"),
        ("405b", "16384", "--tokens", "800B", "--length", "131072"),
        ("llama-4-maverick", "1024"),
        ("70b", "4"),
    ],
    ids=["405b", "long rows", "experts", "nothing fits"],
)
def test_a_plan_fits_a_narrow_terminal(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = _run("train", "--model", words[0], "--gpus", *words[1:])
    assert max(map(len, text.splitlines())) <= 80


def test_a_budget_and_a_layout_are_one_object() -> None:
    alone = json.loads(_run("train", "--compute", "1e21", "--json"))
    both = json.loads(_run("train", "--compute", "1e21", "--model", "8b", "--json"))
    assert both["best_for_compute"] == alone
    assert both["layouts"]


@pytest.mark.parametrize(
    "words",
    [
        ("--compute", "1e21", "--gpus", "8"),
        ("--compute", "1e21", "--slurm", "file"),
        ("--model", "8b", "--image", "name"),
        ("--model", "8b", "--config", "run.yaml"),
        ("--model", "8b", "--slurm", "file", "--image", "name"),
    ],
)
def test_words_that_would_be_ignored_are_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        _run("train", *words, status=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("--model", "8b", "--tokens", "many"), (), ("--model", "8b", "--batch", "0")])
def test_bad_words(words: tuple[str, ...]) -> None:
    _run("train", *words, status=2)


def test_what_to_do_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "train", "--model", "8b", "--gpus", "1"]) == 0
    told = capsys.readouterr().err
    assert "1 x h100 cannot train all weights of llama-3.1-8b, which is what this plans: --gpus 2 is enough." in told
    assert "herd train lora" in told
    assert run(["plan", "train", "--model", "8b", "--gpus", "2"]) == 0
    assert "cannot" not in capsys.readouterr().err


def test_a_configuration_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(tmp_path):
        assert run(["plan", "train", "--model", "8b", "--slurm", "a.sbatch"]) == 0
    told = capsys.readouterr().err
    assert "there is no run.yaml here" in told
    assert "herd recipes cp pretrain FILE" in told


def test_launch_files_are_whole(tmp_path: Path) -> None:
    batch, manifest = tmp_path / "a.sbatch", tmp_path / "a.yaml"
    _run(
        "train",
        "--model",
        "70b",
        "--gpus",
        "256",
        "--slurm",
        str(batch),
        "--kuberay",
        str(manifest),
        "--config",
        "my run.yaml",
    )
    subprocess.run(["bash", "-n", str(batch)], check=True)
    text = batch.read_text()
    assert "#SBATCH --nodes=32" in text
    assert "herd train 'my run.yaml' parallel." in text
    job = yaml.safe_load(manifest.read_text())
    jsonschema.validate(job, RAY_JOB)
    compile(shlex.split(job["spec"]["entrypoint"])[2], "entrypoint", "exec")
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert worker["replicas"] == 32
    start = worker["template"]["spec"]["containers"][0]["env"][0]["value"]
    subprocess.run(["bash", "-n", "-c", start], check=True)
    # what the files say is a layout that herd train takes
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("srun")).removesuffix(" &"))
    spread = dict(word.removeprefix("parallel.").split("=") for word in words if word.startswith("parallel."))
    numbers = {key: int(value) for key, value in spread.items() if value.isdigit()}
    assert ParallelPart(**numbers, schedule=spread["schedule"]).world == 256  # type: ignore[arg-type]
    assert "train.checkpointing=" in text


CONFIG = """
recipe: pretrain
out: runs/large
model: {shape: SHAPE, tokenizer: nano}
data: {sources: texts}
train: {budget: {steps: 10}, precision: float32, checkpointing: full, optim: {kind: KIND}}
parallel: {dp_replicate: 2, tp: 2, cp: 2, pp: 4, schedule: interleaved, stages: 2, experts: number, reshard: false}
"""


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_the_run_that_is_started_is_the_one_that_was_planned(precision: str, tmp_path: Path) -> None:
    """Whatever layout and precision the configuration had before: every key of `parallel` is another one there."""
    file, batch = tmp_path / "run.yaml", tmp_path / "a.sbatch"
    file.write_text(CONFIG.replace("SHAPE", "llama-3.1-8b").replace("KIND", "adamw"))
    words = ("--model", "8b", "--gpus", "8", "--precision", precision, "--length", "4096")
    said = _run("train", *words, "--slurm", str(batch), "--config", str(file))
    best = json.loads(_run("train", *words, "--json"))["layouts"][0]
    line = next(line for line in batch.read_text().splitlines() if line.startswith("srun"))
    started = load_config(file, [word for word in shlex.split(line) if "=" in word and not word.startswith("--")])
    planned = plan_train("8b", LLAMA_31_8B, cluster_of("h100"), 8, length=4096, precision=precision)  # type: ignore[arg-type]
    assert started.parallel == planned.fits[0].layout.part
    assert (started.train.precision, started.train.compile) == (precision, True)
    assert (started.train.checkpointing, started.train.accumulate) == (best["checkpointing"], best["accumulate"])
    assert (started.data.rows, started.data.length) == (best["rows"], 4096)
    assert "another" not in said


@pytest.mark.parametrize(
    ("shape", "kind", "told"),
    [
        ("llama-3.1-8b", "muon", "AdamW was planned, and run.yaml trains with muon"),
        (
            "llama-3.2-1b",
            "adamw",
            "run.yaml trains another model: dim 2048, 16 layers; planned were dim 4096, 32 layers",
        ),
        ("{dim: 64, n_layers: 2}", "adamw", "run.yaml trains another model: dim 64, 2 layers"),
        ("llama-9-1b", "adamw", "run.yaml was not compared with what was planned: "),
        ("llama-4-behemoth", "adamw", "llama-4-behemoth: its geometry was never published"),
    ],
)
def test_a_configuration_that_was_not_planned_is_told(
    shape: str, kind: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG.replace("SHAPE", shape).replace("KIND", kind))
    with contextlib.chdir(tmp_path):
        assert run(["plan", "train", "--model", "8b", "--gpus", "8", "--slurm", "a.sbatch"]) == 0
    assert told in capfd.readouterr().err


def test_a_configuration_that_is_none_makes_no_files(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recipe: pretrain\n")
    with contextlib.chdir(tmp_path):
        _run("train", "--model", "8b", "--gpus", "8", "--slurm", "a.sbatch", status=1)
    assert not (tmp_path / "a.sbatch").exists()


def test_paths_of_a_ray_job_are_of_its_volume() -> None:
    """run.yaml, data and the run's folder are relative in most configurations: they lie on /data, where processes start."""
    from herd.planning.train_launch import kuberay

    job = yaml.safe_load(kuberay("run.yaml", [], gpus=16, image="herd:latest"))
    spec = job["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["workingDir"] == "/data"
        assert "/data" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_the_slurm_script_queues_itself_again(tmp_path: Path) -> None:
    """Run with stand-ins for Slurm's commands: a run that saved itself (75) is queued again, another failure is not."""
    from herd.planning.train_launch import slurm

    script = tmp_path / "run.sbatch"
    script.write_text(slurm("run.yaml", ["parallel.dp_shard=8"], gpus=8))
    tools = tmp_path / "bin"
    tools.mkdir()
    for status, queued in ((75, True), (1, False), (0, False)):
        for name, body in {
            "scontrol": f'[ "$1" = requeue ] && touch {tmp_path}/queued-{status} || echo node1',
            "srun": f'echo "$MASTER_ADDR" "$@" > {tmp_path}/ran; exit {status}',
        }.items():
            (tools / name).write_text(f"#!/bin/bash\n{body}\n")
            (tools / name).chmod(0o755)
        done = subprocess.run(
            ["bash", str(script)],
            env={"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7"},
            check=False,
        )
        assert done.returncode == status
        assert (tmp_path / f"queued-{status}").exists() == queued
    assert (
        (tmp_path / "ran")
        .read_text()
        .startswith("node1 --kill-on-bad-exit=1 --wait=0 herd train run.yaml parallel.dp_shard=8")
    )


RAY_JOB: dict[str, object] = {
    # What KubeRay's custom resource asks of a RayJob, from its published definition (ray.io/v1).
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"required": ["name"]},
        "spec": {
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "backoffLimit": {"type": "integer"},
                "rayClusterSpec": {
                    "required": ["headGroupSpec"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "headGroupSpec": {"required": ["rayStartParams", "template"]},
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "required": ["groupName", "rayStartParams", "template", "maxReplicas", "minReplicas"],
                                "properties": {
                                    "rayStartParams": {"additionalProperties": {"type": "string"}},
                                    "template": {
                                        "properties": {
                                            "spec": {
                                                "required": ["containers"],
                                                "properties": {
                                                    "containers": {
                                                        "items": {"required": ["name", "image", "resources"]}
                                                    }
                                                },
                                            }
                                        }
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


if __name__ == "__main__":  # the table of docs/train/planning.md
    for name, config, layout, cluster, tokens, gib in ROWS:
        one = estimate(config, layout, cluster)
        own, speed = one.memory.total / GIB, one.tokens_per_second
        memory = "| |" if gib is None else f"{gib:.1f} | {own:.1f} | {own / gib - 1:+.0%}"
        print(f"| {name} | {tokens:,.0f} | {speed:,.0f} | {speed / tokens - 1:+.0%} | {memory} |")

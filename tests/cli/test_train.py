"""herd train, recipes and plot at the command line."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from herd.cli.main import run
from herd.cli.training import Screen
from herd.train.lock import alone, check_free
from herd.train.overrides import load_config
from herd.train.recipes.catalog import recipe_file, recipe_module
from herd.train.watch import StepReport
from tests.train.test_metrics import begin, figures, step

TINY = ["model.shape={dim: 32, n_layers: 1, n_heads: 2}", "data.length=32", "data.rows=2", "data.held_out=40%"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(f"word{j % (i + 3)}" for j in range(60)))
    return folder


def arguments(tmp_path: Path, texts: Path, *more: str, steps: int = 3) -> list[str]:
    return [
        "train", "pretrain", f"data.sources={texts}", f"out={tmp_path / 'runs' / 'a'}", f"data.shards={tmp_path / 'shards'}",
        f"train.budget.steps={steps}", "data.processes=1", *TINY, *more,
    ]  # fmt: skip


def test_a_run_from_start_to_result(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str], piped: Callable[[str], None]
) -> None:
    piped("")
    assert run(arguments(tmp_path, texts, "train.log_every=1", "--json")) == 0
    told = capsys.readouterr()
    figures = json.loads(told.out)["figures"]
    assert figures["bits_per_byte"] > 0
    for part in (
        r"pretraining of a new model: \d+K parameters, all trained",
        r"3 steps",
        r"memory about",
        r"step 1/3 loss \d\.\d{4} norm [\d.]+ rate \S+ [\d,]+ tok/s mfu [\d.]+% \([\d.]+% with attention\) [\d.]+ GB eta ",
        r"held out at step 3: loss",
        r"'Once upon a time' -> ",
        r"model written to .*model \(read back",
        r"herd serve",
    ):
        assert re.search(part, told.err), part
    folder = str(tmp_path / "runs" / "a")
    # By its folder, finished: nothing is trained again.
    assert run(["train", folder]) == 0
    told = capsys.readouterr().err
    assert "this run is over: nothing is left to train" in told
    assert "step 1/3" not in told
    assert run(["train", folder, "--resume", "never"]) == 1
    assert "checkpoint" in capsys.readouterr().err
    assert run(["train", folder, "train.optim.lr=1", "train.seed=7"]) == 1
    assert (
        "another run than this one: train.optim.lr: 0.003 in the checkpoint, 1.0 now; train.seed: 0 in the checkpoint, 7 now; "
        in (capsys.readouterr().err)
    )
    # And it is a model.
    assert run(["run", "--raw", f"{folder}/model", "word1", "--max-tokens", "2"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run(["plot", folder]) == 0
    assert "loss (nats a token)" in capsys.readouterr().out


def test_what_is_asked_before_a_run_loads_no_model(texts: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from herd.cli.main import run; "
        f"status = run({[*arguments(tmp_path, texts), '--print-config']!r}); sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["data"]["length"] == 32


def test_keys_may_be_written_as_options(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--train.optim.lr", "1e-5", "--data.length=48", "--train.budget.steps", "7", "--print-config"]
    assert run([*arguments(tmp_path, texts), *more]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (float(config["train"]["optim"]["lr"]), config["data"]["length"]) == (1e-5, 48)
    assert config["train"]["budget"]["steps"] == 7


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (
            ["lora", "data.sources=x.jsonl", "--learning_rate", "1e-4"],
            1,
            "learning_rate: there is no such key; herd calls it train.optim.lr",
        ),
        (["lora", "--dry-rn"], 2, "Did you mean '--dry-run'?"),
        (["lora", "--dry-rn", "out=runs/a"], 2, "No such option '--dry-rn'"),
        (["--bla", "lora"], 2, "No such option '--bla'"),
        (["lora", "-x"], 2, "No such option '-x'"),
        (["lora", "--out", "--dry-run"], 2, "No such option '--out'"),
    ],
)
def test_options_that_are_no_keys(words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *words]) == status
    assert said in capsys.readouterr().err


def test_a_dry_run_trains_nothing(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments(tmp_path, texts), "--dry-run"]) == 0
    assert "memory about" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("parallel", "ranks"), [("parallel.dp_shard=2", 2), ("parallel.dp_shard=-1", 2), ("parallel.cp=2", 1)]
)
def test_a_step_is_that_of_all_ranks_that_see_other_rows(
    parallel: str, ranks: int, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments(tmp_path, texts), "--dry-run"]
    assert run(command) == 0
    alone = capsys.readouterr().err
    assert run([*command, parallel, "--nproc", "2"]) == 0
    many = capsys.readouterr().err
    tokens = [int(re.search(r"a step has ([\d,]+) tokens", said)[1].replace(",", "")) for said in (alone, many)]
    assert tokens[1] == ranks * tokens[0]


@pytest.mark.parametrize(("steps", "share"), [(5, "5%"), (100, "100%"), (101, None)])
def test_a_warm_up_longer_than_the_run_is_told(
    steps: int, share: str | None, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments(tmp_path, texts, steps=steps), "train.schedule.warmup_steps=100", "--dry-run"]) == 0
    said = f"the run has {steps}: the learning rate gets to at most {share} of its peak; train.schedule.warmup_steps"
    assert (said in capsys.readouterr().err) == bool(share)
    tokens = ["train.accumulate=1", f"train.budget.tokens={64 * steps}", "train.budget.steps=null"]
    assert run([*arguments(tmp_path, texts), *tokens, "train.schedule.warmup_steps=100", "--dry-run"]) == 0
    assert (said in capsys.readouterr().err) == bool(share)
    stages = ["recipe=extend", "stages=[{length: 32, share: 3}, {length: 64, share: 1}]"]
    assert run([*arguments(tmp_path, texts, *stages, steps=40), "train.schedule.warmup_steps=20", "--dry-run"]) == 0
    assert "the shortest stage has 10: the learning rate gets to at most 50%" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """The command lines of ranks that would run, and how many."""
    seen: list[tuple[list[str], int]] = []

    def spawn(args: list[str], count: int) -> int:
        seen.append((args, count))
        return 7

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("herd.parallel.launch.spawn", spawn)
    return seen


def test_ranks_are_started_with_the_arguments_given_and_not_those_of_the_process(
    started: list[tuple[list[str], int]], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["something", "else"])
    args = [*arguments(tmp_path, texts, "parallel.dp_shard=-1"), "--resume", "never", "--inexact", "--json"]
    assert run([*args, "--nproc", "2"]) == 7
    ((ranks, count),) = started
    assert count == 2
    assert not any("nproc" in arg for arg in ranks)
    assert [ranks[0], *sorted(ranks[1:])] == ["train", *sorted(["--", *args[1:]])]
    assert run([*args[:-1], "--print-config"]) == 0
    config = capsys.readouterr().out
    assert run(["train", "--print-config", *(arg for arg in ranks[1:] if arg != "--json")]) == 0
    assert capsys.readouterr().out == config


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ([], r"--nproc 2: the configuration is for one process; .*parallel\.dp_shard=-1"),
        (["parallel.dp_shard=4"], r"--nproc 2: .* asks for 4 processes"),
        (["parallel.tp=3", "parallel.dp_shard=-1"], r"--nproc 2: .*not a multiple of 3"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_ranks_that_do_not_fit_are_not_started(
    parallel: list[str], said: str, dry: list[str], started: list[tuple[list[str], int]], texts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = [*parallel, "train.evaluate.prompts=[]", "--nproc", "2", *dry]
    assert run(arguments(tmp_path, texts, *more)) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not started


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["lor"], r"lor: no such file, and there is no recipe 'lor': did you mean lora"),
        (["lora"], r"data\.sources is missing: say what to train on, for example herd train lora data\.sources=FILE"),
        (
            ["dpo"],
            r"dpo: no such file, and there is no recipe 'dpo': training by preference is not there yet; there are pretr",
        ),
        (
            ["runs/nope"],
            r"runs/nope: there is no such file or folder: give a recipe \(herd recipes\), a YAML file or the folder",
        ),
        (["none.yaml"], r"none\.yaml: there is no such file"),
        (
            ["lora", "data.sources=x.jsonl", "model=nano"],
            r"save_dtype.*\), not 'nano': did you mean model\.source=nano\?",
        ),
        (["lora", "data.sources=x.jsonl", "lr=1"], r"herd calls it train\.optim\.lr"),
        (["lora", "data.sources=no-such-file.jsonl"], r"no-such-file\.jsonl"),
        (
            ["lora", "data.sources=x.jsonl", "--resume", "atuo"],
            r"--resume atuo: there is no such checkpoint: auto goes on",
        ),
        (
            ["lora", "data.sources=x.jsonl", "--resume", "a"],
            r"--resume a: holds checkpoints .*newest is a/checkpoints/step-00000012",
        ),
        (
            ["lora", "data.sources=x.jsonl", "--resume", "a/checkpoints"],
            r"holds checkpoints .*a/checkpoints/step-00000012",
        ),
        (["lora", "data.sources=x.jsonl", "report.to=wandb"], r'pip install "herd\[wandb\]"'),
        (["pretrain", "data.sources=x.txt", "train.budget.minutes=1", "--verify-resume"], r"train\.budget\.minutes"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("step-00000004", "step-00000012"):
        (tmp_path / "a" / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "x.txt").write_text("Once.")
    if "wandb" in said:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(["train", *args]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert re.search(said, lines[-1])
    assert lines[-1].startswith("herd: ")
    assert "bug in herd" not in lines[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dry-run", "--verify-resume"], "--dry-run, --verify-resume: each says something and stops"),
        (["--print-config", "--json"], "--json is about the figures of a run, and --print-config makes none"),
        (["--verify-resume", "--resume", "never"], "--verify-resume makes runs of its own"),
        (["--verify-resume", "--inexact"], "--verify-resume makes runs of its own"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(
    flags: list[str], said: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments(tmp_path, texts), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("ranks", [[], ["parallel.dp_shard=-1", "--nproc", "2"]])
def test_a_folder_that_cannot_be_taken_is_refused_before_anything_is_loaded(
    ranks: list[str], started: list[tuple[list[str], int]], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("herd.train.check.check", lambda config: pytest.fail("the data were looked at"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "a"):
        assert run(arguments(tmp_path, texts, f"out={out}", *ranks)) == 1
        assert f"{out}: cannot be written: Not a directory" in capsys.readouterr().err
    with alone(tmp_path / "taken", print):
        assert run(arguments(tmp_path, texts, f"out={tmp_path / 'taken'}", *ranks)) == 1
    assert "taken: another run of this process writes there" in capsys.readouterr().err
    assert not started


def test_a_full_disk_is_left_to_the_run_which_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**where: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("herd.train.lock.tempfile.TemporaryDirectory", full)
    check_free(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(tmp_path)]) == 1
    assert "config.yaml is missing" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_says_that_the_launcher_started_too_many(
    rank: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("herd.train.run.run_recipe", lambda *_, **__: pytest.fail("the group was joined"))
    assert run(arguments(tmp_path, texts)) == 1
    assert "the config is for one process, but 2 run: set parallel.dp_shard=-1 (every" in capsys.readouterr().err


def test_a_proof_that_fails_says_where_the_two_runs_lie(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = dataclasses.make_dataclass("Proof", [("exact", bool)])(False)
    monkeypatch.setattr(
        "herd.train.verify_resume.verify_resume", lambda run, folder, **how: folder.mkdir(parents=True) or proof
    )
    assert run([*arguments(tmp_path, texts, steps=4), "--verify-resume"]) == 1
    folder = tmp_path / "runs" / "a-verify"
    assert folder.exists()
    assert f"both runs are left in {folder}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_proof_of_exact_resume_of_two_ranks(texts: Path, tmp_path: Path) -> None:
    """Each part in processes of its own: groups that one process leaves and joins again were seen to wait for ever."""
    more = [
        "parallel.dp_shard=-1",
        "data.held_out=null",
        "train.evaluate.prompts=[]",
        "--nproc",
        "2",
        "--verify-resume",
    ]
    command = [sys.executable, "-m", "herd", *arguments(tmp_path, texts, *more, steps=4)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("exact: 4 steps")
    assert not (tmp_path / "runs" / "a").exists()


def test_a_proof_of_ranks_starts_them_itself(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("herd.parallel.launch.spawn", lambda args, count: begun.append([*args, str(count)]) or 7)
    args = arguments(tmp_path, texts, "parallel.dp_shard=-1", "--verify-resume", steps=4)
    assert run([*args, "--nproc", "2"]) == 1
    assert "2 ranks ended with status 7 before step 4" in capsys.readouterr().err
    file = tmp_path / "runs" / "a-verify" / "config.yaml"
    assert begun == [["train", str(file), "--until", "4", "2"]]
    assert load_config(file).out == str(tmp_path / "runs" / "a-verify" / "straight")
    monkeypatch.setenv("RANK", "0")
    assert run(args) == 1
    assert "--verify-resume starts and ends its ranks itself: give it --nproc N" in capsys.readouterr().err


def test_a_proof_of_exact_resume(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["recipe=extend", "stages=[{length: 32, share: 1}, {length: 64, share: 1}]"]
    assert run([*arguments(tmp_path, texts, *stages, steps=8), "--verify-resume"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("exact: 4 steps")
    assert "the first stage, rows of 32 positions, stands for all" in told.err
    assert list((tmp_path / "runs").iterdir()) == []  # what proved it is gone: the same command can be given again


def test_a_run_goes_on_where_it_lies(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun with a relative folder, then moved, or named from elsewhere: no second run begins where the first one was."""
    monkeypatch.chdir(tmp_path)
    assert run([*arguments(tmp_path, texts, "out=a")]) == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").rename(tmp_path / "elsewhere" / "b")
    capsys.readouterr()
    assert run(["train", "elsewhere/b"]) == 0
    told = capsys.readouterr().err
    assert "elsewhere/b: was begun as a, and goes on here" in told
    assert "going on from elsewhere/b/checkpoints" in told
    assert not (tmp_path / "a").exists()
    assert run(["train", "elsewhere/b", "out=c", "--dry-run"]) == 0
    assert "into c" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signals on this system")
def test_a_signal_saves_and_the_same_command_goes_on(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_step = Screen.on_step
    stops = [3, 5]

    def kicked(self: Screen, report: StepReport) -> None:
        on_step(self, report)
        if report.step == stops[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Screen, "on_step", kicked)
    args = arguments(tmp_path, texts, "train.save.every_minutes=null", "train.log_every=1", steps=100_000)
    assert run(args) == 75
    told = capsys.readouterr().err
    assert "step 3/100000 loss" in told
    assert "--resume auto goes on from there" in told
    (kept,) = (tmp_path / "runs" / "a" / "checkpoints").glob("step-*")
    assert kept.name == "step-00000003"
    del stops[0]
    assert run(args) == 75
    told = capsys.readouterr().err
    assert "step 3/" not in told
    assert "step 4/100000 loss" in told


def test_on_a_terminal_steps_are_all_that_moves(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar of tokenizing, drawn at once here and not after two seconds, is gone when the steps begin."""
    seen = Terminal()
    monkeypatch.setattr(sys, "stderr", seen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("herd.cli.progress.PATIENCE", 0.0)
    more = ["train.save.every_minutes=null", "train.evaluate.prompts=[]"]
    for name in ("a", "b"):  # the second finds everything tokenized
        assert run(arguments(tmp_path, texts, f"out={tmp_path / name}", *more, steps=10)) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.getvalue())
    assert shown.count("pretraining of a new model") == 2
    assert "step 10/10" in shown
    for one in shown.split("pretraining of a new model")[1:]:
        first = re.search(r"step \d+/10", one)
        assert first is not None
        assert "tokenizing" not in one[first.start() :]


def test_recipes_are_listed_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed if line[0] != " "][:3] == ["pretrain", "sft", "lora"]
    assert max(map(len, listed)) <= 80
    for name, options in (("a.yaml", []), ("b.yaml", ["--all"]), ("c.py", ["--python"])):
        assert run(["recipes", "cp", "lora", str(tmp_path / name), *options]) == 0
    assert (tmp_path / "a.yaml").read_text() == recipe_file("lora").read_text()
    assert load_config(tmp_path / "b.yaml") == load_config(recipe_file("lora"), ["data.sources=YOUR-FILES"])
    assert (tmp_path / "b.yaml").read_text().count("#") > 80
    assert (tmp_path / "c.py").read_text() == recipe_module("lora").read_text()
    capsys.readouterr()
    assert run(["recipes", "cp", "lora", str(tmp_path / "a.yaml")]) == 1
    assert "there already" in capsys.readouterr().err
    assert run(["recipes", "cp", "lroa", str(tmp_path / "d.yaml")]) == 1
    assert "did you mean lora" in capsys.readouterr().err
    assert run(["recipes", "keys", "optim.clip"]) == 0
    assert "train.optim.clip" in capsys.readouterr().out
    assert run(["recipes", "keys", "bananas"]) == 1


def test_a_copied_recipe_runs(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = load_config(recipe_file("pretrain"), arguments(tmp_path, texts)[2:])
    from herd.train.overrides import dump_config

    (tmp_path / "run.yaml").write_text(dump_config(made))
    assert run(["recipes", "cp", "pretrain", str(tmp_path / "mine.py"), "--python"]) == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mine.py", "run.yaml", "train.budget.steps=1"])
    runpy.run_path("mine.py", run_name="__main__")
    assert "model written" in capsys.readouterr().out


class Terminal(io.StringIO):
    """Somebody looks."""

    def isatty(self) -> bool:
        return True


def test_the_screen_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Terminal()
    monkeypatch.setattr(sys, "stderr", seen)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(load_config(recipe_file("lora"), ["data.sources=x", "train.budget.steps=9"]))
    screen.on_figures(figures())
    screen.on_begin(begin())
    for number in range(1, 10):
        screen.on_step(step(number, loss=10 - number))
        time.sleep(0.01)
    screen.on_evaluating(0, 40)
    screen.on_evaluating(10, 40)
    time.sleep(0.3)  # it is drawn four times a second
    screen.on_evaluation(9, {"bits_per_byte": 1.25})
    screen.on_text(9, "Hi", "\x1b[31mHello")
    screen.on_end({})
    shown = seen.getvalue()
    assert "step 9/9" in shown
    assert re.search(r"held out: 10 of 40 rows, .* rows/s, eta ", shown)
    assert "held out at step 9: bits per byte 1.25" in shown
    assert "\x1b[31mHello" not in shown  # what a model writes cannot steer the terminal
    assert "with attention" in shown
    assert "9 steps, 900 tokens" in shown


def test_a_log_has_a_line_of_a_long_evaluation_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("herd.cli.progress.PLAIN", 0.0)
    screen = Screen(load_config(recipe_file("lora"), ["data.sources=x", "train.budget.steps=9"]))
    screen.on_begin(begin())
    screen.on_evaluating(10, 40)
    screen.on_evaluation(9, {"loss": 1.0})
    assert re.search(r"held out: 25%, 10 of 40 rows, 0 s, about 0 s left\n", capsys.readouterr().err)


def test_a_stage_counts_its_own_steps_and_compiling_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(
        load_config(recipe_file("extend"), ["data.sources=x", "train.budget.steps=99", "train.log_every=1"])
    )
    begun = begin()
    screen.on_begin(dataclasses.replace(begun, config=dataclasses.replace(begun.config, compile=True)))
    screen.on_step(step(3))
    told = capsys.readouterr().err
    assert "the first step compiles the blocks" in told
    assert "step 3/9 loss" in told

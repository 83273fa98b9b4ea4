"""`herd train`: a run from a YAML file or a recipe, started, watched, gone on with. No torch before the run begins."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.console import note
from herd.errors import ConfigError

if TYPE_CHECKING:
    from herd.train.config import RunConfig

__all__ = ["command", "configured"]

PROOF = 10
"""Steps of --verify-resume."""

EPILOG = """\
Examples:

\b
  herd train pretrain data.sources=texts/              a new model from texts
  herd train lora model.source=MODEL data.sources=chats.jsonl
  herd train lora ... 'method.targets=[wq,wo,experts]' LoRA on the routed experts of a Llama 4, too
  herd train run.yaml train.optim.lr=1e-4 out=runs/b   a file of your own, with two keys changed
  herd train runs/b                                    go on with a run, by its folder
  herd train run.yaml --dry-run                        what would be trained, and how much memory it takes
  herd recipes                                         the recipes; herd recipes cp copies one
  herd plot runs/a runs/b                              look at runs

Exit status: 0 done, 1 an error, 2 a command line that makes no sense, 3 a full or broken disk (the last checkpoint
is whole), 4 a loss that is not finite, 75 stopped by SIGTERM or SIGUSR1 and 130 by Ctrl-C (saved: run it again).
"""


@click.command(epilog=EPILOG, context_settings={"ignore_unknown_options": True})  # they are keys: see _keys
@click.argument("what", metavar="CONFIG.yaml|RECIPE|FOLDER")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", default="auto", metavar="auto|never|PATH", help="Go on from the newest whole checkpoint "
              "(auto), refuse a folder that has any (never), or go on from this one.")  # fmt: skip
@click.option("--inexact", is_flag=True, help="Go on though the configuration or the machine is another one: "
              "not the bytes of an uninterrupted run.")  # fmt: skip
@click.option("--print-config", is_flag=True, help="Print the whole configuration as YAML, and stop.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and stop.")
@click.option("--verify-resume", is_flag=True, help="Prove on this machine that a run killed and resumed has the bytes of "
              "one that was not, and stop.")  # fmt: skip
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Start N processes here (torchrun works, too).")
@click.option("--until", type=click.IntRange(min=1), hidden=True)  # of --verify-resume: end after so many steps, saved
@click.option("--json", "as_json", is_flag=True, help="Print the last figures as one JSON object.")
@click.pass_context
def command(
    context: click.Context,
    what: str,
    overrides: tuple[str, ...],
    resume: str,
    inexact: bool,
    print_config: bool,
    dry_run: bool,
    verify_resume: bool,
    nproc: int | None,
    until: int | None,
    as_json: bool,
) -> int | None:
    """Train a model as a YAML file, a recipe or the folder of an earlier run says; KEY=VALUE changes keys of it.

    Everything about the run goes into its folder (`out`): configuration, log, TensorBoard's files, checkpoints, and the
    result, which herd run and herd serve open. Ctrl-C saves and stops; the same command goes on.
    """
    _check_flags(print_config, dry_run, verify_resume, as_json, resume != "auto" or inexact)
    config = configured(what, _keys(context, (what, *overrides))[1:])
    place = _resumed(resume)
    if print_config:
        from herd.train.overrides import dump_config

        click.echo(dump_config(config), nl=False)
        return None
    from herd.train.trackers import check_trackers

    check_trackers(config.report)
    main = os.environ.get("RANK", "0") == "0"
    if main and not dry_run and not verify_resume:
        from herd.train.lock import check_free

        check_free(Path(config.out))
    if nproc is not None and nproc > 1 and "RANK" not in os.environ:
        _check_nproc(config, nproc)
        if verify_resume and not dry_run:
            return _verify(config, nproc)
        if not dry_run:
            from herd.parallel.launch import spawn

            return spawn(["train", *_of_a_rank(context)], nproc)
    if (
        "RANK" in os.environ
    ):  # every rank by itself: one that ends while others wait for it leaves them with gloo's words
        config.parallel.of_world(int(os.environ.get("WORLD_SIZE", "1")))
    if main:
        _foretell(config, nproc, dry_run)
    if dry_run:
        return None
    if verify_resume:
        if "RANK" in os.environ:
            raise ConfigError(
                "--verify-resume starts and ends its ranks itself: give it --nproc N, and no launcher around it"
            )
        return _verify(config)
    figures = _train(config, place, inexact, main, until)
    if as_json and main:
        click.echo(json.dumps({"out": config.out, "figures": figures}))
    return None


def _keys(context: click.Context, words: Sequence[str]) -> list[str]:
    """`--key value` and `--key=value`, as other trainers have it, as `key=value`. Raises click.UsageError for other options."""
    keys: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            keys.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if word[:2] == "--" and keys and not equals and rest and not re.match(r"--|[A-Za-z_][\w.]*=", rest[0]):
            equals, value = "=", rest.pop(0)
        if word[:2] != "--" or not keys or not equals:
            raise click.NoSuchOption(word.partition("=")[0], possibilities=_near(context, word), ctx=context)
        keys.append(f"{name}={value}")
    return keys


def _near(context: click.Context, word: str) -> list[str]:
    options = [name for param in context.command.params for name in param.opts if name.startswith("--")]
    return difflib.get_close_matches(word, options)


def _check_flags(print_config: bool, dry_run: bool, verify_resume: bool, as_json: bool, resumed: bool) -> None:
    """Raise click.UsageError for flags of which one would be ignored."""
    flags = {"--print-config": print_config, "--dry-run": dry_run, "--verify-resume": verify_resume}
    only = [flag for flag, given in flags.items() if given]
    if len(only) > 1:
        raise click.UsageError(f"{', '.join(only)}: each says something and stops: give one of them")
    if only and as_json:
        raise click.UsageError(f"--json is about the figures of a run, and {only[0]} makes none")
    if verify_resume and resumed:
        raise click.UsageError("--verify-resume makes runs of its own: leave out --resume and --inexact")


def _foretell(config: RunConfig, nproc: int | None, dry: bool) -> None:
    """What the run will be; in a dry run also its data, and what this machine lacks. Raises what the run would, but sooner."""
    from herd.train.check import check, lacking, try_rows
    from herd.train.forecast import forecast

    sources = check(config)
    for line in forecast(config, _dp(config, nproc)).lines():
        note(line, "")
    if not dry:
        return
    try_rows(config)
    for line in sources:
        note(line, "")
    world = os.environ.get("WORLD_SIZE", str(nproc or 1))
    for line in lacking(config, int(world) if world.isdecimal() else 1):
        note(f"not on this machine: {line}", "yellow")


def _resumed(text: str) -> Any:
    """auto, never, or the checkpoint that --resume names. Raises ConfigError before anything is loaded."""
    if text in ("auto", "never"):
        return text
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"--resume {text}: there is no such checkpoint: auto goes on from the newest of the run's folder, never refuses one "
            "that has any, a path is a folder such as runs/a/checkpoints/step-00000100"
        )
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if found := sorted(inside.glob("step-*")):
        raise ConfigError(f"--resume {text}: holds checkpoints and is none itself: name one, the newest is {found[-1]}")
    return path


def configured(what: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration that the command line means. Raises ConfigError naming near recipes and keys."""
    from herd.train.overrides import load_config
    from herd.train.recipes.catalog import recipe_file

    path = Path(what).expanduser()
    if path.is_dir():
        if not (path / "config.yaml").exists():
            raise ConfigError(f"{path} is a folder without a run: config.yaml is missing")
        config = load_config(path / "config.yaml", overrides)
        named = any(override.lstrip("-").startswith("out=") for override in overrides)
        if named or Path(config.out).resolve() == path.resolve():
            return config
        # Moved since, or begun somewhere else: the folder that is named is the run, not what stands where it was.
        note(f"{path}: was begun as {config.out}, and goes on here")
        return dataclasses.replace(config, out=str(path))
    if path.is_file():
        return load_config(path, overrides)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ConfigError(
            f"{path}: there is no such file or folder: give a recipe (herd recipes), a YAML file or the folder of a run"
        )
    try:
        recipe = recipe_file(what)
    except ConfigError as error:
        raise ConfigError(f"{what}: no such file, and {error}") from None
    try:
        return load_config(recipe, overrides)
    except ConfigError as error:
        if "data" in str(error) and "sources" in str(error) and "missing" in str(error):
            raise ConfigError(
                f"data.sources is missing: say what to train on, for example herd train {what} data.sources=FILE"
            ) from None
        raise


def _train(config: RunConfig, resume: Any, inexact: bool, main: bool, until: int | None) -> dict[str, float]:
    from herd.cli.tokenizing import tokenizing
    from herd.cli.training import Screen
    from herd.kernels import native
    from herd.train.run import run_recipe
    from herd.train.start import device_of

    missing = native.missing() if device_of(config.device).type == "cpu" else None
    if main and missing is not None and os.environ.get("HERD_ISA", "").lower() != "none":
        note(f"[slower than it could be: {missing}]")
    screen = Screen(config)
    watchers = [screen] if main else []
    tell = screen.say if main else _silent
    with tokenizing() as tick:
        try:
            figures = run_recipe(
                config,
                resume=resume,
                exact=not inexact,
                watchers=watchers,
                tell=tell,
                tick=tick if main else lambda made: None,
                until=until,
            )
        finally:
            screen.close()
    if main and until is None:
        _afterwards(config)
    return figures


def _afterwards(config: RunConfig) -> None:
    """What to do with the result."""
    out = Path(config.out)
    if (out / "adapter").exists() and config.method.kind in ("lora", "dora", "qlora", "prefix", "prompt"):
        note(f'try it: herd run {config.model.source} "Hi" --adapter {out / "adapter"}', "green")
    elif (out / "model").exists():
        how = "herd run --raw" if config.recipe != "sft" and not config.model.source else "herd run"
        note(f'try it: {how} {out / "model"} "..."    serve it: herd serve {out / "model"}', "green")
    note(f"look at it: herd plot {out}")


def _verify(config: RunConfig, nproc: int = 1) -> int:
    """Two short runs beside the run's folder, compared byte for byte; of a run in stages the first one.

    Several ranks are started anew for each part, as those of a run that goes on are.
    """
    from dataclasses import replace

    from herd.parallel.launch import spawn
    from herd.train.config import ReportPart
    from herd.train.overrides import dump_config
    from herd.train.run import run_recipe
    from herd.train.verify_resume import verify_resume

    if config.stages:
        from herd.train.recipes.extend import stage

        config = replace(stage(config, 1), out=config.out)
        note(f"the first stage, rows of {config.data.length} positions, stands for all")
    budget = config.train.budget
    if budget.minutes is not None:
        raise ConfigError(
            "train.budget.minutes: a run that is limited by the clock has other learning rates each time; verify it with "
            "train.budget.minutes=null train.budget.steps=N"
        )
    steps = min(PROOF, budget.steps or PROOF)

    folder = Path(config.out).with_name(f"{Path(config.out).name}-verify")

    def run(out: Path, until: int) -> None:
        this = replace(config, out=str(out), report=ReportPart())
        if nproc == 1:
            run_recipe(this, until=until, tell=_silent)
            return
        file = folder / "config.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(dump_config(this), encoding="utf-8")
        if status := spawn(["train", str(file), "--until", str(until)], nproc):
            raise ConfigError(
                f"--verify-resume: {nproc} ranks ended with status {status} before step {until}, see above"
            )

    proof = verify_resume(run, folder, steps=steps, tell=note)
    click.echo(str(proof))
    if not proof.exact:
        note(f"both runs are left in {folder}", "yellow")
        return 1
    for part in ("straight", "resumed"):
        shutil.rmtree(folder / part)
    (folder / "config.yaml").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something of the user's lies there, too
        folder.rmdir()
    return 0


def _dp(config: RunConfig, nproc: int | None) -> int:
    """Ranks that will see different rows."""
    part, world = config.parallel, os.environ.get("WORLD_SIZE", str(nproc or 1))
    known = part.dp_shard > 0 or not world.isdecimal()
    return part.dp if known else part.of_world(int(world)).dp


def _check_nproc(config: RunConfig, nproc: int) -> None:
    """Raise ConfigError when so many processes do not fit the configuration: before any of them is started."""
    if config.parallel.dp_shard == 1 and config.parallel.others == 1:
        raise ConfigError(
            f"--nproc {nproc}: the configuration is for one process; say what the {nproc} share, for example "
            "parallel.dp_shard=-1 (every process reads other rows, all share the training state)"
        )
    try:
        config.parallel.of_world(nproc)
    except ConfigError as error:
        raise ConfigError(f"--nproc {nproc}: {error}") from None


def _of_a_rank(context: click.Context) -> list[str]:
    """The arguments of this command line without --nproc, from what click read and not from the process's own arguments."""
    options: list[str] = []
    for param in context.command.params:
        value = context.params[str(param.name)]
        if not isinstance(param, click.Option) or param.name == "nproc":
            continue
        if param.is_flag:
            options += [param.opts[0]] if value else []
        elif value is not None:
            options += [param.opts[0], str(value)]
    return [*options, "--", context.params["what"], *context.params["overrides"]]


def _silent(text: str) -> None:
    """Other ranks say nothing."""

"""`herd`: the subcommands, each imported only when it is chosen, and the one place where errors become exit statuses.

| status | meaning                                                                    |
|--------|----------------------------------------------------------------------------|
| 0      | done                                                                       |
| 1      | a HerdError (one line on stderr), or a bug in herd (one line, how to see more) |
| 3, 4, 75 | ends of training runs with states of their own (`herd.train.stop`)       |
| 2      | a command line that makes no sense                                         |
| 130    | stopped with Ctrl-C                                                        |
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

import click

from herd import __version__
from herd.cli.console import note, styled
from herd.errors import HerdError

__all__ = ["COMMANDS", "herd", "main", "run"]


class Entry(NamedTuple):
    """A subcommand: the module whose `command` it is, its line in the help, and the section that line stands in."""

    module: str
    summary: str
    section: str


COMMANDS = {
    "chat": Entry("herd.cli.chat", "Talk with a model, turn by turn.", "Talk"),
    "run": Entry("herd.cli.run", "Answer one prompt and exit (without a prompt: chat).", "Talk"),
    "generate": Entry("herd.cli.generate", "Answer a file of prompts, many at once.", "Talk"),
    "serve": Entry("herd.cli.serve", "Serve models over HTTP, as OpenAI does.", "Talk"),
    "ps": Entry("herd.cli.ps", "List the models that a server has loaded.", "Talk"),
    "stop": Entry("herd.cli.stop", "Unload a model of a server.", "Talk"),
    "pull": Entry("herd.cli.pull", "Download a model into the cache that all tools share.", "Files"),
    "list": Entry("herd.cli.list", "List the models on this machine.", "Files"),
    "show": Entry("herd.cli.show", "Show where a model lies and what it is made of.", "Files"),
    "create": Entry("herd.cli.create", "Make a model by a name of your own, from a Modelfile.", "Files"),
    "cp": Entry("herd.cli.cp", "Call a model by another name, too.", "Files"),
    "rm": Entry("herd.cli.rm", "Delete a model from the cache.", "Files"),
    "cache": Entry("herd.cli.cache", "List or delete the packed copies of models that start fast.", "Files"),
    "convert": Entry("herd.cli.convert", "Write a checkpoint in another format, with proof.", "Files"),
    "quantize": Entry("herd.cli.quantize", "Write a smaller copy of a model, and say what it lost.", "Files"),
    "merge": Entry("herd.cli.merge", "Add an adapter into its base model, and say what it cost.", "Files"),
    "verify": Entry("herd.cli.verify", "Prove that two checkpoints are the same model.", "Files"),
    "train": Entry("herd.cli.train", "Train a model, or an adapter, on texts or conversations.", "Train"),
    "recipes": Entry("herd.cli.recipes", "List the recipes of herd train, or copy one to change it.", "Train"),
    "plot": Entry("herd.cli.plot", "Draw how runs went: here, or as a picture.", "Train"),
    "plan": Entry("herd.cli.plan", "Say what running a model takes: memory, speed, what fits.", "Look"),
    "bench": Entry("herd.cli.bench", "Measure speed on this machine, beside other programs.", "Look"),
    "doctor": Entry("herd.cli.doctor", "Say what this machine can run, and why something is slow.", "Look"),
    "inspect": Entry("herd.cli.inspect", "Say what is in a checkpoint, and what looks wrong.", "Look"),
    "models": Entry("herd.cli.models", "List the Llama models that herd knows.", "Look"),
    "completion": Entry("herd.cli.completion", "Print what a shell needs to complete herd's commands.", "Look"),
    "lint-template": Entry(
        "herd.cli.lint_template", "Hold a model's chat template against herd's own prompts.", "Look"
    ),
    "data": Entry("herd.cli.data", "Look at training data, and get it ready.", "Train"),
    "tokenizer": Entry("herd.cli.tokenizer", "Learn a vocabulary, or compare some on a text.", "Train"),
    "tokens": Entry("herd.cli.tokens", "Show how a text or a conversation becomes tokens.", "Look"),
}

EXAMPLES = """\
Examples:

\b
  herd chat                                  talk with the small model that comes with herd
  herd run nano "Tell me a story."           one answer, then exit
  herd run ./Llama-3.2-1B-Instruct "Hi"      a folder or file of your own: Hugging Face, Meta or GGUF
  git diff | herd run MODEL "Explain this."  what is piped in follows the prompt
  herd COMMAND --help                        all options of a command
"""


class LazyGroup(click.Group):
    """A group over COMMANDS that imports a subcommand's module when the subcommand is used, and suggests near names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else import_module(entry.module).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, COMMANDS, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command {name!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in dict.fromkeys(entry.section for entry in COMMANDS.values()):
            with formatter.section(section):
                formatter.write_dl([(name, e.summary) for name, e in COMMANDS.items() if e.section == section])


@click.group(
    cls=LazyGroup,
    epilog=EXAMPLES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.pass_context
def herd(ctx: click.Context) -> None:
    """Every Llama, end to end, verified."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """The console script."""
    status = run(sys.argv[1:])
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    sys.exit(status)


def run(args: Sequence[str]) -> int:
    """Run one command line; the exit status. Errors are said on stderr in one line (HERD_DEBUG=1 adds the traceback)."""
    _prepare_streams()
    warnings.showwarning = _show_warning
    try:
        status = herd.main(list(args), prog_name="herd", standalone_mode=False)
        sys.stdout.flush()  # here, where a broken pipe can still be handled, and not while python shuts down
        return status if isinstance(status, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.ClickException as error:
        # A group alone: its help, as it is (click 8.1 has no such class).
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return error.exit_code
        return _fail(error, _usage_line(error), error.exit_code)
    except HerdError as error:
        return _fail(error, str(error), error.exit_code)
    except OSError as error:
        if error.errno != errno.EPIPE:
            return _bug(error)
        # The reader has gone: say nothing, and let the flush at exit write into the void.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _bug(error)


def _prepare_streams() -> None:
    """Closed streams swallow what is written, and a character that a terminal cannot show does not end the program."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _show_warning(message: Warning | str, *where: object) -> None:
    """A warning in one line, without the place in the source that nobody asked for."""
    note(f"note: {' '.join(str(message).split())}")


def _usage_line(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return error.format_message() + (f" (see: {context.command_path} --help)" if context else "")


def _bug(error: Exception) -> int:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return _fail(error, "out of memory: use a smaller model, a shorter context (-c) or --dtype bfloat16", 1)
    what = f"{type(error).__name__}: {error}"
    return _fail(error, f"{what[:300]} (this is a bug in herd: HERD_DEBUG=1 shows where)", 1)


def _fail(error: BaseException, line: str, status: int) -> int:
    with contextlib.suppress(OSError):
        if os.environ.get("HERD_DEBUG"):
            traceback.print_exception(error, file=sys.stderr)
        print(styled("herd:", "red", sys.stderr), _one_line(line), file=sys.stderr)
    return status


def _one_line(text: str) -> str:
    """The lines of a message in one; indented ones are items of a list, which semicolons keep apart."""
    whole, listed = "", False
    for line in filter(str.strip, text.splitlines()):
        apart = (listed or line.startswith("  ")) and whole[-1:] not in ".:;,!?"
        whole += f"{';' if apart else ''}{' ' if whole else ''}{' '.join(line.split())}"
        listed = line.startswith("  ")
    return whole

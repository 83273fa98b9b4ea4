"""`herd tokens`: how a text or a conversation becomes token ids."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, TextIO

import click

from herd.cli.completion import models

if TYPE_CHECKING:
    from herd.chat.format import Rendered
    from herd.tokenizer.explain import Explained
    from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd tokens nano "Hello world"
  herd tokens ./Llama-3.2-1B-Instruct --messages chat.json    the prompt, its special tokens and loss mask
  herd tokens ./tokenizer.model --json - < text.txt           what is piped in
"""
PIECE_STYLES = ("cyan", "green")  # in turn, so that the borders of pieces show


@click.command(epilog=EPILOG)
@click.argument("model", shell_complete=models)
@click.argument("text", required=False)
@click.option("--messages", "conversation", type=click.File("r", encoding="utf-8"), help="A conversation, as JSON.")
@click.option("--bos", is_flag=True, help="Put the token that begins a text in front.")
@click.option("--special", is_flag=True, help="Read names such as <|eot_id|> in TEXT as special tokens.")
@click.option("--format", "format_name", metavar="NAME", help="Prompt format, instead of the model's own.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with ids, pieces and loss mask.")
def command(
    model: str,
    text: str | None,
    conversation: TextIO | None,
    bos: bool,
    special: bool,
    format_name: str | None,
    as_json: bool,
) -> None:
    """Show the tokens of TEXT, or of the conversation in --messages FILE.

    MODEL is a name, a folder, or a tokenizer or GGUF file. TEXT "-" is what is piped in. FILE holds a list of messages with
    role and content, or an object with "messages" and, where tools are used, "tools". In a conversation, * marks the tokens
    that a model learns when it is trained on it.
    """
    if conversation is None and text is None and _is_terminal():
        raise click.UsageError("give a TEXT or --messages FILE")
    if conversation is not None and (text is not None or bos or special):
        raise click.UsageError("--messages renders a whole prompt: TEXT, --bos and --special have no meaning with it")
    if format_name is not None and conversation is None:
        raise click.UsageError("--format is about conversations: give one with --messages FILE")
    from herd.checkpoint.resolve import resolve
    from herd.checkpoint.vocabulary import tokenizer_at
    from herd.tokenizer.explain import explain

    tokenizer = tokenizer_at(resolve(model))
    facts: dict[str, Any] = {"model": model, "family": tokenizer.family, "vocab_size": tokenizer.vocab_size}
    if conversation is None:
        given = _piped() if text is None or text == "-" else text
        rows = explain(tokenizer, tokenizer.encode(given, bos=bos, allow_special=special))
    else:
        name, rendered = _render(tokenizer, conversation, format_name)
        rows = explain(tokenizer, rendered.tokens, rendered.loss_mask)
        facts |= {"format": name, "notes": list(rendered.notes)}
    if as_json:
        print(json.dumps(facts | _as_json(rows), ensure_ascii=False))
    else:
        _show(facts, rows)


def _is_terminal() -> bool:
    from herd.cli.console import is_terminal

    return is_terminal(sys.stdin)


def _piped() -> str:
    from herd.errors import TokenizerError

    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"standard input is not UTF-8: byte {error.start}") from None


def _as_json(rows: Sequence[Explained]) -> dict[str, Any]:
    tokens = [{"id": r.id, "piece": r.piece, "bytes": r.data.hex(), "special": r.special} for r in rows]
    answer: dict[str, Any] = {"ids": [r.id for r in rows], "tokens": tokens}
    if rows and rows[0].learn is not None:
        answer["loss_mask"] = [bool(r.learn) for r in rows]
    return answer


def _show(facts: Mapping[str, Any], rows: Sequence[Explained]) -> None:
    """On a terminal the pieces in colour first; then, always, one line per token."""
    from herd.cli.console import coloured, note

    if coloured(sys.stdout) and rows:
        print("".join(_inline(rows)).rstrip("\n"), end="\n\n")
    wide = len(str(max((r.id for r in rows), default=0)))
    far = len(str(len(rows)))
    for at, row in enumerate(rows):
        mark = "" if row.learn is None else "* " if row.learn else "  "
        shown = _styled(row, "cyan") if row.special else f'"{row.piece}"'
        print(f"{at:>{far}}  {row.id:>{wide}}  {mark}{shown}")  # pieces are printable: nothing can steer the terminal
    counted = f"{len(rows)} tokens"
    if rows and rows[0].learn is not None:
        counted += f", {sum(bool(r.learn) for r in rows)} of them learnt (*), format {facts['format']}"
    note(f"{counted}; {facts['family']} vocabulary of {facts['vocab_size']:,} ids")
    for line in facts.get("notes", ()):
        note(line)


def _inline(rows: Sequence[Explained]) -> Iterator[str]:
    styles = cycle(PIECE_STYLES)
    for row in rows:
        yield _styled(row, next(styles))
        if row.data.endswith(b"\n"):
            yield "\n"


def _styled(row: Explained, style: str) -> str:
    from herd.cli.console import styled

    return styled(row.piece, "yellow" if row.special else style, sys.stdout)


def _render(tokenizer: Tokenizer, file: TextIO, format_name: str | None) -> tuple[str, Rendered]:
    """The conversation in `file` as ids; a reply is opened at its end unless an assistant spoke last."""
    from herd.chat.formats import detect, format_named
    from herd.chat.render import render
    from herd.cli.question import read_conversation

    messages, tools = read_conversation(file)
    format = detect(tokenizer) if format_name is None else format_named(format_name, tokenizer)
    return format.name, render(messages, format, tools, generate=messages[-1].role != "assistant")

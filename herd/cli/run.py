"""`herd run`: one prompt, one answer; without a prompt, a chat."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from herd.cli.console import is_terminal, note
from herd.cli.options import model_options, opened_from, sampling, sampling_options
from herd.cli.progress import progress
from herd.cli.reply import called
from herd.cli.screen import Screen

if TYPE_CHECKING:
    from herd.chat.format import Delta
    from herd.chat.model import Reply
    from herd.chat.params import SamplingParams
    from herd.cli.opened import Opened

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd run nano "Tell me a story about a dog."
  herd run ./Llama-3.2-1B-Instruct "Hi" --temp 0 --json
  herd run --raw ./Llama-3.2-1B "Once upon a time" -n 100   a base model continues text
  git diff | herd run MODEL "Explain this change."          what is piped in follows the prompt
  herd run MODEL - < question.txt                           the prompt is what is piped in
"""


@click.command(epilog=EPILOG)
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--system", default="", metavar="TEXT", help="System prompt.")
@sampling_options
@model_options
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without a prompt format.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with text, finish_reason, usage and timings.")
@click.option("--verbose", is_flag=True, help="Durations and rates, on stderr.")
def command(
    model: str, prompt: str | None, system: str, raw: bool, as_json: bool, verbose: bool, **options: Any
) -> int:
    """Answer PROMPT with MODEL and exit. Without PROMPT: what is piped in, or else a chat.

    MODEL is a name (herd models), a folder or a file. The answer goes to stdout, everything else to stderr.
    """
    chosen = sampling(options)
    if raw and (system or options["format_name"]):
        raise click.UsageError("--raw uses no prompt format, so --system and --format have no meaning with it")
    asked = _prompt(prompt, raw=raw)
    if asked is None and (as_json or raw):
        raise click.UsageError("--json and --raw answer one prompt: give a PROMPT, or pipe it in")
    began = time.perf_counter()
    opened = opened_from(model, options)
    loading = time.perf_counter() - began
    if asked is None:
        from herd.cli.chat import talk

        return talk(opened, chosen, system, verbose=verbose)
    params = opened.params(chosen)
    reply = _answer(opened, params, asked, system, raw=raw, quiet=as_json)
    if as_json:
        print(json.dumps(_as_json(opened, reply, loading), ensure_ascii=False))
    if reply.finish_reason == "length":
        note(f"[cut at {params.max_tokens} tokens: --max-tokens allows more]")
    if reply.finish_reason == "context_full":
        note(f"[cut: the context of {opened.chat.max_len:,} tokens is full]")
    if verbose:
        note(_durations(reply, loading))
    return 0


def _prompt(given: str | None, *, raw: bool) -> str | None:
    """The prompt: the argument, then what is piped in; None when there is neither and a person sits at the terminal.

    White space around what is piped in is dropped; with `raw`, where it counts, only the last line end is.
    """
    from herd.cli.lines import read_all

    text = "" if given is None or given == "-" else given
    if given == "-" or not is_terminal(sys.stdin):
        piped = read_all(sys.stdin, lambda: note("reading the prompt from standard input (end it with Ctrl-D) ..."))
        piped = piped.removesuffix("\n") if raw else piped.strip()
        text = f"{text}\n\n{piped}" if text and piped else text or piped
    elif given is None:
        return None
    if not text.strip():
        raise click.UsageError("the prompt is empty: give a PROMPT, or pipe one in")
    return text


def _answer(opened: Opened, params: SamplingParams, prompt: str, system: str, *, raw: bool, quiet: bool) -> Reply:
    """Show the answer as it is made, unless `quiet`."""
    screen = Screen(sys.stdout, live=True)
    with progress("reading", "tokens") as tick:
        for delta in _deltas(opened, params, prompt, system, raw, tick):
            if delta.text is not None and not quiet:
                screen.text(delta.text)
    reply = opened.chat.last
    assert reply is not None  # the stream is exhausted
    if not quiet:
        if not reply.text.endswith("\n"):
            screen.text("\n")
        for call in reply.message.tool_calls:
            note(called(call))
    return reply


def _deltas(
    opened: Opened, params: SamplingParams, prompt: str, system: str, raw: bool, tick: Callable[[int, int], None]
) -> Iterator[Delta]:
    from herd.chat.messages import Message

    if raw:
        return opened.chat.complete(prompt, params, on_prefill=tick)
    opened.require_format()
    messages = ([Message("system", system)] if system else []) + [Message("user", prompt)]
    return opened.chat.stream(messages, params=params, on_prefill=tick)


def _as_json(opened: Opened, reply: Reply, loading: float) -> dict[str, Any]:
    usage = reply.usage
    answer: dict[str, Any] = {
        "model": opened.name,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "timings": {
            "load_seconds": loading,
            "prompt_seconds": usage.prefill_seconds,
            "eval_seconds": usage.decode_seconds,
            "tokens_per_second": usage.decode_rate,
        },
    }
    if reply.message.tool_calls:
        answer["tool_calls"] = [{"name": c.name, "arguments": dict(c.arguments)} for c in reply.message.tool_calls]
    return answer


def _durations(reply: Reply, loading: float) -> str:
    """Ollama's --verbose lines."""
    usage = reply.usage
    fresh = usage.prompt_tokens - usage.cached_tokens
    total = loading + usage.prefill_seconds + usage.decode_seconds
    rows = {
        "total duration": f"{total:.3f} s",
        "load duration": f"{loading:.3f} s",
        "prompt eval count": f"{fresh} tokens",
        "prompt eval duration": f"{usage.prefill_seconds:.3f} s",
        "prompt eval rate": f"{fresh / usage.prefill_seconds if usage.prefill_seconds else 0:.2f} tokens/s",
        "eval count": f"{usage.completion_tokens} tokens",
        "eval duration": f"{usage.decode_seconds:.3f} s",
        "eval rate": f"{usage.decode_rate:.2f} tokens/s",
    }
    return "\n".join(f"{name + ':':<22}{value}" for name, value in rows.items())

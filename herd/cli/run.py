"""`herd run`: one prompt, one answer; without a prompt, a chat."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

import click

from herd.cli.completion import models
from herd.cli.console import note
from herd.cli.options import (
    adapter_option,
    model_options,
    opened_from,
    sampling,
    sampling_options,
    tensor_parallel_option,
)
from herd.cli.progress import progress
from herd.cli.question import (
    Question,
    middle_between,
    prefix_from,
    prompt_from,
    read_conversation,
    the_conversation,
    the_prompt,
    the_text,
)
from herd.cli.reply import called
from herd.cli.screen import Screen

if TYPE_CHECKING:
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
  herd run ./Llama-3.2-1B "Hi" --adapter ./my-lora          with a LoRA adapter on top
  herd run MODEL - < question.txt                           the prompt is what is piped in
  herd run ./CodeLlama-7b "def add(a, b):" --suffix "return c"     the middle between two texts
  herd run ./Llama-Guard-3-1B --messages chat.json          a Guard judges the last message
"""


@click.command(epilog=EPILOG)
@click.argument("model", shell_complete=models)
@click.argument("prompt", required=False)
@click.option("--system", default="", metavar="TEXT", help="System prompt.")
@sampling_options
@model_options
@adapter_option
@tensor_parallel_option
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without a prompt format.")
@click.option(
    "--suffix",
    metavar="TEXT",
    help="Fill in what stands between PROMPT, or else what is piped in, and TEXT (Code Llama).",
)
@click.option("--spm", is_flag=True, help="With --suffix: show the model the suffix before the prefix.")
@click.option(
    "--messages",
    "conversation",
    type=click.File("r", encoding="utf-8"),
    metavar="FILE",
    help="Answer the conversation in FILE (JSON); a Guard judges its last message.",
)
@click.option("--wait", is_flag=True, help="Wait for what is piped in behind PROMPT, however long that takes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with text, finish_reason, usage and timings.")
@click.option("--verbose", is_flag=True, help="Durations and rates, on stderr.")
def command(
    model: str,
    prompt: str | None,
    system: str,
    raw: bool,
    suffix: str | None,
    spm: bool,
    conversation: TextIO | None,
    wait: bool,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> int:
    """Answer PROMPT with MODEL and exit. Without PROMPT: what is piped in, or else a chat.

    MODEL is a name (herd models), a folder or a file. The answer goes to stdout, everything else to stderr.
    """
    chosen = sampling(options)
    ask = _question(prompt, system, raw, suffix, spm, conversation, wait, options["format_name"])
    if ask is None and (as_json or raw):
        raise click.UsageError("--json and --raw answer one prompt: give a PROMPT, or pipe it in")
    began = time.perf_counter()
    opened = opened_from(model, options)
    loading = time.perf_counter() - began
    if ask is None:
        from herd.cli.chat import talk

        return talk(opened, chosen, system, verbose=verbose)
    params = opened.params(chosen)
    reply = _answer(opened, params, ask, quiet=as_json)
    if as_json:
        print(json.dumps(_as_json(opened, reply, loading), ensure_ascii=False))
    if reply.finish_reason == "length":
        note(f"[cut at {params.max_tokens} tokens: --max-tokens allows more]")
    if reply.finish_reason == "context_full":
        note(f"[cut: the context of {opened.chat.max_len:,} tokens is full]")
    if verbose:
        note(_durations(opened, reply, loading))
    return 0


def _question(
    prompt: str | None,
    system: str,
    raw: bool,
    suffix: str | None,
    spm: bool,
    conversation: TextIO | None,
    wait: bool,
    format_name: str | None,
) -> Question | None:
    """What the command line asks; None: nothing yet, so it is a chat. Raises click.UsageError for what makes no sense."""
    if (raw or suffix is not None) and (system or format_name):
        with_it = "--raw" if raw else "--suffix"
        raise click.UsageError(f"{with_it} uses no prompt format, so --system and --format have no meaning with it")
    if spm and suffix is None:
        raise click.UsageError("--spm is about filling in the middle: give --suffix TEXT with it")
    if wait and (suffix is not None or conversation is not None):
        raise click.UsageError("--wait is about a pipe behind PROMPT, and --suffix and --messages read none")
    if conversation is not None:
        if prompt is not None or system or raw or suffix is not None:
            raise click.UsageError(
                "--messages is the whole question: PROMPT, --system, --raw, --suffix do not go with it"
            )
        return the_conversation(*read_conversation(conversation))
    if suffix is not None:
        if raw:
            raise click.UsageError("--raw goes on with a text and --suffix fills one in: give one of them")
        return middle_between(prefix_from(prompt), suffix, "spm" if spm else "psm")
    text = prompt_from(prompt, exact=raw, wait=wait)
    if text is None:
        return None
    return the_text(text) if raw else the_prompt(text, system)


def _answer(opened: Opened, params: SamplingParams, ask: Question, *, quiet: bool) -> Reply:
    """Show the answer as it is made, unless `quiet`."""
    screen = Screen(sys.stdout, live=True)
    with progress("reading", "tokens") as tick:
        for delta in ask(opened, params, tick):
            if delta.text is not None and not quiet:
                screen.text(delta.text)
    reply = opened.chat.last
    assert reply is not None  # the stream is exhausted
    if not quiet:
        if not reply.text.endswith("\n"):
            screen.text("\n")
        for call in reply.message.tool_calls:
            note(called(call))
        for line in reply.notes:
            note(f"[{line}]")
    return reply


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
    if reply.notes:
        answer["notes"] = list(reply.notes)
    if reply.message.tool_calls:
        answer["tool_calls"] = [{"name": c.name, "arguments": dict(c.arguments)} for c in reply.message.tool_calls]
    return answer


def _durations(opened: Opened, reply: Reply, loading: float) -> str:
    """Ollama's --verbose lines, and what ran."""
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
    about = opened.about()
    rows |= {name: about[name] for name in ("numbers", "weights", "kernels")}
    return "\n".join(f"{name + ':':<22}{value}" for name, value in rows.items())

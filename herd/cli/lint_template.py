"""`herd lint-template`: a chat template against herd's own renderer. No torch."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.console import note, safe, styled

if TYPE_CHECKING:
    from herd.chat.lint import Finding, Report

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd lint-template ./Llama-3.1-8B-Instruct            a folder, a GGUF file or a name
  herd lint-template chat_template.jinja --all          a template alone; every case and every difference
  herd lint-template model.gguf --format llama3.1       against Meta's way of writing only
  herd lint-template ./model --json | jq .passed
"""

SHOWN = 3
"""Differences that are shown in full without --all."""

AROUND = 2
"""Equal lines shown before and behind a difference."""

_SPECIAL = re.compile(r"<\|[a-z0-9_]{1,40}\|>|</?s>|<step>|\[/?INST\]|<</?SYS>>")
_LINES = re.compile(r"[^\n]*?(?:\n|<\|eot_id\|>|<\|eom_id\|>|<\|eot\|>|<\|eom\|>|</s>|<step>)|[^\n]+\Z")
_STATUS = {"same": "green", "different": "red", "raised": "red", "accepted": "yellow"}


@click.command(epilog=EPILOG)
@click.argument("path")
@click.option(
    "--format", "format_name", metavar="NAME", help="Compare with this prompt format instead of the detected one."
)
@click.option("--all", "show_all", is_flag=True, help="List the cases that agree too, and show every difference.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every case, both texts and the reasons.")
def command(path: str, format_name: str | None, show_all: bool, as_json: bool) -> int:
    """Hold the chat template of a model against herd's own prompts.

    PATH is a model (name, folder or GGUF file), a .jinja file, or a tokenizer_config.json. The same conversations go through
    the template, in a sandbox, and through herd's renderer. What differs is shown: - is what herd writes, + what the template
    writes. The exit status is 0 when nothing differs, 1 when something does or the template may not run.
    """
    from herd.chat.lint import lint
    from herd.chat.sandbox import Sandbox
    from herd.checkpoint.chat_template import template_at

    found = template_at(path)
    with Sandbox() as sandbox:
        report = lint(found.source, sandbox, format=format_name, tokenizer=found.tokenizer)
        limits = sandbox.limits
    if as_json:
        print(json.dumps(_as_json(found.path, report, limits), ensure_ascii=False, indent=1))
    else:
        _show(report, show_all, checked_ids=found.tokenizer is not None)
        if "memory" not in limits:
            note("on this system the sandbox limits time only, not memory", "yellow")
    return 0 if report.ok else 1


def _as_json(path: Path, report: Report, limits: Sequence[str]) -> dict[str, Any]:
    from herd.chat.deviations import MEANINGS

    refused = report.refused
    reasons = sorted({reason for finding in report.findings for reason in finding.reasons})
    return {
        "path": str(path),
        "ok": report.ok,
        "format": report.format,
        "passed": dict(report.passed),
        "cases": [
            {
                "case": finding.case,
                "status": finding.status,
                "herd": finding.expected,
                "template": finding.got,
                "message": finding.message,
                "reasons": list(finding.reasons),
            }
            for finding in report.findings
        ],
        "refused": None
        if refused is None
        else {"kind": refused.kind, "line": refused.line, "node": refused.node, "message": refused.message},
        "meanings": {reason: MEANINGS[reason] for reason in reasons},
        "forged_special_tokens": report.forged,
        "other_ids": list(report.other_ids),
        "sandbox_limits": list(limits),
    }


def _show(report: Report, show_all: bool, *, checked_ids: bool) -> None:
    if report.refused is not None:
        _show_refusal(report)
        return
    _show_table(report, show_all)
    differing = [finding for finding in report.findings if finding.status != "same"]
    shown = differing if show_all else differing[:SHOWN]
    for finding in shown:
        print()
        _show_finding(finding)
    if len(shown) < len(differing):
        left = len(differing) - len(shown)
        print(f"\n{left} more {'case differs' if left == 1 else 'cases differ'}; --all shows them.")
    _show_meanings(differing)
    _show_tokens(report, checked_ids)


def _show_refusal(report: Report) -> None:
    from herd.chat.sandbox import WALL_SECONDS

    assert report.refused is not None
    said = {
        "refused": "The template is refused: it does what no chat template needs.",
        "broken": "The template is no Jinja template that can be compiled.",
        "stopped": f"The template was stopped: it may take {WALL_SECONDS:g} s.",
    }
    print(styled(said.get(report.refused.kind, "The template cannot run."), "red", sys.stdout))
    print(f"  {safe(report.refused.explain())}")
    print("Nothing of it was compared. Do not run it in a program without a sandbox; herd renders prompts without it.")


def _show_table(report: Report, show_all: bool) -> None:
    total, same = len(report.findings), report.passed[report.format]
    style = "green" if report.ok else "red"
    print(styled(f"{same} of {total} cases are the same as {report.format}", style, sys.stdout))
    others = {name: count for name, count in report.passed.items() if name != report.format}
    for name, count in others.items():
        print(_wrapped(f"{_whose(name)} ({name}): {count} of {total}; the template follows {_whose(report.format)}"))
    rows = [finding for finding in report.findings if show_all or finding.status != "same"]
    wide = max((len(finding.case) for finding in rows), default=0)
    for finding in rows:
        status = styled(f"{finding.status:<9}", _STATUS[finding.status], sys.stdout)
        why = ", ".join(finding.reasons) or ("" if finding.status == "same" else "not a known deviation")
        print(f"  {finding.case:<{wide}}  {status}  {why}".rstrip())


def _whose(name: str) -> str:
    return "Hugging Face's way of writing" if name.endswith("-hf") else "Meta's way of writing"


def _show_finding(finding: Finding) -> None:
    print(styled(finding.case, "bold", sys.stdout) + f" ({finding.status})")
    if finding.expected is None or finding.got is None:
        who = "herd refuses" if finding.expected is None else "the template fails"
        print(f"  {who}: {safe(finding.message)}")
    if finding.expected is None and finding.got is not None:
        for line in _lines(finding.got):
            print(f"  + {_marked(line)}")
    elif finding.got is not None and finding.expected is not None:
        for sign, line in _difference(_lines(finding.expected), _lines(finding.got)):
            style = {"-": "red", "+": "green"}.get(sign)
            print(
                "  "
                + (
                    f"{sign} {_marked(line)}"
                    if style is None
                    else f"{styled(sign, style, sys.stdout)} {_marked(line, style)}"
                )
            )


def _show_meanings(differing: Sequence[Finding]) -> None:
    from herd.chat.deviations import MEANINGS

    counts: dict[str, int] = {}
    for finding in differing:
        for reason in finding.reasons:
            counts[reason] = counts.get(reason, 0) + 1
    if counts:
        print("\n" + styled("What it means", "bold", sys.stdout))
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(_wrapped(f"{reason} ({count} {'case' if count == 1 else 'cases'}): {MEANINGS[reason]}"))


def _show_tokens(report: Report, checked_ids: bool) -> None:
    print("\n" + styled("Tokens", "bold", sys.stdout))
    if report.forged:
        text = (
            f"A template's text is tokenized as a whole: the names of {report.forged} special tokens in a user's text "
            "become those tokens, so a user can forge turns in programs that work so. herd encodes contents apart: there "
            "they stay text."
        )
        print(_wrapped(text))
    else:
        print("  The special names in the test case did not reach the prompt.")
    if report.other_ids:
        said = f"Same text, other ids, as tokens join over the border of two texts: {', '.join(report.other_ids)}"
        print(_wrapped(said))
    elif checked_ids:
        print("  Where the text is the same, so are the ids.")


def _wrapped(text: str) -> str:
    """As wide as the terminal, two spaces in."""
    width = max(40, min(shutil.get_terminal_size((100, 24)).columns, 120))
    return textwrap.fill(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _lines(text: str) -> list[str]:
    """`text` cut behind line ends and behind tokens that close a message."""
    return _LINES.findall(text)


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Signs and lines: what both have around a difference, then ours (-) and theirs (+)."""
    for group in SequenceMatcher(None, ours, theirs, autojunk=False).get_grouped_opcodes(AROUND):
        for kind, i, j, k, m in group:
            if kind == "equal":
                yield from ((" ", line) for line in ours[i:j])
                continue
            yield from (("-", line) for line in ours[i:j])
            yield from (("+", line) for line in theirs[k:m])


def _marked(line: str, style: str | None = None) -> str:
    """A line with special tokens in their own colour, and the white space at its ends visible."""
    body = line.removesuffix("\n")
    end = "\u21b5" if body != line else ""
    inner = body.strip(" ")
    before = len(body) - len(body.lstrip(" ")) if inner else len(body)
    after = len(body) - before - len(inner)
    shown = "\u00b7" * before + safe(inner).replace("\t", "\u2192") + "\u00b7" * after + end
    out, at = [], 0
    for match in _SPECIAL.finditer(shown):
        out += [_painted(shown[at : match.start()], style), styled(match.group(), "yellow", sys.stdout)]
        at = match.end()
    return "".join([*out, _painted(shown[at:], style)])


def _painted(text: str, style: str | None) -> str:
    return text if style is None or not text else styled(text, style, sys.stdout)

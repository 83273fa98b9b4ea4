"""Ways in which chat templates are known to differ from what a model was trained on, how they are recognised, and what they
mean for the user. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from herd.chat.letters import Letters
from herd.chat.lint_cases import Case
from herd.chat.sandbox import Outcome

__all__ = ["MEANINGS", "explain"]

MEANINGS: Mapping[str, str] = {
    "double-bos": (
        "The prompt begins with the beginning-of-text token twice. The model never saw that: positions shift,"
        " greedy answers and benchmark scores change."
    ),
    "no-bos": (
        "The prompt has no beginning-of-text token. Programs that run templates do not add one, and answers get worse."
    ),
    "before-bos": "Text stands in front of the beginning-of-text token. It is read as part of the prompt.",
    "no-generation-prompt": ("add_generation_prompt opens no reply. The model may go on writing the user's message."),
    "always-generation-prompt": (
        "A reply is opened though add_generation_prompt is off. Training examples end with an empty reply."
    ),
    "dropped-system": "The system text is not in the prompt: the model never sees it.",
    "default-system": "The template writes a system message that nobody gave.",
    "date-lines": (
        "The template writes lines about the knowledge cut-off and today's date, as the Hugging Face "
        "templates of 3.1 to 3.3 do; Meta's code does not."
    ),
    "no-date-lines": ("The Hugging Face templates of 3.1 to 3.3 write lines about dates here; this template does not."),
    "trimmed": (
        "White space around contents is cut off. Meta's code keeps it: the model sees another text than the user wrote."
    ),
    "untrimmed": "White space around contents is kept where the format cuts it off.",
    "dropped-content": "A message's text is not in the prompt, or not as it was written.",
    "dropped-tools": "The tools are not in the prompt: the model cannot know them.",
    "tools-elsewhere": (
        "The tools are described in other words or in another place than the format's. Models follow the "
        "wording that they were trained on best."
    ),
    "dropped-calls": "Past tool calls are not in the prompt: the model sees results that nobody asked for.",
    "calls-otherwise": "Past tool calls are written in another form than the format's.",
    "quoted-results": (
        "Results of tools that are text are written as JSON strings, with quotes and escapes. The Hugging "
        "Face templates do so; Meta's code does not."
    ),
    "unquoted-results": (
        "Results of tools are written as they are, where the Hugging Face templates write JSON strings."
    ),
    "empty-tool-calls": (
        "An empty list of tool calls is taken for a call. Many programs send one with every reply; leave the "
        "field out, or test its length in the template."
    ),
    "one-call-only": "Only one tool call per message can be written.",
    "refuses-order": "The template insists on an order of roles that the format does not need.",
    "accepts-order": "The template writes an order of roles that the model was not trained on.",
    "accepts-tools": (
        "The format has no tools, and the template does not say so: tools, calls or results are dropped or "
        "misplaced silently."
    ),
    "closing": (
        "A message closes with another token than the format's: the end of a turn and the end of a message "
        "that waits for a tool are mixed up."
    ),
    "no-parts": "Content that is a list of text parts is refused or printed as Python.",
    "accepts-tags": (
        "A user's text with the format's own tags is written as it is. A user can forge turns with it, which "
        "Meta's code refuses."
    ),
}
"""What each known deviation means, for people."""


def explain(case: Case, expected: str | None, got: str | None, outcome: Outcome, letters: Letters) -> tuple[str, ...]:
    """Names of the known deviations that a difference shows; empty when it is none of them. `expected` is None where herd
    refuses the conversation, `got` where the template does."""
    if got is None:
        return tuple(_of_refusal(case, outcome))
    if expected is None:
        return tuple(_of_acceptance(case, got))
    return tuple(dict.fromkeys([*_of_frame(case, expected, got, letters), *_of_contents(case, expected, got)]))


def _of_refusal(case: Case, outcome: Outcome) -> Iterator[str]:
    if any(message.get("tool_calls") == [] for message in case.messages):
        yield "empty-tool-calls"
    if any(len(message.get("tool_calls") or ()) > 1 for message in case.messages):
        yield "one-call-only"
    if any(isinstance(message["content"], list) for message in case.messages):
        yield "no-parts"
    roles = [message["role"] for message in case.messages if message["role"] != "system"]
    usual = all(role == ("user" if i % 2 == 0 else "assistant") for i, role in enumerate(roles))
    if outcome.kind == "raised" and not case.tools and (not usual or case.messages[-1]["role"] == "system"):
        yield "refuses-order"
    if outcome.kind == "raised" and any(message["role"] == "system" for message in case.messages[:1]):
        yield "dropped-system"


def _of_acceptance(case: Case, got: str) -> Iterator[str]:
    if case.tools or any(message.get("tool_calls") or message["role"] == "tool" for message in case.messages):
        yield "accepts-tools"
    elif case.name.startswith("special tokens"):
        yield "accepts-tags"
    else:
        yield "accepts-order"


def _of_frame(case: Case, expected: str, got: str, letters: Letters) -> Iterator[str]:
    """How the prompt begins and ends, and messages that nobody wrote."""
    bos = letters.piece(letters.special.bos)
    if got.startswith(bos * 2):
        yield "double-bos"
    elif bos not in got[: len(bos) * 3]:
        yield "no-bos"
    elif not got.startswith(bos):
        yield "before-bos"
    opened = _opening(expected) or _opening(got)
    if opened and case.generate and expected.endswith(opened) and not got.rstrip().endswith(opened.rstrip()):
        yield "no-generation-prompt"
    if opened and not case.generate and got.endswith(opened) and not expected.endswith(opened):
        yield "always-generation-prompt"
    asked = any(message["role"] == "system" for message in case.messages)
    dated, wanted = "Cutting Knowledge Date" in got, "Cutting Knowledge Date" in expected
    if dated != wanted:
        yield "date-lines" if dated else "no-date-lines"
    elif not asked and not case.tools and _has_system(got) and not _has_system(expected):
        yield "default-system"


def _opening(text: str) -> str:
    """The header of an open reply at the end of a prompt."""
    for start in ("<|start_header_id|>assistant", "<|header_start|>assistant", " Source: assistant"):
        at = text.rfind(start)
        if at >= 0 and len(text) - at < 60:
            return text[at:]
    return ""


def _has_system(text: str) -> bool:
    return any(mark in text for mark in (">system<|", "<<SYS>>", "Source: system"))


def _of_contents(case: Case, expected: str, got: str) -> Iterator[str]:
    """What became of the texts, the tools and the calls."""
    for message in case.messages:
        yield from _of_message(message, expected, got)
    for tool in case.tools:
        name = str(tool["function"]["name"])
        described = str(tool["function"]["description"])
        if described not in got:
            yield "dropped-tools"
        elif got.find(described) - got.find(name) != expected.find(described) - expected.find(name) or (
            _owner(got, described) != _owner(expected, described)
        ):
            yield "tools-elsewhere"
    if any(message.get("tool_calls") for message in case.messages):
        ends = [[text.count(end) for end in ("<|eom_id|>", "<|eom|>")] for text in (expected, got)]
        if ends[0] != ends[1]:
            yield "closing"


def _of_message(message: Mapping[str, Any], expected: str, got: str) -> Iterator[str]:
    content = message["content"]
    if isinstance(content, list):
        if "'type'" in got or '"type"' in got:
            yield "no-parts"
            return
        content = "".join(part["text"] for part in content)
    quoted = json.dumps(content, ensure_ascii=False)
    if message["role"] == "tool" and content:
        if quoted in got and quoted not in expected:
            yield "quoted-results"
        elif quoted in expected and quoted not in got and content in got:
            yield "unquoted-results"
        elif content not in got and quoted not in got:
            yield "dropped-content"
    elif content.strip() and content.strip() not in got:
        yield "dropped-system" if message["role"] == "system" else "dropped-content"
    elif content != content.strip():
        if content in expected and content not in got:
            yield "trimmed"
        elif content in got and content not in expected:
            yield "untrimmed"
    for call in message.get("tool_calls") or ():
        name = str(call["function"]["name"])
        # The name also stands in the description of the tool.
        if got.count(name) < expected.count(name) and all(
            f"{mark}" not in got for mark in (f"[{name}(", f'"name": "{name}", "par')
        ):
            yield "dropped-calls"
        elif (f"[{name}(" in got) != (f"[{name}(" in expected):
            yield "calls-otherwise"


def _owner(text: str, part: str) -> str:
    """The role of the message that holds `part`."""
    before = text[: text.find(part)]
    at = max(before.rfind("<|start_header_id|>"), before.rfind("<|header_start|>"))
    return before[at : at + 40].split("|>")[1].split("<|")[0] if at >= 0 else ""

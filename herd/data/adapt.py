"""Rows to records: the shapes that training files have, recognised by their fields. No torch.

| kind       | fields                                                                | record              |
|------------|-----------------------------------------------------------------------|---------------------|
| text       | `text`                                                                | TextRecord          |
| messages   | `messages` (OpenAI, Hugging Face), `tools`                            | ChatRecord          |
| sharegpt   | `conversations` of `from` and `value` (or role and content), `system`, `tools` | ChatRecord |
| alpaca     | `instruction`, `input`, `output`, `system`, `history`                 | ChatRecord          |
| completion | `prompt`, `completion`: texts, or messages                            | CompletionRecord, ChatRecord |
| preference | `prompt`, `chosen`, `rejected`: texts or messages (prompt may be left out) | PreferenceRecord |
| prompt     | `prompt`: text or messages                                            | PromptRecord        |

Other fields are left alone. Which kind a file holds is `herd.data.kinds`'s to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

from herd.chat.messages import Message
from herd.data.conversation import check_prompt, check_reply, conversation, messages_in, tools_of
from herd.data.files import find_files, form_of
from herd.data.kinds import KINDS, Kind, looks_like, one_kind, recognise
from herd.data.read import Row, read_file, type_name
from herd.data.records import ChatRecord, CompletionRecord, PreferenceRecord, PromptRecord, Record, TextRecord
from herd.data.report import BadRows, RowReport
from herd.errors import DataError
from herd.files import short

__all__ = ["KINDS", "Kind", "adapt", "kind_of", "recognise", "records", "rows_with_records"]

LOOKED_AT = 20
"""Rows at the start of a file that decide its kind."""


def records(
    path: Path | str, kind: Kind | None = None, *, bad: BadRows = "stop", report: RowReport | None = None
) -> Iterator[Record]:
    """The records of every file that `path` means, in file order; each knows its `where` (`file:line`).

    `kind` None recognises each file (`recognise`). A row that cannot be read or used ends the reading with a DataError
    `file:line: reason`, or with `bad="skip"` is left out, counted and named in `report`. The decision on a row depends on
    that row and the kind of its file alone. Where that was recognised, a row of another kind ends the reading either way.
    """
    return (record for _, record in rows_with_records(path, kind, bad=bad, report=report))


def rows_with_records(
    path: Path | str,
    kind: Kind | None = None,
    *,
    bad: BadRows = "stop",
    report: RowReport | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[Row, Record]]:
    """As `records`, each beside the row that it was made of. `tick` is told the bytes read so far, of all files' bytes."""
    if kind is not None and kind not in KINDS:
        raise DataError(f"there is no kind of rows {kind!r}; choose one of {', '.join(KINDS)}")
    report = RowReport() if report is None else report
    files = find_files(path, report.note)
    total, before = sum(file.stat().st_size for file in files), 0
    for file in files:
        rows = read_file(file, report, bad=bad, at=lambda position, before=before: tick(before + position, total))
        before += file.stat().st_size
        first = list(islice(rows, LOOKED_AT if kind is None else 1))
        if not first:  # every row of it is in the report as a bad one
            continue
        found = _kind_of_file(file, first, kind, report)
        for row in chain(first, rows):
            try:
                yield row, adapt(row, found, report)
            except DataError as error:
                mixed = one_kind(str(error)) if kind is None else None
                if bad == "stop" or mixed is not None:
                    raise DataError(f"{row.where}: {mixed or error}") from error
                report.good -= 1
                report.reject(row.path, row.line, str(error))


def kind_of(file: Path) -> Kind | None:
    """The kind of one file, as `records` takes it; None when none of its rows can be read. Raises DataError for no kind."""
    if form_of(file) == "text":
        return "text"
    rows = list(islice(read_file(file, RowReport(), bad="skip"), LOOKED_AT))
    return recognise(rows) if rows else None


def _kind_of_file(file: Path, first: Sequence[Row], kind: Kind | None, report: RowReport) -> Kind:
    if kind is None:
        kind = "text" if form_of(file) == "text" else recognise(first)
        report.note(f"{file}: read as {kind}")
    return kind


def adapt(row: Row, kind: Kind, report: RowReport | None = None) -> Record:
    """The record in a row of `kind`. Raises DataError with the reason alone; `report` counts small repairs."""
    try:
        return _ADAPTERS[kind](row, RowReport() if report is None else report)
    except DataError as error:
        if other := looks_like(row.fields, kind):
            raise DataError(f"{other}{error}") from error
        raise


def _source(row: Row) -> dict[str, Any]:
    source = row.fields.get("source")
    return {"source": source if isinstance(source, str) else "", "where": row.where}


def _text(row: Row, report: RowReport) -> TextRecord:
    title = row.fields.get("title")
    return TextRecord(_said(row.fields, "text"), title if isinstance(title, str) else "", **_source(row))


def _given(fields: Mapping[str, Any], name: str) -> Any:
    """A field that has to be there. Raises DataError, with a field of nearly that name where there is one."""
    value = fields.get(name)
    if value is None:
        near = get_close_matches(name, [other for other in fields if other != name], 1, 0.8)
        raise DataError(f"{name} is missing" + (f": rename {short(near[0])} if that is it" if near else ""))
    return value


def _said(fields: Mapping[str, Any], name: str) -> str:
    """A text field with something in it."""
    value = _given(fields, name)
    if not isinstance(value, str):
        raise DataError(f"{name} is {type_name(value)}, expected text")
    if not value.strip():
        raise DataError(f"{name} is empty")
    return value


def _optional(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{name} is {type_name(value)}, expected text")
    return value or ""


def _messages(row: Row, report: RowReport) -> ChatRecord:
    return _chat(row, conversation(_given(row.fields, "messages"), "messages", report), report)


_SEEN = ("images", "image", "videos", "video", "audios", "audio")


def _only_text(fields: Mapping[str, Any]) -> None:
    """Raise DataError for what TRL and others keep beside the messages and herd cannot train on."""
    for name in _SEEN:
        if fields.get(name):
            raise DataError(f"{name} beside the messages: training reads text only")


def _chat(row: Row, messages: Sequence[Message], report: RowReport, given: int = 0) -> ChatRecord:
    _only_text(row.fields)
    tools = tools_of(row.fields)
    check_reply(messages, tools, report, given)
    return ChatRecord(tuple(messages), tools, given, **_source(row))


def _alpaca(row: Row, report: RowReport) -> ChatRecord:
    fields = row.fields
    asked, extra = _said(fields, "instruction"), _optional(fields, "input")
    turns: list[Any] = [{"role": "system", "content": text} for text in [_optional(fields, "system")] if text.strip()]
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history is {type_name(history)}, expected a list of pairs")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{i}] is no pair of a question and a reply")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns.append({"role": "user", "content": f"{asked}\n\n{extra}" if extra.strip() else asked})
    turns.append({"role": "assistant", "content": _said(fields, "output")})
    return _chat(row, conversation(turns, "the row", report), report)


_SHAREGPT = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "call",
}  # fmt: skip
"""Speakers in ShareGPT files and their descendants (Vicuna, LLaMA-Factory, Hermes) as roles; `call` is a tool call as JSON."""


def _sharegpt(row: Row, report: RowReport) -> ChatRecord:
    fields = row.fields
    said = messages_in(_given(fields, "conversations"), "conversations")
    turns: list[Any] = [{"role": "system", "content": text} for text in [_optional(fields, "system")] if text.strip()]
    for i, item in enumerate(said):
        if not isinstance(item, Mapping):
            raise DataError(f"message {i} is {type_name(item)}: expected an object with from and value")
        if "from" not in item:
            turns.append(item)
            continue
        role = _SHAREGPT.get(item["from"]) if isinstance(item["from"], str) else None
        if role is None:
            raise DataError(f"message {i} is from {item['from']!r}: expected one of {', '.join(_SHAREGPT)}")
        value = item.get("value")
        if not isinstance(value, str):
            raise DataError(f"message {i} ({item['from']}): value is {'missing' if value is None else 'no text'}")
        if item.get("weight") not in (None, 1):
            raise DataError(f"message {i}: weight {item['weight']!r}: single messages cannot be left out of the loss")
        turns.append(_call(i, value) if role == "call" else {"role": role, "content": value})
    return _chat(row, conversation(turns, "conversations", report), report)


def _call(i: int, value: str) -> dict[str, Any]:
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"message {i}: the function call is not JSON ({error})") from error
    return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _completion(row: Row, report: RowReport) -> CompletionRecord | ChatRecord:
    prompt, reply = _given(row.fields, "prompt"), row.fields.get("completion")
    if isinstance(prompt, list):
        given = conversation(prompt, "prompt", report)
        messages = (*given, *_reply(reply, "completion", report))
        return _chat(row, messages, report, len(given))
    if not isinstance(prompt, str):  # an empty prompt is fine: the completion is learned from nothing
        raise DataError(f"prompt is {type_name(prompt)}, expected text")
    return CompletionRecord(prompt, _said(row.fields, "completion"), **_source(row))


def _reply(value: Any, name: str, report: RowReport) -> tuple[Message, ...]:
    """What answers a prompt of messages: messages, or a text, which is then an assistant message."""
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{name} is empty")
        return (Message("assistant", value),)
    return conversation(value, name, report)


def _preference(row: Row, report: RowReport) -> PreferenceRecord:
    fields = row.fields
    prompt, chosen, rejected = (fields.get(name) for name in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        for name in ("chosen", "rejected"):
            _said(fields, name)
        return PreferenceRecord(_optional(fields, "prompt"), chosen, rejected, **_source(row))
    good, poor = _reply(chosen, "chosen", report), _reply(rejected, "rejected", report)
    if isinstance(prompt, list):
        asked = conversation(prompt, "prompt", report)
    else:  # TRL's implicit prompt: what both begin with
        shared = next(
            (i for i, (a, b) in enumerate(zip(good, poor, strict=False)) if a != b), min(len(good), len(poor))
        )
        asked, good, poor = good[:shared], good[shared:], poor[shared:]
        if isinstance(prompt, str) and prompt and all(message.text != prompt for message in asked):
            asked = asked or (Message("user", prompt),)
            if asked[-1].text != prompt:
                raise DataError("prompt is not among the messages that chosen and rejected begin with")
    _only_text(fields)
    if not asked:
        raise DataError("there is no prompt: no field, and chosen and rejected begin with nothing in common")
    tools = tools_of(fields)
    check_prompt(asked, tools, report)
    for reply in (good, poor):
        if not reply:
            raise DataError("one of chosen and rejected holds nothing but the prompt")
        check_reply((*asked, *reply), tools, report, len(asked))
    return PreferenceRecord(asked, good, poor, tools, **_source(row))


def _prompt(row: Row, report: RowReport) -> PromptRecord:
    prompt = row.fields.get("prompt")
    answer = row.fields.get("answer")
    known = answer if isinstance(answer, str) else ""
    if isinstance(prompt, list):
        messages, tools = conversation(prompt, "prompt", report), tools_of(row.fields)
        check_prompt(messages, tools, report)
        return PromptRecord(messages, tools, known, **_source(row))
    return PromptRecord(_said(row.fields, "prompt"), answer=known, **_source(row))


_ADAPTERS: Mapping[Kind, Callable[[Row, RowReport], Record]] = {
    "text": _text,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completion": _completion,
    "preference": _preference,
    "prompt": _prompt,
}

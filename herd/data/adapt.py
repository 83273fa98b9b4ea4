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

Other fields are left alone. The kind is decided once for each file from its first rows, and said; a file whose first rows fit
two kinds, or disagree, is refused until the caller names one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

from herd.chat.messages import Message
from herd.data.conversation import check_prompt, check_reply, conversation, tools_of
from herd.data.files import find_files, form_of
from herd.data.read import Row, read_file
from herd.data.records import ChatRecord, CompletionRecord, PreferenceRecord, PromptRecord, Record, TextRecord
from herd.data.report import BadRows, RowReport
from herd.errors import DataError

__all__ = ["KINDS", "Kind", "adapt", "kind_of", "recognise", "records", "rows_with_records"]

Kind = Literal["text", "messages", "sharegpt", "alpaca", "completion", "preference", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)

LOOKED_AT = 20
"""Rows at the start of a file that decide its kind."""


def records(
    path: Path | str, kind: Kind | None = None, *, bad: BadRows = "stop", report: RowReport | None = None
) -> Iterator[Record]:
    """The records of every file that `path` means, in file order; each knows its `where` (`file:line`).

    `kind` None recognises each file (`recognise`). A row that cannot be read or used ends the reading with a DataError
    `file:line: reason`, or with `bad="skip"` is left out, counted and named in `report`. The decision on a row depends on
    that row and the kind of its file alone.
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
                if bad == "stop":
                    raise DataError(f"{row.where}: {error}") from error
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


def recognise(rows: Sequence[Row]) -> Kind:
    """The kind that the fields of `rows`, the first of a file, agree on; rows that fit none are passed over.

    Raises DataError when no row fits a kind, a row fits two, or two rows fit different ones.
    """
    found: dict[Kind, Row] = {}
    for row in rows:
        fitting = _fitting(row)
        if len(fitting) > 1:
            raise DataError(
                f"{row.where}: the fields {_named(row.fields)} fit {' and '.join(fitting)}: "
                "say which is meant (--kind, or kind in the config)"
            )
        for kind in fitting:
            found.setdefault(kind, row)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise DataError(
            f"{first.where} looks like {one} and {second.where} like {other}: a file holds rows of one kind "
            "(--kind, or kind in the config, says which; rows of other kinds are then bad rows)"
        )
    if not found:
        raise DataError(
            f"{rows[0].where}: the fields {_named(rows[0].fields)} are of no kind that is known: "
            "text, messages, conversations, instruction and output, prompt (and completion), chosen and rejected"
        )
    return next(iter(found))


def _fitting(row: Row) -> list[Kind]:
    fields = row.fields

    def there(*names: str) -> bool:
        return all(fields.get(name) is not None for name in names)

    if isinstance(fields.get("label"), bool) and (there("messages") or there("prompt", "completion")):
        raise DataError(
            f"{row.where}: a label of true and false says which replies are good (unpaired preferences): training on all "
            "of them would learn the bad ones; keep the good rows, without the label"
        )
    if there("prompt", "completions"):
        raise DataError(
            f"{row.where}: a verdict on each step of a reply (completions and labels): nothing in herd trains on that; a whole "
            "reply is called completion"
        )
    strong: list[Kind] = []
    if there("messages"):
        strong.append("messages")
    if there("conversations"):
        strong.append("sharegpt")
    if there("instruction", "output"):
        strong.append("alpaca")
    if there("prompt", "completion"):
        strong.append("completion")
    if there("chosen", "rejected"):
        strong.append("preference")
    if strong:
        return strong
    weak: list[Kind] = [kind for kind in ("text", "prompt") if there(kind)]  # type: ignore[misc]
    if weak == ["prompt"] and (replies := [name for name in _REPLIES if there(name)]):
        raise DataError(
            f"{row.where}: the fields {_named(fields)} look like a prompt and its reply: rename {replies[0]!r} to completion "
            "(or say --kind prompt when only the prompt is meant)"
        )
    return weak


_REPLIES = ("response", "output", "reply", "target", "completion_text")
"""What other data sets call a reply. A prompt alone teaches nothing, so leaving one of these out in silence is never meant."""


def _named(fields: Mapping[str, Any]) -> str:
    names = [repr(name[:40]) for name in islice(fields, 8)]
    return ", ".join(names) + (", ..." if len(fields) > 8 else "") if names else "(none)"


def adapt(row: Row, kind: Kind, report: RowReport | None = None) -> Record:
    """The record in a row of `kind`. Raises DataError with the reason alone; `report` counts small repairs."""
    return _ADAPTERS[kind](row, RowReport() if report is None else report)


def _source(row: Row) -> dict[str, Any]:
    source = row.fields.get("source")
    return {"source": source if isinstance(source, str) else "", "where": row.where}


def _text(row: Row, report: RowReport) -> TextRecord:
    title = row.fields.get("title")
    return TextRecord(_said(row.fields, "text"), title if isinstance(title, str) else "", **_source(row))


def _said(fields: Mapping[str, Any], name: str) -> str:
    """A text field with something in it."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise DataError(f"{name} is {'missing' if value is None else f'a {type(value).__name__}, expected text'}")
    if not value.strip():
        raise DataError(f"{name} is empty")
    return value


def _optional(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{name} is a {type(value).__name__}, expected text")
    return value or ""


def _messages(row: Row, report: RowReport) -> ChatRecord:
    return _chat(row, conversation(row.fields.get("messages"), "messages", report), report)


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
        raise DataError(f"history is a {type(history).__name__}, expected a list of pairs")
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
    said = fields.get("conversations")
    if not isinstance(said, list) or not said:
        raise DataError("conversations is no list of messages, or an empty one")
    turns: list[Any] = [{"role": "system", "content": text} for text in [_optional(fields, "system")] if text.strip()]
    for i, item in enumerate(said):
        if not isinstance(item, Mapping):
            raise DataError(f"message {i} is a {type(item).__name__}: expected an object with from and value")
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
    prompt, reply = row.fields.get("prompt"), row.fields.get("completion")
    if isinstance(prompt, list):
        given = conversation(prompt, "prompt", report)
        messages = (*given, *_reply(reply, "completion", report))
        return _chat(row, messages, report, len(given))
    if not isinstance(prompt, str):  # an empty prompt is fine: the completion is learned from nothing
        raise DataError(f"prompt is {'missing' if prompt is None else f'a {type(prompt).__name__}, expected text'}")
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

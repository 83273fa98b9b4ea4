"""Chat templates in herd's own words: one Jinja source per prompt format, for checkpoints that have none. No torch.

A template writes, as text, what the format's renderer writes as ids, and calls `raise_exception` where that refuses. It is run
as transformers' `apply_chat_template` runs templates: with `messages`, `tools`, `add_generation_prompt`, `bos_token` and
`eos_token`. `builtin_tools` (names), `date_string`, `categories` and `excluded_category_keys` are taken where the format has
them. BOS stands in it once, so its text is to be encoded without adding another.

Two things no template can do: the text is encoded as a whole, so special names that a user wrote become special tokens, and
tokens may join over the border of header and content ("\\n\\n" in front of content that begins with a line end).

The first line names the format, and `herd.chat.formats.detect` reads it back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache

from herd.chat import template_parts as parts
from herd.chat.dialects import JSON_INTRODUCTION, LLAMA4_SYSTEM, PYTHONIC_SYSTEM
from herd.chat.guard_categories import CATEGORIES, OWN_POLICY
from herd.chat.toolspec import BUILTIN_TOOLS

__all__ = ["named_in", "template_of"]

_NAME = re.compile(r"\{#- herd prompt format: ([A-Za-z0-9.-]{1,40}) -#\}")


def template_of(format_name: str) -> str | None:
    """The chat template of a prompt format (a name of `herd.chat.formats.FORMATS`); None for `base`, which has no
    conversations, and for names that are not a format."""
    source = _source(format_name)
    return None if source is None else f"{{#- herd prompt format: {format_name} -#}}\n{source}"


def named_in(template: str) -> str | None:
    """The format that a template of herd's names in its first line; None for a template from elsewhere."""
    found = _NAME.match(template)
    return None if found is None else found.group(1)


@cache
def _source(name: str) -> str | None:
    if name in ("llama2", "codellama"):
        tags = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", *(["<step>"] if name == "codellama" else [])]
        return _filled(parts.LLAMA2, {"TAGS": json.dumps(tags)})
    if name == "codellama-70b":
        return parts.CODELLAMA_70B
    if name in CATEGORIES:
        return _guard(name)
    if name in _HEADERS:
        return _headers(name)
    return None


def _filled(source: str, places: Mapping[str, str]) -> str:
    """`source` with every `@NAME@` filled; lines that hold nothing else than an empty place go."""
    for place, value in places.items():
        if not value:
            source = re.sub(rf"^[ ]*@{place}@\n", "", source, flags=re.MULTILINE)
        source = source.replace(f"@{place}@", value)
    return source


def _literal(text: str) -> str:
    """`text` as a Jinja string."""
    return json.dumps(text)


# ---- Llama Guard ----------------------------------------------------------------------------------------------------

_LLAMA3_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA4_HEADERS = ("<|header_start|>", "<|header_end|>", "<|eot|>")
# Format: headers (None: the tags of Llama 2), text behind the question, text behind the header of the answer.
_GUARDS = {
    "llama-guard-1": (None, "", ""),
    "llama-guard-2": (_LLAMA3_HEADERS, "", "\n\n"),
    "llama-guard-3": (_LLAMA3_HEADERS, "", ""),
    "llama-guard-3-1b": (_LLAMA3_HEADERS, " ", ""),
    "llama-guard-4": (_LLAMA4_HEADERS, "", "\n\n"),
}


def _guard(name: str) -> str:
    """The prompt of `GuardFormat` with its default policy: herd's own sentences for Guard 1 and 2, names for 3 and 4."""
    policies = OWN_POLICY if name in ("llama-guard-1", "llama-guard-2") else {}
    titles = CATEGORIES[name].items()
    listed = {code: f"{title}." + (f"\n{policies[title]}" if title in policies else "") for code, title in titles}
    headers, spaced, reply = _GUARDS[name]
    if headers is None:
        opened, closed, answer = "[INST] ", " [/INST]", ""
    else:
        start, end, turn = headers
        opened, closed, answer = f"{start}user{end}\n\n", f"{spaced}{turn}", f"{start}assistant{end}{reply}"
    old = name == "llama-guard-1"
    places = {
        "CATEGORIES": json.dumps(listed, indent=4),
        "OPEN": _literal(opened),
        "CLOSE": _literal(closed),
        "REPLY": _literal(answer),
        "JUDGED": "agent + ' in'" if old else "'ONLY THE LAST ' + agent + ' message in'",
        "DASH": "-" if old else " -",
    }
    return _filled(parts.GUARD, places)


# ---- Llama 3 and 4 --------------------------------------------------------------------------------------------------

_HEADERS = {
    "llama3": "none",
    "llama3-hf": "none",
    "llama3.1": "json",
    "llama3.1-hf": "json",
    "llama3.2": "pythonic",
    "llama3.3": "pythonic",
    "llama4": "pythonic",
    "llama4-hf": "json",
}
"""How each format describes and calls functions."""

_PUNCTUATION = " !\"#$%&'()*+,/:;<=>?@[\\]^`{|}~\n\r\t"
"""What no name of a tool or an argument holds."""

_SYSTEM = "{{%- macro system_text(content) -%}}\n{body}{{%- endmacro -%}}\n"
_IN_FRONT = """\
    {%- if @WHEN@ -%}
        {%- set content = @TEXT@ + ('\\n\\n' + content if content else '') -%}
    {%- endif -%}
"""
_DATED = """\
    {%- if tools or about.switched -%}
        {{- 'Environment: ipython\\n' -}}
    {%- endif -%}
    {%- if about.switched -%}
        {{- 'Tools: ' + (about.switched | reject('equalto', 'code_interpreter') | join(', ')) + '\\n\\n' -}}
    {%- endif -%}
    {%- set today = date_string if date_string is defined and date_string else '26 Jul 2024' -%}
    {{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + today + '\\n\\n' + content -}}
"""
_SCOUT = """\
    {{- ('Environment: ipython\\n' if tools else '') + (content | trim) -}}
"""


def _headers(name: str) -> str:
    calls, hf, four = _HEADERS[name], name.endswith("-hf"), name.startswith("llama4")
    start, end, turn = _LLAMA4_HEADERS if four else _LLAMA3_HEADERS
    switched = not four  # built-in tools are switched on in the system message
    pieces = [parts.TEXT_OF]
    if calls == "none":
        pieces.append(parts.NO_TOOLS)
    else:
        pieces += [parts.CHECK_NAME, parts.TOOLS]
        pieces.append(parts.JSON_CALLS if calls == "json" else parts.PYTHON_CALLS)
        pieces += [parts.FIRST_USER] if calls == "json" else []
        pieces += [] if name == "llama4-hf" else [parts.CALLS]
        pieces += [parts.LINES] if switched and not hf else []
        pieces += [parts.WAITS] if switched else []
    pieces += [_system_macro(name, calls), parts.HEADERS]
    places = {
        "PLACED": _placed(calls),
        "BODY": _body(name, calls),
        "CONTENT": _content(name),
        "WAITS": _waits(name, calls),
        "OPENING": "''" if name == "llama4-hf" else "system_text('')",
        "SCHEMA": "schema"
        if calls == "json"
        else "{'type': 'dict', 'required': schema['required'] or [], 'properties': schema['properties'] or {}}",
        "SWITCHED": "true" if switched else "false",
        "BUILTIN": json.dumps({tool.name: tool.parameters for tool in BUILTIN_TOOLS.values()}, indent=4),
        "PUNCTUATION": json.dumps(list(_PUNCTUATION)),
        "INTRODUCTION": _literal(JSON_INTRODUCTION),
        "JOINT": "''" if four else "'; '",
        "CODE": "'<|python_start|>' + seen.code + '<|python_end|>'" if four else "'<|python_tag|>' + seen.code",
        "START": start,
        "END": end,
        "TURN": turn,
        "MESSAGE": "<|eom|>" if four else "<|eom_id|>",
    }
    return _filled("".join(pieces), places)


def _system_macro(name: str, calls: str) -> str:
    """The macro that writes the system text: of the system message, or, with none, what the format says on its own."""
    if name == "llama3.1-hf":
        body = _DATED
    elif name == "llama4-hf":
        body = _SCOUT
    elif calls == "none":
        body = "    {{- content -}}\n"
    else:
        words = LLAMA4_SYSTEM if name == "llama4" else PYTHONIC_SYSTEM
        described = {"WHEN": "about.own", "TEXT": f"{_literal(words)} + (about.own | tojson(indent=4))"}
        body = _filled(_IN_FRONT, described) if calls == "pythonic" else ""
        body += "" if name == "llama4" else _filled(_IN_FRONT, {"WHEN": "about.switched", "TEXT": "switch_lines()"})
        body += "    {{- content -}}\n"
    return _SYSTEM.format(body=body)


def _content(name: str) -> str:
    """The expression for a message's text."""
    text = "text_of(message['content'])"
    if name == "llama4-hf":
        # The first turn is trimmed only when there are tools.
        spoken = "(0 if messages[0]['role'] not in ['system', 'developer'] else 1)"
        return f"({text} | trim) if tools and loop.index0 == {spoken} else {text}"
    return f"{text} if role == 'ipython' else ({text} | trim)" if name.endswith("-hf") else text


def _placed(calls: str) -> str:
    """The tools in front of the first user text."""
    if calls != "json":
        return ""
    described = "{{- described_tools() -}}"
    return f"{{%- if about.own and loop.index0 == speaker.first -%}}\n            {described}\n        {{%- endif -%}}"


def _body(name: str, calls: str) -> str:
    """Content and calls of a message."""
    quoted = "{%- if role == 'ipython' -%}\n            {%- set content = content | tojson -%}\n        {%- endif -%}\n        "
    if name == "llama4-hf":
        return (
            quoted + "{%- if calls -%}\n"
            "            {{- '<|python_start|>' + content + '<|python_end|>' + write_own_calls(calls) -}}\n"
            "        {%- else -%}\n            {{- content -}}\n        {%- endif -%}"
        )
    refused = "{{- raise_exception('Llama 3 was trained without tools and cannot write calls') -}}"
    written = refused if calls == "none" else "{{- write_calls(calls) -}}"
    dumped = quoted if name == "llama3.1-hf" else ""
    return f"{dumped}{{{{- content -}}}}\n        {{%- if calls -%}}\n            {written}\n        {{%- endif -%}}"


def _waits(name: str, calls: str) -> str:
    """When a message without a stop reason closes with the end-of-message token."""
    if name == "llama4":
        return "(calls or role == 'ipython')"
    return "false" if calls == "none" or name == "llama4-hf" else "calls and waits(calls)"

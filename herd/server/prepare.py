"""From a Call to a request that the engine will take, and what reads its reply. In the worker, in threads of its own. No torch.

Everything that takes long is here: tokenizing (tiktoken lets other threads run), rendering, compiling grammars (in a process of
its own, `herd.engine.grammar_trial`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from types import UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin

from herd.chat.base import BaseFormat
from herd.chat.callgrammar import calls_grammar
from herd.chat.format import ChatFormat, StreamParser, ToolSpec
from herd.chat.formats import FORMATS, format_named
from herd.chat.infill import Infill
from herd.chat.messages import Image, Message
from herd.chat.params import Constraint, SamplingParams
from herd.chat.promised import PromisedCalls
from herd.chat.render import messages_from
from herd.chat.reply import ReplyParser
from herd.chat.toolspec import check_tools, tools_from
from herd.engine.grammar_source import JSON_OPTIONS
from herd.engine.reply import ReplyBuilder
from herd.engine.request import Request
from herd.errors import ConfigError, ContextFullError, PromptError
from herd.server.protocol import Call, Chat, Ids, Text, Truncated
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Model", "Prepared", "Preparer", "conversation"]


class Model(Protocol):
    """What is needed of a `herd.LLM`."""

    tokenizer: Tokenizer

    @property
    def format(self) -> ChatFormat: ...

    def room(self, adapter: str | None = None) -> int: ...

    def params(self, **chosen: Any) -> SamplingParams: ...

    def compile(self, constraint: Constraint) -> None: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request, and a builder for each of its continuations."""

    request: Request
    builders: tuple[ReplyBuilder, ...]
    notes: tuple[str, ...] = ()
    truncated: Truncated | None = None
    prompt_text: str | None = None


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: Sequence[int]
    stop_ids: frozenset[int]
    parser: Callable[[], StreamParser]
    sampling: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    truncated: Truncated | None = None
    max_calls: int | None = None


class Preparer:
    """Makes the requests of one model. From any thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._base = BaseFormat(model.tokenizer)

    def prepared(self, call: Call) -> Prepared:
        """Raises PromptError, ConfigError, TokenizerError or ContextFullError: what is wrong with the call."""
        found = self._prompt(call)
        chosen = _lists(call.sampling) | dict(found.sampling)
        size = self._model.tokenizer.vocab_size
        if (wrong := next((i for i in chosen.get("stop_ids", ()) if i >= size), None)) is not None:
            raise ConfigError(f"stop_token_ids: {wrong:,} is no id of this model: ids are 0 to {size - 1:,}")
        if call.only_prompt:
            chosen["max_tokens"] = 1
        params = self._model.params(**chosen)
        if params.constraint is not None:
            self._model.compile(params.constraint)  # here, where nobody waits for it; the engine finds it ready
        request = Request(call.id, tuple(found.ids), params, found.stop_ids, call.adapter, call.salt)
        builders = tuple(
            ReplyBuilder(found.parser(), params, found.stop_ids, max_calls=found.max_calls)
            for _ in range(request.width)
        )
        text = self._model.tokenizer.decode(list(found.ids)) if call.echo else None
        return Prepared(request, builders, found.notes, found.truncated, text)

    def count(self, chat: Chat) -> int:
        """Tokens of a conversation as a prompt. Raises as `prepared`."""
        tools = () if chat.tool_choice == "none" else tools_from(chat.tools)
        return len(self._render(self._model.format, conversation(chat.messages), tools, chat).tokens)

    def _prompt(self, call: Call) -> _Prompt:
        match call.prompt:
            case Chat():
                return self._chat(call.prompt, call.sampling, self._model.room(call.adapter))
            case Text(text, None):
                return self._plain(self._base.complete(text).tokens)
            case Text(text, suffix):
                assert suffix is not None
                infill = Infill(self._model.tokenizer)
                return _Prompt(infill.prompt(text, suffix).tokens, infill.stop_ids, infill.parser, {})
            case Ids(ids):
                return self._plain(ids)

    def _plain(self, ids: Sequence[int]) -> _Prompt:
        return _Prompt(ids, self._base.stop_ids, self._base.parser, {})

    def _chat(self, chat: Chat, sampling: Mapping[str, Any], context: int) -> _Prompt:
        format = self._model.format
        if chat.format_options:
            _check_options(format.name, chat.format_options)
            format = format_named(format.name, self._model.tokenizer, **chat.format_options)
        messages = conversation(chat.messages)
        for i, message in enumerate(messages):
            if any(isinstance(part, Image) for part in message.parts):
                raise PromptError(f"messages[{i}] holds an image, and this model reads text only")
        tools = () if chat.tool_choice == "none" else tools_from(chat.tools)
        rendered_ids, notes, truncated = self._rendered(format, messages, tools, chat, sampling, context)
        rules = self._rules(format, tools, chat, sampling)
        form = chat.tool_choice == "auto" and any(sampling.get(name) for name in _FORMS)
        return _Prompt(
            rendered_ids,
            format.stop_ids,
            lambda: _parser(format, self._model.tokenizer, tools, rules, form),
            rules,
            notes,
            truncated,
            1 if tools and not chat.parallel else None,
        )

    def _rendered(
        self,
        format: ChatFormat,
        messages: tuple[Message, ...],
        tools: tuple[ToolSpec, ...],
        chat: Chat,
        sampling: Mapping[str, Any],
        context: int,
    ) -> tuple[list[int], tuple[str, ...], Truncated | None]:
        """The prompt's ids; with `truncate`, of the newest messages that fit into `context`, prompt and reply together."""
        rendered = self._render(format, messages, tools, chat)
        whole = len(rendered.tokens)
        if not chat.truncate or whole < context:
            return rendered.tokens, rendered.notes, None
        room = context - min(context // 4, sampling.get("max_tokens") or context)
        kept, dropped = messages, 0
        for shorter in _shorter(messages):
            kept, dropped = shorter, len(messages) - len(shorter)
            rendered = self._render(format, kept, tools, chat)
            if len(rendered.tokens) <= room:
                break
        if len(rendered.tokens) >= context:
            raise ContextFullError(
                f"without the {dropped} oldest of {len(messages)} messages the prompt still has {len(rendered.tokens):,} tokens, "
                f"and the context holds {context:,}: system messages, tools and the last message are never left out",
                needed=len(rendered.tokens) + 1,
                available=context,
            )
        return rendered.tokens, rendered.notes, Truncated(dropped, whole - len(rendered.tokens))

    def _render(
        self, format: ChatFormat, messages: tuple[Message, ...], tools: tuple[ToolSpec, ...], chat: Chat
    ) -> Any:
        if not chat.continue_final:
            return format.render(messages, tools, generate=chat.generation_prompt)
        if not messages or messages[-1].role != "assistant" or messages[-1].tool_calls:
            raise PromptError(
                "continue_final_message goes on with the last message, which must be the assistant's and hold text"
            )
        if not hasattr(format, "tokens"):
            raise PromptError(f"the {format.name} format cannot go on with a message: leave continue_final_message out")
        rendered = format.render(messages, tools, generate=False)
        ids, mask = list(rendered.tokens), list(rendered.loss_mask)
        while ids and ids[-1] in format.stop_ids:
            ids.pop()
            mask.pop()
        return replace(rendered, tokens=ids, loss_mask=mask)

    def _rules(
        self, format: ChatFormat, tools: tuple[ToolSpec, ...], chat: Chat, sampling: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The sampling fields that hold the reply to calls, and to the form of a reply that may also be a call."""
        form = {name: sampling[name] for name in _FORMS if sampling.get(name)}
        forced = chat.tool_choice in ("required", "named")
        if forced and not tools:
            raise PromptError(f"tool_choice is {chat.tool_choice!r}, but there are no tools")
        strict = any(isinstance(one, Mapping) and _strict(one) for one in chat.tools)
        if not tools or not (forced or form or strict):
            return {}
        if chat.tool_choice == "named":
            tools = tuple(tool for tool in tools if tool.name == chat.tool_name)
            if not tools:
                raise PromptError(f"tool_choice names {chat.tool_name!r}, which is not among the tools")
        dialect = getattr(format, "dialect", None)
        if dialect is None:
            raise PromptError(f"{format.name} was trained without tools")
        otherwise: Any = None
        if form and not forced:
            if set(form) - {"schema", "json_object"}:
                raise PromptError(
                    f"tools and {next(iter(form))} were given: a reply that may be a call or of a form can be held to a JSON "
                    "Schema only; set tool_choice to 'none' or 'required', or leave the form out"
                )
            otherwise = {"type": "object"} if form.get("json_object") else _schema(form["schema"])
        self._check_schemas(check_tools(tools))
        grammar = calls_grammar(
            tools,
            dialect.name,
            parallel=chat.parallel and chat.tool_choice != "named",
            options=JSON_OPTIONS,
            otherwise=otherwise,
            text=not forced and not form,
        )
        return {"schema": None, "json_object": False, "regex": None, "choices": (), "grammar": grammar}

    def _check_schemas(self, tools: Sequence[ToolSpec]) -> None:
        """Raise ConfigError naming the tool whose parameters cannot be enforced, and the place in them."""
        for tool in tools:
            if tool.parameters:
                try:
                    schema = {key: value for key, value in tool.parameters.items() if key != "strict"}
                    self._model.compile(self._model.params(schema=schema).constraint)  # type: ignore[arg-type]
                except ConfigError as error:
                    raise ConfigError(f"tool {tool.name!r}: parameters: {error}") from None


def conversation(given: Sequence[Any]) -> tuple[Message, ...]:
    """The messages of a conversation. What came of several calls stands in the order of the calls: clients tell by ids which is
    which, and no prompt format of Llama has a place for these. Raises PromptError for an id that no call has."""
    out = list(messages_from(given))
    start = 0
    calls: dict[str, int] = {}
    while start < len(out):
        before = calls if start and out[start - 1].role == "assistant" else {}  # one turn may be several messages
        calls = before | {
            call.id: len(before) + i for i, call in enumerate(out[start].tool_calls) if call.id is not None
        }
        end = start = start + 1
        while end < len(out) and out[end].role == "tool":
            end += 1
        results = out[start:end]
        if calls:
            for one in results:
                if one.tool_call_id is not None and one.tool_call_id not in calls:
                    raise PromptError(f"tool_call_id: no call of the turn before has the id {one.tool_call_id[:60]!a}")
            if all(one.tool_call_id is not None for one in results):
                out[start:end] = sorted(results, key=lambda one, calls=calls: calls[str(one.tool_call_id)])
        start = end
    return tuple(out)


_FORMS = ("schema", "json_object", "regex", "choices", "grammar")


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise PromptError for an option of a format whose JSON value is not of the type that its parameter says."""
    if name not in FORMATS:
        return
    known = signature(FORMATS[name], eval_str=True).parameters
    for option, value in options.items():
        if option in known and not _fits(value, known[option].annotation):
            kind = known[option].annotation
            expected = _SAID.get(kind) or " or ".join(json.dumps(one) for one in get_args(kind)) or kind
            raise PromptError(f"chat_template_kwargs.{option} is {json.dumps(value)[:60]}: expected {expected}")


_SAID: Mapping[Any, str] = {
    str: "a string",
    bool: "true or false",
    str | None: "a string or null",
    Collection[str]: "a list of strings",
    Mapping[str, str] | None: "an object of strings, or null",
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of an annotation's type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return value in args
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(one, args[1]) for one in value.values())
    if origin is Collection:
        return isinstance(value, list) and all(_fits(one, args[0]) for one in value)
    return type(value) is kind


def _strict(tool: Mapping[str, Any]) -> bool:
    """Whether calls of a tool are to follow its schema whatever happens."""
    function = tool.get("function", tool)
    return isinstance(function, Mapping) and function.get("strict") is True


def _parser(
    format: ChatFormat, tokenizer: Tokenizer, tools: Sequence[ToolSpec], rules: Mapping[str, Any], form: bool
) -> StreamParser:
    """A parser of a reply, whose calls stand at its beginning when a grammar says so."""
    parser = format.parser(tools)
    if rules and isinstance(parser, ReplyParser):
        parser.leading_calls_only()
        if not form:  # what begins like a call is one
            return PromisedCalls(parser, tokenizer, [tool.name for tool in tools])
    return parser


def _schema(given: Any) -> Any:
    return json.loads(given) if isinstance(given, str) else given


def _lists(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling fields as they were before they were JSON: keys of biases are integers, lists are tuples."""
    out = dict(sampling)
    if (bias := out.get("logit_bias")) is not None and isinstance(bias, Mapping):
        out["logit_bias"] = {int(key): value for key, value in bias.items()}
    for name in ("stop", "choices"):
        if out.get(name) is not None:
            out[name] = tuple(out[name])
    return out


def _shorter(messages: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """The conversation without its oldest turns, more and more of them: system messages and the last turn stay.

    What is left begins with a user's message, so that no result of a tool stands without its call.
    """
    head = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    starts = [i for i in range(head + 1, len(messages)) if messages[i].role == "user"]
    fixed = messages[:head]
    return [(*fixed, *(m for m in messages[head:i] if m.role == "system"), *messages[i:]) for i in starts]

"""Items of `/v1/responses`: what a conversation is made of there, and the messages that a model is given for them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import StringConstraints, model_validator

from herd.server.errors import ApiError
from herd.server.fields import Body, checked
from herd.server.openai.chat_body import FunctionName
from herd.server.state import new_id

__all__ = ["items_from", "messages_from_items"]

Item = dict[str, Any]
Id = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


class InputPart(Body):
    """A part of a message. Replies that are sent back bring annotations and logprobs, which are nothing to a model."""

    type: Literal["input_text", "output_text", "refusal", "text"]
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None

    @model_validator(mode="after")
    def _whole(self) -> InputPart:
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise ValueError(f"a part of type {self.type} has its text")
        if (self.text if self.type == "refusal" else self.refusal) is not None:
            raise ValueError(f"a part of type {self.type} has no other content")
        if self.type != "output_text" and (self.annotations or self.logprobs):
            raise ValueError("annotations and logprobs are of output_text only")
        return self

    @property
    def said(self) -> str:
        """Its text."""
        return (self.refusal if self.type == "refusal" else self.text) or ""


class InputMessage(Body):
    """A message, as clients write it or as it came in an earlier response."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    id: Id | None = None
    status: Status | None = None

    neutral: ClassVar = {"phase": ("commentary", "final_answer")}


class FunctionCall(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Id
    name: FunctionName
    arguments: str
    id: Id | None = None
    status: Status | None = None


class FunctionCallOutput(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: Id
    output: str | list[dict[str, Any]]
    id: Id | None = None
    status: Status | None = None


_KINDS: dict[str, type[Body]] = {
    "message": InputMessage,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
}
_REFUSED = {
    "item_reference": "references are not looked up: send the item itself, or previous_response_id",
    "reasoning": "Llama models have no reasoning items: leave it out",
}
_FILES = {"input_image": "an image", "input_file": "a file", "input_audio": "audio"}


def items_from(given: str | Sequence[Any]) -> list[Item]:
    """`input` as items in one form, each with an id. Raises ApiError (400) naming what is wrong."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_item(one, f"input[{i}]") for i, one in enumerate(given)]


def _item(given: Any, where: str) -> Item:
    if not isinstance(given, dict):
        raise ApiError(400, f"{where}: expected an object", param=where, code="invalid_type")
    kind = given.get("type", "message")
    model = _KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        why = _REFUSED.get(kind) if isinstance(kind, str) else None
        why = why or f"items here are {', '.join(_KINDS)}; built-in tools are not supported"
        raise ApiError(400, f"{where}: {why}", param=f"{where}.type", code="unsupported_content")
    found = _checked(given, model, where)
    match found:
        case InputMessage():
            content = _parts(found.content, found.role, f"{where}.content")
            item: Item = {"type": "message", "role": found.role, "content": content}
        case FunctionCall():
            item = {"type": kind, "call_id": found.call_id, "name": found.name, "arguments": found.arguments}
        case _:
            assert isinstance(found, FunctionCallOutput)
            output: Any = found.output
            if not isinstance(output, str):
                output = _parts(output, "tool", f"{where}.output")
            item = {"type": kind, "call_id": found.call_id, "output": output}
    prefix = {"message": "msg_", "function_call": "fc_"}.get(kind, "fco_")
    return {"id": found.id or new_id(prefix), "status": "completed", **item}


def _parts(given: str | Sequence[Any], role: str, where: str) -> list[Item]:
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(given, str):
        return [_part(given, kind)]
    parts = []
    for i, one in enumerate(given):
        here = f"{where}[{i}]"
        if isinstance(one, dict) and one.get("type") in _FILES:
            what = f"{here} is {_FILES[one['type']]}, and this model reads text only"
            raise ApiError(400, what, param=here, code="unsupported_content")
        parts.append(_part(_checked(one, InputPart, here).said, kind))
    return parts


def _part(text: str, kind: str) -> Item:
    return {"type": kind, "text": text} | ({"annotations": []} if kind == "output_text" else {})


def _checked(given: Any, model: Any, where: str) -> Any:
    """As `checked`, with the place in the request."""
    try:
        return checked(given, model)
    except ApiError as error:
        param = where if error.param is None else f"{where}.{error.param}"
        raise ApiError(error.status, f"{where}: {error.message}", param=param, code=error.code) from None


def messages_from_items(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The conversation in the shape of chat completions: calls belong to the assistant's message before them.

    Raises ApiError (400) for the output of a call that is not there.
    """
    messages: list[dict[str, Any]] = []
    calls: set[str] = set()
    for i, item in enumerate(items):
        if item["type"] == "message":
            content = [{"type": "text", "text": part["text"]} for part in item["content"]]
            plain = content[0]["text"] if len(content) == 1 else content
            messages.append({"role": item["role"], "content": plain if content else ""})
        elif item["type"] == "function_call":
            calls.add(item["call_id"])
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"type": "function", "id": item["call_id"], "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            if item["call_id"] not in calls:
                what = f"there is no call {item['call_id'][:80]!a} before its output (item {i} of the conversation)"
                raise ApiError(400, what, param="input", code="invalid_value")
            output = item["output"]
            text = output if isinstance(output, str) else "".join(part["text"] for part in output)
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
    return messages

"""Requests of `/v1/messages`, every field of them honoured or refused by name. No torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from herd.chat.params import MAX_INT
from herd.server.fields import LIMITS, Body

__all__ = ["CountBody", "InputMessage", "MessagesBody", "NamedChoice", "TextBlock"]

MAX_STOPS = 16
CallId = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=LIMITS["stop_length"])]


class CacheControl(Body):
    """Where a prompt may be cached. Prompts are cached by themselves here, so that nothing is left to do."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Body):
    """A part of a message: text, a call of a tool, or what came of one."""

    type: Literal["text", "tool_use", "tool_result", "image", "document", "thinking", "redacted_thinking"]
    text: str | None = None
    citations: list[Any] | None = Field(None, max_length=0)
    id: CallId | None = None
    name: ToolName | None = None
    input: dict[str, Any] | None = None
    caller: dict[str, Any] | None = None
    tool_use_id: CallId | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, given: Any) -> Any:
        """What no field describes is refused by its type, before its fields are looked at."""
        kind = given.get("type") if isinstance(given, dict) else None
        if kind in ("image", "document"):
            raise ValueError(f"a block of type {kind}: this model reads text only, leave it out")
        if kind in ("thinking", "redacted_thinking"):
            raise ValueError(f"a block of type {kind}: Llama models do not think apart, leave it out")
        return given

    @model_validator(mode="after")
    def _whole(self) -> Block:
        needed = {"text": ("text",), "tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id",)}[self.type]
        may = {"text": ("citations",), "tool_use": ("caller",), "tool_result": ("content", "is_error")}[self.type]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"a block of type {self.type} has a field {name}")
        for name in ("text", "citations", "id", "name", "input", "caller", "tool_use_id", "content", "is_error"):
            if name not in needed and name not in may and getattr(self, name) is not None:
                raise ValueError(f"a block of type {self.type} has no field {name}")
        if isinstance(self.content, list) and any(part.type != "text" for part in self.content):
            raise ValueError("the content of a tool_result is text: leave other blocks out")
        return self


class TextBlock(Body):
    """A part of a system prompt."""

    type: Literal["text"]
    text: str
    citations: list[Any] | None = Field(None, max_length=0)
    cache_control: CacheControl | None = None


class InputMessage(Body):
    """A turn."""

    role: Literal["user", "assistant"]
    content: str | list[Block]

    @model_validator(mode="after")
    def _fits(self) -> InputMessage:
        for block in self.content if isinstance(self.content, list) else ():
            if block.type == "tool_use" and self.role != "assistant":
                raise ValueError("only assistant messages have tool_use blocks")
            if block.type == "tool_result" and self.role != "user":
                raise ValueError("only user messages have tool_result blocks")
        return self


class Tool(Body):
    """A function that may be called. `strict`: its input follows the schema, whatever the choice."""

    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None

    refused: ClassVar = {}

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        """Tools that Anthropic's own servers run are not here, and say so by their type."""
        if isinstance(given, dict):
            kind = given.get("type")
            if isinstance(kind, str) and kind != "custom":
                raise ValueError(
                    f"tools of type {kind[:60]} are run by Anthropic's servers: describe one with input_schema"
                )
            given = {k: v for k, v in given.items() if not (k in _TOOL_NEUTRAL and v in _TOOL_NEUTRAL[k])}
        return given


_TOOL_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "defer_loading": (None, False),
    "eager_input_streaming": (None, True, False),
    "allowed_callers": (None, ["direct"]),
    "input_examples": (None, []),
}
"""Fields of tools whose values change nothing here: arguments are streamed as they are made."""


class Choice(Body):
    """`tool_choice` without a name."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Body):
    """`tool_choice` by name."""

    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool | None = None


class Metadata(Body):
    """Who asks. Nothing is stored."""

    user_id: str | None = Field(None, max_length=512)


class OutputFormat(Body):
    """The form of the reply, enforced token by token."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """`output_config`."""

    format: OutputFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_effort(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("effort") is not None:
            raise ValueError("effort: Llama models have no levels of effort, leave it out")
        return {k: v for k, v in given.items() if k != "effort"} if isinstance(given, dict) else given


class Thinking(Body):
    """Only that there is none."""

    type: Literal["disabled"]


_REFUSED = {
    "container": "code is not run here: leave it out",
    "mcp_servers": "MCP servers are not called here: describe their tools in tools",
    "context_management": "conversations are not edited here: leave it out",
    "inference_geo": "this server is where it is: leave it out",
    "diagnostics": "there are none: leave it out",
    "user_profile_id": "there are no profiles: leave it out",
    "workspace_id": "there are no workspaces: leave it out",
    "stream_options": "Anthropic's streams have no options: leave it out",
    "max_tokens_to_sample": "use max_tokens",
    "prompt": "use messages",
}


class CountBody(Body):
    """What a prompt is made of."""

    model: str = Field(min_length=1, max_length=512)
    messages: list[InputMessage] = Field(min_length=1, max_length=LIMITS["messages"])
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = Field(None, max_length=LIMITS["tools"])
    tool_choice: Annotated[Choice | NamedChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    refused: ClassVar = _REFUSED
    neutral: ClassVar = {"speed": ("standard",), "mcp_servers": ([],), "betas": ([],)}

    @model_validator(mode="before")
    @classmethod
    def _no_thinking(cls, given: Any) -> Any:
        thinking = given.get("thinking") if isinstance(given, dict) else None
        if isinstance(thinking, dict) and thinking.get("type") in ("enabled", "adaptive"):
            raise ValueError("thinking: Llama models do not think apart, leave it out")
        return given

    @model_validator(mode="after")
    def _together(self) -> CountBody:
        named = self.tool_choice.name if isinstance(self.tool_choice, NamedChoice) else None
        if named is not None and not any(tool.name == named for tool in self.tools or ()):
            raise ValueError("tool_choice names a tool that is not among the tools")
        if self.tool_choice is not None and self.tool_choice.type == "any" and not self.tools:
            raise ValueError("tool_choice: there are no tools to choose from")
        return self


class MessagesBody(CountBody):
    """A request for a message."""

    max_tokens: int = Field(ge=1, le=MAX_INT)
    stream: bool | None = None
    stop_sequences: list[Stop] | None = Field(None, max_length=MAX_STOPS)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_INT)
    metadata: Metadata | None = None

    neutral: ClassVar = dict(CountBody.neutral) | {"service_tier": ("auto", "standard_only")}

"""The request of `/v1/chat/completions`. No torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from herd.chat.params import MAX_INT
from herd.server.fields import LIMITS, Body
from herd.server.openai.sampling import JsonSchema, SamplingBody

__all__ = ["ChatBody", "ChatMessage", "ContentPart", "FunctionName", "NamedTool", "ResponseFormat", "Tool"]

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class ImageUrl(Body):
    """An image's address."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ContentPart(Body):
    """A part of a message: text, or an image for models that see."""

    type: Literal["text", "image_url", "refusal"]
    text: str | None = None
    image_url: ImageUrl | str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> ContentPart:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} has a field {self.type}")
        if any(getattr(self, other) is not None for other in ("text", "image_url", "refusal") if other != self.type):
            raise ValueError(f"a part of type {self.type} has no other content")
        return self


class CalledFunction(Body):
    """A function that was called; `arguments` is JSON text."""

    name: FunctionName
    arguments: str | dict[str, Any]


class ToolCallBody(Body):
    """A tool call of an earlier reply."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Body):
    """A message of the conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=LIMITS["parts"])] | None = None
    tool_calls: list[ToolCallBody] | None = Field(None, max_length=LIMITS["parts"])
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, given: Any) -> Any:
        """What clients send back of a reply, and what it says is nothing."""
        if not isinstance(given, dict):
            return given
        return {
            key: value
            for key, value in given.items()
            if not (
                key in ("refusal", "audio", "function_call", "annotations", "reasoning_content")
                and value in (None, [], "")
            )
        }

    @model_validator(mode="after")
    def _fits(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a {self.role} message has content")
        if any(call.index not in (None, i) for i, call in enumerate(self.tool_calls or ())):
            raise ValueError("tool_calls: an index is not the place of its call")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only assistant messages have tool_calls")
        if self.name is not None and self.role != "tool":
            raise ValueError("name: Llama's prompt formats have no place for names, leave it out")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("only tool messages have a tool_call_id")
        return self


class Function(Body):
    """A function that may be called. `strict` is honoured: arguments follow the schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: FunctionName


class NamedTool(Body):
    """`tool_choice` by name."""

    type: Literal["function"]
    function: NamedFunction


class ResponseFormat(Body):
    """The form of the reply. JSON schemas are enforced token by token."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and only with it")
        if self.json_schema is not None and self.json_schema.schema_ is None:
            raise ValueError("json_schema.schema is missing")
        return self


class ChatBody(SamplingBody):
    """A chat completion request."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=LIMITS["messages"])
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=LIMITS["top_logprobs"])
    tools: list[Tool] | None = Field(None, max_length=LIMITS["tools"])
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, Annotated[str, StringConstraints(max_length=512)]] | None = Field(
        None, max_length=LIMITS["metadata"]
    )
    store: Literal[False] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=16)
    safety_identifier: str | None = Field(None, max_length=1024)
    prompt_cache_key: str | None = Field(None, max_length=256)

    refused: ClassVar = {
        "audio": "this server makes no audio: leave it out",
        "functions": "use tools, which replaced it",
        "function_call": "use tool_choice, which replaced it",
        "prediction": "predicted outputs are not supported: --draft lookup speeds up text that repeats the prompt",
        "reasoning_effort": "Llama models have no levels of reasoning: leave it out",
        "verbosity": "Llama models have no levels of verbosity: say it in the prompt",
        "web_search_options": "this server does not search the web: give the model a tool",
        "chat_template": "templates come from the model or from the server's --chat-template, not from requests",
        "documents": "documents are not supported: put them into a message",
        "mm_processor_kwargs": "images are not supported: leave it out",
        "prompt_cache_retention": "prompts are cached while there is memory: leave it out",
    }
    neutral: ClassVar = dict(SamplingBody.neutral) | {
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "echo": (False,),
        "add_special_tokens": (False,),
        "include_reasoning": (True,),
        "best_of": (1,),
    }

    @model_validator(mode="after")
    def _together(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are not the same: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: set logprobs to true to have them")
        if not self.tools:
            if self.tool_choice not in (None, "none", "auto"):
                raise ValueError("tool_choice: there are no tools to choose from")
        elif isinstance(self.tool_choice, NamedTool) and not any(
            tool.function.name == self.tool_choice.function.name for tool in self.tools
        ):
            raise ValueError("tool_choice names a function that is not among the tools")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message goes on with the last message: leave add_generation_prompt out")
        return self

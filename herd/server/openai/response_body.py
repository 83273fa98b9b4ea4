"""The request of `/v1/responses`, and what is echoed of it. No torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from herd.chat.params import MAX_INT
from herd.server.errors import ApiError
from herd.server.fields import LIMITS, Body
from herd.server.openai.chat_body import FunctionName
from herd.server.openai.sampling import SamplingBody

__all__ = ["LOGPROBS", "FunctionTool", "ResponseBody", "TextFormat"]

LOGPROBS = "message.output_text.logprobs"
Named = Annotated[str, StringConstraints(max_length=512)]


class TextFormat(Body):
    """The form of the reply. JSON schemas are enforced token by token, whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _whole(self) -> TextFormat:
        given = any(one is not None for one in (self.name, self.description, self.schema_, self.strict))
        if self.type != "json_schema" and given:
            raise ValueError("name, description, schema and strict go with type json_schema")
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("a json_schema has a name and a schema")
        return self


class TextConfig(Body):
    """`text`."""

    format: TextFormat | None = None

    neutral: ClassVar = {"verbosity": ("medium",)}
    verbosity: Literal["medium"] | None = None


class FunctionTool(Body):
    """A function that may be called. With `strict`, calls are held to the schema."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Body):
    """`tool_choice` by name."""

    type: Literal["function"]
    name: FunctionName


class AllowedTools(Body):
    """`tool_choice` among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1, max_length=LIMITS["tools"])


class ResponseStreamOptions(Body):
    """`stream_options`."""

    include_obfuscation: Literal[False] | None = None


class ResponseBody(SamplingBody):
    """A request for a response. Sampling fields that OpenAI's API lacks are those of chat completions."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=LIMITS["messages"])]
    instructions: str | None = None
    previous_response_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    store: bool | None = None
    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    metadata: dict[Annotated[str, StringConstraints(max_length=64)], Named] | None = Field(
        None, max_length=LIMITS["metadata"]
    )
    text: TextConfig | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=LIMITS["tools"])
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=LIMITS["top_logprobs"])
    safety_identifier: str | None = Field(None, max_length=1024)
    prompt_cache_key: str | None = Field(None, max_length=256)

    refused: ClassVar = {
        "reasoning": "Llama models have no levels of reasoning: leave it out",
        "conversation": "conversations are not kept apart: use previous_response_id",
        "prompt": "prompts are not stored here: send instructions and input",
        "max_tool_calls": "it is about built-in tools, which are not supported: leave it out",
        "prompt_cache_retention": "prompts are cached while there is memory: leave it out",
        "prompt_cache_options": "prompts are cached while there is memory: leave it out",
        "context_management": "conversations are not compacted: use truncation",
        "moderation": "ask /v1/moderations",
        "image": "this server makes no images: leave it out",
        "prompt_logprobs": "responses have no place for them: use /v1/chat/completions",
    }
    neutral: ClassVar = dict(SamplingBody.neutral) | {
        "background": (False,),
        "n": (1,),
        "service_tier": ("auto", "default"),
        "modalities": (["text"],),
    }

    @model_validator(mode="after")
    def _together(self) -> ResponseBody:
        if self.top_logprobs is not None and LOGPROBS not in (self.include or ()):
            raise ValueError(f'top_logprobs: say include: ["{LOGPROBS}"] to have them')
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: there are no tools to choose from")
        if isinstance(self.tool_choice, NamedFunction | AllowedTools):
            names = {one.get("name") for one in self.tools or ()}
            chosen = [self.tool_choice] if isinstance(self.tool_choice, NamedFunction) else self.tool_choice.tools
            if any(one.name not in names for one in chosen):
                raise ValueError("tool_choice names a function that is not among the tools")
        return self


def refuse_tool(kind: Any, where: str) -> ApiError:
    """Why a tool that is no function is not here."""
    shown = ascii(kind)[:60] if isinstance(kind, str) else "without a type"
    return ApiError(
        400,
        f"{where} is {shown}: there are no built-in tools here, only functions that the client runs",
        param=f"{where}.type",
        code="unsupported_parameter",
    )

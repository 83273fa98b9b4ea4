"""The fields that chats and completions share, and what becomes of them: fields of SamplingParams. No torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from herd.chat.params import MAX_INT, MAX_N, SamplingParams
from herd.errors import ConfigError
from herd.server.errors import ApiError
from herd.server.fields import LIMITS, Body

__all__ = ["JsonSchema", "SamplingBody", "StreamOptions", "StructuredOutputs", "check_sampling", "sampling_of"]

Stop = Annotated[str, StringConstraints(min_length=1, max_length=LIMITS["stop_length"])]
Stops = Annotated[list[Stop], Field(max_length=LIMITS["stop"])]
Bias = Annotated[float, Field(ge=-100, le=100)]
Whole = Annotated[int, Field(ge=0, le=MAX_INT)]


class StreamOptions(Body):
    """`stream_options`. With `include_usage`, one more chunk before the end has the counts, and no choices."""

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: exactly one of them. There is one engine of grammars here, and nothing to fall back to."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: Literal[True] | None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None


class JsonSchema(Body):
    """`response_format.json_schema`. The schema is enforced, whatever `strict` says; the model is told the description."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class SamplingBody(Body):
    """How to sample. What is not given is the checkpoint's own default."""

    model: str = Field(min_length=1, max_length=512)
    temperature: float | None = Field(None, ge=0, le=1e6)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=-(2**63), le=MAX_INT)
    stop: Stop | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}$")], Bias] | None = Field(
        None, max_length=LIMITS["logit_bias"]
    )
    user: str | None = Field(None, max_length=1024)
    # vLLM's and llama.cpp's
    top_k: int | None = Field(None, ge=-1, le=MAX_INT)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=1e6)
    min_tokens: Whole | None = None
    stop_token_ids: list[Whole] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=LIMITS["top_logprobs"])
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    cache_salt: str | None = Field(None, max_length=256)

    neutral: ClassVar = {
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "early_stopping": (False,),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "priority": (0,),
        "min_tokens_to_keep": (1,),
        "guided_whitespace_pattern": (),
        "guided_decoding_backend": ("auto", "guidance"),
        "truncate_prompt_tokens": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "logits_processors": ([],),
    }

    @model_validator(mode="after")
    def _streaming(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only streams have them, set stream to true")
        return self


def sampling_of(body: SamplingBody) -> dict[str, Any]:
    """Fields of SamplingParams. Raises ApiError (400) for two fields that mean the same."""
    out: dict[str, Any] = {}
    for name in ("temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "min_p", "typical_p",
                 "repetition_penalty", "min_tokens", "prompt_logprobs"):  # fmt: skip
        if (value := getattr(body, name)) is not None:
            out[name] = value
    if body.top_k is not None:
        out["top_k"] = max(body.top_k, 0)  # vLLM's -1 is "all of them"
    if body.seed is not None:
        out["seed"] = body.seed % 2**63  # OpenAI's may be negative
    if body.stop is not None:
        out["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.logit_bias:
        out["logit_bias"] = body.logit_bias
    if body.stop_token_ids:
        out["stop_ids"] = body.stop_token_ids
    if body.ignore_eos:
        out["ignore_stop_ids"] = True
    out |= _form(body)
    return out


def _form(body: SamplingBody) -> dict[str, Any]:
    """What the reply must be, from vLLM's fields."""
    chosen = body.structured_outputs or StructuredOutputs.model_construct()
    given = {
        "structured_outputs.json": ("schema", chosen.json_),
        "structured_outputs.regex": ("regex", chosen.regex),
        "structured_outputs.choice": ("choices", chosen.choice),
        "structured_outputs.grammar": ("grammar", chosen.grammar),
        "structured_outputs.json_object": ("json_object", chosen.json_object or None),
        "guided_json": ("schema", body.guided_json),
        "guided_regex": ("regex", body.guided_regex),
        "guided_choice": ("choices", body.guided_choice),
        "guided_grammar": ("grammar", body.guided_grammar),
    }
    found = {name: pair for name, pair in given.items() if pair[1] is not None}
    if len(found) > 1:
        names = list(found)
        raise ApiError(
            400,
            f"{names[0]} and {names[1]}: a reply can be held to one form only",
            param=names[1],
            code="invalid_value",
        )
    return dict(found.values())


_THEIRS = {
    "stop_ids": "stop_token_ids",
    "ignore_stop_ids": "ignore_eos",
    "choices": "structured_outputs",
    "schema": "response_format",
    "grammar": "structured_outputs",
    "regex": "structured_outputs",
    "json_object": "response_format",
}


def check_sampling(sampling: dict[str, Any], **renamed: str) -> None:
    """Raise ApiError (400) naming the field for what no engine takes. `renamed`: our names -> the request's."""
    plain = dict(sampling)
    for name in ("stop", "choices"):
        if name in plain:
            plain[name] = tuple(plain[name])
    if "logit_bias" in plain:
        plain["logit_bias"] = {int(key): value for key, value in plain["logit_bias"].items()}
    try:
        SamplingParams(**plain)
    except ConfigError as error:
        first = str(error).split()[0].rstrip(":") if str(error) else ""
        name = first if first in sampling else next((key for key in sampling if key in str(error)), None)
        theirs = {**_THEIRS, **renamed}
        param = None if name is None else theirs.get(name, name)
        raise ApiError(400, str(error), param=param, code="invalid_value") from None

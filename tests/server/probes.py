"""For each parameter of the APIs a value that must make a difference, or why it makes none: what `conformance.py` asks with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@dataclass(frozen=True)
class Probe:
    """A value that must make a difference, beside what it needs in the request to be valid."""

    value: Any
    beside: Mapping[str, Any]
    instead: Mapping[str, Any] = field(default_factory=dict)
    """What it stands in the place of."""


def probe(value: Any, **beside: Any) -> Probe:
    return Probe(value, beside)


PROBES: dict[str, Probe] = {
    "model": probe("fake@a"),
    "messages": probe([{"role": "user", "content": "other"}]),
    "prompt": probe("other"),
    "input": probe("other"),
    "temperature": probe(0.125),
    "top_p": probe(0.375),
    "top_k": probe(7),
    "min_p": probe(0.0625),
    "typical_p": probe(0.625),
    "n": probe(2),
    "best_of": probe(3),
    "seed": probe(11),
    "stop": probe(["!"]),
    "stop_sequences": probe(["!"]),
    "stop_token_ids": probe([5]),
    "ignore_eos": probe(True),
    "min_tokens": probe(2),
    "max_tokens": probe(9),
    "max_completion_tokens": probe(9),
    "max_output_tokens": probe(19),
    "stream": probe(True),
    "stream_options": probe({"include_usage": True}, stream=True),
    "presence_penalty": probe(0.25),
    "frequency_penalty": probe(0.25),
    "repetition_penalty": probe(1.25),
    "logit_bias": probe({"5": 1.5}),
    "logprobs": probe(True),
    "top_logprobs": probe(2, logprobs=True),
    "prompt_logprobs": probe(1),
    "echo": probe(True),
    "suffix": probe("end"),
    "structured_outputs": probe({"regex": "a+"}),
    "guided_json": probe(SCHEMA),
    "guided_regex": probe("a+"),
    "guided_choice": probe(["a", "b"]),
    "guided_grammar": probe("start: /a+/"),
    "response_format": probe({"type": "json_object"}),
    "format": probe("json"),
    "text": probe({"format": {"type": "json_object"}}),
    "tools": probe([TOOL]),
    "tool_choice": probe("required", tools=[TOOL]),
    "parallel_tool_calls": probe(False, tools=[TOOL]),
    "truncation": probe("auto"),
    "truncate": probe(True),
    "add_generation_prompt": probe(False),
    "continue_final_message": probe(True),
    "chat_template_kwargs": probe({"date": "1 May 2024"}),
    "cache_salt": probe("salt"),
    "user": probe("me"),
    "metadata": probe({"k": "v"}),
    "store": probe(False),
    "safety_identifier": probe("id"),
    "prompt_cache_key": probe("key"),
    "instructions": probe("Be short."),
    "system": probe("Be short."),
    "include": probe(["message.output_text.logprobs"]),
    "previous_response_id": probe(None),  # that of an answer given before
    "options": probe({"temperature": 0.125}),
    "keep_alive": probe("7m"),
    "raw": probe(True),
    "thinking": probe({"type": "disabled"}),
    "output_config": probe({"format": {"type": "json_schema", "schema": SCHEMA}}),
    "cache_control": probe({"type": "ephemeral"}),
    "num_predict": probe(9),
    "num_ctx": probe(64),
    "repeat_penalty": probe(1.25),
}
ANTHROPIC_TOOL = {"name": "f", "description": "d", "input_schema": FUNCTION["parameters"]}
RESPONSE_TOOL = {"type": "function", **FUNCTION}
THEIRS: dict[tuple[str, str], Probe] = {
    ("/v1/completions", "logprobs"): probe(2),
    ("/v1/responses", "tools"): probe([RESPONSE_TOOL]),
    ("/v1/responses", "tool_choice"): probe("required", tools=[RESPONSE_TOOL]),
    ("/v1/responses", "parallel_tool_calls"): probe(False, tools=[RESPONSE_TOOL]),
    ("/v1/responses", "top_logprobs"): probe(2, include=["message.output_text.logprobs"]),
    ("/v1/responses", "stream_options"): probe({"include_obfuscation": False}, stream=True),
    ("/v1/messages", "tools"): probe([ANTHROPIC_TOOL]),
    ("/v1/messages", "tool_choice"): probe({"type": "any"}, tools=[ANTHROPIC_TOOL]),
    ("/v1/messages", "metadata"): probe({"user_id": "me"}),
    ("/v1/embeddings", "encoding_format"): probe("base64"),
    ("/v1/embeddings", "dimensions"): probe(1),
    ("/v1/embeddings", "normalize"): probe(False),
    ("/v1/moderations", "model"): probe("guard"),
    ("/tokenize", "messages"): Probe(HI, {}, {"prompt": None}),
    ("/tokenize", "tools"): probe([TOOL], messages=HI, prompt=None),
    ("/tokenize", "add_special_tokens"): probe(False),
    ("/tokenize", "add_generation_prompt"): probe(False, messages=HI, prompt=None),
    ("/tokenize", "return_token_strs"): probe(True),
    ("/detokenize", "tokens"): probe([7, 8]),
    ("/detokenize", "model"): probe("guard"),
    ("/tokenize", "model"): probe("guard"),
    ("/v1/files", "file"): probe("other"),
    ("/v1/files", "purpose"): probe("batch"),
    ("/v1/batches", "input_file_id"): probe("OTHER"),
    ("/v1/batches", "endpoint"): probe("/v1/embeddings"),
    ("/v1/batches", "completion_window"): probe("24h"),
    ("/v1/batches", "output_expires_after"): probe({"anchor": "created_at", "seconds": 7200}),
    ("/v1/batches", "metadata"): probe({"k": "v"}),
    ("list", "after"): probe("SECOND"),
    ("list", "limit"): probe(1),
    ("list", "order"): probe("asc"),
    ("list", "purpose"): probe("batch_output"),
    ("/v1/files", "expires_after"): probe({"anchor": "created_at", "seconds": 3600}),
    ("/api/chat", "stream"): probe(False),
    ("/api/generate", "stream"): probe(False),
}
"""Where a path has values of its own."""

NO_EFFECT = {
    "user": "nothing is stored or rated by it",
    "metadata": "nothing is stored",
    "store": "false is what happens anyway",
    "safety_identifier": "nothing is rated by it",
    "prompt_cache_key": "prompts are cached by themselves",
    "cache_control": "prompts are cached by themselves",
    "thinking": "disabled is what happens anyway",
    "truncate": "false is what happens anyway",
    "num_ctx": "what fits there fits in the context of the model; more than that is refused",
    "/v1/moderations model": "the guard is chosen when the server starts: names of others are refused",
    "/v1/files purpose": "files are for batches: other purposes are refused",
    "/v1/batches completion_window": "24h is the only one: others are refused",
    "/v1/responses stream_options": "include_obfuscation may be false, which is what happens anyway",
}
"""Accepted, though it changes nothing, and why nobody is misled by that."""

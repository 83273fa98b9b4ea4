"""What chats and completions share in their answers: usage, timings, token texts, finish details. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from herd.server.protocol import Began, Ended, TokenInfo, Truncated, Usage

__all__ = ["chat_logprob", "prompt_logprobs", "timings", "total", "truncation", "usage"]


def usage(told: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": told.prompt_tokens,
        "completion_tokens": told.completion_tokens,
        "total_tokens": told.prompt_tokens + told.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": told.cached_tokens},
        **({"from_cache": True} if told.from_cache else {}),
    }


def timings(told: Usage) -> dict[str, Any]:
    """llama.cpp's `timings`. Prompt tokens are those that were computed; its time counts waiting, too."""
    computed = told.prompt_tokens - told.cached_tokens
    return {
        "prompt_n": computed,
        "prompt_ms": round(told.prompt_seconds * 1000, 3),
        "prompt_per_second": _rate(computed, told.prompt_seconds),
        "predicted_n": told.completion_tokens,
        "predicted_ms": round(told.decode_seconds * 1000, 3),
        "predicted_per_second": _rate(told.completion_tokens - 1, told.decode_seconds),
        "cache_n": told.cached_tokens,
    }


def total(parts: list[Usage]) -> Usage:
    """Several prompts' counts as one request's; times are those of the slowest."""
    return Usage(
        sum(p.prompt_tokens for p in parts),
        sum(p.completion_tokens for p in parts),
        sum(p.cached_tokens for p in parts),
        max((p.prompt_seconds for p in parts), default=0.0),
        max((p.decode_seconds for p in parts), default=0.0),
        bool(parts) and all(p.from_cache for p in parts),
    )


def truncation(began: Began) -> dict[str, Any]:
    """`truncated`, when something was left out."""
    left: Truncated | None = began.truncated
    if left is None:
        return {}
    return {"truncated": {"dropped_messages": left.dropped_messages, "dropped_tokens": left.dropped_tokens}}


def stop_detail(ended: Ended) -> Any:
    """vLLM's `stop_reason`: the stop string, or why a length was met; null when the model itself ended."""
    return ended.detail


def chat_logprob(token: TokenInfo) -> dict[str, Any]:
    """One entry of a chat's `logprobs.content`."""
    top = [{"token": text, "logprob": logprob, "bytes": list(data)} for _, text, data, logprob in token.top]
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data), "top_logprobs": top}


def prompt_logprobs(tokens: tuple[TokenInfo, ...]) -> list[Mapping[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token after the first, id -> its log-probability and text."""
    out: list[Mapping[str, Any] | None] = []
    for token in tokens:
        if token.logprob is None:
            out.append(None)
            continue
        rows = {token.id: (token.text, token.logprob)} | {i: (text, logprob) for i, text, _, logprob in token.top}
        out.append({str(i): {"logprob": logprob, "decoded_token": text} for i, (text, logprob) in rows.items()})
    return out


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 and count > 0 else 0.0

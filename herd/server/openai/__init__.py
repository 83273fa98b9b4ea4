"""OpenAI's API: a module for each path."""

from collections.abc import Sequence

from fastapi import APIRouter

from herd.server.openai import embeddings, responses, tokenize

__all__ = ["ROUTERS"]

ROUTERS: Sequence[APIRouter] = (responses.router, embeddings.router, tokenize.router)
"""What there is beside models, chats and completions."""

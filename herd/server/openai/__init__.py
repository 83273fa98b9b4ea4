"""OpenAI's API: a module for each path."""

from collections.abc import Mapping, Sequence

from fastapi import APIRouter

from herd.server.batches import Handler
from herd.server.openai import adapters, batches, chat, completions, embeddings, files, moderations, responses, tokenize

__all__ = ["HANDLERS", "ROUTERS"]

ROUTERS: Sequence[APIRouter] = (
    responses.router,
    embeddings.router,
    moderations.router,
    files.router,
    batches.router,
    tokenize.router,
    adapters.router,
)
"""What there is beside models, chats and completions."""

HANDLERS: Mapping[str, Handler] = {
    "/v1/chat/completions": chat.chat_completions,
    "/v1/completions": completions.completions,
    "/v1/embeddings": embeddings.embeddings,
    "/v1/responses": responses.create,
    "/v1/moderations": moderations.moderations,
}
"""What batches can ask for."""

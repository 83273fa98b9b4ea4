"""Ollama's API: `fields` (requests) and `lines` (answers), a module for each group of paths."""

from collections.abc import Sequence

from fastapi import APIRouter

from herd.server.ollama import chat, embed, generate, manage, tags

__all__ = ["ROUTERS"]

ROUTERS: Sequence[APIRouter] = (chat.router, generate.router, embed.router, tags.router, manage.router)
"""All of its paths."""

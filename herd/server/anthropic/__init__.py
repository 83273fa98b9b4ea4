"""Anthropic's API: `fields` (its requests), `calls` (as calls), `messages` (its paths), `replies` (answers and events)."""

from collections.abc import Sequence

from fastapi import APIRouter

from herd.server.anthropic import messages

__all__ = ["ROUTERS"]

ROUTERS: Sequence[APIRouter] = (messages.router,)
"""All of its paths."""

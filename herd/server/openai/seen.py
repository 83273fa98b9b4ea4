"""Images of a chat on their way to a model that sees: looked at, fetched where that is allowed, and written as data: URLs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from herd.server.caller import caller
from herd.server.errors import ApiError
from herd.server.openai.chat_body import ChatMessage
from herd.server.pictures import MOST_BYTES, pictures
from herd.server.state import State

__all__ = ["Seen", "seen_of", "shows", "unseen"]

Seen = Mapping[str, str]
"""Of each image its place in the request -> it as a data: URL whose header was read."""


def shows(messages: Sequence[ChatMessage]) -> bool:
    """Whether there is an image in a conversation."""
    parts = (part for one in messages if isinstance(one.content, list) for part in one.content)
    return any(part.type == "image_url" for part in parts)


async def seen_of(state: State, model: str, messages: Sequence[ChatMessage]) -> Seen:
    """The images of a conversation. Raises ApiError (400) naming the place: for all when the model reads text only, before
    anything of them is decoded or fetched; otherwise for the first that cannot be taken. Raises as `State.run` when there is no
    model."""
    found: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.type != "image_url":
                continue
            assert part.image_url is not None
            where, image = f"messages[{i}].content[{j}]", part.image_url
            if message.role != "user":
                raise ApiError(400, f"{where}: only user messages hold images", param=where, code="unsupported_content")
            if not isinstance(image, str) and image.detail not in (None, "auto"):
                what = (
                    f"{where}.image_url.detail is {image.detail}: images are seen as the model sees them, leave it out"
                )
                raise ApiError(400, what, param=f"{where}.image_url.detail", code="unsupported_parameter")
            found.append((where, image if isinstance(image, str) else image.url))
    if not (await state.about(model)).sees:
        raise unseen(found[0][0])
    fetcher, who, counts = state.fetcher, caller(), state.counts

    def took(size: int) -> None:
        if counts.bodies + size > max(state.settings.max_bodies, state.settings.max_body):
            raise ApiError(
                503,
                "cannot be fetched now: those of all requests together are larger than this server holds",
                code="server_busy",
                retry_after=1,
            )
        counts.bodies += size
        who.fetched += size

    async def fetch(url: str) -> bytes:
        assert fetcher is not None
        left = min(MOST_BYTES, state.settings.max_body - who.fetched)
        return await fetcher.fetch(url, left, took)

    taken = await pictures(found, None if fetcher is None else fetch)
    return await asyncio.to_thread(
        lambda: {where: picture.url for (where, _), picture in zip(found, taken, strict=True)}
    )


def unseen(where: str) -> ApiError:
    """Why an image is not taken where there is only text."""
    return ApiError(
        400, f"{where} is an image, and this model reads text only", param=where, code="unsupported_content"
    )

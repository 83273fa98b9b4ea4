"""Images of requests: what a client wrote, as bytes that are what they say. No torch, and no pixels.

An image is let in by its header: its format, its size and that it is one picture are known before anything decodes it, which is
left to the process of the model that sees it. Addresses are another matter: `herd.server.fetching`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from herd.server.errors import ApiError

__all__ = ["MOST_BYTES", "MOST_PICTURES", "MOST_PIXELS", "Picture", "looked_at", "pictures"]

MOST_PICTURES = 16
"""Of one request."""
MOST_BYTES = 20 << 20
"""Of one image, as it is stored."""
MOST_PIXELS = 40_000_000
"""Of one image: 160 MB when it is decoded. Cameras make 12 to 24 million, sometimes 48."""
LONGEST_SIDE = 1 << 14
PIECE = 1 << 20
"""Characters of base64 that are decoded at a time: the interpreter does nothing else meanwhile."""
KINDS = ("png", "jpeg", "gif", "webp")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image: `kind` is png, jpeg, gif or webp, its size in pixels is that of its header."""

    kind: str
    width: int
    height: int
    data: bytes

    @property
    def url(self) -> str:
        """It as a data: URL, with the type that it really has."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


Fetch = Callable[[str], Awaitable[bytes]]
"""The bytes behind an address. Raises ApiError, whose message goes on from "the image"."""


async def pictures(urls: list[tuple[str, str]], fetch: Fetch | None) -> list[Picture]:
    """The images that a request names, as (where, address). Raises ApiError (400) naming the place.

    Without `fetch` only data: URLs are taken. All of these are looked at before the first address is opened.
    """
    if len(urls) > MOST_PICTURES:
        where = urls[MOST_PICTURES][0]
        raise _refusal(where, f"is image {MOST_PICTURES + 1} of the request, and {MOST_PICTURES} are all that may be")
    found: dict[int, Picture] = {}
    for i, (where, url) in enumerate(urls):
        if url[:5].lower() == "data:":
            found[i] = await asyncio.to_thread(_decoded, url, where)
        elif fetch is None:
            raise _refusal(
                where,
                "is no data: URL, and this server opens no addresses: send the image itself as data:image/png;base64,..., or "
                "start the server with --fetch-images",
                code="image_not_fetched",
            )
    for i, (where, url) in enumerate(urls):
        if i not in found:
            assert fetch is not None
            try:
                data = await fetch(url)
            except ApiError as error:
                raise ApiError(
                    error.status, f"{where}: the image {error.message}", param=where, code=error.code,
                    retry_after=error.retry_after,
                ) from None  # fmt: skip
            found[i] = _checked(data, where)
    return [found[i] for i in range(len(urls))]


def _decoded(url: str, where: str) -> Picture:
    head, comma, text = url.partition(",")
    kind, *parameters = head[5:].lower().split(";")
    if not comma or not parameters or parameters[-1] != "base64":
        raise _refusal(where, "is no data: URL in base64: expected data:image/png;base64,...")
    if kind not in (*(f"image/{one}" for one in KINDS), "image/jpg"):
        raise _refusal(where, f"is of type {kind[:40]!a}: expected image/{', image/'.join(KINDS)}")
    if len(text) // 4 * 3 > MOST_BYTES + 2:
        raise _refusal(where, _large(len(text) // 4 * 3))
    parts = []
    try:
        for start in range(0, len(text), PIECE):
            parts.append(binascii.a2b_base64(text[start : start + PIECE].encode("ascii"), strict_mode=True))
            if start + PIECE < len(text) and text[start + PIECE - 1] == "=":
                raise ValueError
    except ValueError:
        raise _refusal(where, "is not base64") from None
    return _checked(b"".join(parts), where)


def _checked(data: bytes, where: str) -> Picture:
    if len(data) > MOST_BYTES:
        raise _refusal(where, _large(len(data)))
    try:
        found = looked_at(data)
    except ValueError as error:
        raise _refusal(where, str(error)) from None
    return found


def _large(size: int) -> str:
    return f"has {size:,} bytes, and {MOST_BYTES:,} are all that may be"


def _refusal(where: str, what: str, code: str = "invalid_image") -> ApiError:
    return ApiError(400, f"{where}: the image {what}", param=where, code=code)


def looked_at(data: bytes) -> Picture:
    """What the header of an image says. Raises ValueError, in words that go on from "the image", for what is none, what moves,
    and what is too large."""
    try:
        kind, width, height = _header(data)
    except (struct.error, IndexError):
        raise ValueError("ends in the middle of its header") from None
    if not (0 < width <= LONGEST_SIDE and 0 < height <= LONGEST_SIDE and width * height <= MOST_PIXELS):
        raise ValueError(
            f"is {width:,} x {height:,}: expected up to {MOST_PIXELS:,} pixels, and no side longer than {LONGEST_SIDE:,}"
        )
    return Picture(kind, width, height, data)


def _header(data: bytes) -> tuple[str, int, int]:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", *_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg", *_jpeg(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif", *_gif(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", *_webp(data)
    raise ValueError("is in no format that is known here: expected PNG, JPEG, GIF or WebP")


_MOVES = "moves: send the one picture that is meant"


def _png(data: bytes) -> tuple[int, int]:
    """PNG specification, 5.3 and 11.2: chunks of length, type, content and CRC; IHDR is the first. acTL: it is animated."""
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        raise ValueError("is a PNG that does not begin with its header")
    at = 8
    for _ in range(10_000):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"acTL":
            raise ValueError(_MOVES)
        if kind == b"IDAT":
            return width, height
        at += 12 + length
    raise ValueError("is a PNG without pixels")


def _jpeg(data: bytes) -> tuple[int, int]:
    """ITU T.81, B.1.1: segments of a marker and a length; those of a frame (SOF) have its size."""
    at = 2
    for _ in range(10_000):
        if data[at] != 0xFF:
            raise ValueError("is a JPEG whose segments do not follow each other")
        marker = data[at + 1]
        if marker == 0xFF:  # fill bytes
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if marker in (0xD9, 0xDA) or length < 2:
            break
        at += 2 + length
    raise ValueError("is a JPEG without a frame")


def _gif(data: bytes) -> tuple[int, int]:
    """GIF89a specification, 18 to 26: a screen, and blocks on it. Each picture must lie on the screen."""
    width, height, packed = struct.unpack_from("<HHB", data, 6)
    at, seen = 13 + _colours(packed), 0
    for _ in range(100_000):
        block = data[at] if at < len(data) else 0x3B  # many end without a trailer
        if block == 0x3B:
            break
        if block == 0x21:
            at += 2
        elif block == 0x2C:
            left, top, w, h, packed = struct.unpack_from("<HHHHB", data, at + 1)
            seen += 1
            if left + w > width or top + h > height:
                raise ValueError("is a GIF whose picture is larger than its screen")
            at += 11 + _colours(packed)
        else:
            raise ValueError("is a GIF whose blocks do not follow each other")
        if seen > 1:
            raise ValueError(_MOVES)
        while data[at]:
            at += 1 + data[at]
        at += 1
    if not seen:
        raise ValueError("is a GIF without a picture")
    return width, height


def _colours(packed: int) -> int:
    return 3 << ((packed & 7) + 1) if packed & 0x80 else 0


def _webp(data: bytes) -> tuple[int, int]:
    """RFC 9649, 2: VP8X has the canvas; a picture without it begins with its own header."""
    kind = data[12:16]
    if kind == b"VP8X":
        flags, canvas = data[20], data[24:30]
        if len(canvas) < 6:
            raise IndexError
        if flags & 0x02:
            raise ValueError(_MOVES)
        size = 1 + int.from_bytes(canvas[:3], "little"), 1 + int.from_bytes(canvas[3:], "little")
        inner = next((at for name, at in _chunks(data) if name in (b"VP8 ", b"VP8L")), None)
        if inner is None or _frame(data, inner) != size:
            raise ValueError("is a WebP whose picture is not as large as it says")
        return size
    if kind not in (b"VP8 ", b"VP8L"):
        raise ValueError("is a WebP of a kind that is not known here")
    return _frame(data, 12)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    at = 12
    while at + 8 <= len(data):
        yield data[at : at + 4], at
        (length,) = struct.unpack_from("<I", data, at + 4)
        at += 8 + length + (length & 1)


def _frame(data: bytes, at: int) -> tuple[int, int]:
    """The size of the VP8 (RFC 6386, 9.1) or VP8L picture whose chunk is at `at`."""
    if data[at : at + 4] == b"VP8 ":
        if data[at + 11 : at + 14] != b"\x9d\x01\x2a":
            raise ValueError("is a WebP whose picture does not begin with a key frame")
        width, height = struct.unpack_from("<HH", data, at + 14)
        return width & 0x3FFF, height & 0x3FFF
    if data[at + 8] != 0x2F:
        raise ValueError("is a WebP without its signature")
    (bits,) = struct.unpack_from("<I", data, at + 9)
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)

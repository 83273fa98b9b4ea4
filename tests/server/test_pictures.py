"""Images: what is let in by its header, and how, beside images that Pillow makes and bytes that want to do harm."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import struct
import time
import zlib
from typing import Any

import pytest

from herd.server import pictures as intake
from herd.server.errors import ApiError
from herd.server.pictures import MOST_PICTURES, looked_at, pictures

Image = pytest.importorskip("PIL.Image", reason="Pillow makes the images that are looked at")
SEED = 11


def made(kind: str, size: tuple[int, int], mode: str = "RGB", **how: Any) -> bytes:
    """An image as Pillow writes it."""
    out = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(out, kind, **how)
    return out.getvalue()


def moving(kind: str) -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "green")]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=50)
    return out.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def taken(*urls: str, fetch: Any = None) -> list[intake.Picture]:
    return asyncio.run(pictures([(f"at {i}", one) for i, one in enumerate(urls)], fetch))


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (640, 3)])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("PNG", {}),
        ("PNG", {"mode": "RGBA", "optimize": True}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + b"x" * 60_000}),
        ("JPEG", {"mode": "CMYK"}),
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 40}),
        ("WEBP", {"mode": "RGBA", "quality": 40, "exif": b"Exif\0\0MM"}),
    ],
)
def test_size_and_kind_are_those_that_pillow_wrote(kind: str, how: dict[str, Any], size: tuple[int, int]) -> None:
    data = made(kind, size, **how)
    found = looked_at(data)
    assert (found.kind, found.width, found.height) == (kind.lower(), *size)
    assert base64.b64decode(found.url.partition(",")[2]) == data
    assert taken(url(data, "png")) == [found], "the header decides, whatever the address says"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_what_moves_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="moves"):
        looked_at(moving(kind))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is enormous."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31, 1), (0, 5), (5, 0), (7000, 7000), (1, 16_385)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="pixels"):
        looked_at(bomb(*size))
    assert looked_at(bomb(5000, 4000)).width == 5000, "20 megapixels are fine"


def test_pictures_that_hide_a_larger_one() -> None:
    gif = bytearray(made("GIF", (40, 30)))
    struct.pack_into("<HH", gif, 6, 4, 3)  # a small screen around it
    with pytest.raises(ValueError, match="larger than its screen"):
        looked_at(bytes(gif))
    webp = bytearray(made("WEBP", (40, 30), mode="RGBA", exif=b"Exif\0\0MM"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (0).to_bytes(3, "little") * 2
    with pytest.raises(ValueError, match="not as large as it says"):
        looked_at(bytes(webp))


def test_damaged_images_are_refused_in_words() -> None:
    """Cut at every byte and changed at random: a ValueError or a picture, nothing else, and soon."""
    rng = random.Random(SEED)
    began = time.process_time()
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        whole = made(kind, (31, 17))
        others = [whole[:cut] for cut in range(min(len(whole), 700))]
        for _ in range(400):
            changed = bytearray(whole)
            for _ in range(rng.randint(1, 6)):
                changed[rng.randrange(min(len(changed), 200))] = rng.randrange(256)
            others.append(bytes(changed))
        for one in others:
            said = ""
            try:
                found = looked_at(one)
            except ValueError as error:
                said = str(error)
            assert said[:3] in ("is ", "end", "mov") if said else found.width * found.height <= intake.MOST_PIXELS
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (b"\xff\xd8\xff" + b"\xff" * 20_000, "frame"),
        (b"\xff\xd8\xff\xe0\x00\x00" * 5000, "frame"),
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 5, 5) + b"\0" * 1_000_000, "pixels|middle"),
        (b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b"\x21\xf9\x00" * 300_000, "picture"),
        (b"RIFF\0\0\0\0WEBPVP8X" + b"\0" * 400_000, "WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no format"),
        (b"%PDF-1.7", "no format"),
        (b"", "no format"),
    ],
)
def test_hostile_images_are_refused_soon(hostile: bytes, words: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=words):
        looked_at(hostile)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("data:image/png;base64," + "A" * 27_962_040, "bytes, and"),
        ("data:image/png;base64,####", "not base64"),
        ("data:image/png;base64,iVBORw0KGgo=AAAA", "not base64"),
        ("data:image/png;base64,\u00e9", "not base64"),
        ("data:image/png,abc", "in base64"),
        ("data:;base64,AAAA", "of type"),
        ("data:text/html;base64,AAAA", "of type"),
        ("data:image/svg+xml;base64,AAAA", "of type"),
        ("data:image/png;base64,AAAA", "no format"),
        ("DATA:IMAGE/PNG;BASE64,AAAA", "no format"),
        ("data:", "in base64"),
        ("https://example.org/a.png", "opens no addresses"),
        ("file:///etc/passwd", "opens no addresses"),
        ("/etc/passwd", "opens no addresses"),
        ("", "opens no addresses"),
    ],
)
def test_addresses_that_are_refused(given: str, words: str) -> None:
    good = url(made("PNG", (2, 2)))
    with pytest.raises(ApiError, match=words) as told:
        taken(good, given)
    assert (told.value.status, told.value.param) == (400, "at 1")
    assert len(str(told.value)) < 300


def test_there_are_not_many() -> None:
    good = url(made("PNG", (2, 2)))
    assert len(taken(*[good] * MOST_PICTURES)) == MOST_PICTURES
    with pytest.raises(ApiError, match="all that may be") as told:
        taken(*[good] * (MOST_PICTURES + 1))
    assert told.value.param == f"at {MOST_PICTURES}"


def test_nothing_is_fetched_for_a_request_that_is_wrong_anyway() -> None:
    asked: list[str] = []

    async def fetch(address: str) -> bytes:
        asked.append(address)
        return made("PNG", (3, 4))

    with pytest.raises(ApiError):
        taken("https://example.org/a.png", "data:image/png;base64,####", fetch=fetch)
    assert asked == []
    found = taken("https://example.org/a.png", url(made("JPEG", (5, 6))), fetch=fetch)
    assert [(one.kind, one.width) for one in found] == [("png", 3), ("jpeg", 5)]
    assert asked == ["https://example.org/a.png"]

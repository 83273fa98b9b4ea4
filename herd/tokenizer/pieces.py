"""The SentencePiece model file, read and written by hand: pieces with scores and types, and the two specs that follow.

Format: a protobuf message (google/sentencepiece, src/sentencepiece_model.proto); fields used here are ModelProto.pieces = 1,
trainer_spec = 2, normalizer_spec = 3. Writing it lets `tokenizer.json` and GGUF vocabularies run on the same library as
`tokenizer.model`. Damage is a CheckpointError that names the byte offset, a rule Llama does not use a TokenizerError.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from herd.errors import CheckpointError, TokenizerError

__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "PieceModel", "byte_piece"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Piece types, as the protobuf file and GGUF number them."""

_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceModel:
    """A SentencePiece BPE vocabulary with Llama's rules: no normalisation, spaces as U+2581, byte fallback.

    `pieces[i]`, `scores[i]` and `types[i]` describe id i. `dummy_prefix`: one space is put before the text. `source` is the
    file that says exactly this, when there is one.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    dummy_prefix: bool = True
    source: bytes | None = None

    def __post_init__(self) -> None:
        n = len(self.pieces)
        if len(self.scores) != n or len(self.types) != n:
            raise TokenizerError(
                f"{n} pieces, {len(self.scores)} scores and {len(self.types)} types: the three lists must be equally long"
            )
        for id, (piece, kind) in enumerate(zip(self.pieces, self.types, strict=True)):
            if not piece:
                raise TokenizerError(f"piece {id} is empty")
            if kind == BYTE and byte_piece(piece) is None:
                raise TokenizerError(f"piece {id} has the byte type but is called {piece!r} instead of <0x00>..<0xFF>")
        n_bytes = sum(kind == BYTE for kind in self.types)
        if n_bytes != 256:
            raise TokenizerError(f"{n_bytes} byte pieces; Llama's byte fallback needs all 256, <0x00> to <0xFF>")
        if sum(kind == UNKNOWN for kind in self.types) != 1:
            raise TokenizerError("a SentencePiece vocabulary has exactly one piece of the unknown type, <unk>")

    def with_types(self, types: Sequence[int]) -> PieceModel:
        """The same vocabulary with other piece types."""
        return replace(self, types=types, source=None)

    def with_added(self, added: Sequence[tuple[str, int]]) -> PieceModel:
        """The same vocabulary with control pieces appended; the ids must follow the last piece without a gap."""
        n = len(self.pieces)
        ids = [id for _, id in added]
        if ids != list(range(n, n + len(added))):
            raise TokenizerError(f"added tokens have ids {ids[:8]}; after {n} pieces they must be {n}, {n + 1}, ...")
        return replace(
            self,
            pieces=[*self.pieces, *(name for name, _ in added)],
            scores=[*self.scores, *([0.0] * len(added))],
            types=[*self.types, *([CONTROL] * len(added))],
            source=None,
        )

    def serialize(self) -> bytes:
        """The file as the sentencepiece library reads it."""
        if self.source is not None:
            return self.source
        out = bytearray()
        for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True):
            body = _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
            if kind != NORMAL:
                body += _field(3, kind)
            out += _field(1, body)
        trainer = _field(3, _BPE) + _field(4, len(self.pieces)) + _field(35, 1)
        for number, name in ((45, "<unk>"), (46, "<s>"), (47, "</s>")):
            trainer += _field(number, name.encode())
        out += _field(2, trainer)
        # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
        out += _field(3, _field(1, b"identity") + _field(3, int(self.dummy_prefix)) + _field(4, 0) + _field(5, 1))
        return bytes(out)

    @classmethod
    def parse(cls, data: bytes, path: str | os.PathLike[str] | None = None) -> PieceModel:
        """Read the bytes of a `tokenizer.model`. Raises CheckpointError (damage) or TokenizerError (not Llama's rules)."""
        pieces: list[str] = []
        scores: list[float] = []
        types: list[int] = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        at = 0
        try:
            for number, value, begin in _fields(data, 0, len(data)):
                at = begin
                if number == 1:
                    start, end = _span(value)
                    piece, score, kind = b"", 0.0, NORMAL
                    for inner, got, _ in _fields(data, start, end):
                        if inner == 1:
                            a, b = _span(got)
                            piece = data[a:b]
                        elif inner == 2:
                            (score,) = struct.unpack_from("<f", data, _span(got)[0])
                        elif inner == 3:
                            kind = _int(got)
                    pieces.append(piece.decode())
                    scores.append(score)
                    types.append(kind)
                elif number in (2, 3):
                    spec = trainer if number == 2 else normalizer
                    for inner, got, _ in _fields(data, *_span(value)):
                        spec[inner] = got if isinstance(got, int) else data[slice(*got)]
        except _Damage as damage:
            raise CheckpointError(damage.args[0], path=path, offset=damage.args[1]) from None
        except UnicodeDecodeError:
            raise CheckpointError(f"piece {len(pieces)} is not UTF-8", path=path, offset=at) from None
        if not pieces or not normalizer:
            raise CheckpointError(
                "not a complete SentencePiece model: no pieces, or no normaliser at the end", path=path
            )
        _require_llama_rules(trainer, normalizer)
        return cls(pieces=pieces, scores=scores, types=types, dummy_prefix=normalizer.get(3, 1) == 1, source=data)


def byte_piece(piece: str) -> int | None:
    """The byte a piece such as `<0x0A>` stands for, or None."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


def _require_llama_rules(trainer: dict[int, int | bytes], normalizer: dict[int, int | bytes]) -> None:
    # Defaults of absent fields are the proto's: unigram, no fallback, remove_extra_whitespaces, escape_whitespaces.
    rules = [
        ("trainer_spec.model_type is not BPE", trainer.get(3, 1) == _BPE),
        ("trainer_spec.byte_fallback is off", trainer.get(35, 0) == 1),
        ("trainer_spec.treat_whitespace_as_suffix is on", trainer.get(24, 0) == 0),
        ("normalizer_spec has a character map; Llama's is 'identity'", not normalizer.get(2)),
        ("normalizer_spec.remove_extra_whitespaces is on", normalizer.get(4, 1) == 0),
        ("normalizer_spec.escape_whitespaces is off", normalizer.get(5, 1) == 1),
    ]
    broken = [text for text, kept in rules if not kept]
    if broken:
        raise TokenizerError(f"not a Llama SentencePiece vocabulary: {'; '.join(broken)}")


class _Damage(Exception):
    """Message and byte offset."""


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int | tuple[int, int], int]]:
    """(field number, value, offset) of each field: an int for varints, (start, end) for everything else."""
    while at < end:
        begin = at
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number == 0 or wire not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise _Damage("not a SentencePiece model (protobuf) at this point", begin)
        if wire == _VARINT:
            value, at = _varint(data, at, end)
            yield number, value, begin
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, end)
        else:
            size = 4 if wire == _FIXED32 else 8
        if at + size > end:
            raise _Damage(f"the file is cut off: {size} bytes announced, {end - at} there", begin)
        yield number, (at, at + size), begin
        at += size


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    begin = at
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Damage("the file is cut off or is not a SentencePiece model (protobuf)", begin)


def _span(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        raise _Damage("not a SentencePiece model: a number where bytes belong", value)
    return value


def _int(value: int | tuple[int, int]) -> int:
    if not isinstance(value, int):
        raise _Damage("not a SentencePiece model: bytes where a number belongs", value[0])
    return value


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

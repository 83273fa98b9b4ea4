"""Damaged and malicious GGUF files, reproducible from a seed.

Three sources: the structural classes known from incidents in llama.cpp and Ollama, truncation at every structural boundary
and one byte around it, and random mutations of bytes, bits and length fields. Files are built byte by byte here, because
the gguf package refuses to write wrong ones.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice

__all__ = ["CLASSES", "Case", "all_cases", "render", "structural", "valid"]

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
_CODES = {U8: "<B", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q"}
_SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210), 30: (1, 2)}


@dataclass(frozen=True)
class Value:
    """A metadata value; `element` is set for arrays. The stated `kind`, `count` and string lengths may lie."""

    kind: int
    data: object
    element: int | None = None
    count: int | None = None


@dataclass(frozen=True)
class Info:
    """A tensor description. `dims` is innermost first, `offset` None places it behind the previous one."""

    name: bytes
    dims: tuple[int, ...]
    kind: int = 0
    offset: int | None = None
    n_dims: int | None = None
    name_length: int | None = None


@dataclass(frozen=True)
class File:
    """Everything a file says, before it is bytes."""

    keys: list[tuple[bytes, Value]]
    tensors: list[Info]
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    alignment: int = 32
    data: bytes | None = None
    lengths: dict[bytes, int] = field(default_factory=dict)  # key -> lie about its length


class _Bytes:
    """A buffer that remembers where each field starts: (offset, size, whether it is a length, count, size or offset)."""

    def __init__(self) -> None:
        self.raw = bytearray()
        self.fields: list[tuple[int, int, bool]] = []

    def put(self, code: str, value: object, counts: bool = False) -> None:
        packed = struct.pack(code, value)
        self.fields.append((len(self.raw), len(packed), counts))
        self.raw += packed

    def put_bytes(self, data: bytes) -> None:
        self.fields.append((len(self.raw), len(data), False))
        self.raw += data

    def put_string(self, data: bytes, length: int | None = None) -> None:
        self.put("<Q", len(data) if length is None else length, True)
        self.put_bytes(data)


@dataclass(frozen=True)
class Image:
    """A file as bytes, with its structural fields."""

    raw: bytes
    fields: tuple[tuple[int, int, bool], ...]


def render(file: File) -> Image:
    """The bytes of `file`, right or wrong."""
    out = _Bytes()
    out.put_bytes(file.magic)
    out.put("<I", file.version, True)
    out.put("<Q", len(file.tensors) if file.n_tensors is None else file.n_tensors, True)
    out.put("<Q", len(file.keys) if file.n_keys is None else file.n_keys, True)
    for key, value in file.keys:
        out.put_string(key, file.lengths.get(key))
        _put_value(out, value)
    offset = 0
    for info in file.tensors:
        out.put_string(info.name, info.name_length)
        out.put("<I", len(info.dims) if info.n_dims is None else info.n_dims, True)
        for n in info.dims:
            out.put("<Q", n % (1 << 64), True)
        out.put("<I", info.kind, True)
        out.put("<Q", offset if info.offset is None else info.offset, True)
        offset += _padded(_nbytes(info), file.alignment)
    start = _padded(len(out.raw), file.alignment)
    out.put_bytes(b"\0" * (start - len(out.raw)))
    data = _noise(offset) if file.data is None else file.data
    for at in range(0, len(data), max(1, len(data) // 8)):
        out.fields.append((start + at, 0, False))
    return Image(bytes(out.raw + data), tuple(out.fields))


def _put_value(out: _Bytes, value: Value) -> None:
    out.put("<I", value.kind, True)
    if value.element is not None:
        assert isinstance(value.data, list)
        out.put("<I", value.element, True)
        out.put("<Q", len(value.data) if value.count is None else value.count, True)
        for item in value.data:
            _put_item(out, value.element, item)
    else:
        _put_item(out, value.kind, value.data, value.count)


def _put_item(out: _Bytes, kind: int, item: object, length: int | None = None) -> None:
    if isinstance(item, bytes):
        out.put_string(item, length)
    else:
        out.put(_CODES.get(kind, "<f" if isinstance(item, float) else "<I"), item)


def _nbytes(info: Info) -> int:
    values, size = _SIZES.get(info.kind, (1, 4))
    total = 1
    for n in info.dims:
        total *= n
    return min(total // values * size, 1 << 20) if total > 0 else 0


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment if alignment > 0 else n


@cache
def _noise(n: int) -> bytes:
    return random.Random(n).randbytes(n)


def valid() -> list[File]:
    """Five small valid models: Llama 2 in F32, 3.1 in Q8_0 with a table, K-quants, Llama 4, another alignment and version."""
    return [
        _llama(kind=0),
        _llama(kind=8, scaled=True),
        _llama(kind=12, width=256, tied=True),
        _llama4(),
        replace(_llama(kind=30, extra=[(b"general.alignment", Value(U32, 64))]), alignment=64, version=2),
    ]


def _words(count: int) -> Value:
    return Value(ARRAY, [b"t%d" % i for i in range(count)], element=STRING)


def _keys(arch: bytes, numbers: dict[bytes, object]) -> list[tuple[bytes, Value]]:
    keys = [(b"general.architecture", Value(STRING, arch)), (b"general.name", Value(STRING, "ü".encode()))]
    for name, number in numbers.items():
        keys.append((arch + b"." + name, Value(F32 if isinstance(number, float) else U32, number)))
    return keys


def _llama(
    kind: int, width: int = 32, tied: bool = False, scaled: bool = False, extra: list[tuple[bytes, Value]] | None = None
) -> File:
    vocab = 9
    keys = _keys(
        b"llama",
        {
            b"context_length": 64, b"embedding_length": width, b"block_count": 1, b"feed_forward_length": width,
            b"attention.head_count": 2, b"attention.head_count_kv": 1, b"attention.layer_norm_rms_epsilon": 1e-5,
            b"rope.freq_base": 500000.0, b"rope.dimension_count": width // 2,
        },
    )  # fmt: skip
    keys += [
        (b"tokenizer.ggml.model", Value(STRING, b"llama")),
        (b"tokenizer.ggml.tokens", _words(vocab)),
        (b"tokenizer.ggml.scores", Value(ARRAY, [-float(i) for i in range(vocab)], element=F32)),
        (b"tokenizer.ggml.token_type", Value(ARRAY, [1] * vocab, element=I32)),
        (b"tokenizer.ggml.add_bos_token", Value(BOOL, 1)),
        *(extra or []),
    ]
    half, blk = width // 2, b"blk.0."
    tensors = [
        Info(b"token_embd.weight", (width, vocab), kind),
        Info(b"output_norm.weight", (width,)),
        Info(blk + b"attn_norm.weight", (width,)),
        Info(blk + b"attn_q.weight", (width, width), kind),
        Info(blk + b"attn_k.weight", (width, half), kind),
        Info(blk + b"attn_v.weight", (width, half), kind),
        Info(blk + b"attn_output.weight", (width, width), kind),
        Info(blk + b"ffn_norm.weight", (width,)),
        Info(blk + b"ffn_gate.weight", (width, width), kind),
        Info(blk + b"ffn_up.weight", (width, width), kind),
        Info(blk + b"ffn_down.weight", (width, width), kind),
    ]
    if not tied:
        tensors.append(Info(b"output.weight", (width, vocab), kind))
    file = File(keys, tensors)
    return _with_table(file, half // 2) if scaled else file


def _with_table(file: File, n: int) -> File:
    """Divisors that are all 1, in front of the other data."""
    ones = struct.pack(f"<{n}f", *[1.0] * n)
    ones += b"\0" * (_padded(len(ones), 32) - len(ones))
    tensors = [Info(b"rope_freqs.weight", (n,)), *file.tensors]
    data = ones + _noise(sum(_padded(_nbytes(t), 32) for t in file.tensors))
    return replace(file, tensors=tensors, data=data)


def _llama4() -> File:
    width, experts = 32, 4
    keys = _keys(
        b"llama4",
        {
            b"context_length": 64, b"embedding_length": width, b"block_count": 1, b"feed_forward_length": 64,
            b"attention.head_count": 2, b"attention.head_count_kv": 1, b"attention.layer_norm_rms_epsilon": 1e-5,
            b"expert_count": experts, b"expert_used_count": 1, b"interleave_moe_layer_step": 1,
            b"expert_feed_forward_length": width,
        },
    )  # fmt: skip
    blk = b"blk.0."
    tensors = [Info(name, (width, 16)) for name in (b"token_embd.weight", b"output.weight")]
    tensors += [
        Info(name, (width,)) for name in (b"output_norm.weight", blk + b"attn_norm.weight", blk + b"ffn_norm.weight")
    ]
    tensors += [Info(blk + b"attn_" + n + b".weight", (width, 16 if n in (b"k", b"v") else width), 8)
                for n in (b"q", b"k", b"v", b"output")]  # fmt: skip
    tensors.append(Info(blk + b"ffn_gate_inp.weight", (width, experts)))
    for n in (b"gate", b"up", b"down"):
        tensors.append(Info(blk + b"ffn_" + n + b"_exps.weight", (width, width, experts), 2))
        tensors.append(Info(blk + b"ffn_" + n + b"_shexp.weight", (width, width), 8))
    return File(keys, tensors)


Maker = Callable[[File, random.Random], File]


def _with_key(key: bytes, value: Value) -> Maker:
    return lambda f, r: replace(f, keys=_inserted([k for k in f.keys if k[0] != key], (key, value), r))


def _inserted(items: list, item: object, r: random.Random) -> list:
    place = r.randrange(len(items) + 1)
    return [*items[:place], item, *items[place:]]


def _tensor(change: Callable[[Info, random.Random], Info]) -> Maker:
    def make(f: File, r: random.Random) -> File:
        i = r.randrange(len(f.tensors))
        return replace(f, tensors=[*f.tensors[:i], change(f.tensors[i], r), *f.tensors[i + 1 :]])

    return make


def _one_key(change: Callable[[Value, random.Random], Value], *, strings: bool = False, arrays: bool = False) -> Maker:
    def make(f: File, r: random.Random) -> File:
        fits = [
            i for i, (_, v) in enumerate(f.keys)
            if (v.element is not None if arrays else v.element is None and (v.kind == STRING) == strings)
        ]  # fmt: skip
        if not fits:
            return make(_llama(0), r)
        i = r.choice(fits)
        key, value = f.keys[i]
        return replace(f, keys=[*f.keys[:i], (key, change(value, r)), *f.keys[i + 1 :]])

    return make


def _lie_about_key(f: File, r: random.Random, length: int) -> File:
    return replace(f, lengths={r.choice(f.keys)[0]: length})


def _repeated_key(f: File, r: random.Random) -> File:
    return replace(f, keys=_inserted(f.keys, r.choice(f.keys), r))


def _repeated_name(f: File, r: random.Random) -> File:
    return replace(f, tensors=_inserted(f.tensors, r.choice(f.tensors), r))


def _first_dim(n: int) -> Maker:
    return _tensor(lambda t, r: replace(t, dims=(n, *t.dims[1:])))


def _big(r: random.Random) -> int:
    return r.choice([(1 << 64) - 1, (1 << 63) + 1, 1 << 62, 1 << 48, 1 << 40, (1 << 32) + 1, 1 << 31])


CLASSES: dict[str, Maker] = {
    "bad magic": lambda f, r: replace(f, magic=r.choice([b"GGUG", b"FUGG", b"ggml", b"\0\0\0\0", b"PK\3\4"])),
    "version 0": lambda f, r: replace(f, version=0),
    "version 1": lambda f, r: replace(f, version=1),
    "future version": lambda f, r: replace(f, version=r.randrange(4, 1 << 16)),
    "big endian": lambda f, r: replace(f, version=3 << 24),
    "tensor count -1": lambda f, r: replace(f, n_tensors=(1 << 64) - 1),
    "tensor count absurd": lambda f, r: replace(f, n_tensors=_big(r)),
    "tensor count too large": lambda f, r: replace(f, n_tensors=len(f.tensors) + r.randrange(1, 9)),
    "key count -1": lambda f, r: replace(f, n_keys=(1 << 64) - 1),
    "key count absurd": lambda f, r: replace(f, n_keys=_big(r)),
    "key count wrong": lambda f, r: replace(f, n_keys=max(0, len(f.keys) + r.choice([-3, -2, -1, 1, 2, 3]))),
    "key length -1": lambda f, r: _lie_about_key(f, r, (1 << 64) - 1),
    "key length beyond the file": lambda f, r: _lie_about_key(f, r, _big(r)),
    "empty key": _with_key(b"", Value(U32, 1)),
    "repeated key": _repeated_key,
    "key not UTF-8": _with_key(b"general.\xff\xfe", Value(U32, 1)),
    "unknown value type": _one_key(lambda v, r: replace(v, kind=r.choice([13, 14, 99, 1 << 31, (1 << 32) - 1]))),
    "bool out of range": _with_key(b"general.flag", Value(BOOL, 7)),
    "string length beyond the file": _one_key(lambda v, r: replace(v, count=_big(r)), strings=True),
    "string not UTF-8": _one_key(lambda v, r: replace(v, data=b"ll\xc0\x80ma"), strings=True),
    "unknown element type": _one_key(lambda v, r: replace(v, element=r.choice([13, 77, (1 << 32) - 1])), arrays=True),
    "array of arrays": _one_key(lambda v, r: replace(v, element=ARRAY), arrays=True),
    "element count beyond the file": _one_key(lambda v, r: replace(v, count=_big(r)), arrays=True),
    "element count too large": _one_key(lambda v, r: replace(v, count=1 << r.randrange(10, 31)), arrays=True),
    "alignment of wrong type": _with_key(b"general.alignment", Value(STRING, b"32")),
    "alignment 0": _with_key(b"general.alignment", Value(U32, 0)),
    "alignment no power of two": _with_key(b"general.alignment", Value(U32, 48)),
    "alignment 2^31": _with_key(b"general.alignment", Value(U32, 1 << 31)),
    "alignment other than the data's": _with_key(b"general.alignment", Value(U32, 1 << 16)),
    "no dimensions": _tensor(lambda t, r: replace(t, n_dims=0)),
    "too many dimensions": _tensor(lambda t, r: replace(t, n_dims=r.choice([5, 6, 255, 1 << 31, (1 << 32) - 1]))),
    "dimension 0": _first_dim(0),
    "dimension negative": _first_dim(-1),
    "shape overflows": _tensor(lambda t, r: replace(t, dims=(1 << 32, 1 << 32))),
    "shape wraps to zero": _tensor(lambda t, r: replace(t, dims=((1 << 42) + 1, 1 << 22, 64))),
    "bytes overflow": _tensor(lambda t, r: replace(t, dims=(1 << 61, 3))),
    "shape beyond the file": _tensor(lambda t, r: replace(t, dims=(*t.dims[:-1], t.dims[-1] + (1 << r.randrange(20, 40))))),
    "row of broken blocks": _tensor(lambda t, r: replace(t, dims=(33, *t.dims[1:]), kind=8)),
    "unknown tensor type": _tensor(lambda t, r: replace(t, kind=r.choice([4, 5, 31, 38, 77, 1 << 30, (1 << 32) - 1]))),
    "unreadable tensor type": _tensor(lambda t, r: replace(t, kind=r.choice([16, 20, 24, 27, 28]))),
    "offset misaligned": _tensor(lambda t, r: replace(t, offset=r.choice([1, 7, 16, 33]))),
    "offset beyond the file": _tensor(lambda t, r: replace(t, offset=_big(r) & ~63)),
    "data overlaps": lambda f, r: replace(f, tensors=[*f.tensors[:-1], replace(f.tensors[-1], offset=0)]),
    "repeated tensor name": _repeated_name,
    "empty tensor name": _tensor(lambda t, r: replace(t, name=b"")),
    "long tensor name": _tensor(lambda t, r: replace(t, name=t.name + b"x" * 100)),
    "tensor name length -1": _tensor(lambda t, r: replace(t, name_length=(1 << 64) - 1)),
    "no tensors": lambda f, r: replace(f, tensors=[], data=b""),
    "no keys": lambda f, r: replace(f, keys=[]),
    "truncated data": lambda f, r: replace(f, data=_noise(r.randrange(64))),
}  # fmt: skip
"""Each breaks one rule of a valid file at a random place."""


@dataclass(frozen=True)
class Case:
    """One hostile file. `must_fail` when no reader may accept it."""

    name: str
    raw: bytes
    must_fail: bool


def all_cases(seeds: int = 20, mutants: int = 3000) -> Iterator[Case]:
    """Every class `seeds` times, every truncation, and `mutants` random mutants; always the same ones."""
    yield from structural(seeds)
    yield from truncated()
    yield from islice(mutated(), mutants)


def structural(seeds: int, names: Iterable[str] = CLASSES) -> Iterator[Case]:
    """The classes `names`, on each of the valid files in turn."""
    files = valid()
    for name in names:
        for seed in range(seeds):
            file = CLASSES[name](files[seed % len(files)], random.Random(f"{name} {seed}"))
            yield Case(f"{name}, seed {seed}", render(file).raw, True)


def truncated() -> Iterator[Case]:
    """Every valid file cut at each field's start and one byte around it."""
    for index, file in enumerate(valid()):
        image = render(file)
        used = _data_end(file, image)
        cuts = sorted({at + d for at, _, _ in image.fields for d in (-1, 0, 1)} & set(range(len(image.raw))))
        for cut in cuts:
            yield Case(f"file {index} cut at {cut}", image.raw[:cut], cut < used)


def _data_end(file: File, image: Image) -> int:
    """The last byte that a tensor needs: padding behind it may be missing."""
    return len(image.raw) - (_padded(_nbytes(file.tensors[-1]), file.alignment) - _nbytes(file.tensors[-1]))


_INTERESTING = (0, 1, 2, 3, 7, 8, 9, 31, 33, 64, 127, 128, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
                1 << 32, 1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip


def mutated() -> Iterator[Case]:
    """Random damage to the part before the data, without end."""
    images = [render(file) for file in valid()]
    for seed in range(1 << 30):
        r = random.Random(seed)
        image = images[seed % len(images)]
        raw = bytearray(image.raw)
        header = image.fields[-9][0]
        for _ in range(r.choice([1, 1, 1, 2, 4, 16])):
            _damage(raw, image, min(header, len(raw) - 2), r)
        yield Case(f"mutant {seed}", bytes(raw), False)


def _damage(raw: bytearray, image: Image, header: int, r: random.Random) -> None:
    match r.randrange(7):
        case 0:
            raw[r.randrange(header)] = r.randrange(256)
        case 1:
            raw[r.randrange(header)] ^= 1 << r.randrange(8)
        case 2 | 3:
            at, size, _ = r.choice([f for f in image.fields if f[2]])
            old = int.from_bytes(raw[at : at + size], "little")
            new = r.choice([*_INTERESTING, old + 1, old - 1, old * 2, len(raw), len(raw) - at])
            raw[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        case 4:
            at = r.randrange(header)
            del raw[at : at + r.randrange(1, 9)]
        case 5:
            at = r.randrange(header)
            raw[at:at] = r.randbytes(r.randrange(1, 9))
        case _:
            one, two, size = r.randrange(header), r.randrange(header), r.randrange(1, 40)
            raw[one : one + size] = raw[two : two + size]

"""GPTQ: integers packed along the input axis in 32-bit words, a float16 scale and a packed zero for every group of inputs.

qweight int32 [in * bits / 32, out], qzeros int32 [G, out * bits / 32], scales [G, out], g_idx int32 [in]; x = scale * (q - zero).
Format `gptq` (v1) stores every zero less one, packed: adding one to each field of a word undoes it, with the carries that
packing -1 made. `gptq_v2` stores zeros as they are. With `desc_act` (act-order) g_idx is not sorted: neighbouring columns have
different scales. Source: AutoGPTQ and GPTQModel, their torch layers and converters between the two formats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.checkpoint.fields import Fields
from herd.checkpoint.quantized.module import WIDE, Module, Packed
from herd.files import short
from herd.quant.layout import words_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GptqScheme"]

BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in every field of a word."""

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""checkpoint_format -> what stored zeros lack."""


class GptqScheme:
    """`quantization_config` with `quant_method` "gptq", or quantize_config.json of the first releases of AutoGPTQ.

    Raises ConfigError for what herd cannot read.
    """

    name = "GPTQ"
    notes: tuple[str, ...] = ()

    def __init__(self, f: Fields) -> None:
        self.bits = f.whole("bits")
        if self.bits not in BITS:
            f.fail("bits", f"is {self.bits}: GPTQ weights have {', '.join(map(str, BITS))} bits")
        self.group = group_size(f, "group_size")
        self.act_order, self.symmetric = f.flag("desc_act", False), f.flag("sym", True)
        key = "checkpoint_format" if f.has("checkpoint_format") else "format"
        kind = f.text(key, "gptq")
        if kind not in _FORMATS or f.flag("is_marlin_format", False):
            f.fail(
                key,
                f"is {short(kind)}: herd reads {' and '.join(_FORMATS)}; marlin files are packed for one GPU kernel",
            )
        self.lack = _FORMATS[kind]
        self.others = _others(f)

    def open(self, module: Module) -> Packed | None:
        """The module as GPTQ stores it; None when its weight is plain."""
        parts = [part for part in ("qweight", "qzeros", "scales", "g_idx") if module.has(part)]
        if not parts or (parts == ["scales"] and module.has("weight")):
            return None
        rows, columns = module.shape
        width = {bits for bits in (self.bits, *self.others) if columns * bits % 32 == 0}
        found = module.describe("qweight").shape
        bits = next(
            (b for b in sorted(width, key=lambda b: b != self.bits) if found == (words_of(columns, b), rows)), None
        )
        return Gptq(module, self, bits or self.bits)


class Gptq(Packed):
    """One matrix."""

    def __init__(self, module: Module, scheme: GptqScheme, bits: int) -> None:
        super().__init__(module)
        self.word, self.bits, self.lack = f"GPTQ{bits}", bits, scheme.lack
        self.lowest, self.highest = 0, (1 << bits) - 1
        self._symmetric = scheme.symmetric
        rows, columns = module.shape
        module.expect("qweight", ("int32",), (words_of(columns, bits), rows))
        groups = module.expect("scales", WIDE).shape[0] if module.describe("scales").shape else 0
        wanted = scheme.group or columns
        if groups != -(-columns // wanted) and not (bits != scheme.bits and groups and columns % groups == 0):
            module.fail(
                "scales", f"has {groups} groups; group_size {wanted} makes {-(-columns // wanted)} of {columns} inputs"
            )
        self._run = wanted if groups == -(-columns // wanted) else columns // groups
        module.expect("scales", WIDE, (groups, rows))
        module.expect("qzeros", ("int32",), (groups, words_of(rows, bits)))
        self._sorted = not module.has("g_idx")
        if module.has("g_idx"):
            module.expect("g_idx", ("int32", "int64"), (columns,))
        elif scheme.act_order and groups > 1:
            module.describe("g_idx")  # raises: nothing else says which columns belong together
        elif columns % self._run:
            module.fail("scales", f"group_size {self._run} does not divide {columns} inputs, and there is no g_idx")
        self._order = scheme.act_order and groups > 1
        if module.has("bias"):
            module.expect("bias", WIDE, (rows,))

    @property
    def likely(self) -> str | None:
        if self._order or self._run % 32 or (self.bits == 8 and not self._symmetric):
            return None
        return "Q4_0" if self.bits <= (4 if self._symmetric else 3) else "Q8_0"

    def numbers(self) -> Tensor:
        from herd.quant.grouped import from_words

        zero_bias(self.module)
        return from_words(self.module.tensor("qweight"), self.bits, self.shape[1], 0).T

    def scaling(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        from herd.quant.grouped import from_words

        words = self.module.tensor("qzeros")
        if self.lack and self.bits in _ONES:
            words = words + _ONES[self.bits]
        zeros = from_words(words, self.bits, self.shape[0], 1)
        if self.lack and self.bits not in _ONES:
            zeros = (zeros + 1) & self.highest
        return self.module.finite("scales").T, zeros.T, self._groups()

    def _groups(self) -> Tensor | None:
        """g_idx, or None when columns lie in equal runs."""
        import torch

        count, columns = self.module.describe("scales").shape[0], self.shape[1]
        runs = torch.arange(columns) // self._run
        if self._sorted:
            return None
        found = self.module.tensor("g_idx").long()
        if bool(((found < 0) | (found >= count)).any()):
            self.module.fail("g_idx", f"names a group outside of 0 to {count - 1}")
        return None if columns % self._run == 0 and torch.equal(found, runs) else found


def group_size(f: Fields, key: str) -> int | None:
    """Inputs per group; None for -1, which means one group."""
    if f.data.get(key) == -1:
        return None
    return f.whole(key, None)


def zero_bias(module: Module) -> None:
    """Old tools wrote biases that are all zero, beside models that have none. Raises CheckpointError for any other."""
    if module.has("bias") and bool(module.tensor("bias").any()):
        module.fail("bias", "is not zero: biases are not part of any Llama")


def _others(f: Fields) -> tuple[int, ...]:
    """Bits that some modules have instead (`dynamic`: a map from patterns of names to settings)."""
    rules = f.object("dynamic")
    if rules is None:
        return ()
    found = []
    for key in rules.data:
        rule = rules.object(key)
        if rule is not None and rule.has("bits"):
            bits = rule.whole("bits")
            if bits not in BITS:
                rule.fail("bits", f"is {bits}: GPTQ weights have {', '.join(map(str, BITS))} bits")
            found.append(bits)
    return tuple(found)

"""bitsandbytes: NF4 and FP4 (a number of a table of 16, times the largest magnitude of its block), and LLM.int8 (rows of int8).

4 bits: `weight` uint8 [n / 2, 1], row-major with the first of two values in the high half; `weight.absmax`, one per block of
`blocksize` values, float32, or with double quantization uint8: absmax = table[byte] * nested_absmax[block of 256] + offset; and
`weight.quant_state.bitsandbytes__nf4` (or fp4), JSON as bytes. 8 bits: `weight` int8 [out, in], `SCB` float32 [out];
x = weight * SCB / 127. All arithmetic is float32, in bitsandbytes' order. Source: its functional.py and nn/modules.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from herd.checkpoint.fields import Fields
from herd.checkpoint.quantized.module import WIDE, Module, Packed
from herd.files import parse_json, short
from herd.quant.numbers import NF4_TABLE

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BnbScheme"]

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # a sign, two bits of exponent, one behind the first; over 12
FP4 = tuple(sign * value for sign in (1.0, -1.0) for value in _FP4)
_TABLES = {"nf4": (NF4_TABLE, 1.0), "fp4": (FP4, 12.0)}

SLACK = 1e-3
"""How far a file's own copy of the table may be from the definition: older versions rounded FP4 to four digits."""

_STATE = "weight.quant_state.bitsandbytes__"
_INVERSE = 7.874015718698502e-3  # of 127, as bitsandbytes spells it
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class BnbScheme:
    """`quantization_config` with `quant_method` "bitsandbytes" (older files have only its load_in keys). Raises ConfigError."""

    name = "bitsandbytes"

    def __init__(self, f: Fields) -> None:
        self.four, self.eight = f.flag("load_in_4bit", False), f.flag("load_in_8bit", False)
        if not (self.four or self.eight):
            f.fail("load_in_4bit", "and load_in_8bit are both off: nothing says how the weights are quantized")
        kind = f.text("bnb_4bit_quant_type", "fp4")
        if kind not in _TABLES:
            f.fail("bnb_4bit_quant_type", f"is {short(kind)}: herd knows nf4 and fp4")
        self.notes: tuple[str, ...] = (
            ("LLM.int8 rounds most activations to 8 bits when it runs; herd does not round them for this form",)
            if self.eight
            else ()
        )

    def open(self, module: Module) -> Packed | None:
        """The module as bitsandbytes stores it; None when its weight is plain."""
        kinds = [kind for kind in _TABLES if module.has(_STATE + kind)]
        if kinds or module.has("weight.absmax"):
            return FourBits(module, kinds[0] if kinds else None)
        if module.has("SCB") or (module.has("weight") and module.describe("weight").number == "int8"):
            return EightBits(module)
        if module.has("weight") and module.describe("weight").number == "uint8":
            return FourBits(module, None)
        return None


class FourBits(Packed):
    """One matrix of NF4 or FP4."""

    def __init__(self, module: Module, kind: str | None) -> None:
        super().__init__(module)
        state = _state(module, kind or "nf4")  # of a missing state the refusal names the usual one
        assert kind is not None
        self.word, (self._table, self._over) = kind.upper(), _TABLES[kind]
        rows, columns = module.shape
        if state.get("shape") != [rows, columns]:
            module.fail(
                _STATE + kind, f"says shape {short(state.get('shape'))}, but the config describes {module.shape}"
            )
        if state.get("quant_type") != kind:
            module.fail(_STATE + kind, f"says quant_type {short(state.get('quant_type'))}")
        self._block = self._size(state, "blocksize", kind)
        packed, count = module.describe("weight"), rows * columns
        if packed.nbytes != (count + 1) // 2 or packed.number == "bool":
            module.fail("weight", f"has {packed.nbytes} bytes; {count} values of 4 bits take {(count + 1) // 2}")
        blocks = -(-count // self._block)
        self._nested = module.has("weight.nested_absmax") or "nested_blocksize" in state
        self._offset, self._nested_block = 0.0, 0
        if self._nested:
            self._nested_block = self._size(state, "nested_blocksize", kind)
            offset = state.get("nested_offset")
            if not isinstance(offset, int | float) or isinstance(offset, bool) or not -1e30 < offset < 1e30:
                module.fail(_STATE + kind, f"says nested_offset {short(offset)}: expected a number")
            self._offset = float(offset)
            module.expect("weight.absmax", ("uint8",), (blocks,))
            module.expect("weight.nested_absmax", ("float32",), (-(-blocks // self._nested_block),))
            module.expect("weight.nested_quant_map", ("float32",), (256,))
        else:
            module.expect("weight.absmax", ("float32",), (blocks,))
        if module.has("weight.quant_map"):
            module.expect("weight.quant_map", WIDE, (16,))

    def values(self) -> Tensor:
        import torch

        table = torch.tensor(self._table).div_(self._over)
        own = self.module.tensor("weight.quant_map") if self.module.has("weight.quant_map") else table
        if not bool(((own - table).abs() <= SLACK).all()):
            self.module.fail("weight.quant_map", f"is not the table of {self.word}")
        octets = self.module.tensor("weight").contiguous().view(-1).view(torch.uint8)
        count = self.shape[0] * self.shape[1]
        out = torch.empty(2 * len(octets), dtype=torch.float32)
        out[0::2], out[1::2] = table[(octets >> 4).int()], table[(octets & 15).int()]
        absmax, whole = self._absmax(), count // self._block * self._block
        out[:whole].view(-1, self._block).mul_(absmax[: whole // self._block, None])
        if whole < count:
            out[whole:count].mul_(absmax[-1])
        return out[:count].view(self.shape)

    def holder(self) -> str | None:
        return None

    def why_not(self) -> str:
        return f"{self.word} numbers are no multiples of a scale"

    def _absmax(self) -> Tensor:
        import torch

        if not self._nested:
            return self.module.finite("weight.absmax")
        table, scales = self.module.finite("weight.nested_quant_map"), self.module.finite("weight.nested_absmax")
        found = table[self.module.tensor("weight.absmax").int()]
        return found * scales.repeat_interleave(self._nested_block)[: len(found)] + torch.tensor(self._offset)

    def _size(self, state: dict[str, Any], key: str, kind: str) -> int:
        value = state.get(key)
        if value not in _BLOCKS or type(value) is not int:
            self.module.fail(_STATE + kind, f"says {key} {short(value)}: expected a power of two from 32 to 4096")
        return value


class EightBits(Packed):
    """One matrix of LLM.int8."""

    word = "INT8"

    def __init__(self, module: Module) -> None:
        super().__init__(module)
        rows, _ = module.shape
        module.expect("weight", ("int8",), module.shape)
        module.expect("SCB", ("float32",), (rows,), (1, rows), (rows, 1))
        if module.has("weight_format"):
            module.describe("weight_format")
            if any(module.bytes("weight_format")):
                module.fail(
                    "weight_format",
                    "is not 0 (row): the file is arranged for one GPU; save it with a newer bitsandbytes",
                )
        if module.has("bias"):
            module.expect("bias", WIDE, (rows,))

    def values(self) -> Tensor:
        scales = self.module.finite("SCB").view(-1, 1)
        return self.module.tensor("weight").float().mul_(scales).mul_(_INVERSE)

    def holder(self) -> str | None:
        return None

    def why_not(self) -> str:
        return "a scale of SCB / 127 is no float16 number"


def _state(module: Module, kind: str) -> dict[str, Any]:
    """The JSON beside a 4-bit weight."""
    part = _STATE + kind
    module.expect(part, ("uint8",))
    found = parse_json(module.bytes(part), module.tensor_file(f"{module.name}.{part}").path, 0)
    if not isinstance(found, dict):
        module.fail(part, "is no JSON object")
    return found

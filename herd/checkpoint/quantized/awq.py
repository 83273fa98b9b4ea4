"""AWQ: 4-bit integers, a float16 scale and a packed zero for every group of inputs; x = scale * (q - zero).

Version `gemm` packs along the output axis: qweight int32 [in, out / 8], qzeros int32 [G, out / 8], scales [G, out], and the
eight fields of a word are columns 0 2 4 6 1 3 5 7. Version `gemv` packs along the input axis in order: qweight int32
[out, in / 8], qzeros int32 [out, W], scales [out, 8 W] with W words, padded. Source: AutoAWQ's linear layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.checkpoint.fields import Fields
from herd.checkpoint.quantized.gptq import group_size, zero_bias
from herd.checkpoint.quantized.module import WIDE, Module, Packed
from herd.errors import ConfigError
from herd.files import short

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AwqScheme", "names"]

_BACK = [0, 4, 1, 5, 2, 6, 3, 7]
"""Column of a word -> its field, for `gemm`."""

_VERSIONS = {"gemm": "gemm", "exllama": "gemm", "gemv": "gemv"}
"""version -> layout; exllama repacks gemm files after loading."""


class AwqScheme:
    """`quantization_config` with `quant_method` "awq", or quant_config.json of the first AutoAWQ. Raises ConfigError."""

    name = "AWQ"
    notes: tuple[str, ...] = ()

    def __init__(self, f: Fields) -> None:
        bits = f.whole("bits", f.whole("w_bit", 4))
        if bits != 4:
            f.fail("bits" if f.has("bits") else "w_bit", f"is {bits}: AWQ weights have 4 bits")
        self.group = group_size(f, "group_size" if "group_size" in f.data else "q_group_size")
        self.asymmetric = f.flag("zero_point", True)
        version = f.text("version", f.text("format", "gemm")).lower()
        if version not in _VERSIONS:
            why = f"is {short(version)}: herd reads {', '.join(_VERSIONS)}; others are packed for one GPU kernel"
            f.fail("version" if f.has("version") else "format", why)
        self.layout = _VERSIONS[version]
        self.kept = names(f, "modules_to_not_convert")

    def open(self, module: Module) -> Packed | None:
        """The module as AWQ stores it; None when its weight is plain."""
        if not any(module.has(part) for part in ("qweight", "qzeros", "scales")):
            return None
        if any(name in module.name for name in self.kept):
            module.fail("qweight", f"is quantized, but modules_to_not_convert lists it: {short(list(self.kept))}")
        return Gemv(module, self) if self.layout == "gemv" else Gemm(module, self)


class _Awq(Packed):
    word = "AWQ4"
    lowest, highest = 0, 15

    def __init__(self, module: Module, scheme: AwqScheme) -> None:
        super().__init__(module)
        self.run, self._asymmetric = scheme.group or module.shape[1], scheme.asymmetric
        if module.shape[1] % self.run:
            raise ConfigError(
                f"{module.where}: {module.name}: group_size {self.run} does not divide {module.shape[1]} inputs"
            )
        if module.has("bias"):
            module.expect("bias", WIDE, (module.shape[0],))

    @property
    def likely(self) -> str | None:
        if self.run % 32:
            return None
        return "Q8_0" if self._asymmetric else "Q4_0"


class Gemm(_Awq):
    """One matrix, packed along its outputs."""

    def __init__(self, module: Module, scheme: AwqScheme) -> None:
        super().__init__(module, scheme)
        rows, columns = module.shape
        if rows % 8:
            module.fail("qweight", f"cannot hold {rows} outputs: words of this layout have eight")
        module.expect("qweight", ("int32",), (columns, rows // 8))
        module.expect("qzeros", ("int32",), (columns // self.run, rows // 8))
        module.expect("scales", WIDE, (columns // self.run, rows))

    def numbers(self) -> Tensor:
        zero_bias(self.module)
        return self._columns("qweight").T

    def scaling(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.module.finite("scales").T, self._columns("qzeros").T, None

    def _columns(self, part: str) -> Tensor:
        from herd.quant.grouped import from_words

        fields = from_words(self.module.tensor(part), 4, self.shape[0], 1)
        return fields.unflatten(1, (-1, 8))[..., _BACK].flatten(1)


class Gemv(_Awq):
    """One matrix, packed along its inputs."""

    def __init__(self, module: Module, scheme: AwqScheme) -> None:
        super().__init__(module, scheme)
        rows, columns = module.shape
        if columns % 8:
            module.fail("qweight", f"cannot hold {columns} inputs: words of this layout have eight")
        multiple = {64: 2, 32: 4}.get(self.run, 1)
        words = -(-(columns // self.run) // 8)
        words += -words % multiple
        module.expect("qweight", ("int32",), (rows, columns // 8))
        module.expect("qzeros", ("int32",), (rows, words))
        module.expect("scales", WIDE, (rows, 8 * words))

    def numbers(self) -> Tensor:
        from herd.quant.grouped import from_words

        zero_bias(self.module)
        return from_words(self.module.tensor("qweight"), 4, self.shape[1], 1)

    def scaling(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        from herd.quant.grouped import from_words

        groups = self.shape[1] // self.run
        scales = self.module.finite("scales")[:, :groups]
        return scales, from_words(self.module.tensor("qzeros"), 4, groups, 1), None


def names(f: Fields, key: str) -> tuple[str, ...]:
    """A list of parts of module names."""
    value = f.data.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        f.fail(key, f"is {short(value)}: expected a list of module names")
    return tuple(value)

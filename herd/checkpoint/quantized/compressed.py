"""compressed-tensors: what LLM Compressor writes. `config_groups` say how the modules that their targets match are quantized.

float-quantized and int-quantized: `weight` in float8_e4m3fn or int8 with `weight_scale` (tensor, channel, group or block) and
perhaps `weight_zero_point`. pack-quantized: `weight_packed` int32 [out, in * bits / 32] holds q + 2^(bits - 1), packed along the
input axis; `weight_scale` [out, G]; `weight_zero_point` as it is [out, G] or packed along the outputs; `weight_g_idx` [in] with
act-order. x = scale * (q - zero). Scales of activations and of the cache belong to the runtime and are not read.

The tensors decide how a module is quantized, and some group of the config must describe just that: patterns in `targets` are
not run, since they come from outside and could run for ever. Source: compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from herd.checkpoint.fields import Fields
from herd.checkpoint.quantized.gptq import zero_bias
from herd.checkpoint.quantized.module import INTEGERS, WIDE, Module, Packed
from herd.checkpoint.quantized.scaled import Scaled
from herd.files import short
from herd.quant.layout import words_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompressedScheme"]

MOST_GROUPS = 1000

_READ = ("dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True, slots=True)
class Rule:
    """The weights of one config group: integers or floats of `bits`, and what one scale is for."""

    bits: int
    kind: str
    strategy: str
    symmetric: bool
    group: int | None
    block: tuple[int, int] | None
    packed: bool

    def __str__(self) -> str:
        size = self.group or (None if self.block is None else f"{self.block[0]}x{self.block[1]}")
        sign = "" if self.symmetric else " asymmetric"
        return f"{self.kind}{self.bits}{sign} per {self.strategy}{'' if size is None else f' of {size}'}"


class CompressedScheme:
    """`quant_method` "compressed-tensors". Raises ConfigError."""

    name = "compressed-tensors"

    def __init__(self, f: Fields) -> None:
        self._form = _form(f, "format", "dense")
        sparse = f.object("sparsity_config")
        if sparse is not None and sparse.text("format", "dense") != "dense":
            sparse.fail("format", f"is {short(sparse.data['format'])}: sparse files cannot be read yet")
        transforms = f.object("transform_config")
        if transforms is not None and transforms.data.get("config_groups"):
            transforms.fail("config_groups", "are set: rotations while the model runs cannot be read yet")
        self.kept = _strings(f, "ignore")
        self.notes: tuple[str, ...] = ()
        groups = f.object("config_groups")
        if groups is None or not groups.data:
            f.fail("config_groups", "is missing: nothing says how the weights are quantized")
        if len(groups.data) > MOST_GROUPS:
            f.fail("config_groups", f"has {len(groups.data)} entries: no file has more than {MOST_GROUPS}")
        rules: dict[Rule, None] = {}
        for key in groups.data:
            group = groups.object(key)
            if group is not None:
                _strings(group, "targets")
                rules |= dict.fromkeys(self._rule(group))
                self._say_activations(group)
        self.rules = tuple(rules)
        cache = f.object("kv_cache_scheme")
        if cache is not None:
            kind = f"{short(cache.text('type', '?'))[1:-1]}{cache.whole('num_bits', 8)}"
            self.notes += (
                f"the file has scales for a {kind} cache of keys and values; herd's cache does not use them (see --kv)",
            )

    def open(self, module: Module) -> Packed | None:
        """The module as its group stores it; None when its weight is plain. Raises CheckpointError when no group fits."""
        packed = module.has("weight_packed")
        if not packed:
            if not module.has("weight"):
                return None
            number = module.describe("weight").number
            if number in WIDE:
                if module.has("weight_scale"):
                    module.fail("weight", f"is {number} and has a scale: the weights were not compressed yet")
                return None
        if module.name in self.kept:
            module.fail("weight_packed" if packed else "weight", "is quantized, but the config's ignore list names it")
        rule = next((rule for rule in self.rules if _fits(rule, module, packed=packed)), None)
        if rule is None:
            part, described = ("weight_packed" if packed else "weight"), ", ".join(map(str, self.rules)) or "none"
            module.describe("weight_scale")
            module.fail(
                part,
                f"of shape {module.describe(part).shape} with scales {module.describe('weight_scale').shape} is a weight "
                f"{module.shape} in no form that config_groups describe ({described})",
            )
        if packed:
            return PackedIntegers(module, rule)
        zero = "weight_zero_point" if module.has("weight_zero_point") and not rule.symmetric else None
        if rule.symmetric and module.has("weight_zero_point"):
            module.describe("weight_zero_point")
            zero = "weight_zero_point" if rule.kind == "int" else None
        return Scaled(module, "weight_scale", block=rule.block, zero=zero)

    def _rule(self, f: Fields) -> tuple[Rule, ...]:
        weights = f.object("weights")
        if weights is None:
            return ()
        form = _form(f, "format", self._form)
        bits, kind = weights.whole("num_bits", 8), weights.text("type", "int")
        strategy = weights.text("strategy", "group" if weights.has("group_size") else "tensor")
        if kind not in ("int", "float") or (kind == "float" and bits != 8) or bits > 8:
            weights.fail("num_bits", f"is {bits}, type {short(kind)}: herd reads integers up to 8 bits and FP8")
        if strategy not in _STRATEGIES:
            weights.fail("strategy", f"is {short(strategy)}: herd reads {', '.join(_STRATEGIES)}")
        block = weights.data.get("block_structure")
        if strategy == "block" and (
            not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in block)
        ):
            weights.fail("block_structure", f"is {short(block)}: expected two sizes")
        group = None
        if strategy == "group":
            group = None if weights.data.get("group_size") == -1 else weights.whole("group_size")
        return (
            Rule(
                bits=bits,
                kind=kind,
                strategy=strategy,
                symmetric=weights.flag("symmetric", True),
                group=group,
                block=None if strategy != "block" or block is None else (block[0], block[1]),
                packed=form == "pack-quantized" or (form in ("dense", "mixed-precision") and bits < 8),
            ),
        )

    def _say_activations(self, f: Fields) -> None:
        inputs = f.object("input_activations")
        if inputs is None:
            return
        kind = f"{short(inputs.text('type', 'int'))[1:-1]}{inputs.whole('num_bits', 8)}"
        when = "dynamic" if inputs.data.get("dynamic") else "static"
        said = f"the file asks for {when} {kind} activations; herd does not round activations for this form"
        if said not in self.notes:
            self.notes += (said,)


class PackedIntegers(Packed):
    """One matrix of a pack-quantized file."""

    def __init__(self, module: Module, rule: Rule) -> None:
        super().__init__(module)
        self.word, self._bits = f"INT{rule.bits}", rule.bits
        self.lowest, self.highest = -(1 << (rule.bits - 1)), (1 << (rule.bits - 1)) - 1
        rows, columns = module.shape
        module.expect("weight_packed", ("int32",), (rows, words_of(columns, rule.bits)))
        self._groups = _groups(rule, columns)
        scales = ((rows, self._groups), (rows,)) if self._groups == 1 else ((rows, self._groups),)
        module.expect("weight_scale", WIDE, *(((), (1,)) if rule.strategy == "tensor" else scales))
        self._zero = module.has("weight_zero_point")
        if self._zero:
            words = (words_of(rows, rule.bits), self._groups)
            module.expect(
                "weight_zero_point", INTEGERS, words, *scales, *(((), (1,)) if rule.strategy == "tensor" else ())
            )
        elif not rule.symmetric:
            module.describe("weight_zero_point")
        self._order = module.has("weight_g_idx")
        if self._order:
            module.expect("weight_g_idx", ("int32", "int64"), (columns,))
        if module.has("weight_shape"):
            size = module.expect("weight_shape", ("int64", "int32"), (2,)).nbytes // 2
            data = module.bytes("weight_shape")
            said = tuple(int.from_bytes(data[i : i + size], "little", signed=True) for i in (0, size))
            if said != module.shape:
                module.fail("weight_shape", f"says {said}, but the config describes {module.shape}")
        if module.has("bias"):
            module.expect("bias", WIDE, (rows,))
        self._symmetric = rule.symmetric

    @property
    def likely(self) -> str | None:
        half = self.module.describe("weight_scale").number in ("float16", "bfloat16")
        if self._order or not half or self.shape[1] // self._groups % 32:
            return None
        if self._bits == 8 and not self._symmetric:
            return None
        return "Q4_0" if self._bits <= (4 if self._symmetric else 3) else "Q8_0"

    def numbers(self) -> Tensor:
        import torch

        from herd.quant.grouped import from_words

        zero_bias(self.module)
        stored = from_words(self.module.tensor("weight_packed"), self._bits, self.shape[1], 1)
        return (stored.to(torch.int16) + self.lowest).to(torch.int8)

    def scaling(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows = self.shape[0]
        scales = self.module.finite("weight_scale")
        scales = scales.reshape(1, 1) if not scales.ndim or scales.numel() < rows else scales.reshape(rows, -1)
        return scales, self._zeros() if self._zero else None, self._order_of_columns()

    def _zeros(self) -> Tensor:
        from herd.quant.grouped import from_words

        stored, rows = self.module.tensor("weight_zero_point"), self.shape[0]
        if stored.numel() == 1:
            return stored.reshape(1, 1)
        if self.module.describe("weight_zero_point").number == "int32" and stored.shape[0] != rows:
            return from_words(stored, self._bits, rows, 0).to(dtype=stored.dtype) + self.lowest
        return stored.reshape(rows, -1)

    def _order_of_columns(self) -> Tensor | None:
        import torch

        if not self._order:
            return None
        found = self.module.tensor("weight_g_idx").long()
        if bool((found == -1).all()):  # a placeholder of files without act-order
            return None
        if bool(((found < 0) | (found >= self._groups)).any()):
            self.module.fail("weight_g_idx", f"names a group outside of 0 to {self._groups - 1}")
        runs = torch.arange(self.shape[1]) // (self.shape[1] // self._groups)
        return None if torch.equal(found, runs) else found


def _groups(rule: Rule, columns: int) -> int:
    """Scales of a row. A group that does not divide the columns has no meaning here: 0."""
    if rule.group is None:
        return 1
    return 0 if columns % rule.group else columns // rule.group


def _fits(rule: Rule, module: Module, *, packed: bool) -> bool:
    """Whether the tensors of `module` are what `rule` makes of its weight, by dtypes and shapes."""
    rows, columns = module.shape
    if not module.has("weight_scale"):
        return True  # the form says which tensor is missing
    scales = module.describe("weight_scale").shape
    wanted: tuple[tuple[int, ...], ...] = ((rows, _groups(rule, columns)),)
    if rule.strategy == "tensor":
        wanted = ((), (1,), (1, 1))
    elif rule.strategy == "channel":
        wanted = ((rows,), (rows, 1))
    elif rule.block is not None:
        wanted = ((-(-rows // rule.block[0]), -(-columns // rule.block[1])),)
    if scales not in wanted:
        return False
    if packed:
        return rule.kind == "int" and module.describe("weight_packed").shape == (rows, words_of(columns, rule.bits))
    number = module.describe("weight").number
    return number == ("float8_e4m3fn" if rule.kind == "float" else "int8") and not (rule.packed and rule.bits == 8)


def _form(f: Fields, key: str, default: str) -> str:
    form = f.text(key, default)
    if form not in _READ:
        f.fail(key, f"is {short(form)}: herd reads {', '.join(_READ)}")
    return form


def _strings(f: Fields, key: str) -> frozenset[str]:
    value = f.data.get(key)
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        f.fail(key, f"is {short(value)}: expected a list of names")
    return frozenset(value)

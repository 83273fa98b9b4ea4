"""The flags that would make a model fit, each tried before it is proposed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from herd.errors import ConfigError
from herd.planning.devices import Device
from herd.planning.memory import KV
from herd.planning.setup import Setup, largest
from herd.planning.weights import SCHEMES

__all__ = ["Advice", "advice"]

SMALLER = ("int8", "q8_0", "q6_k", "q5_k_m", "int4", "q4_k_m")
COUNTS = (2, 4, 8, 16, 32, 64, 128)
ENOUGH = 5


@dataclass(frozen=True, slots=True)
class Advice:
    """`flags` to add to the command line, and the bytes it then takes."""

    flags: str
    total: int


def advice(setup: Setup, device: Device) -> tuple[Advice, ...]:
    """Up to five ways to make it fit, the gentlest first; none when nothing does."""
    found: list[Advice] = []
    for flags, changed, where in _changes(setup, device):
        if changed.fits(where):
            found.append(Advice(flags, changed.total(where)))
        if len(found) == ENOUGH:
            break
    return tuple(found)


def _changes(setup: Setup, device: Device) -> Iterator[tuple[str, Setup, Device]]:
    """One change each, then several; a shorter context or a smaller batch only as far as needed."""
    yield from _kept(setup, device, "")
    lighter = [SCHEMES[name] for name in SMALLER if name in SCHEMES and SCHEMES[name].bits < 0.9 * setup.bits]
    fitting = next((s for s in lighter if replace(setup, weights=s).fits(device)), None)
    if fitting is not None:
        yield f"--weights {fitting.name}", replace(setup, weights=fitting), device
    yield from _spread(setup, device, "")
    if lighter and fitting is None:
        smallest = replace(setup, weights=lighter[-1])
        yield from _kept(smallest, device, f"--weights {lighter[-1].name} ")
        yield from _spread(smallest, device, f"--weights {lighter[-1].name} ")


def _spread(setup: Setup, device: Device, before: str) -> Iterator[tuple[str, Setup, Device]]:
    """The fewest more devices on which it fits: with several processes, as many of those."""
    if device.name == "cpu":
        return
    for count in COUNTS:
        more = device.times(count)
        if count <= device.count:
            continue
        if setup.ranks == 1:
            flag, wider = "--devices", setup
        else:
            flag, wider = "--tensor-parallel-size", replace(setup, ranks=count)
            if not _shared(wider):
                continue
        if wider.fits(more):
            yield f"{before}{flag} {count}", wider, more
            return


def _shared(setup: Setup) -> bool:
    """Whether so many processes can share the model."""
    try:
        return bool(setup.shares)
    except ConfigError:
        return False


def _kept(setup: Setup, device: Device, before: str) -> Iterator[tuple[str, Setup, Device]]:
    """Changes that leave the weights as they are in `setup`."""
    if setup.subject.config is None:
        return
    int8 = replace(setup, kv=KV["int8"])
    if setup.kv.per_value > 1:
        yield f"{before}--kv int8", int8, device
    for extra, base in (("", setup), (" --kv int8", int8)):
        context = largest(lambda n, base=base: _shorter(base, n).fits(device), setup.context)
        if setup.context > context >= 256:
            context = context // 256 * 256
            yield f"{before}--context {context}{extra}", _shorter(base, context), device
            break
    batch = largest(lambda n: replace(setup, batch=n).fits(device), setup.batch)
    if setup.batch > batch >= 1:
        yield f"{before}--batch {batch}", replace(setup, batch=batch), device


def _shorter(setup: Setup, context: int) -> Setup:
    return replace(setup, context=context, prompt=min(setup.prompt, context))

"""Typed access to a JSON object that describes a model: every wrong value is a ConfigFileError naming file and key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, overload

from herd.errors import ConfigError, ConfigFileError
from herd.files import short

__all__ = ["Fields", "named"]


@contextmanager
def named(where: str) -> Iterator[None]:
    """Every ConfigError from inside as a ConfigFileError about the file `where` (numbers that do not fit together)."""
    try:
        yield
    except ConfigError as error:
        if isinstance(error, ConfigFileError):
            raise
        raise ConfigFileError(str(error).removeprefix(f"{where}: "), path=where) from error


class Fields:
    """A view of `data` from the file `where`. A key that is absent or null takes the default; without one it is required."""

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.data, self.where, self.prefix = data, where, prefix

    def fail(self, key: str, why: str) -> NoReturn:
        """Raise a ConfigFileError about `key`."""
        raise ConfigFileError(f"{self.prefix}{key} {why}", path=self.where)

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self.data.get(key) is not None

    @overload
    def whole(self, key: str) -> int: ...
    @overload
    def whole(self, key: str, default: int) -> int: ...
    @overload
    def whole(self, key: str, default: None) -> int | None: ...
    def whole(self, key: str, default: int | type | None = type) -> int | None:
        """A positive integer."""
        value = self.data.get(key)
        if value is None:
            if default is type:
                self.fail(key, "is missing")
            return default  # type: ignore[return-value]
        if type(value) is not int or value <= 0:
            self.fail(key, f"is {short(value)}: expected a positive integer")
        if value >= 1 << 63:
            self.fail(key, f"is {short(value)}: too large")
        return value

    @overload
    def number(self, key: str) -> float: ...
    @overload
    def number(self, key: str, default: float) -> float: ...
    @overload
    def number(self, key: str, default: None) -> float | None: ...
    def number(self, key: str, default: float | type | None = type) -> float | None:
        """A positive number that is not absurdly large."""
        value = self.data.get(key)
        if value is None:
            if default is type:
                self.fail(key, "is missing")
            return default  # type: ignore[return-value]
        if type(value) not in (int, float) or not 0 < value < 1e18:
            self.fail(key, f"is {short(value)}: expected a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; integers count as in Python, since old configs write 4 for true."""
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, int):
            self.fail(key, f"is {short(value)}: expected true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        """A short string."""
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fail(key, f"is {short(value)}: expected a string")
        return value

    def object(self, key: str) -> Fields | None:
        """A nested object, or None when it is absent."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, f"is {short(value)}: expected an object")
        return Fields(value, self.where, f"{self.prefix}{key}.")

    def integers(self, key: str) -> list[int] | None:
        """A list of integers that are not negative, or None when it is absent."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, int) and 0 <= v < 1 << 31 for v in value):
            self.fail(key, f"is {short(value)}: expected a list of integers")
        return [int(v) for v in value]

    def refuse(self, key: str, why: str) -> None:
        """Raise ConfigError when `key` is set to anything but null or false."""
        if self.data.get(key) not in (None, False):
            self.fail(key, f"is {short(self.data[key])}: {why}")

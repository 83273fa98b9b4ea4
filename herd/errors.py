"""The errors herd raises on purpose, one small tree.

    HerdError
    +-- ConfigError        a model or run description that cannot be built (also a ValueError)
    +-- CheckpointError    a file that is missing, damaged, hostile or of the wrong kind (also a ValueError)
    |     +-- ConfigFileError       such a description in a file (also a ConfigError)
    |     +-- TokenizerFileError    a vocabulary in a file whose rules are not Llama's (also a TokenizerError)
    +-- TokenizerError     a vocabulary or text that cannot be encoded or decoded (also a ValueError)
    +-- DataError          a data file or row that cannot be used (also a ValueError)
    +-- PromptError        a conversation that its prompt format cannot express (also a ValueError)
    +-- ContextFullError   more tokens than the context holds (also a ValueError)
    +-- BenchError         a measurement that could not be taken
    +-- RanksError         a process gone that holds a part of a model
    +-- HubError           a download that the hub, the network or the disk refused
    +-- UnknownModelError  a model name that is neither a path nor in the catalog (also a LookupError)

Every message says what is wrong and what to change. Anything else that escapes herd is a bug in herd.
"""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = [
    "BenchError",
    "CheckpointError",
    "ConfigError",
    "ConfigFileError",
    "ContextFullError",
    "DataError",
    "HerdError",
    "HubError",
    "PromptError",
    "RanksError",
    "TokenizerError",
    "TokenizerFileError",
    "UnknownModelError",
    "kind_named",
]


class HerdError(Exception):
    """Base of every error that herd raises on purpose. A command that ends with one has its `exit_code`."""

    exit_code = 1


class ConfigError(HerdError, ValueError):
    """A model or run description that cannot be built."""


class TokenizerError(HerdError, ValueError):
    """A vocabulary or a text that cannot be encoded or decoded."""


class DataError(HerdError, ValueError):
    """A data file or row that cannot be used; the message begins with `file:line:` where a line is at fault."""


class PromptError(HerdError, ValueError):
    """A conversation that its prompt format cannot express."""


class ContextFullError(HerdError, ValueError):
    """More tokens than the context holds. `needed` and `available` are token counts."""

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class UnknownModelError(HerdError, LookupError):
    """A model name that is neither a path nor in the catalog. `near` lists the closest known names."""

    def __init__(self, message: str, *, near: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.near = near


class HubError(HerdError):
    """A download that the hub, the network or the disk refused.

    `cause` is one word for programs: no_token, bad_token, not_requested, pending, rejected, token_scope, no_repo, no_revision,
    no_file, disabled, expired_url, limited, network, server, offline, mismatch, space, mirror, options, disk.
    """

    def __init__(self, message: str, *, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class RanksError(HerdError):
    """A model over several processes of which one is gone or out of step: nothing can be computed with it any more."""


class BenchError(HerdError):
    """A measurement that could not be taken."""


class CheckpointError(HerdError, ValueError):
    """A checkpoint file that is missing, damaged, hostile or of the wrong kind.

    `path` names the file; `tensor` or `offset` (bytes from the start of the file) say where in it, when known.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        where = [] if path is None else [str(path)]
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        if offset is not None:
            where.append(f"byte {offset}")
        super().__init__(f"{', '.join(where)}: {message}" if where else message)
        self.path = None if path is None else str(path)
        self.tensor = tensor
        self.offset = offset


class ConfigFileError(CheckpointError, ConfigError):
    """A model description in a checkpoint's file that cannot be built; the message names the key."""


class TokenizerFileError(CheckpointError, TokenizerError):
    """A vocabulary in a checkpoint's file whose rules are not Llama's; the message names the key."""


def kind_named(name: str | None) -> Callable[[str], HerdError]:
    """The class of the tree that is called `name`, to be made with a message alone; HerdError for any other name."""
    plain = {cls.__name__: cls for cls in (ConfigError, TokenizerError, PromptError, BenchError)}
    return plain.get(name or "", HerdError)

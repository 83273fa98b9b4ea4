"""Conversion with proof. The package itself can be called: `herd.convert(src, dst, to="gguf")` is `herd.convert.driver.convert`.

The name belongs to both, the floor and the function, and python keeps one of them under it; so the floor does what the
function does. No torch until it is called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from herd.convert.report import Report


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Report:
        from herd.convert.driver import convert

        return convert(*args, **options)


sys.modules[__name__].__class__ = _Callable

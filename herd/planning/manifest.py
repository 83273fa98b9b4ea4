"""Manifests for Kubernetes: plain data as YAML, and the version of Ray that they run. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["RAY", "yaml_lines"]

RAY = "2.60.0"
"""The version of Ray that the tests run; the image of a manifest must have the same."""


def yaml_lines(value: Any, indent: str = "") -> Iterator[str]:
    """Lines of YAML: mappings and lists as blocks, texts of whole lines as they are, the rest as JSON, which YAML reads."""
    pairs = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    for key, item in pairs:
        lead = f"{indent}-" if key is None else f"{indent}{key if _plain(key) else _scalar(key)}:"
        if isinstance(item, str) and re.fullmatch(r"(\w[^\r\t]*\n)+", item) and not item.endswith("\n\n"):
            yield f"{lead} |"
            yield from (f"{indent}  {line}" for line in item[:-1].split("\n"))
        elif isinstance(item, Mapping | list | tuple) and item:
            lines = list(yaml_lines(item, indent + "  "))
            if key is None:
                yield f"{lead} {lines[0].lstrip()}"
                yield from lines[1:]
            else:
                yield lead
                yield from lines
        else:
            yield f"{lead} {_scalar(item)}"


def _plain(key: str) -> bool:
    words = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    return re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_-]*", key) is not None and key.lower() not in words


def _scalar(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # YAML 1.1 takes 1e-05 for a text.
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text

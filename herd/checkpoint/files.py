"""The small files of a checkpoint folder, as `herd.files` reads them."""

from __future__ import annotations

from herd.files import MAX_JSON, parse_json, read_json, safe_join, short

__all__ = ["MAX_JSON", "parse_json", "read_json", "safe_join", "short"]

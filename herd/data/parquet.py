"""Rows of Parquet tables, through pyarrow (the extra `data`), a few at a time. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from herd.errors import DataError

__all__ = ["parquet_rows"]

BATCH = 64
"""Rows that are turned into Python values at once."""

MAX_GROUP = 4 << 30
"""Bytes of the largest row group, unpacked, by the file's own word: 4 GiB. pyarrow reads one column chunk of it at a time."""


def parquet_rows(path: Path, at: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
    """(row number from 1, fields) of a table; null fields are left out. Raises DataError for files that are damaged."""
    from herd.data.read import MAX_ROW

    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: Parquet tables need the data extra: pip install 'herd[data]'") from error
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            about = table.metadata
            largest = max((about.row_group(i).total_byte_size for i in range(about.num_row_groups)), default=0)
            if largest > MAX_GROUP:
                raise DataError(f"{path}: a row group of {largest >> 20} MiB: write the table with smaller row groups")
            for batch in table.iter_batches(batch_size=BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    found = {key: value for key, value in fields.items() if value is not None}
                    yield number, _bounded(found, MAX_ROW)
                at(path.stat().st_size * number // max(about.num_rows, 1))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number + 1}: the table is damaged: {' '.join(str(error).split())[:200]}") from error


def _bounded(fields: dict[str, Any], limit: int) -> Any:
    """`fields`, or the error that they are."""
    size = 0
    left: list[Any] = [fields]
    while left:
        value = left.pop()
        if isinstance(value, str):
            if "\0" in value:
                return DataError("a string holds a NUL character")
            size += len(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
    return DataError(f"the row has {size:,} characters, more than {limit:,}") if size > limit else fields

"""What every test gets: one thread per process, fixed seeds, and a way to the shared reference folder."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Tiny models are fastest on one thread, and xdist workers share the cores. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test leaves packed copies of its models in the cache of whoever runs it.
os.environ["HERD_PACKED"] = "off"

SHARED = Path(os.environ.get("HERD_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def shared_path(name: str) -> Path:
    """A path in the folder HERD_SHARED, or the folder shared beside the checkout; skips the test when it is not there."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not in {SHARED} (set HERD_SHARED to the folder that has it)")
    return path


def pytest_configure(config: pytest.Config) -> None:
    """Triton decides when it is imported whether its kernels are interpreted: without a GPU they are; `-m gpu` compiles them."""
    if "not gpu" in (config.option.markexpr or ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in every run; torch is seeded only where a test module has imported it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("reference/models.json")`: a path in the shared folder; skips the test without it (see `shared_path`)."""
    return shared_path


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str, str, float], None]:
    """`measured(table, row, value)`: keep a figure for the table printed when the run ends (the largest of each row)."""

    def keep(table: str, row: str, value: float) -> None:
        record_property("measured", (table, row, value))

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the largest figure of every table that tests reported through `measured`; of every row with -v."""
    largest: dict[str, dict[str, float]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "measured":
                    table, row, figure = value
                    rows = largest.setdefault(table, {})
                    rows[row] = max(figure, rows.get(row, 0.0))
    for table, rows in sorted(largest.items()):
        row = max(rows, key=rows.__getitem__)
        terminalreporter.write_line(f"{table}: at most {rows[row]:.2e} ({row})")
        if terminalreporter.config.get_verbosity() >= 0:  # pyproject asks for -q: -v brings it to 0
            for row, figure in sorted(rows.items()):
                terminalreporter.write_line(f"  {row:<40} {figure:.2e}")

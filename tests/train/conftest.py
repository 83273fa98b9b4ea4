from __future__ import annotations

from functools import cache

import pytest

from herd.train import throughput

measured_once = cache(throughput._measured)


@pytest.fixture(autouse=True)
def _the_processor_is_measured_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by every run, for a quarter of a second; but by the tests of measuring."""
    if not request.module.__name__.endswith(".test_metrics"):
        monkeypatch.setattr(throughput, "_measured", measured_once)

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.crew import Crew, crew


@pytest.fixture(scope="session")
def ranks() -> Iterator[Crew]:
    with crew() as made:
        yield made

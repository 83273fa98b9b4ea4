"""The SentencePiece vocabularies of the Llama 2 formats: one trained on the spot, and the released one where it is at hand."""

from __future__ import annotations

import pytest

from tests.vocabularies import Pieces, llama2_path, pieces_of, trained_pieces


@pytest.fixture(params=["trained", "released"])
def pieces(request: pytest.FixtureRequest) -> Pieces:
    """Each vocabulary in turn; the released one skips without the shared folder."""
    return pieces_of(trained_pieces() if request.param == "trained" else llama2_path().read_bytes())


@pytest.fixture
def released() -> Pieces:
    """Llama 2's own vocabulary; skips without the shared folder."""
    return pieces_of(llama2_path().read_bytes())

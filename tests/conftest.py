"""Fixtures that several modules use; a module that defines its own overrides them."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from ib_explain.figures import LIGHT, Plot
from ib_explain.leaderboard import Leaderboard
from tests.models import images, tiny
from tests.reporting import make_store, png


@pytest.fixture(scope="module")
def host() -> nn.Module:
    return tiny()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return images(6)


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    """A made-up run."""
    return Leaderboard.of(make_store())


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Spares tests that look at text the drawing."""
    monkeypatch.setattr(Plot, "png", lambda self, theme=LIGHT, **options: png())

"""Fixtures that several modules use; a module that defines its own overrides them."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from ib_explain.figures import LIGHT, Plot
from ib_explain.ib import IBAttention
from ib_explain.leaderboard import Leaderboard
from tests.explaining import fitted
from tests.models import images, tiny
from tests.reporting import make_store, png


@pytest.fixture(scope="module")
def host() -> nn.Module:
    return tiny()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return images(6)


@pytest.fixture(scope="module")
def cnn() -> tuple[IBAttention, nn.Module]:
    """A fitted bottleneck and its host."""
    return fitted("cnn")


@pytest.fixture(scope="module", params=["cnn", "vit", "nhwc"])
def pair(request) -> tuple[IBAttention, nn.Module]:
    """The same for a host of each layout."""
    return fitted(request.param)


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    """A made-up run."""
    return Leaderboard.of(make_store())


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Spares tests that look at text the drawing."""
    monkeypatch.setattr(Plot, "png", lambda self, theme=LIGHT, **options: png())

"""Fixtures that several modules use; a module that defines its own overrides them."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from tests.models import images, tiny


@pytest.fixture(scope="module")
def host() -> nn.Module:
    return tiny()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return images(6)

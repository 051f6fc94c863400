"""Hosts whose tensors take more than one path: branches, bypasses, tables, several grids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models import CLASSES

SIZE = (3, 32, 48)


class TwoPaths(nn.Module):
    """Two branches over the stem's output; only the stem, the join and what follows are cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.join = nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        x = self.join(torch.cat([self.left(x).tanh(), self.right(x).tanh()], dim=1)).tanh()
        return self.fc(self.last(x).tanh().mean(dim=(2, 3)))


class Bypass(nn.Module):
    """What `early` computed goes straight to the logits as well: `late` is no cut."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.late = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = self.early(x).tanh()
        return self.fc(torch.cat([first, self.late(first).tanh()], dim=1).mean(dim=(2, 3)))


class Bias(nn.Module):
    """A table that is computed before the layer, without the image, and read behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(1, CLASSES)
        self.conv = nn.Conv2d(3, CLASSES, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table(torch.ones(len(x), 1))
        return self.conv(x).tanh().mean(dim=(2, 3)) * table


class Branches(nn.Module):
    """Two grids in one tuple, both read behind it."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.coarse = nn.Conv2d(3, 6, 3, stride=4, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.coarse(x), self.fine(x)

    def __init__(self) -> None:
        super().__init__()
        self.fork = self.Fork()
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        coarse, fine = self.fork(x)
        return self.fc(torch.cat([coarse.tanh().mean(dim=(2, 3)), fine.tanh().mean(dim=(2, 3))], dim=1))


class Odd(TwoPaths):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Identity()
        self.twice = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.twice(self.twice(x)))


def make(kind: type[nn.Module], *args: int) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args).eval()

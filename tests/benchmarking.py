"""Small data and short calls that tests of the benchmark share."""

from __future__ import annotations

import torch
from torch import Tensor

from ib_explain import benchmark as run_benchmark
from tests.models import CLASSES


def half_masks(count: int) -> Tensor:
    masks = torch.zeros(count, 1, 24, 24, dtype=torch.bool)
    masks[:, :, 4:14, 6:20] = True
    return masks


def batches(x: Tensor, size: int = 2, labels: Tensor | None = None):
    labels = torch.arange(len(x)) % CLASSES if labels is None else labels
    return list(zip(x.split(size), labels.split(size), strict=True))


def measure(host, data, methods=("center_gaussian",), metrics=("sparsity_max_over_mean",), **options):
    return run_benchmark(host, data, methods=methods, metrics=metrics, show_progress=False, **options)


def values(board, method, metric):
    return torch.tensor([row.value for row in board.rows if (row.method, row.metric) == (method, metric)])

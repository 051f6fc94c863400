"""DataLoaders whose batches can be chosen before they are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

from torch.utils.data import DataLoader, IterableDataset

__all__ = ["has_plan", "with_plan"]


def has_plan(data: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether the places of each batch in the data set are known before it is read.

    Not so for subclasses, which may read otherwise, for data sets that are only iterated, and without batches.
    """
    return type(data) is DataLoader and data.batch_sampler is not None and not isinstance(data.dataset, IterableDataset)


def with_plan(loader: DataLoader[Any], plan: Iterable[list[int]], *, num_workers: int | None = None) -> DataLoader[Any]:
    """The same loader for other batches.

    Args:
        loader: see `has_plan`.
        plan: the places in the data set of each batch's items.
        num_workers: None is the loader's own number.
    """
    workers = loader.num_workers if num_workers is None else num_workers
    return DataLoader(
        loader.dataset,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout if workers else 0,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor if workers else None,
        persistent_workers=loader.persistent_workers and workers > 0,
    )

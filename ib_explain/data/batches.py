"""Batches for fitting: any iterable of images, with or without labels, read epoch after epoch in a repeatable order."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ib_explain.data.images import images_of, refuse_one_batch
from ib_explain.data.loaders import has_plan, with_plan
from ib_explain.randomness import own_generators_seeded, seeded

__all__ = ["Batches", "Share"]


class Share:
    """Which batches are this process's: every `world`-th from `rank` on. Alone: rank 0 of 1."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world


class Batches:
    """Reads `data` epoch after epoch; what the n-th step sees depends on the seed and n alone.

    The order of a shuffling DataLoader and of random augmentations follows from the seed and the epoch, so that a
    resumed run sees what an uninterrupted one would have seen; but for augmentations in persistent workers, whose
    random state nobody can set. With several processes, step n takes batch n * world + rank; of a plain DataLoader over
    a data set the others are not read.

    Args:
        data: an iterable of batches that can be read again (a DataLoader, a list), or once (a generator).
        seed: decides the order.
        share: this process's part. Data whose sampler deals to as many processes already (torch's
            `DistributedSampler`, timm's `create_loader(distributed=True)`) is taken as it comes.
        labelled: whether labels are wanted; if not, they may be anything.
    """

    def __init__(self, data: Iterable[Any], seed: int, share: Share | None = None, *, labelled: bool = False) -> None:
        if isinstance(data, str | bytes | Tensor | dict) or not hasattr(data, "__iter__"):
            way = (
                "DataLoader(data, 64, shuffle=True)"
                if isinstance(data, Dataset)
                else "a DataLoader or a list of batches"
            )
            raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}; pass {way}")
        refuse_one_batch(data)
        self.data, self.seed, self.share, self.labelled = data, seed, share or Share(), labelled
        self._sampler = getattr(data, "sampler", None)
        world = self.share.world
        self._is_dealt = world > 1 and getattr(self._sampler, "num_replicas", None) == world
        self._once = iter(data) if hasattr(data, "__next__") else None
        self._own: Iterable[Any] | None = None
        if world > 1 and not self._is_dealt and has_plan(data):
            self._own = with_plan(data, _Dealt(data.batch_sampler, self.share))  # type: ignore[arg-type]
        self._size: tuple[int, ...] | None = None
        self._any = False  # whether there has been any batch
        self._kept: list[Any] = []  # what a one-time iterator gave to the statistics, for the training that follows

    @property
    def images(self) -> int | None:
        """Images of an epoch, None where the data does not say."""
        dataset: Any = getattr(self.data, "dataset", None)
        return len(dataset) if hasattr(dataset, "__len__") else None

    def __call__(self, skip: int = 0) -> Generator[tuple[Tensor, Tensor | None]]:
        """Yield (images, labels) without end, from this process's batch number `skip` on.

        Raises:
            ValueError: the data is empty, images change their size, or a one-time iterator has run out.
        """
        position, epoch = 0, 0
        while True:
            before = position
            for images, labels in self._epoch(epoch):
                position += 1
                if position > skip:
                    yield images, labels
            if self._once is not None:
                ended = f"data was a one-time iterator and ended after {position} batches"
                raise ValueError(f"{ended}; pass a DataLoader or a list")
            if position == before:
                raise ValueError(self._nothing())
            epoch += 1

    def first(self, images: int) -> Generator[tuple[Tensor, Tensor | None]]:
        """Yield this process's batches of the first epoch until all processes together have seen `images` images.

        What is read from a one-time iterator is kept and read again by the next call.

        Raises:
            ValueError: the data is empty.
        """
        seen = 0
        for batch in self._epoch(0, keep=True):
            seen += len(batch[0]) * self.share.world
            yield batch
            if seen >= images:
                return
        if not seen:
            raise ValueError(self._nothing())

    def _nothing(self) -> str:
        if self._any:
            return "data could be read only once, and its batches are used up; pass what can be read again, or a list"
        return "data yielded no batch: an empty loader, or fewer batches than processes"

    def _epoch(self, epoch: int, *, keep: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
        seed = self.seed * 1_000_003 + epoch
        with seeded(seed), own_generators_seeded(self.data, seed):
            for batch in self._mine(epoch, keep):
                self._any = True
                images, labels = images_of(batch, labelled=self.labelled)
                size = tuple(images.shape[1:])
                if self._size not in (None, size):
                    raise ValueError(f"images must be of one size, got {size} after {self._size}")
                self._size = size
                yield images, labels

    def _mine(self, epoch: int, keep: bool) -> Iterable[Any]:
        """This process's batches of an epoch."""
        if self._is_dealt:
            set_epoch = getattr(self._sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
            return self._read_through(keep)
        return self._own if self._own is not None else _Dealt(self._read_through(keep), self.share)

    def _read_through(self, keep: bool) -> Iterator[Any]:
        """All batches of an epoch, those kept of a one-time iterator first."""
        kept, self._kept = self._kept, []
        for batch in self.data if self._once is None else itertools.chain(kept, self._once):
            if keep and self._once is not None:
                self._kept.append(batch)
            yield batch


class _Dealt:
    """Every `world`-th of some batches; an incomplete last round is left out, or processes would wait for others."""

    def __init__(self, batches: Iterable[Any], share: Share) -> None:
        self.batches, self.share = batches, share

    def __iter__(self) -> Iterator[Any]:
        dealt: list[Any] = []
        for batch in self.batches:
            dealt.append(batch)
            if len(dealt) == self.share.world:
                yield dealt[self.share.rank]
                dealt = []

"""Data for a benchmark: numbered batches from anything that can be iterated, any of them alone where possible."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ib_explain.checks import check_positive_int
from ib_explain.data.gaze import GazeImages
from ib_explain.data.images import images_of, refuse_one_batch
from ib_explain.data.loaders import has_plan, with_plan
from ib_explain.data.origins import class_folders, root_of
from ib_explain.data.preprocessing import Preprocess
from ib_explain.data.synthetic import Synthetic
from ib_explain.randomness import generator_of, own_generators_seeded, seeded
from ib_explain.samples import TRUTHS, ImageBatch, join, parts_of, truths_of
from ib_explain.texts import one_line

__all__ = ["BATCH", "Source"]

BATCH = 32  # images of a data set that are read together; not the rows of a forward pass


class Source:
    """Reads data for a benchmark: numbered batches, any of them alone where the data allows it.

    Args:
        data: a `Dataset` (read in batches of 32, by its own `collate` if it has one), a `DataLoader`, or any iterable
            of batches. A batch is a tensor of images, (images, labels), or an object or mapping with `image` and any
            of `label`, `mask` (bool), `boxes`, `density`, `fixations`, `name`; those words may be in the plural.
        images: how many; None is all. A data set or a loader, mostly sorted by class, gives them evenly over its
            length, any other iterable its first ones.
        names: of the images, by index; None takes the data's own (`name(index)` of a data set), else the index.
        seed: decides the order of a shuffling loader.

    Attributes:
        first: the first batch.
        sizes: number of images in each batch, None where the data has no length.
        readable_again: False for a one-time iterator.
        class_folders: names of the classes, where the data has a folder for each.
        root: the folder that the pictures lie in, where the data tells it.

    Raises:
        TypeError: data that is no iterable of such batches.
        ValueError: no batch at all, or as reading a batch does.
    """

    first: ImageBatch
    sizes: list[int] | None

    def __init__(
        self, data: Any, *, images: int | None = None, names: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        if isinstance(data, str | bytes | Tensor | Mapping) or not (
            hasattr(data, "__iter__") or isinstance(data, Dataset)
        ):
            hint = "; one batch of images x is [x]" if isinstance(data, Tensor) else ""
            raise TypeError(f"data must be a Dataset or an iterable of batches, got {type(data).__name__}{hint}")
        refuse_one_batch(data)
        if isinstance(data, IterableDataset):
            data = DataLoader(data, BATCH, collate_fn=getattr(data, "collate", None))
        self.limit = None if images is None else check_positive_int(images, "images")
        if isinstance(names, str) or not isinstance(names, Sequence | np.ndarray | None):
            raise TypeError(f"names must be a list of one name for each image, got {names!r}")
        self.names = names
        self.class_folders, self.root = class_folders(data), root_of(data)
        loader = _loader_of(data)
        self.reader: _Planned | _Stream
        self.reader = _Stream(data, self.limit, seed) if loader is None else _Planned(loader, self.limit, seed)
        self.readable_again = self.reader.readable_again
        reading = self.batches(skip=lambda number: number > 0)
        found = next(reading, None)
        reading.close()
        if found is None:
            raise ValueError("data yielded no batch: the loader or data set is empty")
        self.first = found
        self.sizes = self.reader.sizes()

    def batches(
        self, skip: Callable[[int], bool] = lambda _number: False, rank: int = 0, world: int = 1
    ) -> Generator[ImageBatch, None, None]:
        """The batches that fall to process `rank` of `world`, in rising order, but those whose number is to be skipped.

        Raises:
            TypeError, ValueError: a batch that is none, with its number; images of several sizes; boxes or fixations
                outside of an image; truths that the first batch had and another lacks.
        """
        for read in self.reader.read(lambda number: number % world == rank and not skip(number)):
            batch = self._checked(read)
            if self.limit is not None and batch.images[-1] >= self.limit:
                batch = batch.take(range(self.limit - batch.images[0]))
            yield batch

    def pick(self, wanted: Collection[int]) -> ImageBatch | None:
        """The images with these indices, in rising order; of a one-time iterator only what its first batch holds."""
        if isinstance(self.reader, _Planned):
            return self._checked(self.reader.pick(sorted(wanted))) if wanted else None
        parts = []
        for batch in self.batches() if self.readable_again else [self.first]:
            rows = [row for row, image in enumerate(batch.images) if image in wanted]
            if rows:
                parts.append(batch.take(rows))
        return join(parts) if parts else None

    def facts(self) -> dict[str, Any]:
        """What tells these data from others: for run.json."""
        data = self.reader.data
        while isinstance(data, Subset):
            data = data.dataset
        facts: dict[str, Any] = {"name": type(data).__name__}
        if self.sizes is not None:
            facts["images"] = sum(self.sizes)
        elif self.limit is not None:
            facts["at_most"] = self.limit
        facts["input"] = list(self.first.x.shape[1:])
        how = getattr(data, "preprocess", None) or getattr(data, "transform", None)
        if isinstance(how, Preprocess):
            facts["preprocess"] = f"{how.crop_mode} crop of {how.crop_pct:g}, {how.interpolation}"
        if isinstance(data, GazeImages):
            facts["fixations_lost_by_crop"] = round(data.dropped_share, 4)
        digest = hashlib.blake2b(digest_size=8)
        digest.update(self.first.x.detach().float().cpu().contiguous().numpy().tobytes())
        for name in ("labels", *TRUTHS):
            value = getattr(self.first, name)
            for part in value if isinstance(value, list) else [] if value is None else [value]:
                digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        facts["first_batch"] = digest.hexdigest()
        if isinstance(self.reader, _Planned):
            names = "\n".join(self._name(image, place) for image, place in enumerate(self.reader.places))
            facts["names"] = hashlib.blake2b(names.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
        elif isinstance(data, Sequence):  # all of it is at hand
            facts["batches"] = _digest_of_all(data)
        return facts

    def all_fixations(self) -> list[Tensor]:
        """Fixations of every image, by index: one more pass over the data."""
        found: dict[int, Tensor] = {}
        for batch in self.batches():
            found.update(zip(batch.images, batch.fixations or [], strict=True))
        return [found[image] for image in sorted(found)]

    def _checked(self, read: _Read) -> ImageBatch:
        """What was read, as a batch that holds what the first one holds."""
        number, images, parts = read.number, read.images, parts_of(read.raw, read.number)
        try:
            x, labels = images_of((parts["image"], parts.get("label")))
            truths = truths_of(parts, x)
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {number} of the data: {error}") from error
        if len(images) != len(x):
            raise ValueError(f"batch {number} of the data must hold {len(images)} images, got {len(x)}")
        if hasattr(self, "first"):
            if x.shape[1:] != self.first.x.shape[1:]:
                sizes = f"{tuple(x.shape[1:])} in batch {number} after {tuple(self.first.x.shape[1:])}"
                raise ValueError(f"images must be of one size, got {sizes}")
            if lacking := [name for name in self.first.truths if name not in truths]:
                raise ValueError(f"batch {number} of the data has no {' and no '.join(lacking)}, the first batch has")
        own = parts.get("name") if self.names is None else None
        if own is not None:
            names = [str(name) for name in ([own] if isinstance(own, str) else own)]
            if len(names) != len(x):
                raise ValueError(f"batch {number} of the data must hold {len(x)} names, got {len(names)}")
        else:
            places: Sequence[int | None] = read.places or [None] * len(x)
            names = [self._name(image, place) for image, place in zip(images, places, strict=True)]
        return ImageBatch(number, list(images), [one_line(name) for name in names], x, labels, **truths)

    def _name(self, image: int, place: int | None) -> str:
        if self.names is not None:
            if image >= len(self.names):
                raise ValueError(f"names must hold one name for each image, got {len(self.names)} for image {image}")
            return str(self.names[image])
        if place is None:
            return f"image {image}"
        data: Any = self.reader.data
        while isinstance(data, Subset):
            data, place = data.dataset, data.indices[place]
        return str(data.name(place)) if hasattr(data, "name") else f"image {place}"


class _Read(NamedTuple):
    """A batch as the data gave it."""

    number: int
    images: Sequence[int]
    """Index of each of its images in the benchmark."""
    raw: Any
    places: Sequence[int] | None = None
    """Of its images in the data set, where they are known."""


class _Planned:
    """Batches whose places in a data set are known beforehand, so that any of them can be read alone."""

    readable_again = True

    def __init__(self, loader: DataLoader[Any], limit: int | None, seed: int) -> None:
        self.loader, self.data, self.seed = loader, loader.dataset, seed
        with seeded(seed), own_generators_seeded(loader, seed):
            groups = [list(group) for group in loader.batch_sampler]  # type: ignore[union-attr]
        places = [place for group in groups for place in group]
        if limit is not None and limit < len(places):
            size = max(map(len, groups))
            places = [places[i * len(places) // limit] for i in range(limit)]
            groups = [places[start : start + size] for start in range(0, limit, size)]
        self.groups, self.places = groups, places

    def sizes(self) -> list[int]:
        return [len(group) for group in self.groups]

    def read(self, wanted: Callable[[int], bool]) -> Iterator[_Read]:
        """The batches whose number is wanted."""
        numbers = [number for number in range(len(self.groups)) if wanted(number)]
        starts = list(itertools.accumulate(self.sizes(), initial=0))
        raws = self._load([self.groups[number] for number in numbers])
        for number, raw in zip(numbers, raws, strict=True):
            yield _Read(number, range(starts[number], starts[number + 1]), raw, self.groups[number])

    def pick(self, images: Sequence[int]) -> _Read:
        """These images, as one batch."""
        chosen = [self.places[image] for image in images]
        return _Read(0, images, next(iter(self._load([chosen]))), chosen)

    def _load(self, groups: list[list[int]]) -> Iterable[Any]:
        """These groups of the data set's items, as the loader would have given them."""
        if isinstance(self.data, Synthetic) and not self.data.pairs:  # the masks, too
            return map(self.data.batch, groups)
        planned = with_plan(self.loader, groups, num_workers=min(self.loader.num_workers, len(groups)))
        if planned.generator is not None:  # the user's goes on from where it is
            planned.generator = generator_of(self.seed)
        return planned


class _Stream:
    """Batches that can only be read through, from the first one."""

    def __init__(self, data: Iterable[Any], limit: int | None, seed: int) -> None:
        self.data, self.limit, self.seed = data, limit, seed
        self.readable_again = not hasattr(data, "__next__")
        self._begun: list[Any] = []  # the first batch of a one-time iterator, which is asked for again

    def sizes(self) -> list[int] | None:
        """None where the data has no length."""
        if not isinstance(self.data, Sequence):
            return None
        end = math.inf if self.limit is None else self.limit
        return [int(min(images.stop, end)) - images.start for images, _ in self._numbered(self.data)]

    def read(self, wanted: Callable[[int], bool]) -> Iterator[_Read]:
        """The batches whose number is wanted, of a one-time iterator besides the first those that were not read yet."""
        # A shuffling loader has the same order whenever it is read.
        with seeded(self.seed), own_generators_seeded(self.data, self.seed):
            for number, (images, raw) in enumerate(self._numbered(self._all())):
                if wanted(number):
                    yield _Read(number, images, raw)

    def _numbered(self, raws: Iterable[Any]) -> Iterator[tuple[range, Any]]:
        """Each batch with the indices of its images, up to the last that holds one below the limit."""
        start = 0
        for number, raw in enumerate(raws):
            images = range(start, start + len(parts_of(raw, number)["image"]))
            yield images, raw
            start = images.stop
            if self.limit is not None and start >= self.limit:
                return

    def _all(self) -> Iterator[Any]:
        if self.readable_again:
            yield from self.data
            return
        if not self._begun:
            self._begun += itertools.islice(self.data, 1)
        yield from self._begun
        yield from self.data


def _digest_of_all(batches: Sequence[Any]) -> str:
    """Of a part of the pixels, and of all labels and truths."""
    digest = hashlib.blake2b(digest_size=8)
    for number, raw in enumerate(batches):
        held = parts_of(raw, number)
        flat = held.pop("image").detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 256)].double().cpu().contiguous().numpy().tobytes())
        for part in tree_leaves(held):
            if isinstance(part, Tensor):
                digest.update(part.detach().double().cpu().contiguous().numpy().tobytes())
            elif isinstance(part, str | int | float):
                digest.update(repr(part).encode())
    return digest.hexdigest()


def _loader_of(data: Any) -> DataLoader[Any] | None:
    """A loader whose batches can be read one by one, or None for what can only be read through."""
    if isinstance(data, DataLoader):
        return data if has_plan(data) else None
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, BATCH, collate_fn=getattr(data, "collate", None))
    return None

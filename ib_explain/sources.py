"""Data for a benchmark: numbered batches from anything that can be iterated, any of them alone where possible."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ib_explain.checks import check_positive_int
from ib_explain.data.gaze import GazeImages
from ib_explain.data.images import images_of
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
        if isinstance(data, tuple | list) and len(data) == 2 and _are_images(data[0]) and _are_labels(data[1]):
            raise TypeError("data must be an iterable of batches, got one batch (images, labels); write [(x, y)]")
        if isinstance(data, IterableDataset):
            data = DataLoader(data, BATCH, collate_fn=getattr(data, "collate", None))
        self.limit = None if images is None else check_positive_int(images, "images")
        self.names, self.seed = names, seed
        self.data: Any = data
        self.loader = _loader_of(data)
        self.plan = None if self.loader is None else self._plan(self.loader)
        self.readable_again = not hasattr(data, "__next__")
        self.class_folders, self.root = class_folders(data), root_of(data)
        self._rest: Iterator[Any] | None = None if self.readable_again else iter(data)
        reading = self._read_plan([0]) if self.plan else self._read_through()
        found = next(reading, None)
        reading.close()
        if found is None:
            raise ValueError("data yielded no batch: the loader or data set is empty")
        self.first = found
        self.sizes = self._sizes()

    def batches(
        self, skip: Callable[[int], bool] = lambda _number: False, rank: int = 0, world: int = 1
    ) -> Iterator[ImageBatch]:
        """The batches that fall to process `rank` of `world`, in rising order, but those whose number is to be skipped.

        Raises:
            TypeError, ValueError: a batch that is none, with its number; images of several sizes; boxes or fixations
                outside of an image; truths that the first batch had and another lacks.
        """
        if self.plan is not None:
            mine = [number for number in range(rank, len(self.plan), world) if not skip(number)]
            yield from self._read_plan(mine)
            return
        for batch in self._read_through():
            if batch.number % world == rank and not skip(batch.number):
                yield batch

    def pick(self, wanted: Collection[int]) -> ImageBatch | None:
        """The images with these indices, in rising order; of a one-time iterator only what its first batch holds."""
        order = sorted(wanted)
        if self.plan is not None:
            places = [place for group in self.plan for place in group]
            chosen = [places[image] for image in order]
            return self._batch(0, order, next(iter(self._load([chosen]))), chosen) if order else None
        parts = []
        for batch in self._read_through() if self.readable_again else [self.first]:
            rows = [row for row, image in enumerate(batch.images) if image in wanted]
            if rows:
                parts.append(batch.take(rows))
        return join(parts) if parts else None

    def facts(self) -> dict[str, Any]:
        """What tells these data from others: for run.json."""
        data = self.data if self.loader is None else self.loader.dataset
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
        if isinstance(self.data, Sequence) and self.plan is None:  # all of it is at hand
            rest = hashlib.blake2b(digest_size=8)
            for number, raw in enumerate(self.data):
                held = parts_of(raw, number)
                flat = held.pop("image").detach().flatten()
                rest.update(flat[:: max(1, flat.numel() // 256)].double().cpu().contiguous().numpy().tobytes())
                for part in tree_leaves(held):  # labels and truths, whole
                    if isinstance(part, Tensor):
                        rest.update(part.detach().double().cpu().contiguous().numpy().tobytes())
                    elif isinstance(part, str | int | float):
                        rest.update(repr(part).encode())
            facts["batches"] = rest.hexdigest()
        if self.plan is not None:
            names = "\n".join(self._name(i, place) for i, place in enumerate(p for group in self.plan for p in group))
            facts["names"] = hashlib.blake2b(names.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
        return facts

    def all_fixations(self) -> list[Tensor]:
        """Fixations of every image, by index: one more pass over the data."""
        found: dict[int, Tensor] = {}
        for batch in self.batches():
            found.update(zip(batch.images, batch.fixations or [], strict=True))
        return [found[image] for image in sorted(found)]

    def _sizes(self) -> list[int] | None:
        if self.plan is not None:
            return [len(group) for group in self.plan]
        if not isinstance(self.data, Sequence):
            return None
        sizes: list[int] = []
        left = self.limit
        for batch in self.data:
            held = len(parts_of(batch, len(sizes))["image"])
            sizes.append(held if left is None else min(held, left))
            left = None if left is None else left - sizes[-1]
            if left == 0:
                break
        return sizes

    def _plan(self, loader: DataLoader[Any]) -> list[list[int]]:
        """Places in the data set of each batch's images, cut to as many as are wanted."""
        with seeded(self.seed), own_generators_seeded(loader, self.seed):
            plan = [list(group) for group in loader.batch_sampler]  # type: ignore[union-attr]
        total = sum(map(len, plan))
        if self.limit is None or self.limit >= total:
            return plan
        places, size = [place for group in plan for place in group], max(map(len, plan))
        chosen = [places[i * total // self.limit] for i in range(self.limit)]
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def _read_plan(self, numbers: Sequence[int]) -> Generator[ImageBatch, None, None]:
        assert self.plan is not None
        starts = [0]
        for group in self.plan:
            starts.append(starts[-1] + len(group))
        numbers = [number for number in numbers if number < len(self.plan)]
        for number, raw in zip(numbers, self._load([self.plan[n] for n in numbers]), strict=True):
            yield self._batch(number, range(starts[number], starts[number + 1]), raw, self.plan[number])

    def _load(self, groups: list[list[int]]) -> Iterable[Any]:
        """These groups of the data set's items, as the loader would have given them."""
        loader = self.loader
        assert loader is not None
        if isinstance(loader.dataset, Synthetic) and not loader.dataset.pairs:  # the masks, too
            return map(loader.dataset.batch, groups)
        planned = with_plan(loader, groups, num_workers=min(loader.num_workers, len(groups)))
        if planned.generator is not None:  # the user's goes on from where it is
            planned.generator = generator_of(self.seed)
        return planned

    def _read_through(self) -> Generator[ImageBatch, None, None]:
        """All batches; of a one-time iterator the first, which is kept, and those that were not read yet."""
        number = done = 0
        raw_batches = self.data if self._rest is None else self._rest
        if self._rest is not None and hasattr(self, "first"):
            yield self.first
            number, done = 1, len(self.first.images)
        # A shuffling loader has the same order whenever it is read.
        with seeded(self.seed), own_generators_seeded(self.data, self.seed):
            for raw in raw_batches:
                if self.limit is not None and done >= self.limit:
                    return
                batch = self._batch(number, range(done, done + len(parts_of(raw, number)["image"])), raw)
                if self.limit is not None and done + len(batch.images) > self.limit:
                    batch = batch.take(range(self.limit - done))
                number, done = number + 1, done + len(batch.images)
                yield batch

    def _batch(self, number: int, images: Sequence[int], raw: Any, places: Sequence[int] | None = None) -> ImageBatch:
        """One batch, checked; `places` are those of its images in the data set, where they are known."""
        parts = parts_of(raw, number)
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
            names = [self._name(image, None if places is None else places[row]) for row, image in enumerate(images)]
        return ImageBatch(number, list(images), [one_line(name) for name in names], x, labels, **truths)

    def _name(self, image: int, place: int | None) -> str:
        if self.names is not None:
            if image >= len(self.names):
                raise ValueError(f"names must hold one name for each image, got {len(self.names)} for image {image}")
            return str(self.names[image])
        if place is None or self.loader is None:
            return f"image {image}"
        data: Any = self.loader.dataset
        where = place
        while isinstance(data, Subset):
            data, where = data.dataset, data.indices[where]
        return str(data.name(where)) if hasattr(data, "name") else f"image {where}"


def _are_images(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 4


def _are_labels(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.ndim == 1
    return isinstance(part, list | tuple) and bool(part) and all(isinstance(label, int) for label in part)


def _loader_of(data: Any) -> DataLoader[Any] | None:
    """A loader whose batches can be read one by one, or None for what can only be read through."""
    if isinstance(data, DataLoader):
        return data if has_plan(data) else None
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, BATCH, collate_fn=getattr(data, "collate", None))
    return None

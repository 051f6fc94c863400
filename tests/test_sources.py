"""What a benchmark reads: loaders, data sets, streams, and in which order."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import ib_explain as ibx
from ib_explain.data import Synthetic
from ib_explain.data.boxes import BoxBatch
from ib_explain.sources import Source
from tests.benchmarking import batches, measure, values
from tests.models import CLASSES, images


@dataclass
class Named(Dataset):
    x: Tensor

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], index % CLASSES

    def name(self, index):
        return f"{index}.jpg"


def test_data_sets_and_loaders_are_read_batch_by_batch_with_their_names(x):
    read = []

    class Watched(Named):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    source = Source(DataLoader(Watched(x), batch_size=2))
    assert source.sizes == [2, 2, 2] and source.first.names == ["0.jpg", "1.jpg"]
    read.clear()
    (only,) = source.batches(skip=lambda number: number != 1)
    assert read == [2, 3] and only.images == [2, 3]  # what is skipped is not read
    assert [b.number for b in source.batches(rank=1, world=2)] == [1]
    picked = source.pick({5, 0})
    assert picked.names == ["0.jpg", "5.jpg"] and torch.equal(picked.x, x[[0, 5]])
    subset = Source(Subset(Named(x), [4, 1]))
    assert subset.first.names == ["4.jpg", "1.jpg"] and subset.facts()["name"] == "Named"
    unnamed = TensorDataset(x, torch.zeros(len(x)).long())  # by their places in the data set
    assert Source(Subset(unnamed, [4, 1])).first.names == ["image 4", "image 1"]
    assert Source(unnamed, images=3).first.names == ["image 0", "image 2", "image 4"]
    assert Source([x]).first.names[4] == "image 4"


def test_n_images_are_spread_over_a_data_set_and_are_the_first_of_a_list(x):
    spread = Source(DataLoader(Named(x), batch_size=2), images=3)
    assert spread.sizes == [2, 1]
    assert [name for b in spread.batches() for name in b.names] == ["0.jpg", "2.jpg", "4.jpg"]
    first = Source(list(x.split(2)), images=3)
    assert first.sizes == [2, 1] and torch.equal(torch.cat([b.x for b in first.batches()]), x[:3])
    once = Source(iter(x.split(2)), images=3)
    assert once.sizes is None and torch.equal(torch.cat([b.x for b in once.batches()]), x[:3])


def test_a_shuffling_loader_has_one_order_for_a_seed(x):
    loader = DataLoader(TensorDataset(x, torch.arange(6) % CLASSES), batch_size=2, shuffle=True)
    orders = [torch.cat([b.x for b in Source(loader, seed=seed).batches()]) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_a_generator_of_the_loaders_own_is_left_as_it_was(x):
    generator = torch.Generator().manual_seed(4)
    loader = DataLoader(TensorDataset(x), batch_size=2, shuffle=True, generator=generator)
    before = generator.get_state()
    one, again = (torch.cat([b.x for b in Source(loader).batches()]) for _ in "12")
    assert torch.equal(one, again) and torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("kind", ["random", "weighted"])
def test_so_is_that_of_its_sampler(x, kind):
    data, generator = TensorDataset(x), torch.Generator().manual_seed(4)
    weighted = WeightedRandomSampler([1.0] * 6, 6, generator=generator)
    sampler = weighted if kind == "weighted" else RandomSampler(data, generator=generator)
    loader = DataLoader(data, batch_size=2, sampler=sampler)
    before = generator.get_state()
    one, again = (torch.cat([b.x for b in Source(loader).batches()]) for _ in "12")
    assert torch.equal(one, again) and torch.equal(generator.get_state(), before)


def test_a_short_stream_is_whole(host, x, tmp_path):
    measure(host, iter(x.split(2)), images=500, out=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ibx.Leaderboard.read(tmp_path).summary.images == 6
    assert Source(iter(x.split(2)), images=5).facts()["at_most"] == 5


def test_a_loader_of_its_own_kind_has_one_order_however_often_it_is_read(x):
    class Shuffling:
        def __iter__(self):
            return iter(x[torch.randperm(6)].split(2))

    source = Source(Shuffling(), seed=3)
    whole = list(source.batches())
    assert torch.equal(whole[0].x, source.first.x) and source.sizes is None
    assert torch.equal(source.pick({4}).x, whole[2].x[:1])


def test_one_time_iterators_give_everything_but_what_needs_a_second_look(host, x):
    board = measure(host, (batch for batch in batches(x)), ["edges"], ["insertion"])
    assert_close(
        values(board, "edges", "insertion"),
        values(measure(host, batches(x), ["edges"], ["insertion"]), "edges", "insertion"),
    )
    gaze = ({"image": part, "fixations": [torch.ones(1, 2)] * 2} for part in x.split(2))
    with pytest.raises(ValueError, match="needs the fixations of all other images beforehand"):
        measure(host, gaze, metrics=["auc_shuffled"])


def test_synthetic_pictures_come_with_their_masks():
    source = Source(Synthetic(4))
    assert source.first.truths == ("masks",) and source.first.masks.shape == (4, 1, 64, 64)
    boxes = BoxBatch(images(2), torch.zeros(2).long(), [torch.tensor([[2.0, 3, 5, 9]]), torch.zeros(0, 4)])
    masks = Source([boxes]).first.masks
    assert masks[0].sum() == 4 * 7 and not masks[1].any()


def test_a_stream_of_samples_is_read_in_batches(x):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(image, 1) for image in x])

    source = Source(Stream())
    assert len(source.first.x) == 6 and source.first.labels.tolist() == [1] * 6 and source.readable_again

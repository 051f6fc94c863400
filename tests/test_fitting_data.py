"""What a fit may be given: loaders, lists, generators, labels, shares of several processes, and bad data."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ib_explain.data.batches import Batches, Share
from ib_explain.ib import IBAttention
from tests.fitting import assert_equal, batches, fit, weights
from tests.models import CLASSES, images, tiny


class TestData:
    def test_images_alone_pairs_loaders_and_generators_give_the_same(self):
        pairs = batches()
        expected = weights(fit(pairs, steps=4))
        stacked = TensorDataset(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        for data in ([x for x, _ in pairs], DataLoader(stacked, batch_size=8), iter(pairs)):
            assert_equal(weights(fit(data, steps=4)), expected, rtol=1e-5, atol=1e-6)

    def test_timms_loader(self):
        import numpy as np
        from PIL import Image
        from timm.data import create_loader

        class Pictures(torch.utils.data.Dataset):
            transform = None

            def __len__(self):
                return 8

            def __getitem__(self, index):
                pixels = np.random.default_rng(index).integers(0, 255, (24, 24, 3), dtype=np.uint8)
                return self.transform(Image.fromarray(pixels)), index % CLASSES

        loader = create_loader(
            Pictures(), (3, 24, 24), 4, is_training=True, use_prefetcher=False, num_workers=0, persistent_workers=False
        )
        assert fit(loader, steps=3).fitted

    def test_labels_are_used_when_asked_for(self):
        assert fit(batches(), objective="label").record["settings"]["objective"] == "label"
        with pytest.raises(ValueError, match="objective='label' needs data that yields"):
            fit([images(4)], objective="label")

    @pytest.mark.parametrize(
        ("data", "error", "text"),
        [
            ([], ValueError, "data yielded no batch"),
            (iter([]), ValueError, "data yielded no batch"),
            ((images(4), torch.arange(4) % 2), TypeError, r"got one batch \(images, labels\); write \[\(x, y\)\]"),
            (TensorDataset(images(4)), TypeError, r"got TensorDataset; pass DataLoader\(data, 64, shuffle=True\)"),
            (iter([images(4)]), ValueError, "ended after 1 batches; pass a DataLoader"),
            ([{"image": images(2)}], TypeError, "got dict"),
            (images(4), TypeError, "iterable of batches, got Tensor"),
            (5, TypeError, "iterable of batches, got int"),
            ([images(4), images(4, size=32)], ValueError, r"of one size, got \(3, 32, 32\) after \(3, 24, 24\)"),
            ([torch.zeros(2, 3, 24, 24, dtype=torch.uint8)], TypeError, "floating-point images, got torch.uint8"),
            ([torch.full((2, 3, 24, 24), torch.inf)], ValueError, "must be finite"),
        ],
    )
    def test_bad_data(self, data, error, text):
        with pytest.raises(error, match=text):
            fit(data, steps=3)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"steps": 0}, "steps must be an integer >= 1, got 0"),
            ({"beta": -1.0}, "beta must be a finite number > 0, got -1.0"),
            ({"lr": True}, "lr must be a number > 0, got True"),
            ({"objective": "labels"}, "unknown objective 'labels'; did you mean 'label'"),
            ({"precision": "fp8"}, "precision must be"),
            ({"resume": True}, "resume=True needs checkpoint=FOLDER"),
        ],
    )
    def test_bad_options(self, options, text):
        with pytest.raises((TypeError, ValueError), match=text):
            fit([images(4)], **{"steps": 2, **options})

    def test_order_follows_from_seed_and_epoch_and_the_callers_random_state_stays(self):
        loader = DataLoader(TensorDataset(torch.arange(12.0).view(12, 1, 1, 1)), batch_size=4, shuffle=True)
        state = torch.get_rng_state()

        def first(count, skip=0, seed=0):
            stream = Batches(loader, seed)(skip)
            return [next(stream)[0].flatten().tolist() for _ in range(count)]

        whole = first(6)
        assert whole == first(6) and whole[2:] == first(4, skip=2) and whole != first(6, seed=1)
        assert whole[:3] != whole[3:]  # another order in the second epoch
        assert torch.equal(state, torch.get_rng_state())

    def test_processes_share_the_batches(self):
        data = [torch.full((1, 1, 1, 1), float(i)) for i in range(5)]
        parts = []
        for rank in (0, 1):
            stream = Batches(data, 0, Share(rank, 2))()
            parts.append([next(stream)[0].item() for _ in range(4)])
        assert parts == [[0, 2, 0, 2], [1, 3, 1, 3]]  # the odd one out waits for nobody

    @pytest.mark.parametrize("workers", [0, 2])
    def test_processes_read_their_own_batches_of_a_loader_in_the_order_of_one(self, workers):
        read: list[int] = []

        class Counted(TensorDataset):
            def __getitem__(self, place):
                read.append(place)
                return super().__getitem__(place)

        data = Counted(torch.arange(22.0).view(22, 1, 1, 1))
        options = {"shuffle": True, "num_workers": workers}
        whole = Batches(DataLoader(data, 4, drop_last=True, **options), 0)()
        wanted = [next(whole)[0].flatten().tolist() for _ in range(4)]
        parts = []
        for rank in (0, 1):
            read.clear()
            stream = Batches(DataLoader(data, 2, **options), 0, Share(rank, 2))()
            parts.append([next(stream)[0].flatten().tolist() for _ in range(5)])  # the 11th batch is nobody's
            if not workers:  # which count in processes of their own
                assert read == [place for part in parts[rank] for place in map(int, part)]
        assert [a + b for a, b in zip(*parts, strict=True)][:4] == wanted
        assert len({place for part in (*parts[0], *parts[1]) for place in part}) == 20

    def test_the_statistics_count_to_what_the_data_holds(self, capsys):
        ib = IBAttention(tiny(), "stages.1")
        ib.fit(DataLoader(TensorDataset(images(6)), 4), steps=1)
        assert "statistics 6/6  0 s left" in capsys.readouterr().err

    def test_an_epochs_images_are_known_where_the_data_says(self):
        assert Batches(DataLoader(TensorDataset(images(6)), 4), 0).images == 6
        assert Batches(batches(), 0).images is None

    def test_bf16_fits_and_statistics_stay_in_float32(self):
        ib = fit(batches(), precision="bf16")
        assert weights(ib)["restriction.moments.mean"].dtype == torch.float32
        assert ib.record["settings"]["precision"] == "bf16"
        assert torch.isfinite(ib.attribute(images(2))).all()


@pytest.mark.parametrize(
    "labels",
    [torch.rand(8, CLASSES), torch.zeros(8, 1), [f"{i}.jpg" for i in range(8)], {"any": "thing"}, torch.full((8,), -1)],
)
def test_labels_that_nobody_asks_for_may_be_anything(labels):
    data = [images(8)]
    assert_equal(weights(fit([(data[0], labels)], steps=2)), weights(fit(data, steps=2)))


@pytest.mark.parametrize("kind", [list, np.asarray])
def test_labels_may_be_lists_and_arrays(kind):
    labels = torch.arange(8) % CLASSES
    asked = fit([(images(8), kind(labels.tolist()))], steps=2, objective="label")
    assert_equal(weights(asked), weights(fit([(images(8), labels)], steps=2, objective="label")))


def test_a_loader_that_is_dealt_already_is_not_dealt_again():
    data = TensorDataset(torch.arange(16.0).view(16, 1, 1, 1).expand(16, 3, 2, 2))

    def seen(rank):
        loader = DataLoader(data, 2, sampler=DistributedSampler(data, 2, rank))
        read = itertools.islice(Batches(loader, 0, Share(rank, 2))(), 8)
        return [x[:, 0, 0, 0].tolist() for x, _ in read]

    for first in (seen(0), seen(1)):
        assert first[:4] != first[4:]  # another order in the second epoch
    assert sorted(v for rank in (0, 1) for batch in seen(rank)[:4] for v in batch) == list(range(16))


def test_data_that_can_be_read_only_once_says_so():
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.source = iter(images(16))

        def __iter__(self):
            return self.source

    with pytest.raises(ValueError, match="data could be read only once, and its batches are used up"):
        fit(DataLoader(Once(), 8), steps=4)


def test_features_that_never_vary_are_refused():
    with pytest.raises(ValueError, match="the features of layer 'stages.1' do not vary over the 8 images"):
        IBAttention(tiny().requires_grad_(False), "stages.1", per_element=True).fit(
            [images(1).expand(8, -1, -1, -1)], steps=1, show_progress=False
        )


def test_processes_count_each_others_images():
    data = [torch.zeros(2, 3, 4, 4) for _ in range(8)]
    for world, count in ((1, 4), (2, 2), (4, 1)):
        assert len(list(Batches(data, 0, Share(0, world)).first(8))) == count

"""Relevance: Shapley values by definition, the label's information as their sum, what a fit learns of them."""

import itertools
import math

import pytest
import torch
from torch import nn

from ib_explain.contenders import contenders_of
from ib_explain.ib import IBAttention
from ib_explain.lending import frozen
from ib_explain.maps import spread_signed
from ib_explain.observation import observe
from ib_explain.relevance import coalitions, label_information, regression_loss
from tests.models import images, tiny

KINDS = ["cnn", "vit", "nhwc"]


def fit(kind="cnn", steps=6, **options):
    return IBAttention(tiny(kind), relevance=True, **options).fit([images(8)], steps=steps, show_progress=False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shapley(worth, players):
    """Mean gain of each player over all orders, by definition."""
    values = torch.zeros(players)
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        for place, player in enumerate(order):
            values[player] += worth[frozenset(order[: place + 1])] - worth[frozenset(order[:place])]
    return values / len(orders)


class TestRegression:
    def test_its_minimum_over_all_sets_is_the_shapley_values(self):
        players = 4
        sets = [frozenset(s) for n in range(players + 1) for s in itertools.combinations(range(players), n)]
        worth = dict(zip(sets, [0.0, *random(len(sets) - 1).tolist()], strict=True))
        proper = [s for s in sets if 0 < len(s) < players]
        chosen = torch.tensor([[float(p in s) for p in range(players)] for s in proper]).view(-1, 1, 2, 2)
        # Of the sets of one size each is as likely as the others.
        kernel = torch.tensor([1 / (len(s) * (players - len(s)) * math.comb(players, len(s))) for s in proper])
        total, found = worth[frozenset(range(players))], torch.tensor([worth[s] for s in proper])
        free = torch.zeros(1, 1, 2, 2, requires_grad=True)

        def values():
            return free - free.mean() + total / players

        def error():
            optimiser.zero_grad()
            loss = (kernel * regression_loss(values().expand(len(proper), -1, -1, -1), chosen, found)).sum()
            loss.backward()
            return loss

        optimiser = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-12)
        optimiser.step(error)
        torch.testing.assert_close(values().detach().flatten(), shapley(worth, players), atol=1e-4, rtol=1e-4)

    def test_sizes_follow_the_shapley_kernel_and_no_position_is_favoured(self):
        generator = torch.Generator().manual_seed(0)
        count = 40_000
        chosen = coalitions(torch.rand(count, 1, generator=generator), torch.randn(count, 1, 3, 3, generator=generator))
        sizes = chosen.sum(dim=(1, 2, 3)).long()
        expected = torch.tensor([1 / (s * (9 - s)) for s in range(1, 9)])
        got = torch.bincount(sizes, minlength=10)[1:9] / count
        torch.testing.assert_close(got, expected / expected.sum(), atol=0.01, rtol=0)
        assert sizes.min() == 1 and sizes.max() == 8
        torch.testing.assert_close(chosen.mean(dim=0), torch.full((1, 3, 3), 0.5), atol=0.01, rtol=0)

    def test_label_information_in_bits(self):
        logits, closed = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(0.5), math.log(0.25)]])
        assert label_information(logits, closed, torch.tensor([1])).item() == pytest.approx(math.log2(3))
        assert label_information(logits, closed, torch.tensor([0])).item() == pytest.approx(-1.0)


class Additive(nn.Module):
    """(B, 3, 12, 12) -> two classes; ln p of class 1 is all but a sum over the 3x3 positions of `features`."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 4, stride=4)
        self.score = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def scores(self, x):
        return 2 * self.score(self.features(x))  # (B, 1, 3, 3)

    def forward(self, x):
        logit = self.scores(x).sum(dim=(2, 3)) - 30  # far below 0, where ln sigmoid is the identity
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


@pytest.mark.parametrize("reads", ["gradient", "features"])
def test_on_an_additive_host_a_fit_finds_each_positions_own_score(reads):
    torch.manual_seed(3)
    host = Additive().eval()

    def draw(seed):
        return 2 * random(32, 3, 12, 12, seed=seed)

    data = [(draw(s), torch.ones(32, dtype=torch.long)) for s in range(8)]
    ib = IBAttention(host, "features", reads=reads, relevance=True)
    ib.fit(data, steps=250, objective="label", lr=5e-3, show_progress=False)
    x = draw(99)
    with torch.no_grad():
        scores = host.scores(x)
    expected = (scores - scores.mean()) / math.log(2)  # against noise of the features' own distribution
    got = ib.attribute(x, 1, output="relevance").unfold(2, 4, 4).unfold(3, 4, 4).sum(dim=(4, 5))  # what a cell holds
    found = spread_signed(expected, (12, 12)).unfold(2, 4, 4).unfold(3, 4, 4).sum(dim=(4, 5))
    assert torch.corrcoef(torch.stack([got.flatten(), found.flatten()]))[0, 1] > 0.9


class TestAttribute:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_sum_is_the_label_information_of_the_image(self, kind):
        ib = fit(kind)
        x = images(3, seed=5)
        for target in (None, 2, [0, 1, 2]):
            heat = ib.attribute(x, target, output="relevance")
            assert heat.shape == (3, 1, 24, 24) and heat.dtype == torch.float32 and not heat.requires_grad
            with torch.no_grad():
                logits = ib.host(x)
            classes = logits.argmax(1) if target is None else torch.as_tensor(target).expand(3)
            expected = label_information(logits, ib.bottleneck.closed, classes)
            torch.testing.assert_close(heat.sum(dim=(1, 2, 3)), expected, atol=1e-4, rtol=1e-4)

    def test_a_class_of_which_the_host_sees_less_than_in_nothing_has_negative_bits(self):
        ib, x = fit(), images(8, seed=6)
        with torch.no_grad():
            least = ib.host(x).log_softmax(1).sub(ib.bottleneck.closed).argmin(dim=1)
        assert (ib.attribute(x, least, output="relevance").sum(dim=(1, 2, 3)) < 0).all()

    def test_what_is_asked_for_is_signed_and_of_the_class(self):
        ib, x = fit(steps=30), images(4, seed=7)
        heat = [ib.attribute(x, target, output="relevance") for target in (0, 1)]
        assert (heat[0] < 0).any() and (heat[0] > 0).any() and not torch.allclose(*heat)

    def test_one_by_one_and_at_another_size(self):
        ib, x = fit(), images(3, seed=8)
        together = ib.attribute(x, output="relevance")
        alone = torch.cat([ib.attribute(part, output="relevance") for part in x.split(1)])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)
        assert ib.attribute(images(2, size=32), output="relevance").shape == (2, 1, 32, 32)

    def test_closed_is_the_mean_of_what_the_host_says_of_noise(self):
        ib = IBAttention(tiny(), relevance=True).fit([images(64)], steps=49, show_progress=False)
        with frozen(ib.host) as host, torch.no_grad():
            seen = observe(host, ib.site, images(256, seed=1))
            nothing = torch.zeros(())
            noise = random(*seen.features.shape, seed=2)
            said = seen.tail(ib.bottleneck.restriction.apply_to(seen, ib.site.layout, nothing, noise)).log_softmax(1)
        # Means of 256 draws, four times 64 in the fit, each of a deviation near 2.
        torch.testing.assert_close(ib.bottleneck.closed, said.mean(dim=0, keepdim=True), atol=0.4, rtol=0)

    def test_it_needs_a_fit_with_relevance(self):
        with pytest.raises(ValueError, match=r"relevance is learned in a fit: IBAttention\(model, relevance=True\)"):
            IBAttention(tiny()).attribute(images(1), output="relevance")
        plain = IBAttention(tiny()).fit([images(8)], steps=1, show_progress=False)
        with pytest.raises(ValueError, match="relevance is learned in a fit"):
            plain.attribute(images(1), output="relevance")

    def test_refining_and_the_residual_gate_have_none(self):
        with pytest.raises(ValueError, match="refine moves the attention.*got 3"):
            fit().attribute(images(1), output="relevance", refine=3)
        with pytest.raises(ValueError, match="'residual' gate passes everything"):
            IBAttention(tiny(), gate="residual", relevance=True)
        with pytest.raises(TypeError, match="relevance must be True or False, got 'yes'"):
            IBAttention(tiny(), relevance="yes")

    def test_in_a_benchmark_each_output_has_its_own_unit(self):
        ib = fit()
        outputs = {"bits": ib, "relevance": (ib, {"output": "relevance"}), "per image": ("ib", {"output": "attention"})}
        units = [contender.unit for contender in contenders_of(outputs, ib.host)]
        assert units == ["bits", "label bits", "attention"]


class TestFit:
    def test_the_attention_is_that_of_a_fit_without_relevance(self):
        plain = IBAttention(tiny()).fit([images(8)], steps=6, show_progress=False).bottleneck.state_dict()
        both = fit().bottleneck.state_dict()
        assert all(torch.equal(value, both[name]) for name, value in plain.items())
        assert {name.split(".")[0] for name in both.keys() - plain.keys()} == {"relevance", "closed", "typical_bits"}

    def test_a_host_that_says_the_same_of_every_image_has_no_relevance_and_no_nan(self):
        host = tiny()
        torch.nn.init.zeros_(host.fc.weight)
        ib = IBAttention(host, "stages.1", relevance=True).fit([images(8)], steps=3, show_progress=False)
        heat = ib.attribute(images(2), output="relevance")
        assert torch.isfinite(heat).all() and heat.sum(dim=(1, 2, 3)).abs().max() < 1e-5

    @pytest.mark.parametrize("reads", ["gradient", "features"])
    def test_saved_and_loaded(self, tmp_path, reads):
        ib = fit(reads=reads)
        ib.save(tmp_path / "b")
        twin, x = IBAttention.load(tmp_path / "b", tiny()), images(2)
        assert torch.equal(twin.attribute(x, output="relevance"), ib.attribute(x, output="relevance"))

    def test_an_interrupted_fit_resumes_to_the_same(self, tmp_path):
        class Data(list):
            left = 10**6

            def __iter__(self):
                for batch in super().__iter__():
                    self.left -= 1
                    if self.left < 0:
                        raise KeyboardInterrupt
                    yield batch

        data = Data(images(8, seed=s) for s in range(3))
        options = {"steps": 40, "every": 3, "checkpoint": tmp_path / "run", "show_progress": False}
        data.left = 30
        with pytest.raises(KeyboardInterrupt):
            IBAttention(tiny(), relevance=True).fit(data, **options)
        data.left = 10**6
        resumed = IBAttention(tiny(), relevance=True).fit(data, resume=True, **options).bottleneck.state_dict()
        options["checkpoint"] = tmp_path / "whole"
        whole = IBAttention(tiny(), relevance=True).fit(data, **options).bottleneck.state_dict()
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


class TestMaps:
    @pytest.mark.parametrize("size", [(24, 24), (7, 10)])
    def test_signed_amounts_keep_their_sum_and_sign_pattern(self, size):
        amounts = random(4, 1, 6, 5)
        fine = spread_signed(amounts, size)
        torch.testing.assert_close(fine.sum(dim=(1, 2, 3)), amounts.sum(dim=(1, 2, 3)), atol=1e-5, rtol=1e-5)
        assert torch.equal(spread_signed(amounts, (6, 5)), amounts)

"""Per-image optimisation against a literal one-at-a-time re-derivation, and what its settings mean."""

import math

import pytest
import torch
import torch.nn.functional as F

import ib_explain.per_image as per_image
from ib_explain.bottleneck.module import Restriction
from ib_explain.lending import frozen
from ib_explain.observation import observe
from ib_explain.per_image import PerImageSettings, _towards, optimise
from ib_explain.places import find_place
from ib_explain.statistics import Moments
from tests.models import images
from tests.optimising import CHANNELS, GRID, LAYER, dear_on_the_left, setting


def ours(host, x, restriction, settings, start=None):
    with frozen(host), torch.no_grad():
        place = find_place(host, LAYER, tuple(x.shape[1:]), read=False)
        seen = observe(host, place.site, x)
        return optimise(restriction, seen, place.site.layout, settings, start)


def literal(host, image, restriction, settings):
    """One image, the whole host every time, formulas written out."""
    mean, std = restriction.moments.get_buffer("mean"), restriction.moments.get_buffer("std")
    target = host(image).argmax(1)
    logit = torch.full((1, 1, *GRID), math.log(0.73 / 0.27), requires_grad=True)
    adam = torch.optim.Adam([logit], lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    kept = []
    for _ in range(settings.steps):
        adam.zero_grad()
        noise = torch.randn(1, CHANNELS, *GRID, generator=generator)
        for sign in (1, -1):
            a, nats = logit.sigmoid(), []

            def hook(_module, _inputs, output, a=a, nats=nats, sign=sign, noise=noise):
                r = (output - mean) / std
                element = (0.5 * (a**2 * (r**2 - 1) - torch.log(1 - a**2))).mean(dim=(0, 1))  # (6, 6)
                edges = [(0, 2), (1, 3), (3, 5), (4, 6)]  # a quarter of six, rounded outwards
                blocks = [element[top:bottom, left:right].mean() for top, bottom in edges for left, right in edges]
                nats.append(sum(torch.sqrt(block + 1e-6) for block in blocks) / 16)
                return mean + std * (a * r + torch.sqrt(1 - a**2) * sign * noise)

            handle = host.get_submodule(LAYER).register_forward_hook(hook)
            loss = F.cross_entropy(host(image), target)
            handle.remove()
            ((loss + settings.beta * nats[0]) / 2).backward()
        adam.step()
        kept.append(logit.detach().sigmoid())
    last = max(1, settings.steps // 4)
    return torch.stack(kept[-last:]).mean(0)


def test_a_batch_gives_the_maps_of_a_literal_one_at_a_time_fit_under_the_same_noise():
    host, x, restriction = setting()
    settings = PerImageSettings(steps=8, beta=0.3, copies=2, seed=4)
    expected = torch.cat([literal(host, image[None], restriction, settings) for image in x])
    torch.testing.assert_close(ours(host, x, restriction, settings), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["gaussian", "noise"])
def test_more_beta_lets_less_pass(gate):
    host, x, restriction = setting(gate)
    little, much = (ours(host, x, restriction, PerImageSettings(beta=b)) for b in (0.01, 30.0))
    assert (much.mean((1, 2, 3)) < 0.8 * little.mean((1, 2, 3))).all()


def test_it_keeps_the_positions_that_the_prediction_needs():
    """A host that reads one position only: its bits must be there."""

    class OnePosition(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = torch.nn.Conv2d(3, CHANNELS, 4, stride=4)
            self.head = torch.nn.Linear(CHANNELS, 5)

        def forward(self, x):
            grid = self.features(x)
            return self.head(grid[:, :, 2, 4]) * 10 + 0 * grid.mean()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        host = OnePosition().eval()
    x = images(4, seed=3)
    restriction = Restriction("gaussian", Moments(torch.zeros(1, CHANNELS, 1, 1), torch.ones(1, CHANNELS, 1, 1), 1), [])
    with frozen(host), torch.no_grad():
        place = find_place(host, "features", (3, 24, 24), read=False)
        seen = observe(host, place.site, x)
        attention = optimise(restriction, seen, place.site.layout, PerImageSettings(steps=30, beta=1.0))
    assert (attention.flatten(1).argmax(1) == 2 * 6 + 4).all()
    others = attention.clone()
    others[:, :, 2, 4] = 0
    assert (attention[:, 0, 2, 4] > 2 * others.flatten(1).mean(1)).all()


def test_zero_steps_return_the_start():
    host, x, restriction = setting()
    start = torch.rand(3, 1, *GRID)
    assert torch.equal(ours(host, x, restriction, PerImageSettings(steps=0), start), start)


def test_dear_places_pass_less(monkeypatch):
    host, x, restriction = setting()
    settings = PerImageSettings(steps=20, beta=30.0)
    even = ours(host, x, restriction, settings)
    monkeypatch.setattr("ib_explain.per_image.location_price", dear_on_the_left)
    priced = ours(host, x, restriction, settings)
    left = slice(0, GRID[1] // 2)
    shares = [maps[..., left].sum() / maps.sum() for maps in (even, priced)]
    assert shares[1] < 0.8 * shares[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": -1}, "steps must be"), ({"steps": 2.5}, "steps must be"), ({"copies": 0}, "copies must be")]
    + [({"beta": -5}, "beta must be"), ({"lr": 0}, "lr must be")],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PerImageSettings(**wrong)


def test_evidence_prices_the_places(monkeypatch):
    host, x, restriction = setting()
    evidence, asked = torch.randn(len(x), 1, *GRID), []
    monkeypatch.setattr(per_image, "location_price", lambda seen, masked=None: asked.append(masked) or torch.ones(1))
    with frozen(host), torch.no_grad():
        place = find_place(host, LAYER, tuple(x.shape[1:]), read=False)
        seen = observe(host, place.site, x)
        optimise(restriction, seen, place.site.layout, PerImageSettings(steps=1), None, evidence)
    assert asked[0] is evidence


def test_a_peak_of_the_evidence_moves_the_start_by_half_a_deviation_at_most():
    evidence = torch.zeros(2, 1, 6, 6)
    evidence[0, 0, 2, 4], evidence[1, 0, 2, 4] = 1, -1
    moved = _towards(evidence, torch.full_like(evidence, 0.5))
    assert moved[:, 0, 2, 4].tolist() == pytest.approx([1.5 * 0.5, 1.5 * -2.0])

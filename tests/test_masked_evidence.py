"""Evidence from masked pictures: a host whose answer is known on paper, a literal re-derivation, what it moves."""

import pytest
import torch
from torch import nn

from ib_explain import IBAttention
from ib_explain.lending import HostArgs, frozen
from ib_explain.masked_evidence import masked_evidence
from ib_explain.metrics import count_passes
from ib_explain.observation import observe
from ib_explain.per_image import PerImageSettings, mask_pairs, optimise
from ib_explain.perturb import rise_masks
from ib_explain.places import find_place
from tests.models import images, tiny
from tests.optimising import GRID, setting

NONE = HostArgs.of(None, 0)


def evidence(host, x, target, grid=(4, 4), *, pairs=2, seed=0, args=NONE):
    with frozen(host) as lent, torch.no_grad():
        return masked_evidence(lent, x, target, grid, pairs=pairs, seed=seed, args=args)


class Linear(nn.Module):
    """Class 0 scores a weighted sum of the pixels, far below class 1, so that ln p(0) is that sum up to a constant."""

    def __init__(self, size):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(1, 3, size, size, generator=generator))

    def forward(self, x):
        score = (self.weights * x).sum(dim=(1, 2, 3))
        return torch.stack([score, torch.full_like(score, 1e4)], dim=1)


def test_of_a_linear_host_it_is_weight_times_pixel_whatever_the_masks():
    host, x = Linear(16), images(3, size=16)
    expected = 4 * (host.weights * x).sum(1, keepdim=True).unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(-1, -2))
    for seed in (0, 1):
        torch.testing.assert_close(evidence(host, x, torch.zeros(3, dtype=torch.long), seed=seed), expected.detach())


def test_it_is_the_sum_of_the_derivatives_by_each_mask_of_a_pair_and_its_complement():
    host, x = tiny(), images(2, seed=3)
    target = torch.tensor([1, 0])
    generator = torch.Generator().manual_seed(7)
    cells = torch.rand(2, 3, 3, generator=generator) < 0.5
    shifts = torch.rand(2, 2, generator=generator)
    size = tuple(x.shape[2:])
    expected = torch.zeros(2, 1, *size)
    for n in range(2):
        for some in (cells[n : n + 1], ~cells[n : n + 1]):
            mask = rise_masks(some, shifts[n : n + 1], size)[None].repeat(2, 1, 1, 1).requires_grad_()
            host(x * mask).log_softmax(1)[torch.arange(2), target].sum().backward()
            expected += mask.grad
    torch.testing.assert_close(evidence(host, x, target, size, seed=7), expected, rtol=1e-4, atol=1e-6)


def test_one_image_at_a_time_gives_the_same():
    host, x, target = tiny(), images(3, seed=4), torch.tensor([0, 2, 1])
    alone = torch.cat([evidence(host, x[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(evidence(host, x, target), alone, rtol=1e-4, atol=1e-6)


def test_a_host_that_takes_no_gradient_to_its_images_gives_none():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def forward(self, x):
            return self.inner(x.detach())

    assert (evidence(Detached(), images(2), torch.tensor([0, 1])) == 0).all()


def test_further_arguments_of_the_host_come_along():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def forward(self, x, scale):
            return self.inner(x * scale[:, None, None, None])

    host, x, target = Scaled(), images(2), torch.tensor([0, 1])
    scale = torch.tensor([1.0, 2.0])
    plain = evidence(host.inner, x * scale[:, None, None, None], target)
    given = evidence(host, x, target, args=HostArgs.of((scale,), 2))
    torch.testing.assert_close(given, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("steps", "pairs"), [(1, 1), (5, 1), (6, 2), (10, 2), (20, 4)])
def test_a_pair_of_masks_for_every_five_steps(steps, pairs):
    assert mask_pairs(steps) == pairs


def planted(count):
    """Evidence on the left half of the grid."""
    values = torch.zeros(count, 1, *GRID)
    values[..., : GRID[1] // 2] = 3.0
    return values


def test_attention_moves_towards_the_evidence_and_its_scale_does_not_matter():
    host, x, restriction = setting()
    settings = PerImageSettings(steps=10, lr=0.15, beta=3.0)

    def optimised(found):
        with frozen(host), torch.no_grad():
            place = find_place(host, "stages.1", tuple(x.shape[1:]), read=False)
            seen = observe(host, place.site, x)
            return optimise(restriction, seen, place.site.layout, settings, None, found)

    without, left, much = (optimised(found) for found in (None, planted(3), 1e3 * planted(3)))
    half = slice(0, GRID[1] // 2)
    before, after = (maps[..., half].sum((1, 2, 3)) / maps.sum((1, 2, 3)) for maps in (without, left))
    assert (after > before + 0.1).all()
    torch.testing.assert_close(left, much)
    torch.testing.assert_close(optimised(torch.zeros_like(planted(3))), without)


def test_refining_looks_at_masked_pictures_and_the_fitted_map_does_not():
    host, x = tiny(), images(8, seed=1)
    ib = IBAttention(host, "stages.1").fit([x] * 2, steps=4, show_progress=False)
    fitted = count_passes(host, x, lambda model, images_, target: ib.attribute(images_, target))
    refined = count_passes(host, x, lambda model, images_, target: ib.attribute(images_, target, refine=5))
    # A pair of masks through the whole host, and five steps with two noise samples each through a part of it.
    assert refined[0] > fitted[0] + 2 and refined[1] > fitted[1] + 2
    assert not torch.allclose(ib.attribute(x, refine=5), ib.attribute(x))


def test_an_optimisation_from_scratch_goes_without(monkeypatch):
    host, x = tiny(), images(4, seed=1)

    def refuse(*_args, **_options):
        raise AssertionError("masked pictures were looked at")

    monkeypatch.setattr("ib_explain.ib.masked_evidence", refuse)
    settings = PerImageSettings(steps=2)
    IBAttention(host, "stages.1").attribute_per_image(x, settings=settings)
    fitted = IBAttention(host, "stages.1").fit([x] * 2, steps=2, show_progress=False)
    fitted.attribute_per_image(x, settings=settings)
    with pytest.raises(AssertionError, match="masked pictures"):
        fitted.attribute(x, refine=2)

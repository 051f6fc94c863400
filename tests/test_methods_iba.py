"""IBA: against the published procedure written out one image at a time; the statistics; the layer."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.lending import frozen
from ib_explain.methods import NotApplicable
from ib_explain.methods.iba import iba_layer
from ib_explain.reference import reference_statistics
from ib_explain.sites import resolve_site


class Net(nn.Module):
    """Two convolutions to the site, whose first channel only strong images wake, and a nonlinear tail."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
        self.site = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.fc = nn.Linear(32, 5)
        with torch.no_grad():
            self.site[0].weight[0] = 1
            self.site[0].bias[0] = -18

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tail(self.site(self.stem(x)))) * 8


def images(count: int, seed: int, size: int = 24) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def published(net: Net, x: Tensor, target: int, reference: Tensor, copies: int, seed: int) -> Tensor:
    """One image, step by step: estimation, ten forward passes, the tenth one's capacity."""
    with torch.no_grad():
        stored = net.site(net.stem(reference))
        feature = net.site(net.stem(x[None]))
    mean, std = stored.mean(dim=0), stored.std(dim=0, unbiased=True).clamp_min(0.01)
    active = ((stored != 0).sum(dim=0) / len(stored)) > 0.01
    alpha = torch.full_like(feature, 5.0).requires_grad_()
    adam = torch.optim.Adam([alpha], lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    grid = torch.tensor([[math.exp(-(i * i + j * j) / 2) for j in range(-2, 3)] for i in range(-2, 3)])
    kernel = (grid / grid.sum())[None, None].repeat(feature.shape[1], 1, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        adam.zero_grad()
        tiled = feature.expand(copies, -1, -1, -1)
        gate = F.conv2d(F.pad(alpha.sigmoid(), (2, 2, 2, 2), mode="reflect"), kernel, groups=feature.shape[1])
        noise = torch.randn(copies, *feature.shape[1:], generator=generator)
        mixed = active * (gate * tiled + (1 - gate) * (mean + std * noise))
        entropy = -net.fc(net.tail(mixed)).mul(8).log_softmax(dim=1)[:, target].mean()
        r = (tiled - mean) / std
        capacity = active * (0.5 * (gate**2 * r**2 + (1 - gate) ** 2 - 1) - torch.log(1 - gate))
        (entropy + 10 * capacity.mean()).backward()
        adam.step()
    bits = capacity.detach().mean(dim=0).sum(dim=0) / math.log(2) * (36 / 576)
    return F.interpolate(bits[None, None], size=(24, 24), mode="bilinear", align_corners=False)[0]


def test_against_the_published_procedure() -> None:
    net, x, reference = Net().eval(), 2 * images(2, 0), images(40, 1)
    assert net.site(net.stem(x))[:, 0].amax() > 1
    assert net.site(net.stem(reference))[:, 0].amax() == 0  # so it must stay closed
    heat = ibx.attribute(
        net, x, method="iba", layer="site", target=[1, 4], reference=reference, copies=4, seed=11, batch_size=8
    )
    expected = torch.stack([published(net, image, t, reference, 4, 11) for image, t in zip(x, (1, 4), strict=True)])
    torch.testing.assert_close(heat, expected, rtol=2e-3, atol=1e-3 * float(expected.max()))
    assert heat.min() >= 0


def test_statistics_per_element() -> None:
    net, reference = Net().eval(), images(9, 1)
    with frozen(net):
        site = resolve_site(net, "site", (3, 24, 24))
        known = reference_statistics(net, site, reference, per_element=True, rows=4)
        with torch.no_grad():
            stored = net.site(net.stem(reference))
    torch.testing.assert_close(known.moments.mean[0], stored.mean(dim=0))
    torch.testing.assert_close(known.std[0], stored.std(dim=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(known.active[0], (stored != 0).float().mean(dim=0))
    assert known.active[0, 0].sum() == 0


def test_statistics_are_remembered_until_something_changes() -> None:
    net, reference = Net().eval(), images(9, 1)
    runs: list[int] = []
    net.stem.register_forward_hook(lambda _m, _i, output: runs.append(len(output)))
    site = resolve_site(net, "site", (3, 24, 24))

    def ask(given: Tensor | None) -> int:
        runs.clear()
        with frozen(net):
            reference_statistics(net, site, given, per_element=True)
        return sum(runs)

    # One image each time, which tells whether the others would be the same.
    assert [ask(reference), ask(reference), ask(reference.clone()), ask(None), ask(None)] == [10, 1, 10, 33, 1]
    with torch.no_grad():
        net.stem[0].weight.mul_(2)
    assert ask(None) == 33


@pytest.mark.parametrize(
    ("method", "options"), [("ib", {"steps": 1}), ("iba", {"steps": 1}), ("activation_energy", {})]
)
def test_statistics_of_noise_cost_a_host_32_images_once(
    method: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = Net().eval(), images(6, 0)
    ibx.attribute(net, x[:1], method=method, layer="site", **options)
    stem: list[int] = []
    handle = net.stem[0].register_forward_hook(lambda _m, _i, output: stem.append(len(output)))
    ibx.attribute(net, x[:1], method=method, layer="site", **options)  # with this hook features may be others
    stem.clear()
    monkeypatch.setattr("ib_explain.reference.probe_images", None)  # nor are they drawn again
    ibx.attribute(net, x, method=method, layer="site", batch_size=2, **options)
    handle.remove()
    assert max(stem) == 2


def test_reference_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reference must hold images of size \(3, 24, 24\), got \(3, 16, 16\)"):
        ibx.attribute(Net(), images(1, 0), method="iba", layer="site", reference=images(2, 0, 16))


def test_grid_too_small_for_the_kernel() -> None:
    net = Net()
    net.tail = nn.Sequential(nn.AdaptiveAvgPool2d((2, 5)), nn.Flatten(), nn.Linear(60, 32))
    with pytest.raises(NotApplicable, match=r"needs a 3x3 grid, 'tail.0' has \(2, 5\)"):
        ibx.attribute(net, torch.randn(1, 3, 20, 50), method="iba", layer="tail.0")


def test_default_layer_has_stride_eight_or_is_the_bottlenecks_own() -> None:
    assert iba_layer(timm.create_model("test_resnet").eval(), (3, 96, 96)) == "layer2"
    vit = timm.create_model("test_vit").eval()
    assert iba_layer(vit, (3, 64, 64)) == ibx.default_layer(vit, (3, 64, 64))


@pytest.mark.parametrize("rows", [2, 4])
def test_passes_of_any_size_price_the_same(rows):
    net, x, reference = Net().eval(), 2 * images(2, 0), images(40, 1)
    settings = {"method": "iba", "layer": "site", "target": [1, 4], "reference": reference, "copies": 4, "seed": 11}
    whole, parts = (ibx.attribute(net, x, batch_size=n, beta=0.3, steps=6, **settings) for n in (8, rows))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3 * float(whole.max()))


def test_reference_images_that_were_written_to_are_looked_at_again():
    host, reference = Net().eval(), images(8, 1)
    with frozen(host):
        site = resolve_site(host, "site", tuple(reference.shape[1:]))
        before = reference_statistics(host, site, reference, per_element=False)
        assert reference_statistics(host, site, reference, per_element=False) is before
        reference[4:] *= 3
        after = reference_statistics(host, site, reference, per_element=False)
    assert not torch.allclose(after.std, before.std)

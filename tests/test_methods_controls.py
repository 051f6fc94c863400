"""Controls: closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.metrics.ground_truth import centred_gaussian


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.site(F.avg_pool2d(x, 4)).mean(dim=(2, 3))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def test_random_belongs_to_the_image_and_the_seed() -> None:
    x = images(3)
    heat = ibx.attribute(Host(), x, method="random")
    assert torch.equal(ibx.attribute(Host(), x.flip(0), method="random").flip(0), heat)
    assert not torch.equal(heat[0], heat[1])
    assert not torch.equal(ibx.attribute(Host(), x, method="random", seed=1), heat)
    assert heat.min() >= 0
    assert heat.max() < 1
    assert abs(float(heat.mean()) - 0.5) < 0.05


def test_constant() -> None:
    assert torch.equal(ibx.attribute(Host(), images(), method="constant"), torch.ones(2, 1, 16, 24))


def test_center_gaussian_is_the_centre_prior() -> None:
    heat = ibx.attribute(Host(), images(), method="center_gaussian")
    torch.testing.assert_close(heat[:1] / heat[:1].sum(), centred_gaussian((16, 24)))
    with pytest.raises(ValueError, match=r"sigma \(a share of each side\) must be a finite number > 0, got"):
        ibx.attribute(Host(), images(), method="center_gaussian", sigma=0)


def test_edges_of_a_ramp_and_a_step() -> None:
    ramp = torch.arange(24.0).expand(1, 3, 16, 24) * 2
    heat = ibx.attribute(Host(), ramp, method="edges")
    torch.testing.assert_close(heat[..., 1:-1], torch.full((1, 1, 16, 22), 2.0))
    step = torch.zeros(1, 3, 16, 24)
    step[:, :, 8:] = 1
    heat = ibx.attribute(Host(), step, method="edges")
    torch.testing.assert_close(heat[0, 0, :, 5], torch.tensor([0.0] * 7 + [0.5, 0.5] + [0.0] * 7))


def test_activation_energy() -> None:
    x, reference = images(), images(7) * 3 + 1
    heat = ibx.attribute(Host(), x, method="activation_energy", layer="site", reference=reference)
    cells = F.avg_pool2d(reference, 4).transpose(0, 1).flatten(1)
    r = (F.avg_pool2d(x, 4) - cells.mean(dim=1)[:, None, None]) / cells.std(dim=1)[:, None, None]
    expected = F.interpolate(r.square().sum(dim=1, keepdim=True), size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["random", "constant", "center_gaussian", "edges"])
def test_controls_of_the_input_take_no_layer(name: str) -> None:
    with pytest.raises(ValueError, match=f"method '{name}' takes no layer"):
        ibx.attribute(Host(), images(), method=name, layer="site")

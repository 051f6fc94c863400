"""BR-NPA: a worked example, the loop written out, degenerate features; its control."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.methods import br_npa_ranked_maps
from ib_explain.methods.br_npa import BRNPA, br_npa_maps, br_npa_parts

# C = 2 on a 2x2 grid, row-major A = (4, 0), B = (0, 3), C = (0.6, 0.8), D = (2, 0).
EXAMPLE = torch.tensor([[[[4.0, 0.0], [0.6, 2.0]], [[0.0, 3.0], [0.8, 0.0]]]])
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


class Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.site(nn.functional.avg_pool2d(x, 4)).mean(dim=(2, 3))


def test_worked_example() -> None:
    parts = br_npa_parts(EXAMPLE, 3)
    expected = [[0.384615, 0, 0.230769, 0.384615], [0, 0.555556, 0.444444, 0], [0.2, 0.266667, 0.333333, 0.2]]
    torch.testing.assert_close(parts.attention[0].flatten(1), torch.tensor(expected), **TOLERANCE)
    assert parts.seeds.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(parts.residuals, torch.tensor([[4.0, 3.0, 0.08]]), **TOLERANCE)
    vectors = parts.attention[0].flatten(1) @ EXAMPLE[0].flatten(1).T
    torch.testing.assert_close(
        vectors, torch.tensor([[2.446154, 0.184615], [0.266667, 2.022222], [1.4, 1.066667]]), **TOLERANCE
    )
    norms = torch.tensor([4.0, 3.0, 1.0, 2.0])
    torch.testing.assert_close(br_npa_maps(EXAMPLE)[0].flatten(1), torch.tensor(expected) * norms, **TOLERANCE)


def test_against_the_loop_written_out() -> None:
    features = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0)).relu()
    attention = br_npa_parts(features, 4).attention
    for image in range(3):
        vectors = [features[image, :, y, x] for y in range(4) for x in range(5)]
        norms = [float(v.norm()) + 1e-5 * float(features[image].max()) for v in vectors]
        left = list(norms)
        for rank in range(4):
            seed = left.index(max(left))
            cosine = [float(v @ vectors[seed]) / (n * norms[seed]) for v, n in zip(vectors, norms, strict=True)]
            expected = torch.tensor(cosine) / sum(cosine)
            torch.testing.assert_close(attention[image, rank].flatten(), expected, rtol=1e-4, atol=1e-6)
            left = [a * (1 - s) for a, s in zip(left, cosine, strict=True)]


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-4, 1e4, 1e20])
def test_scaled_features_give_scaled_maps(scale: float) -> None:
    """Also those of an untrained host, or of one whose layer was rescaled."""
    one, other = br_npa_parts(EXAMPLE, 3), br_npa_parts(EXAMPLE * scale, 3)
    torch.testing.assert_close(other.attention, one.attention)
    torch.testing.assert_close(other.norms / scale, one.norms)
    torch.testing.assert_close(other.residuals / scale, one.residuals, rtol=1e-4, atol=1e-6)


def test_degenerate_features_stay_finite() -> None:
    zero = br_npa_parts(torch.zeros(1, 3, 2, 2), 3)
    assert zero.attention.abs().sum() == zero.norms.sum() == zero.residuals.sum() == 0
    parallel = br_npa_parts(torch.tensor([1.0, 2.0])[None, :, None, None] * torch.arange(1.0, 5).view(1, 1, 2, 2), 3)
    assert parallel.attention[0, 0].sum() == pytest.approx(1)
    assert parallel.attention[0, 1:].abs().sum() == 0  # nothing but rounding is left: no further seed
    opposite = br_npa_parts(torch.tensor([[[[2.0, -1.0]]]]), 2).attention
    torch.testing.assert_close(opposite[0, :, 0], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_ties_go_to_the_first_position() -> None:
    assert br_npa_parts(torch.ones(1, 3, 2, 2), 1).seeds.tolist() == [[0]]


@pytest.mark.parametrize("combine", ["first", "share", "mean"])
def test_combined_map(combine: str) -> None:
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    heat = ibx.attribute(Grid(), x, method="br_npa", layer="site", combine=combine)
    features = nn.functional.avg_pool2d(x, 4)
    ranked, left = br_npa_maps(features), br_npa_parts(features).residuals
    expected = {
        "first": ranked[:, :1],
        "share": sum(ranked[:, k : k + 1] * (left[:, k] / left.sum(dim=1)).view(2, 1, 1, 1) for k in range(3)),
        "mean": sum(ranked[:, k : k + 1] / ranked[:, k : k + 1].amax(dim=(2, 3), keepdim=True) for k in range(3)) / 3,
    }[combine]
    fine = nn.functional.interpolate(expected, size=(12, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(heat, fine, rtol=1e-4, atol=1e-6)


def test_any_layout() -> None:
    host = timm.create_model("test_vit", num_classes=3).eval()
    heat = ibx.attribute(host, torch.randn(2, 3, 64, 64), method="br_npa", layer="blocks.1")
    assert heat.shape == (2, 1, 64, 64)
    assert heat.isfinite().all()
    assert heat.min() >= 0


def test_activation_map_is_the_norm() -> None:
    x = torch.randn(2, 3, 12, 12)
    heat = ibx.attribute(Grid(), x, method="am", layer="site")
    norms = nn.functional.avg_pool2d(x, 4).norm(dim=1)
    torch.testing.assert_close(heat[:, 0, ::11, ::11], norms[:, ::2, ::2])  # corners: the cells' own values


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown combine 'sum'"):
        BRNPA(combine="sum")
    with pytest.raises(ValueError, match="maps must be an integer >= 1, got 0"):
        BRNPA(maps=0)


def test_the_ranked_maps_of_a_host_are_those_that_are_joined() -> None:
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    ranked = br_npa_ranked_maps(Grid(), x, layer="site", maps=2)
    assert ranked.shape == (2, 2, 12, 12) and ranked.dtype == torch.float32 and (ranked >= 0).all()
    first = ibx.attribute(Grid(), x, method="br_npa", layer="site", combine="first")
    torch.testing.assert_close(ranked[:, :1], first)
    with pytest.raises(ValueError, match="no layer 'sight'; did you mean 'site'"):
        br_npa_ranked_maps(Grid(), x, layer="sight")

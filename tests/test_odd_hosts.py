"""Hosts that do what few do: keep tensors, switch autograd off, checkpoint themselves, return several tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ib_explain as ibx
from ib_explain.guard import HostChanged
from ib_explain.hooks import LayerError
from ib_explain.ib import IBAttention
from ib_explain.methods import NotApplicable
from ib_explain.objective import location_price
from tests.states import assert_same, state


class Keeper(nn.Module):
    """Keeps its features in a dict and a running value in a buffer that it makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Linear(8, 5)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["last"] = x = self.relu(self.stem(x))
        return self.head(x.mean((2, 3)))


class Probe(nn.Module):
    """A linear probe's usual form: the trunk runs without autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.mixer, self.head = nn.Conv2d(16, 16, 3, 1, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.trunk(x)
        return self.head(self.mixer(x).relu().mean((2, 3)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.b, self.head = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.b, self.a(x), use_reentrant=True).mean((2, 3)))


class Two(nn.Module):
    """One layer returns two grids of different fineness."""

    class Split(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, F.avg_pool2d(x, 2)]

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split, self.head = nn.Conv2d(3, 8, 3, 2, 1), Two.Split(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.split(self.stem(x).relu())
        return self.head(torch.cat([fine.square().mean((2, 3)), coarse.square().mean((2, 3))], dim=1))


class WithArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.head((self.stem(x).relu() * gain[:, :, None, None]).mean((2, 3)))


def made(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["saliency", "deep_lift", "integrated_gradients", "occlusion"])
def test_a_host_that_keeps_tensors_comes_back_whole(method: str, x: Tensor) -> None:
    host = made(Keeper)
    host(x)
    before = state(host)
    assert ibx.attribute(host, x[:2], method=method).isfinite().all()
    assert_same(before, state(host))
    assert host.relu.inplace and not any("forward" in module.__dict__ for module in host.modules())


def test_gradients_of_a_host_whose_trunk_runs_without_autograd(x: Tensor) -> None:
    host = made(Probe)
    features = host.trunk(x).detach().requires_grad_()
    logits = host.head(host.mixer(features).relu().mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu().detach()
    heat = ibx.attribute(host, x, method="grad_cam", layer="trunk", target=2)
    assert expected.any()
    torch.testing.assert_close(heat, F.interpolate(expected, size=(32, 32), mode="bilinear", align_corners=False))
    ib = ibx.IBAttention(host, "trunk").fit([x], steps=2, show_progress=False)
    assert not torch.equal(ib.attribute(x, target=0), ib.attribute(x, target=1))


@pytest.mark.parametrize(
    "method",
    ["saliency", "input_x_gradient", "integrated_gradients", "smooth_grad", "gradient_shap", "deep_lift", "lrp"],
)
def test_gradients_of_images_that_a_host_does_not_let_through(method: str, x: Tensor) -> None:
    host = made(Probe)
    with pytest.raises(NotApplicable, match="no gradient of the logits reaches the images of this Probe: its forward"):
        ibx.attribute(host, x[:2], method=method)
    assert ibx.attribute(host, x[:2], method="feature_ablation", tile=16).any()


def test_a_module_that_leads_nowhere_has_no_relevance(x: Tensor) -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.loose = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 3, 2, 1)
            self.pool, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            self.loose(x)
            return self.head(self.flat(self.pool(self.stem(x))))

    with pytest.raises(NotApplicable, match="1 modules of this Loose lead nowhere"):
        ibx.attribute(made(Loose), x[:2], method="lrp")


@pytest.mark.parametrize("method", ["ib", "eigen_cam", "br_npa"])
def test_a_host_whose_checkpoints_let_no_gradient_through(method: str, x: Tensor) -> None:
    host = made(Checkpointed)
    with pytest.raises(NotApplicable, match=r"no layer of this Checkpointed .*; name a layer"):
        ibx.attribute(host, x[:2], method=method)
    if method != "ib":
        assert ibx.attribute(host, x[:2], method=method, layer="b").isfinite().all()


def test_prices_of_a_fine_grid_with_one_speck_are_finite() -> None:
    evidence = torch.zeros(2, 1, 120, 120)
    evidence[0, 0, 5, 50], evidence[1, 0, 5, 50] = 1.0, -1.0  # 120 standard deviations from all others
    seen: Any = SimpleNamespace(features=torch.zeros(2, 4, 120, 120), deep=[], deep_gradients=[], gradient=None)
    price = location_price(seen, masked=evidence)
    assert price.isfinite().all() and price.mean((1, 2, 3)).tolist() == pytest.approx([1, 1])


def test_several_grids_are_restricted_at_another_size(x: Tensor) -> None:
    host = made(Two)
    ib = ibx.IBAttention(host, "split").fit([x], steps=2, show_progress=False)
    wide = torch.randn(2, 3, 32, 48)
    with ib.restrict(0.0) as restricted:
        closed = restricted(wide)
    assert torch.allclose(closed[0], closed[1], atol=1e-6)
    assert ib.attribute(wide, refine=1).shape == (2, 1, 32, 48)


def test_captum_objects_get_the_hosts_further_arguments(x: Tensor) -> None:
    host, gain = made(WithArguments), torch.rand(4, 8)
    for target in (1, None):
        heat = ibx.attribute(host, x, method=Saliency(host), target=target, additional_forward_args=gain, batch_size=3)
        wanted = host(x, gain).argmax(1) if target is None else target
        expected = Saliency(host).attribute(x.clone(), target=wanted, additional_forward_args=gain)
        torch.testing.assert_close(heat, expected.sum(1, keepdim=True))


def test_a_wrapper_takes_the_options_of_what_it_wraps(x: Tensor) -> None:
    host = made(Keeper)
    tunnel = NoiseTunnel(IntegratedGradients(host))
    heat = ibx.attribute(host, x[:2], method=tunnel, nt_samples=2, n_steps=3, stdevs=0.1)
    assert heat.shape == (2, 1, 32, 32)


def test_weights_written_through_data_are_told(x: Tensor) -> None:
    host = made(Keeper)

    def spoils(model: Any, x: Tensor, target: Tensor) -> Tensor:
        model.head.weight.data.mul_(2)
        return x.mean(1)

    with pytest.raises(HostChanged, match="changed the model's weights"):
        ibx.attribute(host, x, method=spoils)


def test_images_without_values_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="on the meta device: it has a shape and no values"):
        ibx.attribute(made(Keeper).to("meta"), x.to("meta"))


class Switched(nn.Module):
    """A flag says which of two layers runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 6, 3, stride=2, padding=1) for _ in "ab")
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor, first: bool) -> Tensor:
        return self.head((self.a if first else self.b)(x).tanh().mean(dim=(2, 3)))


def test_facts_of_one_flag_are_not_those_of_another(x: Tensor) -> None:
    host = made(Switched)
    for first, layer, other in ((True, "a", "b"), (False, "b", "a")):
        assert IBAttention(host, layer).attribute(x, additional_forward_args=first).isfinite().all()
        with pytest.raises(LayerError, match=f"'{other}' does not run in one forward pass"):
            IBAttention(host, other).attribute(x, additional_forward_args=first)


def test_a_weight_that_is_nan_and_unused_is_no_changed_weight(x: Tensor) -> None:
    host = made(Keeper)
    host.register_parameter("spare", nn.Parameter(torch.full((2,), torch.nan)))
    assert ibx.attribute(host, x, method=lambda _model, images, _target: images.mean(1)).isfinite().all()

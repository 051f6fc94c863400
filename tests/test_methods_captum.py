"""Captum's methods: equal to Captum where its draws can be fixed, right on awkward hosts, refused where it is wrong."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from captum import attr
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.lending import frozen
from ib_explain.methods import Call, NotApplicable
from ib_explain.methods.captum_host import for_captum, inspect
from ib_explain.methods.captum_methods import _noise
from tests.models import tiny

TARGET = torch.tensor([2, 4])


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).eval()


class Chain(nn.Module):
    """A chain of modules with in-place ReLUs, one of them used twice, and a dropout."""

    def __init__(self, *, inplace: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, stride=2)
        self.act = nn.ReLU(inplace=inplace)
        self.second = nn.Conv2d(6, 8, 3)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(32, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(self.act(self.first(x))))
        return self.fc(self.flat(self.drop(self.pool(x))))


class Twin(nn.Module):
    """The same function without anything awkward, for Captum by itself."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.body = nn.ModuleList([chain.first, nn.ReLU(), chain.second, nn.ReLU(), chain.pool, chain.fc])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for module in self.body[:-1]:
            x = module(x)
        return self.body[-1](x.flatten(1))


def captum_says(name: str, host: nn.Module, x: Tensor) -> Tensor:
    if name == "saliency":
        return attr.Saliency(host).attribute(x, TARGET).amax(dim=1, keepdim=True)
    if name == "input_x_gradient":
        return attr.InputXGradient(host).attribute(x, TARGET).sum(dim=1, keepdim=True)
    if name == "integrated_gradients":
        return attr.IntegratedGradients(host).attribute(x, target=TARGET, n_steps=9).sum(dim=1, keepdim=True)
    if name == "deep_lift":
        return attr.DeepLift(host).attribute(x, target=TARGET).sum(dim=1, keepdim=True)
    if name == "occlusion":
        maps = attr.Occlusion(host).attribute(x, (3, 8, 8), (3, 4, 4), target=TARGET)
        return maps.mean(dim=1, keepdim=True)
    tiles = (torch.arange(32) // 8)[:, None] * 4 + torch.arange(32) // 8
    return attr.FeatureAblation(host).attribute(x, target=TARGET, feature_mask=tiles[None, None]).mean(1, keepdim=True)


OPTIONS = {
    "saliency": {},
    "input_x_gradient": {},
    "integrated_gradients": {"steps": 9},
    "deep_lift": {},
    "occlusion": {"window": 8, "stride": 4},
    "feature_ablation": {"tile": 8},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_captum(name: str) -> None:
    """On a host that Captum can take as it is; ours meanwhile gets the awkward one of the same function."""
    chain = Chain()
    ours = ibx.attribute(chain, images(), method=name, target=TARGET, **OPTIONS[name])
    theirs = captum_says(name, Twin(chain), images().requires_grad_())
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_guided_grad_cam_equals_captum() -> None:
    host, x = resnet(), images(size=64)
    ours = ibx.attribute(host, x, method="guided_grad_cam", target=TARGET, layer="layer3")
    for module in host.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    theirs = attr.GuidedGradCam(host, host.layer3).attribute(x, TARGET, interpolate_mode="bilinear")
    torch.testing.assert_close(ours, theirs.sum(dim=1, keepdim=True).detach(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("method", ["smooth_grad", "gradient_shap"])
def test_the_draws_are_those_of_the_seed_whatever_the_precision(method):
    host, x = tiny(), images(2)
    single = ibx.attribute(host, x, method=method)
    torch.testing.assert_close(ibx.attribute(host.double(), x.double(), method=method), single, rtol=1e-3, atol=1e-5)


def test_smooth_grad_is_the_mean_gradient_over_the_same_noise() -> None:
    chain, x = Chain(), images()
    ours = ibx.attribute(chain, x, method="smooth_grad", target=TARGET, samples=4, noise=0.2, seed=3)
    total = torch.zeros_like(x)
    for draw in torch.cat(list(_noise(Call(chain, x, TARGET, None, 3, None), 4))):
        noisy = torch.stack([image + draw * 0.2 * (image.max() - image.min()) for image in x]).requires_grad_()
        total += torch.autograd.grad(chain(noisy).gather(1, TARGET[:, None]).sum(), noisy)[0]
    torch.testing.assert_close(ours, (total / 4).abs().sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradient_shap_equals_captum_at_the_same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x = Chain(), images()
    where = torch.rand(6, generator=torch.Generator().manual_seed(3))
    ours = ibx.attribute(chain, x, method="gradient_shap", target=TARGET, samples=6, noise=0, seed=3)
    monkeypatch.setattr(np.random, "uniform", lambda _low, _high, size: where.double().repeat(size // 6).numpy())
    theirs = attr.GradientShap(Twin(chain)).attribute(x, torch.zeros(1, 3, 32, 32), n_samples=6, target=TARGET)
    torch.testing.assert_close(ours, theirs.sum(dim=1, keepdim=True).detach(), rtol=1e-4, atol=1e-6)


def test_gradient_shap_draws_from_the_baselines() -> None:
    with pytest.raises(ValueError, match=r"baselines must hold images of size \(3, 32, 32\), got \(3, 8, 8\)"):
        ibx.attribute(Chain(), images(), method="gradient_shap", baselines=torch.zeros(1, 3, 8, 8))
    x = images()
    heat = ibx.attribute(Chain(), x, method="gradient_shap", baselines=x[:1], noise=0, samples=3)
    assert heat[0].abs().max() == 0  # the image is its own baseline
    assert heat[1].abs().max() > 0


@pytest.mark.parametrize("name", ["integrated_gradients", "deep_lift"])
def test_completeness(name: str) -> None:
    chain, x = Chain(), images()
    heat = ibx.attribute(chain, x, method=name, target=TARGET)
    change = (chain(x) - chain(torch.zeros_like(x))).gather(1, TARGET[:, None])[:, 0]
    torch.testing.assert_close(heat.sum(dim=(1, 2, 3)), change.detach(), rtol=2e-2, atol=2e-3)


def test_lrp_by_hand() -> None:
    """Epsilon rule written out layer by layer: relevance goes to inputs in proportion to their share."""
    chain, x = Chain(), images()
    layers = [chain.first, nn.ReLU(), chain.second, nn.ReLU(), chain.pool, nn.Flatten(), chain.fc]
    inputs = [x]
    for layer in layers:
        inputs.append(layer(inputs[-1]).detach())
    relevance = torch.zeros(2, 5).scatter(1, TARGET[:, None], inputs[-1].gather(1, TARGET[:, None]))
    for layer, before in zip(layers[::-1], inputs[-2::-1], strict=True):
        if isinstance(layer, nn.ReLU):
            continue
        if isinstance(layer, nn.Flatten):
            relevance = relevance.reshape(before.shape)
            continue
        before = before.clone().requires_grad_()
        after = layer(before)
        ratio = relevance / (after + torch.where(after >= 0, 1e-9, -1e-9)).detach()
        relevance = before.detach() * torch.autograd.grad((after * ratio).sum(), before)[0]
    ours = ibx.attribute(chain, x, method="lrp", target=TARGET)
    torch.testing.assert_close(ours, relevance.sum(dim=1, keepdim=True), rtol=1e-3, atol=1e-6)


def test_lrp_of_a_host_that_pools_twice_by_one_module() -> None:
    torch.manual_seed(0)
    pool, convolutions = nn.MaxPool2d(2), (nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3))
    end = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    shared = nn.Sequential(convolutions[0], nn.ReLU(), pool, convolutions[1], nn.ReLU(), pool, *end).eval()
    own = nn.Sequential(convolutions[0], nn.ReLU(), pool, convolutions[1], nn.ReLU(), nn.MaxPool2d(2), *end).eval()
    maps = [ibx.attribute(host, images(), method="lrp", target=TARGET) for host in (shared, own)]
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "name", "reason"),
    [
        ("guided_grad_cam", "test_vit", "needs every ReLU of the host to be an nn.ReLU, 0 of 0"),
        ("deep_lift", "test_vit", "no rule for the operation"),
        ("deep_lift", "test_mambaout", "no rule for the operation"),
        ("lrp", "test_resnet", "joins two branches of this ResNet|has no rule"),
        ("lrp", "test_vit", "Captum's LRP has no rule for the"),
    ],
)
def test_refused_where_it_would_be_wrong(method: str, name: str, reason: str) -> None:
    with pytest.raises(NotApplicable, match=reason):
        ibx.attribute(timm.create_model(name, num_classes=5), images(size=64), method=method)


def test_functional_relu_is_refused_by_rules_only() -> None:
    class Functional(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flat(self.pool(torch.relu(self.second(self.act(self.first(x)))))))

    with pytest.raises(NotApplicable, match=r"every Relu of this Functional to be an nn.ReLU, 1 of 2 are"):
        ibx.attribute(Functional(), images(), method="deep_lift")
    assert ibx.attribute(Functional(), images(), method="saliency").abs().max() > 0


def test_product_of_two_features_is_refused() -> None:
    class Gated(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.first(x))
            return self.fc(self.flat(self.pool(self.second(x * x.mean(dim=(2, 3), keepdim=True)))))

    with pytest.raises(NotApplicable, match="no rule for the Mul of two features"):
        ibx.attribute(Gated(), images(), method="deep_lift")


def test_host_is_put_back_after_a_failure_inside_captum() -> None:
    chain = Chain()
    kept = {name: dict(module.__dict__) for name, module in chain.named_modules()}
    with frozen(chain), pytest.raises(KeyError), for_captum(chain, inspect(chain, images()).calls) as host:
        assert not isinstance(host.act, nn.ReLU)  # a copy for each of its two calls
        assert not any(getattr(m, "inplace", False) for m in host.modules())
        host.first.register_forward_hook(lambda *_: None)
        host.second.rule = "left behind"
        raise KeyError
    assert isinstance(chain.act, nn.ReLU)
    assert chain.act.inplace
    for name, module in chain.named_modules():
        assert module.__dict__.keys() == kept[name].keys()
        assert not module._forward_hooks


def test_structure_is_read_from_the_graph() -> None:
    with frozen(Chain()) as chain:
        structure = inspect(chain, images())
    assert structure.calls[chain.act] == 2
    assert structure.nodes["Relu"] == 2
    assert structure.nodes["Convolution"] == 2
    assert not structure.joins


def test_seeds_share_no_draws():
    x = torch.zeros(1, 3, 4, 4)
    calls = [SimpleNamespace(copies_per_pass=4, seed=seed, x=x, input_size=(3, 4, 4)) for seed in (0, 1)]
    draws = torch.cat([part for call in calls for part in _noise(call, 4)])
    assert len({draw.numpy().tobytes() for draw in draws}) == 8

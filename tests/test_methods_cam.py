"""The CAM family: against pytorch-grad-cam, Captum and closed forms; the default layer; the price."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.lending import frozen
from ib_explain.methods import Call, NotApplicable
from ib_explain.methods.cam import cam_layer, glance
from ib_explain.methods.eigen_cam import eigen_cam_map
from ib_explain.methods.grad_cam import grad_cam_map
from ib_explain.methods.grad_cam_pp import grad_cam_pp_map
from ib_explain.methods.hires_cam import hires_cam_map
from ib_explain.methods.layer_cam import layer_cam_map
from ib_explain.methods.score_cam import score_cam_weights

SIZE = 96
LAYERS = {"test_resnet": "layer3", "test_vit": "blocks.3", "test_mambaout": "stages"}


def host_of(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **options).eval()


def images(count: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def call_for(host: nn.Module, layer: str | None, target: object = None, x: Tensor | None = None) -> Call:
    return Call(host, images() if x is None else x, target, layer, 0, None)  # type: ignore[arg-type]


class Sums(nn.Module):
    """Logit k is sum over positions of row k of the weight times the features: gradient and CAM known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,kc->bk", self.features(F.avg_pool2d(x, 8)), self.weight)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("test_resnet", "layer4"), ("test_vit", "blocks.4"), ("test_mambaout", "stages"), ("test_efficientnet", "bn2")],
)
def test_default_layer_is_the_deepest_grid_with_a_gradient(name: str, expected: str) -> None:
    assert cam_layer(host_of(name), (3, SIZE, SIZE)) == expected


def test_default_layer_of_a_pooling_transformer_is_behind_its_last_block() -> None:
    host = host_of("test_vit", global_pool="avg", class_token=False)
    assert cam_layer(host, (3, SIZE, SIZE)) in ("blocks", "norm")


def test_default_layer_is_before_the_last_pooling() -> None:
    host = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 144, 5)
    )
    assert cam_layer(host, (3, SIZE, SIZE)) == "1"


def test_no_grid_is_not_applicable() -> None:
    host = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(NotApplicable, match="no layer of this Sequential has a spatial grid"):
        ibx.attribute(host, images(1, 16), method="grad_cam")


def test_layer_that_the_logits_do_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="does not reach the grid of layer 'blocks.5'; name an earlier layer"):
        ibx.attribute(host_of("test_vit"), images(), method="grad_cam", layer="blocks.5")


def test_closed_form() -> None:
    x = images()
    heat = ibx.attribute(Sums(), x, method="grad_cam", target=[0, 1], layer="features", relu=False)
    cells = F.avg_pool2d(x, 8)
    expected = torch.stack([cells[0, 0] - 2 * cells[0, 1] + 0.5 * cells[0, 2], cells[1, 1] - cells[1, 2]])
    torch.testing.assert_close(
        heat, F.interpolate(expected[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    )
    clipped = ibx.attribute(Sums(), x, method="grad_cam", target=[0, 1], layer="features")
    torch.testing.assert_close(
        clipped, F.interpolate(expected[:, None].relu(), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_is_that_of_the_target_logit(name: str) -> None:
    """Against autograd through the whole host, in every layout."""
    host, x, layer = host_of(name), images(), LAYERS[name]
    kept: dict[str, Tensor] = {}
    handle = host.get_submodule(layer).register_forward_hook(lambda _m, _i, output: kept.update(output=output))
    score = host(x)[torch.arange(2), torch.tensor([3, 5])].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept["output"])
    with frozen(host):
        seen = glance(call_for(host, layer, [3, 5]))

    def grid(t: Tensor) -> Tensor:
        if name == "test_vit":
            return t[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
        return t.permute(0, 3, 1, 2) if name == "test_mambaout" else t

    torch.testing.assert_close(seen.features, grid(kept["output"]).detach())
    torch.testing.assert_close(seen.gradient, grid(gradient), rtol=1e-4, atol=1e-6)


def test_captums_layer_grad_cam() -> None:
    host, x = host_of("test_resnet"), images()
    theirs = LayerGradCam(host, host.layer3).attribute(x, target=2)
    with frozen(host):
        seen = glance(call_for(host, "layer3", 2))
    torch.testing.assert_close(grad_cam_map(seen.features, seen.gradient), theirs.detach(), rtol=1e-4, atol=1e-7)


def test_backward_ends_at_the_layer() -> None:
    """Nothing before the layer records a graph, and no parameter asks for a gradient."""
    host, recorded = host_of("test_resnet"), []
    for module in (host.layer1, host.layer2):
        module.register_forward_hook(lambda _m, _i, output: recorded.append(output.requires_grad))
    ibx.attribute(host, images(), method="grad_cam", layer="layer3")
    assert recorded and not any(recorded[-2:])
    assert all(p.grad is None for p in host.parameters())


def unit_range(maps: Tensor) -> Tensor:
    """pytorch-grad-cam's rule: ReLU, minimum subtracted, divided by the maximum."""
    maps = maps.clamp_min(0)
    maps = maps - maps.amin(dim=(-2, -1), keepdim=True)
    return maps / (1e-7 + maps.amax(dim=(-2, -1), keepdim=True))


def peer(kind: str, name: str, host: nn.Module, x: Tensor, target: list[int]) -> Tensor:
    """The map of pytorch-grad-cam at the grid's resolution, (B, h, w)."""
    import pytorch_grad_cam as gradcam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    reshape = None
    if name == "test_vit":
        reshape = lambda t: t[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)  # noqa: E731
    elif name == "test_mambaout":
        reshape = lambda t: t.permute(0, 3, 1, 2)  # noqa: E731
    with getattr(gradcam, kind)(host, [host.get_submodule(LAYERS[name])], reshape_transform=reshape) as cam:
        cam.get_target_width_height = lambda _x: None  # no resize
        return torch.from_numpy(cam(x, [ClassifierOutputTarget(t) for t in target]))


MAPS = {
    "GradCAM": grad_cam_map,
    "GradCAMPlusPlus": grad_cam_pp_map,
    "HiResCAM": hires_cam_map,
    "LayerCAM": layer_cam_map,
    "EigenCAM": lambda features, _gradient: eigen_cam_map(features),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", MAPS)
def test_against_pytorch_grad_cam(kind: str, name: str) -> None:
    host, x, target = host_of(name), images(), [3, 4]
    head = [m for m in host.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.mul_(1e5)  # their Grad-CAM++ adds 1e-6 to a sum of squared gradients: make it negligible
    theirs = peer(kind, name, host, x, target)
    with frozen(host):
        seen = glance(call_for(host, LAYERS[name], target))
    ours = MAPS[kind](seen.features, seen.gradient)[:, 0]
    if kind == "EigenCAM":  # their sign is whatever the decomposition returned
        flip = (unit_range(-ours) - theirs).abs().amax(dim=(1, 2)) < (unit_range(ours) - theirs).abs().amax(dim=(1, 2))
        ours = torch.where(flip[:, None, None], -ours, ours)
    assert theirs.amax() > 0.99
    torch.testing.assert_close(unit_range(ours), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_score_cam_against_pytorch_grad_cam(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host, x, target = host_of(name), images(), [3, 5]
    # They upsample the masks with aligned corners; the authors' code, like ours, does not.
    monkeypatch.setattr(torch.nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size=size, mode="bilinear"))
    theirs = peer("ScoreCAM", name, host, x, target)
    with frozen(host):
        seen = glance(call_for(host, LAYERS[name], target))
        weights = score_cam_weights(host, x, seen.features, seen.target, 50)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    ours = (weights[:, :, None, None] * seen.features).sum(dim=1)
    torch.testing.assert_close(unit_range(ours), theirs, rtol=0, atol=1e-4)


def test_cam_variants_by_hand() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 1.0]]]])  # two channels on a 1x2 grid
    gradient = torch.tensor([[[[0.5, -1.0]], [[0.0, 2.0]]]])
    torch.testing.assert_close(hires_cam_map(features, gradient), torch.tensor([[[[0.5, 0.0]]]]))
    torch.testing.assert_close(layer_cam_map(features, gradient), torch.tensor([[[[0.5, 2.0]]]]))
    torch.testing.assert_close(grad_cam_map(features, gradient), torch.tensor([[[[-0.25 + 3, -0.5 + 1]]]]))
    first, second = 0.5 / (2 + 3 * 0.5), 2 / (2 + 4 * 2)  # relu(g) / (2 + S g)
    torch.testing.assert_close(
        grad_cam_pp_map(features, gradient), torch.tensor([[[[first + 3 * second, 2 * first + second]]]])
    )


def test_grad_cam_pp_survives_tiny_gradients() -> None:
    """The weight is degree one in a small gradient; g^2 + 1e-6 in the divisor would crush it."""
    features, gradient = torch.rand(1, 4, 3, 3), torch.rand(1, 4, 3, 3) * 1e-6
    expected = (features * (gradient / 2).sum(dim=(2, 3), keepdim=True)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(grad_cam_pp_map(features, gradient), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("channels", [2, 40])
def test_eigen_cam_finds_a_planted_direction(channels: int) -> None:
    pattern = torch.tensor([[0.0, 0.0, 1.0], [0.0, 5.0, 2.0]])
    direction = torch.randn(channels, generator=torch.Generator().manual_seed(0))
    heat = eigen_cam_map(pattern[None, None] * direction[None, :, None, None])
    torch.testing.assert_close(heat[0, 0], (pattern - pattern.mean()) * direction.norm(), rtol=1e-5, atol=1e-5)
    assert torch.equal(eigen_cam_map(torch.ones(1, channels, 2, 3)), torch.zeros(1, 1, 2, 3))


def test_score_cam_closed_form() -> None:
    """Two channels, the logit is the sum of what is seen: weights are a softmax of masked sums."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.site(F.avg_pool2d(x, 4)).sum(dim=(2, 3))[:, :2]

    x = torch.zeros(1, 3, 16, 16)
    x[0, 0, :8, :8], x[0, 1, 8:, 8:] = 1, 2
    with frozen(Split()) as host:
        features = F.avg_pool2d(x, 4)
        weights = score_cam_weights(host, x, features, torch.tensor([0]), 2)
    mask = F.interpolate(features, size=(16, 16), mode="bilinear", align_corners=False)[0]
    seen = (x[0, 0] * mask[0]).sum() / 16, (x[0, 0] * mask[1] / 2).sum() / 16, torch.tensor(0.0)
    torch.testing.assert_close(weights[0], torch.stack(seen).softmax(dim=0), rtol=1e-5, atol=1e-6)


def test_eigen_cam_is_positive_where_features_are_stronger():
    features = torch.tensor([[[[5.0, 5.0], [5.0, 1.0]]]])
    torch.testing.assert_close(eigen_cam_map(features), torch.tensor([[[[1.0, 1.0], [1.0, -3.0]]]]))

"""Hosts that are not timm's: torchvision's classifiers, by default layer and by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from ib_explain import attribute
from ib_explain.ib import IBAttention
from ib_explain.sites import resolve_site
from ib_explain.stripes import probe_images
from tests.states import assert_same, mixed, state

HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], str]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=7), (3, 96, 128), "NCHW"),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=7), (3, 96, 128), "NCHW"),
    "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(num_classes=7), (3, 96, 128), "NCHW"),
    "vit": (
        lambda: VisionTransformer(64, 8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=7),
        (3, 64, 64),
        "NLC, 1 token beside the grid",
    ),
    "swin": (
        lambda: SwinTransformer([2, 2], 24, [1, 2], [1, 2], [4, 4], num_classes=7),
        (3, 64, 96),
        "NHWC",
    ),
}


def build(name: str) -> tuple[nn.Module, tuple[int, int, int], str]:
    make, size, kind = HOSTS[name]
    torch.manual_seed(0)
    model = make().eval()
    for head in (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == 7):
        nn.init.normal_(head.weight, std=0.1)  # ViT's head starts at zero
    return mixed(model), size, kind


@pytest.mark.parametrize("name", HOSTS)
def test_default_layer_map_and_closed_attention(name: str) -> None:
    model, size, kind = build(name)
    before = state(model)
    site = resolve_site(model, None, size)
    assert site.layout.kind == kind
    assert site.layout.verified == "probe"
    assert site.leak < 1e-3
    assert site.reached > 0.5
    x = probe_images(3, size, seed=1)
    heat = attribute(model, x, layer=site.name, steps=3, reference=x)
    assert heat.shape == (3, 1, *size[1:])
    assert torch.isfinite(heat).all()
    assert (heat.flatten(1).std(dim=1) > 0).all()
    ib = IBAttention(model, site.name).fit([x], steps=1, show_progress=False)
    with torch.no_grad(), ib.restrict(attention=0.0) as host:
        closed = host(x)
    torch.testing.assert_close(closed, closed[:1].expand(3, -1), rtol=1e-4, atol=1e-5)
    assert_same(before, state(model))


def test_layers_by_name() -> None:
    model, size, _ = build("resnet18")
    assert resolve_site(model, "layer2.1", size).leak == 0
    assert resolve_site(model, model.layer4, size).grid == (3, 4)
    assert resolve_site(model, "layer3.0.conv1", size).leak > 0.05
    with pytest.raises(RuntimeError, match="layer 'layer1.0.relu' runs 2 times"):
        resolve_site(model, "layer1.0.relu", size)
    with pytest.raises(ValueError, match="layer 'avgpool' has no spatial grid"):
        resolve_site(model, "avgpool", size)


def test_swin_works_channels_last_inside() -> None:
    model, size, _ = build("swin")
    site = resolve_site(model, "features.1", size)
    assert (site.layout.kind, site.grid, site.leak) == ("NHWC", (32, 48), 0)

"""Twelve timm architectures, made small, that cover the layouts; names and shapes of every other one."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import nn

from ib_explain import attribute
from ib_explain.ib import IBAttention
from ib_explain.modules import find_module
from ib_explain.sites import candidate_layers, input_size_of, resolve_site
from ib_explain.stripes import probe_images
from tests.states import assert_same, mixed, state


class Sample(NamedTuple):
    size: tuple[int, int]
    smaller: dict[str, Any]
    layer: str
    kind: str
    grid: tuple[int, int]


SAMPLES = {
    "test_resnet": Sample((96, 128), {}, "layer2", "NCHW", (12, 16)),
    "test_efficientnet": Sample((160, 224), {}, "blocks.3", "NCHW", (10, 14)),
    "test_mambaout": Sample((160, 224), {}, "stages.2", "NHWC", (10, 14)),
    "swin_tiny_patch4_window7_224": Sample(
        (112, 112),
        {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "img_size": 112},
        "layers.1",
        "NHWC",
        (14, 14),
    ),
    "test_vit": Sample((160, 160), {}, "blocks.0", "NLC, 1 token beside the grid", (10, 10)),
    "vit_tiny_patch16_dinov3_qkvb": Sample(
        (128, 128),
        {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 128},
        "norm",
        "NLC, 5 tokens beside the grid",
        (8, 8),
    ),
    "test_vit_relpos": Sample((160, 160), {}, "blocks.7", "NLC", (10, 10)),
    "hiera_tiny_224": Sample(
        (224, 224),
        {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 2, 1)},
        "blocks.3",
        "NLC, permuted",
        (14, 14),
    ),
    "tnt_s_legacy_patch16_224": Sample(
        (96, 96),
        {
            "depth": 3,
            "embed_dim": 48,
            "inner_dim": 8,
            "num_heads_inner": 2,
            "num_heads_outer": 3,
            "img_size": 96,
        },
        "blocks.0",
        "NLC, 1 token beside the grid, tensor 1 of several",
        (6, 6),
    ),
    "pit_ti_224": Sample(
        (224, 224),
        {"base_dims": (8, 8, 8), "depth": (1, 2, 1)},
        "transformers.1",
        "NCHW, tensor 0 of several",
        (14, 14),
    ),
    "crossvit_tiny_240": Sample(
        (240, 240),
        {"embed_dim": (24, 48), "depth": ((1, 2, 0), (1, 2, 0))},
        "blocks.0",
        "NLC, 1 token beside the grid, tensor 0 of several",
        (20, 20),
    ),
    "efficientvim_m1": Sample((128, 160), {}, "stages.0.blocks.0", "NCHW, tensor 0 of several", (8, 10)),
}


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model in mixed modes, with no branch switched off by a scale that starts at zero."""
    sample = SAMPLES[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **sample.smaller).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.abs().max() < 0.02:
                parameter.uniform_(0.3, 0.7, generator=generator)
    return mixed(model), (3, *sample.size)


@pytest.mark.parametrize("name", SAMPLES)
def test_default_layer_map_and_closed_attention(name: str) -> None:
    sample = SAMPLES[name]
    model, size = build(name)
    before = state(model)
    site = resolve_site(model, None, size)
    assert (site.name, site.layout.kind, site.grid) == (sample.layer, sample.kind, sample.grid)
    assert site.layout.verified == "probe"
    assert site.leak < 1e-3
    assert site.reached > 0.5
    x = probe_images(2, size, seed=1)
    heat = attribute(model, x, layer=site.name, steps=2, reference=x)
    assert heat.shape == (2, 1, *size[1:])
    assert torch.isfinite(heat).all()
    assert (heat.flatten(1).std(dim=1) > 0).all()
    ib = IBAttention(model, site.name).fit([x], steps=1, show_progress=False)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in ib.bottleneck.parameters())
    refined = ib.attribute(x, refine=1)  # which takes gradients through all of the model
    assert torch.isfinite(refined).all() and not torch.equal(refined, ib.attribute(x))
    with torch.no_grad(), ib.restrict(attention=0.0) as host:
        closed = host(x)
    torch.testing.assert_close(closed[0], closed[1], rtol=1e-4, atol=1e-5)
    assert_same(before, state(model))


WITHOUT_CLASSIFIER = {
    "deepseek_vit_412m_enc": (169, 5120),
    "gemma4_vit_167m_enc": (256, 768),
    "gemma4_vit_570m_enc": (256, 1152),
    "mobilenetv5_300m_enc": (2048, 16, 16),
    "qwen3_vit_88m_enc": (576, 1024),
    "qwen3_vit_306m_enc": (576, 2048),
    "qwen3_vit_416m_enc": (576, 5120),
}
"""Eyes of language models: their forward returns features, whatever `num_classes` says; no image classifiers."""


@pytest.mark.slow
@pytest.mark.parametrize("module", timm.list_modules())
def test_names_and_shapes_of_every_registered_model(module: str) -> None:
    """On the meta device, without weights: input size, logits for ten classes, layers where a bottleneck could sit."""
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10)
        channels, height, width = input_size_of(model)
        assert channels == 3 and min(height, width) >= 32, name
        shapes: list[tuple[int, ...]] = []
        model.register_forward_hook(lambda _m, _x, output, shapes=shapes: shapes.append(tuple(output.shape)))
        if name in WITHOUT_CLASSIFIER:
            with pytest.raises(ValueError, match=r"model must map \(B, 3, H, W\) to logits \(B, K\)"):
                candidate_layers(model)
            assert shapes == [(2, *WITHOUT_CLASSIFIER[name])], name
            continue
        candidates = candidate_layers(model)
        assert shapes == [(2, 10)], name
        assert candidates and len(set(candidates)) == len(candidates), name
        assert all(find_module(model, candidate) is not model for candidate in candidates), name


@pytest.mark.slow
def test_what_is_no_classifier_is_still_registered() -> None:
    assert set(timm.list_models()) >= WITHOUT_CLASSIFIER.keys()

"""Which layer carries the bottleneck where the user names none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import ib_explain as ibx
from ib_explain.ib import IBAttention
from ib_explain.sites import default_layer, resolve_site, sites
from tests.models import CLASSES, TinyCNN
from tests.paths import SIZE, TwoPaths, make


class TestDefaultLayer:
    """`stem` and `stages.0` have half of the input's side, `stages.1` a quarter, `stages` an eighth."""

    def test_depth_decides_where_all_grids_are_fine(self) -> None:
        """Grids of 112, 56 and 28 cells a side: from 14 on only depth counts, 8/12; the last one is only averaged."""
        assert default_layer(make(TinyCNN), (3, 224, 224)) == "stages.1"
        assert resolve_site(make(TinyCNN), "stages", (3, 224, 224)).pooled
        assert not resolve_site(make(TinyCNN), "stages.1", (3, 224, 224)).pooled

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_the_last_layer_where_positions_still_meet_of_one_grid(self, norm_first: bool) -> None:
        """Behind the last mixing there are channels alone and a mean, with a norm of each position or of the mean."""

        class Mixer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem = nn.Conv2d(3, 8, 4, 4)
                self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
                self.channels, self.norm = nn.Conv2d(8, 8, 1), nn.LayerNorm(8)
                self.fc = nn.Linear(8, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x)
                for block in self.blocks:
                    x = torch.tanh(block(x))
                x = self.channels(x).permute(0, 2, 3, 1)
                return self.fc(self.norm(x).mean(dim=(1, 2)) if norm_first else self.norm(x.mean(dim=(1, 2))))

        found = {site.name: site.pooled for site in sites(make(Mixer), (3, 64, 64))}
        assert found["channels"] and not found["blocks.4"]
        assert found["blocks.5"] == norm_first  # a norm of the mean ties positions together
        assert default_layer(make(Mixer), (3, 64, 64)) == ("blocks.4" if norm_first else "blocks.5")

    def test_fine_and_deep(self) -> None:
        """32, 16 and 8 cells: 1 * 5/12, 1 * 8/12 and 8/14 * 11/12 = .52; the second is best."""
        assert default_layer(make(TinyCNN), (3, 64, 64)) == "stages.1"

    def test_a_coarse_grid_costs_more_than_depth_brings(self) -> None:
        """16, 8 and 4 cells: 1 * 5/12 = .42, 8/14 * 8/12 = .38 and 4/14 * 11/12."""
        assert default_layer(make(TinyCNN), (3, 32, 32)) == "stages.0"

    def test_among_alike_layers_the_highest_in_the_module_tree(self) -> None:
        """The norm behind a stage is a little deeper; the stage is what one would name."""

        class Normed(TwoPaths):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(30)))
                self.tail = nn.ModuleDict({"norm": nn.BatchNorm2d(8)})

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.tail["norm"](self.body(self.stem(x))).mean(dim=(2, 3)))

        assert default_layer(make(Normed), SIZE) == "body"

    def test_a_measured_order_goes_before_one_known_by_shape_alone(self) -> None:
        """Dense mixing over all positions hides where each of them looks."""

        class Mixed(TwoPaths):
            def __init__(self) -> None:
                super().__init__()
                self.mix = nn.Linear(16 * 24, 16 * 24)

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x).flatten(2)
                return self.fc(self.mix(x).unflatten(2, (16, 24)).tanh().mean(dim=(2, 3)))

        assert default_layer(make(Mixed), SIZE) == "stem"

    def test_no_cut_is_an_error_that_says_what_was_seen(self) -> None:
        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(3 * 32 * 48, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x.flatten(1))

        expected = r"no layer of this Flat is a cut with a spatial grid for inputs of size \(3, 32, 48\); name a layer"
        with pytest.raises(ValueError, match=expected):
            default_layer(make(Flat), SIZE)

    def test_rejected_layers_are_named(self) -> None:
        model = make(TinyCNN)
        model.fc.register_forward_hook(lambda _module, _inputs, output: 0 * output)  # nothing reaches the logits
        with pytest.raises(ValueError, match=r"its logits are the same for all images, .*; name a layer"):
            default_layer(model, SIZE)

    def test_a_head_of_zeros_is_looked_behind(self) -> None:
        """torchvision's ViT is made with one."""
        model, plain = make(TinyCNN), make(TinyCNN)
        with torch.no_grad():
            model.fc.weight.zero_()
        assert default_layer(model, SIZE) == default_layer(plain, SIZE)
        vit = VisionTransformer(32, 8, 3, 3, 24, 48, num_classes=5).eval()
        assert not vit.heads.head.weight.any()
        with torch.no_grad():
            model.idle = nn.Linear(16, CLASSES)  # a head of zeros that does not run
            model.idle.weight.zero_()
        assert all(math.isnan(site.leak) for site in sites(model, SIZE))
        maps = ibx.attribute(vit, torch.randn(2, 3, 32, 32))
        assert maps.shape == (2, 1, 32, 32) and maps.isfinite().all()

    def test_a_host_without_gradients_is_told(self) -> None:
        class Closed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = make(TinyCNN)

            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    return self.inner(x)

        with pytest.raises(ValueError, match="no gradient of the logits reaches the images; does its forward"):
            default_layer(Closed(), SIZE)
        with pytest.raises(ValueError, match="no gradient of the logits reaches the grid of layer 'inner.stages.1'"):
            IBAttention(Closed(), "inner.stages.1").attribute(torch.randn(1, *SIZE))

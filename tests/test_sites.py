"""Sites: which layers are cuts, what is measured there, and which one is the default."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.ib import IBAttention
from ib_explain.layouts import Layout
from ib_explain.sites import Site, candidate_layers, deeper_sites, default_layer, input_size_of, resolve_site, sites
from ib_explain.stripes import probe_images
from tests.models import TinyCNN, TinyNHWC, TinyViT
from tests.paths import SIZE, Bias, Branches, Bypass, Odd, TwoPaths, make
from tests.states import assert_same, mixed, state


def spread(logits: Tensor) -> float:
    return float(torch.pdist(logits.detach()).mean())


class TestCandidates:
    def test_block_outputs_are_cuts_and_what_is_inside_a_block_is_not(self) -> None:
        names = candidate_layers(make(TinyCNN), SIZE)
        assert {"stem", "stages.0", "stages.1", "stages"} <= set(names)
        assert not {n for n in names if n.endswith((".conv", ".skip"))}

    def test_the_higher_name_stands_for_layers_that_return_one_tensor(self) -> None:
        """`stages`, `stages.2` and `stages.2.act` return the same."""
        assert not {"stages.2", "stages.2.act", "stages.1.act"} & set(candidate_layers(make(TinyCNN), SIZE))

    def test_branches_are_no_cuts_the_join_is(self) -> None:
        assert candidate_layers(make(TwoPaths), SIZE) == ["stem", "join", "last"]

    def test_a_side_path_to_the_logits(self) -> None:
        assert candidate_layers(make(Bypass), SIZE) == ["early"]

    def test_layers_with_several_tensors_are_left_to_the_measurement(self) -> None:
        assert candidate_layers(make(Branches), SIZE) == ["fork"]

    def test_tables_are_no_candidates(self) -> None:
        class Rotary(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                angles = torch.linspace(0, 1, 16 * 24).view(1, 1, 16, 24).expand(len(x), -1, -1, -1)
                return angles.sin(), angles.cos()

        class Turned(TwoPaths):
            def __init__(self) -> None:
                super().__init__()
                self.rotary = Rotary()

            def forward(self, x: Tensor) -> Tensor:
                sin, cos = self.rotary(x)
                x = self.join(self.stem(x).repeat(1, 2, 1, 1)) * sin + cos
                return self.fc(x.mean(dim=(2, 3)))

        assert candidate_layers(make(Turned), SIZE) == ["stem", "join"]

    def test_in_the_order_in_which_they_run(self) -> None:
        found = sites(make(TinyCNN), SIZE)
        assert [s.name for s in found] == candidate_layers(make(TinyCNN), SIZE)
        assert [s.depth for s in found] == sorted(s.depth for s in found)


class TestMeasures:
    @pytest.mark.parametrize("name", ["stem", "stages.0", "stages.1", "stages"])
    def test_a_cut(self, name: str) -> None:
        site = resolve_site(make(TinyCNN), name, SIZE)
        assert site.leak == 0
        assert site.effect == 1
        assert site.reached > 0.9
        assert site.skippable
        assert site.usable

    @pytest.mark.parametrize("name", ["stages.1.conv", "stages.1.skip"])
    def test_a_layer_inside_a_block_leaks(self, name: str) -> None:
        site = resolve_site(make(TinyCNN), name, SIZE)
        assert site.leak > 0.2
        assert not site.usable

    def test_leak_is_what_the_definition_says(self) -> None:
        """By hand: noise images, the layer's output the same for all, the spread of the logits before and after."""
        model = make(Bypass)
        site = resolve_site(model, "late", SIZE)
        x = probe_images(3, SIZE, seed=0)
        with torch.no_grad():
            first = model.early(x).tanh()
            late = model.late(first)
            mean, std = late.mean(dim=(0, 2, 3), keepdim=True), late.std(dim=(0, 2, 3), keepdim=True)
            noise = torch.randn(late.shape[1:], generator=torch.Generator().manual_seed(0))
            same = (mean + std * noise).expand_as(late)
            blocked = model.fc(torch.cat([first, same.tanh()], dim=1).mean(dim=(2, 3)))
        assert site.leak == pytest.approx(spread(blocked) / spread(model(x)), rel=1e-4)

    def test_what_runs_before_can_be_skipped_only_if_nothing_of_it_is_read_behind(self) -> None:
        assert not resolve_site(make(Bypass), "late", SIZE).skippable
        assert not resolve_site(make(Bias), "conv", SIZE).skippable
        assert resolve_site(make(TwoPaths), "join", SIZE).skippable

    def test_a_table_read_behind_the_layer_is_no_leak(self) -> None:
        assert resolve_site(make(Bias), "conv", SIZE).leak == 0

    def test_several_grids_the_finest_is_the_site_and_the_others_are_held(self) -> None:
        site = resolve_site(make(Branches), "fork", SIZE)
        assert (site.layout.path, site.grid, site.layout.others) == ((1,), (16, 24), ((0,),))
        assert site.leak == 0
        assert 0 < site.effect < 1

    def test_depth_is_the_share_of_modules_that_are_done_also_for_names_that_another_stands_for(self) -> None:
        """stem, act, three times conv, skip, act, then fc: twelve."""
        model = make(TinyCNN)
        assert resolve_site(model, "stages.1", SIZE).depth == pytest.approx(8 / 12)
        assert resolve_site(model, "stages.2.act", SIZE).depth == pytest.approx(11 / 12)
        assert resolve_site(model, "stages.1.conv", SIZE).depth == pytest.approx(6 / 12)

    def test_constant_logits_have_no_leak_to_measure(self) -> None:
        model = make(TinyCNN)
        model.fc.register_forward_hook(lambda _module, _inputs, output: 0 * output)
        site = resolve_site(model, "stages.1", SIZE)
        assert math.isnan(site.leak)
        assert site.reached == 0
        assert not site.usable


class TestClassToken:
    SIZE = (3, 24, 24)

    def test_held_tokens_leave_no_leak_and_take_from_the_effect_with_depth(self) -> None:
        found = {s.name: s for s in sites(make(TinyViT), self.SIZE)}
        assert found["blocks.0"].layout.kind == "NLC, 1 token beside the grid"
        assert found["blocks.0"].leak == found["blocks.1"].leak == 0
        assert 1 > found["blocks.0"].effect > found["blocks.1"].effect > 0.01

    @pytest.mark.parametrize(("seed", "by_itself"), [(2, "blocks.1"), (4, "blocks.1"), (5, "blocks.0")])
    def test_the_default_is_the_best_by_the_documented_rule_in_which_the_effect_counts_more_than_by_itself(
        self, seed: int, by_itself: str
    ) -> None:
        torch.manual_seed(seed)
        host = TinyViT().eval()
        found = [site for site in sites(host, self.SIZE) if site.usable]

        def best(power: float) -> str:
            def score(s: Site) -> float:
                depth = s.depth if s.depth >= 0.05 else 0.01 * s.depth
                return min(1, math.prod(s.grid) / 14**2) * depth * min(1, s.effect) ** power * (1 - s.leak)

            return max(found, key=score).name

        assert default_layer(host, self.SIZE) == best(4.5)
        assert best(1.0) == by_itself

    def test_the_stem_is_no_default_however_little_of_the_answer_the_blocks_grids_carry(self) -> None:
        torch.manual_seed(0)
        host = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, patch_size=8, depth=6).eval()
        found = {site.name: site for site in sites(host, (3, 64, 64))}
        plain = {name: site.depth * site.effect**4.5 for name, site in found.items()}
        assert not max(plain, key=lambda name: plain[name]).startswith("blocks.")
        assert default_layer(host, (3, 64, 64)).startswith("blocks.")

    def test_the_last_block_is_read_by_its_class_token_alone(self) -> None:
        site = resolve_site(make(TinyViT), "blocks", self.SIZE)
        assert site.effect == 0
        assert site.reached == 0
        assert not site.usable
        assert default_layer(make(TinyViT), self.SIZE) != "blocks"

    @pytest.mark.parametrize("name", ["blocks.0", "blocks.1", None])
    def test_with_attention_zero_the_output_does_not_depend_on_the_image(self, name: str | None) -> None:
        model = make(TinyViT)
        model.pretrained_cfg = {"input_size": self.SIZE}
        x = probe_images(4, self.SIZE, seed=1)
        with torch.no_grad(), IBAttention(model, name).restrict(attention=0.0) as host:
            closed = host(x)
        torch.testing.assert_close(closed, closed[:1].expand(4, -1))
        assert spread(model(x)) > 0.05


@pytest.mark.parametrize("kind", [TinyCNN, TinyNHWC, TwoPaths, Branches])
def test_with_attention_zero_the_default_layer_passes_nothing(kind: type[nn.Module]) -> None:
    model = make(kind)
    x = probe_images(4, SIZE, seed=1)
    layer = default_layer(model, SIZE)
    with torch.no_grad(), IBAttention(model, layer).restrict(attention=0.0) as host:
        closed = host(x)
    torch.testing.assert_close(closed, closed[:1].expand(4, -1))


class TestResolve:
    def test_a_layer_that_is_no_cut_is_told_where_the_user_called(self, tmp_path: Path) -> None:
        model, x = make(Bypass), torch.randn(2, *SIZE)
        told = "layer 'late' is no cut: .* of the logits' spread flows around its grid"
        uses = [lambda ib: ib.attribute(x), lambda ib: ib.fit([x], steps=1, show_progress=False).save(tmp_path / "ib")]
        uses.append(lambda _: IBAttention.load(tmp_path / "ib", model))
        for use in uses:
            with pytest.warns(UserWarning, match=told) as caught:
                use(IBAttention(model, "late"))
            assert [w.filename for w in caught if "is no cut" in str(w.message)] == [__file__]

    def test_nearest_name(self) -> None:
        with pytest.raises(ValueError, match="has no layer 'stages.l'; did you mean .*'stages.1'"):
            resolve_site(make(TinyCNN), "stages.l", SIZE)

    @pytest.mark.parametrize("size", [(224, 224), 224, (3, 0, 224), (3, 32.0, 48)])
    def test_input_size_is_checked(self, size: Any) -> None:
        for ask in (sites, default_layer, candidate_layers):
            with pytest.raises(ValueError, match=r"input_size must be \(channels, height, width\), such as .*, got"):
                ask(make(TinyCNN), size)

    def test_no_grid(self) -> None:
        with pytest.raises(ValueError, match=r"layer 'fc' has no spatial grid: .*\(B, 5\)"):
            resolve_site(make(TinyCNN), "fc", SIZE)

    @pytest.mark.parametrize(("name", "what"), [("idle", "does not run"), ("twice", "runs 2 times")])
    def test_a_layer_that_does_not_run_once(self, name: str, what: str) -> None:
        with pytest.raises(RuntimeError, match=f"layer '{name}' {what} in one forward pass"):
            resolve_site(make(Odd), name, SIZE)

    def test_name_or_module_wrapped_or_not(self) -> None:
        model = make(TinyCNN)
        site = resolve_site(model, "stages.1", SIZE)
        assert resolve_site(model, model.stages[1], SIZE) is site
        assert resolve_site(nn.DataParallel(model), "module.stages.1", SIZE) is site
        assert resolve_site(torch.compile(model, backend="eager"), "stages.1", SIZE) is site

    def test_known_sites_are_not_probed_again(self) -> None:
        model = make(TinyCNN)
        ran: list[int] = []
        handle = model.register_forward_hook(lambda *_: ran.append(1))
        site = resolve_site(model, None, SIZE)
        passes = len(ran)
        assert resolve_site(model, site.name, SIZE) is site
        assert default_layer(model, SIZE) == site.name
        handle.remove()
        assert len(ran) == passes

    def test_other_weights_are_probed_again(self) -> None:
        model = make(TinyCNN)
        before = resolve_site(model, "stages.1", SIZE)
        with torch.no_grad():
            model.stages[2].conv.weight[:, :, :, 1:].zero_()
        assert before.reached == 1
        assert resolve_site(model, "stages.1", SIZE).reached < 1

    def test_another_stride_is_probed_again(self) -> None:
        """Which the weights do not tell; nor do they tell of a hook that pools."""
        x = torch.randn(2, *SIZE)
        for change in ("stride", "hook"):
            model, fresh = make(TinyCNN), make(TinyCNN)
            for method in ("ib", "grad_cam", "iba"):
                ibx.attribute(model, x, layer="stages.1", method=method)
            fitted = ibx.IBAttention(model, "stages.1").fit([x], steps=1, show_progress=False)
            for changed in (model, fresh):
                if change == "stride":
                    changed.stem.stride = (4, 4)
                else:
                    changed.stages[1].register_forward_hook(lambda _m, _i, output: torch.max_pool2d(output, 2))
            for method in ("ib", "grad_cam", "iba"):
                maps = [ibx.attribute(host, x, layer="stages.1", method=method) for host in (model, fresh)]
                assert torch.equal(*maps), (change, method)
            with pytest.raises(
                ValueError, match=r"fitted to another layer 'stages.1': it returns \(2, .*; the model was"
            ):
                fitted.attribute(x)
            assert fitted.fit([x], steps=1, show_progress=False).attribute(x).isfinite().all()

    def test_an_output_in_place_behind_the_layer(self) -> None:
        """`stem` is followed by an in-place ReLU: the site is what the layer returned, before it."""
        site = resolve_site(make(TinyCNN), "stem", SIZE)
        assert site.leak == 0
        assert site.skippable

    @pytest.mark.parametrize("layer", [None, "stages.1.conv", "fc", "nothing"])
    def test_the_host_comes_back_as_it_was(self, layer: str | None) -> None:
        model = mixed(make(TinyCNN))
        before = state(model)
        if layer in ("fc", "nothing"):
            with pytest.raises(ValueError, match="layer"):
                resolve_site(model, layer, SIZE)
        else:
            resolve_site(model, layer, SIZE)
        assert_same(before, state(model))

    def test_a_host_that_raises_is_heard_and_comes_back(self) -> None:
        class Broken(TinyCNN):
            def forward(self, x: Tensor) -> Tensor:
                super().forward(x)
                raise ArithmeticError("the host's own error")

        model = mixed(make(Broken))
        before = state(model)
        with pytest.raises(ArithmeticError, match="the host's own error"):
            resolve_site(model, None, SIZE)
        assert_same(before, state(model))

    def test_a_half_precision_host(self) -> None:
        site = resolve_site(make(TinyCNN).to(torch.bfloat16), "stages.1", SIZE)
        assert site.leak == 0
        assert site.layout.verified == "probe"


class TestDeeper:
    def test_the_last_layer_of_each_grid_behind_the_site(self) -> None:
        model = make(TinyCNN)
        found = deeper_sites(model, resolve_site(model, "stages.0", SIZE))
        assert [(name, layout.grid) for name, layout in found] == [("stages.1", (8, 12)), ("stages", (4, 6))]
        assert all(isinstance(layout, Layout) for _, layout in found)

    def test_nothing_behind_the_last(self) -> None:
        model = make(TinyCNN)
        assert deeper_sites(model, resolve_site(model, "stages", SIZE)) == []


def test_a_site_tells_itself_in_a_line() -> None:
    site = resolve_site(TinyCNN(), "stages.0", SIZE)
    (h, w), told = site.grid, repr(site)
    assert told.startswith(f"<Site 'stages.0': grid {h}x{w} of {site.channels} channels, depth ") and "\n" not in told


def test_input_size_from_the_hosts_own_config() -> None:
    model = make(TinyCNN)
    assert input_size_of(model) == (3, 224, 224)
    model.pretrained_cfg = {"input_size": (3, 96, 64)}
    assert input_size_of(nn.DataParallel(model)) == (3, 96, 64)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 96}, (96, 96)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96)}, (64, 96)),
        ("vit_tiny_patch16_224", {"img_size": 96, "dynamic_img_size": True}, (96, 96)),  # takes any
        ("test_vit", {"img_size": 32, "patch_size": 4}, (32, 32)),
        ("visformer_tiny", {}, (224, 224)),  # cuts features into patches, not the image
    ],
)
def test_the_size_is_what_a_model_of_patches_insists_on(name, options, size):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=2, **options)
    assert input_size_of(model)[1:] == size


@pytest.mark.parametrize(
    ("name", "options", "channels"),
    [
        ("resnet10t", {"in_chans": 1}, 1),
        ("resnet10t", {"in_chans": 6}, 6),
        ("crossvit_tiny_240", {"in_chans": 1}, 1),  # several first convolutions
        ("resnet10t", {"in_chans": 12}, 12),  # not 2 x 2 pixels of three channels
        ("tresnet_m", {}, 3),  # folds 4 x 4 pixels before its first convolution
        ("tresnet_m", {"in_chans": 1}, 1),
    ],
)
def test_the_number_of_channels_is_that_of_the_images(name, options, channels):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=2, **options)
    assert input_size_of(model)[0] == channels


def test_the_deepest_three_are_read():
    halves = [nn.Sequential(nn.Conv2d(3 if i == 0 else 6, 6, 3, 2, 1), nn.ReLU()) for i in range(5)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        host = nn.Sequential(*halves, nn.Flatten(), nn.Linear(6 * 16, 4)).eval()
    site = resolve_site(host, "0", (3, 128, 128))
    assert [layout.grid for _, layout in deeper_sites(host, site)] == [(16, 16), (8, 8), (4, 4)]

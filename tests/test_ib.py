"""IBAttention as a user holds it: what attribute promises, Captum's conventions, restriction, bad input."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, NoiseTunnel
from captum.attr import visualization as captum_visualization
from captum.metrics import infidelity, sensitivity_max
from torch import nn

import ib_explain as ibx
from ib_explain import ib as module
from ib_explain.ib import IBAttention
from ib_explain.lattice import attention_without_lattice
from ib_explain.lending import HostArgs
from ib_explain.maps import resize, spread
from ib_explain.masked_evidence import masked_evidence
from ib_explain.objective import location_price, rate
from ib_explain.per_image import REFINING_LR, PerImageSettings
from tests.explaining import fitted
from tests.models import images, tiny
from tests.states import assert_same, state


class TestMaps:
    def test_shape_sign_unit_and_sum(self, pair):
        ib, _ = pair
        x = images(3, seed=9)
        heat = ib.attribute(x)
        assert heat.shape == (3, 1, 24, 24) and heat.dtype == torch.float32 and not heat.requires_grad
        assert (heat >= 0).all() and torch.isfinite(heat).all() and heat.std() > 0
        torch.testing.assert_close(heat.sum(dim=(1, 2, 3)), ib.information(x))

    def test_sum_is_the_bits_on_the_grid(self, cnn):
        ib, host = cnn
        x = images(2, seed=9)
        with ibx_frozen(host):
            seen, place = ib._observe(host, x, None, (), read=True, gradient=True)
            grid = ib.bottleneck.restriction.bits(seen, ib.bottleneck.attend(seen).value)
        torch.testing.assert_close(ib.information(x), grid.sum(dim=(1, 2, 3)).detach(), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize(("kind", "strides_on"), [("cnn", True), ("vit", False)])
    def test_the_lattice_of_strides_behind_the_site_is_no_part_of_the_map(self, kind, strides_on):
        ib, host = fitted(kind)
        x = images(2, seed=9)
        with ibx_frozen(host), torch.no_grad():
            seen, place = ib._observe(host, x, None, (), read=True, gradient=True)
            attention = ib.bottleneck.attend(seen).value
            passed, even = (
                ib.bottleneck.restriction.bits(seen, a) for a in (attention, attention_without_lattice(attention))
            )
        assert place.strided == strides_on
        kept = passed.sum(dim=(1, 2, 3), keepdim=True) / even.sum(dim=(1, 2, 3), keepdim=True)
        torch.testing.assert_close(ib.attribute(x), spread(even * kept if strides_on else passed, (24, 24)))
        assert strides_on == (not torch.allclose(ib.attribute(x), spread(passed, (24, 24)), rtol=1e-3))

    def test_many_images_at_once_are_as_one_by_one(self, pair):
        ib, host = pair
        x = images(4, seed=9)
        together, alone = ib.attribute(x), torch.cat([ib.attribute(one[None]) for one in x])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        together = ibx.attribute(host, x, steps=4)
        alone = torch.cat([ibx.attribute(host, one[None], steps=4) for one in x])
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ibx.attribute(host, x, steps=4, batch_size=3), together, rtol=1e-3, atol=1e-4)

    def test_attention_is_in_the_unit_interval(self, cnn):
        attention = cnn[0].attribute(images(2), output="attention")
        assert attention.shape == (2, 1, 24, 24) and attention.min() >= 0 and attention.max() <= 1

    @pytest.mark.parametrize("reads", ["gradient", "features"])
    def test_the_map_depends_on_the_target(self, reads):
        ib, _ = fitted(reads=reads)
        x = images(2, seed=9)
        assert not torch.allclose(ib.attribute(x, target=0), ib.attribute(x, target=3), rtol=1e-3)

    def test_no_target_means_the_hosts_top_one(self, cnn):
        ib, host = cnn
        x = images(4, seed=9)
        torch.testing.assert_close(ib.attribute(x), ib.attribute(x, target=host(x).argmax(1)))

    def test_refining_lowers_the_loss_of_the_fitted_attention(self, cnn):
        ib, host = cnn
        x, beta = images(4, seed=9), ib.record["final_beta"]
        target = host(x).argmax(1)

        def loss(refine):
            attention = grid_attention(ib, host, x, refine)
            with ib.restrict(attention) as restricted, torch.no_grad():
                kept = torch.nn.functional.cross_entropy(restricted(x), target)
            with ibx_frozen(host), torch.no_grad():
                seen, _ = ib._observe(host, x, None, (), read=True, gradient=True)
                bits = ib.bottleneck.restriction.bits(seen, attention)
                cost = rate(bits, location_price(seen), seen.features.shape[1]).mean()
            return float(kept + beta * cost)

        assert loss(20) < loss(0)

    def test_refining_takes_the_fits_own_beta_and_small_steps(self, cnn):
        ib, host = cnn
        x = images(3, seed=9)
        assert ib.record["settings"]["beta"] == 0.01
        with ibx_frozen(host), torch.no_grad():
            grid, target = (ib.site.grid[0], ib.site.grid[1]), host(x).argmax(1)
            evidence = masked_evidence(host, x, target, grid, pairs=1, seed=ib.seed, args=HostArgs.of(None, 3))
        expected = resize(grid_attention(ib, host, x, 3, beta=0.01, evidence=evidence), (24, 24))
        torch.testing.assert_close(ib.attribute(x, refine=3, output="attention"), expected)

    def test_same_seed_same_map_and_global_random_state_untouched(self, cnn):
        _, host = cnn
        x = images(2, seed=9)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = ibx.attribute(host, x, steps=3)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(2)
        assert torch.equal(first, ibx.attribute(host, x, steps=3))
        assert not torch.equal(first, ibx.attribute(host, x, steps=3, seed=1))

    def test_another_size_is_probed_once(self, cnn):
        ib, host = cnn
        ran = []
        ib.attribute(images(2, size=40))
        handle = host.register_forward_hook(lambda _m, inputs, _o: ran.append(len(inputs[0])))
        ib.attribute(images(2, size=40))
        handle.remove()
        assert ran == [2]

    def test_other_input_sizes_work_with_statistics_per_channel(self, cnn):
        heat = cnn[0].attribute(images(2, size=32))
        assert heat.shape == (2, 1, 32, 32) and torch.isfinite(heat).all()

    def test_memory_of_a_call_is_gone_afterwards(self, cnn):
        import gc

        ib, _ = cnn

        def living():
            gc.collect()
            return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

        ib.attribute(images(2))
        before = living()
        for _ in range(10):
            ib.attribute(images(2))
        assert living() <= before


def ibx_frozen(host):
    from ib_explain.lending import frozen

    return frozen(host)


def grid_attention(ib, host, x, refine, beta=None, evidence=None):
    from ib_explain.per_image import optimise

    with ibx_frozen(host), torch.no_grad():
        seen, place = ib._observe(host, x, None, (), read=True, gradient=True)
        start = ib.bottleneck.attend(seen).value
        settings = PerImageSettings(steps=refine, lr=REFINING_LR, beta=beta, seed=ib.seed)
        return optimise(ib.bottleneck.restriction, seen, place.site.layout, settings, start, evidence)


class TestHostStaysAsItWas:
    def test_after_fit_attribute_and_errors(self):
        host = tiny().train()
        host.stages[1].eval()
        next(host.parameters()).requires_grad_(False)
        before = state(host)
        ib = IBAttention(host)
        ib.fit([images(4)], steps=2, show_progress=False)
        assert_same(before, state(host))
        ib.attribute(images(2))
        with pytest.raises(IndexError):
            ib.attribute(images(2), target=99)
        assert_same(before, state(host))

    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
    def test_when_the_forward_raises(self, cnn, error):
        ib, host = cnn
        before = state(host)

        def explode(*_):
            raise error

        handle = host.stages[2].register_forward_hook(explode)
        try:
            with pytest.raises(type(error)):
                ib.attribute(images(2))
            with pytest.raises(type(error)):
                IBAttention(host, "stages.1").fit([images(4)], steps=1, show_progress=False)
        finally:
            handle.remove()
        assert_same(before, state(host))

    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
    def test_a_fit_that_is_interrupted_leaves_the_one_before(self, error):
        host = tiny()
        ib = IBAttention(host, "stages.1").fit([images(4)], steps=2, show_progress=False)
        maps, record, site = ib.attribute(images(2)), ib.record, ib.site

        def data():
            yield images(4, size=32)
            raise error

        with pytest.raises(type(error)):
            ib.fit(data(), steps=3, show_progress=False)
        assert ib.record is record and ib.site is site
        assert torch.equal(ib.attribute(images(2)), maps)

    def test_under_inference_mode(self, cnn):
        ib, host = cnn
        x = images(2)
        expected, own, data = ib.attribute(x), ib.information(x), [images(4)]
        with torch.inference_mode():
            assert torch.equal(ib.attribute(x), expected) and torch.equal(ib.information(x), own)
            fresh = IBAttention(host, "stages.1").fit(data, steps=2, show_progress=False)
        with torch.no_grad(), ib.restrict() as restricted:
            kept = restricted(x)
        with torch.inference_mode(), ib.restrict() as restricted:
            assert torch.equal(restricted(x), kept)
        with ib.restrict() as restricted, torch.inference_mode():
            assert torch.equal(restricted(x), kept) and torch.equal(restricted(x.clone()), kept)
        again = IBAttention(host, "stages.1").fit(data, steps=2, show_progress=False)
        assert torch.equal(fresh.attribute(x), again.attribute(x))

    def test_in_several_threads(self, cnn):
        ib, host = cnn
        x, before = images(2), state(host)
        expected = ib.attribute(x)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: ib.attribute(x), range(9)))
        assert all(torch.equal(maps, expected) for maps in found)
        assert_same(before, state(host))

    def test_changed_weights_change_an_unfitted_map(self):
        host = tiny()
        ib = IBAttention(host, "stages.1")
        ib.attribute(images(2))
        with torch.no_grad():
            host.stem.weight.mul_(3)
        assert torch.equal(ib.attribute(images(2)), IBAttention(host, "stages.1").attribute(images(2)))

    def test_under_no_grad_and_with_gradients_of_others(self, cnn):
        ib, host = cnn
        x = images(2).requires_grad_()
        with torch.no_grad():
            quiet = ib.attribute(x)
        torch.testing.assert_close(quiet, ib.attribute(x))
        assert x.grad is None and x.requires_grad and all(p.grad is None for p in host.parameters())

    def test_data_parallel_and_compiled_hosts_are_looked_through(self, cnn):
        ib, host = cnn
        x = images(2)
        expected = ibx.attribute(host, x, steps=2)
        assert torch.equal(ibx.attribute(torch.nn.DataParallel(host), x, steps=2), expected)
        compiled = torch.compile(host, backend="eager")
        compiled(x)
        assert torch.equal(ibx.attribute(compiled, x, steps=2), expected)


class TestCaptum:
    def test_is_a_layer_attribution_with_captums_names(self, cnn):
        ib, host = cnn
        assert isinstance(ib, LayerAttribution)
        assert ib.forward_func is host and isinstance(ib.layer, torch.nn.Module)
        assert ib.multiplies_by_inputs is False and ib.has_convergence_delta() is False
        assert ib.get_name() == "IB Attention"
        assert IBAttention.interpolate(torch.zeros(1, 1, 2, 2), (4, 4)).shape == (1, 1, 4, 4)

    def test_its_repr_tells_layer_grid_and_state(self, cnn):
        told = repr(cnn[0])
        (h, w), name = cnn[0].site.grid, cnn[0].layer_name
        assert f"at {name!r}, grid {h}x{w} of {cnn[0].site.channels} channels" in told
        assert f"fitted on {cnn[0].record['images']} images" in told
        assert "at the default layer; gate 'gaussian', reads 'features'; not fitted" in repr(
            IBAttention(cnn[1], reads="features")
        )

    def test_the_constructor_touches_nothing(self):
        host = tiny().train()
        before = state(host)
        IBAttention(host, host.stages[1])
        assert_same(before, state(host))

    def test_tensor_in_tensor_out_tuple_in_tuple_out(self, cnn):
        x = images(2)
        plain, (inside,) = cnn[0].attribute(x), cnn[0].attribute((x,))
        assert torch.equal(plain, inside)
        with pytest.raises(ValueError, match="a tuple of one"):
            cnn[0].attribute((x, x))

    def test_noise_tunnel(self, cnn):
        x = images(2)
        smooth = NoiseTunnel(cnn[0]).attribute(x, nt_type="smoothgrad", nt_samples=3, stdevs=0.1, target=1)
        assert smooth.shape == (2, 1, 24, 24) and (smooth >= 0).all()
        silent = NoiseTunnel(cnn[0]).attribute(x, nt_type="smoothgrad", nt_samples=2, stdevs=0.0, target=[1, 2])
        torch.testing.assert_close(silent, cnn[0].attribute(x, target=[1, 2]), rtol=1e-4, atol=1e-4)

    def test_infidelity(self, cnn):
        ib, host = cnn
        x = images(2)

        def perturb(inputs):
            noise = 0.1 * torch.randn_like(inputs)
            return noise, inputs - noise

        score = infidelity(host, perturb, x, ib.attribute(x).expand_as(x), target=1, n_perturb_samples=3)
        assert score.shape == (2,) and torch.isfinite(score).all()

    def test_sensitivity_max_for_one_and_for_several(self, cnn):
        for count in (1, 3):
            score = sensitivity_max(cnn[0].attribute, images(count), target=1, n_perturb_samples=2)
            assert score.shape == (count,) and (score >= 0).all()

    def test_visualize_image_attr(self, cnn):
        heat = cnn[0].attribute(images(1))[0].permute(1, 2, 0).numpy()
        figure, _ = captum_visualization.visualize_image_attr(
            heat, np.full((24, 24, 3), 0.5), "blended_heat_map", use_pyplot=False
        )
        assert figure is not None

    def test_additional_forward_args(self):
        class Scaled(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.host = tiny()

            def forward(self, x, scale):
                return self.host(x) * scale

        ib = IBAttention(Scaled(), "host.stages.1")
        plain = ib.attribute(images(2), 1, torch.tensor(2.0))
        row_for_row = ib.attribute(images(2), 1, torch.tensor([[2.0], [2.0]]))
        assert plain.shape == (2, 1, 24, 24)
        torch.testing.assert_close(row_for_row, plain)

    def test_arguments_of_each_image_are_its_own(self):
        class Shifted(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.host = tiny()

            def forward(self, x, shift):
                return self.host(x + shift[:, None, None, None])

        ib, x, shift = IBAttention(Shifted(), "host.stages.1"), images(3), torch.tensor([0.0, 1.0, 3.0])
        together = ib.attribute(x, [0, 1, 2], shift)
        for i in range(3):
            alone = ib.attribute(x[i : i + 1], i, shift[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        with ib.restrict(0.5) as restricted, pytest.raises(ValueError, match="same further arguments"):
            restricted(x, shift)

    def test_pickles_and_copies(self, cnn):
        ib, _ = cnn
        x = images(2)
        for twin in (copy.deepcopy(ib), pickle.loads(pickle.dumps(ib))):
            assert torch.equal(twin.attribute(x), ib.attribute(x))


class TestOtherMethods:
    def test_a_function_a_captum_object_and_a_fitted_ib_go_through_the_same_door(self, cnn):
        from captum.attr import Saliency

        ib, host = cnn
        x = images(3)
        assert torch.equal(ibx.attribute(host, x, method=ib), ib.attribute(x))
        assert torch.equal(ibx.attribute(host, x, method=lambda _m, x, _t: x.mean(1)), x.mean(1, keepdim=True))
        target = host(x).argmax(1)
        expected = Saliency(host).attribute(x, target=target).sum(1, keepdim=True)
        torch.testing.assert_close(ibx.attribute(host, x, method=Saliency(host), batch_size=2), expected)

    def test_wrong_answers_of_a_function(self, cnn):
        with pytest.raises(ValueError, match="one map for each of the 2 images"):
            ibx.attribute(cnn[1], images(2), method=lambda _m, x, _t: x[:1, :1])
        with pytest.raises(TypeError, match="must be a name"):
            ibx.attribute(cnn[1], images(2), method=3)


class Raw(nn.Module):
    """Takes 0..255 and normalises by itself."""

    def __init__(self):
        super().__init__()
        self.host = tiny()

    def forward(self, x):
        return self.host((x - 128) / 64)


def test_a_host_of_another_range_is_told_where_noise_stands_for_its_data():
    pictures = [images(8, seed=s) * 64 + 128 for s in range(2)]
    with pytest.warns(
        UserWarning, match=r"lie \d+ standard deviations from those of the noise .* give reference=images"
    ):
        ibx.attribute(Raw(), pictures[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ibx.attribute(Raw(), pictures[0], reference=pictures[1])


def test_images_that_nothing_passes_for_are_told():
    ib = IBAttention(tiny(), "stages.1").fit([images(16)], steps=2, show_progress=False)
    with torch.no_grad():
        for parameter in ib.bottleneck.network.parameters():
            parameter.zero_()
        ib.bottleneck.network.head.bias.fill_(-200)
    with pytest.warns(UserWarning, match="no information passes for any of these images; are they normalised as in"):
        assert ib.attribute(images(2)).sum() == 0


def test_refining_is_priced_whatever_is_read(monkeypatch):
    x = images(8)
    ib = IBAttention(tiny(), "stages.1", reads="features").fit([x], steps=1, show_progress=False)
    optimise, seen = module.optimise, []
    monkeypatch.setattr(
        module, "optimise", lambda restriction, s, *rest: seen.append(s) or optimise(restriction, s, *rest)
    )
    ib.attribute(x, refine=1)
    assert seen[0].gradient is not None and len(seen[0].deep_gradients) == len(seen[0].deep) > 0

"""The host run through its bottleneck: what passes, nesting, methods inside, bad input."""

import copy

import pytest
import torch
from torch import nn

import ib_explain as ibx
from ib_explain.ib import IBAttention
from tests.models import CLASSES, images, tiny
from tests.states import assert_same, state


class TestRestrict:
    def test_without_attention_the_output_does_not_depend_on_the_image(self, pair):
        ib, host = pair
        x = images(4, seed=9)
        with ib.restrict(0.0) as restricted, torch.no_grad():
            closed = restricted(x)
        assert (closed - closed[:1]).abs().max() == 0
        assert (host(x) - host(x)[:1]).abs().max() > 0.1

    def test_full_attention_on_a_cut_gives_nearly_the_hosts_own_output(self, cnn):
        ib, host = cnn
        x = images(4, seed=9)
        with ib.restrict(1.0) as restricted, torch.no_grad():
            opened = restricted(x)
        assert (opened - host(x)).abs().max() < 0.2 * host(x).std()

    def test_several_passes_and_the_host_afterwards(self, cnn):
        ib, host = cnn
        before, plain = state(host), host(images(2))
        with ib.restrict() as restricted:
            first, second = restricted(images(2)), restricted(images(3, seed=1))
        assert first.shape == (2, CLASSES) and second.shape == (3, CLASSES)
        assert not torch.allclose(first, plain)
        assert_same(before, state(host))
        assert torch.equal(host(images(2)), plain)

    def test_the_users_own_random_numbers_go_on(self, cnn):
        ib, host = cnn
        torch.manual_seed(0)
        expected = torch.rand(2, 3)
        torch.manual_seed(0)
        for row in expected:
            with ib.restrict() as restricted:
                restricted(images(2))
                assert torch.equal(torch.rand(3), row)

    def test_unfitted_needs_an_attention(self):
        ib = IBAttention(tiny(), "stages.1")
        with pytest.raises(RuntimeError, match="not fitted"), ib.restrict():
            pass
        with ib.restrict(0.0) as restricted:
            closed = restricted(images(2))
        assert torch.equal(closed[0], closed[1])

    def test_attention_outside_the_unit_interval(self, cnn):
        for bad, got in (
            (1.5, "1.5"),
            (-0.1, "-0.1"),
            (torch.nan, "nan"),
            (torch.full((1, 1, 2, 2), 3.0), "3 to 3"),
        ):
            expected = rf"attention must be a number or a .*tensor \(B, 1, h, w\), in \[0, 1\], got {got}"
            with pytest.raises(ValueError, match=expected), cnn[0].restrict(bad):
                pass
        misshapen = pytest.raises(ValueError, match=r"a number or \(2, 1, \d+, \d+\), got \(2, 1, 3, 3\)")
        with cnn[0].restrict(torch.ones(2, 1, 3, 3)) as restricted, misshapen:
            restricted(images(2))
        for wrong in ("a", True, [0.5], torch.ones(1, dtype=torch.int64)):
            with pytest.raises(TypeError, match="attention must be a number or a"), cnn[0].restrict(wrong):
                pass

    def test_what_is_no_batch_of_images(self, cnn):
        for wrong in (images(2).numpy(), [images(2)], None, images(2)[0]):
            with cnn[0].restrict(0.5) as restricted, pytest.raises((TypeError, ValueError), match="x must"):
                restricted(wrong)

    def test_the_residual_gate_is_even_at_one(self):
        host = tiny()
        ib = IBAttention(host, "stages.1", gate="residual")
        said = []
        for attention in (1 - 1e-6, 1.0):
            with torch.no_grad(), ib.restrict(attention) as restricted:
                said.append(restricted(images(2)))
        assert torch.allclose(*said, rtol=1e-4, atol=1e-4) and not torch.allclose(said[1], host(images(2)), atol=1e-3)

    def test_hooks_set_inside_see_the_restricted_layer_from_the_first_pass_on(self, cnn):
        ib = cnn[0]
        host, seen = ib.host, []
        with torch.no_grad(), ib.restrict(0.0) as restricted:
            layer = restricted.get_submodule(ib.layer_name)
            handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
            try:
                restricted(images(2)), restricted(images(2)), copy.deepcopy(restricted)(images(2))
            finally:
                handle.remove()
            assert len(seen) == 6  # clean and restricted in turns
            assert torch.equal(seen[1], seen[3]) and torch.equal(seen[3], seen[5])
            assert not torch.equal(seen[0], seen[1])
        assert len(host.get_submodule(ib.layer_name)._forward_hooks) == 0

    def test_attention_of_one_changes_nothing(self, cnn):
        host = cnn[0].host
        with torch.no_grad(), cnn[0].restrict(1.0) as restricted:
            through = restricted(images(3))
        assert torch.allclose(through, host(images(3)), atol=1e-6)

    def test_the_default_layer_is_that_of_the_images(self):
        """Not of the size that the configuration, or nobody, tells: this host runs at 64 pixels alone."""

        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.fc = nn.Conv2d(3, 4, 3, 4, 1), nn.Linear(4 * 16 * 16, 5)

            def forward(self, x):
                return self.fc(self.conv(x).flatten(1))

        torch.manual_seed(0)
        host = Flat().eval()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules())
        ib = IBAttention(host)
        with ib.restrict(0.0) as restricted:
            closed = restricted(images(3, size=64))
        assert torch.equal(closed[0], closed[1])
        assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules())
        assert torch.equal(
            ib.attribute(images(2, size=64)), IBAttention(host).attribute(images(2, size=64))
        )  # as if it had not been used before


@pytest.fixture(scope="module")
def both():
    host, data = tiny("cnn"), [images(8)]
    early, late = (IBAttention(host, name).fit(data, steps=2, show_progress=False) for name in ("stages.0", "stages.1"))
    return host, early, late


class TestNestedRestriction:
    """A clean pass inside a restricted one is nobody else's."""

    def test_two_sites(self, both):
        host, early, late = both
        x = images(3, seed=5)
        with early.restrict() as inside:
            alone = inside(x)
            with late.restrict() as inside:
                together = inside(x)
            torch.testing.assert_close(inside(x), alone)
        with late.restrict(0.0), early.restrict():
            torch.testing.assert_close(host(x), host(x[:1]).expand(3, -1))  # nothing passes the later site
        assert not torch.allclose(together, alone)

    def test_one_site_twice(self, both):
        host, _, late = both
        x = images(3, seed=5)
        with late.restrict(0.0), late.restrict(1.0), late.restrict():
            assert host(x).shape == (3, CLASSES)

    @pytest.mark.parametrize("method", ["grad_cam", "saliency", "integrated_gradients", "ib"])
    def test_methods_explain_the_restricted_host(self, both, method):
        host, early, _ = both
        x = images(2, seed=5)
        options = {"ib": {"steps": 2}, "integrated_gradients": {"steps": 3}}.get(method, {})
        plain = ibx.attribute(host, x, method=method, target=1, **options)
        with early.restrict() as inside:
            restricted = ibx.attribute(inside, x, method=method, target=1, **options)
        assert restricted.shape == plain.shape and not torch.allclose(restricted, plain)
        torch.testing.assert_close(ibx.attribute(host, x, method=method, target=1, **options), plain)

    def test_the_fitted_one_itself_and_its_sites(self, both):
        host, early, late = both
        x = images(2, seed=5)
        with early.restrict():
            assert torch.isfinite(early.attribute(x)).all() and torch.isfinite(late.attribute(x, refine=2)).all()
            assert early.information(x).shape == (2,)

    def test_images_are_checked(self, both):
        _, _, late = both
        with late.restrict() as inside:
            with pytest.raises(ValueError, match=r"got \(3, 24, 24\)"):
                inside(images(1)[0])
            with pytest.raises(ValueError, match="finite"):
                inside(images(2) * torch.nan)

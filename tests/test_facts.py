"""What is known of a host holds for the host as it is: with other weights, or restricted, it is another one."""

from __future__ import annotations

import gc
import weakref

import pytest
import timm
import torch
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.facts import STATES, remembered, weights_state
from ib_explain.hooks import aside, replace_output
from ib_explain.ib import IBAttention
from tests.models import images, tiny


class WithBuffer(nn.Module):
    """A CNN that fills a float buffer in its first pass, or changes one in each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.register_buffer("place", torch.zeros(()) if kind == "counter" else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "counter":
            self.place += 1.0
        elif self.place is None:
            self.place = torch.linspace(0, 1, x.shape[-1])
        x = self.b(x.relu() + (0 if self.kind == "counter" else self.place)).relu()
        return self.fc(x.mean(dim=(2, 3)))


def test_each_is_found_once_for_each_state_of_the_host():
    host, calls = tiny(), []

    def find():
        calls.append(1)
        return len(calls)

    assert [remembered(host, "a", find), remembered(host, "a", find), remembered(host, "b", find)] == [1, 1, 2]
    with torch.no_grad():
        next(host.parameters()).mul_(1.0)
    assert remembered(host, "a", find) == 3
    hook = host.fc.register_forward_hook(lambda *_: None)  # of the user's: most only look on
    assert remembered(host, "a", find) == 3
    hook.remove()
    with replace_output(host, "stem", lambda output: output):
        assert remembered(host, "a", find) == 4
        with aside():
            assert remembered(host, "a", find) == 3
    assert remembered(host, "a", find) == 3


def test_only_the_latest_states_are_kept_and_the_host_is_freed():
    host, calls = tiny(), []
    for _ in range(STATES + 1):
        with torch.no_grad():
            next(host.parameters()).mul_(1.0)
        remembered(host, "a", lambda: calls.append(1))
    ibx.attribute(host, images(1), steps=1)
    gone = weakref.ref(host)
    del host
    gc.collect()
    assert gone() is None


def test_running_statistics_that_changed_are_noticed():
    norm = nn.BatchNorm2d(4)
    host = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    before = weights_state(host)
    assert weights_state(host) == before
    norm.running_var.mul_(2)
    assert weights_state(host) != before


@pytest.mark.parametrize("kind", ["lazy", "counter"])
def test_a_forward_that_fills_or_changes_a_buffer(kind):
    torch.manual_seed(0)
    host, x = WithBuffer(kind).eval(), images(2)
    assert ibx.default_layer(host, (3, 24, 24)) in ("a", "b")
    assert [site.name for site in ibx.sites(host, (3, 24, 24))] == ["a", "b"]
    for maps in (ibx.attribute(host, x, steps=1), ibx.attribute(host, x, method="grad_cam", layer="b")):
        assert torch.isfinite(maps).all()


def test_a_host_that_fills_a_buffer_is_probed_once():
    host = WithBuffer("lazy").eval()
    ibx.default_layer(host, (3, 24, 24))
    passes: list[int] = []
    host.register_forward_hook(lambda *_: passes.append(1))
    ibx.default_layer(host, (3, 24, 24))
    assert not passes


class TestRestricted:
    def test_what_is_asked_inside_is_of_the_restricted_host_and_forgotten_outside(self):
        host, x = tiny(), images(3)
        before = ibx.sites(host, (3, 24, 24))
        expected = ibx.attribute(tiny(), x, steps=2)
        with IBAttention(host, "stages.1").restrict(0.0) as closed:
            assert [site.leak for site in ibx.sites(closed, (3, 24, 24))] != [site.leak for site in before]
            with pytest.raises(ValueError, match="logits are the same for all images"):
                ibx.attribute(closed, x)
        assert ibx.sites(host, (3, 24, 24)) == before
        assert torch.equal(ibx.attribute(host, x, steps=2), expected)

    def test_a_host_first_seen_inside(self):
        host, x = tiny(), images(3)
        with (
            IBAttention(host, "stages.1").restrict(0.0) as closed,
            pytest.raises(ValueError, match="logits are the same"),
        ):
            ibx.attribute(closed, x)
        assert torch.equal(ibx.attribute(host, x, steps=2), ibx.attribute(tiny(), x, steps=2))

    def test_reference_statistics_of_an_object_used_inside(self):
        host, x = tiny(), images(3)
        ib = IBAttention(host, "stages.1")
        with IBAttention(host, "stages.0").restrict(0.2):
            inside = ib.attribute(x)
        outside = ib.attribute(x)
        assert torch.equal(outside, IBAttention(tiny(), "stages.1").attribute(x))
        assert not torch.allclose(inside, outside)


def test_reference_statistics_hold_for_what_the_host_computes_now():
    """Also after what its state does not show: `parameter.data`, an attribute of its own."""
    host, x = tiny(), images(3)
    ibx.attribute(host, x, layer="stages.1", steps=2)
    for parameter in host.parameters():
        parameter.data.mul_(1.5)
    fresh = tiny()
    fresh.load_state_dict(host.state_dict())
    expected = ibx.attribute(fresh, x, layer="stages.1", steps=2)
    assert torch.equal(ibx.attribute(host, x, layer="stages.1", steps=2), expected)


def test_another_module_or_parameter_is_another_host():
    host, seen = tiny(), []
    for change in range(30):
        remembered(host, "a", lambda change=change: seen.append(change))
        host.stem = torch.nn.Conv2d(3, 8, 3)  # often where the last one was
    assert seen == list(range(30))


class TestHooksOfTheUsers:
    def test_one_that_comes_later_counts(self):
        def halved(_module, _inputs, output):
            return output * 0.3

        x, late, early = images(3), tiny(), tiny()
        ibx.attribute(late, x, layer="stages.1", steps=2)
        late.stages[1].register_forward_hook(halved)
        early.stages[1].register_forward_hook(halved)
        maps = [ibx.attribute(host, x, layer="stages.1", steps=2) for host in (late, early)]
        assert torch.allclose(*maps, rtol=1e-4, atol=1e-6)  # the one runs the tail alone, the other the whole host

    def test_one_in_place_on_what_is_skipped(self):
        host, x = tiny(), images(3)
        ibx.attribute(host, x, steps=2)
        host.stem.register_forward_hook(lambda _module, _inputs, output: output.mul_(0.5))
        assert torch.isfinite(ibx.attribute(host, x, steps=2)).all()


def test_gradient_checkpointing_switched_on_later_changes_nothing():
    torch.manual_seed(0)
    host, x = timm.create_model("test_vit", num_classes=5).eval(), images(2, size=160)
    before = ibx.attribute(host, x, steps=2)
    host.set_grad_checkpointing(True)
    assert torch.equal(ibx.attribute(host, x, steps=2), before)
    assert torch.isfinite(ibx.attribute(host, x, method="grad_cam")).all()
    assert host.grad_checkpointing is True

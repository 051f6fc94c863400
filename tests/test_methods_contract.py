"""Every registered method on every kind of host: what `attribute` promises, also when the host fails in the middle."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.methods import METHODS, NotApplicable

HOSTS = ("test_resnet", "test_vit", "test_mambaout")
SIZE = 64

# Enough to see a difference, not more.
QUICK: dict[str, dict[str, Any]] = {
    "ib": {"steps": 2},
    "iba": {"steps": 3, "copies": 2},
    "rise": {"masks": 6},
    "integrated_gradients": {"steps": 3},
    "smooth_grad": {"samples": 3},
    "gradient_shap": {"samples": 3},
    "occlusion": {"window": 32, "stride": 32},
    "feature_ablation": {"tile": 32},
}
LAYER = {
    "score_cam": {"test_resnet": "layer1"},
    "iba": {"test_resnet": "layer2", "test_vit": "blocks.1", "test_mambaout": "stages.1"},
}
REFUSED = {
    "test_resnet": {"lrp", "attention_rollout", "attention_gradient_rollout"},
    "test_vit": {"lrp", "deep_lift", "guided_grad_cam"},
    "test_mambaout": {"lrp", "deep_lift", "guided_grad_cam", "attention_rollout", "attention_gradient_rollout"},
}
WITHOUT_HOST = {"random", "constant", "center_gaussian", "edges"}
UP_TO_THE_LAYER = {"am", "br_npa", "eigen_cam", "activation_energy"}
CASES = [(method, host) for method in METHODS for host in HOSTS]
APPLICABLE = [(method, host) for method, host in CASES if method not in REFUSED[host]]


@functools.cache
def host_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    host = timm.create_model(name, num_classes=5)  # in training mode: methods must bring it to eval and back
    return host.requires_grad_(True)


def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def maps(method: str, host: str, x: Tensor, **more: Any) -> Tensor:
    layer = LAYER.get(method, {}).get(host)
    with torch.no_grad():  # as most callers have it
        return ibx.attribute(host_of(host), x, method=method, layer=layer, **{**QUICK.get(method, {}), **more})


def state(host: nn.Module) -> list[Any]:
    """Everything that must be as before: values, flags, gradients, hooks, attributes."""
    found: list[Any] = [(n, p.requires_grad, p.grad is None) for n, p in host.named_parameters()]
    for name, module in host.named_modules():
        hooks = [len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("_hooks")]
        flags = [(k, v) for k, v in sorted(module.__dict__.items()) if isinstance(v, bool | int | str | float)]
        found.append((name, type(module), id(module), hooks, flags, sorted(module.__dict__)))
    return found


def same_values(host: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in host.state_dict().items())


@pytest.mark.parametrize(("method", "name"), APPLICABLE)
def test_contract(method: str, name: str) -> None:
    host, x = host_of(name), images()
    values = {k: v.clone() for k, v in host.state_dict().items()}
    before, random, copy = state(host), torch.get_rng_state(), x.clone()
    both = maps(method, name, x)
    assert both.shape == (2, 1, SIZE, SIZE)
    assert both.dtype == torch.float32
    assert not both.requires_grad
    assert both.isfinite().all()
    if method != "constant":
        assert (both.amax(dim=(1, 2, 3)) > both.amin(dim=(1, 2, 3))).all()

    tolerance = {"rtol": 1e-3, "atol": 1e-3 * float(both.abs().max())}
    assert torch.equal(maps(method, name, x), both), "the same seed gives the same map"
    single = torch.cat([maps(method, name, image[None]) for image in x])
    torch.testing.assert_close(single, both, **tolerance, msg=lambda m: f"a batch of two is not two of one: {m}")
    small = maps(method, name, x, batch_size=1)
    torch.testing.assert_close(small, both, **tolerance, msg=lambda m: f"batch_size changes the map: {m}")
    fixed = maps(method, name, x, target=1)
    torch.testing.assert_close(maps(method, name, x, target=[1, 1], batch_size=2), fixed, **tolerance)

    assert state(host) == before
    assert same_values(host, values)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, copy)


@pytest.mark.parametrize(("method", "name"), [case for case in APPLICABLE if case[0] not in WITHOUT_HOST])
def test_host_is_whole_after_a_failure_inside(method: str, name: str) -> None:
    """Break the host in each of its first passes; of some methods the first is `attribute`'s own, for the target."""
    host, x = host_of(name), images()
    maps(method, name, x)  # layers are found and remembered: the failure comes inside the method
    before, values = state(host), {k: v.clone() for k, v in host.state_dict().items()}
    kind = nn.Conv2d if method in UP_TO_THE_LAYER else nn.Linear
    modules = [m for m in host.modules() if isinstance(m, kind)]
    module = modules[0] if method in UP_TO_THE_LAYER else modules[-1]
    broken = 0
    for at in (1, 2, 3, 4):
        forward, runs = module.forward, [0]

        def breaks(z: Tensor, forward: Any = forward, runs: list[int] = runs, at: int = at) -> Tensor:
            runs[0] += 1
            if runs[0] == at:
                raise KeyError("broken")
            return forward(z)

        module.forward = breaks  # type: ignore[method-assign]
        try:
            maps(method, name, x, target=1)
        except KeyError:
            broken += 1
        finally:
            del module.forward
        assert state(host) == before
        assert same_values(host, values)
    assert broken > 0


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case not in APPLICABLE])
def test_not_applicable_says_why_in_one_line(method: str, name: str) -> None:
    before = state(host_of(name))
    with pytest.raises(NotApplicable) as caught:
        maps(method, name, images())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) > 30
    assert state(host_of(name)) == before


@pytest.mark.parametrize("method", METHODS)
def test_unit_and_first_line(method: str) -> None:
    assert isinstance(METHODS.get(method).unit, str)
    first = ibx.available_methods()[method]
    assert first.endswith(".")
    assert len(first) < 130


@pytest.mark.parametrize("method", sorted({m for m, _ in APPLICABLE}))
def test_unknown_option_is_refused(method: str) -> None:
    with pytest.raises(TypeError, match=f"method '{method}' has no option 'sigmoid'"):
        ibx.attribute(host_of("test_resnet"), images(), method=method, sigmoid=1)

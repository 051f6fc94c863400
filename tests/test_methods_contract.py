"""Every registered method on every kind of host: what `attribute` promises, also when the host fails in the middle."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from captum.attr import IntegratedGradients, LayerGradientXActivation
from torch import Tensor, nn
from torch.testing import assert_close

import ib_explain as ibx
from ib_explain.contenders import contenders_of
from ib_explain.lending import frozen
from ib_explain.maps import resize
from ib_explain.methods import METHODS, Call, NotApplicable, register_method
from tests.models import images as pictures
from tests.models import tiny

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


@pytest.mark.parametrize("method", sorted({m for m, _ in APPLICABLE if m not in WITHOUT_HOST}))
def test_under_inference_mode(method: str) -> None:
    """On a host that nobody has looked at, so that nothing that was found out there is wrong afterwards."""
    name = "test_vit" if method in REFUSED["test_resnet"] else "test_resnet"
    x, expected = images(), maps(method, name, images())
    host, options = copy.deepcopy(host_of(name)), QUICK.get(method, {})
    layer = LAYER.get(method, {}).get(name)
    with torch.inference_mode():
        inside = ibx.attribute(host, x, method=method, layer=layer, **options)
    assert torch.equal(inside, expected)
    assert torch.equal(ibx.attribute(host, x, method=method, layer=layer, **options), expected)


class Normalising(nn.Module):
    def __init__(self, host: nn.Module, *, in_place: bool) -> None:
        super().__init__()
        self.host, self.in_place = host, in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x.sub_(0.1).div_(1.5) if self.in_place else (x - 0.1) / 1.5)


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("method", sorted({m for m, _ in APPLICABLE if m not in WITHOUT_HOST}))
def test_a_host_that_writes_into_its_images(method: str, target: int | None) -> None:
    name = "test_vit" if method in REFUSED["test_resnet"] else "test_resnet"
    layer = LAYER.get(method, {}).get(name)
    x, options = images(), {"layer": layer and f"host.{layer}", "target": target, **QUICK.get(method, {})}
    writes, spares = (Normalising(host_of(name), in_place=in_place) for in_place in (True, False))
    expected = ibx.attribute(spares, x, method=method, **options)
    for _ in "12":  # the first time it is found out
        torch.testing.assert_close(ibx.attribute(writes, x, method=method, **options), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(x, images())


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


def test_a_branch_that_the_class_does_not_reach_through_the_first_attention() -> None:
    host = timm.create_model("crossvit_9_240", num_classes=3).eval()
    with pytest.raises(NotApplicable, match="holds attention of shape .*, not over all"):
        ibx.attribute(host, torch.randn(1, 3, 240, 240), method="attention_gradient_rollout")


def test_not_only_registered_methods_keep_the_promises() -> None:
    host, x = host_of("test_resnet"), images()

    def noise(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return torch.rand(len(x), 1, *x.shape[2:])

    one, again, other = (ibx.attribute(host, x, method=noise, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    for method in (noise, ibx.IBAttention(host)):
        with pytest.raises(TypeError, match="only registered methods take a layer here, got one for "):
            ibx.attribute(host, x, method=method, layer="nope")
    with pytest.raises(ValueError, match="IBAttention belongs to another ResNet, not to this ResNet"):
        ibx.attribute(copy.deepcopy(host), x, method=ibx.IBAttention(host))
    with pytest.raises(ValueError, match="maps must be finite, got 4096 NaN or infinite values"):
        ibx.attribute(host, x, method=lambda model, x, target: torch.stack([x[0, :1], x[1, :1] * torch.nan]))


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("ib", {"beta": float("nan")}, "beta must be a finite number > 0, got nan"),
        ("ib", {"output": "bit"}, "unknown output 'bit'; did you mean 'bits'"),
        ("ib", {"gate": "foo"}, "unknown gate 'foo'"),
        ("ib", {"output": "relevance"}, "relevance is learned in a fit"),
        ("ib", {"reference": "x"}, "reference must be a torch.Tensor of shape"),
        ("iba", {"beta": -1}, "beta must be a finite number >= 0, got -1"),
        ("iba", {"reference": 5}, "reference must be a torch.Tensor of shape"),
        ("activation_energy", {"reference": torch.zeros(3)}, "reference must have shape"),
        ("gradient_shap", {"baselines": 0.0}, "baselines must be a torch.Tensor of shape"),
        ("occlusion", {"window": 4, "stride": 8}, "stride must be at most the window of 4 pixels"),
        ("hires_cam", {"relu": "False"}, "relu must be True or False, got 'False'"),
        ("smooth_grad", {"noise": -1}, "noise must be a finite number >= 0, got -1"),
        ("gradient_shap", {"noise": "0.1"}, "noise must be a number >= 0, got '0.1'"),
        ("grad_cam", {"relu": "yes"}, "relu must be True or False, got 'yes'"),
        ("rise", {"keep": "a"}, "keep must be a number, got 'a'"),
        ("occlusion", {"window": 0}, "window must be an integer >= 1, got 0"),
        ("feature_ablation", {"tile": 0}, "tile must be an integer >= 1, got 0"),
        ("integrated_gradients", {"steps": 0}, "steps must be an integer >= 1, got 0"),
        ("random", {"seed": None}, "seed must be an integer, got None"),
        ("random", {"seed": 1.5}, "seed must be an integer, got 1.5"),
    ],
)
def test_bad_values(method: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        ibx.attribute(host_of("test_resnet"), images(), method=method, **options)
    if "seed" not in options:  # which is the benchmark's own
        with pytest.raises((TypeError, ValueError), match=text):
            contenders_of([(method, options)], host_of("test_resnet"))


@pytest.mark.parametrize("name", ["ib", "iba", "activation_energy", "grad_cam", "am"])
def test_a_host_without_any_grid_is_no_failure(name: str) -> None:
    host = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5)).eval()
    with pytest.raises(NotApplicable):
        ibx.attribute(host, images(), method=name)


@pytest.mark.parametrize("method", ["ib", "iba", "rise", "smooth_grad", "gradient_shap", "random", "br_npa"])
@pytest.mark.parametrize("seed", [-3, 2**70])
def test_any_integer_is_a_seed(method: str, seed: int) -> None:
    one, again = (maps(method, "test_resnet", images(), seed=seed) for _ in "12")
    assert torch.equal(one, again)


def test_options_with_a_row_an_image_are_cut_with_the_images() -> None:
    host, x, baselines = tiny(), pictures(5), pictures(5, seed=1)
    options: dict[str, Any] = {"method": IntegratedGradients(host), "baselines": baselines, "n_steps": 4}
    whole = ibx.attribute(host, x, target=1, **options)
    assert_close(ibx.attribute(host, x, target=1, batch_size=2, **options), whole)
    one = ibx.attribute(host, x[3:4], target=1, **options | {"baselines": baselines[3:4]})
    assert_close(whole[3:4], one)


def test_the_number_of_channels_is_told() -> None:
    host = host_of("test_resnet")
    for target in (None, 1):
        with pytest.raises(ValueError, match="the model's images must have 3 channels, got 1: "):
            ibx.attribute(host, images()[:, :1], method="rise", target=target, masks=2)
    with pytest.raises(ValueError, match="inputs must have 3 channels, got 1"):
        ibx.attribute(host, images()[:, :1])


@pytest.mark.parametrize("method", ["saliency", "grad_cam", "ib"])
def test_images_of_six_channels(method: str) -> None:
    host = timm.create_model("test_resnet", num_classes=4, in_chans=6).eval()
    x = torch.cat([images(), images()], dim=1)
    assert ibx.attribute(host, x, method=method, **QUICK.get(method, {})).shape == (2, 1, SIZE, SIZE)


def test_an_option_as_long_as_there_are_images_is_no_row_an_image() -> None:
    class Weighted:
        def attribute(self, inputs: Tensor, target: Any = None, weights: Any = None) -> Tensor:
            return inputs * weights.view(1, 3, 1, 1)

    x, weights = pictures(3), torch.tensor([1.0, 2.0, 3.0])
    maps = ibx.attribute(tiny(), x, method=Weighted(), weights=weights, batch_size=1)
    assert_close(maps, (x * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True))


def test_layer_methods_of_captums_give_coarse_maps_of_many_channels() -> None:
    host, x = host_of("test_resnet"), images()
    method = LayerGradientXActivation(host, host.layer2)
    with frozen(host):
        expected = method.attribute(x, target=2).detach()
    assert expected.shape == (2, 48, 8, 8)
    heat = ibx.attribute(host, x, method=method, target=2)
    torch.testing.assert_close(heat, resize(expected.sum(dim=1, keepdim=True), (SIZE, SIZE)))


def test_a_function_under_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))

    @register_method("brightness")
    def brightness(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Brightness of the pixel."""
        return x.mean(dim=1, keepdim=True)

    host, x = host_of("test_resnet"), images()
    assert torch.equal(ibx.attribute(host, x, method="brightness"), brightness(host, x, torch.zeros(2)))
    assert ibx.available_methods()["brightness"] == "Brightness of the pixel."
    with pytest.raises(TypeError, match="method 'brightness' has no option 'relu'"):
        ibx.attribute(host, x, method="brightness", relu=True)
    with pytest.raises(ValueError, match="method 'brightness' takes no layer, got 'layer1'"):
        ibx.attribute(host, x, method="brightness", layer="layer1")
    board = ibx.benchmark(host, [x], methods=["brightness"], metrics=["sparsity_max_over_mean"])
    assert {row.method for row in board.rows} == {"brightness"}
    assert {"method", "source"} == board.run["settings"]["methods"]["brightness"].keys()


def test_one_class_under_two_names_and_one_that_is_no_dataclass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))

    class Plain:
        def __call__(self, call: Call) -> Tensor:
            return call.x.mean(dim=1, keepdim=True)

    @dataclass(frozen=True)
    class Scaled(Plain):
        gain: float = 2.0

    register_method("plain")(Plain)
    for name in ("first", "second"):
        register_method(name)(Scaled)
    methods = ["plain", "first", "second", Scaled(gain=1.0)]
    with pytest.raises(ValueError, match="two methods are called 'first'"):  # an object has the first name of its class
        contenders_of(methods, host_of("test_resnet"))
    told = {one.name: one.facts for one in contenders_of(methods[:3], host_of("test_resnet"))}
    assert list(told) == methods[:3] and [facts["method"] for facts in told.values()] == methods[:3]
    assert "gain" not in told["plain"] and told["second"]["gain"] == 2.0


def test_a_registered_function_has_gradients_as_one_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))

    @register_method("plain_gradient")
    def plain_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        x.requires_grad_()
        (slope,) = torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)
        return slope.abs().sum(1)

    host, x = host_of("test_resnet"), images()
    with torch.no_grad():
        assert torch.equal(
            ibx.attribute(host, x, method="plain_gradient"), ibx.attribute(host, x, method=plain_gradient)
        )


def test_a_method_that_writes_into_its_images_leaves_the_users_alone() -> None:
    @dataclass(frozen=True)
    class Writes:
        def __call__(self, call: Call) -> Tensor:
            call.x.zero_()
            return call.x[:, :1]

    host, x = host_of("test_resnet"), images()
    before = x.clone()
    ibx.attribute(host, x, method=Writes())
    board = ibx.benchmark(host, [x], methods=[Writes(), "edges"], metrics=["deletion"], show_progress=False)
    assert torch.equal(x, before)
    alone = ibx.benchmark(host, [x], methods=["edges"], metrics=["deletion"], show_progress=False)
    assert [r.value for r in board.rows if r.method == "edges"] == [r.value for r in alone.rows]


def test_only_a_notebooks_cell_may_register_a_name_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))

    def mine(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return x[:, 0]

    register_method("mine")(mine)
    with pytest.raises(ValueError, match=r"'mine' is already registered, to tests\.test_methods_contract\..*mine$"):
        register_method("mine")(mine)
    cell = "@register_method('cell')\ndef cell(model, x, target):\n    return x[:, {}]\n"
    for channel in (0, 1):
        exec(cell.format(channel), {"register_method": register_method, "__name__": "__main__"})
    host, x = host_of("test_resnet"), images()
    assert torch.equal(ibx.attribute(host, x, method="cell"), x[:, 1:2])
    with pytest.raises(ValueError, match="method 'ib' is already registered"):
        exec(cell.replace("'cell'", "'ib'").format(0), {"register_method": register_method, "__name__": "__main__"})


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


def test_what_can_be_no_method_is_not_registered() -> None:
    def mine(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return x[:, 0]

    class Mute:
        unit = "nothing"

    before = list(METHODS)
    for register, error, text in (
        (lambda: register_method(mine), TypeError, "the name of a method must be a str, got <function"),  # type: ignore[arg-type]
        (lambda: register_method(7)(mine), TypeError, "the name of a method must be a str, got 7"),  # type: ignore[arg-type]
        (lambda: register_method(" ")(mine), ValueError, "must not be empty"),
        (lambda: register_method("a,b")(mine), ValueError, "nor hold a comma, got 'a,b'"),
        (lambda: register_method("five")(5), TypeError, "must be a class or a function"),  # type: ignore[type-var]
        (lambda: register_method("mute")(Mute), TypeError, "Mute has none"),
    ):
        with pytest.raises(error, match=text):
            register()
    assert list(METHODS) == before


def test_lrp_leaves_the_graphs_of_the_user_alone() -> None:
    host = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    x = torch.randn(2, 3, 16, 16)
    loss = host(x).sum()
    assert ibx.attribute(host, x, method="lrp").isfinite().all()
    loss.backward()
    with pytest.raises(NotApplicable, match="zero in float16"):
        ibx.attribute(host.half(), x.half(), method="lrp")


def test_maps_that_are_finer_than_the_image_or_complex_are_refused() -> None:
    host, x = tiny(), pictures(2)
    with pytest.raises(ValueError, match="or a coarser grid of these proportions, got"):
        ibx.attribute(host, x, method=lambda _m, x, _t: torch.rand(len(x), 2 * x.shape[2], 2 * x.shape[3]))
    with pytest.raises(TypeError, match="real maps, got torch.complex64"):
        ibx.attribute(host, x, method=lambda _m, x, _t: x[:, 0].to(torch.complex64))

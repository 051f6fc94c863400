"""The same mistake at every door: the error names what was expected and what came, and the model is untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.metrics import insertion
from tests.models import images, tiny
from tests.states import assert_same, mixed, state

HOST = mixed(tiny())  # some modules in training mode, some parameters frozen
FITTED = ibx.IBAttention(HOST, "stages.1").fit([images(4)], steps=1, show_progress=False)

DOORS: dict[str, Callable[[Any], Any]] = {
    "ib": lambda x: ibx.attribute(HOST, x, steps=1),
    "grad_cam": lambda x: ibx.attribute(HOST, x, method="grad_cam"),
    "saliency": lambda x: ibx.attribute(HOST, x, method="saliency"),
    "function": lambda x: ibx.attribute(HOST, x, method=lambda _model, x, _target: x[:, 0]),
    "fitted": lambda x: ibx.attribute(HOST, x, method=FITTED),
    "fitted.attribute": FITTED.attribute,
    "fitted.information": FITTED.information,
    "fit": lambda x: ibx.IBAttention(HOST, "stages.1").fit([x], steps=1, show_progress=False),
    "benchmark": lambda x: ibx.benchmark(HOST, [x], methods=["edges"], metrics=["insertion"], show_progress=False),
    "insertion": lambda x: insertion(HOST, x, images(2)[:, 0]),
}


def one_bad(value: float) -> Tensor:
    x = images(2)
    x[1, 2, 3, 4] = value
    return x


def inference() -> Tensor:
    with torch.inference_mode():
        return images(2)


IMAGES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "one image": (lambda: images(1)[0], ValueError, r"must have shape \(B, C, H, W\), got \(3, 24, 24\); add a batch"),
    "integers": (lambda: images(2).byte(), TypeError, "must be normalised floating-point images, got torch.uint8"),
    "NaN": (lambda: one_bad(torch.nan), ValueError, "must be finite, got 1 NaN or infinite values"),
    "infinite": (lambda: one_bad(-torch.inf), ValueError, "must be finite, got 1 NaN or infinite values"),
    "empty": (lambda: images(2)[:0], ValueError, r"must hold at least one image, got shape \(0, 3, 24, 24\)"),
    # Where the host is asked first, the error is its convolution's own.
    "channels": (lambda: torch.zeros(2, 4, 24, 24), (ValueError, RuntimeError), "3 channels, (but )?got 4"),
    "inference mode": (inference, ValueError, r"came from torch.inference_mode\(\).*; pass .*clone\(\)"),
    "array": (lambda: images(2).numpy(), TypeError, "got ndarray"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("mistake", IMAGES)
def test_images(door: str, mistake: str) -> None:
    make, error, text = IMAGES[mistake]
    before = state(HOST)
    with pytest.raises(error, match=text) as caught:
        DOORS[door](make())
    assert "\n" not in str(caught.value)
    assert_same(before, state(HOST))


@pytest.mark.parametrize("door", [door for door in DOORS if door not in ("fit", "benchmark")])
def test_images_elsewhere_than_the_model(door: str) -> None:
    """Loaders yield images on the CPU: what fits and measures moves them itself."""
    with pytest.raises(ValueError, match=r"is on meta but the model is on cpu; move it with \w+\.to\('cpu'\)"):
        DOORS[door](images(2).to("meta"))


@pytest.mark.parametrize("method", ["ib", "grad_cam", "saliency", "rise"])
def test_a_size_that_the_model_refuses_is_told_in_words_of_sizes(method: str) -> None:
    host = mixed(tiny("vit"))
    before = state(host)
    refused = r"the model refuses images of size \(3, 32, 32\).*: The size of tensor a \(65\) must match the size of"
    with pytest.raises(ValueError, match=refused) as caught:
        ibx.attribute(host, images(2, size=32), method=method)
    assert "\n" not in str(caught.value) and str(caught.value).count("refuses") == 1
    with pytest.raises(ValueError, match=refused):
        ibx.IBAttention(host).fit([images(2, size=32)], steps=1, show_progress=False)
    assert_same(before, state(host))


def test_an_error_of_the_hosts_own_stays_what_it_is() -> None:
    class Moody(nn.Module):
        said: str | None = None

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, x: Tensor) -> Tensor:
            if self.said:
                raise RuntimeError(self.said)
            return self.inner(x)

    host = Moody().eval()
    ib = ibx.IBAttention(host, "inner.stages.1").fit([images(4)], steps=1, show_progress=False)
    for host.said in ("the channels database is offline", "expected sunshine, got rain"):
        for door in (ib.attribute, lambda x: ibx.attribute(host, x, method="saliency")):
            with pytest.raises(RuntimeError) as caught:
                door(images(2))
            assert type(caught.value) is RuntimeError and str(caught.value) == host.said


def test_errors_of_calls_with_further_arguments_stay_what_they_are() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.inner(x * mask)

    ib = ibx.IBAttention(Masked().eval(), "inner.stages.1")
    mask = torch.ones(2, 1, *images(2).shape[2:])
    with pytest.raises(ValueError, match="refine starts from a fitted attention"):
        ibx.attribute(ib.host, images(2), target=[0, 1], method=ib, additional_forward_args=mask, refine=2)


def test_a_size_that_was_assumed_is_told() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4 * 16 * 16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).flatten(1))

    host = Flat().eval()
    assumed = r"refuses images of size \(3, 224, 224\), .*: .*; \(3, 224, 224\) is assumed for .*, pass input_size="
    for door in (ibx.default_layer, ibx.sites):
        with pytest.raises(ValueError, match=assumed):
            door(host)
        assert door(host, (3, 32, 32))


@pytest.mark.parametrize("method", ["ib", "grad_cam", "saliency", "rise"])
def test_a_model_made_in_inference_mode(method: str) -> None:
    with torch.inference_mode():
        host = tiny("cnn")
    with pytest.raises(ValueError, match=r"parameters made in inference mode; make or load it outside torch.inf"):
        ibx.attribute(host, images(2), method=method)


def test_a_size_that_leaves_no_grid() -> None:
    for door in ("fitted", "fitted.attribute", "fitted.information", "fit"):
        with pytest.raises(ValueError, match=r"'stages.1' has no spatial grid: expected at least .*\(B, 12, 1, 1\)"):
            DOORS[door](images(2, size=4))


@pytest.mark.parametrize("method", ["ib", "grad_cam", "eigen_cam", "iba", "activation_energy"])
@pytest.mark.parametrize(
    ("layer", "error", "text"),
    [
        ("stage.1", ValueError, "TinyCNN has no layer 'stage.1'; did you mean 'stages.1'"),
        ("", ValueError, "TinyCNN has no layer ''; known: stem, act, stages"),
        ("fc", ValueError, r"layer 'fc' has no spatial grid: expected at least 2 x 2 positions .*, got \(B, 5\)"),
        (nn.ReLU(), ValueError, "the given ReLU is not a layer of this TinyCNN"),
        (1, TypeError, "layer must be a dotted name, a module of the model or None, got int"),
        (["stages.1"], TypeError, "layer must be a dotted name, a module of the model or None, got list"),
    ],
)
def test_layers(method: str, layer: Any, error: type[Exception], text: str) -> None:
    before = state(HOST)
    with pytest.raises(error, match=text):
        ibx.attribute(HOST, images(2), method=method, layer=layer)
    assert_same(before, state(HOST))


@pytest.mark.parametrize("method", ["ib", "grad_cam", "saliency", "rise", "eigen_cam"])
def test_a_model_whose_forward_raises(method: str) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError(f"no weights for {self.conv(x).shape[1]} channels")

    host = mixed(Broken())
    before = state(host)
    with pytest.raises(KeyError, match="no weights for 4 channels"):
        ibx.attribute(host, images(2), method=method)
    assert_same(before, state(host))


@pytest.mark.parametrize("method", ["ib", "iba", "activation_energy"])
def test_reference_images_of_another_size(method: str) -> None:
    with pytest.raises(ValueError, match=r"reference must hold images of size \(3, 24, 24\), got \(3, 16, 16\)"):
        ibx.attribute(HOST, images(2), method=method, reference=images(2, size=16))


@pytest.mark.parametrize("method", [ibx.IBAttention, type("Mine", (), {"attribute": None})])
def test_a_class_is_no_method(method: type) -> None:
    with pytest.raises(TypeError, match=f"must be an object, got the class {method.__name__}; make one of it first"):
        ibx.attribute(HOST, images(2), method=method)


def test_images_of_another_precision_than_the_host():
    host = tiny().double()
    with pytest.raises(TypeError, match=r"images must be torch.float64 as the model is, got torch.float32"):
        ibx.attribute(host, images(2), method="grad_cam")

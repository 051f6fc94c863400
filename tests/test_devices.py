"""Other devices and precisions than a CPU's float32.

What the package creates has a device of its own: `torch.set_default_device("cuda")` must not move half of it.

The meta device stands in for a GPU: a tensor that lands there by accident holds no data, so whoever uses it fails.
"""

from __future__ import annotations

import pytest
import torch

import ib_explain as ibx
from ib_explain.bottleneck.attention import unit_scale
from ib_explain.data import Synthetic
from ib_explain.hosts import pick_device
from ib_explain.ib import IBAttention
from ib_explain.methods import METHODS
from ib_explain.metrics import METRICS
from ib_explain.perturb import gaussian_blur, rise_blur
from tests.models import images, tiny

# Captum makes its own tensors; the others ask for what `tiny` does not have.
CAPTUMS = {"deep_lift", "feature_ablation", "guided_grad_cam", "integrated_gradients", "lrp", "occlusion"}
TRANSFORMERS = {"attention_rollout", "attention_gradient_rollout"}
OWN_METHODS = sorted({*METHODS} - CAPTUMS - TRANSFORMERS)
FEW_PASSES = {
    "rise": {"masks": 8},
    "iba": {"steps": 2, "copies": 2},
    "ib": {"steps": 2},
    "gradient_shap": {"samples": 2},
}


@pytest.fixture(autouse=True)
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture
def host():
    with torch.device("cpu"):
        return tiny()


@pytest.fixture
def x():
    with torch.device("cpu"):
        return images(4)


@pytest.mark.parametrize("kind", ["cnn", "vit", "nhwc"])
def test_sites(kind):
    with torch.device("cpu"):
        host = tiny(kind)
    assert ibx.sites(host, (3, 24, 24))


@pytest.mark.parametrize("options", [{}, {"reads": "features"}, {"anchors": 4, "relevance": True}])
def test_fit_attribute_and_load(host, x, tmp_path, options):
    ib = IBAttention(host, "stages.1", **options).fit([x], steps=2, show_progress=False)
    ib.save(tmp_path / "ib")
    same = IBAttention.load(tmp_path / "ib", host)
    for maps in (ib.attribute(x), ib.attribute(x, refine=1), ibx.attribute(host, x, steps=1)):
        assert maps.device == x.device
        assert torch.isfinite(maps).all()
    assert torch.equal(same.attribute(x, target=[0, 1, 0, 1]), ib.attribute(x, target=[0, 1, 0, 1]))


@pytest.mark.parametrize("name", OWN_METHODS)
def test_methods(host, x, name):
    assert ibx.attribute(host, x, method=name, **FEW_PASSES.get(name, {})).device == x.device


def test_a_benchmark_of_all_metrics(host, x, tmp_path):
    points = torch.tensor([[3.0, 4.0], [8.0, 9.0]], device="cpu")
    batch = {"image": x, "mask": x[:, :1] > 0, "density": x[:, :1].abs(), "fixations": [points] * len(x)}
    slow = {"model_randomisation"}
    metrics = [name for name in METRICS if name not in slow]
    board = ibx.benchmark(host, [batch], methods=["grad_cam", "random"], metrics=metrics, out=tmp_path / "run")
    statuses = {cell.status for cell in board.summary.cells.values()}
    assert "failed" not in statuses, [cell.reason for cell in board.summary.cells.values() if cell.reason]


def test_synthetic_pictures():
    assert Synthetic(4, seed=0, pairs=True).batch(range(4)).image.device.type == "cpu"


class TestHalfPrecision:
    """What GPUs compute in half precision leaves its range where it is not asked not to; the CPU shows the same."""

    @pytest.fixture(autouse=True)
    def here(self):
        torch.set_default_device(None)

    @pytest.mark.parametrize("value", [0.0, 1e-4, 2e-4, 300.0])
    def test_unit_scale(self, value):
        maps = torch.full((2, 1, 4, 4), value, dtype=torch.float16)
        torch.testing.assert_close(unit_scale(maps), torch.full((2, 1, 4, 4), float(value > 0)), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("blur", [rise_blur, gaussian_blur])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_blurred_images_are_rounded_once(self, blur, dtype):
        x = images(2).to(dtype)
        assert torch.equal(blur(x), blur(x.float()).to(dtype))

    def test_deep_lift_of_a_host_in_half_precision(self):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 22 * 22, 5)]
        host = torch.nn.Sequential(*layers)
        maps = ibx.attribute(host.half(), images(2).half(), method="deep_lift")
        assert torch.isfinite(maps).all() and maps.std() > 0

    @pytest.mark.parametrize(
        ("precision", "half", "scaled"), [("fp32", False, False), ("fp16", False, True), ("fp32", True, True)]
    )
    def test_gradients_in_half_precision_are_scaled(self, monkeypatch, precision, half, scaled):
        asked, scaler = [], torch.amp.GradScaler
        monkeypatch.setattr(
            torch.amp, "GradScaler", lambda device, enabled: asked.append(enabled) or scaler(device, enabled=enabled)
        )
        host, x = tiny(), images(4)
        if half:
            host, x = host.half(), x.half()
        IBAttention(host, "stages.1").fit([x], steps=1, precision=precision, show_progress=False)
        assert asked == [scaled]


def test_each_process_of_a_launch_has_its_own_gpu(monkeypatch):
    torch.set_default_device(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("cuda") == pick_device() == torch.device("cuda", 2)


def test_a_host_that_moved_takes_its_bottleneck_along(host, x, monkeypatch):
    torch.set_default_device(None)
    ib, moved = IBAttention(host, "stages.1").fit([x], steps=1, show_progress=False), []
    monkeypatch.setattr(ib.bottleneck, "to", moved.append)
    ib.attribute(x)
    assert moved == [torch.device("cpu")]

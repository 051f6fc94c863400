"""What the package creates has a device of its own: `torch.set_default_device("cuda")` must not move half of it.

The meta device stands in for a GPU: a tensor that lands there by accident holds no data, so whoever uses it fails.
"""

from __future__ import annotations

import pytest
import torch

import ib_explain as ibx
from ib_explain.data import Synthetic
from ib_explain.ib import IBAttention
from ib_explain.methods import METHODS
from ib_explain.metrics import METRICS
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

"""A host on another device than the CPU: nothing that the package makes stays behind, and all comes out alike."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import ib_explain as ibx
from ib_explain.ib import IBAttention
from ib_explain.methods import METHODS
from ib_explain.metrics import (
    METRICS,
    boxes_to_masks,
    cascading_randomisation,
    degradation,
    energy_inside,
    insertion,
    nss,
    road,
    target_sensitivity,
)
from tests.models import images, tiny
from tests.other_device import THERE, There, moved, other_device

FEW_PASSES = {
    "rise": {"masks": 8},
    "iba": {"steps": 2, "copies": 2},
    "ib": {"steps": 2},
    "gradient_shap": {"samples": 2},
    "integrated_gradients": {"steps": 4},
    "smooth_grad": {"samples": 2},
}


@pytest.fixture(autouse=True)
def there(monkeypatch):
    monkeypatch.setattr("ib_explain.stripes.host_device", lambda _model: torch.device("cpu"))  # it refuses meta
    with other_device():
        yield


def test_the_two_devices_do_not_meet():
    x = images(2)
    y = There(x)
    assert (y + 1).device == THERE and torch.equal((y + 1).cpu(), x + 1)
    for mixed in (lambda: y + x, lambda: y * torch.ones(24), lambda: torch.zeros(2, device=THERE) + torch.zeros(2)):
        with pytest.raises(RuntimeError, match="on the same device"):
            mixed()
    with pytest.raises(TypeError, match="NumPy"):
        y.numpy()


def made(kind):
    torch.manual_seed(0)
    if kind == "chain":
        layers = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 11 * 11, 5)]
        return nn.Sequential(*layers).eval()
    return timm.create_model("test_vit", img_size=48, num_classes=5).eval() if kind == "test_vit" else tiny(kind)


ON = {"lrp": "chain", "attention_rollout": "test_vit", "attention_gradient_rollout": "test_vit"}
TOKENS = [(name, "vit") for name in ("grad_cam", "ib", "iba", "br_npa", "saliency")]


@pytest.mark.parametrize(("name", "kind"), [*((name, ON.get(name, "cnn")) for name in sorted(METHODS)), *TOKENS])
def test_methods_give_the_maps_of_the_cpu(name, kind):
    x, options = images(2, size=48 if kind == "test_vit" else 24), FEW_PASSES.get(name, {})
    expected = ibx.attribute(made(kind), x, method=name, **options)
    maps = ibx.attribute(moved(made(kind)), There(x), method=name, **options)
    assert maps.device == THERE
    torch.testing.assert_close(maps.cpu(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("options", [{}, {"reads": "features"}, {"anchors": 4, "relevance": True}])
def test_a_fit_reads_batches_of_either_device_and_moves_between_them(tmp_path, options):
    host, x = tiny("cnn"), images(4)
    expected = IBAttention(host, "stages.1", **options).fit([x], steps=2, show_progress=False).attribute(x)
    elsewhere = moved(tiny("cnn"))
    fits = [
        IBAttention(elsewhere, "stages.1", **options).fit([data], steps=2, show_progress=False)
        for data in (x, There(x))
    ]
    for ib in fits:
        maps = ib.attribute(There(x))
        assert maps.device == THERE
        torch.testing.assert_close(maps.cpu(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    ib.save(tmp_path / "ib")
    for home, images_there in ((host, x), (elsewhere, There(x))):
        maps = IBAttention.load(tmp_path / "ib", home).attribute(images_there, target=[0, 1, 0, 1], refine=1)
        assert maps.device == images_there.device and torch.isfinite(maps).all()


def test_a_fit_goes_on_from_its_checkpoint(tmp_path):
    class Stopped(Exception):
        pass

    class Stops:
        def __iter__(self):
            yield from [x] * 5
            raise Stopped

    host, x = moved(tiny("cnn")), images(4)
    whole = IBAttention(host, "stages.1").fit([x] * 8, steps=6, show_progress=False)
    with pytest.raises(Stopped):
        IBAttention(host, "stages.1").fit(Stops(), steps=6, checkpoint=tmp_path / "run", every=2, show_progress=False)
    resumed = IBAttention(host, "stages.1").fit(
        [x] * 8, steps=6, checkpoint=tmp_path / "run", every=2, resume=True, show_progress=False
    )
    assert torch.equal(resumed.attribute(There(x)).cpu(), whole.attribute(There(x)).cpu())


def test_restrict_and_information():
    host, x = moved(tiny("cnn")), There(images(2))
    ib = IBAttention(host, "stages.1").fit([images(4)], steps=1, show_progress=False)
    assert ib.information(x).device == THERE
    with ib.restrict() as restricted:
        assert restricted(x).device == THERE


# A list as an index becomes a tensor without torch's dispatch: the last ones would fail here and on no GPU.
SPARED = {"model_randomisation", "time", "memory", "consistency_patch", "consistency_high_frequency"}
OF_TRUTHS = ["energy_inside", "best_iou", "cc", "nss", "auc_shuffled", "information_gain"]


@pytest.mark.parametrize("batch_is", ["here", "there"])
def test_a_benchmark(batch_is, tmp_path):
    x, points = images(2), torch.tensor([[3.0, 4.0], [8.0, 9.0]])
    batch = {"image": x, "mask": x[:, :1] > 0, "density": x[:, :1].abs(), "fixations": [points] * 2}
    metrics = [name for name in METRICS if name not in SPARED] if batch_is == "here" else OF_TRUTHS
    options = {"methods": ["grad_cam", "random"], "metrics": metrics, "show_progress": False}
    expected = ibx.benchmark(tiny("cnn"), [batch], **options).summary.cells
    if batch_is == "there":
        batch = {name: There(value) if name != "fixations" else [There(points)] * 2 for name, value in batch.items()}
    found = ibx.benchmark(moved(tiny("cnn")), [batch], out=tmp_path / "run", **options).summary.cells
    for key, cell in found.items():
        assert cell.status == expected[key].status != "failed", (key, cell.reason)
        if key[1] != "backward_passes":  # counted, then divided by a measured time
            assert cell.mean == pytest.approx(expected[key].mean, rel=1e-3, abs=1e-4, nan_ok=True), key


def test_truths_of_the_cpu_go_to_the_maps():
    maps, mask, points = There(images(2)[:, :1]), images(2)[:, :1] > 0, [torch.tensor([[3.0, 4.0]])] * 2
    for scores, expected in (
        (energy_inside(maps, mask), energy_inside(maps.cpu(), mask)),
        (nss(maps, points), nss(maps.cpu(), points)),
    ):
        assert scores.device == THERE and torch.equal(scores.cpu(), expected)


def test_what_belongs_together_is_in_one_place():
    host, x = moved(tiny("cnn")), There(images(2))
    for measure in (insertion, degradation, road):
        curve = measure(host, x, x.mean(dim=1, keepdim=True))
        assert curve.fractions.device == curve.scores.device == curve.auc.device == THERE
    boxes = torch.tensor([[1.0, 2.0, 9.0, 12.0], [0.0, 0.0, 4.0, 4.0]])
    masks = boxes_to_masks(There(boxes), (24, 24))
    assert masks.device == THERE and torch.equal(masks.cpu(), boxes_to_masks(boxes, (24, 24)))


def test_sanity():
    host, x = moved(tiny("cnn")), There(images(2))

    def explain(model, images, target):
        return ibx.attribute(model, images, target=target, method="grad_cam")

    assert cascading_randomisation(host, x, explain).rank_correlation.device == THERE
    assert target_sensitivity(host, x, explain).change.device == THERE


def test_a_method_of_the_users_that_answers_from_the_cpu():
    host, x = moved(tiny("cnn")), There(images(2))
    assert ibx.attribute(host, x, method=lambda _model, images, _target: images.cpu().mean(1)).device == THERE


def test_images_of_the_wrong_device_are_told():
    with pytest.raises(ValueError, match="x is on cpu but the model is on meta; move it with"):
        ibx.attribute(moved(tiny("cnn")), images(2))

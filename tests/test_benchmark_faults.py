"""What a benchmark does when a method fails, and what it says of mistakes."""

from __future__ import annotations

import copy
import sys

import pytest
import timm
import torch
from torch import nn

import ib_explain as ibx
from ib_explain import benchmark as run_benchmark
from ib_explain.data.boxes import BoxBatch
from ib_explain.figures import LIGHT, Plot
from ib_explain.guard import HostChanged
from ib_explain.ib import IBAttention
from ib_explain.methods.base import NotApplicable
from ib_explain.pictures import Pictures
from tests.benchmarking import batches, half_masks, measure, values
from tests.models import images, tiny
from tests.reporting import png


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(sys.modules["ib_explain.benchmark"], "draw_pictures", lambda *_: Pictures())
    monkeypatch.setattr(Plot, "png", lambda self, theme=LIGHT, **options: png())


def test_a_method_that_fails_on_a_batch_costs_that_cell_with_its_reason(host, x):
    def fails_on_one(model, images, target):
        if torch.equal(images[0], x[2]):
            raise RuntimeError("no map\nfor this one")
        return images.abs().mean(1)

    def with_nan(model, images, target):
        return images.mean(1).log()

    def wrong_shape(model, images, target):
        return images[:1]

    def not_here(model, images, target):
        raise NotApplicable("this model has no attention")

    board = measure(
        host, batches(x), [fails_on_one, with_nan, wrong_shape, not_here, "edges"], ["insertion", "deletion"]
    )
    cells = board.summary.cells
    assert cells["fails_on_one", "insertion"].n == 4 and cells["fails_on_one", "insertion"].failed == 2
    assert cells["fails_on_one", "insertion"].reason == "RuntimeError: no map for this one"
    assert cells["with_nan", "insertion"].failed == 6 and "finite" in cells["with_nan", "insertion"].reason
    assert cells["wrong_shape", "insertion"].failed == 6
    assert "one map for each of the 2 images" in cells["wrong_shape", "insertion"].reason
    assert cells["not_here", "deletion"].status == "not_applicable"
    assert cells["not_here", "deletion"].reason == "this model has no attention"
    assert cells["edges", "insertion"].n == 6


def test_a_metric_that_fails_costs_its_own_cell(host, x):
    fitted = IBAttention(host, "stages.1").fit([x], steps=1, show_progress=False)
    board = measure(host, [x[:2]], [fitted, "edges"], ["infidelity", "model_randomisation", "sparsity_max_over_mean"])
    cell = board.summary.cells["ib_fitted", "model_randomisation"]  # which explains a copy with other weights
    assert cell.status == "not_applicable" and "made for another model" in cell.reason
    assert board.summary.cells["ib_fitted", "infidelity"].n == 2


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError("full"), torch.cuda.OutOfMemoryError("CUDA out of memory")]
)
def test_interruption_and_lack_of_memory_are_not_swallowed(host, x, tmp_path, error):
    calls = []

    def method(model, images, target):
        calls.append(1)
        if len(calls) > 1:
            raise error
        return images.mean(1)

    with pytest.raises(type(error)):
        measure(host, batches(x), [method], out=tmp_path / "run")
    assert len(ibx.Leaderboard.read(tmp_path / "run").rows) == 2  # finished work is kept


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"methods": ["gradcam"]}, ValueError, "unknown method 'gradcam'; did you mean 'grad_cam'"),
        ({"methods": []}, ValueError, "at least one method"),
        ({"methods": "grad_cam"}, TypeError, r"write \['grad_cam'\]"),
        ({"methods": [("grad_cam", {"rule": 1})]}, TypeError, "no option 'rule'; did you mean 'relu'"),
        ({"methods": [("grad_cam", 1)]}, TypeError, "must be .method, dict of options."),
        ({"methods": [3]}, TypeError, "got int"),
        ({"methods": {"a\nb": "edges"}}, ValueError, "a method's name must be on one line"),
        ({"methods": {"": "edges"}}, ValueError, "a method's name must be on one line, got ''"),
        ({"methods": [("grad_cam", {"layer": "nope"})]}, ValueError, "TinyCNN has no layer 'nope'"),
        ({"layer": "stage.1"}, ValueError, "TinyCNN has no layer 'stage.1'; did you mean 'stages.1'"),
        ({"layer": 3}, TypeError, "layer must be a dotted name, a module of the model or None, got int"),
        ({"metrics": [3]}, TypeError, "the name of a metric must be a str, got 3"),
        ({"seed": "a"}, TypeError, "seed must be an integer, got 'a'"),
        (
            {"data": [{"image": images(3), "name": ["a", "b"]}]},
            ValueError,
            "batch 0 of the data must hold 3 names, got 2",
        ),
        ({"data": [{"image": images(3), "name": "abc"}]}, ValueError, "batch 0 of the data must hold 3 names, got 1"),
        ({"data": [{"image": images(1), "density": -torch.ones(1, 24, 24)}]}, ValueError, "density must be finite and"),
        ({"metrics": ["insertions"]}, ValueError, "unknown metric 'insertions'; did you mean 'insertion'"),
        ({"metrics": "insertion"}, TypeError, r"write \['insertion'\]"),
        ({"metrics": []}, ValueError, "at least one name"),
        ({"metrics": ["energy_inside"]}, ValueError, "needs masks, which the data does not have; it holds images, lab"),
        ({"metrics": ["nss"]}, ValueError, "needs fixations, which the data does not have"),
        ({"metrics": ["auc_shuffled"]}, ValueError, "needs fixations, which"),
        ({"reference": "edgy"}, ValueError, "reference must be one of the methods, got 'edgy'; did you mean 'edges'"),
        ({"reference": 5}, ValueError, "reference must be one of the methods, got 5"),
        ({"names": 5}, TypeError, "names must be a list of one name for each image, got 5"),
        ({"out": 5}, TypeError, "out must be the path of a folder, got 5"),
        ({"batch_size": 2**63}, ValueError, "batch_size must be an integer >= 1, got 9223372036854775808"),
        ({"target": "labels"}, ValueError, "unknown target 'labels'; did you mean 'label'"),
        ({"images": 0}, ValueError, "images must be an integer >= 1"),
        ({"data": []}, ValueError, "data yielded no batch"),
        ({"data": torch.zeros(2, 3, 24, 24)}, TypeError, "iterable of batches, got Tensor"),
        ({"data": [{"pixels": 1}]}, TypeError, "batch 0 of the data must be images.* got keys 'pixels'"),
        (
            {"data": [(images(2), torch.tensor([0, 5]))]},
            IndexError,
            "label 5 of 'image 1' is out of range .* 5 classes",
        ),
        ({"data": [images(2)], "target": "label"}, ValueError, "target='label' needs labels"),
        ({"data": [images(2), images(2, size=32)]}, ValueError, "images must be of one size, got .* in batch 1"),
        (
            {"data": [BoxBatch(images(1), torch.zeros(1).long(), [torch.tensor([[0.0, 0, 30, 3]])])]},
            ValueError,
            "inside",
        ),
        ({"data": [{"image": images(2), "mask": torch.ones(2, 1, 24, 24)}]}, ValueError, "masks must be a bool tensor"),
        (
            {"data": [{"image": images(1), "fixations": [torch.tensor([[1.0, 24.0]])]}]},
            ValueError,
            "fixations must lie",
        ),
        ({"data": [images(2)], "names": ["only one"]}, ValueError, "one name for each image"),
    ],
)
def test_mistakes(host, x, change, kind, message):
    given = {"data": batches(x), "methods": ["edges"], "metrics": ["insertion"], **change}
    with pytest.raises(kind, match=message):
        run_benchmark(host, given.pop("data"), show_progress=False, **given)


def test_a_method_that_writes_into_what_it_is_given_changes_nothing_for_others(host, x):
    def clamps(model, x, target):
        x.clamp_(min=0)
        target.zero_()
        return x.sum(1)

    data = [x.clone()]
    alone = values(measure(host, data, ["grad_cam"], ["insertion"]), "grad_cam", "insertion")
    board = measure(host, data, [clamps, "grad_cam"], ["insertion"])
    assert torch.equal(values(board, "grad_cam", "insertion"), alone)
    assert torch.equal(data[0], x)


@pytest.mark.parametrize("shape", [(24, 24, 3), (1, 12, 24)])
def test_maps_of_other_axes_are_refused(host, x, shape):
    board = measure(host, [x], {"odd": lambda model, x, target: torch.rand(len(x), *shape)})
    assert {row.status for row in board.rows} == {"failed"}
    assert "the method must return (B, 1, 24, 24), or a coarser grid of these proportions" in board.rows[0].reason


def test_labels_of_several_classes_are_told_with_the_way_out(host, x):
    with pytest.raises(ValueError, match="where there is no one class, yield the images alone"):
        measure(host, [(x, torch.zeros(len(x), 5))])
    with pytest.raises(TypeError, match="metrics must be a list of names, got dict"):
        measure(host, [x], metrics={"mine": "insertion"})


def test_a_drawing_that_fails_costs_no_table(host, x, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(sys.modules["ib_explain.benchmark"], "draw_pictures", fails)
    with pytest.raises(RuntimeError, match="no font"):
        measure(host, [x], out=tmp_path / "run")
    assert (tmp_path / "run" / "summary.md").is_file() and (tmp_path / "run" / "summary.csv").is_file()


def test_a_bottleneck_of_another_host_is_refused(host, x):
    other = IBAttention(tiny(seed=1), "stages.1").fit([x], steps=1, show_progress=False)
    with pytest.raises(ValueError, match="belongs to another TinyCNN, not to this TinyCNN"):
        measure(host, [x], [other])


def test_masks_that_end_are_a_mistake_in_the_data(host, x, tmp_path):
    data = [{"image": x[:2], "mask": half_masks(2)}, {"image": x[2:4]}]
    with pytest.raises(ValueError, match="batch 1 of the data has no masks, the first batch has"):
        measure(host, data, metrics=["energy_inside"], out=tmp_path)
    assert len(ibx.Leaderboard.read(tmp_path).rows) == 2


def test_a_method_that_trains_the_host_changes_nothing_for_others(x):
    host = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    host = host.append(nn.Linear(4, 5)).eval()
    before = {name: value.clone() for name, value in host.state_dict().items()}

    def careless(model, images, target):
        model.train()
        model(images)
        return images.abs().mean(1)

    board = measure(host, batches(x), [careless, "edges"], ["deletion"])
    alone = measure(host, batches(x), ["edges"], ["deletion"])
    assert torch.equal(values(board, "edges", "deletion"), values(alone, "edges", "deletion"))
    ibx.attribute(host, x, method=careless)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    assert not any(module.training for module in host.modules())

    def destructive(model, images, target):
        with torch.no_grad():
            model[5].weight.mul_(0.5)
        return images.abs().mean(1)

    with pytest.raises(HostChanged, match=r"the method changed the model.s weights"):
        measure(host, batches(x), ["edges", destructive], ["deletion"])


def test_one_batch_instead_of_a_list_of_them(host, x):
    for data, hint in (((x, torch.zeros(6).long()), r"write \[\(x, y\)\]"), (x, r"is \[x\]"), ([x, [0] * 6], "write")):
        with pytest.raises(TypeError, match=rf"data must be .*{hint}"):
            measure(host, data, ["edges"], ["deletion"])


def test_a_run_that_measured_nothing_does_not_hold_its_folder(host, x, tmp_path):
    def slow(model, images, target):
        raise MemoryError

    with pytest.raises(MemoryError):
        measure(host, batches(x), [slow], ["deletion"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert measure(host, batches(x), ["edges"], ["deletion"], out=tmp_path / "run").summary.methods == ("edges",)
    (tmp_path / "mine").mkdir()
    with pytest.raises(MemoryError):
        measure(host, batches(x), [slow], ["deletion"], out=tmp_path / "mine")
    assert not any((tmp_path / "mine").iterdir())


def test_a_disk_that_is_full_at_the_first_batch_leaves_a_folder_to_go_on_with(host, x, tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr("ib_explain.results.rows_to_csv", full)
        measure(host, batches(x), ["edges"], ["insertion"], out=tmp_path / "run")
    assert measure(host, batches(x), ["edges"], ["insertion"], out=tmp_path / "run").summary.images == 6


def test_too_little_memory_at_a_size_is_no_refusal_of_the_size(x):
    host = timm.create_model("test_resnet", num_classes=5).eval()

    def starve(_module, inputs):
        if inputs[0].shape[-1] != 160 and inputs[0].requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    host.register_forward_pre_hook(starve)
    for door in (lambda: ibx.sites(host, (3, 64, 64)), lambda: measure(host, [x], ["grad_cam"], ["insertion"])):
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            door()


def test_a_stride_that_changed_between_two_methods_is_noticed(host, x):
    host = copy.deepcopy(host)
    ibx.attribute(host, x, method="grad_cam", layer="stages.1")
    host.stem.stride = (4, 4)
    board = measure(host, batches(x), {"cam": ("grad_cam", {"layer": "stages.1"})}, ["deletion"])
    assert board.summary.cells["cam", "deletion"].status == "ok"

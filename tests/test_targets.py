"""Classes in every form; the range is checked in the pass that makes the map, not in one of its own."""

import functools

import pytest
import timm
import torch

import ib_explain as ibx
from ib_explain.methods import METHODS
from ib_explain.targets import class_rows, resolve_target
from tests.models import images, tiny


def test_none_is_the_top_one():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    assert resolve_target(None, logits).tolist() == [1, 0]


def test_one_element_means_one_class_for_all():
    logits = torch.zeros(3, 4)
    for one in (2, -2, torch.tensor([2]), torch.tensor(2)):
        assert resolve_target(one, logits).tolist() == [2, 2, 2]


def test_class_rows_are_the_classifiers_or_fixed_codes():
    host = tiny()
    torch.testing.assert_close(class_rows(host, 5), host.fc.weight.detach())
    codes = class_rows(host, 7, seed=1)
    assert codes.shape == (7, 64) and torch.equal(codes, class_rows(host, 7, seed=1))


def test_a_given_target_costs_a_fitted_bottleneck_no_further_pass():
    host = tiny()
    ib = ibx.IBAttention(host).fit([images(8)], steps=1, show_progress=False)
    passes = []
    handle = host.register_forward_hook(lambda *_: passes.append(1))
    ibx.attribute(host, images(1), target=2, method=ib)
    handle.remove()
    assert len(passes) == 1
    with pytest.raises(IndexError, match="class 9 is out of range"):
        ibx.attribute(host, images(2), target=9, method=ib)


@functools.cache
def transformer():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5).eval()


def passes(method, target):
    """Forward passes of the host, called as a whole, that one `attribute` takes."""
    host, x = transformer(), images(2, size=64)
    options = {"layer": "blocks.1", "steps": 2, "copies": 2} if method in ("ib", "iba") else {}
    counted = []
    ibx.attribute(host, x, method=method, **options)  # layers and statistics are found and remembered
    handle = host.register_forward_hook(lambda *_: counted.append(1))
    try:
        ibx.attribute(host, x, target=target, method=method, **options)
    finally:
        handle.remove()
    return len(counted)


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp", "hires_cam", "layer_cam"])
def test_a_gradient_cam_takes_one_pass_whatever_the_target(method):
    assert passes(method, None) == passes(method, 2) == passes(method, [2, -1]) == 1


@pytest.mark.parametrize("method", [name for name in METHODS if getattr(METHODS.get(name), "resolves_target", False)])
def test_who_resolves_the_target_himself_pays_nothing_for_it_and_checks_its_range(method):
    assert passes(method, 2) == passes(method, None)
    with pytest.raises(IndexError, match="class 9 is out of range for a model with 5 classes"):
        passes(method, 9)

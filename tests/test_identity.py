"""By what a resumed run knows that a method or a metric is the same: code, what it holds, and nothing of its use."""

from __future__ import annotations

import functools
import json
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import DeepLift, FeatureAblation, GuidedBackprop, Occlusion
from torch import nn

import ib_explain as ibx
from ib_explain.identity import Identity
from ib_explain.metrics import METRICS, register_metric
from tests.benchmarking import measure
from tests.models import images, tiny


class Net(nn.Module):
    def __init__(self, scale, k=1):
        super().__init__()
        self.k = k
        self.inner = nn.Linear(2, 2, bias=False)
        nn.init.constant_(self.inner.weight, scale)

    def forward(self, model, x, target):
        return x.mean(1) * self.inner.weight.sum() * self.k


class Holder:
    def __init__(self, held):
        self.held = held

    def explain(self, model, x, target):
        return x.mean(1)


def with_default(sign):
    def mine(model, x, target, sign=sign):
        return sign * x.mean(1)

    return mine


def with_keyword_default(sign):
    def mine(model, x, target, *, sign=sign):
        return sign * x.mean(1)

    return mine


def closing_over(value):
    return lambda model, x, target: x.mean(1) * (value is not None)


KINDS = {
    "default": with_default,
    "keyword default": with_keyword_default,
    "bound method": lambda value: Holder(value).explain,
    "array": lambda value: closing_over(np.full(3, value)),
    "array of objects": lambda value: closing_over(np.array([value, None], dtype=object)),
    "NumPy number": lambda value: closing_over(np.float32(value)),
    "complex tensor": lambda value: closing_over(torch.tensor([1 + value * 1j])),
    "weights of a part": Net,
    "a module's own value": lambda value: Net(1, value),
    "module in a closure": lambda value: closing_over(Net(value)),
    "function in a closure": lambda value: closing_over(with_default(value)),
    "partial in a closure": lambda value: closing_over(functools.partial(with_default, value)),
    "object in an object": lambda value: Holder(Holder([value])).explain,
    "namespace": lambda value: closing_over(types.SimpleNamespace(value=value)),
    "path": lambda value: closing_over(Path(f"{value}.csv")),
    "long list": lambda value: closing_over([value] * 2000),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_code_holds_is_a_part_of_it(kind):
    of = Identity(tiny())
    told = [json.dumps(of.code(KINDS[kind](value)), allow_nan=False) for value in (1.0, 1.0, 2.0)]
    assert told[0] == told[1] != told[2]
    assert len(told[0]) < 2000


def test_sets_have_one_order_and_what_holds_itself_ends():
    of = Identity(tiny())
    assert of.value({"b", "a"}) == ["a", "b"]
    one = Holder(None)
    one.held = [one, {"again": one}]
    told = json.dumps(of.value(one))
    other = Holder(None)
    other.held = [other, {"again": other}]
    assert told == json.dumps(Identity(tiny()).value(other))
    assert of.code((1).__add__) == {"method": "None.int.__add__"}
    assert of.value(threading.Lock()) == "_thread.lock" and of.value(np) == "numpy"


def test_the_model_and_its_parts_are_known_already():
    host = tiny()
    of = Identity(host)
    assert of.value(host) == of.value(nn.DataParallel(host)) == "the model"
    assert of.value(host.stages) == "the model's stages"


def test_a_bottleneck_inside_of_an_object_is_known_by_its_weights():
    host = tiny()
    fits = [
        ibx.IBAttention(host, "stages.1", seed=seed).fit([images(8)], steps=1, show_progress=False)
        for seed in (0, 0, 1)
    ]
    told = [Identity(host).value(Holder(ib)) for ib in fits]
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize("make", [Occlusion, FeatureAblation, DeepLift, GuidedBackprop])
@pytest.mark.filterwarnings("ignore")
def test_a_captum_object_is_the_same_after_its_use(make, tmp_path):
    host, x = tiny(), images(2)
    host.act = nn.ReLU()
    for stage in host.stages:
        stage.act = nn.ReLU()
    options = {"sliding_window_shapes": (3, 8, 8), "strides": (3, 8, 8)} if make is Occlusion else {}
    method = make(host)
    first = measure(host, [x], [(method, options)], ["deletion"], out=tmp_path)
    again = measure(host, [x], [(method, options)], ["deletion"], out=tmp_path)
    assert [row.status for row in first.rows] == ["ok", "ok"] and first.rows == again.rows


def test_another_version_of_a_method_or_metric_of_a_users_is_not_the_stored_one(tmp_path, monkeypatch):
    host, x = tiny(), images(2)
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))

    def register(factor):
        METRICS._entries.pop("mine", None)

        @register_metric("mine", family="perturbation", unit="1", higher_is_better=True)
        def mine(case):
            return torch.full((len(case.x),), float(factor))

    for factor in (1, 1):
        register(factor)
        measure(host, [x], ["edges"], ["mine"], out=tmp_path / "metric")
    register(7)
    with pytest.raises(ValueError, match=r"holds another run: metrics\.mine\.code\.closure"):
        measure(host, [x], ["edges"], ["mine"], out=tmp_path / "metric")
    with pytest.raises(ValueError, match=r"holds another run"):
        for masks in (8, 16):
            measure(host, [x], {"rise": ("rise", {"masks": np.int64(masks)})}, ["deletion"], out=tmp_path / "option")


def test_unfitted_bottlenecks_of_other_options_are_others(tmp_path):
    host, x = tiny(), images(2)
    measure(host, [x], {"ib": ibx.IBAttention(host, "stages.1")}, ["deletion"], out=tmp_path)
    for options in ({"per_element": True}, {"anchors": 4}, {"relevance": True}):
        with pytest.raises(ValueError, match="holds another run: methods.ib"):
            measure(host, [x], {"ib": ibx.IBAttention(host, "stages.1", **options)}, ["deletion"], out=tmp_path)

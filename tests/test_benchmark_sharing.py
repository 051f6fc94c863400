"""What methods and metrics of a benchmark share, and what none of them can spoil for the others."""

from __future__ import annotations

import sys

import pytest
import torch

from ib_explain.methods import NotApplicable
from ib_explain.metrics import METRICS, register_metric, sanity
from ib_explain.pictures import Pictures
from tests.benchmarking import measure, values
from tests.models import tiny


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr(sys.modules["ib_explain.benchmark"], "draw_pictures", lambda *_: Pictures())


def test_what_several_methods_and_metrics_share_is_scored_once(host, x):
    rows = []
    handle = host.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        measure(host, [x], ["constant", "edges"], ["insertion", "ic", "deletion"])
    finally:
        handle.remove()
    # One image to see the classes; intact, blurred, zeros; and for both methods the two points inside of two curves.
    assert sum(rows) == 1 + 3 * 6 + 2 * 2 * 2 * 6


def test_perturbations_that_no_map_enters_are_scored_once_for_all_methods(host, x):
    def run(methods):
        rows = []
        handle = host.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        try:
            return measure(host, [x], methods, ["sensitivity_n", "infidelity"], batch_size=4), sum(rows)
        finally:
            handle.remove()

    (alone, least), (together, rows) = run(["edges"]), run(["random", "constant", "edges"])
    assert rows == least
    for metric in ("sensitivity_n", "infidelity"):
        assert torch.equal(values(alone, "edges", metric), values(together, "edges", metric))
        assert not torch.equal(values(together, "random", metric), values(together, "edges", metric))


def test_what_no_map_enters_is_asked_of_the_host_once(x):
    """Predictions of modified images, the runner-up, and a randomised copy whose layers are probed once."""
    host, metrics = tiny(), ["consistency_patch", "consistency_low_frequency", "target_sensitivity"]
    rows = []
    handle = host.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    measure(host, [x], ["random"], metrics=metrics)
    one = sum(rows)
    rows.clear()
    measure(host, [x], {name: ("random", {}) for name in "abcd"}, metrics=metrics)
    handle.remove()
    assert sum(rows) == one > 0


def test_a_randomised_host_is_made_once_for_all_methods_and_batches(host, x, monkeypatch):
    made = []
    original = sanity.randomised_twin
    monkeypatch.setattr(sanity, "randomised_twin", lambda *a: made.append(1) or original(*a))
    measure(host, [x[:2], x[2:4], x[4:]], ["grad_cam", "random"], metrics=["model_randomisation"])
    assert made == [1]


def test_a_metric_that_writes_into_its_maps_spoils_no_other(host, x, monkeypatch):
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))

    @register_metric("clobber", family="complexity", unit="u", higher_is_better=True, needs=("maps", "model"))
    def clobber(case):
        """Writes."""
        case.maps.zero_()
        return torch.zeros(len(case.maps))

    alone = measure(host, [x], ["random"], metrics=["insertion"])
    after = measure(host, [x], ["random"], metrics=["clobber", "insertion"])
    assert [row.value for row in after.rows if row.metric == "insertion"] == [row.value for row in alone.rows]


def test_errors_whose_text_is_blank_or_cannot_be_had_cost_their_cells(host, x):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    def blank(model, x, target):
        raise NotApplicable(" \n")

    def mute(model, x, target):
        raise Mute

    found = {row.method: (row.status, row.reason) for row in measure(host, [x], [blank, mute]).rows}
    assert found["blank"] == ("not_applicable", "not applicable")
    assert found["mute"] == ("failed", "Mute: (its text cannot be had: RuntimeError)")

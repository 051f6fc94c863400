"""The benchmark: that its rows are what methods and metrics say one by one, and where it keeps them."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from torch import nn
from torch.testing import assert_close

import ib_explain as ibx
from ib_explain.contenders import contenders_of
from ib_explain.data.gaze import GazeBatch
from ib_explain.figures import LIGHT, Plot
from ib_explain.ib import IBAttention
from ib_explain.methods import NotApplicable
from ib_explain.methods.grad_cam import GradCAM
from ib_explain.metrics import (
    METRICS,
    auc_shuffled,
    deletion,
    energy_inside,
    information_gain,
    insertion,
    other_fixations,
    register_metric,
    sparsity_max_over_mean,
)
from ib_explain.pictures import Pictures
from tests.benchmarking import batches, half_masks, measure, values
from tests.models import images, tiny
from tests.reporting import png

SANITY = ["model_randomisation"]

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request):
    """Spares tests that look at numbers the drawing."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(sys.modules["ib_explain.benchmark"], "draw_pictures", lambda *_: Pictures())
        monkeypatch.setattr(Plot, "png", lambda self, theme=LIGHT, **options: png())


@pytest.fixture
def drawn():
    """Asks for the pictures."""


# What comes out


def test_rows_are_what_methods_and_metrics_say_one_by_one(host, x):
    data = [{"image": part, "mask": half_masks(len(part))} for part in x.split(2)]
    board = measure(host, data, ["grad_cam", "edges"], ["insertion", "deletion", "energy_inside"])
    target = host(x).argmax(1)
    for method in ("grad_cam", "edges"):
        maps = ibx.attribute(host, x, target=target, method=method)
        curve = insertion(host, x, maps, target)
        assert_close(values(board, method, "insertion"), curve.auc)
        assert_close(values(board, method, "deletion"), deletion(host, x, maps, target).auc)
        assert_close(values(board, method, "energy_inside"), energy_inside(maps, half_masks(6)), equal_nan=True)
        stored = next(c for c in board.curves if (c.method, c.metric) == (method, "insertion"))
        assert_close(torch.from_numpy(stored.scores), curve.scores)
    assert board.summary.reference == "grad_cam" and len(board.rows) == 2 * 3 * 6
    assert [row.name for row in board.rows[::6]] == [f"image {i}" for i in range(6)]


def test_labels_are_explained_on_demand(host, x):
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    board = measure(host, batches(x, 4, labels), ["grad_cam"], ["insertion"], target="label")
    maps = ibx.attribute(host, x, target=labels, method="grad_cam")
    assert_close(values(board, "grad_cam", "insertion"), insertion(host, x, maps, labels).auc)


def test_gaze_has_the_fixations_of_all_other_images_and_the_centre_prior(host, x):
    points = [torch.rand(n, 2, generator=torch.Generator().manual_seed(n)) * 23 for n in (3, 5, 0, 2, 4, 6)]
    density = torch.rand(6, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    whole = GazeBatch(x, points, density, torch.zeros(6, dtype=torch.int64))
    data = [GazeBatch(*(field[i : i + 4] for field in whole)) for i in (0, 4)]
    board = measure(host, data, ["edges"], ["auc_shuffled", "information_gain", "cc"])
    maps = ibx.attribute(host, x, method="edges")
    expected = auc_shuffled(maps, points, other_fixations(points))
    assert_close(values(board, "edges", "auc_shuffled"), expected, equal_nan=True)
    gained = information_gain(maps, points)
    assert_close(values(board, "edges", "information_gain"), gained, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert board.run["settings"]["metrics"]["cc"]["truth"] == "density"  # the conventions are kept


def test_every_kind_of_method_takes_part(host, x):
    fitted = IBAttention(host, "stages.1").fit([x], steps=2, show_progress=False)

    def gradient_free(model, x, target):
        return x.mean(1)

    methods = [
        "grad_cam",
        ("grad_cam", {"relu": False, "layer": "stages.1"}),
        fitted,
        (fitted, {"output": "attention"}),
        Saliency(host),
        gradient_free,
        GradCAM(relu=False),
    ]
    with pytest.raises(ValueError, match="two methods are called 'grad_cam'"):
        contenders_of(methods, host)
    board = measure(host, [x[:2]], methods[:6])
    names = [
        *("grad_cam", "grad_cam(relu=False, layer=stages.1)", "ib_fitted", "ib_fitted(output=attention)"),
        *("Saliency", "gradient_free"),
    ]
    assert list(board.run["settings"]["methods"]) == names
    assert all(row.status == "ok" for row in board.rows)
    facts = board.run["settings"]["methods"]
    assert facts[names[1]] == {"method": "grad_cam", "relu": False, "layer": "stages.1"}
    assert len(facts["ib_fitted"]["weights"]) == 16 and facts["ib_fitted"]["layer"] == "stages.1"
    assert facts["gradient_free"]["method"].endswith("gradient_free")
    units = [contender.unit for contender in contenders_of(methods[:6], host)]
    assert units[0] == "gradient x feature" and units[2:4] == ["bits", "attention"] and "gradient_free" in units[5]
    expected = sparsity_max_over_mean(ibx.attribute(host, x[:2], method="grad_cam", layer="stages.1", relu=False))
    assert_close(values(board, names[1], "sparsity_max_over_mean"), expected, equal_nan=True)
    named = measure(host, [x[:2]], {"a": GradCAM(relu=False), "b": "grad_cam"}, reference="b")
    assert list(named.run["settings"]["methods"]) == ["a", "b"] and named.summary.reference == "b"


def test_one_layer_for_all_who_look_at_one(host, x):
    board = measure(host, [x[:2]], ["grad_cam", "random"], layer="stages.1")
    expected = sparsity_max_over_mean(ibx.attribute(host, x[:2], method="grad_cam", layer="stages.1"))
    assert_close(values(board, "grad_cam", "sparsity_max_over_mean"), expected, equal_nan=True)
    assert all(row.status == "ok" for row in board.rows) and board.run["settings"]["layer"] == "stages.1"


def test_cost_is_measured_once_and_by_arithmetic(host):
    board = measure(host, [images(10), images(4, seed=1)], ["grad_cam", "constant"], ["forward_passes", "time"])
    found = values(board, "grad_cam", "forward_passes")
    assert len(found) == 8 and 1 <= float(found[0]) < 1.05 and len(set(found.tolist())) == 1
    assert float(values(board, "constant", "forward_passes")[0]) == 0
    assert (values(board, "grad_cam", "time") > 0).all()
    assert all(cell.undefined == 0 for cell in board.summary.cells.values())


def test_batch_size_changes_no_number(host, x):
    whole, parts = (
        measure(host, [x], ["grad_cam", "random"], ["insertion", "infidelity"], batch_size=size) for size in (None, 4)
    )
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert a.key == b.key and abs(a.value - b.value) < 1e-5


def test_the_host_and_all_random_numbers_are_handed_back(x):
    host = tiny().train()
    host.fc.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    def noisy(model, x, target):
        assert not model.training
        return torch.rand(len(x), *x.shape[2:]) + np.random.rand()  # noqa: NPY002 - a user's old habits

    boards = [measure(host, batches(x), [noisy, "grad_cam"]) for _ in range(2)]
    assert [row.value for row in boards[0].rows] == [row.value for row in boards[1].rows]
    assert host.training and host.stages.training and not host.fc.weight.requires_grad
    assert host.stem.weight.requires_grad and host.stem.weight.grad is None
    assert_close(host.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_the_gpus_random_numbers_are_left_alone_by_a_host_on_the_cpu(x, monkeypatch):
    seeded, host = [], tiny()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    ibx.attribute(host, x, method="random", seed=7)
    IBAttention(host).fit([x], steps=1, show_progress=False)
    measure(host, [x], ["random"])
    assert not seeded


# Where it is kept


def test_an_object_whose_layer_is_settled_by_its_first_use_goes_on(host, x, tmp_path):
    ib = IBAttention(host)
    boards = [measure(host, [x], {"ib": ib}, out=tmp_path / "run") for _ in range(2)]
    assert [row.value for row in boards[0].rows] == [row.value for row in boards[1].rows]


def test_another_version_of_a_function_or_object_is_another_method(host, x, tmp_path):
    def scaled(model, x, target, k=1.0):
        return k * x.mean(1)

    def made(k):
        return lambda model, x, target: k * x.mean(1)

    class Mine:
        def __init__(self, k):
            self.k = k

        def attribute(self, inputs, target):
            return self.k * inputs.mean(1)

    for number, make in enumerate((lambda k: functools.partial(scaled, k=k), made, Mine)):
        out = tmp_path / str(number)
        measure(host, [x], {"mine": make(1.0)}, out=out)
        measure(host, [x], {"mine": make(1.0)}, out=out)
        with pytest.raises(ValueError, match=r"holds another run: methods\.mine\."):
            measure(host, [x], {"mine": make(-1.0)}, out=out)


def test_a_dataclass_of_a_users_is_a_function_by_its_three_arguments(host, x):
    @dataclass
    class Scaled:
        power: float = 1.0

        def __call__(self, model, x, target):
            return x.mean(1).abs() ** self.power

    assert torch.equal(ibx.attribute(host, x, method=Scaled(2.0)), x.mean(1, keepdim=True).abs() ** 2)
    board = measure(host, [x], [Scaled(2.0), GradCAM()])
    assert {row.status for row in board.rows} == {"ok"}
    assert set(board.summary.methods) == {"Scaled", "grad_cam"}


def test_a_metric_that_writes_into_what_it_is_given_spoils_nothing(host, x, monkeypatch):
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))

    @register_metric("dimmer", family="perturbation", unit="1", higher_is_better=True)
    def dimmer(case):
        case.maps.zero_()
        return case.x.mul_(0).sum(dim=(1, 2, 3))

    plain = measure(host, [x.clone()], ["edges", "random"], ["deletion"])
    given = x.clone()
    board = measure(host, [given], ["edges", "random"], ["dimmer", "deletion"])
    assert torch.equal(given, x)
    for method in ("edges", "random"):
        assert torch.equal(values(board, method, "deletion"), values(plain, method, "deletion"))


def test_the_reference_is_that_of_the_last_start(host, x, tmp_path):
    def board(**options):
        return measure(host, [x], ["edges", "random"], out=tmp_path / "run", **options)

    assert board(reference="edges").summary.reference == "edges"
    assert board(reference=None).summary.reference is None
    assert board(reference="random").summary.reference == "random"
    assert ibx.Leaderboard.read(tmp_path / "run").summary.reference == "random"
    assert ibx.Leaderboard.read(tmp_path / "run", reference=None).summary.reference is None


def test_a_name_that_is_no_text_is_drawn(host, x, drawn, tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    board = measure(host, [{"image": x[:2], "name": [name, "a\nb"]}], out=tmp_path / "run")
    assert {row.name for row in board.rows} == {r"\udcff\udcfe.png", "a b"}
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_folder_of_another_run_is_refused_and_left_alone(host, x, tmp_path):
    board = measure(host, batches(x), out=tmp_path / "run")
    assert {"run.json", "rows.csv", "summary.md", "report.html"} <= {p.name for p in (tmp_path / "run").iterdir()}
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for change, named in (
        ({"data": [*batches(x)[:-1], (x[-2:] + 1, batches(x)[-1][1])]}, "run: the images differ"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"methods": ["edges"]}, "method center_gaussian is only there"),
        ({"data": batches(x + 1)}, "images, labels or truths of the first batch differ"),
        ({"images": 4}, "data.images is 6 there and 4 here"),
        ({"host": tiny(seed=3)}, "the model's weights differ"),
    ):
        options = {"host": host, "data": batches(x), **change}
        with pytest.raises(ValueError, match=named):
            measure(options.pop("host"), options.pop("data"), out=tmp_path / "run", **options)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    again = measure(host, batches(x), out=tmp_path / "run", batch_size=1)  # which changes no number
    assert [row.value for row in again.rows] == [row.value for row in board.rows]
    assert again.run["info"]["versions"]["torch"] == torch.__version__ and len(again.run["resumed"]) == 1


SCRIPT = """
    import os, signal, sys
    import torch
    import ib_explain as ibx
    import ib_explain.benchmark
    from ib_explain.figures import Plot
    from ib_explain.pictures import Pictures
    from tests.models import images, tiny

    sys.modules["ib_explain.benchmark"].draw_pictures = lambda *_: Pictures()
    sys.modules["ib_explain.leaderboard"].plots = lambda *_: []
    sys.modules["ib_explain.leaderboard"].write_report = lambda *_, **options: None
    folder, kill_at = sys.argv[1], int(sys.argv[2])
    x = images(10)

    def method(model, part, target):
        with open(folder + ".log", "a") as log:
            print(next(i for i in range(10) if torch.equal(x[i], part[0])), file=log)
        if len(open(folder + ".log").readlines()) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return part.abs().mean(1)

    methods = ["grad_cam", "random", method]
    ibx.benchmark(tiny(), list(x.split(2)), methods=methods, metrics=["insertion", "infidelity"], out=folder)
"""


def run_script(tmp_path, folder, kill_at=0, launcher=()):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, *launcher, str(script), str(tmp_path / folder), str(kill_at)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_a_killed_run_resumes_and_several_processes_give_the_same_file(tmp_path):
    # All in processes of one thread: with other numbers of threads the last bits of the scores may differ.
    whole = run_script(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr
    assert "benchmark 30/30" in whole.stderr

    assert run_script(tmp_path, "killed", kill_at=3).returncode == -9
    half = (tmp_path / "killed" / "rows.csv").read_text().splitlines()
    assert len(half) == 1 + 2 * 2 * 3 * 2  # two batches of two images, three methods, two metrics
    again = run_script(tmp_path, "killed")
    assert again.returncode == 0, again.stderr
    assert "s left" in again.stderr
    # The third batch was begun twice; no finished one was done again.
    assert (tmp_path / "killed.log").read_text().split() == ["0", "2", "4", "4", "6", "8"]

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = run_script(tmp_path, "two", launcher=launcher)
    assert two.returncode == 0, two.stderr
    assert sorted((tmp_path / "two.log").read_text().split()) == ["0", "2", "4", "6", "8"]

    expected = (tmp_path / "whole" / "rows.csv").read_bytes()
    assert (tmp_path / "killed" / "rows.csv").read_bytes() == expected
    assert (tmp_path / "two" / "rows.csv").read_bytes() == expected
    summary = (tmp_path / "whole" / "summary.json").read_text()
    for folder in ("killed", "two"):
        assert (tmp_path / folder / "summary.json").read_text() == summary


# Pictures, front door, command line


def test_pictures_show_the_sheet_and_the_extremes(host, x, drawn):
    def fails(model, images, target):
        raise RuntimeError("never")

    data = x.sigmoid()  # in [0, 1]: no normalisation to undo
    board = measure(host, batches(data), ["grad_cam", "hires_cam", fails], ["insertion"])
    wanted = {(m, case.image) for m, (best, worst) in board.extremes().items() for case in [*best, *worst]}
    assert wanted and set(board.pictures.cases) == wanted and len(board.pictures.sheets) == 1
    sheet = board.pictures.sheets[0]
    assert "share one scale" in sheet.caption and "fails" not in sheet.alt and "grad_cam" in sheet.alt
    assert "grey" not in sheet.caption
    assert board.pictures.cases["grad_cam", board.extremes()["grad_cam"][0][0].image].size == (256, 128)
    normalised = measure(host, (batch for batch in batches(x)), ["grad_cam"], ["insertion"])
    assert "in grey" in normalised.pictures.sheets[0].caption
    assert {image for _, image in normalised.pictures.cases} <= {0, 1}  # the rest of the iterator is gone


def test_names_at_the_front_door_stay_functions():
    import ib_explain.benchmark
    import ib_explain.sites
    from ib_explain.visualize import overlay

    assert callable(ibx.sites) and callable(ibx.benchmark) and callable(ibx.visualize) and callable(overlay)
    assert ibx.benchmark.__module__ == "ib_explain.benchmark" and ibx.Leaderboard is ib_explain.Leaderboard
    assert {"insertion", "cc", "time"} <= set(ibx.available_metrics())


def test_an_object_of_captums_is_held_to_the_model_it_was_made_for(host):
    other, data = tiny("cnn"), [images(4)]
    with pytest.raises(ValueError, match="the given Saliency was made for another .*; make one for this very model"):
        measure(host, data, methods={"theirs": Saliency(other)})
    with pytest.raises(ValueError, match="was made for another"):
        ibx.attribute(host, data[0], method=Saliency(other))
    wrapped = torch.nn.Sequential(host, torch.nn.Softmax(dim=1))
    board = measure(host, data, methods={"own": Saliency(host), "wrapped": Saliency(wrapped)}, metrics=SANITY)
    # A host with other weights is another model: such objects answer for their own whatever they are given.
    assert {cell.status for cell in board.summary.cells.values()} == {"not_applicable"}


def test_functions_that_take_gradients_work_under_no_grad(host):
    def gradient(model, x, target):
        x = x.requires_grad_()
        return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0].abs().amax(1, keepdim=True)

    with torch.no_grad():
        board = measure(host, [images(2)], methods=[gradient, Saliency(host)], metrics=["sparsity_max_over_mean"])
        assert ibx.attribute(host, images(2), method=gradient).std() > 0
    assert {cell.status for cell in board.summary.cells.values()} == {"ok"}


def test_the_default_reference_is_a_grad_cam_under_whatever_name(host):
    for methods, expected in (
        ({"gc": "grad_cam", "flat": "constant"}, "gc"),
        (["constant", ("grad_cam", {"layer": "stages.1"})], "grad_cam(layer=stages.1)"),
        (["constant"], None),
    ):
        assert measure(host, [images(2)], methods).summary.reference == expected


def test_a_negative_seed_is_one(host):
    board = measure(host, [images(2)], ["random", "constant"], ["deletion"], seed=-1)
    assert board.summary.seed == -1 and board.summary.cells["random", "deletion"].n == 2


def test_metrics_take_no_options(host):
    with pytest.raises(TypeError, match=r"the name of a metric must be a str, got \("):
        measure(host, [images(2)], metrics=[("insertion", {"steps": 10})])


def test_how_much_of_a_map_is_tied_can_be_told(host):
    board = measure(host, [images(2)], ["constant", "random"], ["tied_share"])
    assert values(board, "constant", "tied_share").tolist() == [1, 1]
    assert values(board, "random", "tied_share").max() < 0.1


def test_other_truths_behind_the_first_batch_are_other_data(host, x, tmp_path):
    def data(label):
        return [(x, torch.zeros(len(x), dtype=torch.long)), (x, torch.full((len(x),), label))]

    measure(host, data(1), ["edges"], ["deletion"], out=tmp_path)
    with pytest.raises(ValueError, match="holds another run: the images"):
        measure(host, data(0), ["edges"], ["deletion"], out=tmp_path)


def test_a_weight_that_the_fingerprint_leaves_out_is_watched():
    big = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    def spoils(model, x, target):
        model[1].weight.data[:, 5] = 0
        return x.mean(1)

    with pytest.raises(RuntimeError, match="changed the model's weights"):
        ibx.attribute(big, torch.randn(2, 3, 16, 16), method=spoils)


def test_a_method_that_does_not_apply_to_some_images_is_told(host, x, tmp_path):
    def picky(model, images, target):
        if torch.equal(images, x):
            raise NotApplicable("not for these")
        return images.mean(1)

    board = measure(host, [x, x + 1], [picky, "edges"], ["deletion"], out=tmp_path)
    said = f"does not apply to {len(x)} of {2 * len(x)} images; the mean is over the others: not for these"
    assert said in board.table(width=200) and said in board.to_markdown()
    page = (tmp_path / "report.html").read_text()
    assert "Everything ran" not in page and "not for these" in page

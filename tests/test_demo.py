"""The demo in small: files, numbers, picture, and that it leaves other people's folders alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ib_explain.cli import main
from ib_explain.data.synthetic import Synthetic
from ib_explain.demo import DemoSettings, _measure, run_demo

TINY = DemoSettings(fit_images=64, steps=1, test_images=8, rows=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "ib-demo"
    return out, run_demo(out, settings=TINY)


def test_it_writes_what_it_says(made):
    out, text = made
    assert sorted(entry.name for entry in out.iterdir()) == ["bottleneck", "demo.json", "demo.png"]
    for name in ("demo.png", "demo.json", "bottleneck"):
        assert str(out / name) in text
    numbers = json.loads((out / "demo.json").read_text())
    methods = numbers["methods"]
    assert list(methods)[:3] == ["IB, fitted", "IB, per image", "Grad-CAM"]
    for name, found in methods.items():
        assert name in text and all(0 <= found[key] <= 1 for key in ("inside", "pointing", "top", "asked"))
    assert methods["centred Gaussian"]["asked"] == pytest.approx(0.5, abs=0.1)
    assert numbers["host"]["accuracy"] > 0.9 and f"{numbers['host']['accuracy']:.1%}" in text
    assert numbers["bottleneck"]["bits_an_image"] > 0


def test_the_picture_shows_every_panel_with_the_outline(made):
    pixels = np.asarray(Image.open(made[0] / "demo.png").convert("RGB"))
    assert pixels.shape[1] > 400 and pixels.shape[0] > 300
    assert pixels.reshape(-1, 3).std(axis=0).min() > 20


def test_the_measure_knows_right_from_wrong():
    singles = Synthetic(8, seed=3).batch(range(8))
    pairs = Synthetic(8, seed=3, pairs=True).batch(range(8))

    def truth(x, target):
        if not torch.equal(x, pairs.image):
            return singles.mask[: len(x)].float()
        asked = (pairs.label[:, 1] == target).long()  # which of the two
        return pairs.mask[torch.arange(len(x)), asked][:, None].float()

    right = _measure(truth, singles, pairs)
    assert right | {"milliseconds": 0} == {"inside": 1, "pointing": 1, "top": 1, "asked": 1, "milliseconds": 0}
    wrong = _measure(lambda x, target: 1 - truth(x, target), singles, pairs)
    assert wrong["inside"] == wrong["pointing"] == wrong["top"] == 0 and wrong["asked"] < 0.01
    silent = _measure(lambda x, target: torch.zeros(len(x), 1, 64, 64), singles, pairs)
    assert silent["inside"] == silent["pointing"] == silent["asked"] == 0


def test_a_second_demo_replaces_the_first_and_nothing_else(made, tmp_path, capsys):
    out, _ = made
    (out / "notes.txt").write_text("mine")
    run_demo(out, settings=TINY)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "demo.json").write_text("my own")
    with pytest.raises(ValueError, match="holds no demo but other files"):
        run_demo(tmp_path / "own", settings=TINY)
    shutil.rmtree(tmp_path / "own")
    (tmp_path / "thesis.tex").write_text("mine, too")
    capsys.readouterr()
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"ib-explain: {tmp_path} holds no demo but other files; name another folder or --overwrite\n"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_in_full_the_maps_find_the_evidence_better_than_chance_and_centre(tmp_path):
    run_demo(tmp_path / "ib-demo")
    numbers = json.loads((tmp_path / "ib-demo" / "demo.json").read_text())
    fitted, centre = numbers["methods"]["IB, fitted"], numbers["methods"]["centred Gaussian"]
    assert numbers["host"]["accuracy"] >= 0.97
    assert fitted["inside"] > 3 * max(centre["inside"], numbers["evidence_covers"])
    assert fitted["pointing"] > 0.7 and fitted["asked"] > 0.7

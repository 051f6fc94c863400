"""`ib-explain benchmark`: the data that it takes and what it refuses."""

from __future__ import annotations

import shutil

import torch

import ib_explain as ibx
from ib_explain.cli import main


def test_a_run_is_measured_reported_and_read_back(pictures, tmp_path, capsys):
    for name in "ab":
        shutil.copytree(pictures / "train" / name, tmp_path / "val" / name)
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("split,file,xmin,ymin,xmax,ymax\nval,a/0.png,3,4,30,40\nval,b/1.png,3,4,30,40\ntrain,c,0,0,1,1\n")
    words = ["benchmark", "test_resnet", "--input-size", "64", "--num-classes", "5", "--device", "cpu"]
    words += ["--data", str(tmp_path), "--split", "val", "--workers", "0", "--out", str(tmp_path / "out")]

    def run(*more, words=words):
        torch.manual_seed(0)  # the weights
        code = main([*words, *more])
        return code, capsys.readouterr()

    code, said = run("--boxes", str(boxes), "--methods", "grad_cam,edges", "--metrics", "insertion,energy_inside")
    assert code == 0, said.err
    assert "energy_inside" in said.out and "report.html" in said.out
    board = ibx.Leaderboard.read(tmp_path / "out")
    assert [row.name for row in board.rows[::4]] == ["a/0.png", "b/1.png"]  # those that have a box
    assert board.run["info"]["data"] == f"{tmp_path.name} val"
    assert f"{tmp_path.name} val" in (tmp_path / "out" / "report.html").read_text()
    for more, message in (
        (["--methods", "gradcam"], "did you mean 'grad_cam'"),
        (["--metrics", "energy_inside"], "needs masks, which the data does not have"),
        (["--gaze", str(tmp_path)], "or --gaze FOLDER; got both"),
        (["--boxes", str(tmp_path / "none.csv")], "no such table of boxes"),
        (["--bottleneck", str(tmp_path)], "no saved bottleneck"),
        (["--metrics", "insertion", "--methods", "edges"], "holds another run"),
    ):
        code, said = run(*more)
        assert code == 2 and message in said.err.splitlines()[-1], said.err
    code, said = run("--gaze", str(tmp_path), "--split", "val", words=words[:8])
    assert code == 2 and "--split goes with --data, not with --gaze" in said.err.splitlines()[-1]


def test_labels_of_some_of_the_classes_are_not_taken_for_the_models(host, pictures, tmp_path, fails):
    part = tmp_path / "part"
    for name in "de":
        shutil.copytree(pictures / "train" / name, part / name)
    words = ["benchmark", *host, "--data", part, "--target", "label", "--methods", "edges", "--out", tmp_path / "out"]
    told = fails(*words)
    assert told == "--target label needs a class folder for each of the model's 5 classes, got 2, d as class 0"


def test_a_benchmark_takes_the_bottleneck_once_named_or_not(bottleneck, host, pictures, tmp_path, capsys, fails):
    words = ["benchmark", *host, "--data", pictures, "--split", "train", "--metrics", "tied_share", "--workers", 0]
    named = [*words, "--bottleneck", bottleneck, "--methods", "edges,ib_fitted", "--out", tmp_path / "out"]
    assert main([str(word) for word in named]) == 0
    assert sorted(ibx.Leaderboard.read(tmp_path / "out").summary.methods) == ["edges", "ib_fitted"]
    capsys.readouterr()
    told = fails(*words, "--methods", "edges,ib_fitted", "--out", tmp_path / "other")
    assert told == "ib_fitted is the fitted bottleneck: give --bottleneck FOLDER"

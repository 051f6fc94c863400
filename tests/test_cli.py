"""The command line as a user meets it: what is printed, what is written, exit codes, one line for each mistake."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ib_explain as ibx
from ib_explain.cli import _parser, main
from ib_explain.commands.map_folder import plan_names
from ib_explain.hosts import class_names, load_host
from ib_explain.training import Trainer

MODEL = ["test_resnet", "--input-size", "64", "--num-classes", "5"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of the host, so that every call has the same one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("host") / "host.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def host(weights):
    return [*MODEL, "--checkpoint", str(weights), "--device", "cpu"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders with pictures: train/{a,b,c,d,e}/{0,1}.png."""
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for name in "abcde":
        (root / "train" / name).mkdir(parents=True)
        for number in range(2):
            pixels = noise.integers(0, 255, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def bottleneck(host, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "ib"
    options = ["--data", str(pictures), "--split", "train", "--steps", "2", "--batch-size", "4", "--workers", "0"]
    assert main(["fit", *host, *options, "--out", str(out)]) == 0
    return out


def fails(capsys, *words):
    """Run a command that is the user's mistake; return its one line."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "probing" not in line and "warning:" not in line]
    assert code == 2 and len(lines) == 1 and said.out == "", (code, said)
    assert lines[0].startswith("ib-explain: ")
    return lines[0].removeprefix("ib-explain: ")


def test_help_has_an_example_for_each_command_and_needs_no_torch():
    code = (
        "import sys; from ib_explain.cli import main\n"
        "try: main([{0!r}, '--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    for command in ("demo", "layers", "fit", "attribute", "benchmark"):
        script = code.format(command)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"\n  ib-explain {command}" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: COMMAND; see `ib-explain --help`"),
        (["explain"], "invalid choice: 'explain'"),
        (["layers"], "required: MODEL; see `ib-explain layers --help`"),
        (["layers", "test_resnet", "--inputsize", "3"], "unknown arguments: --inputsize; see"),
        (["layers", "test_resnet", "--input-size", "3by4"], "must be a side such as 224 or HxW such as 192x256"),
        (["attribute", "test_resnet", "x.jpg", "--seed", "-1"], "must be an integer >= 0, got '-1'"),
        (["attribute", "test_resnet", "x.jpg", "--batch-size", "0"], "must be an integer >= 1, got '0'"),
        (["layers", "resnet_18"], "unknown model 'resnet_18'; did you mean resnet18"),
        (["layers", "resnet18.nope_in1k"], "Invalid pretrained tag"),
        (["layers", "test_resnet", "--device", "abacus"], "no device 'abacus' here; there: cpu"),
        (["layers", "test_resnet", "--checkpoint", "nope.pt"], "no such checkpoint: nope.pt"),
        (["layers", *MODEL, "--layer", "layer9"], "has no layer 'layer9'; did you mean 'layer4'"),
        (["layers", *MODEL, "--layer", "fc"], "layer 'fc' has no spatial grid"),
        (["layers", "test_vit", "--input-size", "20"], "test_vit does not take inputs of 3x20x20"),
        (["layers", "test_vit", "--layer", "blocks.0.attn.attn_drop"], "'blocks.0.attn.attn_drop' does not run in one"),
        (["fit", *MODEL], "give --data ROOT"),
        (["fit", *MODEL, "--data", "nowhere"], "no such folder or tar file: nowhere"),
        (["attribute", *MODEL], "name images, or --data ROOT, got neither"),
        (["attribute", *MODEL, "x.jpg", "--data", "."], "name images, or --data ROOT, got both"),
        (["attribute", *MODEL, "x.jpg", "--method", "gradcam"], "did you mean 'grad_cam'"),
        (["attribute", *MODEL, "x.jpg", "--refine", "3"], "--refine starts from a fitted bottleneck"),
        (["attribute", *MODEL, "x.jpg", "--bottleneck", "nowhere"], "nowhere is no saved bottleneck"),
        (["attribute", *MODEL, "x.jpg", "--bottleneck", ".", "--layer", "layer1"], "leave --layer and --method out"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, said, capsys):
    assert said in fails(capsys, *words)


def test_options_that_contradict_each_other_are_refused(host, pictures, tmp_path, capsys):
    assert "got both; leave one out" in fails(capsys, "layers", *host, "--pretrained")
    picture = pictures / "train" / "a" / "0.png"
    assert "--split goes with --data" in fails(capsys, "attribute", *host, picture, "--split", "train")
    two = tmp_path / "two"
    for split in ("train", "val"):
        shutil.copytree(pictures / "train", two / split)
    line = fails(capsys, "fit", *host, "--data", two, "--out", tmp_path / "ib")
    assert line == f"{two} holds the splits train, val; say which with split (--split)"
    data = ["--data", pictures, "--split", "train"]
    small = ["--methods", "random", "--metrics", "tied_share"]
    assert "out must not lie in the folder of the data" in fails(
        capsys, "benchmark", *host, *data, *small, "--out", pictures / "train"
    )
    line = fails(capsys, "benchmark", *host, *data, *small, "--layer", "fc", "--out", tmp_path / "board")
    assert "layer 'fc' has no spatial grid" in line and not (tmp_path / "board").exists()


def test_a_checkpoint_that_does_not_fit_says_what_was_expected_and_what_came(weights, tmp_path, capsys):
    line = fails(capsys, "layers", "test_resnet", "--checkpoint", weights)
    assert "fc.weight must be (1000, 96), got (5, 96), and 1 more; try --num-classes 5" in line
    line = fails(capsys, "layers", "test_vit", "--checkpoint", weights)
    assert "does not fit test_vit: it lacks" in line and "and it has" in line
    (tmp_path / "text.safetensors").write_text("no weights at all")
    assert "cannot read checkpoint" in fails(capsys, "layers", *MODEL, "--checkpoint", tmp_path / "text.safetensors")
    for name, content in (
        ("table.csv", b"a,b\n1,2\n"),
        ("cut.pt", b""),
        ("picture.jpg", b"\xff\xd8\xff\xe0"),
        ("x.pkl", b"N."),
    ):
        (tmp_path / name).write_bytes(content)
        line = fails(capsys, "layers", *MODEL, "--checkpoint", tmp_path / name)
        assert line.endswith(f"{name}: it is neither safetensors nor a torch state dict")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "other.pt")
    assert "must hold named tensors" in fails(capsys, "layers", *MODEL, "--checkpoint", tmp_path / "other.pt")


def test_a_failure_that_is_nobodys_mistake_keeps_its_traceback(monkeypatch):
    import ib_explain.commands.layers

    def broken(_args):
        return torch.zeros(3).reshape(7)

    monkeypatch.setattr(ib_explain.commands.layers, "run", broken)
    with pytest.raises(RuntimeError):
        main(["layers", "test_resnet"])


def test_random_weights_are_said(capsys):
    assert main(["layers", *MODEL, "--layer", "layer3"]) == 0
    assert "warning: test_resnet has random weights" in capsys.readouterr().err


def test_layers_prints_and_writes_the_sites(host, tmp_path, capsys):
    file = tmp_path / "sites.csv"
    assert main(["layers", *host, "--out", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "layout", "grid", "channels", "depth", "leak", "effect"]
    default = [line.split()[0] for line in lines if line.endswith("default")]
    assert len(default) == 1
    with file.open() as stream:
        rows = {row["layer"]: row for row in csv.DictReader(stream)}
    assert rows[default[0]]["note"] == "default"
    assert (rows["layer3"]["height"], rows["layer3"]["channels"], rows["layer3"]["layout"]) == ("4", "192", "NCHW")
    assert "exists" in fails(capsys, "layers", *host, "--out", file)
    assert "is a folder; --out names the CSV file" in fails(
        capsys, "layers", *host, "--out", file.parent, "--overwrite"
    )


def test_fit_saves_a_bottleneck_and_does_not_replace_one(bottleneck, host, pictures, capsys):
    config = json.loads((bottleneck / "config.json").read_text())
    assert config["input_size"] == [3, 64, 64] and config["record"]["class_folders"] == list("abcde")
    assert not bottleneck.with_name("ib.checkpoint").exists()
    options = ["--data", pictures, "--split", "train", "--out", bottleneck]
    assert "exists; name another --out or --overwrite" in fails(capsys, "fit", *host, *options)
    assert "no split 'test'" in fails(
        capsys, "fit", *host, "--data", pictures, "--split", "test", "--out", bottleneck.with_name("other")
    )


def test_fit_resumes_only_what_was_interrupted(host, pictures, tmp_path, capsys):
    options = ["--data", pictures, "--split", "train", "--steps", 2, "--batch-size", 4, "--workers", 0]
    options += ["--out", tmp_path / "ib"]
    assert "nothing to resume" in fails(capsys, "fit", *host, *options, "--resume")
    (tmp_path / "ib.checkpoint").mkdir()
    (tmp_path / "ib.checkpoint" / "epoch90.pth").write_text("years of work")
    assert "holds other files (epoch90.pth)" in fails(capsys, "fit", *host, *options, "--overwrite")
    (tmp_path / "ib.checkpoint" / "epoch90.pth").unlink()
    assert "--resume continues it, --overwrite starts again" in fails(capsys, "fit", *host, *options)
    assert main([str(word) for word in ["fit", *host, *options, "--overwrite"]]) == 0
    assert (tmp_path / "ib" / "bottleneck.safetensors").is_file() and not (tmp_path / "ib.checkpoint").exists()


def test_a_fit_that_was_to_overwrite_is_resumed(bottleneck, host, pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "ib"
    shutil.copytree(bottleneck, out)
    words = ["fit", *host, "--data", pictures, "--split", "train", "--steps", 12, "--batch-size", 4, "--workers", 0]
    words = [str(word) for word in [*words, "--out", out]]
    done = Trainer.step

    def stops(self, *batch):
        if self.step_number == 11:
            raise KeyboardInterrupt
        done(self, *batch)

    monkeypatch.setattr(Trainer, "step", stops)
    assert main([*words, "--overwrite"]) == 1
    assert "the same command with --resume" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "step", done)
    assert main([*words, "--resume"]) == 0
    assert json.loads((out / "config.json").read_text())["record"]["settings"]["steps"] == 12
    (out / "notes.md").write_text("mine")
    capsys.readouterr()
    assert "holds other files (notes.md); name another folder" in fails(capsys, *words, "--overwrite")


def test_attribute_does_the_readable_images_and_names_the_others(bottleneck, host, pictures, tmp_path, capsys):
    broken = tmp_path / "more" / "broken.png"
    broken.parent.mkdir()
    broken.write_bytes((pictures / "train" / "a" / "0.png").read_bytes()[:2000])
    out = tmp_path / "maps"
    words = ["attribute", *host, pictures / "train", "missing.jpg", "--bottleneck", bottleneck]
    words += [broken.parent, "--target", 3, "--workers", 0, "--out", out]
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    problems = [line for line in said.err.splitlines() if line.startswith("ib-explain: ")]
    assert len(problems) == 2 and "missing.jpg" in problems[0] and "cannot read image" in problems[1]
    assert "10 maps" in said.out
    with np.load(out / "b" / "1.npz") as raw:
        assert raw["map"].shape == (64, 64) and raw["map"].dtype == np.float32
        assert raw["bits"] == pytest.approx(raw["map"].sum(), rel=1e-4)
        assert raw["target"] == 3 and raw["target_name"] == "d" and raw["unit"] == "bits"
    assert Image.open(out / "b" / "1.png").width > 100 and (out / "sheet.png").is_file()
    with (out / "maps.csv").open() as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == [f"{c}/{i}" for c in "abcde" for i in range(2)]


def test_a_bottleneck_whose_save_was_killed_is_found(bottleneck, host, pictures, tmp_path):
    shutil.copytree(bottleneck, tmp_path / ".ib.set-aside")  # where the older one is between two renames
    words = ["attribute", *host, pictures / "train" / "a", "--bottleneck", tmp_path / "ib", "--workers", 0]
    assert main([str(word) for word in [*words, "--out", tmp_path / "maps"]]) == 0
    assert (tmp_path / "maps" / "0.npz").is_file()


def test_attribute_continues_the_same_command_and_refuses_another(host, pictures, tmp_path, capsys):
    out = tmp_path / "maps"
    words = ["attribute", *host, str(pictures / "train" / "a"), "--method", "grad_cam", "--out", str(out)]
    words += ["--workers", "0"]
    assert main([*words, "--limit", "1"]) == 0
    stamp = (out / "0.npz").stat().st_mtime_ns
    assert main(words) == 0
    assert "2 maps, 1 of them from before" in capsys.readouterr().out
    assert (out / "0.npz").stat().st_mtime_ns == stamp
    assert "maps of another command (target None, now 2)" in fails(capsys, *words, "--target", "2")
    assert main([*words, "--target", "2", "--overwrite"]) == 0
    with np.load(out / "0.npz") as raw:
        assert raw["target"] == 2 and raw["unit"] == "gradient x feature" and np.isnan(raw["bits"])


def test_attribute_knows_a_picture_by_its_content(host, pictures, tmp_path, capsys, monkeypatch):
    words = ["attribute", *host, "--method", "grad_cam", "--out", str(tmp_path / "maps"), "--workers", "0"]
    one, other = (str(pictures / "train" / name / "0.png") for name in "ab")
    assert main([*words, one]) == 0 and main([*words, one]) == 0
    assert "1 maps, 1 of them from before" in capsys.readouterr().out
    for before in ("", ", 1 of them from before"):  # another picture of the same name gets a name of its own
        assert main([*words, other]) == 0
        assert f"1 maps{before}\n" in capsys.readouterr().out
    for name, image in (("0", one), ("0-png", other)):
        with np.load(tmp_path / "maps" / f"{name}.npz") as raw:
            assert raw["image"] == image
    with (tmp_path / "maps" / "maps.csv").open() as stream:  # a line for every map of the folder
        assert {row["name"]: row["image"] for row in csv.DictReader(stream)} == {"0": one, "0-png": other}
    monkeypatch.chdir(pictures / "train")
    assert main([*words, "a/0.png"]) == 0  # by another path
    assert "1 maps, 1 of them from before" in capsys.readouterr().out
    pixels = np.asarray(Image.open(one)).copy()
    pixels[:8] = 0
    Image.fromarray(pixels).save(one)  # the same picture with another content is made again
    assert main([*words, one]) == 0 and "from before" not in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "maps").glob("*.npz")) == ["0-png.npz", "0.npz"]


def test_attribute_overwrites_its_own_maps_only(host, pictures, tmp_path, capsys):
    out = tmp_path / "project"
    (out / "data").mkdir(parents=True)
    (out / "run.json").write_text('{"experiment": 1}')
    np.savez(out / "data" / "features.npz", map=np.zeros(3))
    words = ["attribute", *host, str(pictures / "train" / "a"), "--method", "grad_cam", "--out", str(out)]
    words += ["--workers", "0"]
    assert "holds other files" in fails(capsys, *words)
    assert main([*words, "--overwrite", "--limit", "2"]) == 0
    assert main([*words, "--overwrite", "--limit", "1"]) == 0
    assert (out / "0.npz").is_file() and (out / "data" / "features.npz").is_file()
    assert not (out / "1.npz").exists() and not (out / "sheet.png").exists()
    capsys.readouterr()
    assert "99" in fails(capsys, *words, "--overwrite", "--target", "99")  # what is there stays until there is new
    assert (out / "0.npz").is_file() and (out / "maps.csv").is_file()


def test_attribute_does_not_read_its_own_pictures(host, pictures, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(pictures / "train" / "a", folder)
    words = ["attribute", *host, str(folder), "--method", "grad_cam", "--out", str(folder / "maps"), "--workers", "0"]
    assert main(words) == 0 and main(words) == 0
    assert sorted(path.name for path in (folder / "maps").glob("*.npz")) == ["0.npz", "1.npz"]
    assert not (folder / "maps" / "maps").exists()


def test_attribute_never_writes_over_the_images_themselves(host, pictures, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(pictures / "train" / "a", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = ["attribute", *host, str(folder), "--method", "grad_cam", "--out", str(folder), "--workers", "0"]
    told = fails(capsys, *words, "--overwrite")
    assert "0.png is one of the images and would be written over; name another --out" in told
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "0.png").rename(folder / "sheet.png")
    words[words.index(str(folder))] = str(folder / "sheet.png")
    assert "sheet.png is one of the images" in fails(capsys, *words, "--overwrite")


def test_results_do_not_go_among_the_pictures(host, pictures, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(pictures / "train", data)
    for words in (["fit", "--steps", 1], ["attribute", "--method", "edges"], ["benchmark", "--methods", "edges"]):
        told = fails(capsys, words[0], *host, "--data", data, "--out", data / "maps", *words[1:])
        assert told.startswith("out must not lie in the folder of the data, ")
    assert sorted(entry.name for entry in data.iterdir()) == list("abcde")


def test_maps_of_an_earlier_run_are_no_pictures_to_explain(host, pictures, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(pictures / "train" / "a", photos)
    words = ["attribute", *host, str(photos), "--method", "edges", "--workers", "0"]
    assert main([*words, "--out", str(photos / "maps")]) == 0
    assert main([*words, "--out", str(tmp_path / "others")]) == 0
    with (tmp_path / "others" / "maps.csv").open() as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == ["0", "1"]


def test_labels_of_some_of_the_classes_are_not_taken_for_the_models(host, pictures, tmp_path, capsys):
    part = tmp_path / "part"
    for name in "de":
        shutil.copytree(pictures / "train" / name, part / name)
    words = ["benchmark", *host, "--data", part, "--target", "label", "--methods", "edges", "--out", tmp_path / "out"]
    told = fails(capsys, *words)
    assert told == "--target label needs a class folder for each of the model's 5 classes, got 2, d as class 0"


def test_a_benchmark_takes_the_bottleneck_once_named_or_not(bottleneck, host, pictures, tmp_path, capsys):
    words = ["benchmark", *host, "--data", pictures, "--split", "train", "--metrics", "tied_share", "--workers", 0]
    named = [*words, "--bottleneck", bottleneck, "--methods", "edges,ib_fitted", "--out", tmp_path / "out"]
    assert main([str(word) for word in named]) == 0
    assert sorted(ibx.Leaderboard.read(tmp_path / "out").summary.methods) == ["edges", "ib_fitted"]
    capsys.readouterr()
    told = fails(capsys, *words, "--methods", "edges,ib_fitted", "--out", tmp_path / "other")
    assert told == "ib_fitted is the fitted bottleneck: give --bottleneck FOLDER"


def test_attribute_among_raw_files_of_others(host, pictures, tmp_path):
    """Pickled arrays, arrays of the image's own name, and files that are no archives."""
    out, image = tmp_path / "maps", str(pictures / "train" / "a" / "0.png")
    words = ["attribute", *host, image, "--method", "grad_cam", "--out", str(out), "--workers", "0"]
    out.mkdir()
    np.savez(out / "0.npz", digest=np.zeros(3))
    (out / "0.png").write_bytes(b"")
    assert main([*words, "--overwrite"]) == 0
    np.savez(out / "pickled.npz", map=np.array([{}], dtype=object))
    (out / "text.npz").write_text("no archive")
    (out / "empty.npz").write_bytes(b"")
    with (out / "plain.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert main([*words, "--overwrite", "--target", "3"]) == 0
    whole = (out / "0.npz").read_bytes()
    for damage in (b"", whole[:200], whole[:100] + bytes([whole[100] ^ 255]) + whole[101:]):
        (out / "0.npz").write_bytes(damage)
        assert main([*words, "--target", "3"]) == 0  # made again
        with np.load(out / "0.npz") as raw:
            assert raw["target"] == 3 and np.isfinite(raw["map"]).all()
    assert (out / "pickled.npz").is_file() and (out / "text.npz").is_file()


def test_attribute_leaves_a_folder_of_other_things_alone(host, pictures, capsys):
    line = fails(capsys, "attribute", *host, pictures / "train" / "a" / "0.png", "--out", pictures)
    assert "holds other files" in line
    assert sorted(entry.name for entry in pictures.iterdir()) == ["train"]


def test_attribute_reads_a_data_set_and_its_labels(bottleneck, host, pictures, tmp_path):
    words = ["attribute", *host, "--data", pictures, "--split", "train", "--limit", 3, "--bottleneck", bottleneck]
    assert main([str(word) for word in [*words, "--refine", 1, "--workers", 0, "--out", tmp_path / "maps"]]) == 0
    with (tmp_path / "maps" / "maps.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows] == ["0", "0", "1"]
    assert all(row["target_name"] in set("abcde") for row in rows)


def test_relevance_is_fitted_and_drawn_where_it_is_asked_for(bottleneck, host, pictures, tmp_path, capsys):
    options = ["--data", pictures, "--split", "train", "--workers", 0]
    fit = ["fit", *host, *options, "--steps", 2, "--batch-size", 4, "--relevance", "--out", tmp_path / "ib"]
    assert main([str(word) for word in fit]) == 0
    assert json.loads((tmp_path / "ib" / "config.json").read_text())["record"]["final_relevance_error"] > 0
    capsys.readouterr()
    words = ["attribute", *host, *options, "--limit", 2, "--output", "relevance", "--out", tmp_path / "maps"]
    assert "was fitted without --relevance" in fails(capsys, *words, "--bottleneck", bottleneck)
    assert "--output relevance is of a fitted bottleneck" in fails(capsys, *words)
    words += ["--bottleneck", tmp_path / "ib"]
    assert "leave one out" in fails(capsys, *words, "--refine", 2)
    assert "did you mean 'relevance'" in fails(capsys, *words, "--output", "relevanse")
    assert main([str(word) for word in words]) == 0
    assert "label bits per image" in capsys.readouterr().out
    with np.load(tmp_path / "maps" / "a" / "0.npz") as raw:
        assert raw["unit"] == "label bits" and raw["bits"] == pytest.approx(raw["map"].sum(), abs=1e-4)
    words[words.index("relevance")] = "bits"  # another command must not mix its maps with these
    assert "(output relevance, now bits)" in fails(capsys, *words)
    assert "--overwrite" in fails(capsys, *words)


def test_a_target_out_of_range_is_one_line(host, pictures, tmp_path, capsys):
    picture = pictures / "train" / "a" / "0.png"
    line = fails(capsys, "attribute", *host, picture, "--target", 7, "--out", tmp_path / "m", "--workers", 0)
    assert "target class 7 is out of range for a model with 5 classes" in line
    assert not (tmp_path / "m").exists()  # the right command can have the folder


def test_names_are_unique_and_stay_below_the_folder():
    sources = [
        ("a/x.jpg", "x.jpg"),
        ("a/x.png", "x.png"),
        ("b/x.jpg", "x.jpg"),
        ("c/x.jpg", "x.jpg"),
        ("s/y.jpg", "s/y.jpg"),
        ("sheet.jpg", "sheet.jpg"),
    ]
    names = plan_names([(Path(path), Path(below)) for path, below in sources])
    assert names == ["x", "x-png", "x-jpg", "x-2", "s/y", "sheet-jpg"]


def test_random_weights_are_the_same_in_every_run_and_nobodys_random_state_moves():
    before = torch.get_rng_state()
    one, again = (load_host("test_resnet", num_classes=5).state_dict() for _ in "12")
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_data_set_that_timm_cannot_open_is_one_line(host, tmp_path, capsys):
    for name in ("torch/cifar10", "nope/xx"):
        words = ["attribute", *host, "--dataset", name, "--out", tmp_path / "maps"]
        assert f"timm cannot open the data set '{name}'; does it need a root?" in fails(capsys, *words)


def test_a_fit_takes_the_training_images_of_a_named_data_set(host, tmp_path, capsys, monkeypatch):
    asked = []

    def create(name, root, split):
        asked.append(split)
        raise RuntimeError("no network")

    monkeypatch.setattr("timm.data.create_dataset", create)
    for words in (["fit"], ["fit", "--split", "part"], ["attribute"]):
        fails(capsys, words[0], *host, "--dataset", "hfds/some/pictures", *words[1:], "--out", tmp_path / "out")
    assert asked == ["train", "part", "validation"]


def test_a_model_from_a_local_folder_comes_with_its_weights(tmp_path):
    from timm.models import save_for_hf

    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=3)
    save_for_hf(
        model, tmp_path, model_config={"num_classes": 3, "label_names": ["x", "y", "z"]}, safe_serialization=True
    )
    found = load_host(f"local-dir:{tmp_path}", device="cpu")
    assert torch.equal(found.state_dict()["fc.weight"], model.state_dict()["fc.weight"]) and not found.training
    assert class_names(found) == ["x", "y", "z"]


def test_a_grey_model_with_a_normalisation_of_its_own(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(pixels + number).save(tmp_path / "pictures" / f"{number}.png")
    words = ["test_resnet", "--num-classes", "3", "--input-size", "32", "--in-chans", "1", "--device", "cpu"]
    normalised = ["--mean", ".4", "--std", ".3", "--workers", "0"]
    assert main(["layers", *words]) == 0
    fit = ["--data", str(tmp_path / "pictures"), "--steps", "2", "--batch-size", "3", "--out", str(tmp_path / "ib")]
    assert main(["fit", *words, *normalised, *fit]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "ib" / "config.json").read_text())
    assert config["input_size"] == [1, 32, 32] and config["data_config"] == {"mean": [0.4], "std": [0.3]}
    where = ["--bottleneck", str(tmp_path / "ib"), "--out", str(tmp_path / "maps"), str(tmp_path / "pictures")]
    assert main(["attribute", *words, *normalised, *where]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "maps").glob("*.npz"))) == 3
    capsys.readouterr()
    said = fails(capsys, "layers", *words[:-4], "--in-chans", "0")
    assert said.startswith("argument --in-chans: must be an integer >= 1")
    said = fails(capsys, "attribute", *words, "--mean", "a,b", *where)
    assert said.startswith("argument --mean: must be a number, or one a channel such as .5,.5,.5, got 'a,b'")
    assert "mean and std must hold 1 values" in fails(capsys, "attribute", *words, "--mean", "1,2", *where)


def test_a_gate_without_bits_says_none(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    words = ["test_resnet", "--num-classes", "3", "--input-size", "32", "--device", "cpu", "--workers", "0"]
    out = tmp_path / "an ib"
    (tmp_path / "pictures").mkdir()
    for name in ("one", "two"):
        Image.fromarray(pixels[:: 1 if name == "one" else -1]).save(tmp_path / "pictures" / f"{name}.png")
    fit = ["--data", str(tmp_path / "pictures"), "--steps", "2", "--batch-size", "2", "--layer", "layer1"]
    fit += ["--out", str(out)]
    assert main(["fit", *words, "--gate", "residual", *fit]) == 0
    said = capsys.readouterr().out
    assert "bits per image" not in said and "what passes keeps" in said
    assert f"--bottleneck '{out}' --output attention IMAGE" in said
    shown = ["attribute", *words, "--bottleneck", out, "--out", tmp_path / "maps", tmp_path / "pictures"]
    assert "has the gate 'residual', which measures no bits; give --output attention" in fails(capsys, *shown)
    assert main([str(word) for word in [*shown, "--output", "attention"]]) == 0


def test_run_as_a_module():
    command = [sys.executable, "-m", "ib_explain", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("ib-explain ")


def test_names_of_classes():
    host = timm.create_model("test_resnet")
    assert class_names(host) is None
    assert class_names(host, imagenet=True)[281] == "tabby"
    small = timm.create_model("test_resnet", num_classes=2)
    assert class_names(small, folders=["n01443537", "n02123045"]) == ["goldfish", "tabby"]
    assert class_names(small, folders=["one"]) is None


def test_weights_that_cannot_be_fetched_are_exit_code_1(monkeypatch, capsys):
    def offline(*_args, **_options):
        raise OSError("cannot reach the hub\nlong explanation")

    monkeypatch.setattr(timm, "create_model", offline)
    assert main(["layers", "hf-hub:someone/something"]) == 1
    assert capsys.readouterr().err == "ib-explain: cannot fetch 'hf-hub:someone/something': cannot reach the hub\n"


def test_a_damaged_tar_file_is_named(host, tmp_path, capsys):
    (tmp_path / "bad.tar").write_bytes(b"no archive at all")
    for command in ("fit", "attribute"):
        words = [command, *host, "--data", tmp_path / "bad.tar", "--out", tmp_path / "out"]
        assert "no images in" in fails(capsys, *words)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_leaves_out_what_it_cannot_read_and_says_so(host, pictures, tmp_path, capfd, workers):
    shutil.copytree(pictures / "train", tmp_path / "train")
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"x")
    words = ["fit", *host, "--data", tmp_path / "train", "--steps", 4, "--batch-size", 4, "--workers", workers]
    assert main([str(word) for word in [*words, "--out", tmp_path / "ib"]]) == 2
    said = capfd.readouterr()
    assert said.err.count("cannot read image a/0.png") == 1 and "saved in" in said.out
    assert (tmp_path / "ib" / "bottleneck.safetensors").is_file()


def test_names_that_begin_with_a_dash_stand_behind_two(host, pictures, tmp_path, monkeypatch, capsys):
    shutil.copy(pictures / "train" / "a" / "0.png", tmp_path / "-one two.png")
    monkeypatch.chdir(tmp_path)
    words = ["attribute", *host, "--method", "edges", "--out", "maps", "--workers", "0", "--", "-one two.png"]
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "maps" / "-one two.npz").is_file()


@pytest.mark.parametrize(("processors", "readers"), [(1, 1), (2, 2), (64, 2)])
def test_no_more_readers_than_processors_by_default(monkeypatch, processors, readers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(processors)), raising=False)
    assert _parser().parse_args(["fit", "resnet18", "--data", "pictures"]).workers == readers

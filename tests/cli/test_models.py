"""The model that a command line names: checkpoints, random weights, channels, names of classes."""

from __future__ import annotations

import json

import numpy as np
import timm
import torch
from PIL import Image

from ib_explain.cli import main
from ib_explain.hosts import class_names, load_host
from tests.cli.conftest import MODEL


def test_a_checkpoint_that_does_not_fit_says_what_was_expected_and_what_came(weights, tmp_path, fails):
    line = fails("layers", "test_resnet", "--checkpoint", weights)
    assert "fc.weight must be (1000, 96), got (5, 96), and 1 more; try --num-classes 5" in line
    line = fails("layers", "test_vit", "--checkpoint", weights)
    assert "does not fit test_vit: it lacks" in line and "and it has" in line
    (tmp_path / "text.safetensors").write_text("no weights at all")
    assert "cannot read checkpoint" in fails("layers", *MODEL, "--checkpoint", tmp_path / "text.safetensors")
    for name, content in (
        ("table.csv", b"a,b\n1,2\n"),
        ("cut.pt", b""),
        ("picture.jpg", b"\xff\xd8\xff\xe0"),
        ("x.pkl", b"N."),
    ):
        (tmp_path / name).write_bytes(content)
        line = fails("layers", *MODEL, "--checkpoint", tmp_path / name)
        assert line.endswith(f"{name}: it is neither safetensors nor a torch state dict")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "other.pt")
    assert "must hold named tensors" in fails("layers", *MODEL, "--checkpoint", tmp_path / "other.pt")


def test_random_weights_are_said(capsys):
    assert main(["layers", *MODEL, "--layer", "layer3"]) == 0
    assert "warning: test_resnet has random weights" in capsys.readouterr().err


def test_random_weights_are_the_same_in_every_run_and_nobodys_random_state_moves():
    before = torch.get_rng_state()
    one, again = (load_host("test_resnet", num_classes=5).state_dict() for _ in "12")
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)


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


def test_a_grey_model_with_a_normalisation_of_its_own(tmp_path, capsys, fails):
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
    said = fails("layers", *words[:-4], "--in-chans", "0")
    assert said.startswith("argument --in-chans: must be an integer >= 1")
    said = fails("attribute", *words, "--mean", "a,b", *where)
    assert said.startswith("argument --mean: must be a number, or one a channel such as .5,.5,.5, got 'a,b'")
    where[3] = str(tmp_path / "others")
    assert "mean and std must hold 1 values" in fails("attribute", *words, "--mean", "1,2", *where)


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

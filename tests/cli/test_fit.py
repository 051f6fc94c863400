"""`ib-explain fit`: what is saved, resumed and left out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ib_explain.cli import main
from ib_explain.training import Trainer


def test_fit_saves_a_bottleneck_and_does_not_replace_one(bottleneck, host, pictures, fails):
    config = json.loads((bottleneck / "config.json").read_text())
    assert config["input_size"] == [3, 64, 64] and config["record"]["class_folders"] == list("abcde")
    assert not bottleneck.with_name("ib.checkpoint").exists()
    options = ["--data", pictures, "--split", "train", "--out", bottleneck]
    assert "exists; name another --out or --overwrite" in fails("fit", *host, *options)
    assert "no split 'test'" in fails(
        "fit", *host, "--data", pictures, "--split", "test", "--out", bottleneck.with_name("other")
    )


def test_fit_resumes_only_what_was_interrupted(host, pictures, tmp_path, fails):
    options = ["--data", pictures, "--split", "train", "--steps", 2, "--batch-size", 4, "--workers", 0]
    options += ["--out", tmp_path / "ib"]
    assert "nothing to resume" in fails("fit", *host, *options, "--resume")
    (tmp_path / "ib.checkpoint").mkdir()
    (tmp_path / "ib.checkpoint" / "epoch90.pth").write_text("years of work")
    assert "holds other files (epoch90.pth)" in fails("fit", *host, *options, "--overwrite")
    (tmp_path / "ib.checkpoint" / "epoch90.pth").unlink()
    assert "--resume continues it, --overwrite starts again" in fails("fit", *host, *options)
    assert main([str(word) for word in ["fit", *host, *options, "--overwrite"]]) == 0
    assert (tmp_path / "ib" / "bottleneck.safetensors").is_file() and not (tmp_path / "ib.checkpoint").exists()


def test_a_fit_that_was_to_overwrite_is_resumed(bottleneck, host, pictures, tmp_path, capsys, monkeypatch, fails):
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
    assert "holds other files (notes.md); name another folder" in fails(*words, "--overwrite")


def test_a_fit_takes_the_training_images_of_a_named_data_set(host, tmp_path, fails, monkeypatch):
    asked = []

    def create(name, root, split):
        asked.append(split)
        raise RuntimeError("no network")

    monkeypatch.setattr("timm.data.create_dataset", create)
    for words in (["fit"], ["fit", "--split", "part"], ["attribute"]):
        fails(words[0], *host, "--dataset", "hfds/some/pictures", *words[1:], "--out", tmp_path / "out")
    assert asked == ["train", "part", "validation"]


def test_a_gate_without_bits_says_none(tmp_path, capsys, fails):
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
    assert "has the gate 'residual', which measures no bits; give --output attention" in fails(*shown)
    assert main([str(word) for word in [*shown, "--output", "attention"]]) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_leaves_out_what_it_cannot_read_and_says_so(host, pictures, tmp_path, capfd, workers):
    shutil.copytree(pictures / "train", tmp_path / "train")
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"x")
    words = ["fit", *host, "--data", tmp_path / "train", "--steps", 4, "--batch-size", 4, "--workers", workers]
    assert main([str(word) for word in [*words, "--out", tmp_path / "ib"]]) == 2
    said = capfd.readouterr()
    assert said.err.count("cannot read image a/0.png") == 1 and "saved in" in said.out
    assert (tmp_path / "ib" / "bottleneck.safetensors").is_file()


def fit_words(host, pictures, out, steps):
    words = ["fit", *host, "--data", pictures, "--split", "train", "--steps", steps, "--batch-size", 4, "--workers", 0]
    return [str(word) for word in [*words, f"--out={out}"]]


def test_a_fit_of_another_command_meanwhile_is_not_replaced(bottleneck, host, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a name may begin with a dash
    done = Trainer.step

    def meanwhile(self, *batch):
        if not (tmp_path / "-ib").exists():
            shutil.copytree(bottleneck, tmp_path / "-ib")
        done(self, *batch)

    monkeypatch.setattr(Trainer, "step", meanwhile)
    assert main([*fit_words(host, pictures, "-ib", 1), "--beta", "0.5"]) == 0
    said = capsys.readouterr()
    assert "-ib was made by another command meanwhile" in said.err and "saved in -ib-2\n" in said.out
    assert "--bottleneck ./-ib-2 IMAGE" in said.out
    assert (tmp_path / "-ib/config.json").read_bytes() == (bottleneck / "config.json").read_bytes()
    settings = json.loads((tmp_path / "-ib-2/config.json").read_text())["record"]["settings"]
    assert (settings["steps"], settings["beta"]) == (1, 0.5)


def test_a_fit_killed_between_the_renames_of_a_checkpoint_is_resumed(
    host, pictures, tmp_path, capsys, monkeypatch, fails
):
    done = Trainer.step

    def stops(self, *batch):
        if self.step_number == 11:
            raise KeyboardInterrupt
        done(self, *batch)

    words = fit_words(host, pictures, tmp_path / "ib", 12)
    monkeypatch.setattr(Trainer, "step", stops)
    assert main(words) == 1
    monkeypatch.setattr(Trainer, "step", done)
    (tmp_path / "ib.checkpoint").rename(tmp_path / ".ib.checkpoint.set-aside")
    capsys.readouterr()
    assert "of an interrupted fit; --resume continues it" in fails(*words)
    assert main([*words, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ib"]

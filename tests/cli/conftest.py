"""A host, pictures and a fitted bottleneck for the command line, and what a mistake is to look like."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ib_explain.cli import main

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


@pytest.fixture
def fails(capsys):
    """Run a command that is the user's mistake; return its one line."""

    def run(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if "probing" not in line and "warning:" not in line]
        assert code == 2 and len(lines) == 1 and said.out == "", (code, said)
        assert lines[0].startswith("ib-explain: ")
        return lines[0].removeprefix("ib-explain: ")

    return run

"""What all commands share: help, one line and exit code 2 for each mistake, what nobody may write over."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ib_explain.cli import _parser, main
from tests.cli.conftest import MODEL


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
def test_a_mistake_is_one_line_and_exit_code_2(words, said, fails):
    assert said in fails(*words)


def test_options_that_contradict_each_other_are_refused(host, pictures, tmp_path, fails):
    assert "got both; leave one out" in fails("layers", *host, "--pretrained")
    picture = pictures / "train" / "a" / "0.png"
    assert "--split goes with --data" in fails("attribute", *host, picture, "--split", "train")
    two = tmp_path / "two"
    for split in ("train", "val"):
        shutil.copytree(pictures / "train", two / split)
    line = fails("fit", *host, "--data", two, "--out", tmp_path / "ib")
    assert line == f"{two} holds the splits train, val; say which with split (--split)"
    data = ["--data", pictures, "--split", "train"]
    small = ["--methods", "random", "--metrics", "tied_share"]
    assert "out must not lie in the folder of the data" in fails(
        "benchmark", *host, *data, *small, "--out", pictures / "train"
    )
    line = fails("benchmark", *host, *data, *small, "--layer", "fc", "--out", tmp_path / "board")
    assert "layer 'fc' has no spatial grid" in line and not (tmp_path / "board").exists()


def test_a_failure_that_is_nobodys_mistake_keeps_its_traceback(monkeypatch):
    import ib_explain.commands.layers

    def broken(_args):
        return torch.zeros(3).reshape(7)

    monkeypatch.setattr(ib_explain.commands.layers, "run", broken)
    with pytest.raises(RuntimeError):
        main(["layers", "test_resnet"])


def test_results_do_not_go_among_the_pictures(host, pictures, tmp_path, fails):
    data = tmp_path / "data"
    shutil.copytree(pictures / "train", data)
    for words in (["fit", "--steps", 1], ["attribute", "--method", "edges"], ["benchmark", "--methods", "edges"]):
        told = fails(words[0], *host, "--data", data, "--out", data / "maps", *words[1:])
        assert told.startswith("out must not lie in the folder of the data, ")
    assert sorted(entry.name for entry in data.iterdir()) == list("abcde")


def test_a_data_set_that_timm_cannot_open_is_one_line(host, tmp_path, fails):
    for name in ("torch/cifar10", "nope/xx"):
        words = ["attribute", *host, "--dataset", name, "--out", tmp_path / "maps"]
        assert f"timm cannot open the data set '{name}'; does it need a root?" in fails(*words)


def test_run_as_a_module():
    command = [sys.executable, "-m", "ib_explain", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("ib-explain ")


def test_a_damaged_tar_file_is_named(host, tmp_path, fails):
    (tmp_path / "bad.tar").write_bytes(b"no archive at all")
    for command in ("fit", "attribute"):
        words = [command, *host, "--data", tmp_path / "bad.tar", "--out", tmp_path / "out"]
        assert "no images in" in fails(*words)


@pytest.mark.parametrize(("processors", "readers"), [(1, 1), (2, 2), (64, 2)])
def test_no_more_readers_than_processors_by_default(monkeypatch, processors, readers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(processors)), raising=False)
    assert _parser().parse_args(["fit", "resnet18", "--data", "pictures"]).workers == readers


def test_a_full_disk_is_one_line_and_exit_code_1(host, pictures, tmp_path, monkeypatch, capsys):
    def full(self, _content):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    words = ["fit", *host, "--data", pictures, "--split", "train", "--steps", 1, "--batch-size", 4, "--workers", 0]
    assert main([str(word) for word in [*words, "--out", tmp_path / "ib"]]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ib-explain: cannot write ") and line.endswith("device; what is finished stays")


def test_a_terminal_that_cannot_say_a_letter_gets_its_code(host, pictures, tmp_path):
    shutil.copy(pictures / "train" / "a" / "0.png", tmp_path / "é.png")
    words = ["attribute", *host, tmp_path / "é.png", "--method", "edges", "--workers", 0, "--out", tmp_path / "maps"]
    command = [sys.executable, "-m", "ib_explain", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\xe9" in done.stdout, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["layers", "test_resnet", "--input-size", "64"]])
def test_a_pipe_that_is_closed_is_no_error_of_ours(words):
    command = shlex.join([sys.executable, "-m", "ib_explain", *words])
    told = "${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", f"{command} | true; exit {told}"], capture_output=True, text=True)
    assert done.returncode in (0, 1) and "Error" not in done.stderr, done


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_device_is_told_once():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ib_explain", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "ib-explain: cannot write No space left on device; what is finished stays\n",
    )


@pytest.mark.parametrize("closed", ["1", "2", "1>&- 2"])
def test_a_stream_that_is_closed_loses_what_is_said_and_no_more(host, pictures, tmp_path, closed):
    words = ["attribute", *host, pictures / "train" / "a", "--method", "edges", "--workers", 0]
    command = shlex.join([sys.executable, "-m", "ib_explain", *map(str, words), "--out", str(tmp_path / "maps")])
    done = subprocess.run(["bash", "-c", f"{command} {closed}>&-"], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert (tmp_path / "maps" / "maps.csv").is_file() and ("2 maps" in done.stdout) == ("1" not in closed)


@pytest.mark.parametrize("out", [".", "/"])
def test_a_fit_is_a_folder_of_its_own(host, pictures, out, fails):
    assert "--out must name a folder of its own" in fails("fit", *host, "--data", pictures, "--out", out)


def test_a_device_without_values_is_none(fails):
    assert "no device 'meta' here; there: cpu" in fails("layers", "test_resnet", "--device", "meta")

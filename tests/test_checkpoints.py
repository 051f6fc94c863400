"""Checkpoints of a fit: when they are written, resumed to the same weights, and refused."""

from __future__ import annotations

import json
import textwrap
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

from ib_explain.fitting import train
from ib_explain.ib import IBAttention
from ib_explain.training import Trainer
from tests.fitting import assert_equal, batches, fit, run_script, weights
from tests.models import images, tiny

RESUME = """
    import os, signal, sys, torch
    from ib_explain.ib import IBAttention
    from tests.models import images, tiny

    folder, fatal = sys.argv[1], int(sys.argv[2])
    reads = 0

    class Data(list):
        def __iter__(self):
            global reads
            for batch in super().__iter__():
                reads += 1
                if reads == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    data = Data(images(8, seed=s) for s in range(3))
    ib = IBAttention(tiny(), "stages.1", anchors=3)
    ib.fit(data, steps=9, checkpoint=folder, every=2, resume=True, show_progress=False)
    ib.save(folder + "-result")
"""


def test_a_killed_fit_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path):
    script = tmp_path / "resume.py"
    script.write_text(textwrap.dedent(RESUME))
    killed = run_script(script, tmp_path / "a", 11)  # 1 + 3 batches for the statistics, then in the 7th step
    assert killed.returncode == -9 and (tmp_path / "a").is_dir() and not (tmp_path / "a-result").exists()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["run"]["step"] == 6
    again = run_script(script, tmp_path / "a", 0)
    assert again.returncode == 0, again.stderr
    assert run_script(script, tmp_path / "b", 0).returncode == 0
    host = tiny()
    resumed, whole = (IBAttention.load(tmp_path / f"{n}-result", host) for n in "ab")
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)
    assert resumed.record["history"] == whole.record["history"]


def test_a_checkpoint_of_another_run_is_refused_and_a_crash_between_renames_is_survived(tmp_path):
    data, folder = batches(), tmp_path / "run"
    fit(data, steps=4, checkpoint=folder, every=2)
    with pytest.raises(ValueError, match="checkpoint of a fit with steps=4, not 8"):
        fit(data, steps=8, checkpoint=folder, resume=True)
    with pytest.raises(ValueError, match="the checkpoint of a fit with batch_size=8, not 4"):
        fit(batches(size=4), steps=4, checkpoint=folder, resume=True)
    other, another = tiny(seed=1), tiny()
    another.fc = torch.nn.Linear(another.fc.in_features, 9)
    for host, what in ((other, "to a host with other weights"), (another, "to another architecture")):
        with pytest.raises(ValueError, match=f"is the checkpoint of a fit {what}"):
            IBAttention(host, "stages.1").fit(data, steps=4, checkpoint=folder, resume=True)
    folder.rename(tmp_path / ".run.set-aside")  # as a crash between the two renames leaves it
    assert_equal(weights(fit(data, steps=4, checkpoint=folder, resume=True)), weights(fit(data, steps=4)))


def test_a_checkpoint_of_a_fit_on_other_images_is_told(tmp_path):
    data, folder = batches(), tmp_path / "run"
    fit(data, steps=4, checkpoint=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(data, steps=4, checkpoint=folder, resume=True)
    others = [(x.flip(0), y) for x, y in data]
    with pytest.warns(UserWarning, match="data began with other images: its 4 of 4 steps are not taken again on these"):
        fit(others, steps=4, checkpoint=folder, resume=True)


def test_a_run_folder_that_is_no_checkpoint(tmp_path):
    data, folder, ib = batches(), tmp_path / "run", fit(batches(), steps=4)
    ib.save(folder)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="holds a saved bottleneck; name another folder for checkpoints"):
            fit(data, steps=4, checkpoint=folder, resume=resume)
    assert IBAttention.load(folder, ib.host).record["settings"]["steps"] == 4
    run = tmp_path / "whole"
    fit(data, steps=4, every=2, checkpoint=run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "run"}))
    with pytest.raises(ValueError, match=r"is damaged: bottleneck.safetensors or config.json was changed since"):
        fit(data, steps=4, checkpoint=run, resume=True)
    (run / "config.json").write_text(json.dumps(config))
    (run / "optimiser.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is a damaged checkpoint: it has no optimiser.safetensors"):
        fit(data, steps=4, checkpoint=run, resume=True)
    for lost in ("config.json", "bottleneck.safetensors"):
        fit(data, steps=4, every=2, checkpoint=tmp_path / lost)
        (tmp_path / lost / lost).unlink()
        with pytest.raises(ValueError, match=f"is a damaged checkpoint: it has no {lost}; remove it"):
            fit(data, steps=4, checkpoint=tmp_path / lost, resume=True)
    with pytest.raises(TypeError, match="checkpoint must be the name of a folder, got int"):
        fit(data, steps=4, checkpoint=3)
    with pytest.raises(TypeError, match="resume must be"):
        fit(data, steps=4, checkpoint=run, resume="no")


def test_when_checkpoints_are_written(tmp_path, monkeypatch):
    """By default a tenth of the fit lies between two; there is one at the end in any case."""
    written = []
    monkeypatch.setattr("ib_explain.ib.write_checkpoint", lambda *given: written.append(given[3]))
    for steps, every, expected in ((25, None, [*range(2, 26, 2), 25]), (5, None, [1, 2, 3, 4, 5]), (5, 3, [3, 5])):
        written.clear()
        fit(batches(), steps=steps, every=every, checkpoint=tmp_path / "run")
        assert [now["run"]["step"] for now in written] == expected


def test_a_checkpoint_that_is_loaded_as_a_bottleneck_says_what_it_is(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    class Stopping(list):
        def __iter__(self):  # once for the statistics, then to the end for the first batches of the training
            yield from super().__iter__()
            if trained:
                raise Stopped

    trained = []
    monkeypatch.setattr("ib_explain.ib.train", lambda *args, **more: trained.append(1) or train(*args, **more))
    host = tiny()
    with pytest.raises(Stopped):
        IBAttention(host, "stages.1").fit(Stopping(batches()), steps=99, every=2, checkpoint=tmp_path / "run")
    with pytest.warns(UserWarning, match=r"is the checkpoint of a fit after step \d+ of 99; fit\(..., checkpoint="):
        IBAttention.load(tmp_path / "run", host)
    fit(batches(), steps=4, checkpoint=tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IBAttention.load(tmp_path / "whole", fit(batches(), steps=1).host)


@pytest.mark.parametrize("kind", ["fp16", "generator"])
def test_resuming_ends_at_the_weights_of_an_uninterrupted_run(tmp_path, kind):
    """Also with what has a state of its own: a gradient scaler, a loader's generator."""
    options = {"precision": "fp16"} if kind == "fp16" else {}

    def loader():
        data = TensorDataset(images(40))
        return DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))

    class Stopped(Exception):
        pass

    class Stops:
        def __init__(self):
            self.epochs = 0
            self.generator = loader().generator

        def __iter__(self):
            self.epochs += 1
            source = DataLoader(TensorDataset(images(40)), batch_size=8, shuffle=True, generator=self.generator)
            for seen, batch in enumerate(source):
                if self.epochs == 4 and seen == 3:  # places, statistics, and an epoch of training before
                    raise Stopped
                yield batch

    whole = fit(loader(), steps=11, **options)
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        fit(Stops(), steps=11, checkpoint=folder, every=2, **options)
    resumed = fit(loader(), steps=11, checkpoint=folder, every=2, resume=True, **options)
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


def test_an_interrupted_fit_is_not_begun_again_by_mistake(tmp_path, monkeypatch):
    data, run = [images(8)], tmp_path / "run"
    done = Trainer.step

    def stops(self, *batch):
        if self.step_number == 2:
            raise KeyboardInterrupt
        done(self, *batch)

    monkeypatch.setattr(Trainer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        fit(data, steps=4, every=1, checkpoint=run)
    monkeypatch.setattr(Trainer, "step", done)
    with pytest.raises(FileExistsError, match=r"was interrupted after step 2 of 4; resume=True goes on from there"):
        fit(data, steps=4, every=1, checkpoint=run)
    assert json.loads((run / "config.json").read_text())["run"]["step"] == 2
    fit(data, steps=4, every=1, checkpoint=run, resume=True)
    fit(data, steps=4, every=1, checkpoint=run)  # over one that is at its end


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("closed"), "is damaged"),
        (lambda tensors: tensors.pop("0.exp_avg_sq"), "0.exp_avg_sq is missing or of another shape"),
        (lambda tensors: tensors.update({"1.exp_avg": torch.zeros(2)}), "1.exp_avg is missing or of another shape"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, change, told):
    data, folder = batches(), tmp_path / "run"
    fit(data, steps=4, checkpoint=folder, every=2)
    tensors = load_file(folder / "optimiser.safetensors")
    change(tensors)
    save_file(tensors, folder / "optimiser.safetensors")
    with pytest.raises(ValueError, match=told):
        fit(data, steps=4, checkpoint=folder, resume=True)

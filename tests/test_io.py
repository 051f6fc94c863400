"""Saving, loading, the hub's mixin, and what damaged or foreign folders get."""

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ib_explain.files import current_folder, replace_file, replace_folder
from ib_explain.ib import IBAttention
from ib_explain.io import fingerprint, read_folder, write_folder
from tests.models import images, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    ib = IBAttention(tiny(), "stages.1", anchors=4, seed=3).fit([images(8)], steps=3, show_progress=False)
    path = tmp_path_factory.mktemp("saved") / "bottleneck"
    ib.save(path)
    return ib, path


@pytest.mark.parametrize("reads", ["gradient", "features"])
@pytest.mark.parametrize("kind", ["cnn", "vit", "nhwc"])
def test_loaded_is_saved(tmp_path, kind, reads):
    ib = IBAttention(tiny(kind), reads=reads).fit([images(8)], steps=2, show_progress=False)
    ib.save(tmp_path / "b")
    twin = IBAttention.load(tmp_path / "b", tiny(kind))
    assert torch.equal(twin.attribute(images(3)), ib.attribute(images(3)))
    assert twin.record == json.loads(json.dumps(ib.record)) and twin.site.name == ib.site.name


def test_the_folder_holds_two_files_and_no_pickle(saved):
    _, path = saved
    assert sorted(p.name for p in path.iterdir()) == ["bottleneck.safetensors", "config.json"]
    config = json.loads((path / "config.json").read_text())
    needed = ("format", "layer", "layout", "input_size", "gate", "reads", "host", "versions", "record")
    assert all(name in config for name in needed)


def test_other_architecture_other_shape_other_weights(saved, tmp_path):
    _, path = saved
    with pytest.raises(ValueError, match="fitted to the model TinyCNN, not to this TinyViT"):
        IBAttention.load(path, tiny("vit"))
    with pytest.warns(UserWarning, match="with other weights"):
        IBAttention.load(path, tiny(seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IBAttention.load(path, tiny())
        IBAttention.load(path, tiny().bfloat16())  # rounded, the same weights cannot be compared


def test_the_host_is_remembered_as_it_was_fitted_to(tmp_path):
    host = tiny()
    ib = IBAttention(host, "stages.1").fit([images(8)], steps=2, show_progress=False)
    with torch.no_grad():
        host.fc.weight.mul_(2)
    for name in ("first", "second"):  # saved after the change; loaded into the changed host and saved again
        ib.save(tmp_path / name)
        with pytest.warns(UserWarning, match="with other weights"):
            ib = IBAttention.load(tmp_path / name, host)


def copy(path, target):
    import shutil

    return shutil.copytree(path, target / "copy")


def test_damaged_and_missing_files(saved, tmp_path):
    _, path = saved
    with pytest.raises(FileNotFoundError, match=r"no saved bottleneck: it has no config\.json"):
        IBAttention.load(tmp_path, tiny())
    broken = copy(path, tmp_path)
    whole = (broken / "bottleneck.safetensors").read_bytes()
    (broken / "bottleneck.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        IBAttention.load(broken, tiny())
    (broken / "bottleneck.safetensors").write_bytes(whole)
    text = (broken / "config.json").read_text()
    (broken / "config.json").write_text(text[:100])
    with pytest.raises(ValueError, match="is damaged"):
        IBAttention.load(broken, tiny())
    (broken / "config.json").write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99; this version of ib_explain reads format 1"):
        IBAttention.load(broken, tiny())
    config = json.loads(text)
    for change in ({"layer": "stages.2"}, {"seed": 5}, {"record": {"settings": 3}}, {"gate": "residual"}):
        (broken / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"is damaged: bottleneck.safetensors or config.json was changed since"):
            IBAttention.load(broken, tiny())
    (broken / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged: "):
        IBAttention.load(broken, tiny())
    (broken / "config.json").write_text(json.dumps(config, indent=7))  # the same, otherwise written
    assert IBAttention.load(broken, tiny()).fitted
    write_folder(broken, load_file(broken / "bottleneck.safetensors"), {**config, "layer": "stages.2"})
    with pytest.raises(ValueError, match="it was fitted to 'stages.2' with 12 channels"):
        IBAttention.load(broken, tiny())


def test_a_model_card_stays_and_a_link_is_followed(saved, tmp_path):
    ib = saved[0]
    ib.save_pretrained(tmp_path / "real")
    card = tmp_path / "real" / "README.md"
    assert card.is_file()
    card.write_text("my own words")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ib.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and card.read_text() == "my own words"
    assert IBAttention.load(tmp_path / "real", ib.host).fitted
    for bad in (3, b"x"):
        with pytest.raises(TypeError, match="path must be the name of a folder, got"):
            IBAttention.load(bad, ib.host)


def test_from_pretrained_reads_a_local_folder_and_push_to_hub_uploads_the_same_files(saved, monkeypatch):
    import huggingface_hub.hub_mixin as mixin

    ib, path = saved
    twin = IBAttention.from_pretrained(str(path), tiny())
    assert torch.equal(twin.attribute(images(2)), ib.attribute(images(2)))
    uploaded = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, *, folder_path, **_):
            from pathlib import Path

            uploaded.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
            return "done"

    monkeypatch.setattr(mixin, "HfApi", Api)
    ib.push_to_hub("someone/bottleneck")
    assert uploaded["bottleneck.safetensors"] == (path / "bottleneck.safetensors").read_bytes()
    assert "config.json" in uploaded
    made = []
    monkeypatch.setattr(Api, "create_repo", lambda self, repo_id, **_: made.append(repo_id))
    with pytest.raises(RuntimeError, match="not fitted"):
        IBAttention(tiny()).push_to_hub("someone/nothing")
    assert made == []


def test_who_may_read_a_folder_may_read_what_is_saved_in_it(saved, tmp_path):
    ib, _ = saved
    ib.save(tmp_path / "b")
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "b").iterdir()} == {"0o644"}


def test_a_crash_between_the_renames_of_a_save_loses_nothing(saved, tmp_path):
    ib, _ = saved
    ib.save(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / ".b.set-aside")  # where a crash leaves it
    assert IBAttention.load(tmp_path / "b", ib.host).fitted
    assert read_folder(tmp_path / "b")[1] == read_folder(tmp_path / ".b.set-aside")[1]


def test_a_failed_save_leaves_the_older_folder(saved, tmp_path, monkeypatch):
    ib, _ = saved
    ib.save(tmp_path / "b")
    before = (tmp_path / "b" / "config.json").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        ib.save(tmp_path / "b")
    assert (tmp_path / "b" / "config.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_replace_file_and_folder_are_all_or_nothing(tmp_path):
    target = tmp_path / "a.txt"
    with replace_file(target) as temporary:
        temporary.write_text("one")
    with pytest.raises(RuntimeError), replace_file(target) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert target.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with replace_folder(tmp_path / "f", ["x"]) as folder:
        (folder / "x").write_text("1")
    with replace_folder(tmp_path / "f", ["x"]) as folder:
        (folder / "y").write_text("2")
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["y"]
    assert current_folder(tmp_path / "f") == tmp_path / "f" and current_folder(tmp_path / "none") is None


def test_nothing_of_the_users_is_replaced(saved, tmp_path):
    project, backup = tmp_path / "project", tmp_path / "project.old"
    for folder in (project, backup):
        (folder / "sub").mkdir(parents=True)
        (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"project holds other files \(sub\); name another folder"):
        saved[0].save(project)
    with pytest.raises(FileExistsError, match="holds other files"):
        IBAttention(tiny()).fit([images(4)], steps=2, checkpoint=project, every=1, show_progress=False)
    saved[0].save(tmp_path / "ib")
    saved[0].save(tmp_path / "ib")
    (tmp_path / "ib" / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.md"):
        saved[0].save(tmp_path / "ib")
    with pytest.raises(FileExistsError, match="is no folder; name another one"):
        saved[0].save(tmp_path / "ib" / "notes.md")
    assert all((folder / "thesis.tex").read_text() == "years of work" for folder in (project, backup))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ib", "project", "project.old"]


@pytest.mark.parametrize("key", ["host", "layer", "input_size", "layout", "gate"])
def test_a_config_that_lacks_something(saved, tmp_path, key):
    saved[0].save(tmp_path / "ib")
    config = json.loads((tmp_path / "ib" / "config.json").read_text())
    del config[key]
    (tmp_path / "ib" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"is damaged: its config.json has no '{key}'"):
        IBAttention.load(tmp_path / "ib", tiny())


def test_weights_that_are_missing_or_broken(saved, tmp_path):
    saved[0].save(tmp_path / "ib")
    file = tmp_path / "ib" / "bottleneck.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.startswith("network"))
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(ValueError, match="is damaged: bottleneck.safetensors or config.json was changed since they"):
        IBAttention.load(tmp_path / "ib", tiny())
    config = json.loads((tmp_path / "ib" / "config.json").read_text())
    write_folder(tmp_path / "ib", load_file(file), config)
    with pytest.raises(ValueError, match="does not fit this model: .*Missing key") as caught:
        IBAttention.load(tmp_path / "ib", tiny())
    assert "\n" not in str(caught.value)
    save_file(tensors | {name: tensors[name] * torch.nan}, file)
    with pytest.raises(ValueError, match=f"{name} in bottleneck.safetensors has NaN"):
        IBAttention.load(tmp_path / "ib", tiny())
    std = next(n for n in tensors if n.endswith(".std"))
    save_file(tensors | {std: tensors[std].to(torch.complex64)}, file)
    with pytest.raises(ValueError, match=f"{std} in bottleneck.safetensors must be above 0"):
        IBAttention.load(tmp_path / "ib", tiny())
    (tmp_path / "ib" / "config.json").write_text(f'{{"format": {"1" * 5000}}}')
    with pytest.raises(ValueError, match="ib is damaged: "):
        IBAttention.load(tmp_path / "ib", tiny())


def test_the_current_folder_is_not_replaced(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="is the current folder, which cannot be replaced; name one in it"):
        saved[0].save(".")
    saved[0].save("ib")
    assert IBAttention.load("ib", tiny()).fitted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("host", {}),
        ("host", None),
        ("input_size", [64, 64]),
        ("input_size", [3, -1, 64]),
        ("layout", None),
        ("layout", {"grid": [3, 3]}),
        ("deeper", None),
        ("record", "x"),
        ("seed", "x"),
    ],
)
def test_a_damaged_config_is_named(saved, tmp_path, key, value):
    saved[0].save(tmp_path / "ib")
    file = tmp_path / "ib" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"is damaged: its config.json has {key}="):
        IBAttention.load(tmp_path / "ib", tiny())


def test_loaded_under_inference_mode(saved):
    ib, path = saved
    x = images(2)
    with torch.inference_mode():
        loaded = IBAttention.load(path, ib.host)
        torch.testing.assert_close(loaded.attribute(x), ib.attribute(x))
    torch.testing.assert_close(loaded.attribute(x, refine=2), ib.attribute(x, refine=2))


def test_the_number_of_classes_is_kept(saved):
    ib, path = saved
    config = json.loads((path / "config.json").read_text())
    assert config["classes"] == config["record"]["classes"] == ib.host(images(1)).shape[1]


def test_a_host_with_extra_state_and_complex_buffers(tmp_path):
    class Odd(type(tiny())):
        def get_extra_state(self):
            return {"anything": 1}

        def set_extra_state(self, state):
            pass

    host = Odd()
    host.register_buffer("phase", torch.ones(3, dtype=torch.complex64))
    ib = IBAttention(host, "stages.1").fit([images(4)], steps=1, show_progress=False)
    ib.save(tmp_path / "ib")
    assert IBAttention.load(tmp_path / "ib", host).fitted
    before = fingerprint(host)
    host.phase.imag += 1
    assert fingerprint(host) != before


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(saved):
    with pytest.raises(FileNotFoundError, match="missing is no saved bottleneck: it has no config.json"):
        IBAttention.from_pretrained("./missing", tiny())


def test_the_fingerprint_sees_a_changed_weight():
    host = tiny()
    before = fingerprint(host)
    with torch.no_grad():
        host.fc.bias[0] += 1e-3
    assert fingerprint(host) != before
    assert fingerprint(tiny()) == before


def test_weights_that_changed_since_the_fit_are_told_once(saved, tmp_path):
    host = tiny()
    ib = IBAttention(host, "stages.1").fit([images(8)], steps=2, show_progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ib.attribute(images(2))
        host.double().float()  # other tensors, the same weights
        ib.attribute(images(2))
    with torch.no_grad():
        next(host.parameters()).add_(0.1)
    with pytest.warns(UserWarning, match="weights were changed since the fit; fit again"):
        ib.attribute(images(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ib.attribute(images(2))
        ib.fit([images(8)], steps=2, show_progress=False).attribute(images(2))


def test_another_normalisation_is_told(tmp_path):
    host = timm.create_model("test_resnet", num_classes=3)
    IBAttention(host, "layer2").fit([images(4, size=32)], steps=1, show_progress=False).save(tmp_path / "ib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IBAttention.load(tmp_path / "ib", host)
    host.pretrained_cfg = {**host.pretrained_cfg, "mean": (0.1, 0.1, 0.1)}
    with pytest.warns(UserWarning, match=r"normalised by mean \[0.1, 0.1, 0.1\], not \["):
        IBAttention.load(tmp_path / "ib", host)


def test_a_fingerprint_looks_at_weights_to_their_end():
    host = nn.Linear(64, 64)
    before = fingerprint(host)
    with torch.no_grad():
        host.weight[-1] += 1
    assert fingerprint(host) != before

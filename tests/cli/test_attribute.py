"""`ib-explain attribute`: maps, tables and sheets, what is made again, and whose files are left alone."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ib_explain.cli import main
from ib_explain.commands.map_folder import plan_names


def test_attribute_does_the_readable_images_and_names_the_others(bottleneck, host, pictures, tmp_path, capsys):
    broken = tmp_path / "more" / "broken.png"
    broken.parent.mkdir()
    broken.write_bytes((pictures / "train" / "a" / "0.png").read_bytes()[:2000])
    (broken.parent / "gone.png").symlink_to("nowhere.png")
    out = tmp_path / "maps"
    words = ["attribute", *host, pictures / "train", "missing.jpg", "--bottleneck", bottleneck]
    words += [broken.parent, "--target", 3, "--workers", 0, "--out", out]
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    problems = [line for line in said.err.splitlines() if line.startswith("ib-explain: ")]
    assert len(problems) == 3 and "missing.jpg" in problems[0]
    assert all("cannot read image" in problem for problem in problems[1:])
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


def test_attribute_continues_the_same_command_and_refuses_another(host, pictures, tmp_path, capsys, fails):
    out = tmp_path / "maps"
    words = ["attribute", *host, str(pictures / "train" / "a"), "--method", "grad_cam", "--out", str(out)]
    words += ["--workers", "0"]
    assert main([*words, "--limit", "1"]) == 0
    stamp = (out / "0.npz").stat().st_mtime_ns
    assert main(words) == 0
    assert "2 maps, 1 of them from before" in capsys.readouterr().out
    assert (out / "0.npz").stat().st_mtime_ns == stamp
    assert "maps of another command (target None, now 2)" in fails(*words, "--target", "2")
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


def test_attribute_overwrites_its_own_maps_only(host, pictures, tmp_path, capsys, fails):
    out = tmp_path / "project"
    (out / "data").mkdir(parents=True)
    (out / "run.json").write_text('{"experiment": 1}')
    np.savez(out / "data" / "features.npz", map=np.zeros(3))
    words = ["attribute", *host, str(pictures / "train" / "a"), "--method", "grad_cam", "--out", str(out)]
    words += ["--workers", "0"]
    assert "holds other files" in fails(*words)
    assert main([*words, "--overwrite", "--limit", "2"]) == 0
    assert main([*words, "--overwrite", "--limit", "1"]) == 0
    assert (out / "0.npz").is_file() and (out / "data" / "features.npz").is_file()
    assert not (out / "1.npz").exists() and not (out / "sheet.png").exists()
    capsys.readouterr()
    assert "99" in fails(*words, "--overwrite", "--target", "99")  # what is there stays until there is new
    assert (out / "0.npz").is_file() and (out / "maps.csv").is_file()


def test_attribute_does_not_read_its_own_pictures(host, pictures, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(pictures / "train" / "a", folder)
    words = ["attribute", *host, str(folder), "--method", "grad_cam", "--out", str(folder / "maps"), "--workers", "0"]
    assert main(words) == 0 and main(words) == 0
    assert sorted(path.name for path in (folder / "maps").glob("*.npz")) == ["0.npz", "1.npz"]
    assert not (folder / "maps" / "maps").exists()


def test_attribute_never_writes_over_the_images_themselves(host, pictures, tmp_path, fails):
    folder = tmp_path / "photos"
    shutil.copytree(pictures / "train" / "a", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = ["attribute", *host, str(folder), "--method", "grad_cam", "--out", str(folder), "--workers", "0"]
    told = fails(*words, "--overwrite")
    assert "0.png is one of the images and would be written over; name another --out" in told
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "0.png").rename(folder / "sheet.png")
    words[words.index(str(folder))] = str(folder / "sheet.png")
    assert "sheet.png is one of the images" in fails(*words, "--overwrite")


def test_maps_of_an_earlier_run_are_no_pictures_to_explain(host, pictures, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(pictures / "train" / "a", photos)
    words = ["attribute", *host, str(photos), "--method", "edges", "--workers", "0"]
    assert main([*words, "--out", str(photos / "maps")]) == 0
    assert main([*words, "--out", str(tmp_path / "others")]) == 0
    with (tmp_path / "others" / "maps.csv").open() as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == ["0", "1"]


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


def test_attribute_leaves_a_folder_of_other_things_alone(host, pictures, fails):
    line = fails("attribute", *host, pictures / "train" / "a" / "0.png", "--out", pictures)
    assert "holds other files" in line
    assert sorted(entry.name for entry in pictures.iterdir()) == ["train"]


def test_attribute_reads_a_data_set_and_its_labels(bottleneck, host, pictures, tmp_path):
    words = ["attribute", *host, "--data", pictures, "--split", "train", "--limit", 3, "--bottleneck", bottleneck]
    assert main([str(word) for word in [*words, "--refine", 1, "--workers", 0, "--out", tmp_path / "maps"]]) == 0
    with (tmp_path / "maps" / "maps.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows] == ["0", "0", "1"]
    assert all(row["target_name"] in set("abcde") for row in rows)


def test_relevance_is_fitted_and_drawn_where_it_is_asked_for(bottleneck, host, pictures, tmp_path, capsys, fails):
    options = ["--data", pictures, "--split", "train", "--workers", 0]
    fit = ["fit", *host, *options, "--steps", 2, "--batch-size", 4, "--relevance", "--out", tmp_path / "ib"]
    assert main([str(word) for word in fit]) == 0
    assert json.loads((tmp_path / "ib" / "config.json").read_text())["record"]["final_relevance_error"] > 0
    capsys.readouterr()
    words = ["attribute", *host, *options, "--limit", 2, "--output", "relevance", "--out", tmp_path / "maps"]
    assert "was fitted without --relevance" in fails(*words, "--bottleneck", bottleneck)
    assert "--output relevance is of a fitted bottleneck" in fails(*words)
    words += ["--bottleneck", tmp_path / "ib"]
    assert "leave one out" in fails(*words, "--refine", 2)
    assert "did you mean 'relevance'" in fails(*words, "--output", "relevanse")
    assert main([str(word) for word in words]) == 0
    assert "label bits per image" in capsys.readouterr().out
    with np.load(tmp_path / "maps" / "a" / "0.npz") as raw:
        assert raw["unit"] == "label bits" and raw["bits"] == pytest.approx(raw["map"].sum(), abs=1e-4)
    words[words.index("relevance")] = "bits"  # another command must not mix its maps with these
    assert "(output relevance, now bits)" in fails(*words)
    assert "--overwrite" in fails(*words)


def test_a_target_out_of_range_is_one_line(host, pictures, tmp_path, fails):
    picture = pictures / "train" / "a" / "0.png"
    line = fails("attribute", *host, picture, "--target", 7, "--out", tmp_path / "m", "--workers", 0)
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


def test_names_that_begin_with_a_dash_stand_behind_two(host, pictures, tmp_path, monkeypatch, capsys):
    shutil.copy(pictures / "train" / "a" / "0.png", tmp_path / "-one two.png")
    monkeypatch.chdir(tmp_path)
    words = ["attribute", *host, "--method", "edges", "--out", "maps", "--workers", "0", "--", "-one two.png"]
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "maps" / "-one two.npz").is_file()


def test_a_folder_of_another_normalisation_is_not_continued(host, pictures, tmp_path, fails, capsys):
    words = ["attribute", *host, str(pictures / "train" / "a"), "--method", "edges", "--workers", "0"]
    words += ["--out", str(tmp_path / "maps")]
    assert main([*words, "--mean", ".1", "--limit", "1"]) == 0
    assert main([*words, "--mean", ".1"]) == 0 and "1 of them from before" in capsys.readouterr().out
    capsys.readouterr()
    assert "maps of another command (mean" in fails(*words)


def test_files_of_the_users_among_the_maps_are_not_written_over(host, pictures, tmp_path, fails, capsys):
    photos, out = tmp_path / "photos", tmp_path / "maps"
    shutil.copytree(pictures / "train" / "a", photos)
    words = ["attribute", *host, "--method", "edges", "--workers", "0", "--out", str(out)]
    assert main([*words, str(photos / "0.png")]) == 0
    shutil.copy(photos / "1.png", photos / "2.png")
    for name in ("1.png", "2.npz"):
        (out / name).write_text("mine")
    assert main([*words, str(photos)]) == 0
    assert [(out / name).read_text() for name in ("1.png", "2.npz")] == ["mine", "mine"]
    with (out / "maps.csv").open() as stream:
        assert sorted(row["name"] for row in csv.DictReader(stream)) == ["0", "1-png", "2-png"]
    assert main([*words, str(photos)]) == 0 and "3 maps, 3 of them from before" in capsys.readouterr().out
    (out / "sheet.png").write_text("mine, too")
    assert "sheet.png is no sheet that ib-explain drew; move it" in fails(*words, str(photos))
    assert main([*words, str(photos), "--overwrite"]) == 0 and (out / "sheet.png").stat().st_size > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_of_any_bytes_and_of_any_length(host, pictures, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"latin\xe9.png", b"x" * 251 + b".png", b"two\nlines.png"):
        shutil.copy(os.fsencode(pictures / "train" / "a" / "0.png"), os.fsencode(photos) + b"/" + name)
    words = ["attribute", *host, str(photos), "--method", "edges", "--workers", "0", "--out", str(tmp_path / "maps")]
    assert main(words) == 0
    assert "latin\\udce9" in capsys.readouterr().out
    assert len(list((tmp_path / "maps").glob("*.npz"))) == 3 and (tmp_path / "maps" / "maps.csv").is_file()


def test_maps_of_one_data_set_are_not_taken_for_those_of_another(host, pictures, tmp_path, fails, capsys):
    for name in ("one", "other"):
        shutil.copytree(pictures / "train", tmp_path / name)
    for picture in (tmp_path / "other").rglob("*.png"):
        Image.open(picture).rotate(90).save(picture)
    words = ["attribute", *host, "--method", "edges", "--workers", "0", "--limit", "2", "--out", str(tmp_path / "maps")]
    assert main([*words, "--data", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert "holds maps of another command (data " in fails(*words, "--data", tmp_path / "other")
    shutil.copy(tmp_path / "other" / "a" / "0.png", tmp_path / "one" / "a" / "0.png")  # other content, the same name
    assert main([*words, "--data", str(tmp_path / "one")]) == 0
    assert "2 maps, 1 of them from before" in capsys.readouterr().out


def test_what_a_kill_leaves_is_neither_anybodys_file_nor_a_map(host, pictures, tmp_path, capsys):
    out = tmp_path / "maps"
    words = ["attribute", *host, str(pictures / "train" / "a"), "--method", "edges", "--out", str(out)]
    out.mkdir()
    (out / ".run-abcd_123.json").write_text("{")  # of a command that was killed while it wrote run.json
    assert main([*words, "--workers", "0"]) == 0
    shutil.copy(out / "0.npz", out / ".1-abcd_123.npz")
    assert main([*words, "--workers", "0"]) == 0
    assert "2 maps, 2 of them from before" in capsys.readouterr().out
    table = (out / "maps.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["name", "0", "1"]


def test_a_place_that_cannot_be_written_to_is_told_before_the_maps_are_made(host, pictures, tmp_path, fails):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    words = ["attribute", *host, pictures / "train" / "a", "--method", "edges", "--workers", 0, "--out"]
    for out in ("gone", "file", "file/maps"):
        place = tmp_path / out.split("/")[0]
        assert fails(*words, tmp_path / out) == f"{place} is no folder; name another one"


def test_a_folder_that_may_not_be_read_is_named(host, pictures, tmp_path, capsys, monkeypatch):
    shutil.copytree(pictures / "train" / "a", tmp_path / "in" / "open")
    shutil.copytree(pictures / "train" / "b", tmp_path / "in" / "locked")
    entries = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):  # modes mean nothing to an administrator
            raise PermissionError(13, "Permission denied", str(path))
        return entries(path)

    monkeypatch.setattr(os, "scandir", scandir)
    words = ["attribute", *host, str(tmp_path / "in"), "--method", "edges", "--workers", "0"]
    assert main([*words, "--out", str(tmp_path / "maps")]) == 2
    said = capsys.readouterr()
    assert f"cannot read folder {tmp_path / 'in' / 'locked'}: Permission denied" in said.err and "2 maps" in said.out

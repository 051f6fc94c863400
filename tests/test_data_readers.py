"""Readers: pictures, preprocessing and its geometry, data sets, batches, boxes and gaze."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ib_explain.data.images import ImageFiles, LabelledImages, images_of, list_images, open_dataset, read_image
from ib_explain.data.preprocessing import Placement, denormalize, preprocess
from ib_explain.metrics.ground_truth import boxes_to_masks
from tests.pictures import host, picture, plain, save, two_splits

TIMM_CONFIG = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8}


# Files.


def test_read_image_converts_to_rgb(tmp_path):
    grey = save(Image.new("L", (4, 3), 7), tmp_path / "grey.png")
    assert read_image(grey).mode == "RGB"
    assert np.asarray(read_image(grey)).tolist() == [[[7, 7, 7]] * 4] * 3
    palette = save(picture().convert("P"), tmp_path / "palette.png")
    assert read_image(palette).mode == "RGB"


def test_read_image_follows_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image = Image.new("RGB", (16, 8), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 8, 8))  # left half blue: the upper half once turned
    path = save(image, tmp_path / "turned.png", exif=exif)
    upright = read_image(path)
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2)) == (0, 0, 255)
    assert upright.getpixel((4, 13)) == (255, 0, 0)


def test_unreadable_files_are_named(tmp_path):
    garbage = tmp_path / "garbage.jpg"
    garbage.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read image .*garbage\.jpg: cannot identify"):
        read_image(garbage)
    whole = io.BytesIO()
    picture(64, 64).save(whole, "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(ValueError, match=r"cannot read image .*cut\.jpg: .*truncated"):
        read_image(cut)
    with pytest.raises(ValueError, match=r"cannot read image .*missing\.png: .*No such file"):
        read_image(tmp_path / "missing.png")
    deep = save(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)), tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"cannot read image .*deep\.png: it has more than 8 bits a channel"):
        read_image(deep)


def test_list_images(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.png"):
        save(picture(), tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.png"]
    assert list_images(tmp_path / "b.png") == [tmp_path / "b.png"]
    with pytest.raises(ValueError, match="no such image or folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty; known suffixes: \.bmp"):
        list_images(tmp_path / "empty")


# Preprocessing.


def test_preprocess_is_timms_own():
    import timm

    model = timm.create_model("test_resnet.r160_in1k", pretrained=False)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    ours = preprocess(model)
    image = picture(200, 260)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)
    assert ours(image).shape == (3, *ours.size)


def test_arguments_go_before_the_config():
    transform = preprocess(host(TIMM_CONFIG))
    assert (transform.size, transform.mean, transform.std) == ((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert transform.crop_pct == 0.8
    other = preprocess(host(TIMM_CONFIG), size=(24, 40), crop_mode="squash", crop_pct=1)
    assert (other.size, other.mean, other.crop_mode, other.crop_pct) == ((24, 40), (0.1, 0.2, 0.3), "squash", 1.0)
    assert other(picture()).shape == (3, 24, 40)


def test_nothing_is_guessed_for_other_hosts():
    with pytest.raises(ValueError, match=r"Identity carries no timm preprocessing .*; give size, mean, std"):
        preprocess(host())
    with pytest.raises(ValueError, match="; give std"):
        preprocess(host(), size=32, mean=(0, 0, 0))
    white = preprocess(host(), size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))(Image.new("RGB", (9, 9), "white"))
    torch.testing.assert_close(white, torch.full((3, 8, 8), 2.0))


def test_a_host_of_one_channel_gets_grey_pictures():
    import timm

    model = timm.create_model("test_resnet", in_chans=1, num_classes=2).eval()
    assert len(model.pretrained_cfg["mean"]) == 3  # timm keeps them
    own = preprocess(model, size=32, crop_pct=1.0)
    assert own.mean == (pytest.approx(sum(model.pretrained_cfg["mean"]) / 3),) and len(own.std) == 1
    image = picture(32, 32)
    grey = torch.from_numpy(np.asarray(image.convert("L"))) / 255
    for mode in ("center", "squash", "border"):
        given = preprocess(model, size=32, crop_pct=1.0, crop_mode=mode, mean=0.5, std=0.25)
        torch.testing.assert_close(given(image), (grey[None] - 0.5) / 0.25)
        padded = preprocess(model, size=(32, 48), crop_pct=1.0, crop_mode=mode, mean=0.5, std=0.25)(image)
        assert padded.shape == (1, 32, 48)
    assert model(given(image)[None]).shape == (1, 2)
    torch.testing.assert_close(denormalize(own(image)[None], model=model)[0], grey.expand(3, -1, -1), atol=1e-5, rtol=0)
    other = preprocess(host(), size=32, mean=(0.5,), std=(0.25,), crop_pct=1.0)  # of a host that timm did not make
    torch.testing.assert_close(other(image), (grey[None] - 0.5) / 0.25)
    with pytest.raises(ValueError, match="the model takes 6 channels, a picture has 3, or 1 in grey"):
        preprocess(timm.create_model("test_resnet", in_chans=6))
    with pytest.raises(ValueError, match="mean and std must hold 1 values"):
        preprocess(model, mean=(0.1, 0.2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_pct": 1.5}, r"crop_pct must be in \(0, 1\], got 1.5"),
        ({"crop_pct": "a"}, r"crop_pct \(a share in \(0, 1\]\) must be a number > 0, got 'a'"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest, bilinear, bicubic, .*, got 'cubic'"),
        ({"mean": float("nan")}, "mean must be a finite number, got nan"),
        ({"crop_mode": "centre"}, "crop_mode must be one of center, squash, border, got 'centre'"),
        ({"std": (1, 1, 0)}, "mean and std must hold 3 values, std > 0"),
        ({"size": 0}, "size must be an integer >= 1, got 0"),
    ],
)
def test_bad_preprocessing(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        preprocess(host(TIMM_CONFIG), **wrong)


MODES = [("center", 1.0), ("center", 0.875), ("squash", 1.0), ("squash", 0.9), ("border", 1.0), ("border", 0.8)]


@pytest.mark.parametrize(("crop_mode", "crop_pct"), MODES)
@pytest.mark.parametrize("original", [(96, 96), (61, 140), (150, 83), (640, 480)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_placement_is_the_transforms_geometry(crop_mode, crop_pct, original, size):
    """A soft spot of light ends up where its centre is said to be."""
    transform = plain(size, crop_mode, crop_pct)
    placement = transform.placement(original)
    height, width = original
    y, x = np.mgrid[:height, :width]
    sigma = 0.06 * min(original)
    checked = 0
    for centre in ((0.5 * width, 0.5 * height), (0.4 * width, 0.6 * height), (0.62 * width, 0.43 * height)):
        spot = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * sigma**2))
        light = transform(Image.fromarray((spot[..., None] * [255, 255, 255]).astype(np.uint8)))[0].double()
        (said,), inside = placement.points(torch.tensor([centre]))
        if not inside or light[[0, -1]].max() > 0 or light[:, [0, -1]].max() > 0:
            continue  # the window cuts the spot: its centroid is not its centre
        rows, columns = torch.arange(size[0]), torch.arange(size[1])
        found = torch.stack([(light.sum(0) * columns).sum(), (light.sum(1) * rows).sum()]) / light.sum()
        torch.testing.assert_close(found.float(), said, rtol=0, atol=0.06)
        density = placement.density(torch.tensor(spot)[None])
        assert density.shape == (1, *size)
        torch.testing.assert_close(density[0].double(), light, rtol=0, atol=0.02)
        checked += 1
    assert checked


def test_points_outside_of_a_crop_are_told():
    # 30x20 to 20x20: five columns lost on each side.
    moved, inside = plain((20, 20)).placement((20, 30)).points(torch.tensor([[4.4, 3], [4.5, 3], [24.4, 3], [24.5, 3]]))
    assert inside.tolist() == [False, True, True, False]
    torch.testing.assert_close(moved[1], torch.tensor([-0.5, 3.0]))


def test_boxes_are_scaled_by_their_outer_edges():
    # Two pixels become one: the box of pixels 2 to 5 holds 1 and 2 then.
    moved, share = plain((10, 10)).placement((20, 20)).boxes(torch.tensor([[2.0, 2, 5, 5], [0, 0, 19, 19]]))
    assert moved.tolist() == [[1, 1, 2, 2], [0, 0, 9, 9]]
    assert share.tolist() == [1, 1]
    enlarged, _ = plain((40, 40)).placement((20, 20)).boxes(torch.tensor([[3.0, 4, 3, 5]]))
    assert enlarged.tolist() == [[6, 8, 7, 11]]


def test_boxes_are_cut_at_the_crop():
    placement = plain((20, 20)).placement((20, 30))
    moved, share = placement.boxes(torch.tensor([[0.0, 0, 9, 9], [0, 0, 4, 9], [10, 0, 14, 9]]))
    assert share.tolist() == [0.5, 0, 1]
    assert moved[0].tolist() == [0, 0, 4, 9]
    assert moved[2].tolist() == [5, 0, 9, 9]


@pytest.mark.parametrize(("crop_mode", "crop_pct"), MODES)
def test_boxes_agree_with_a_painted_picture(crop_mode, crop_pct):
    original, box = (90, 130), (37, 21, 80, 66)
    image = Image.new("RGB", original[::-1])
    image.paste((255, 255, 255), (box[0], box[1], box[2] + 1, box[3] + 1))
    transform = plain((64, 72), crop_mode, crop_pct)
    painted = transform(image)[:1] > 0.5
    moved, share = transform.placement(original).boxes(torch.tensor([box]).float())
    assert share.item() == pytest.approx(1)
    mask = boxes_to_masks(moved, (64, 72))[0]
    # Edges may round differently by half a grey level, never by more than a pixel's line.
    union = (mask | painted).sum()
    assert ((mask ^ painted).sum() / union).item() < 0.05


def test_densities_of_another_size_are_refused():
    placement = Placement((20, 30), (20, 30), 0, 5, (20, 20))
    with pytest.raises(ValueError, match=r"density must have the picture's size \(20, 30\), got \(30, 20\)"):
        placement.density(torch.zeros(1, 30, 20))


# Data sets.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_splits(tmp_path)


@pytest.mark.parametrize(
    ("place", "split"), [("", "train"), ("", "validation"), ("", "test"), ("val", None), ("test.tar", None)]
)
def test_open_dataset(folder, place, split):
    dataset = open_dataset(folder / place, split, plain((4, 4), "squash"))
    assert isinstance(dataset, LabelledImages)
    assert [dataset[i][1] for i in range(len(dataset))] == [0, 0, 0, 1, 1, 1]
    assert [dataset.name(i) for i in (0, 5)] == ["n01/0.png", "n02/2.png"]
    images, labels = images_of(next(iter(DataLoader(dataset, batch_size=6))))
    assert images.shape == (6, 3, 4, 4)
    torch.testing.assert_close(images[:, 1, 0, 0], labels * 100 / 255)
    assert open_dataset(folder / place, split)[0][0].size == (8, 6)  # no transform: pictures


def test_a_data_set_with_an_open_tar_file_goes_to_other_processes(folder):
    """As workers that are not forked get it."""
    dataset = open_dataset(folder / "test.tar", transform=plain((4, 4), "squash"))
    first = dataset[0]  # opens what it needs
    there = pickle.loads(pickle.dumps(dataset))
    assert len(there) == len(dataset) and torch.equal(there[0][0], first[0]) and there[5][1] == dataset[5][1]
    assert torch.equal(dataset[5][0], there[5][0])  # and the first one reads on


def test_open_dataset_without_classes(tmp_path):
    for name in ("b.png", "a.png"):
        save(picture(), tmp_path / name)
    dataset = open_dataset(tmp_path, transform=plain((4, 4)))
    assert isinstance(dataset, ImageFiles)
    assert [dataset.name(i) for i in range(2)] == ["a.png", "b.png"]
    images, labels = images_of(next(iter(DataLoader(dataset, batch_size=2))))
    assert images.shape == (2, 3, 4, 4)
    assert labels is None


def test_open_dataset_mistakes(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no split 'holdout' in .*; there: test\.tar, train, val"):
        open_dataset(folder, "holdout")
    with pytest.raises(ValueError, match=r"no such folder or tar file: .*nowhere"):
        open_dataset(folder / "nowhere")
    with pytest.raises(ValueError, match=r"test\.tar is a file and has no splits; .*got split 'val'"):
        open_dataset(folder / "test.tar", "val")
    with pytest.raises(ValueError, match="root must be a folder or a tar file, got None"):
        open_dataset(None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in .*empty"):
        open_dataset(tmp_path / "empty")
    save(picture(), folder / "train" / "stray.png")
    with pytest.raises(ValueError, match="train holds images beside class folders"):
        open_dataset(folder, "train")


@pytest.mark.parametrize("packed", [False, True])
def test_pictures_of_all_kinds_count_in_class_folders_and_tar_files(tmp_path, packed):
    before = timm.data.get_img_extensions()
    for name in ("a/0.webp", "b/0.BMP", "b/1.tif", "c/0.png", "c/1.gif", "c/2.jpg", "c/3.ppm"):
        save(picture(), tmp_path / "in" / name)
    (tmp_path / "in" / "c" / "notes.txt").write_text("")
    if packed:
        with tarfile.open(tmp_path / "in.tar", "w") as tar:
            tar.add(tmp_path / "in", arcname=".")
    dataset = open_dataset(tmp_path / ("in.tar" if packed else "in"), transform=plain((4, 4)))
    assert [dataset[i][1] for i in range(len(dataset))] == [0, 1, 1, 2, 2, 2, 2]
    assert timm.data.get_img_extensions() == before


def test_a_folder_without_pictures_that_shifts_the_labels_is_told(folder):
    (folder / "val" / "n01a").mkdir()
    (folder / "val" / ".cache").mkdir()
    with pytest.warns(UserWarning, match="no pictures that can be read in n01a, so labels count the other 2 folders"):
        dataset = open_dataset(folder, "val")
    assert [dataset.load(i)[1] for i in range(len(dataset))] == [0, 0, 0, 1, 1, 1]


def test_splits_are_never_mixed(folder):
    with pytest.raises(ValueError, match=r"holds the splits test, train, val; say which with split"):
        open_dataset(folder)
    (folder / "devkit").mkdir()
    with pytest.raises(ValueError, match=r"holds the splits test, train, val; say which with split"):
        open_dataset(folder)


def test_a_broken_picture_is_an_error_not_its_neighbour(folder):
    (folder / "val" / "n01" / "1.png").write_bytes(b"broken")
    dataset = open_dataset(folder, "val", plain((4, 4)))
    with pytest.raises(ValueError, match=r"cannot read image n01/1\.png: cannot identify"):
        dataset[1]
    assert dataset[2][1] == 0


# Batches.


def test_images_of():
    x, y = torch.rand(3, 3, 4, 4), torch.tensor([2, 0, 1])
    for batch in (x, [x], (x,), (x, None)):
        images, labels = images_of(batch)
        assert images is x
        assert labels is None
    for batch in ((x, y), [x, y.int()], (x, y, "names")):
        images, labels = images_of(batch)
        assert images is x
        torch.testing.assert_close(labels, y)
    assert images_of((x, torch.full((3,), -1)))[1] is None  # timm's "no label" is no class


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"image": 1, "label": 2}, TypeError, r"\(images, labels\), got dict with keys 'image', 'label'"),
        ([], TypeError, "got list"),
        ("x", TypeError, "got str"),
        (
            (torch.rand(2, 3, 4, 4), torch.rand(2)),
            ValueError,
            r"must be 2 integers, one an image, got \(2,\) torch.float32",
        ),
        ((torch.rand(2, 3, 4, 4), torch.tensor([1])), ValueError, r"must be 2 integers, one an image, got \(1,\)"),
        ((torch.rand(2, 3, 4, 4), ["a", "b"]), ValueError, "got list"),
        ((torch.rand(2, 3, 4, 4), [1.5, 2.5]), ValueError, r"got \(2,\) torch.float64"),
        ((torch.rand(2, 3, 4, 4), torch.tensor([1, -1])), ValueError, r">= 0, or all -1 for none, got \[-1, 1\]"),
        ((torch.rand(2, 3, 4, 4), torch.tensor([-3, -2])), ValueError, r"or all -1 for none, got \[-3, -2\]"),
        (torch.rand(3, 4, 4), ValueError, r"images must have shape \(B, C, H, W\), got \(3, 4, 4\)"),
    ],
)
def test_images_of_refuses(batch, error, message):
    with pytest.raises(error, match=message):
        images_of(batch)


def test_a_label_of_255_is_one():
    _, labels = images_of((torch.zeros(2, 3, 8, 8), torch.tensor([255, 255], dtype=torch.uint8)))
    assert labels.tolist() == [255, 255]

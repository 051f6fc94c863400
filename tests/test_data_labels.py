"""What comes with pictures: boxes and gaze, brought to the size that the host sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ib_explain.data.boxes import BoxImages, read_boxes
from ib_explain.data.gaze import GazeImages, read_fixations
from ib_explain.data.images import ImageFiles, images_of, open_dataset
from ib_explain.data.preprocessing import Placement
from ib_explain.metrics.ground_truth import boxes_to_masks
from tests.pictures import picture, plain, save, two_splits

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BOXES, GAZE = SHARED / "tiny-imagenet-100", SHARED / "gaze" / "etocvd"


def needs(folder: Path) -> pytest.MarkDecorator:
    """Skip where a data set is not beside the checkout: its terms are its owners', so the repository cannot hold it."""
    return pytest.mark.skipif(not folder.is_dir(), reason=f"needs the data set {folder}, which no repository may hold")


# Boxes.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_splits(tmp_path)


def write_boxes(path: Path, *lines: str, head: str = "split,file,xmin,ymin,xmax,ymax") -> Path:
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def test_read_boxes(tmp_path):
    path = write_boxes(tmp_path / "b.csv", "val,n/a.png,1,2,3,4", "train,n/b.png,0,0,1,1", "val,n/a.png,0,0,0,0")
    assert {k: v.tolist() for k, v in read_boxes(path, "val").items()} == {"n/a.png": [[1, 2, 3, 4], [0, 0, 0, 0]]}
    assert list(read_boxes(path)) == ["n/a.png", "n/b.png"]


def test_read_boxes_mistakes(tmp_path):
    path = tmp_path / "b.csv"
    with pytest.raises(ValueError, match="no such table of boxes"):
        read_boxes(path)
    with pytest.raises(ValueError, match=r"b\.csv must have the columns .*; it lacks xmax, ymax"):
        read_boxes(write_boxes(path, head="split,file,xmin,ymin"))
    with pytest.raises(ValueError, match="holds no boxes of split 'test'; splits there: val"):
        read_boxes(write_boxes(path, "val,a,0,0,1,1"), "test")
    with pytest.raises(ValueError, match=r"b\.csv, line 3: corners must be numbers, got \['0', '0', 'one', '1'\]"):
        read_boxes(write_boxes(path, "val,a,0,0,1,1", "val,a,0,0,one,1"))
    with pytest.raises(ValueError, match=r"b\.csv, line 2: need 0 <= min <= max, got \(2, 0, 1, 1\)"):
        read_boxes(write_boxes(path, "val,a,2,0,1,1"))


def test_box_images(folder):
    boxes = {"n01/0.png": torch.tensor([[0.0, 0, 7, 5]]), "n02/2.png": torch.tensor([[0.0, 0, 0, 5], [3, 2, 4, 3]])}
    dataset = BoxImages(open_dataset(folder, "val"), boxes, plain((6, 6)))  # one column lost on each side
    assert dataset.indices == [0, 5]
    batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=BoxImages.collate)))
    assert batch.image.shape == (2, 3, 6, 6)
    assert batch.label.tolist() == [0, 1]
    assert [rows.tolist() for rows in batch.boxes] == [[[0, 0, 5, 5]], [[2, 2, 3, 3]]]
    assert boxes_to_masks(batch.boxes, (6, 6)).sum(dim=(1, 2, 3)).tolist() == [36, 4]
    assert images_of(batch)[1] is not None  # a batch with boxes is a batch


def test_box_images_mistakes(folder):
    images = open_dataset(folder, "val")
    with pytest.raises(
        ValueError, match=r"none of 6 pictures has a box; pictures are called 'n01/0.png', boxes 'val/x'"
    ):
        BoxImages(images, {"val/x": torch.zeros(1, 4)}, plain((6, 6)))
    with pytest.raises(ValueError, match=r"keep must be a share of a box's area in \(0, 1\], got 0"):
        BoxImages(images, {}, plain((6, 6)), keep=0)
    outside = BoxImages(images, {"n01/0.png": torch.tensor([[0.0, 0, 8, 5]])}, plain((6, 6)))
    with pytest.raises(ValueError, match=r"a box of n01/0.png reaches outside of its 8x6 pixels"):
        outside[0]


@needs(BOXES)
def test_tiny_imagenet_boxes():
    root = BOXES
    dataset = BoxImages(
        open_dataset(root, "val"), read_boxes(root / "boxes.csv", "val"), plain((128, 128), crop_mode="squash")
    )
    assert len(dataset) == 5000
    sample = dataset[1234]
    assert sample.image.shape == (3, 128, 128)
    stored = read_boxes(root / "boxes.csv", "val")[dataset.name(1234)][0]
    # Twice the size: four times the area.
    area = (stored[2:] - stored[:2] + 1).prod()
    assert boxes_to_masks(sample.boxes[None], (128, 128)).sum() == 4 * area
    names = [line.split(",")[1] for line in (root / "classes.csv").read_text().splitlines()[1:]]
    assert names[sample.label] == dataset.name(1234).split("/")[0]


# Gaze.


@pytest.fixture
def gaze(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        save(picture(20, 30), tmp_path / "images" / f"{name}.jpg")
        light = np.zeros((20, 30), dtype=np.uint8)
        light[10, 15] = 255
        save(Image.fromarray(light), tmp_path / "maps" / f"{name}.png")
    (tmp_path / "fixations.csv").write_text("image,x,y\ncat,15,10\ncat,0,0\ncat,15,10\n")
    return tmp_path


def test_gaze_images(gaze):
    dataset = GazeImages(gaze, plain((40, 40)))  # twice the size, ten columns lost on each side
    assert dataset.names == ["cat", "dog"]
    batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=GazeImages.collate)))
    assert batch.image.shape == (2, 3, 40, 40)
    assert batch.density.shape == (2, 1, 40, 40)
    torch.testing.assert_close(batch.density.sum(dim=(1, 2, 3)), torch.ones(2))
    # x' = (15 + 0.5) * 2 - 0.5 - 10, and the map's only light is around it.
    assert batch.fixations[0].tolist() == [[20.5, 20.5], [20.5, 20.5]]
    assert batch.density[0, 0].argmax().item() in {40 * y + x for y in (20, 21) for x in (20, 21)}
    assert batch.fixations[1].shape == (0, 2)
    assert batch.dropped.tolist() == [1, 0]
    assert dataset.dropped_share == pytest.approx(1 / 3)
    squashed = GazeImages(gaze, plain((40, 40), "squash"))
    assert squashed.dropped_share == 0
    torch.testing.assert_close(squashed[0].fixations[1], torch.tensor([0.5 * 40 / 30 - 0.5, 0.5]))


def test_gaze_mistakes(gaze):
    table = gaze / "fixations.csv"
    with pytest.raises(ValueError, match="no such table of fixations"):
        read_fixations(gaze / "none.csv")
    for text, message in (
        ("image,x\ncat,1\n", "must have the columns image, x, y; it lacks y"),
        ("image,x,y\ncat,1,one\n", r"fixations\.csv, line 2: x and y must be numbers, got \(1, one\)"),
        ("image,x,y\nbird,1,1\n", "fixations.csv has 1 names without a picture, the first is 'bird'"),
        ("image,x,y\ncat,29.5,1\n", r"fixation \(29\.5, 1\) of cat lies outside of its 30x20 pixels"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            GazeImages(gaze, plain((20, 20)))


def test_gaze_without_a_point(gaze):
    (gaze / "fixations.csv").write_text("image,x,y\n")
    dataset = GazeImages(gaze, plain((20, 20)))
    assert dataset.dropped_share == 0 and dataset[0].fixations.shape == (0, 2)


def test_tables_from_spreadsheets(tmp_path):
    table = tmp_path / "b.csv"
    table.write_text("file,xmin,ymin,xmax,ymax\ncafé.png,1,2,3,4\n\n", encoding="utf-8-sig")
    assert read_boxes(table)["café.png"].tolist() == [[1, 2, 3, 4]]
    for content, message in (
        ("file,xmin,ymin,xmax,ymax\ncafé.png,1,2,3,4\n".encode("latin-1"), "must be a table in UTF-8 text: .*0xe9"),
        (b"file,xmin,ymin,xmax,ymax\na.png,1,2,3\n", r"b\.csv, line 2: nothing stands under ymax"),
    ):
        table.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_boxes(table)


def test_whole_numbers_move_like_fractions():
    place = Placement((100, 128), (64, 64), 0, 0, (64, 64))
    for move, given in ((place.boxes, [[10, 10, 60, 60]]), (place.points, [[10, 10]])):
        for whole, fraction in zip(move(torch.tensor(given)), move(torch.tensor(given).float()), strict=True):
            assert torch.equal(whole, fraction)


def test_gaze_maps_must_fit(gaze):
    dataset = GazeImages(gaze, plain((20, 20)))
    save(Image.new("L", (29, 20)), gaze / "maps" / "cat.png")
    with pytest.raises(ValueError, match=r"cat\.png must have its picture's size \(20, 30\), got \(20, 29\)"):
        dataset[0]
    (gaze / "maps" / "dog.png").unlink()
    with pytest.raises(ValueError, match=r"no fixation map .*dog\.png"):
        dataset[1]


@needs(GAZE)
def test_etocvd():
    from ib_explain.metrics.ground_truth import centred_gaussian, other_fixations
    from ib_explain.metrics.human import auc, auc_shuffled, cc, nss

    root = GAZE
    dataset = GazeImages(root, plain((224, 224), "squash"))
    assert len(dataset) == 101
    assert sum(len(points) for points in dataset.fixations) == 7128
    assert dataset.dropped_share == 0
    assert 0.1 < GazeImages(root, plain((224, 224), crop_pct=0.875)).dropped_share < 0.5
    batch = GazeImages.collate([dataset[i] for i in range(101)])
    # The published maps on their own points, and the centre prior, at the pictures' own size: 1.89, 0.90, 0.83; 0.41,
    # 0.73, 0.71, 0.50. Squashing to 224 pixels changes them a little.
    other = other_fixations(batch.fixations)
    given = [
        nss(batch.density, batch.fixations),
        auc(batch.density, batch.fixations),
        auc_shuffled(batch.density, batch.fixations, other),
    ]
    assert_means(given, [1.89, 0.90, 0.83])
    prior = centred_gaussian((224, 224)).expand(101, -1, -1, -1)
    centre = [
        cc(prior, batch.density),
        nss(prior, batch.fixations),
        auc(prior, batch.fixations),
        auc_shuffled(prior, batch.fixations, other),
    ]
    assert_means(centre, [0.41, 0.73, 0.71, 0.50])


def assert_means(scores: list[Tensor], expected: list[float]) -> None:
    means = [round(score.mean().item(), 3) for score in scores]
    assert means == pytest.approx(expected, rel=0.02)


def test_boxes_of_a_turned_picture_are_of_its_stored_pixels(tmp_path):
    picture = Image.new("RGB", (80, 40))
    exif = picture.getexif()
    exif[0x0112] = 6  # shown turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    images = ImageFiles([tmp_path / "a.jpg"])
    assert images.load(0)[0].size == (40, 80) and images.load(0, upright=False)[0].size == (80, 40)
    whole = plain((40, 80), "squash")
    boxes = {"a.jpg": torch.tensor([[60.0, 0.0, 79.0, 39.0]])}
    assert BoxImages(images, boxes, whole)[0].boxes.tolist() == [[60.0, 0.0, 79.0, 39.0]]


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_tables_hold_finite_numbers(tmp_path, number):
    table = tmp_path / "table.csv"
    table.write_text(f"file,xmin,ymin,xmax,ymax\na.png,0,0,{number},3\n")
    with pytest.raises(ValueError, match="line 2.*need 0 <= min <= max"):
        read_boxes(table)
    table.write_text(f"image,x,y\na,1,{number}\n")
    with pytest.raises(ValueError, match="line 2.*must be numbers, got"):
        read_fixations(table)


def test_a_box_of_which_just_that_share_is_left_is_kept(tmp_path):
    save(picture(6, 8), tmp_path / "a.png")
    boxes = {"a.png": torch.tensor([[0.0, 0.0, 1.0, 5.0]])}  # the crop takes one of its two columns
    half, more = (BoxImages(ImageFiles([tmp_path / "a.png"]), boxes, plain((6, 6)), keep=k) for k in (0.5, 0.51))
    assert (len(half[0].boxes), len(more[0].boxes)) == (1, 0)


@pytest.mark.parametrize("turn", range(1, 9))
def test_gaze_on_turned_pictures(gaze, turn):
    image = picture(30, 20) if turn > 4 else picture(20, 30)
    exif = image.getexif()
    exif[0x0112] = turn
    image.save(gaze / "images" / "cat.jpg", exif=exif)
    assert GazeImages(gaze, plain((40, 40), "squash"))[0].image.shape == (3, 40, 40)


def test_a_fixation_on_the_outer_half_of_the_first_pixel(gaze):
    (gaze / "fixations.csv").write_text("image,x,y\ncat,-0.5,-0.25\n")
    assert GazeImages(gaze, plain((20, 30), "squash"))[0].fixations.tolist() == [[-0.5, -0.25]]

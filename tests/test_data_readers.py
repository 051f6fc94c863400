"""Readers: pictures, preprocessing and its geometry, data sets, batches, boxes and gaze."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ib_explain.data.boxes import BoxImages, read_boxes
from ib_explain.data.gaze import GazeImages, read_fixations
from ib_explain.data.images import ImageFiles, LabelledImages, images_of, list_images, open_dataset, read_image
from ib_explain.data.preprocessing import Placement, Preprocess, preprocess
from ib_explain.metrics.ground_truth import boxes_to_masks

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TIMM_CONFIG = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8}


def host(config: dict | None = None) -> nn.Module:
    model = nn.Identity()
    if config is not None:
        model.pretrained_cfg = config
    return model


def plain(size: tuple[int, int], crop_mode: str = "center", crop_pct: float = 1.0) -> Preprocess:
    """Preprocessing without normalisation."""
    return preprocess(
        host(),
        size=size,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        crop_mode=crop_mode,
        crop_pct=crop_pct,
        interpolation="bilinear",
    )


def picture(height: int = 20, width: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


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
    timm = pytest.importorskip("timm")
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
    with pytest.raises(ValueError, match=r"Identity carries no preprocessing of timm's .*; give size, mean, std"):
        preprocess(host())
    with pytest.raises(ValueError, match="; give std"):
        preprocess(host(), size=32, mean=(0, 0, 0))
    white = preprocess(host(), size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))(Image.new("RGB", (9, 9), "white"))
    torch.testing.assert_close(white, torch.full((3, 8, 8), 2.0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_pct": 1.5}, r"crop_pct must be in \(0, 1\], got 1.5"),
        ({"crop_mode": "centre"}, "crop_mode must be one of center, squash, border, got 'centre'"),
        ({"std": (1, 1, 0)}, "mean and std must hold 3 values, std > 0"),
        ({"size": 0}, "size must be an integer >= 1, got 0"),
    ],
)
def test_bad_preprocessing(wrong, message):
    with pytest.raises(ValueError, match=message):
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
    """Two splits of two classes with three pictures each; "test" as a tar file."""
    for split in ("train", "val"):
        for label, name in enumerate(("n01", "n02")):
            for i in range(3):
                save(Image.new("RGB", (8, 6), (10 * i, 100 * label, 0)), tmp_path / split / name / f"{i}.png")
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        for path in sorted((tmp_path / "val").rglob("*.png")):
            tar.add(path, arcname=str(path.relative_to(tmp_path / "val")))
    return tmp_path


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
        ((torch.rand(2, 3, 4, 4), [1, 2]), ValueError, "got list"),
        ((torch.rand(2, 3, 4, 4), torch.tensor([1, -1])), ValueError, ">= 0 or all missing, got 1 negative of 2"),
        (torch.rand(3, 4, 4), ValueError, r"images must have shape \(B, C, H, W\), got \(3, 4, 4\)"),
    ],
)
def test_images_of_refuses(batch, error, message):
    with pytest.raises(error, match=message):
        images_of(batch)


# Boxes.


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


def test_tiny_imagenet_boxes():
    root = SHARED / "tiny-imagenet-100"
    if not root.is_dir():
        pytest.skip(f"no data in {root}")  # the data are not in the repository; their licence is their owners'
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


def test_gaze_maps_must_fit(gaze):
    dataset = GazeImages(gaze, plain((20, 20)))
    save(Image.new("L", (29, 20)), gaze / "maps" / "cat.png")
    with pytest.raises(ValueError, match=r"cat\.png must have its picture's size \(20, 30\), got \(20, 29\)"):
        dataset[0]
    (gaze / "maps" / "dog.png").unlink()
    with pytest.raises(ValueError, match=r"no fixation map .*dog\.png"):
        dataset[1]


def test_etocvd():
    from ib_explain.metrics.ground_truth import centred_gaussian, other_fixations
    from ib_explain.metrics.human import auc, auc_shuffled, cc, nss

    root = SHARED / "gaze" / "etocvd"
    if not root.is_dir():
        pytest.skip(f"no data in {root}")  # the data are not in the repository; their licence is their owners'
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

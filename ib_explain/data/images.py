"""Pictures from files, folders and timm's data sets, and what a loader's batch holds."""

from __future__ import annotations

import contextlib
import copy
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ib_explain.checks import check_images, warn_user

__all__ = [
    "ImageFiles",
    "LabelledImages",
    "UnreadableImage",
    "images_of",
    "list_images",
    "open_dataset",
    "read_image",
    "refuse_one_batch",
]

Transform = Callable[[Image.Image], Any]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
_SPLITS = {name for group in _SYNONYMS for name in group} | {"test", "testing"}


class UnreadableImage(ValueError):
    """A file that is missing, no picture, or cut short."""


def read_image(path: str | Path, *, upright: bool = True) -> Image.Image:
    """Read a picture as 8-bit RGB, turned upright as its EXIF orientation says, or with `upright` off as it is stored.

    Raises:
        UnreadableImage: the file is missing or no picture, it is cut short, or it has more than 8 bits a channel.
    """
    with _reading(path), Image.open(path) as image:
        return _as_rgb(ImageOps.exif_transpose(image) if upright else image)


def list_images(path: str | Path) -> list[Path]:
    """The picture at `path`, or the pictures directly in the folder `path`, sorted by name; broken links, too.

    Raises:
        ValueError: nothing there, or a folder without pictures.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"no such image or folder: {path}")
    found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in _SUFFIXES and _is_or_was_a_file(entry))
    if not found:
        raise ValueError(f"no images in {path}; known suffixes: {', '.join(_SUFFIXES)}")
    return found


def _is_or_was_a_file(path: Path) -> bool:
    """Or a link to what is gone: reading it says so, where leaving it out would say nothing."""
    return path.is_file() or (path.is_symlink() and not path.exists())


class ImageFiles(Dataset[Any]):
    """Pictures without labels, turned upright; items are what `transform` makes of one."""

    def __init__(self, files: Sequence[str | Path], transform: Transform | None = None) -> None:
        self.files = [Path(file) for file in files]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        image, _ = self.load(index)
        return self.transform(image) if self.transform else image

    def load(self, index: int, *, upright: bool = True) -> tuple[Image.Image, int | None]:
        """The picture itself, without the transform, and no label; as it is stored with `upright` off."""
        return read_image(self.files[index], upright=upright), None

    def content(self, index: int) -> bytes:
        """The file itself."""
        with _reading(self.files[index]):
            return self.files[index].read_bytes()

    def name(self, index: int) -> str:
        """The file's name in its folder."""
        return self.files[index].name


class LabelledImages(Dataset[Any]):
    """What a timm reader finds; items are (transformed picture, label), label -1 where there is none.

    timm's own `ImageDataset` puts the next picture in the place of one that it cannot read, which would score the wrong
    picture under this one's name; here that is an error. Pictures stay as they are stored (no EXIF turn), as in timm's
    training and evaluation: boxes and fixations of the common data sets refer to the stored pixels.
    """

    def __init__(self, reader: Any, transform: Transform | None = None) -> None:
        self.reader = reader
        self.transform = transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.load(index)
        return self.transform(image) if self.transform else image, -1 if label is None else label

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are not forked: without the tar files that the reader holds open."""
        return {**vars(self), "reader": _closed(self.reader)}

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        """The picture itself, without the transform, and its label."""
        with _reading(f"number {index} of the data set"):
            file, label, *_ = self.reader[index]
        with _reading(self.name(index)), file, Image.open(file) as image:
            return _as_rgb(image), None if label is None else int(label)

    def content(self, index: int) -> bytes:
        """The file itself."""
        with _reading(f"number {index} of the data set"):
            file, *_ = self.reader[index]
            with file:
                return bytes(file.read())

    def name(self, index: int) -> str:
        """The file's name below the root, or the member's name in the tar file."""
        return str(self.reader.filename(index))


def open_dataset(
    root: str | Path | None, split: str | None = None, transform: Transform | None = None, *, name: str = ""
) -> Dataset[Any]:
    """Open pictures through `timm.data.create_dataset`.

    Args:
        root: a folder with one folder for each class, a tar file of such folders, or a folder of pictures, which then
            come without labels (`ImageFiles`). Class indices are timm's: names of the folders with pictures, in
            natural order. Pictures are files that end in .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff or
            .webp, and what `timm.data.add_img_extensions` adds.
        split: "train", "val", ...: the folder or tar file of that name in `root` ("validation", "valid", "eval" also
            find "val"). None reads `root` itself, which must then not be a folder of several splits.
        transform: from picture to input, `preprocess(model)`; None gives the pictures.
        name: a data set by timm's name with its prefix ("hfds/...", "wds/...", "torch/cifar10"), for which `root` and
            `split` are what timm takes them for; a split of None is its "validation".

    Returns:
        `LabelledImages` for folders, tar files and Hugging Face data sets, else what timm returns.

    Raises:
        ValueError: no such root or split, several splits and none named, no pictures, or pictures beside class folders.

    Warns:
        UserWarning: a folder in `root` has no pictures, or none that may be read, so that it is no class.
    """
    from timm.data import ImageDataset, create_dataset

    if name:
        try:
            dataset = create_dataset(name, None if root is None else str(root), split=split or "validation")
        # Each of timm's readers refuses a name, a root or a split in its own way.
        except (AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            hint = "; does it need a root?" if root is None and not isinstance(error, ImportError) else ""
            raise ValueError(f"timm cannot open the data set {name!r}{hint} ({told})") from error
    else:
        place = _find_split(root, split)
        try:
            with _all_suffixes():
                dataset = create_dataset("", str(place), search_split=False)
        except (RuntimeError, AssertionError, OSError, EOFError, tarfile.TarError) as error:
            raise ValueError(f"no images in {place}: {error}") from None
        classes = getattr(dataset.reader, "class_to_idx", {})
        if set(classes) == {""}:
            return ImageFiles(list_images(place), transform)
        if "" in classes:
            raise ValueError(f"{place} holds images beside class folders; their class is unclear")
        _warn_of_empty_folders(place, dataset.reader)
    if isinstance(dataset, ImageDataset):
        return LabelledImages(dataset.reader, transform)
    dataset.transform = transform
    return dataset


@contextlib.contextmanager
def _all_suffixes() -> Iterator[None]:
    """timm's readers look for .png, .jpg and .jpeg alone, and would leave out other pictures in silence."""
    from timm.data import get_img_extensions, set_img_extensions

    before = get_img_extensions()
    set_img_extensions((*before, *_SUFFIXES))
    try:
        yield
    finally:
        set_img_extensions(before)


def _warn_of_empty_folders(place: Path, reader: Any) -> None:
    """Such a folder shifts the labels of those behind it."""
    if not place.is_dir():
        return
    begin = len(str(place)) + 1
    full = {file[begin:].partition(os.sep)[0] for file, _ in reader.samples}
    empty = sorted(e.name for e in place.iterdir() if e.is_dir() and e.name not in full and not e.name.startswith("."))
    if empty:
        listed = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        warn_user(f"no pictures that can be read in {listed}, so labels count the other {len(full)} folders of {place}")


def refuse_one_batch(data: Any) -> None:
    """Raise a TypeError if data that should be batches is one batch (images, labels)."""
    if isinstance(data, tuple | list) and len(data) == 2 and _are_images(data[0]) and _are_labels(data[1]):
        raise TypeError("data must be an iterable of batches, got one batch (images, labels); write [(x, y)]")


def _are_images(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 4


def _are_labels(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.ndim == 1
    return isinstance(part, list | tuple) and bool(part) and all(isinstance(label, int) for label in part)


def images_of(batch: Any, *, labelled: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return images (B, C, H, W) and labels (B,) int64, or None, from what a loader yields.

    Args:
        batch: a tensor of images, or a tuple or list whose first element are the images and whose second, if there is
            one, are integer labels: a tensor, an array or a list (anything behind it is left alone). Labels that are
            all -1 mean that there are none, as in timm.
        labelled: False leaves labels alone, whatever they are.

    Raises:
        TypeError: anything else, such as a dict.
        ValueError: images of another shape, labels of another shape or type, or negative ones (unless all are -1).
    """
    if isinstance(batch, Tensor):
        return check_images(batch, name="images"), None
    if not isinstance(batch, tuple | list) or not batch:
        keys = f" with keys {', '.join(map(repr, batch))}" if isinstance(batch, dict) else ""
        raise TypeError(f"a batch must be images or (images, labels), got {type(batch).__name__}{keys}")
    images = check_images(batch[0], name="images")
    if not labelled or len(batch) == 1 or batch[1] is None:
        return images, None
    labels = batch[1]
    if isinstance(labels, np.ndarray | list) and len(labels):
        with contextlib.suppress(TypeError, ValueError):  # names, say: refused below as they are
            labels = torch.from_numpy(np.asarray(labels))
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.dtype not in _INTEGERS:
        came = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        told = f"the batch's labels must be {len(images)} integers, one an image, got {came}"
        raise ValueError(f"{told}; where there is no one class, yield the images alone")
    labels = labels.long()  # 255 of uint8 is no -1
    missing = bool((labels == -1).all())
    if not missing and bool((labels < 0).any()):
        raise ValueError(f"the batch's labels must be >= 0, or all -1 for none, got {sorted(set(labels.tolist()))[:8]}")
    return images, None if missing else labels


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _closed(reader: Any) -> Any:
    """A copy of one of timm's readers, or of what it knows of a tar file, with no file open."""
    if isinstance(reader, dict):
        return {name: _closed(part) for name, part in reader.items()}
    closed = copy.copy(reader)
    for name in {"tarfile", "tf"} & vars(closed).keys():
        setattr(closed, name, None)
    for name in {"tar_state", "children"} & vars(closed).keys():
        setattr(closed, name, _closed(getattr(closed, name)))
    return closed


def _find_split(root: str | Path | None, split: str | None) -> Path:
    if root is None:
        raise ValueError("root must be a folder or a tar file, got None; only named data sets can do without")
    place = Path(root)
    if not place.exists():
        raise ValueError(f"no such folder or tar file: {root}; a data set by timm's name goes into name=")
    if split is None:
        if place.is_dir() and len(splits := _split_names(place)) > 1:
            raise ValueError(f"{place} holds the splits {', '.join(splits)}; say which with split (--split)")
        return place
    if place.is_file():
        raise ValueError(
            f"{place} is a file and has no splits; leave split out or give its folder, got split {split!r}"
        )
    names = [split, *(other for group in _SYNONYMS if split in group for other in group if other != split)]
    for candidate in (place / f"{name}{suffix}" for name in names for suffix in ("", ".tar")):
        if candidate.is_dir() or (candidate.suffix == ".tar" and candidate.is_file()):
            return candidate
    there = sorted(entry.name for entry in place.iterdir() if entry.is_dir() or entry.suffix == ".tar")
    raise ValueError(f"no split {split!r} in {place}; there: {', '.join(there[:12]) or 'no folder and no tar file'}")


def _split_names(place: Path) -> list[str]:
    """Folders and tar files in `place` that are called as splits are."""
    found = [entry for entry in sorted(place.iterdir()) if entry.is_dir() or entry.suffix == ".tar"]
    names = [entry.name.removesuffix(".tar") for entry in found]
    return [name for name in dict.fromkeys(names) if name in _SPLITS]


@contextlib.contextmanager
def _reading(what: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # all of which Pillow raises
        raise UnreadableImage(f"cannot read image {what}: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Pillow would clip such values to 255 and hand back a white picture.
        raise OSError(f"it has more than 8 bits a channel (mode {image.mode}); convert it first")
    return image.convert("RGB")

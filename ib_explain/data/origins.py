"""Where the pictures of a data set lie, and what its class folders are called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Subset

from ib_explain.data.boxes import BoxImages
from ib_explain.data.images import ImageFiles

__all__ = ["check_outside", "class_folders", "root_of", "source_of"]


def class_folders(data: Any) -> list[str] | None:
    """Names of the class folders in the order of their indices, or None where there are none.

    Args:
        data: a data set as `open_dataset` or torchvision opens it, a part of one, or a loader of it.
    """
    data = _behind(data)
    reader = getattr(data, "reader", None)
    # timm's readers of folders and of tar files and torchvision's data sets call it differently.
    owners = ((reader, "class_to_idx"), (reader, "class_name_to_idx"), (data, "class_to_idx"))
    indices: dict[str, int] = next((found for owner, name in owners if (found := getattr(owner, name, None))), {})
    return sorted(indices, key=lambda name: indices[name]) or None


def root_of(data: Any) -> Path | None:
    """The folder that all picture files lie in, or None where the data set is none of files or does not tell."""
    data = _behind(data)
    if isinstance(data, ImageFiles):
        return Path(os.path.commonpath([file.absolute().parent for file in data.files]))
    holder = data if hasattr(data, "samples") else getattr(data, "reader", None)  # torchvision's folders, or timm's
    root = getattr(holder, "root", None)
    return Path(root) if isinstance(root, str | os.PathLike) else None


def check_outside(out: str | os.PathLike[str], root: Path | None) -> None:
    """Keep results out of the pictures' folder, where they would be taken for a class, or explained, the next time.

    Args:
        out: where results are to go; one that is there already, from before this was refused, may be gone on with.
        root: what `root_of` told of the data.

    Raises:
        ValueError: `out` lies in `root`, or is it.
    """
    if root is None:
        return
    place, above = Path(out).resolve(), root.resolve()
    begun = (place / "run.json").is_file() or (place / "config.json").is_file()
    if place == above or (above in place.parents and not begun):
        raise ValueError(f"out must not lie in the folder of the data, {root}; got {out}")


def source_of(data: Any) -> str:
    """A line that tells what kind of data these are, and of which folder."""
    dataset = getattr(data, "dataset", None)
    root = getattr(dataset, "root", None) or getattr(getattr(dataset, "reader", None), "root", None)
    kind = type(data).__name__ if dataset is None else f"{type(data).__name__} over {type(dataset).__name__}"
    return f"{kind} at {root}" if root else kind


def _behind(data: Any) -> Any:
    """The data set behind loaders, parts and boxes."""
    while isinstance(data, DataLoader | Subset | BoxImages):
        data = data.images if isinstance(data, BoxImages) else data.dataset
    return data

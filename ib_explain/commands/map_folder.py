"""The folder that `ib-explain attribute` fills: picture and raw map of each image, a table, and what made them."""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import json
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ib_explain.files import check_writable, is_leftover, replace_file
from ib_explain.visualize import is_contact_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SHEET", "MapFolder", "is_map_folder", "plan_names"]

RUN, TABLE = "run.json", "maps.csv"
MADE_BY = {"made by": "ib-explain attribute"}  # tells our run.json from others
SHEET = "sheet.png"
RESERVED = ("sheet",)  # names that no image gets
DAMAGED = (OSError, ValueError, KeyError, zlib.error, zipfile.BadZipFile)  # what reading a damaged .npz raises


Free: TypeAlias = Callable[[str, int], bool]


class MapFolder:
    """NAME.png and NAME.npz for each image, `maps.csv` with a line an image, `run.json` with what made them.

    Calls of one command with other images add to the folder; `sheet.png` shows those of the last call.

    An .npz holds `map` (H, W) float32 at the host's input resolution and the facts about it: `image` (its path),
    `digest` (of the file's bytes), `unit`, `bits` (the map's sum; NaN where the unit is another), `target` (class
    index), `target_name` ("" if unknown), `probability` of that class, `label` (-1 if unknown).

    Args:
        path: of the folder; made with the first map.
        command: what decides the maps, JSON values. A folder that the same command made is continued.
        overwrite: the first new map replaces all that an earlier command made, and files of the same names.

    Raises:
        ValueError: the folder holds the maps of another command, or other files, and `overwrite` is off.
        OSError: it is a file, or cannot be written to.
    """

    def __init__(self, path: str | Path, command: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        check_writable(self.path)  # before the maps are made
        before = _command_of(self.path)
        if not overwrite and before is not None and before != command:
            changed = [key for key in {**before, **command} if before.get(key) != command.get(key)]
            what = ", ".join(f"{key} {_value(before, key)}, now {_value(command, key)}" for key in changed[:3])
            raise ValueError(f"{self.path} holds maps of another command ({what}); name another --out or --overwrite")
        others = [] if not self.path.is_dir() else [entry for entry in self.path.iterdir() if not is_leftover(entry)]
        if not overwrite and before is None and others:
            raise ValueError(f"{self.path} holds other files; name another --out, or --overwrite to write among them")
        self.command, self._overwrite = command, overwrite
        self._replaces = overwrite and before is not None  # until the first new map is there

    def holds(self, name: str, digest: Callable[[], str]) -> bool:
        """Whether this image is done; a map of that name may belong to another image, with another digest."""
        if self._replaces:
            return False
        if not (self._picture(name).is_file() and _is_ours(self._raw(name))):
            return False
        try:
            return self.read(name)[0]["digest"] == digest()
        except DAMAGED:  # it is made again
            return False

    def belongs(self, name: str, path: Path, digest: Callable[[], str]) -> bool:
        """Whether a name is free for this image: no file of that name, or a map of this path or of this content."""
        if self._overwrite:
            return True
        if not _is_ours(self._raw(name)):
            there = self._picture(name).exists() or self._raw(name).exists()
            return not there or name in self._listed  # the user's own, or a map of ours that was damaged
        try:
            facts = self._facts(name)
            return Path(facts["image"]).resolve() == path.resolve() or facts["digest"] == digest()
        except DAMAGED:  # it is made again
            return True

    @functools.cached_property
    def _listed(self) -> frozenset[str]:
        """Names in the table that an earlier call wrote."""
        try:
            with (self.path / TABLE).open(newline="", encoding="utf-8") as stream:
                return frozenset(row["name"] for row in csv.DictReader(stream))
        except (OSError, ValueError, KeyError, csv.Error):  # none, or not ours
            return frozenset()

    def check_inputs(self, names: Iterable[str], images: Iterable[Path]) -> None:
        """Make sure that no picture is written over an image that is explained, and the sheet over none but a sheet.

        The latter only without `overwrite`; the images are safe in any case.

        Raises:
            ValueError: it would be.
        """
        explained = {image.resolve() for image in images}
        for picture in (*(self._picture(name) for name in names), self.path / SHEET):
            if picture.resolve() in explained:
                told = f"{picture} is one of the images and would be written over"
                raise ValueError(f"{told}; name another --out")
        sheet = self.path / SHEET
        if sheet.exists() and not self._overwrite and not is_contact_sheet(sheet):
            raise ValueError(f"{sheet} is no sheet that ib-explain drew; move it, or name another --out or --overwrite")

    def add(self, name: str, heat: Tensor, facts: dict[str, Any], figure: Figure) -> None:
        """Write one image's picture and its raw map (1, H, W); with the first one, what made them."""
        if self._replaces:
            self._remove_maps()
            self._replaces = False
        if _command_of(self.path) != self.command:
            with replace_file(self.path / RUN) as file:
                file.write_text(json.dumps({**MADE_BY, **self.command}, indent=2) + "\n", encoding="utf-8")
        # First what tells that the name is ours: a call that is stopped here finds its own files, not somebody's.
        with replace_file(self._raw(name)) as file:
            np.savez_compressed(file, map=heat[0].cpu().numpy(), **facts)
        with replace_file(self._picture(name)) as file:
            figure.savefig(file)

    def read(self, name: str) -> tuple[dict[str, Any], Tensor]:
        """The facts and the map (1, H, W) of an image that is done."""
        with np.load(self._raw(name)) as raw:
            return self._facts(name), torch.from_numpy(raw["map"])[None]

    def _facts(self, name: str) -> dict[str, Any]:
        """The facts alone: the map is the larger part of a file."""
        with np.load(self._raw(name)) as raw:
            return {key: raw[key].item() for key in raw.files if key != "map"}

    def finish(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Write the table over all maps that are here, these images first, and return the rows of these."""
        chosen = [{"name": name, **self._facts(name)} for name in names]
        if not chosen:
            return []
        rows = chosen + self._others({row["name"] for row in chosen})
        with (
            replace_file(self.path / TABLE) as file,
            file.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
        ):
            writer = csv.DictWriter(stream, list(rows[0]), extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return chosen

    def _others(self, names: Collection[str]) -> list[dict[str, Any]]:
        """Rows of the maps that earlier calls made of other images."""
        rows = []
        for raw in sorted(self.path.rglob("*.npz")):
            name = raw.relative_to(self.path).with_suffix("").as_posix()
            if name not in names and not is_leftover(raw) and _is_ours(raw):
                with contextlib.suppress(*DAMAGED):
                    rows.append({"name": name, **self._facts(name)})
        return rows

    def _picture(self, name: str) -> Path:
        return self.path / f"{name}.png"

    def _raw(self, name: str) -> Path:
        return self.path / f"{name}.npz"

    def _remove_maps(self) -> None:
        """Remove the pairs of picture and raw map, the table and the sheet; other files stay."""
        for raw in self.path.rglob("*.npz"):
            if _is_ours(raw):
                raw.with_suffix(".png").unlink(missing_ok=True)
                raw.unlink()
        for made in (RUN, TABLE, SHEET):
            (self.path / made).unlink(missing_ok=True)


def is_map_folder(path: Path) -> bool:
    """Whether `ib-explain attribute` made this folder: what it shows are maps, and no pictures to explain."""
    return _command_of(path) is not None


def _value(command: dict[str, Any], key: str) -> Any:
    """As the user would have written it: bits, the default, stands in no command."""
    return command.get(key, "bits" if key == "output" else None)


def _command_of(path: Path) -> dict[str, Any] | None:
    """What made the maps in a folder, or None if there are none of ours."""
    try:
        found = json.loads((path / RUN).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    if not isinstance(found, dict) or found.items() & MADE_BY.items() != MADE_BY.items():
        return None
    return {key: value for key, value in found.items() if key not in MADE_BY}


def _is_ours(raw: Path) -> bool:
    """Whether a file is a raw map that this command wrote."""
    try:
        with zipfile.ZipFile(raw) as held:
            names = {name.removesuffix(".npy") for name in held.namelist()}
    except (OSError, zipfile.BadZipFile):  # none, or no archive
        return False
    return names >= {"map", "image", "digest", "unit", "target"}


def plan_names(sources: Sequence[tuple[Path, Path]], free: Free | None = None) -> list[str]:
    """A name for each image, unique and the same in every run with the same images.

    The name is the path below the folder that was given, without suffix. Where several images would share it, the first
    keeps it, the others get their suffix appended, then a number.

    Args:
        sources: (path, path below the folder that was given) of each image.
        free: whether an image may have a name; takes that and its place among the sources.
    """
    taken: dict[str, None] = dict.fromkeys(RESERVED)  # an ordered set
    for place, (path, below) in enumerate(sources):
        plain = below.with_suffix("").as_posix().replace("../", "").lstrip("/")
        with_suffix = [f"{plain}-{path.suffix[1:]}"] if path.suffix else []
        names = itertools.chain([plain], with_suffix, (f"{plain}-{number}" for number in itertools.count(2)))
        taken[next(n for n in names if n not in taken and (free is None or free(n, place)))] = None
    return list(taken)[len(RESERVED) :]

"""`ib-explain attribute MODEL IMAGE...`: a picture and the raw map of each image."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ib_explain.attribution import attribute as make_maps
from ib_explain.bottleneck.gates import GATES
from ib_explain.checks import did_you_mean
from ib_explain.commands.common import (
    check_data,
    has_timm_weights,
    load_with_size,
    plain_name,
    preprocess_for,
)
from ib_explain.commands.map_folder import SHEET, MapFolder, is_map_folder, plan_names
from ib_explain.data.images import ImageFiles, LabelledImages, UnreadableImage, list_images, open_dataset
from ib_explain.data.origins import check_outside, class_folders, root_of
from ib_explain.data.preprocessing import Preprocess
from ib_explain.hosts import class_names
from ib_explain.ib import IBAttention
from ib_explain.io import WEIGHTS, host_facts, read_folder, saved_folder
from ib_explain.maps import in_bits
from ib_explain.methods.base import METHODS
from ib_explain.modules import host_device
from ib_explain.outputs import OUTPUTS
from ib_explain.progress import Progress
from ib_explain.targets import resolve_target
from ib_explain.texts import one_line
from ib_explain.visualize import contact_sheet, visualize

__all__ = ["run"]

SHEET_IMAGES = 48
LISTED = 12  # images named on the terminal; the table names all

Pictures = ImageFiles | LabelledImages


def run(args: argparse.Namespace) -> int:
    """Make the maps that are not there yet. Images that cannot be read are named and skipped; the code is then 2."""
    unit, fitted_size = _check(args)
    problems: list[str] = []
    out = args.out or Path(f"{plain_name(args.model)}-maps")
    pictures, below = _pictures(args, out, problems)
    host, size = load_with_size(args, fitted_size)
    transform = preprocess_for(host, size)
    fitted = None if args.bottleneck is None else IBAttention.load(args.bottleneck, host)
    folder = MapFolder(out, _command(args, host, size), overwrite=args.overwrite)
    # Those of the fit are the model's; a folder of some classes has fewer.
    folders = ((fitted.record or {}).get("class_folders") if fitted else None) or class_folders(pictures)
    classes = class_names(host, imagenet=has_timm_weights(args), folders=folders)
    paths = [path for path, _ in below]
    digests = [functools.partial(_digest, pictures, i) for i in range(len(paths))]
    names = plan_names(below, lambda name, i: folder.belongs(name, paths[i], digests[i]))
    folder.check_inputs(names, paths)
    reader = _Reader(pictures, transform)
    done = {i for i, name in enumerate(names) if folder.holds(name, digests[i])}
    todo = [i for i in range(len(names)) if i not in done]

    with Progress(len(todo), "attribute", show=len(todo) > 1) as progress:
        loader = DataLoader(reader, args.batch_size, sampler=todo, num_workers=args.workers, collate_fn=list)
        for batch in loader if todo else ():
            for item in batch:
                if item.problem:
                    _complain(item.problem, problems)
                    progress.step()
            items = [item for item in batch if item.image is not None]
            if not items:
                continue
            x = torch.stack([item.image for item in items]).to(host_device(host))
            with torch.no_grad():
                shares = host(x).float().softmax(dim=1)
            target = resolve_target(args.target, shares)
            maps = make_maps(
                host,
                x,
                target=target,
                method=fitted or args.method,
                layer=args.layer,
                seed=args.seed,
                **({"refine": args.refine, "output": args.output} if fitted else {}),
            )
            for row, item in enumerate(items):
                index = int(target[row])
                facts = {
                    "image": str(paths[item.place]),
                    "digest": item.digest,
                    "unit": unit,
                    "bits": float(maps[row].sum()) if in_bits(unit) else math.nan,
                    "target": index,
                    "target_name": classes[index] if classes else "",
                    "probability": float(shares[row, index]),
                    "label": item.label,
                }
                figure = visualize(x[row, None], maps[row, None], model=host, titles=[_title(facts)], unit=unit)
                folder.add(names[item.place], maps[row], facts, figure)
                done.add(item.place)
                progress.step()

    rows = folder.finish([names[i] for i in sorted(done)])  # those of this call
    if len(done) > 1:
        _draw_sheet(folder, host, reader, sorted(done)[:SHEET_IMAGES], names, unit)
    _report(folder.path, rows, len(names) - len(todo), unit)
    return 2 if problems else 0


class _Item(NamedTuple):
    """One image, read; or the problem with it."""

    place: int
    image: Tensor | None
    """(3, H, W)"""
    label: int
    """-1 if unknown."""
    digest: str
    problem: str


class _Reader(Dataset[_Item]):
    """Reads and preprocesses; a picture that cannot be read is an item with a problem, not an exception."""

    def __init__(self, pictures: Pictures, transform: Preprocess) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> _Item:
        try:
            image, label = self.pictures.load(index)
        except UnreadableImage as error:
            return _Item(index, None, -1, "", str(error))
        return _Item(index, self.transform(image), -1 if label is None else label, _digest(self.pictures, index), "")


def _digest(pictures: Pictures, index: int) -> str:
    """Of a picture's bytes; nothing for one that cannot be read."""
    try:
        return hashlib.sha256(pictures.content(index)).hexdigest()[:16]
    except UnreadableImage:
        return ""


def _check(args: argparse.Namespace) -> tuple[str, tuple[int, int, int] | None]:
    """Check the options against each other; return the maps' unit and the input size of the bottleneck, if given."""
    data = args.data is not None or bool(args.dataset)
    if data == bool(args.images):
        raise ValueError(f"name images, or --data ROOT, got {'both' if data else 'neither'}")
    if args.split is not None and args.images:
        raise ValueError("--split goes with --data, not with images by name")
    if args.bottleneck is None:
        if args.refine:
            raise ValueError("--refine starts from a fitted bottleneck; give --bottleneck FOLDER")
        if args.output != "bits":
            raise ValueError(f"--output {args.output} is of a fitted bottleneck; give --bottleneck FOLDER")
        check_data(args)
        return str(METHODS.get(args.method).unit), None  # type: ignore[attr-defined]
    if args.layer is not None or args.method != "ib":
        raise ValueError("a bottleneck has its own layer and method; leave --layer and --method out")
    if args.output == "relevance" and args.refine:
        raise ValueError("--refine moves the attention, and relevance does not depend on it; leave one out")
    if args.output not in OUTPUTS:
        raise ValueError(f"unknown output {args.output!r}{did_you_mean(args.output, OUTPUTS)}")
    check_data(args)
    _, config = read_folder(args.bottleneck)
    channels, height, width = config["input_size"]
    if args.output == "relevance" and not config.get("relevance"):
        raise ValueError(f"{args.bottleneck} was fitted without --relevance")
    if args.output == "bits" and not GATES.get(config["gate"]).measures_bits:
        raise ValueError(
            f"{args.bottleneck} has the gate {config['gate']!r}, which measures no bits; give --output attention"
        )
    return OUTPUTS[args.output], (channels, height, width)


def _pictures(args: argparse.Namespace, out: Path, problems: list[str]) -> tuple[Pictures, list[tuple[Path, Path]]]:
    """The pictures to explain and, for each, its path and its path below what the user named.

    Raises:
        ValueError: there is none at all.
    """
    if not args.images:
        data = open_dataset(args.data, args.split, name=args.dataset)
        if not isinstance(data, ImageFiles | LabelledImages):
            raise ValueError(f"cannot explain a {type(data).__name__}, which has no names of images; name a folder")
        check_outside(out, root_of(data))
        count = min(len(data), args.limit or len(data))
        return data, [(Path(data.name(i)), Path(data.name(i))) for i in range(count)]
    found: list[tuple[Path, Path]] = []
    for given in args.images:
        if given.is_dir():
            below = [(path, path.relative_to(given)) for path in _all_below(given, out, problems)]
            if not below:
                _complain(f"no images in {given} or below", problems)
            found += below
        elif given.exists():
            found.append((given, Path(given.name)))
        else:
            _complain(f"no such image or folder: {given}", problems)
    if not found:
        raise ValueError("no image to explain")
    found = list(dict.fromkeys(found))[: args.limit]
    return ImageFiles([path for path, _ in found]), found


def _all_below(folder: Path, out: Path, problems: list[str]) -> list[Path]:
    """Pictures in a folder and below, but for those in `out` and those that earlier runs made."""
    found: list[Path] = []

    def locked(error: OSError) -> None:
        _complain(f"cannot read folder {error.filename}: {error.strerror}", problems)

    for directory, folders, _files in os.walk(folder, onerror=locked):
        below = sorted(Path(directory) / name for name in folders)
        folders[:] = [path.name for path in below if path.resolve() != out.resolve() and not is_map_folder(path)]
        with contextlib.suppress(ValueError):  # a folder without pictures of its own
            found += list_images(directory)
    return found


def _command(args: argparse.Namespace, host: nn.Module, size: tuple[int, int, int]) -> dict[str, Any]:
    """What decides the maps: a folder is continued only by the same."""
    command = {
        "model": args.model,
        "weights": host_facts(host)["weights"],
        "input_size": list(size),
        "target": args.target,
        "seed": args.seed,
        **{name: list(given) for name in ("mean", "std") if (given := getattr(args, name)) is not None},
    }
    if not args.images:
        root = None if args.data is None else str(args.data.resolve())
        command |= {"data": root, "dataset": args.dataset, "split": args.split}
    if args.bottleneck is None:
        return command | {"method": args.method, "layer": args.layer}
    content = (saved_folder(args.bottleneck) / WEIGHTS).read_bytes()
    chosen = {"refine": args.refine} | ({} if args.output == "bits" else {"output": args.output})
    return command | {"bottleneck": hashlib.sha256(content).hexdigest()[:16], **chosen}


def _title(facts: dict[str, Any]) -> str:
    return f"{facts['target_name'] or 'class ' + str(facts['target'])}, p = {facts['probability']:.2f}"


def _draw_sheet(
    folder: MapFolder, host: nn.Module, reader: _Reader, chosen: Sequence[int], names: Sequence[str], unit: str
) -> None:
    """Draw images and maps that are in the folder on one sheet."""
    images, maps, titles = [], [], []
    for i in chosen:
        image = reader[i].image
        if image is not None:
            facts, heat = folder.read(names[i])
            images.append(image)
            maps.append(heat)
            titles.append(_title(facts))
    contact_sheet(torch.stack(images), torch.stack(maps), folder.path / SHEET, model=host, titles=titles, unit=unit)


def _report(path: Path, rows: Sequence[dict[str, Any]], before: int, unit: str) -> None:
    """Say what was made and where it is."""
    width = max((len(one_line(row["name"])) for row in rows[:LISTED]), default=0)
    for row in rows[:LISTED]:
        amount = f"{row['bits']:7.1f} {unit}" if in_bits(unit) else ""
        print(f"{one_line(row['name']):<{width}}  {_title(row)}  {amount}".rstrip())
    if len(rows) > LISTED:
        print(f"... and {len(rows) - LISTED} more")
    known = f", {before} of them from before" if before else ""
    mean = f"; {sum(row['bits'] for row in rows) / len(rows):.1f} {unit} per image" if rows and in_bits(unit) else ""
    print(f"{len(rows)} maps{known}{mean}")
    if not rows:
        return
    sheet = f", {SHEET}" if len(rows) > 1 else ""
    print(f"in {path}: NAME.png, NAME.npz (raw), maps.csv{sheet}")


def _complain(problem: str, problems: list[str]) -> None:
    problems.append(problem)
    tqdm.write(f"ib-explain: {one_line(problem)}", file=sys.stderr)

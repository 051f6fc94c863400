"""`ib-explain benchmark MODEL`: compare methods by metrics; a table, figures and one page."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ib_explain.benchmark import benchmark
from ib_explain.commands.common import check_data, load_with_size, note, plain_name, preprocess_for
from ib_explain.data.boxes import BoxImages, read_boxes
from ib_explain.data.csv_tables import columns
from ib_explain.data.gaze import GazeImages
from ib_explain.data.images import ImageFiles, LabelledImages, open_dataset
from ib_explain.data.origins import class_folders
from ib_explain.data.preprocessing import Preprocess
from ib_explain.ib import IBAttention
from ib_explain.io import read_folder
from ib_explain.methods import METHODS
from ib_explain.metrics import METRICS
from ib_explain.samples import TRUTHS
from ib_explain.sites import resolve_site
from ib_explain.sources import BATCH

__all__ = ["run"]

METRICS_BY_DEFAULT = ("insertion", "deletion", "degradation_8", "tied_share", "time")
WITH_TRUTH = {
    "masks": ("pointing_game", "energy_inside", "top_share"),
    "fixations": ("nss", "auc", "auc_shuffled"),
    "density": ("cc", "sim", "kld"),
}
FITTED = "ib_fitted"


def run(args: argparse.Namespace) -> int:
    """Measure what is not measured yet, write everything, and say how the methods stand."""
    truths = ("masks",) if args.boxes else ("fixations", "density") if args.gaze else ()
    methods = _named(args.methods, METHODS, besides=() if args.bottleneck is None else (FITTED,))
    by_default = [*METRICS_BY_DEFAULT, *(name for truth in truths for name in WITH_TRUTH[truth])]
    metrics = by_default
    if args.metrics is not None:
        metrics = _named(args.metrics, METRICS, lacking=set(TRUTHS) - set(truths))
    _check(args)
    fitted_size = None
    if args.bottleneck is not None:
        channels, height, width = read_folder(args.bottleneck)[1]["input_size"]
        fitted_size = channels, height, width
    host, size = load_with_size(args, fitted_size)
    if args.layer is not None:
        resolve_site(host, args.layer, size)  # refuses one without a grid, where all methods that look at it would fail
    contenders: dict[str, Any] = {}
    if args.bottleneck is not None:
        contenders[FITTED] = IBAttention.load(args.bottleneck, host)
    contenders |= {name: name for name in methods}
    data = _data(args, preprocess_for(host, size))
    if args.target == "label":
        _check_labels(class_folders(data), host)
    out = args.out or Path(f"{plain_name(args.model)}-benchmark")
    board = benchmark(
        host,
        DataLoader(data, BATCH, num_workers=args.workers, collate_fn=getattr(data, "collate", None)),
        methods=contenders,
        metrics=metrics,
        images=args.count,
        out=out,
        reference=args.reference,
        target=args.target,
        layer=args.layer,
        batch_size=args.batch_size,
        seed=args.seed,
        data_name=_data_name(args),
        extend=args.extend,
    )
    if board.store.rank == 0:
        print(board)
        print(f"in {out}: report.html, summary.md, summary.csv, summary.json, rows.csv, figures")
    return 0


def _check_labels(folders: list[str] | None, host: nn.Module) -> None:
    """Refuse class folders that cannot be the model's classes: their labels would be other classes' indices."""
    classes = getattr(host, "num_classes", None)
    if folders and classes and len(folders) != classes:
        raise ValueError(
            f"--target label needs a class folder for each of the model's {classes} classes, got {len(folders)}, "
            f"{folders[0]} as class 0"
        )


def _named(given: str, registry: Any, *, besides: Collection[str] = (), lacking: Collection[str] = ()) -> list[str]:
    """The names that an option lists, without those that take part besides; "all" are all that the data allows."""
    names = [name for name in (word.strip() for word in given.split(",")) if name and name not in besides]
    if names == ["all"]:
        return [name for name in registry if not _lacks(registry.get(name), lacking)]
    for name in names:
        if name == FITTED and name not in registry:
            raise ValueError(f"{FITTED} is the fitted bottleneck: give --bottleneck FOLDER")
        registry.get(name)
    return list(dict.fromkeys(names))


def _lacks(entry: Any, lacking: Collection[str]) -> bool:
    needs = set(getattr(entry, "needs", ()))
    return not needs.isdisjoint(lacking) or ("other" in needs and "fixations" in lacking)


def _check(args: argparse.Namespace) -> None:
    if (args.gaze is not None) == (args.data is not None or bool(args.dataset)):
        came = "both" if args.gaze else "neither"
        raise ValueError(f"benchmark needs images: --data ROOT (or --dataset NAME), or --gaze FOLDER; got {came}")
    if args.gaze is not None:
        for name in ("boxes", "split"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} goes with --data, not with --gaze")
    check_data(args)
    if args.boxes is not None and not args.boxes.is_file():
        raise ValueError(f"no such table of boxes: {args.boxes}")


def _data(args: argparse.Namespace, preprocess: Preprocess) -> Any:
    if args.gaze is not None:
        gaze = GazeImages(args.gaze, preprocess)
        if gaze.dropped_share > 0:
            note(f"the model's crop loses {gaze.dropped_share:.1%} of the fixations")
        return gaze
    if args.boxes is None:
        return open_dataset(args.data, args.split, preprocess, name=args.dataset)
    images = open_dataset(args.data, args.split, name=args.dataset)
    if not isinstance(images, ImageFiles | LabelledImages):
        raise ValueError(f"a {type(images).__name__} has no names of images, by which boxes are found; name a folder")
    split = args.split if "split" in columns(args.boxes, "boxes") else None
    return BoxImages(images, read_boxes(args.boxes, split), preprocess)


def _data_name(args: argparse.Namespace) -> str:
    parts = [args.dataset or (args.gaze or args.data).name, args.split]
    return " ".join(str(part) for part in parts if part)

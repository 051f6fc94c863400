"""`ib-explain fit MODEL`: fit a bottleneck on training images and save it. Images that cannot be read are left out."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ib_explain.bottleneck.gates import GATES
from ib_explain.checkpoints import CHECKPOINT_FILES
from ib_explain.commands.common import (
    check_data,
    load_with_size,
    note,
    plain_name,
    preprocess_for,
    times,
)
from ib_explain.data.images import ImageFiles, LabelledImages, UnreadableImage, open_dataset
from ib_explain.data.origins import check_outside, class_folders, root_of
from ib_explain.files import check_replaceable, current_folder, remove_folder
from ib_explain.ib import IBAttention
from ib_explain.io import FILES
from ib_explain.modules import host_device

__all__ = ["run"]

CHECKPOINT_EVERY = 10  # steps; a default fit may have no more than 100


def run(args: argparse.Namespace) -> int:
    """Fit, save, and say what came out. With several processes, the first one writes and speaks."""
    out = args.out or Path(f"{plain_name(args.model)}-ib")
    if not out.name:
        raise ValueError(f"--out must name a folder of its own, got {str(out)!r}; name one in it")
    checkpoint = out.with_name(out.name + ".checkpoint")
    _check_folders(out, checkpoint, resume=args.resume, overwrite=args.overwrite)
    replaces = args.overwrite or out.exists()
    if args.data is None and not args.dataset:
        raise ValueError("fit needs training images; give --data ROOT or --dataset NAME")
    check_data(args)
    host, size = load_with_size(args)
    options = {name: getattr(args, name) for name in ("gate", "reads", "anchors", "relevance", "seed")}
    ib = IBAttention(host, args.layer, **options)
    # Without a split a named data set gives its validation images.
    split = args.split or ("train" if args.dataset else None)
    data = open_dataset(args.data, split, preprocess_for(host, size), name=args.dataset)
    check_outside(out, root_of(data))
    classes = class_folders(data)
    sized = not isinstance(data, IterableDataset)
    readable = ReadableImages(data) if isinstance(data, ImageFiles | LabelledImages) else None
    loader = DataLoader(
        data if readable is None else readable,
        args.batch_size,
        shuffle=sized,
        num_workers=args.workers,
        pin_memory=host_device(host).type == "cuda",
        drop_last=sized and len(data) >= args.batch_size,  # type: ignore[arg-type]
    )
    first = int(os.environ.get("RANK", "0")) == 0
    started = time.monotonic()
    try:
        ib.fit(
            loader,
            steps=args.steps,
            beta=args.beta,
            objective=args.objective,
            precision=args.precision,
            checkpoint=checkpoint,
            every=CHECKPOINT_EVERY,
            resume=args.resume,
        )
    except KeyboardInterrupt:
        if first and current_folder(checkpoint):
            note(f"the same command with --resume continues from {checkpoint}")
        raise
    if first:
        assert ib.record is not None
        ib.record["class_folders"] = classes  # `attribute` shows them as the names of the classes
        if out.exists() and not replaces:
            note(f"{out} was made by another command meanwhile")
            others = (out.with_name(f"{out.name}-{number}") for number in itertools.count(2))
            out = next(place for place in others if not place.exists())
        ib.save(out)
        remove_folder(checkpoint, CHECKPOINT_FILES)
        print(_findings(args.model, ib, out, time.monotonic() - started))
    return 2 if readable is not None and readable.bad.any() else 0


class ReadableImages(Dataset[Any]):
    """Pictures of which some cannot be read: each is named once, and the next one takes its place."""

    def __init__(self, data: ImageFiles | LabelledImages) -> None:
        self.data = data
        self.reader = getattr(data, "reader", None)  # the record of a fit names its root
        # Shared: a loader's workers are processes of their own.
        self.bad = torch.zeros(len(data), dtype=torch.bool, device="cpu").share_memory_()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        for place in (*range(index, len(self)), *range(index)):
            try:
                return self.data[place]
            except UnreadableImage as error:
                if not self.bad[place]:
                    self.bad[place] = True
                    note(str(error))
        raise ValueError(f"none of the {len(self)} images can be read")


def _check_folders(out: Path, checkpoint: Path, *, resume: bool, overwrite: bool) -> None:
    check_replaceable(out, FILES)
    check_replaceable(checkpoint, CHECKPOINT_FILES)
    if overwrite:
        remove_folder(checkpoint, CHECKPOINT_FILES)
        return
    begun = current_folder(checkpoint) is not None
    if out.exists() and not (resume and begun):  # a fit to overwrite it may have been interrupted
        raise ValueError(f"{out} exists; name another --out or --overwrite")
    if begun and not resume:
        raise ValueError(f"{checkpoint} is of an interrupted fit; --resume continues it, --overwrite starts again")
    if resume and not begun:
        raise ValueError(f"nothing to resume: there is no {checkpoint}")


def _findings(model: str, ib: IBAttention, out: Path, seconds: float) -> str:
    record, site = ib.record or {}, ib.site
    in_bits = GATES.get(ib.gate).measures_bits
    passing = f"{record['final_bits']:.0f} bits per image keep" if in_bits else "what passes keeps"
    output = "" if in_bits else " --output attention"
    return (
        f"fitted {model} at {site.name!r}, a grid of {times(site.grid)} with {site.channels} channels, "
        f"in {seconds:.0f} s\n"
        f"{passing} {record['final_agreement']:.1%} of the model's answers (mean of the last steps, training images)\n"
        f"saved in {out}\n"
        f"next: ib-explain attribute {model} ... --bottleneck {shlex.quote(_as_argument(out))}{output} IMAGE"
    )


def _as_argument(path: Path) -> str:
    """A name that begins with a dash would be taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)

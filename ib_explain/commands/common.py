"""What several commands share: the host and its input size from the options, the data, words on the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ib_explain.data.preprocessing import Preprocess, preprocess
from ib_explain.hosts import load_host
from ib_explain.lending import run_host
from ib_explain.modules import host_device
from ib_explain.sites import input_size_of

__all__ = [
    "check_data",
    "has_timm_weights",
    "load_with_size",
    "note",
    "plain_name",
    "preprocess_for",
    "times",
]


def load_with_size(
    args: argparse.Namespace, fitted_size: tuple[int, int, int] | None = None
) -> tuple[nn.Module, tuple[int, int, int]]:
    """The host that the options name, and the (3, H, W) it is to see: as asked, as fitted, or its own.

    Raises:
        ValueError: as `load_host`; or the host refuses inputs of that size, or is no image classifier.
    """
    if args.pretrained and args.checkpoint is not None:
        raise ValueError("weights come from --pretrained or from --checkpoint FILE, got both; leave one out")
    wanted = args.input_size or (fitted_size[1:] if fitted_size else None)
    host = load_host(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        num_classes=args.num_classes,
        input_size=wanted,
        in_chans=args.in_chans,
        mean=getattr(args, "mean", None),
        std=getattr(args, "std", None),
        device=args.device,
    )
    if not has_timm_weights(args) and args.checkpoint is None:
        note(f"warning: {args.model} has random weights; give --pretrained or --checkpoint FILE")
    size = input_size_of(host)
    if wanted:
        size = (size[0], *wanted)
    try:
        with torch.no_grad():
            run_host(host, torch.zeros(1, *size, device=host_device(host)))
    except Exception as error:  # whatever a model raises at its input
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{args.model} does not take inputs of {times(size)}: {reason}") from error
    return host, size


def has_timm_weights(args: argparse.Namespace) -> bool:
    """Whether the weights are those that the name stands for."""
    return args.checkpoint is None and (args.pretrained or ":" in args.model)


def preprocess_for(host: nn.Module, size: tuple[int, int, int]) -> Preprocess:
    """The host's preprocessing at this input size."""
    return preprocess(host, size=(size[1], size[2]))


def check_data(args: argparse.Namespace) -> None:
    """Fail before the host is loaded if the data cannot be there."""
    if args.data is not None and not args.dataset and not args.data.exists():
        raise ValueError(f"no such folder or tar file: {args.data}; a data set by timm's name goes into --dataset")


def times(sizes: Sequence[int]) -> str:
    """(3, 224, 224) as 3x224x224."""
    return "x".join(map(str, sizes))


def plain_name(model: str) -> str:
    """A model's name as part of a file name."""
    return Path(model.replace(":", "/")).name


def note(line: str) -> None:
    """A line for people, on standard error."""
    print(f"ib-explain: {line}", file=sys.stderr, flush=True)

"""`ib-explain demo`: the whole path on pictures with known evidence."""

from __future__ import annotations

import argparse

from ib_explain.demo import run_demo
from ib_explain.hosts import pick_device

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its findings."""
    print(run_demo(args.out, device=pick_device(args.device), seed=args.seed, overwrite=args.overwrite))
    return 0

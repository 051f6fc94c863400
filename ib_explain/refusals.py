"""Recognises a host's refusal of an image size, where the host alone fails alike, and says so in one line.

A host's own errors, and those of memory, stay what they are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.hooks import aside
from ib_explain.hosts import input_size_of, timm_config
from ib_explain.lending import Unfit, lacks_memory, run_host
from ib_explain.stripes import probe_batch

__all__ = ["SizeRefused", "first_pass", "refused_sizes_told"]


class SizeRefused(ValueError):
    """The host does not run on images of this size."""


REFUSALS = (AssertionError, RuntimeError, ValueError)
# torch's own words where shapes do not go together; an error of the host's own is left as it is.
SHAPES = re.compile(r"shapes cannot be multiplied|size of tensor|is invalid for input of size|Kernel size can't be")


def first_pass(host: nn.Module, x: Tensor, args: tuple[Any, ...]) -> Tensor:
    """The first pass at this size of images, in which a host may refuse it."""
    try:
        return run_host(host, x, args)
    except REFUSALS as error:
        size = tuple(x.shape[1:])
        if isinstance(error, Unfit):
            raise
        if _fails_alike(host, size, args, error) and (told := _refusal(host, size, args, error)):
            raise told from error
        raise


@contextlib.contextmanager
def refused_sizes_told(host: nn.Module, size: tuple[int, ...]) -> Iterator[None]:
    """Errors inside that come of the host's refusing images of this size say so, as a ValueError."""
    try:
        yield
    except REFUSALS as error:
        causes = (error, error.__cause__)
        told = any(isinstance(cause, SizeRefused | Unfit) for cause in causes)
        if not told and _fails_alike(host, size, (), error) and (refusal := _refusal(host, size, (), error)):
            raise refusal from error
        raise


def _refusal(host: nn.Module, size: tuple[int, ...], args: tuple[Any, ...], error: Exception) -> SizeRefused | None:
    """The error in words of sizes, if it is about these: at its own size the host runs, or torch says so."""
    own = input_size_of(host) if timm_config(host).get("input_size") else size
    told = " ".join(str(error).split())
    if own != size and _raises_at(host, own, args) is None:
        return SizeRefused(f"the model refuses images of size {size}; its own size is {own}: {told}")
    if type(error) is not RuntimeError or not SHAPES.search(str(error)):
        return None
    if own != size:
        return SizeRefused(f"the model runs neither on images of size {size} nor on those of its own, {own}: {told}")
    return SizeRefused(f"the model refuses images of size {size}, or its layers do not fit each other: {told}")


def _fails_alike(host: nn.Module, size: tuple[int, ...], args: tuple[Any, ...], error: Exception) -> bool:
    """Whether the host alone raises the same on noise of this size: else it was something else, or passed."""
    again = _raises_at(host, size, args)
    return not lacks_memory(error) and type(again) is type(error) and str(again) == str(error)


def _raises_at(host: nn.Module, size: tuple[int, ...], args: tuple[Any, ...]) -> Exception | None:
    try:
        with aside(), torch.no_grad():
            run_host(host, probe_batch(host, 2, (size[0], size[1], size[2])), args)
    except Exception as error:  # whatever a host raises at its input
        return error
    return None

"""Runs user code on the host itself: puts its buffers back, and raises where its weights were changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ib_explain.hooks import uninterrupted
from ib_explain.io import fingerprint

__all__ = ["HostChanged", "is_ours", "unharmed"]


class HostChanged(RuntimeError):
    """User code left the host with other weights."""


@contextlib.contextmanager
def unharmed(host: nn.Module) -> Iterator[None]:
    """Buffers that are written to inside, such as running statistics in training mode, are put back.

    Raises:
        HostChanged: the weights were changed. They are not put back: a copy of all would be too much to hold.
    """
    before = _weights(host)  # by their values: who writes through `.data` leaves no other trace
    buffers = [(buffer, buffer.clone()) for buffer in host.buffers()]
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    finally:
        with uninterrupted():
            for buffer, kept in buffers:
                if buffer.shape != kept.shape or not torch.equal(buffer, kept):
                    buffer.data = kept if buffer.shape != kept.shape else buffer.data.copy_(kept)
    if _weights(host) != before:
        told = "the method changed the model's weights; later results would be of another model: work on a copy in it"
        raise HostChanged(told) from problem
    if problem is not None:
        raise problem


def is_ours(code: Any) -> bool:
    """Whether a function or class is the package's own."""
    return str(getattr(code, "__module__", None)).startswith("ib_explain.")


def _weights(host: nn.Module) -> tuple[str, str]:
    """What a change of any weight changes: the fingerprint, which looks at a part, and the sums of all, as text.

    As numbers a NaN, in a weight that no image reaches, would differ from itself.
    """
    return fingerprint(host), str([complex(p.detach().sum().to("cpu", torch.complex128)) for p in host.parameters()])

"""Runs code of the user's on the host itself: puts its buffers back, and raises where its weights were changed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from ib_explain.facts import weights_state
from ib_explain.hooks import uninterrupted
from ib_explain.io import fingerprint

__all__ = ["HostChanged", "unharmed"]


class HostChanged(RuntimeError):
    """Code of the user's left the host with other weights."""


_PRINTS: weakref.WeakKeyDictionary[nn.Module, tuple[int, str]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def unharmed(host: nn.Module) -> Iterator[None]:
    """Buffers that are written to inside, such as running statistics in training mode, are put back.

    Raises:
        HostChanged: the weights were changed. They are not put back: a copy of all would be too much to hold.
    """
    before = _print(host)
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
    if _print(host) != before:
        told = "the method changed the model's weights; later results would be of another model: work on a copy in it"
        raise HostChanged(told) from problem
    if problem is not None:
        raise problem


def _print(host: nn.Module) -> str:
    """The host's fingerprint, taken again only when its weights were written to."""
    state = weights_state(host)
    known = _PRINTS.get(host)
    if known is None or known[0] != state:
        known = _PRINTS[host] = (state, fingerprint(host))
    return known[1]

"""Buffers that a host writes to in each pass, as a running centre does: put back when the host is handed back.

One that is filled once, in the host's first pass, stays: a flag elsewhere may say that it is filled.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.hooks import ours, registered, uninterrupted

__all__ = ["buffers_kept"]

Kept = dict[str, tuple[Tensor, Tensor]]  # buffers by name, with copies of their values

# Names of the buffers that passes behind the first one change, of hosts in which two whole passes were watched.
_MOVING: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
# Whole passes of the others.
_PASSES: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Of a host of which nothing is known yet: its buffers as it came, and as it was handed back.
_UNSETTLED: weakref.WeakKeyDictionary[nn.Module, tuple[Kept, Kept]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def buffers_kept(host: nn.Module) -> Iterator[None]:
    """Inside, passes may move the host's buffers; at the end those that move have the values of the beginning."""
    moving = _MOVING.get(host)  # most hosts have none, and cost nothing from the third pass on
    kept = _buffers(host, moving)
    if moving is None and host in _UNSETTLED:
        came, left = _UNSETTLED[host]
        if kept.keys() == left.keys() and all(torch.equal(kept[name][1], left[name][1]) for name in kept):
            kept = came  # nobody has run it since
    watching = _watching(host) if moving is None and host not in _WATCHED else contextlib.nullcontext()
    try:
        with watching:
            yield
    finally:
        if host in _MOVING:
            _UNSETTLED.pop(host, None)
        else:
            _UNSETTLED[host] = kept, _buffers(host, None)
        with uninterrupted(), torch.no_grad():
            for name in _MOVING.get(host, frozenset()) & kept.keys():
                buffer, before = kept[name]
                buffer.data.copy_(before)  # which leaves the tensor's version alone
                owner, _, own_name = name.rpartition(".")
                host.get_submodule(owner)._buffers[own_name] = buffer  # where another one was put in its place


def _buffers(host: nn.Module, names: frozenset[str] | None) -> Kept:
    """Those of these names (None: all), with copies of their values."""
    if names is not None and not names:  # not worth a walk through all modules
        return {}
    return {name: (b, b.detach().clone()) for name, b in host.named_buffers() if names is None or name in names}


@contextlib.contextmanager
def _watching(host: nn.Module) -> Iterator[None]:
    before: dict[str, Tensor] = {}

    def start(_module: nn.Module, _inputs: Any) -> None:
        if _PASSES.get(host, 0):
            before.update({name: buffer.detach().clone() for name, buffer in host.named_buffers()})

    def end(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        if host in _MOVING:
            return
        if _PASSES.get(host, 0):
            now = dict(host.named_buffers())
            _MOVING[host] = frozenset(name for name, b in before.items() if name in now and _moved(b, now[name]))
        _PASSES[host] = _PASSES.get(host, 0) + 1

    _WATCHED.add(host)
    try:
        with registered(
            lambda: host.register_forward_pre_hook(ours(start)), lambda: host.register_forward_hook(ours(end))
        ):
            yield
    finally:
        _WATCHED.discard(host)


def _moved(before: Tensor, now: Tensor) -> bool:
    """Whether the values changed; a buffer of another shape or type is another thing, such as a cache of that size."""
    if before.is_meta or before.shape != now.shape or before.dtype != now.dtype:
        return False
    return not torch.equal(before, now)

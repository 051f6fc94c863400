"""Buffers that a host writes to in each pass, as a running centre does: put back when the host is handed back.

One that is filled once, in the host's first pass or for images of a size, stays: a flag elsewhere may say what it
holds. So passes are compared from the second one on, and only with passes over images of the same shape.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ib_explain.hooks import ours, registered, uninterrupted

__all__ = ["buffers_kept"]


class Kept(NamedTuple):
    """A buffer, and what it held."""

    buffer: Tensor
    version: int | None
    value: Tensor


# Names of the buffers that passes write to, of hosts in which two whole passes were compared.
_MOVING: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
# Of the others: the shape of the images in the last whole pass, and the buffers as the host came and was handed back.
_LAST: weakref.WeakKeyDictionary[nn.Module, torch.Size] = weakref.WeakKeyDictionary()
_UNSETTLED: weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, Kept], dict[str, Kept]]] = weakref.WeakKeyDictionary()
_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def buffers_kept(host: nn.Module) -> Iterator[None]:
    """Inside, passes may move the host's buffers; at the end those that move have the values of the beginning."""
    moving = _MOVING.get(host)  # most hosts have none, and cost nothing once that is known
    kept = _buffers(host, moving)
    if moving is None and host in _UNSETTLED:
        came, left = _UNSETTLED.pop(host)
        if kept.keys() == left.keys() and all(_same(kept[name].value, left[name].value) for name in kept):
            kept = came  # nobody has run it since
    watching = _watching(host) if moving is None and host not in _WATCHED else contextlib.nullcontext()
    try:
        with watching:
            yield
    finally:
        with uninterrupted(), torch.no_grad():
            if host not in _MOVING:
                _UNSETTLED[host] = kept, _buffers(host, None)
            for name in _MOVING.get(host, frozenset()) & kept.keys():
                _put_back(host, name, kept[name])


def _put_back(host: nn.Module, name: str, kept: Kept) -> None:
    owner, _, own_name = name.rpartition(".")
    buffer = kept.buffer
    if buffer.requires_grad and not kept.value.requires_grad:  # it was written to where gradients were recorded
        buffer.detach_()
    if 0 in buffer.stride():  # expanded: it cannot be written to
        buffer = kept.value
    else:
        buffer.data.copy_(kept.value)  # which leaves the tensor's version alone
    host.get_submodule(owner)._buffers[own_name] = buffer  # where another one was put in its place


def _buffers(host: nn.Module, names: frozenset[str] | None) -> dict[str, Kept]:
    """Those of these names (None: all), with copies of their values."""
    if names is not None and not names:  # not worth a walk through all modules
        return {}
    return {name: _kept(buffer) for name, buffer in host.named_buffers() if names is None or name in names}


def _kept(buffer: Tensor) -> Kept:
    return Kept(buffer, None if buffer.is_inference() else buffer._version, buffer.detach().clone())


@contextlib.contextmanager
def _watching(host: nn.Module) -> Iterator[None]:
    before: dict[str, Kept] = {}

    def start(_module: nn.Module, inputs: Any) -> None:
        before.clear()
        if host in _LAST and _shape(inputs) == _LAST[host]:
            before.update(_buffers(host, None))

    def end(_module: nn.Module, inputs: Any, _output: Any) -> None:
        if host in _MOVING:
            return
        if host in _LAST and _shape(inputs) == _LAST[host]:
            now = dict(host.named_buffers())
            _MOVING[host] = frozenset(name for name in before if name in now and _written(before[name], now[name]))
        _LAST[host] = _shape(inputs)

    _WATCHED.add(host)
    try:
        with registered(
            lambda: host.register_forward_pre_hook(ours(start)), lambda: host.register_forward_hook(ours(end))
        ):
            yield
    finally:
        _WATCHED.discard(host)


def _shape(inputs: Any) -> torch.Size:
    return inputs[0].shape if inputs and isinstance(inputs[0], Tensor) else torch.Size()


def _written(before: Kept, now: Tensor) -> bool:
    """Whether a pass wrote to a buffer; one of another shape or type is another thing, such as a cache of that size."""
    if before.value.layout != torch.strided or (now.shape, now.dtype) != (before.value.shape, before.value.dtype):
        return False
    same_version = now.is_inference() or now._version == before.version
    return now is not before.buffer or not same_version or not _same(before.value, now)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are known to hold the same; not asked of what has no values, or lies elsewhere."""
    alike = (one.device, one.dtype, one.shape, one.layout) == (other.device, other.dtype, other.shape, other.layout)
    return alike and not one.is_meta and one.layout == torch.strided and torch.equal(one, other)

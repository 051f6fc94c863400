"""What was found out about a host, remembered as long as the host stays as it is.

User hooks are no part of that: most only look on, and finding everything out again for each would cost a
hundred passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from ib_explain.hooks import restricting_hooks
from ib_explain.layouts import LayoutChanged

__all__ = ["remembered", "weights_state", "with_fresh_facts"]

T = TypeVar("T")

STATES = 4  # of one host at once: as it came, and under restrictions


class _Known(NamedTuple):
    """Facts, and the tensors that they were found with."""

    weights: list[weakref.ref[Tensor]]
    facts: dict[Hashable, Any]


_FACTS: weakref.WeakKeyDictionary[nn.Module, dict[int, _Known]] = weakref.WeakKeyDictionary()


def remembered(host: nn.Module, key: Hashable, find: Callable[[], T]) -> T:
    """What `find` gives, which is called once for each key and state of the host.

    Facts must not hold the host itself, which would never be freed.
    """
    facts = _facts(host)
    if key not in facts:
        found = find()
        # Asked again: a first pass may fill a buffer of the host's, such as a cached position embedding.
        _facts(host)[key] = found
        return found
    return cast(T, facts[key])


def with_fresh_facts(host: nn.Module, run: Callable[[], T]) -> T:
    """What `run` gives; once more with nothing remembered where a layer's output is not what it was.

    A stride or a hook that pools may change a host in a way that its weights do not tell.
    """
    try:
        return run()
    except LayoutChanged:
        _FACTS.pop(host, None)
        return run()


def weights_state(host: nn.Module) -> int:
    """A number that changes with the host's weights.

    In-place changes (an optimiser, `load_state_dict`) raise a tensor's version; those of `parameter.data` do not.
    """
    return hash(tuple(_version(tensor) for tensor in _weights(host)))


def _weights(host: nn.Module) -> list[Tensor]:
    # Integer buffers may count passes; the others (running statistics) decide what a host says.
    return [*host.parameters(), *(buffer for buffer in host.buffers() if buffer.is_floating_point())]


def _state(host: nn.Module, weights: list[Tensor]) -> int:
    """A number that changes with the host's weights and modules, and with restrictions of ours around it."""
    return hash((*map(_version, weights), *map(id, host.modules()), *restricting_hooks(host)))


def _version(tensor: Tensor) -> tuple[int, int | None]:
    # Parameters made in inference mode have no version; `frozen` refuses them.
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _facts(host: nn.Module) -> dict[Hashable, Any]:
    states, weights = _FACTS.setdefault(host, {}), _weights(host)
    state = _state(host, weights)
    known = states.pop(state, None)
    # A new parameter may lie where one was that is gone.
    if known is None or any(ref() is not tensor for ref, tensor in zip(known.weights, weights, strict=True)):
        known = _Known([weakref.ref(tensor) for tensor in weights], {})
    states[state] = known  # the latest one last
    while len(states) > STATES:
        del states[next(iter(states))]
    return known.facts

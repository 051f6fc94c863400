"""What was found out about a host, remembered as long as the host stays as it is.

Hooks of the user's are no part of that: most only look on, and finding everything out again for each would cost a
hundred passes. Where they matter for a fact (features under them), whoever remembers it asks for `users_hooks`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from torch import nn

from ib_explain.hooks import restricting_hooks

__all__ = ["host_state", "remembered"]

T = TypeVar("T")

STATES = 4  # of one host at once: as it came, and under restrictions
_FACTS: weakref.WeakKeyDictionary[nn.Module, dict[int, dict[Hashable, Any]]] = weakref.WeakKeyDictionary()


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


def host_state(host: nn.Module) -> int:
    """A number that changes with the host's weights, and with restrictions of ours around it.

    In-place changes (an optimiser, `load_state_dict`) raise a tensor's version; those of `parameter.data` do not.
    """
    # Integer buffers may count passes; the others (running statistics) decide what a host says.
    buffers = (buffer for buffer in host.buffers() if buffer.is_floating_point())
    # Parameters made in inference mode have no version; `frozen` refuses them.
    tensors = (
        (t.data_ptr(), None if t.is_inference() else t._version) for t in itertools.chain(host.parameters(), buffers)
    )
    return hash((*tensors, *restricting_hooks(host)))


def _facts(host: nn.Module) -> dict[Hashable, Any]:
    states = _FACTS.setdefault(host, {})
    state = host_state(host)
    facts = states.pop(state, {})
    states[state] = facts  # the latest one last
    while len(states) > STATES:
        del states[next(iter(states))]
    return facts

"""What decides a method's maps or a metric's scores, as JSON can hold it: by this a run knows that it is the same.

Code is known by its source, its defaults and its closure, an object by its class and what it holds, recursively;
tensors, arrays and weights by a digest. What code reads from elsewhere (globals, files) is not seen.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import math
import sys
import types
import weakref
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ib_explain.ib import IBAttention
from ib_explain.modules import module_name, unwrap

__all__ = ["Identity"]

LONG = 1000  # characters of a value; a longer one is told by its digest, so that run.json stays readable
NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
PASSING = (RemovableHandle, weakref.ReferenceType)  # traces of use, no part of what an object is


class Identity:
    """Describes values for one host, whose own weights a run knows already: it stands as "the model" inside of others.

    >>> of = Identity(host)
    >>> of.value((1, np.float32(0.5), torch.zeros(2)))
    [1, 0.5, {'shape': [2], 'digest': ...}]
    """

    def __init__(self, host: nn.Module) -> None:
        self.host = unwrap(host)
        # Objects may be held twice, and hold one another. They are kept: another one could get the id of one that went.
        self._told: dict[int, tuple[Any, Any]] = {}

    def code(self, code: Any) -> dict[str, Any]:
        """A function, a method, or an object that is called."""
        if isinstance(code, functools.partial):
            held = {"args": self.value(code.args), "keywords": self.value(code.keywords)}
            return {**self.code(code.func), **{key: value for key, value in held.items() if value}}
        own = code if hasattr(code, "__qualname__") else type(code)
        facts: dict[str, Any] = {"method": _qualified(own), **source(own)}
        for name in ("__defaults__", "__kwdefaults__"):
            if defaults := getattr(code, name, None):
                facts[name.strip("_")] = self.value(defaults)
        if closure := getattr(code, "__closure__", None):
            facts["closure"] = [self.value(value) for cell in closure if (value := _content(cell)) is not code]
        if isinstance(code, types.MethodType):
            facts["self"] = self.value(code.__self__)
        if isinstance(code, nn.Module):
            facts["weights"] = digest(v for v in code.state_dict().values() if isinstance(v, Tensor))
        if own is not code and (held := self._held(code)):
            facts["holds"] = held
        return facts

    def bottleneck(self, ib: IBAttention) -> dict[str, Any]:
        """An `IBAttention`: its options and, fitted, its weights."""
        facts: dict[str, Any] = {"method": "IBAttention", "fitted": ib.fitted, "gate": ib.gate}
        layer = ib.layer_name if ib.fitted else ib.asked_layer  # its first use settles the default
        facts |= {"layer": layer, "reads": ib.reads, "seed": ib.seed}
        more = {"anchors": ib.anchors, "per_element": ib.per_element, "relevance": ib.relevance}
        facts |= {name: value for name, value in more.items() if value}
        if ib.fitted:
            facts["weights"] = digest(ib.bottleneck.state_dict().values())
        return facts

    def value(self, value: Any) -> Any:
        """Anything at all; what cannot be looked into is told by its type."""
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, float | complex | PurePath | torch.dtype | torch.device):
            return str(value)
        if isinstance(value, np.generic):
            return str(value) if isinstance(value.item(), np.generic) else self.value(value.item())
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "digest": digest([value])}
        if isinstance(value, np.ndarray) and value.dtype != object:
            content = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=8).hexdigest()
            return {"shape": list(value.shape), "dtype": str(value.dtype), "digest": content}
        if isinstance(value, types.ModuleType):
            return value.__name__
        if id(value) not in self._told:
            self._told[id(value)] = value, _qualified(type(value))  # where it is held by itself
            self._told[id(value)] = value, _short(self._inside(value))
        return self._told[id(value)][1]

    def _inside(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): self.value(item) for key, item in value.items() if not isinstance(item, PASSING)}
        if isinstance(value, list | tuple | set | frozenset | np.ndarray):
            told = [self.value(item) for item in value if not isinstance(item, PASSING)]
            return sorted(told, key=json.dumps) if isinstance(value, set | frozenset) else told
        if isinstance(value, IBAttention):
            return self.bottleneck(value)
        if isinstance(value, nn.Module):
            if any(module is self.host for module in value.modules()):
                return "the model"
            if any(module is value for module in self.host.modules()):
                return f"the model's {module_name(self.host, value)}"
            return self.code(value)
        if isinstance(value, type):
            return {"class": _qualified(value), **source(value)}
        standard = type(value).__module__.split(".")[0] in sys.stdlib_module_names
        functions = (types.FunctionType, types.MethodType, functools.partial)
        if isinstance(value, functions) or (hasattr(value, "__dict__") and not standard):
            return self.code(value)
        return self._held(value) if isinstance(value, NAMESPACES) else _qualified(type(value))

    def _held(self, owner: Any) -> dict[str, Any]:
        """The attributes of an object."""
        state = getattr(owner, "__dict__", {})
        # Captum's objects note there what they found out; torch's modules keep parameters, parts and hooks there.
        if isinstance(owner, nn.Module) or type(owner).__module__.startswith("captum."):
            state = {key: value for key, value in state.items() if not key.startswith("_")}
        return {key: self.value(value) for key, value in sorted(state.items()) if not isinstance(value, PASSING)}


def source(code: Any) -> dict[str, str]:
    """Digest of a function's or class's text; nothing where there is none: built in, compiled, typed at a prompt."""
    try:
        return {"source": hashlib.blake2b(inspect.getsource(code).encode(), digest_size=8).hexdigest()}
    except (OSError, TypeError):
        return {}


def digest(tensors: Iterable[Any]) -> str:
    """Of their values."""
    result = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        values = torch.as_tensor(tensor, device="cpu").detach()
        values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
        result.update(values.contiguous().double().numpy().tobytes())
    return result.hexdigest()


def _qualified(code: Any) -> str:
    return f"{getattr(code, '__module__', None)}.{code.__qualname__}"  # methods of built-in types have no module


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _short(told: Any) -> Any:
    text = json.dumps(told)
    return told if len(text) <= LONG else {"digest": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}

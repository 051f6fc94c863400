"""Whatever a user gives as a method, as one kind of thing that is called with a `Call` and gives maps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ib_explain.checks import check_maps, take_options
from ib_explain.facts import with_fresh_facts
from ib_explain.guard import is_ours, unharmed
from ib_explain.ib import IBAttention
from ib_explain.maps import resize
from ib_explain.methods import METHODS
from ib_explain.methods.base import Call
from ib_explain.methods.ib import PerImageIB
from ib_explain.modules import unwrap
from ib_explain.outputs import OUTPUTS

__all__ = ["Runner", "as_maps", "runner_of"]


@dataclass(frozen=True)
class Runner:
    """A method with its options, ready to be called."""

    name: str
    """What it is called where its user gave it no name."""
    run: Callable[[Call], Any]
    unit: str | None = None
    """Of its maps; None where it does not tell."""
    method: Any = None
    """The object of a method's class; None for what is none."""
    resolves_target: bool = False
    """It checks the target on the logits of its own forward pass."""
    made_for: nn.Module | None = None
    """The only host that it can explain; None for any."""
    ours: bool = False
    """The package's own, which leaves host and images as they are."""

    def refuse_layer(self, layer: Any) -> None:
        """A layer that it could not take is a TypeError."""
        if layer is not None and self.method is None:
            raise TypeError(f"only registered methods take a layer here, got one for {self.name}")

    def maps(self, call: Call) -> Tensor:
        """Maps (B, 1, H, W) float32; code that is not ours cannot leave the host's buffers or the images changed.

        Raises:
            HostChanged: it changed the host's weights.
            Exception: whatever the method raises; what `as_maps` raises about its answer.
        """
        return as_maps(with_fresh_facts(call.model, functools.partial(self._run, call)), call.x)

    def _run(self, call: Call) -> Any:
        if self.ours:
            return self.run(call)
        target = call.target.clone() if isinstance(call.target, Tensor) else call.target
        # With autograd, whatever the caller's mode: gradients are what such code is about.
        with unharmed(call.model), torch.enable_grad():
            return self.run(replace(call, x=call.x.detach().clone(), target=target))


def runner_of(method: Any, options: Mapping[str, Any], model: nn.Module) -> Runner:
    """Take what the user wants to explain `model` with: a name, an object or a function, as `attribute` lists them.

    Raises:
        TypeError: something else, or an option that the method does not have.
        ValueError: an unknown name, an option's value, an `IBAttention` or a Captum object for another model.
    """
    if isinstance(method, str):
        entry = METHODS.get(method)
        known = [f.name for f in fields(entry)] if is_dataclass(entry) else []
        return _of_method(entry(**take_options(options, known, f"method {method!r}")), method)
    if isinstance(method, type):
        raise TypeError(f"method must be an object, got the class {method.__name__}; make one of it first")
    if _is_method(method):
        take_options(options, [], f"the given {type(method).__name__}")
        return _of_method(method, _name(method))
    if isinstance(method, IBAttention):
        return _of_bottleneck(method, options, model)
    if hasattr(method, "attribute"):
        return _of_captum(method, options, model)
    if callable(method):
        take_options(options, [], "a function")
        return Runner(_name(method), lambda call: method(call.model, call.x, call.classes()))
    raise TypeError(
        "method must be a name, a fitted IBAttention, an object with attribute(inputs, target=...) or a function "
        f"f(model, x, target), got {type(method).__name__}"
    )


def _is_method(given: Any) -> bool:
    """Whether it is an object of a method's dataclass, called with a `Call` alone; functions take three arguments."""
    if not is_dataclass(given) or isinstance(given, type) or not callable(given):
        return False
    taken = inspect.signature(given).parameters.values()
    return sum(one.default is one.empty and one.kind is not one.VAR_KEYWORD for one in taken) == 1


def _of_method(method: Any, name: str) -> Runner:
    return Runner(
        name,
        method,
        OUTPUTS[method.output] if isinstance(method, PerImageIB) else getattr(method, "unit", None),
        method=method,
        resolves_target=getattr(method, "resolves_target", False),
        ours=is_ours(getattr(method, "function", type(method))),  # one of `register_method` on a function is not
    )


def _of_bottleneck(ib: IBAttention, options: Mapping[str, Any], model: nn.Module) -> Runner:
    host = unwrap(model)
    if ib.host is not host:
        raise ValueError(
            f"the given IBAttention belongs to another {type(ib.host).__name__}, not to this {type(host).__name__}; "
            "fit or load one for this very model, or pass the method's name, which is optimised for whatever model "
            "comes"
        )
    chosen = _taken_options(ib, options)
    ib.check_options(**{name: value for name, value in chosen.items() if name in ("refine", "output")})
    return Runner(
        "ib_fitted" if ib.fitted else "ib",
        lambda call: ib.attribute(call.x, target=call.target, **chosen),
        OUTPUTS[chosen.get("output", "bits")],
        resolves_target=True,
        made_for=host,
        ours=True,
    )


def _of_captum(method: Any, options: Mapping[str, Any], model: nn.Module) -> Runner:
    host, called = unwrap(model), type(method).__name__
    theirs = getattr(method, "forward_func", None)
    # A wrapper of the model's is fine.
    if isinstance(theirs, nn.Module) and all(module is not host for module in theirs.modules()):
        raise ValueError(
            f"the given {called} was made for another {type(unwrap(theirs)).__name__}, not for this "
            f"{type(host).__name__}; make one for this very model"
        )
    chosen = _taken_options(method, options)
    return Runner(
        _name(method),
        lambda call: method.attribute(call.x, target=call.classes(), **chosen),
        made_for=host,  # it would answer for that one whatever it is given
    )


def _name(method: Any) -> str:
    if isinstance(method, functools.partial):
        return _name(method.func)
    for name in METHODS:
        if METHODS.get(name) is type(method):
            return name
    own = getattr(method, "__name__", type(method).__name__)
    return "function" if own == "<lambda>" else str(own)


def _taken_options(method: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, which `method.attribute` must have, if it does not take any at all."""
    taken = inspect.signature(method.attribute).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in taken):  # NoiseTunnel's are for the method that it wraps
        return dict(options)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = sorted({one.name for one in taken if one.kind in kinds} - {"inputs", "target"})
    return take_options(options, known, f"{type(method).__name__}.attribute")


def as_maps(maps: Any, x: Tensor) -> Tensor:
    """Check a method's answer and bring it to (B, 1, H, W) float32 on x's device.

    Raises:
        TypeError: it is no tensor.
        ValueError: not one map an image, other proportions than the image's, NaN or infinite values.
    """
    if isinstance(maps, tuple) and len(maps) == 1:
        maps = maps[0]
    if isinstance(maps, np.ndarray):
        maps = torch.from_numpy(maps)
    if not isinstance(maps, Tensor):
        raise TypeError(f"the method must return a tensor (B, 1, H, W), got {type(maps).__name__}")
    if maps.ndim == 3:
        maps = maps[:, None]
    if maps.ndim != 4 or maps.shape[0] != x.shape[0]:
        raise ValueError(f"the method must return one map for each of the {len(x)} images, got {tuple(maps.shape)}")
    if maps.is_complex():
        raise TypeError(f"the method must return real maps, got {maps.dtype}")
    (height, width), (rows, columns) = x.shape[2:], maps.shape[2:]
    alike = abs(rows / height - columns / width) <= max(1 / height, 1 / width)  # a grid of the image's proportions
    if not alike or rows > height or columns > width:
        wanted = f"(B, 1, {height}, {width}), or a coarser grid of these proportions"
        raise ValueError(f"the method must return {wanted}, got {tuple(maps.shape)}")
    maps = maps.detach().to(x.device, torch.float32).sum(dim=1, keepdim=True)
    if maps.shape[2:] != x.shape[2:]:
        maps = resize(maps, (int(x.shape[2]), int(x.shape[3])))
    check_maps(maps)
    return maps

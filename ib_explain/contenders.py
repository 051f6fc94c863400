"""Whatever a user wants to compare, as one kind of thing: a name, a unit, a description, and maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ib_explain.attribution import as_maps, check_host, is_method, method_runner, run_method
from ib_explain.facts import with_fresh_facts
from ib_explain.ib import IBAttention
from ib_explain.identity import Identity, is_ours
from ib_explain.lending import frozen
from ib_explain.methods import METHODS
from ib_explain.methods.base import Call, NotApplicable
from ib_explain.methods.ib import PerImageIB
from ib_explain.modules import find_module, module_name, unwrap
from ib_explain.outputs import OUTPUTS
from ib_explain.randomness import seeded
from ib_explain.rows import one_line

__all__ = ["Contender", "contenders_of"]


class _AnyLayer(Call):
    """A call whose layer is meant for all methods of a benchmark: those that look at the input alone let it pass."""

    def refuse_layer(self, name: str) -> None:
        pass


@dataclass(frozen=True)
class Contender:
    """A method that takes part in a comparison."""

    name: str
    unit: str
    """Of its maps; one that is nobody else's where the method does not tell."""
    facts: Mapping[str, Any]
    """What decides its maps, for run.json."""
    run: Callable[[Call], Any]
    layer: str | nn.Module | None
    """The one it was given in its own options."""
    made_for: nn.Module | None
    """The only host it can explain, or None for any."""

    def explain(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        *,
        layer: str | nn.Module | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> Tensor:
        """Maps (B, 1, H, W) float32 of these classes (B,), `batch_size` images at a time.

        Random numbers that a function of the user's draws from the global generators follow from the seed, too.

        Raises:
            NotApplicable: the method says so, or belongs to another host.
            HostChanged: it changed the host's weights.
            Exception: whatever the method raises; ValueError for maps of another shape or with NaN.
        """
        if self.made_for is not None and unwrap(model) is not self.made_for:
            raise NotApplicable(f"{self.name} was made for another model and cannot explain this one")
        kind = _AnyLayer if self.layer is None else Call
        chosen = layer if self.layer is None else self.layer
        maps = []
        with frozen(model) as host, seeded(seed):
            for part, classes in zip(x.split(batch_size or len(x)), target.split(batch_size or len(x)), strict=True):
                call = kind(host, part, classes, chosen, seed, batch_size)
                maps.append(as_maps(with_fresh_facts(host, functools.partial(run_method, self.run, call)), part))
        return torch.cat(maps)


def contenders_of(methods: Any, model: nn.Module) -> list[Contender]:
    """Check what the user wants to compare and give each its name.

    Args:
        methods: an iterable, or a mapping of names, of: registered names, (name, options), `IBAttention`s, objects of
            Captum's, functions f(model, x, target), dataclasses of registered methods. Options may hold `layer`.
        model: the host.

    Raises:
        TypeError: something else, or an option that the method does not have.
        ValueError: none at all, an unknown name, a name twice, an `IBAttention` of another host.
    """
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        came = f"the string {methods!r}; write [{methods!r}]" if isinstance(methods, str) else type(methods).__name__
        raise TypeError(f"methods must be a list, or a dict by name, got {came}")
    pairs = list(methods.items()) if isinstance(methods, Mapping) else [(None, method) for method in methods]
    if not pairs:
        raise ValueError("methods must hold at least one method, got none")
    found: list[Contender] = []
    for name, given in pairs:
        contender = _contender(name, given, model)
        if any(other.name == contender.name for other in found):
            raise ValueError(f"two methods are called {contender.name!r}; tell them apart with a dict of names")
        found.append(contender)
    return found


def _contender(name: Any, given: Any, model: nn.Module) -> Contender:
    method, options = given, {}
    if isinstance(given, tuple):
        if len(given) != 2 or not isinstance(given[1], Mapping):
            raise TypeError(f"a method with options must be (method, dict of options), got {given!r}")
        method, options = given[0], dict(given[1])
    layer = options.pop("layer", None)
    if layer is not None and not isinstance(method, str) and not is_method(method):
        raise TypeError(f"only registered methods take a layer here, got one for {_called(method)}")
    check_host(method, model)
    run = method_runner(method, options)
    if isinstance(method, IBAttention):
        method.check_options(**{key: value for key, value in options.items() if key in ("refine", "output")})
    facts = _facts(method, run, options, model)
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in options.items()}
    label, told = _called(method), {key: value for key, value in plain.items() if _is_short(value)}
    if isinstance(layer, str):
        find_module(unwrap(model), layer)
    if layer is not None:
        facts["layer"] = told["layer"] = layer if isinstance(layer, str) else module_name(unwrap(model), layer)
    if told:
        label += f"({', '.join(f'{key}={value}' for key, value in told.items())})"
    chosen = label if name is None else str(name)
    if not chosen or chosen != one_line(chosen):
        raise ValueError(f"a method's name must be on one line, got {chosen!r}")
    if isinstance(method, IBAttention):
        unit = OUTPUTS.get(options.get("output", "bits"))
    else:
        unit = OUTPUTS.get(run.output) if isinstance(run, PerImageIB) else getattr(run, "unit", None)
    return Contender(
        name=chosen,
        unit=str(unit or f"own unit of {chosen}"),
        facts=facts,
        run=run,
        layer=layer,
        # An object like Captum's was made for its model: it would answer for that one whatever it is given.
        made_for=unwrap(model) if hasattr(method, "attribute") else None,
    )


def _called(method: Any) -> str:
    """The name of a method whose user gave it none."""
    if isinstance(method, str):
        return method
    if isinstance(method, IBAttention):
        return "ib_fitted" if method.fitted else "ib"
    if isinstance(method, functools.partial):
        return _called(method.func)
    for name in METHODS:
        if METHODS.get(name) is type(method):
            return name
    own = getattr(method, "__name__", type(method).__name__)
    return "function" if own == "<lambda>" else str(own)


def _facts(method: Any, run: Any, options: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What decides a method's maps, for run.json."""
    of = Identity(model)
    chosen = {key: of.value(value) for key, value in options.items()}
    if isinstance(method, IBAttention):
        return of.bottleneck(method) | chosen
    if not is_method(run):
        return of.code(method) | chosen
    held = {field.name: of.value(getattr(run, field.name)) for field in fields(run)}
    written = getattr(run, "function", type(run))  # by `register_method` on a function or a class
    code = {} if is_ours(written) else of.code(written)
    return code | {"method": _called(run)} | held


def _is_short(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and len(str(value)) <= 24 and "\n" not in str(value)

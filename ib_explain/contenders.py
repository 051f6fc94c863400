"""The methods of a benchmark: each with a name of its own, a unit, a description for run.json, and maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ib_explain.ib import IBAttention
from ib_explain.identity import Identity
from ib_explain.lending import frozen
from ib_explain.methods.base import Call, NotApplicable
from ib_explain.modules import find_module, module_name, unwrap
from ib_explain.randomness import seeded
from ib_explain.runners import Runner, runner_of
from ib_explain.texts import one_line

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
    runner: Runner
    layer: str | nn.Module | None
    """The one it was given in its own options."""

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

        Random numbers that a user's function draws from the global generators follow from the seed, too.

        Raises:
            NotApplicable: the method says so, or belongs to another host.
            HostChanged: it changed the host's weights.
            Exception: whatever the method raises; ValueError for maps of another shape or with NaN.
        """
        if self.runner.made_for not in (None, unwrap(model)):
            raise NotApplicable(f"{self.name} was made for another model and cannot explain this one")
        kind = _AnyLayer if self.layer is None else Call
        chosen = layer if self.layer is None else self.layer
        maps = []
        with frozen(model) as host, seeded(seed):
            for part, classes in zip(x.split(batch_size or len(x)), target.split(batch_size or len(x)), strict=True):
                maps.append(self.runner.maps(kind(host, part, classes, chosen, seed, batch_size)))
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
    runner = runner_of(method, options, model)
    runner.refuse_layer(layer)
    facts = _facts(method, runner, options, model)
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in options.items()}
    label, told = runner.name, {key: value for key, value in plain.items() if _is_short(value)}
    if isinstance(layer, str):
        find_module(unwrap(model), layer)
    if layer is not None:
        facts["layer"] = told["layer"] = layer if isinstance(layer, str) else module_name(unwrap(model), layer)
    if told:
        label += f"({', '.join(f'{key}={value}' for key, value in told.items())})"
    chosen = label if name is None else str(name)
    if not chosen or chosen != one_line(chosen):
        raise ValueError(f"a method's name must be on one line, got {chosen!r}")
    return Contender(chosen, str(runner.unit or f"own unit of {chosen}"), facts, runner, layer)


def _facts(given: Any, runner: Runner, options: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What decides a method's maps, for run.json."""
    of, method = Identity(model), runner.method
    chosen = {key: of.value(value) for key, value in options.items()}
    if isinstance(given, IBAttention):
        return of.bottleneck(given) | chosen
    if method is None:
        return of.code(given) | chosen
    named = [field.name for field in fields(method)] if is_dataclass(method) else []  # another class has no options
    held = {name: of.value(getattr(method, name)) for name in named}
    code = {} if runner.ours else of.code(getattr(method, "function", type(method)))
    return code | {"method": runner.name} | held


def _is_short(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and len(str(value)) <= 24 and "\n" not in str(value)

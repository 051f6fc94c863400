"""Whatever a user wants to compare, as one kind of thing: a name, a unit, a description, and maps."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.attribution import as_maps, check_host, method_runner, run_method
from ib_explain.facts import with_fresh_facts
from ib_explain.ib import OUTPUTS, IBAttention
from ib_explain.lending import frozen
from ib_explain.methods import METHODS
from ib_explain.methods.base import Call, NotApplicable
from ib_explain.methods.ib import PerImageIB
from ib_explain.modules import find_module, module_name, unwrap
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
    if layer is not None and not isinstance(method, str) and not is_dataclass(method):
        raise TypeError(f"only registered methods take a layer here, got one for {_called(method)}")
    check_host(method, model)
    run = method_runner(method, options)
    if isinstance(method, IBAttention):
        method.check_options(**{key: value for key, value in options.items() if key in ("refine", "output")})
    facts = _facts(method, run, options)
    label, told = _called(method), {key: value for key, value in options.items() if _is_short(value)}
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


def _facts(method: Any, run: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(method, IBAttention):
        facts: dict[str, Any] = {"method": "IBAttention", "fitted": method.fitted, "gate": method.gate}
        layer = method.layer_name if method.fitted else method.asked_layer  # its first use settles the default
        facts |= {"layer": layer, "reads": method.reads, "seed": method.seed}
        if method.fitted:
            state = method.bottleneck.state_dict()
            facts["weights"] = _digest([*state.values()])
        return facts | {key: _plain(value) for key, value in options.items()}
    if is_dataclass(run) and not isinstance(run, type):  # a registered method, or one like it
        held = {field.name: _plain(getattr(run, field.name)) for field in fields(run)}
        written = getattr(run, "function", type(run))  # by `register_method` on a function or a class
        source = {} if written.__module__.startswith("ib_explain.") else _source(written)
        return {"method": _called(run), **held, **source}
    return {**_code_facts(method), **{key: _plain(value) for key, value in options.items()}}


def _code_facts(method: Any) -> dict[str, Any]:
    """What tells a function or an object of the user's from another version of it: its source, and what it holds."""
    if isinstance(method, functools.partial):
        held = {"args": _plain(method.args), "keywords": _plain(method.keywords)}
        return {**_code_facts(method.func), **{key: value for key, value in held.items() if value}}
    own = method if hasattr(method, "__qualname__") else type(method)
    facts: dict[str, Any] = {"method": f"{own.__module__}.{own.__qualname__}", **_source(own)}
    if closure := getattr(method, "__closure__", None):
        facts["closure"] = [_plain(value) for cell in closure if (value := _content(cell)) is not method]
    if own is not method and (state := getattr(method, "__dict__", None)):
        facts["holds"] = {key: _plain(value) for key, value in sorted(state.items())}
    return facts


def _source(code: Any) -> dict[str, str]:
    try:
        return {"source": hashlib.blake2b(inspect.getsource(code).encode(), digest_size=8).hexdigest()}
    except (OSError, TypeError):  # there is none: built in, compiled, or typed at a bare prompt
        return {}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; tensors by shape and digest, other objects by their type."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "digest": _digest([value])}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return str(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _digest(tensors: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(torch.as_tensor(tensor, device="cpu").detach().contiguous().double().numpy().tobytes())
    return digest.hexdigest()


def _is_short(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and len(str(value)) <= 24 and "\n" not in str(value)

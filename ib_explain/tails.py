"""The part of the host behind a layer, run again without what comes before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.hooks import LayerError, on_own_level, registered, replace_output, users_hooks_silent
from ib_explain.layouts import map_tensors
from ib_explain.lending import run_host
from ib_explain.modules import find_module, unwrap

__all__ = ["Tail", "TailRecorder"]


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that takes no memory: nothing behind a cut reads its values."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


class TailRecorder:
    """Notes, during a clean forward pass, what may be skipped when only the part behind `name` is run again.

    The children of the layer's ancestors that finish before it does are skipped later; of their outputs only the
    shapes are kept. Use as a context around the clean pass; `tail(x, args)` afterwards gives the `Tail`.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = unwrap(model)
        self.name = name
        parts = name.split(".")
        self._ancestors = [".".join(parts[:depth]) for depth in range(len(parts))]
        self._outputs: dict[str, list[Any]] = {}
        self._registered = contextlib.ExitStack()
        self._arrived = False

    def __enter__(self) -> TailRecorder:
        self._outputs, self._arrived = {}, False
        hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        for ancestor in self._ancestors:
            module = self.model.get_submodule(ancestor)
            for child_name, child in module.named_children():
                full = f"{ancestor}.{child_name}" if ancestor else child_name
                if full == self.name:
                    hooks.append((child, on_own_level(self._arrive)))
                # TorchScript takes no Python hooks; such a child runs again.
                elif full not in self._ancestors and not isinstance(child, torch.jit.ScriptModule):
                    hooks.append((child, on_own_level(self._note(full))))
        self._registered.enter_context(registered(*(partial(m.register_forward_hook, h) for m, h in hooks)))
        return self

    def __exit__(self, *_exception: Any) -> None:
        self._registered.close()

    def _arrive(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._arrived = True

    def _note(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not self._arrived:
                self._outputs.setdefault(name, []).append(map_tensors(output, _stand_in))

        return hook

    def tail(self, x: Tensor, args: tuple[Any, ...] = ()) -> Tail:
        """The part behind the layer, for the batch of the recorded pass."""
        return Tail(self.model, self.name, self._outputs, x, args)


class Tail:
    """Runs the part of the host behind a layer: `tail(output)` is the host's logits had the layer returned `output`.

    Exact where the layer is a cut, that is where nothing computed before it is used behind it; `Site.skippable` tells
    whether that was verified. Otherwise, with `outputs` None, the whole host runs and only this output is replaced.
    The host gets a copy: in-place operations behind the layer leave `output` as it was.
    """

    def __init__(
        self, model: nn.Module, name: str, outputs: dict[str, list[Any]] | None, x: Tensor, args: tuple[Any, ...] = ()
    ) -> None:
        self.model, self.name, self.outputs, self.x, self.args = model, name, outputs, x, args

    def __call__(self, output: Any) -> Tensor:
        output = map_tensors(output, Tensor.clone)
        if self.outputs is None:
            with replace_output(self.model, self.name, lambda _original: output):
                return run_host(self.model, self.x, self.args)
        with contextlib.ExitStack() as restore:
            arrived = [False]

            def arrive(*_args: Any, **_kwargs: Any) -> Any:
                arrived[0] = True
                return output

            # What is put in place of an output was recorded behind the user's hooks: they must not change it again.
            site = find_module(self.model, self.name)
            restore.enter_context(users_hooks_silent(site, lambda: True))
            restore.enter_context(_forward(site, arrive))
            for name, outputs in self.outputs.items():
                module = find_module(self.model, name)
                restore.enter_context(users_hooks_silent(module, lambda: not arrived[0]))
                restore.enter_context(_forward(module, _skip(module.forward, outputs, arrived)))
            logits = run_host(self.model, self.x, self.args)
            if not arrived[0]:
                raise LayerError(
                    f"layer {self.name!r} did not run in the forward pass; name a layer that the model calls"
                )
            return logits


def _skip(forward: Callable[..., Any], outputs: list[Any], arrived: list[bool]) -> Callable[..., Any]:
    remaining = iter(outputs)

    def skipped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if arrived[0] else next(remaining)

    return skipped


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give the module another `forward` for a while; an instance's own one (accelerate sets such) comes back."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = on_own_level(forward, module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own

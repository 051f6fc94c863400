"""Hooks on the host. Each lives in a context that always restores.

`capture` reads outputs, `replace_output` changes one; what lies behind one is run by `ib_explain.tails`. None of them
changes a parameter, and none swallows an exception that it did not raise itself.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ib_explain.modules import find_module, unwrap

__all__ = [
    "LayerError",
    "aside",
    "capture",
    "on_own_level",
    "ours",
    "registered",
    "replace_output",
    "restricting_hooks",
    "uninterrupted",
    "users_hooks_silent",
]


class LayerError(RuntimeError):
    """A layer that does not run exactly once in a forward pass."""


# A hook of ours may run the host itself. Inside `aside` the level is one higher, and hooks that were made on a lower
# level leave those passes alone.
_LEVEL: ContextVar[int] = ContextVar("level", default=0)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Inside, passes of a host are not seen by the hooks that this package has put there before."""
    token = _LEVEL.set(_LEVEL.get() + 1)
    try:
        yield
    finally:
        _LEVEL.reset(token)


def on_own_level(
    hook: Callable[..., Any], otherwise: Callable[..., Any] | None = None, *, restricts: bool = False
) -> Callable[..., Any]:
    """The hook, deaf to passes that start inside `aside` after it was made: those get `otherwise`, if given.

    Args:
        hook: a module's forward hook, pre-hook or `forward`.
        otherwise: see above.
        restricts: it changes what the layer returns, so that on its level the host is another one.
    """
    level = _LEVEL.get()

    @functools.wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if _LEVEL.get() == level:
            return hook(*args, **kwargs)
        return otherwise(*args, **kwargs) if otherwise is not None else None

    return ours(guarded, level if restricts else None)


_MARK = "_ib_explain_level"


def ours(hook: Callable[..., Any], level: int | None = None) -> Callable[..., Any]:
    """Mark a hook of this package, with the level on which it restricts the host; None if it only looks on."""
    setattr(hook, _MARK, level)
    return hook


def restricting_hooks(host: nn.Module) -> tuple[int, ...]:
    """Numbers of our hooks that change, on this level, what layers return: with them the host is another one."""
    level = _LEVEL.get()
    hooks = (pair for module in host.modules() for pair in module._forward_hooks.items())
    return tuple(number for number, hook in hooks if getattr(hook, _MARK, None) == level)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put a Ctrl-C off until the end: half of a set-up, or half of its removal, would stay on the host."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # nothing would be raised here
        return
    asked: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if asked:
            handler(*asked[0])


@contextlib.contextmanager
def registered(*registrations: Callable[[], RemovableHandle]) -> Iterator[None]:
    """Register hooks, each by a call that gives its handle; they are removed at every exit."""
    handles: list[RemovableHandle] = []
    try:
        with uninterrupted():
            for register in registrations:
                handles.append(register())
        yield
    finally:
        with uninterrupted():
            for handle in handles:
                handle.remove()


@contextlib.contextmanager
def users_hooks_silent(module: nn.Module, when: Callable[[], bool]) -> Iterator[None]:
    """While inside, the user's hooks on this module do nothing as long as `when()` is true.

    A replaced output comes from a pass that they have seen already; they would see, or change, it twice.
    """

    def silenced(hook: Callable[..., Any]) -> Callable[..., Any]:
        return on_own_level(lambda *args, **kwargs: None if when() else hook(*args, **kwargs), hook)

    own = [
        (registered, number, hook)
        for registered in (module._forward_pre_hooks, module._forward_hooks)
        for number, hook in registered.items()
        if not hasattr(hook, _MARK)
    ]
    try:
        for registered, number, hook in own:
            registered[number] = silenced(hook)
        yield
    finally:
        for registered, number, hook in own:
            if number in registered:  # it may have removed itself
                registered[number] = hook


class _Stop(Exception):
    """Raised by `capture(stop=True)` when every layer was seen; caught only by the capture that raised it."""


@contextlib.contextmanager
def capture(
    model: nn.Module,
    names: Iterable[str],
    *,
    stop: bool = False,
    once: bool = True,
    at: Callable[[str, Any], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Collect the outputs of layers during one forward pass of `model`.

    Args:
        model: the unwrapped host.
        names: layers by dotted name.
        stop: end the forward pass as soon as all of them were seen (the host's call then returns nothing: put it
            last in the `with` block).
        once: a layer that runs twice is an error; with False the first output is kept.
        at: called with (name, output) as each layer fires; what it returns, if not None, replaces the output.

    Yields:
        A dict that fills as the layers run: name -> output, as the layer returned it (no copy).

    Raises:
        LayerError: on normal exit, if a layer did not run or ran twice.
    """
    names = list(dict.fromkeys(names))
    seen: dict[str, Any] = {}
    stopped = _Stop()

    def hook_for(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if name in seen:
                if once:
                    raise LayerError(
                        f"layer {name!r} ran more than once in one forward pass; name a layer that runs once"
                    )
                return None
            seen[name] = output
            replaced = at(name, output) if at is not None else None
            if stop and len(seen) == len(names):
                raise stopped
            return replaced

        return hook

    modules = {name: find_module(model, name) for name in names}

    def registration(name: str) -> Callable[[], RemovableHandle]:
        return lambda: modules[name].register_forward_hook(on_own_level(hook_for(name)))

    with registered(*map(registration, names)):
        try:
            yield seen
        except _Stop as raised:
            if raised is not stopped:
                raise
    if missing := [name for name in names if name not in seen]:
        raise LayerError(f"layer {missing[0]!r} did not run in the forward pass; name a layer that the model calls")


@contextlib.contextmanager
def replace_output(
    model: nn.Module,
    name: str | Callable[[], str | None],
    edit: Callable[[Any], Any],
    *,
    before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
) -> Iterator[None]:
    """While inside, every forward pass of `model` continues with `edit(output)` in place of the layer's output.

    Args:
        model: the host, wrapped or not.
        name: of the layer, or what gives it: at the start, where None is unknown yet, and whenever `before` has seen a
            pass.
        edit: from the layer's output to what the pass goes on with.
        before: called with the arguments of each pass, positional and named, before it starts; passes that it runs
            itself are not touched.

    Raises:
        LayerError: in a forward pass in which the layer does not run, or runs twice.
    """
    model = unwrap(model)
    runs, layer = 0, ""
    at_layer = contextlib.ExitStack()

    def go_to(wanted: str) -> None:
        nonlocal layer
        if wanted != layer:
            module, watch = find_module(model, wanted), on_own_level(hook)
            at_layer.close()
            at_layer.enter_context(registered(lambda: module.register_forward_hook(watch)))
            layer = wanted

    def start(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal runs
        if before is not None:
            with aside():
                before(inputs, named)
        runs = 0
        if callable(name):
            go_to(str(name()))

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs > 1:
            raise LayerError(f"layer {layer!r} ran more than once in one forward pass; name a layer that runs once")
        return edit(output)

    def end(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        if runs == 0:
            raise LayerError(f"layer {layer!r} did not run in the forward pass; name a layer that the model calls")

    start, end = on_own_level(start), on_own_level(end, restricts=True)
    with (
        registered(
            lambda: model.register_forward_pre_hook(start, with_kwargs=True),
            lambda: model.register_forward_hook(end),
        ),
        at_layer,
    ):
        if (known := name() if callable(name) else name) is not None:
            go_to(known)
        yield

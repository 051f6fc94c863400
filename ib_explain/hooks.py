"""Hooks on the host. Each lives in a context that always restores.

`frozen` lends the host in eval mode, `capture` reads outputs, `replace_output` changes one; what lies behind one is run
by `ib_explain.tails`. None of them changes a parameter, and none swallows an exception that it did not raise itself.
"""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ib_explain.checks import did_you_mean

__all__ = [
    "HostArgs",
    "LayerError",
    "Unfit",
    "aside",
    "capture",
    "find_module",
    "frozen",
    "host_device",
    "host_dtype",
    "lacks_memory",
    "module_name",
    "on_own_level",
    "outside_inference_mode",
]
__all__ += ["registered", "replace_output", "restricting_hooks", "run_host", "uninterrupted", "unwrap"]
__all__ += ["users_hooks_silent"]


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

    return _ours(guarded, level if restricts else None)


_MARK = "_ib_explain_level"


def _ours(hook: Callable[..., Any], level: int | None = None) -> Callable[..., Any]:
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
    """While inside, the user's hooks on this module do nothing `when` told so: its output has been through them."""

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


CHECKPOINTING = "grad_checkpointing"  # timm's flag of a module
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's names for what they wrap


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module from a DataParallel, DistributedDataParallel or torch.compile wrapper.

    Raises:
        TypeError: not an nn.Module, or a scripted one (Python hooks do not run inside TorchScript).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("model is a TorchScript module, whose layers cannot be hooked; pass the eager model")
        compiled = getattr(model, "_orig_mod", None)  # torch.compile's OptimizedModule
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled, nn.Module):
            model = compiled
        else:
            return model


def host_device(model: nn.Module) -> torch.device:
    """Device of the host's first parameter or buffer; the CPU for a host without any. TypeError: see `unwrap`."""
    model = unwrap(model)
    tensor = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return torch.device("cpu") if tensor is None else tensor.device


def host_dtype(model: nn.Module) -> torch.dtype:
    """The precision of the host's first floating-point parameter; float32 for a host without parameters."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule called `name`.

    Raises:
        ValueError: there is none, with the nearest names.
        TypeError: no name, or a layer inside TorchScript, where Python hooks do not run.
    """
    if not isinstance(name, str):
        raise TypeError(f"layer must be a dotted name, a module of the model or None, got {type(name).__name__}")
    inside = name
    while inside.startswith(WRAPPERS):  # the name of a layer of the wrapped model
        inside = inside.partition(".")[2]
    for candidate in (name, inside):
        with contextlib.suppress(AttributeError):  # get_submodule's way to say that there is none
            if candidate:
                found = model.get_submodule(candidate)
                if isinstance(found, torch.jit.ScriptModule):
                    raise TypeError(f"layer {name!r} is a TorchScript module, which cannot be hooked; name another")
                return found
    known = [known for known, _ in model.named_modules() if known]
    raise ValueError(f"{type(model).__name__} has no layer {name!r}{did_you_mean(name, known)}")


def module_name(model: nn.Module, module: nn.Module) -> str:
    """Return the dotted name of `module` inside `model`, or raise a ValueError."""
    module = unwrap(module)
    if module is model:
        raise ValueError(f"layer is the whole {type(model).__name__}; name one of its layers")
    for name, candidate in model.named_modules():
        if candidate is module:
            return name
    raise ValueError(f"the given {type(module).__name__} is not a layer of this {type(model).__name__}")


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Lend the unwrapped host in eval mode, without parameter gradients, run eagerly; hand it back as it came.

    Inside, a host that writes into its images gets copies, gradients can be had under the caller's
    `torch.inference_mode()` too, gradient checkpointing (timm's) is off, since it runs stages without calling them, and
    other threads that want the host wait. Restored at every exit: each module's own flags, each parameter's
    `requires_grad`, and the random state of the CPU and of the host's GPU.

    Raises:
        TypeError: see `unwrap`.
        ValueError: parameters made in inference mode, which no gradient may pass.
    """
    model = unwrap(model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("model has parameters made in inference mode; make or load it outside torch.inference_mode()")
    with contextlib.ExitStack() as inside:
        inside.enter_context(_LOCKS.setdefault(model, threading.RLock()))
        modes = [(module, module.training) for module in model.modules()]
        wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        checkpointing = [(m, flag) for m in model.modules() if (flag := m.__dict__.get(CHECKPOINTING))]
        compiled = [(m, m._compiled_call_impl) for m in model.modules() if getattr(m, "_compiled_call_impl", None)]
        device = host_device(model)
        inside.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        inside.enter_context(_eagerly())
        inside.enter_context(outside_inference_mode())
        inside.enter_context(_images_spared(model))
        try:
            with uninterrupted():
                for module, _ in modes:
                    module.training = False
                for parameter, _ in wanted:
                    parameter.requires_grad_(False)
                for module, _ in compiled:
                    module._compiled_call_impl = None
                for module, _ in checkpointing:
                    module.__dict__[CHECKPOINTING] = False
            yield model
        finally:
            with uninterrupted():
                for module, flag in checkpointing:
                    module.__dict__[CHECKPOINTING] = flag
                for module, mode in modes:
                    module.training = mode
                for parameter, flag in wanted:
                    parameter.requires_grad_(flag)
                for module, implementation in compiled:
                    module._compiled_call_impl = implementation


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave the caller's `torch.inference_mode()`, in which no gradient can be had, for `torch.no_grad()`."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


# Hooks of two threads would meet in one pass: one at a time has a host.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()

# Whether a host writes into its images, as those do that normalise them in place: known after a whole pass.
_WRITES: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _images_spared(host: nn.Module) -> Iterator[None]:
    """Give the host copies of its images, unless it was seen to leave them as they are."""
    given: list[tuple[Tensor, int]] = []  # what the running pass got, and its version then

    def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (inputs and isinstance(inputs[0], Tensor)):
            return None
        x = inputs[0]
        if _WRITES.get(host) is not False:
            x = x.clone()
        if not x.is_inference():  # such a tensor has no version
            given[:] = [(x, x._version)]
        return (x, *inputs[1:])

    def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        if given:
            x, version = given.pop()
            # Looked at in every pass: noise may leave a branch untaken that the user's images take. Those of the first
            # such pass are written to, as by a call of the host itself.
            _WRITES[host] = _WRITES.get(host, False) or x._version != version

    with registered(
        lambda: host.register_forward_pre_hook(_ours(before), prepend=True),
        lambda: host.register_forward_hook(_ours(after)),
    ):
        yield


def lacks_memory(error: Exception) -> bool:
    """Whether an error tells of too little memory or of a GPU that is gone, and nothing of what was run."""
    broken = getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)
    # The errors of the CPU, of cuBLAS and cuDNN, and of Apple's GPUs have no class of their own.
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    if type(error) is RuntimeError and any(word in str(error) for word in words):
        return True
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError | broken)


class Unfit(ValueError):
    """A host that is no classifier, or images that are none of its; the text tells."""


class HostArgs(tuple[Any, ...]):
    """Further arguments of the host's forward, made for one batch; probes and statistics run other batch sizes.

    Tensors with one row an image follow the batch: other sizes repeat the first row.
    """

    batch: int

    @classmethod
    def of(cls, additional: Any, batch: int) -> HostArgs:
        """From Captum's `additional_forward_args`: None, one value or a tuple."""
        args = cls(() if additional is None else additional if isinstance(additional, tuple) else (additional,))
        args.batch = batch
        return args

    def rows(self, count: int) -> tuple[Any, ...]:
        if count == self.batch:
            return tuple(self)
        follows = [isinstance(a, Tensor) and a.ndim > 0 and len(a) == self.batch for a in self]
        return tuple(a[:1].expand(count, *a.shape[1:]) if f else a for a, f in zip(self, follows, strict=True))


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    """Run compiled functions eagerly: a submodule compiled on its own ignores hooks that come after its first call."""
    # Without dynamo nothing was compiled, and importing it takes seconds.
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


# torch's own words where images do not fit a layer; an error of the host's own is left as it is.
OTHER_CHANNELS = re.compile(r"expected input.* to have \d+ channels, but got (\d+) channels")
OTHER_DTYPE = re.compile(r"dtype|Input type|scalar type|data ?type")


def run_host(model: nn.Module, x: Tensor, args: tuple[Any, ...] = ()) -> Tensor:
    """Run the host and check that it returned logits (B, K).

    Raises:
        Unfit: anything else came out, or the model refuses images of so many channels.
        TypeError: the model refuses images of another precision than its own.
    """
    try:
        logits = model(x, *(args.rows(len(x)) if isinstance(args, HostArgs) else args))
    except RuntimeError as error:
        if x.dtype != host_dtype(model) and OTHER_DTYPE.search(str(error)):
            raise TypeError(f"images must be {host_dtype(model)} as the model is, got {x.dtype}: {error}") from error
        refused = OTHER_CHANNELS.search(str(error))
        if refused and int(refused[1]) == x.shape[1]:
            raise Unfit(f"the model refuses images of {x.shape[1]} channels: {error}") from error
        raise
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Unfit(f"model must map (B, 3, H, W) to logits (B, K) with B = {x.shape[0]}, got {got}")
    return logits


class _Stop(Exception):  # noqa: N818 - a signal between our own hook and our own context
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

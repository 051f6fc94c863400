"""The host as it is lent: `frozen` makes it ready and hands it back as it came, `run_host` asks it for logits."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.buffers import buffers_kept
from ib_explain.checks import warn_user
from ib_explain.hooks import ours, registered, uninterrupted
from ib_explain.modules import host_device, host_dtype, unwrap
from ib_explain.randomness import random_state_kept

__all__ = ["HostArgs", "Unfit", "frozen", "lacks_memory", "outside_inference_mode", "run_host"]

CHECKPOINTING = "grad_checkpointing"  # timm's flag of a module

# Hooks of two threads would meet in one pass: one at a time has a host.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()

# Whether a host writes into its images, as those do that normalise them in place: known after a whole pass.
_WRITES: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def frozen(model: nn.Module, *, random_state: bool = True) -> Iterator[nn.Module]:
    """Lend the unwrapped host in eval mode, without parameter gradients, run eagerly; hand it back as it came.

    Inside, a host that writes into its images gets copies, gradients can be had under the caller's
    `torch.inference_mode()` too, gradient checkpointing (timm's) is off, since it runs stages without calling them, and
    other threads that want the host wait. Restored at every exit: each module's own flags, each parameter's
    `requires_grad`, buffers that passes move, and the random state of the CPU and of the host's GPU, unless the user
    draws inside (`random_state=False`).

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
        if random_state:
            inside.enter_context(random_state_kept(host_device(model)))
        inside.enter_context(buffers_kept(model))
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


@contextlib.contextmanager
def _images_spared(host: nn.Module) -> Iterator[None]:
    """Give the host copies of its images, unless it was seen to leave them as they are."""
    # What the running pass got, its version then, and what it was copied from, if it was.
    given: list[tuple[Tensor, int, Tensor | None]] = []

    def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (inputs and isinstance(inputs[0], Tensor)):
            return None
        x, spared = inputs[0], None
        if _WRITES.get(host) is not False:
            x, spared = x.clone(), x
        if not x.is_inference():  # such a tensor has no version
            given[:] = [(x, x._version, spared)]
        return (x, *inputs[1:])

    def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        if given:
            x, version, spared = given.pop()
            # What is written through `.data` shows in the values alone (meta tensors have none): they are compared in
            # the first pass.
            hidden = spared is not None and host not in _WRITES and not x.is_meta and not torch.equal(x, spared)
            # Looked at in every pass: noise may leave a branch untaken that the user's images take. Those of the first
            # such pass are written to, as by a call of the host itself.
            _WRITES[host] = _WRITES.get(host, False) or hidden or x._version != version

    with registered(
        lambda: host.register_forward_pre_hook(ours(before), prepend=True),
        lambda: host.register_forward_hook(ours(after)),
    ):
        yield


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    """Run compiled functions eagerly: a submodule compiled on its own ignores hooks that come after its first call."""
    # Without dynamo nothing was compiled, and importing it takes seconds.
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


class Unfit(ValueError):
    """A host that is no classifier, or images that it does not accept; the message says which."""


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

    def differ(self) -> bool:
        """Whether any argument differs between the images."""
        return any(bool((a != a[:1]).any()) for a in self if self._follows(a))

    def row(self, image: int) -> HostArgs:
        """Those of one image alone."""
        return HostArgs.of(tuple(a[image : image + 1] if self._follows(a) else a for a in self), 1)

    def rows(self, count: int) -> tuple[Any, ...]:
        if count == self.batch:
            return tuple(self)
        return tuple(a[:1].expand(count, *a.shape[1:]) if self._follows(a) else a for a in self)

    def _follows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.batch


def lacks_memory(error: Exception) -> bool:
    """Whether an error is about memory or a lost GPU rather than about the code that ran."""
    broken = getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)
    # The errors of the CPU, of cuBLAS and cuDNN, and of Apple's GPUs have no class of their own.
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    if type(error) is RuntimeError and any(word in str(error) for word in words):
        return True
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError | broken)


# torch's own words where images do not fit a layer; an error of the host's own is left as it is.
OTHER_CHANNELS = re.compile(r"expected input.* to have (\d+) channels, but got (\d+) channels")
OTHER_DTYPE = re.compile(r"dtype|Input type|scalar type|data ?type")


# Python's own words where a forward takes keywords alone, or more than the images.
CALL_REFUSED = re.compile(r"forward\(\) (takes 1 positional argument|missing \d+ required)")


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
        if refused and int(refused[2]) == x.shape[1]:
            raise Unfit(f"the model's images must have {refused[1]} channels, got {refused[2]}: {error}") from error
        raise
    except TypeError as error:
        own = getattr(type(model).forward, "__qualname__", "forward")
        if str(error).startswith(f"{own}()") and CALL_REFUSED.search(str(error)):  # not an inner module's
            told = "model must take the images as its one positional argument; wrap it, or give additional_forward_args"
            raise Unfit(f"{told} to a method that takes them: {error}") from error
        raise
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        expected = f"model must map (B, 3, H, W) to logits (B, K) with B = {x.shape[0]}"
        raise Unfit(f"{expected}, got {_told(logits)}; wrap it in a module whose forward returns the logits alone")
    if model not in _LOOKED_AT and not logits.is_meta and _tells(model, logits.detach()):
        _LOOKED_AT.add(model)
    return logits


# Hosts whose outputs were looked at: once is enough, and on a GPU each look waits for it.
_LOOKED_AT: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_IN_RANGE: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # outputs in [0, 1] of the others
ENOUGH_TO_TELL = 50  # outputs: as many logits do not all lie in [0, 1]


def _tells(model: nn.Module, outputs: Tensor) -> bool:
    """Whether these outputs settle that they are logits; a timm model without its classifier is refused.

    Warns:
        UserWarning: probabilities come for logits.
    """
    if getattr(model, "num_classes", None) == 0 and outputs.shape[1] == getattr(model, "num_features", None):
        raise Unfit("model has no classifier (num_classes=0): it returns features; create it with num_classes=K")
    if not bool(outputs.isfinite().all()):
        return False
    if outputs.shape[1] < 2 or bool(((outputs < 0) | (outputs > 1)).any()):
        return True
    sums_to_one = bool(((outputs.float().sum(1) - 1).abs() < 1e-2).all())
    if not sums_to_one:
        _IN_RANGE[model] = _IN_RANGE.get(model, 0) + int((outputs != 0).sum())  # those of a head of zeros tell nothing
        if _IN_RANGE[model] < ENOUGH_TO_TELL:
            return False
    warn_user(
        "the model's outputs look like probabilities, and are explained as if they were logits; wrap it in a module "
        "that returns the logits, or the logarithm of a softmax"
    )
    return True


def _told(output: Any) -> str:
    """What came instead of logits, in a few words."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    keys = f" with {', '.join(map(repr, list(output)[:5]))}" if isinstance(output, Mapping) else ""
    return f"{type(output).__name__}{keys}"

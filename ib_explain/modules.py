"""The user's modules: what a wrapper holds, a layer by its name, and where and in which precision they compute."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ib_explain.checks import did_you_mean

__all__ = ["find_module", "host_device", "host_dtype", "module_name", "on_host", "unwrap"]

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


def on_host(x: Tensor, model: nn.Module) -> Tensor:
    """Images on the host's device, in its precision."""
    return x.to(host_device(model), host_dtype(model), non_blocking=True)


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

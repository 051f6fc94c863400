"""A second device made of the CPU, for tests where there is no GPU.

Its tensors say that they are on "meta" and hold real values: what is computed is computed here, and whoever brings one
of them together with a tensor of the CPU gets the error that a GPU would give. `torch.Generator`s have a device, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

THERE = torch.device("meta")  # the one kind beside the CPU's that autograd knows without hardware
MOVES = {"aten::_to_copy", "aten::copy_"}  # the operations that may see both devices
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by indices of either


class There(Tensor):
    """A tensor of the other device around one of the CPU."""

    inner: Tensor
    is_meta = False  # it has values
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> There:
        outer = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=THERE,
            requires_grad=requires_grad,
        )
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"There({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> There:
        copied = There(self.inner.detach().clone(), self.requires_grad)
        memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.inner.tolist()

    def new_tensor(self, data: Any, **options: Any) -> There:
        return There(self.inner.new_tensor(data, **options))

    def numpy(self, **_options: Any) -> Any:
        raise TypeError("a tensor of another device is no NumPy array; copy it to the CPU first")

    __array__ = numpy


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, schema = func._schema.name, func._schema
    flat = tree_flatten((args, kwargs))[0]
    here = [t for t in flat if isinstance(t, Tensor) and not isinstance(t, There)]
    there = any(isinstance(t, There) for t in flat)
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    lands = there if device is None else device == THERE
    if name == "aten::copy_":
        lands = isinstance(args[0], There)
    if there and name not in MOVES:
        mixed = [t for t in here if t.dim()]  # a number may come from anywhere
        if name in INDEXED and isinstance(args[0], There):
            mixed = [t for t in args[2:3] if isinstance(t, Tensor) and t.dim() and not isinstance(t, There)]
        if mixed:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found some here, some there")
    inner_args, inner = tree_map_only(There, lambda t: t.inner, (args, kwargs))
    if device is not None:
        inner["device"] = torch.device("cpu") if lands else device
    out = func(*inner_args, **inner)
    if not lands or name == "aten::_local_scalar_dense":
        return args[0] if name == "aten::copy_" else out
    out = tree_map_only(Tensor, lambda t: t if isinstance(t, There) else There(t), out)
    aliased = schema.is_mutable or any(argument.alias_info for argument in schema.arguments)
    return return_and_correct_aliasing(func, args, kwargs, out) if aliased else out


class _Factories(TorchDispatchMode):
    """Also what is made there from nothing, or copied there from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_Generator = torch.Generator


class _GeneratorThere(_Generator):
    @property
    def device(self) -> torch.device:
        return THERE


class _GeneratorKind(type):
    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _GeneratorThere() if _is_there(device) else _Generator(device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Generator)


class _Generators(metaclass=_GeneratorKind):
    """In place of `torch.Generator`."""


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device) == THERE


@contextlib.contextmanager
def other_device() -> Iterator[None]:
    """Inside, `device=THERE` works."""
    tensor, as_tensor = torch.tensor, torch.as_tensor

    def make(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        return There(tensor(data, **options)) if _is_there(device) else tensor(data, device=device, **options)

    def make_as(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        if isinstance(data, Tensor):
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        return There(as_tensor(data, dtype=dtype)) if _is_there(device) else as_tensor(data, dtype=dtype, device=device)

    autocast = torch.autocast

    class Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
            super().__init__("cpu" if device_type == THERE.type else device_type, *args, **options)

    with contextlib.ExitStack() as stack:
        for name, replaced in {
            "tensor": make,
            "as_tensor": make_as,
            "Generator": _Generators,
            "autocast": Autocast,
        }.items():
            stack.enter_context(mock.patch.object(torch, name, replaced))
        stack.enter_context(_Factories())
        yield


def moved(module: nn.Module) -> nn.Module:
    """Its weights and buffers on the other device, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(There(value.detach()), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = There(value)
    return module

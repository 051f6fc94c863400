"""What an attribution method is: a frozen dataclass whose fields are its options, called with a `Call`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ib_explain.checks import check_images
from ib_explain.lending import run_host
from ib_explain.registry import Registry
from ib_explain.sites import Site, resolve_site
from ib_explain.targets import Target, resolve_target

__all__ = ["METHODS", "Call", "Method", "NotApplicable", "check_reference", "default_site", "register_method"]

ROWS = 32  # of one forward pass where the user leaves it to the method


class NotApplicable(ValueError):
    """The method cannot run on this model; the message says why. A benchmark lists it as not applicable."""


@dataclass(frozen=True)
class Call:
    """One request for maps.

    Attributes:
        model: the host, unwrapped and frozen (eval mode, no parameter gradients) for the time of the call.
        x: checked images (B, 3, H, W), at most `batch_size` of them.
        target: as the user gave it, cut to these images; `resolve_target` turns it into classes.
        layer: as the user gave it, or None for the method's own default.
        seed: of everything random.
        batch_size: rows in one forward pass at most; None leaves it to the method. Never changes the result.
        args: further arguments of the host's forward, where a Captum object was given them.
    """

    model: nn.Module
    x: Tensor
    target: Target
    layer: str | nn.Module | None
    seed: int
    batch_size: int | None
    args: tuple[Any, ...] = ()

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        return (int(self.x.shape[1]), int(self.x.shape[2]), int(self.x.shape[3]))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the maps."""
        return self.input_size[1:]

    @property
    def copies_per_pass(self) -> int:
        """How many variants of all images fit into one forward pass, at least one."""
        return max(1, (self.batch_size or max(len(self.x), ROWS)) // len(self.x))

    def classes(self) -> Tensor:
        """Explained classes (B,); costs one forward pass unless the target is resolved already."""
        if isinstance(self.target, Tensor) and self.target.shape == self.x.shape[:1] and int(self.target.min()) >= 0:
            return self.target
        with torch.no_grad():
            return resolve_target(self.target, run_host(self.model, self.x, self.args))

    def refuse_layer(self, name: str) -> None:
        """For methods that look at the input alone: a layer is a ValueError, not silently unused."""
        if self.layer is not None:
            layer = self.layer if isinstance(self.layer, str) else type(self.layer).__name__
            raise ValueError(f"method {name!r} takes no layer, got {layer!r}")


class Method(Protocol):
    """Makes maps. The class docstring's first line is what tables and `available_methods` show.

    A method that calls `resolve_target` on the logits of its own forward pass says so with a class attribute
    `resolves_target = True`; for the others `attribute` runs one image first, to check the target's range.

    Attributes:
        unit: what the values are, for colour bars: 'bits', 'gradient x feature', ...
    """

    unit: str

    def __call__(self, call: Call) -> Tensor:
        """Maps (B, 1, H, W) at the input's resolution, float32, detached."""


METHODS: Registry[Callable[..., Any]] = Registry("method")


def default_site(host: nn.Module, size: tuple[int, int, int]) -> Site:
    """The site at the default layer of `ib`.

    Raises:
        NotApplicable: the host has none.
    """
    try:
        return resolve_site(host, None, size)
    except ValueError as error:
        raise NotApplicable(str(error)) from error


def check_reference(images: Any, name: str = "reference") -> None:
    """Refuse what can be no reference images: None or a tensor (N, 3, H, W); their size is checked with the images'."""
    if images is not None:
        check_images(images, name=name)


M = TypeVar("M", bound=Callable[..., Any])


def register_method(name: str) -> Callable[[M], M]:
    """Decorator: file a method under a name, for `attribute`, `benchmark` and the command line.

    It is a frozen dataclass as `Method` describes, or a function f(model, x, target) -> maps, which has no options and
    whose docstring's first line is shown.

    Raises:
        TypeError: no name, or neither a class with `__call__` nor a function.
        ValueError: the name is empty or taken.
    """
    METHODS.check_name(name)

    def file(method: M) -> M:
        if not callable(method):
            raise TypeError(f"method {name!r} must be a class or a function f(model, x, target), got {method!r}")
        if isinstance(method, type) and "__call__" not in dir(method):
            raise TypeError(f"method {name!r} needs __call__(self, call) -> maps; {method.__name__} has none")
        entry = method if isinstance(method, type) else _of_function(name, method)
        METHODS.register(name, origin=method)(entry)
        return method

    return file


def _of_function(name: str, given: Callable[[nn.Module, Tensor, Tensor], Any]) -> Callable[..., Any]:
    @dataclass(frozen=True)
    class Function:
        unit: ClassVar[str] = f"own unit of {name}"
        function: ClassVar[Callable[..., Any]] = staticmethod(given)

        def __call__(self, call: Call) -> Any:
            call.refuse_layer(name)
            return given(call.model, call.x, call.classes())

    Function.__doc__ = given.__doc__
    return Function

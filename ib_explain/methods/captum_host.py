"""Lends the host to Captum, whose hooks need modules that run once and not in place; takes it back as it was."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.lending import run_host
from ib_explain.methods.base import NotApplicable

__all__ = ["Structure", "for_captum", "inspect", "run_differentiably"]

# Autograd nodes that only rearrange values.
SHAPE = {"View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "Permute", "Transpose", "T", "Squeeze", "Unsqueeze"}
SHAPE |= {"Select", "Slice", "ToCopy", "Expand", "AsStrided"}


@dataclass(frozen=True)
class Structure:
    """How the logits come from the image.

    Attributes:
        calls: how often each leaf module runs in one forward pass.
        nodes: autograd nodes by name, without those that only rearrange values and without their "Backward0".
        joins: those among them at which several paths from the image meet.
    """

    calls: dict[nn.Module, int]
    nodes: Counter[str]
    joins: Counter[str]


def inspect(host: nn.Module, x: Tensor) -> Structure:
    """Run the frozen host on one image and read which modules ran and which operations autograd recorded.

    Raises:
        NotApplicable: no gradient of the logits reaches the images.
    """
    calls: dict[nn.Module, int] = {}
    with _restored(host), torch.enable_grad():
        for module in host.modules():
            if next(module.children(), None) is None:
                module.__dict__["forward"] = _counted(module, module.forward, calls)
        logits = run_differentiably(host, x[:1].detach().clone().requires_grad_())
    nodes: Counter[str] = Counter()
    joins: Counter[str] = Counter()
    seen, stack = set(), [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        stack += parents
        name = node.name().rpartition("::")[2].partition("Backward")[0]
        if name not in SHAPE and not name.endswith("AccumulateGrad"):
            nodes[name] += 1
            joins[name] += len(parents) > 1
    return Structure(calls, nodes, +joins)


def run_differentiably(host: nn.Module, x: Tensor) -> Tensor:
    """Checked logits of the frozen host; where gradients are asked for, there are some.

    Raises:
        NotApplicable: no gradient of the logits reaches the images.
    """
    logits = run_host(host, x)
    if x.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
        raise NotApplicable(
            f"no gradient of the logits reaches the images of this {type(host).__name__}: its forward runs under "
            "no_grad, detaches or rounds; occlusion, feature_ablation and rise need none"
        )
    return logits


@contextlib.contextmanager
def for_captum(host: nn.Module, calls: dict[nn.Module, int] | None = None) -> Iterator[nn.Module]:
    """Lend the frozen host to Captum, with autograd on and its known warnings off.

    Meanwhile no module works in place and, if `calls` tells how often they run, a leaf module that runs several times
    in a pass is stood in for by one copy a call, since Captum keeps one input per module. Afterwards every module has
    its attributes, children and hooks as before, also what Captum leaves behind.
    """
    with _restored(host), warnings.catch_warnings(), torch.enable_grad():
        # Captum announces its hooks, and that it sets requires_grad: both are meant.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\.")
        for module in host.modules():
            if module.__dict__.get("inplace") is True:
                module.__dict__["inplace"] = False
        shared = {id(m): _PerCall(m, count) for m, count in (calls or {}).items() if count > 1}
        for parent in [m for m in host.modules() if id(m) not in shared]:
            for name, child in parent._modules.items():
                if child is not None and id(child) in shared:
                    parent._modules[name] = shared[id(child)]
        yield host


class _PerCall(nn.Module):
    """Stands in for a module that runs several times in a pass: each call meets a copy of its own."""

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList([module, *(copy.deepcopy(module) for _ in range(count - 1))])
        self.done = 0
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.copies[self.done % len(self.copies)]
        self.done += 1
        return module(*args, **kwargs)


def _counted(module: nn.Module, forward: Callable[..., Any], calls: dict[nn.Module, int]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        calls[module] = calls.get(module, 0) + 1
        return forward(*args, **kwargs)

    return run


@contextlib.contextmanager
def _restored(host: nn.Module) -> Iterator[None]:
    """Put back every module's own attributes, and what its dicts (parameters, children, hooks) held, at any exit."""
    kept = [
        (m, dict(m.__dict__), [(d, list(d.items())) for d in m.__dict__.values() if isinstance(d, dict)])
        for m in host.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, contents in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for held, items in contents:  # the same dict objects: handles of the user's own hooks point to them
                same = len(held) == len(items) and all(map(_same_item, held.items(), items))
                if not same:
                    held.clear()
                    held.update(items)


def _same_item(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """The same name and the very same object: tensors, which a host may keep in a dict, have no plain equality."""
    return one[0] == other[0] and one[1] is other[1]

"""What one forward pass tells about all layers of a host: how often each runs, when, and which could be cuts."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ib_explain.hooks import on_own_level, registered
from ib_explain.layouts import leaves
from ib_explain.lending import frozen
from ib_explain.readings import finest_grid
from ib_explain.refusals import first_pass
from ib_explain.stripes import probe_batch

__all__ = ["Candidate", "Survey", "survey"]


@dataclass(frozen=True)
class Candidate:
    """A layer worth a probe."""

    name: str
    depth: float
    cut: bool  # every path from the input to the logits leads through its one tensor
    grid: tuple[int, int]  # the finest that its shapes allow


@dataclass(frozen=True)
class Survey:
    """What one pass tells about all layers: how often each ran, when it was done, which are worth a probe."""

    runs: Counter[str]
    depths: dict[str, float]
    candidates: list[Candidate]
    differentiable: bool
    """Whether the logits' gradient reaches the images."""


def survey(host: nn.Module, size: tuple[int, int, int], args: tuple[Any, ...]) -> Survey:
    """Run the host once and tell for every layer how often it runs, when it is done, and whether it is a cut."""
    calls: list[tuple[str, list[tuple[int, ...]], tuple[Any, ...], int]] = []
    done = 0

    def note(name: str, module: nn.Module) -> RemovableHandle:
        leaf_module = next(module.children(), None) is None

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal done
            done += leaf_module
            tensors = [leaf for _, leaf in leaves(output)]
            # The nodes are taken now: an in-place operation behind the layer would change the tensor's own.
            nodes = tuple(tensor.grad_fn for tensor in tensors)
            calls.append((name, [tuple(t.shape) for t in tensors], nodes, done))

        return module.register_forward_hook(on_own_level(hook))

    # TorchScript takes no Python hooks.
    layers = [(n, m) for n, m in host.named_modules() if n and not isinstance(m, torch.jit.ScriptModule)]
    with frozen(host), torch.enable_grad():
        x = probe_batch(host, 2, size).requires_grad_()
        with registered(*(functools.partial(note, name, module) for name, module in layers)):
            logits = first_pass(host, x, args)
        cuts = _dominators(logits.grad_fn)
    runs = Counter(name for name, *_ in calls)
    depths = {name: position / max(done, 1) for name, _, _, position in calls}
    found: dict[tuple[Any, ...], Candidate] = {}
    for name, shapes, nodes, _ in calls:
        grids = [grid for shape in shapes if (grid := finest_grid(shape, 2, size))]
        cut = len(nodes) == 1 and nodes[0] in cuts
        several = len(nodes) > 1 and any(nodes)  # one without a node is a table: it does not depend on the image
        if runs[name] > 1 or not grids or not (cut or several):
            continue
        if nodes not in found or name.count(".") < found[nodes].name.count("."):
            found[nodes] = Candidate(name, depths[name], cut, max(grids, key=math.prod))
    candidates = sorted(found.values(), key=lambda c: c.depth)
    return Survey(runs, depths, candidates, differentiable=logits.grad_fn is not None)


def _dominators(output: Any) -> set[Any]:
    """Nodes of the autograd graph that every path from the input to the logits passes.

    Parameters are frozen, so the graph holds only what depends on the image. A node lies on every path exactly if,
    when nodes are visited in topological order, no edge jumps over it.
    """
    if output is None:
        return set()
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(output, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in _parents(node) if parent not in seen)
    order.reverse()  # from the logits back to the input
    place = {node: index for index, node in enumerate(order)}
    reach, result = 0, set()
    for index, node in enumerate(order):
        if reach <= index:  # nothing before this node points behind it
            result.add(node)
        reach = max([reach] + [place[parent] for parent, _ in _parents(node)])
    return result


def _parents(node: Any) -> Iterator[tuple[Any, int]]:
    return ((parent, index) for parent, index in node.next_functions if parent is not None)

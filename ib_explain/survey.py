"""What one forward pass tells about all layers of a host: how often each runs, when, and which could be cuts."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ib_explain.hooks import Unfit, aside, frozen, lacks_memory, on_own_level, registered, run_host
from ib_explain.hosts import input_size_of, timm_config
from ib_explain.layouts import leaves
from ib_explain.readings import finest_grid
from ib_explain.stripes import probe_batch

__all__ = ["Candidate", "Survey", "refused_sizes_told", "survey"]


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

    # TorchScript takes no hooks of Python's.
    layers = [(n, m) for n, m in host.named_modules() if n and not isinstance(m, torch.jit.ScriptModule)]
    with frozen(host), torch.enable_grad():
        x = probe_batch(host, 2, size).requires_grad_()
        with registered(*(functools.partial(note, name, module) for name, module in layers)):
            logits = _run(host, x, args)
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


def _run(host: nn.Module, x: Tensor, args: tuple[Any, ...]) -> Tensor:
    """The first pass at this size of images, in which a host may refuse it."""
    try:
        return run_host(host, x, args)
    except REFUSALS as error:
        size = tuple(x.shape[1:])
        if isinstance(error, Unfit):
            raise
        if _fails_alike(host, size, args, error) and (told := _refusal(host, size, args, error)):
            raise told from error
        raise


@contextlib.contextmanager
def refused_sizes_told(host: nn.Module, size: tuple[int, ...]) -> Iterator[None]:
    """Errors inside that come of the host's refusing images of this size say so, as a ValueError."""
    try:
        yield
    except REFUSALS as error:
        causes = (error, error.__cause__)
        told = any(isinstance(cause, SizeRefused | Unfit) for cause in causes)
        if not told and _fails_alike(host, size, (), error) and (refusal := _refusal(host, size, (), error)):
            raise refusal from error
        raise


class SizeRefused(ValueError):
    """The host does not run on images of this size."""


REFUSALS = (AssertionError, RuntimeError, ValueError)
# torch's own words where shapes do not go together; an error of the host's own is left as it is.
SHAPES = re.compile(r"shapes cannot be multiplied|size of tensor|is invalid for input of size|Kernel size can't be")


def _refusal(host: nn.Module, size: tuple[int, ...], args: tuple[Any, ...], error: Exception) -> SizeRefused | None:
    """The error in words of sizes, if it is about these: torch says so, or at its own size the host runs."""
    own = input_size_of(host) if timm_config(host).get("input_size") else size
    about_shapes = type(error) is RuntimeError and SHAPES.search(str(error))
    if not about_shapes and (own == size or _raises_at(host, own, args) is not None):
        return None
    known = f"; its own size is {own}" if own != size else ""
    return SizeRefused(f"the model refuses images of size {size}{known}: {' '.join(str(error).split())}")


def _fails_alike(host: nn.Module, size: tuple[int, ...], args: tuple[Any, ...], error: Exception) -> bool:
    """Whether the host alone raises the same on noise of this size: else it was something else, or passed."""
    again = _raises_at(host, size, args)
    return not lacks_memory(error) and type(again) is type(error) and str(again) == str(error)


def _raises_at(host: nn.Module, size: tuple[int, ...], args: tuple[Any, ...]) -> Exception | None:
    try:
        with aside(), torch.no_grad():
            run_host(host, probe_batch(host, 2, (size[0], size[1], size[2])), args)
    except Exception as error:  # whatever a host raises at its input
        return error
    return None


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

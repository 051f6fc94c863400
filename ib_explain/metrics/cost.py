"""Cost: what a method takes for an image, in multiples of one plain forward pass of the host.

Passes are counted by arithmetic, not by calls: a pass through half of the host's work counts one half, whatever the
batches, and two machines count the same. Time and memory are ratios of measurements of one process, taken in turns.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ib_explain.checks import check_images, check_positive_int
from ib_explain.lending import frozen, run_host
from ib_explain.metrics.base import Case, register_metric
from ib_explain.metrics.probe import Explain, Probe, check_explain
from ib_explain.modules import host_device
from ib_explain.targets import Target, resolve_target, target_scores

__all__ = ["Cost", "count_passes", "measure_cost"]

TURN = 0.05
"""Seconds that a measured turn lasts at least; single calls of a few milliseconds measure the scheduler."""
ROUNDS = 3
"""Timed turns of the registered metric."""


@dataclass(frozen=True)
class Cost:
    """What a method takes for an image of a batch; 1 is what the host's plain forward pass takes for it.

    Attributes:
        forwards: forward passes, see `count_passes`.
        backwards: backward passes; 1 is one from the target's logit to the image.
        time_ratio: time, median over the rounds: of the processor on a CPU, of the clock on a GPU.
        time_range: smallest and largest of the rounds.
        memory_ratio: peak memory beyond what was held before the call. Grows with the rows that a method runs at once.
    """

    forwards: float
    backwards: float
    time_ratio: float
    time_range: tuple[float, float]
    memory_ratio: float


def measure_cost(model: nn.Module, x: Tensor, explain: Explain, target: Target = None, *, rounds: int = 5) -> Cost:
    """Count a method's passes and measure its time and peak memory against one forward pass of the same batch.

    Protocol: one call first, unmeasured, so that what is done once for a host (a probe of its layers, statistics over
    reference images, the choice of kernels) does not count; one counted call; one for the memory; then plain forward
    pass and method in turns, P M P M ... P, each method's time divided by the mean of the two passes around it. A turn
    repeats its call until it lasts 0.05 s. The plain pass runs the whole batch at once without autograd. Fitting is
    not part of it.

    On a GPU time is the clock's, after the queue has run empty. On a CPU it is the processor time of all threads of
    the process: where other programs run, the clock mostly tells when the scheduler took the processor away, and a
    stall after the method may even land in the plain pass. Waiting (for a disk, for a sleeping thread) is not seen.
    Memory is, on a GPU, PyTorch's own peak (`torch.cuda.max_memory_allocated`); elsewhere the bytes of all tensors
    that are alive at once, without the scratch memory inside of an operation, which PyTorch does not tell.

    Args:
        model: the host; lent in eval mode without parameter gradients.
        x: (B, C, H, W), normalised, in the batch size that the method is to be judged at.
        explain: the method, (model, x, target (B,)) -> maps; called 4 + rounds times or more.
        target: the explained classes, resolved before anything is measured; None is the host's top-1.
        rounds: timed turns.
    """
    rounds = check_positive_int(rounds, "rounds")
    check_explain(explain)
    with frozen(model) as host:
        classes, plain = _prepared(host, x, target)

        def method() -> Tensor:
            return explain(host, x, classes)

        plain(), method()
        forwards, backwards = _passes(host, x, classes, method)
        memory = peak_bytes(method, x.device), peak_bytes(plain, x.device)
        ratios = _time_ratios(method, plain, rounds, x.device)
    ratio = memory[0] / memory[1] if memory[1] else float("nan")
    return Cost(forwards, backwards, statistics.median(ratios), (min(ratios), max(ratios)), ratio)


def count_passes(model: nn.Module, x: Tensor, explain: Explain, target: Target = None) -> tuple[float, float]:
    """Count forward and backward passes for an image, in one call of the method.

    What is counted is the arithmetic of matrix products, convolutions and attention, by `torch.utils.flop_counter`:
    outside of backward passes in units of the host's forward pass, inside of them in units of its backward pass from
    the target's logit to the image. A Grad-CAM at the last stage is 1 forward and few per cent of a backward pass;
    gradients of the weights that nobody reads count too. So do products of the method's own, such as an attention
    network or RISE's masks: what they take is what the user pays. Element-wise work (blurs by sums, resizing) does not.

    Args:
        model, x, explain, target: as for `measure_cost`; `explain` is called once before.

    Returns:
        Forward and backward passes. NaN for a host without any such product.
    """
    check_explain(explain)
    with frozen(model) as host:
        classes, _ = _prepared(host, x, target)
        explain(host, x, classes)  # what is found out once for a host, such as its layers, is no part of the price
        return _passes(host, x, classes, lambda: explain(host, x, classes))


def _prepared(host: nn.Module, x: Tensor, target: Target) -> tuple[Tensor, Callable[[], Tensor]]:
    check_images(x, device=host_device(host))

    def plain() -> Tensor:
        with torch.no_grad():
            return run_host(host, x)

    return resolve_target(target, plain()), plain


def _passes(host: nn.Module, x: Tensor, classes: Tensor, method: Callable[[], Any]) -> tuple[float, float]:
    with _metered() as unit, torch.enable_grad():
        images = x.detach().clone().requires_grad_()
        torch.autograd.grad(target_scores(run_host(host, images), classes).sum(), images)
    with _metered() as meter:
        method()
    pairs = ((meter.forward, unit.forward), (meter.backward, unit.backward))
    forwards, backwards = (spent / one if one else float("nan") for spent, one in pairs)
    return forwards, backwards


@contextlib.contextmanager
def _metered() -> Iterator[_Meter]:
    meter = _Meter()
    # nn.MultiheadAttention's fused kernel, used without autograd only, has no count.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with meter:
            yield meter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        meter.stop()


class _Meter(TorchDispatchMode):
    """Sees every operation: adds up its arithmetic, and the bytes of the tensors that are alive.

    It enters itself again for parts of an operation, so what is done once around a measurement is in `_metered`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0
        self.alive = self.peak = 0
        self._known: dict[int, weakref.finalize[..., Any]] = {}

    def stop(self) -> None:
        """Forget tensors that outlive the measurement."""
        for storage in self._known.values():
            storage.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is None and isinstance(func, torch._ops.OpOverload):
            with self:  # under inference_mode, composite operations come whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, 0)  # what an operation reads and nobody made was there before
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor, tensor.untyped_storage().nbytes())
        if formula is not None:
            arithmetic = formula(*args, **kwargs, out_val=result)
            if torch._C._current_graph_task_id() == -1:  # as torch.utils.module_tracker tells forward from backward
                self.forward += arithmetic
            else:
                self.backward += arithmetic
        return result

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._forget, key, size)
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.alive -= size


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that tensors made by `run()` hold at once: on CUDA by torch's own count, else of tensors alone."""
    if device.type != "cuda":
        with _metered() as meter:
            run()
        return meter.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _time_ratios(method: Callable[[], Any], plain: Callable[[], Any], rounds: int, device: torch.device) -> list[float]:
    turns = [math.ceil(TURN / max(_seconds(run, 1, device), 1e-6)) for run in (plain, method)]
    passes, methods = [_seconds(plain, turns[0], device)], []
    for _ in range(rounds):
        methods.append(_seconds(method, turns[1], device))
        passes.append(_seconds(plain, turns[0], device))
    around = [(before + after) / 2 for before, after in zip(passes, passes[1:], strict=False)]
    return [spent / one for spent, one in zip(methods, around, strict=True)]


def _seconds(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Time of one call, mean of `calls` of them."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    start = clock()
    for _ in range(calls):
        run()
    _wait(device)
    return (clock() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _cost(probe: Probe, _maps: Tensor | None, explain: Explain) -> Cost:
    return measure_cost(probe.model, probe.x, explain, probe.target, rounds=ROUNDS)


def _file_cost(name: str, unit: str, read: Callable[[Cost], float], summary: str) -> None:
    def score(case: Case) -> Tensor:
        cost = case.once(_cost, explain=case.explain)
        return torch.full((len(case.probe.x),), read(cost), device=case.probe.x.device)

    score.__doc__ = summary
    register_metric(name, family="cost", unit=unit, higher_is_better=False, needs=("model", "explain"))(score)


_file_cost(
    "time",
    "times a forward pass",
    lambda cost: cost.time_ratio,
    "Time for a map in plain forward passes of the same images, median of three rounds; processor time on a CPU.",
)
_file_cost(
    "forward_passes", "passes", lambda cost: cost.forwards, "Forward passes for a map, counted by their arithmetic."
)
_file_cost(
    "backward_passes",
    "passes",
    lambda cost: cost.backwards,
    "Backward passes for a map, counted by their arithmetic; 1 reaches from the logit to the image.",
)
_file_cost(
    "memory",
    "times a forward pass",
    lambda cost: cost.memory_ratio,
    "Peak memory for maps in that of a plain forward pass of the same images.",
)

"""A host with weights drawn anew, layer by layer or all at once: what a map has to depend on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ib_explain.lending import frozen, run_host
from ib_explain.modules import find_module
from ib_explain.randomness import generator_of

__all__ = ["draw_again", "randomisable_layers", "randomise", "randomised_twin", "twin_of"]


def twin_of(model: nn.Module) -> nn.Module:
    """A deep copy of the host in eval mode, without parameter gradients."""
    with frozen(model) as host:
        return copy.deepcopy(host)


def randomisable_layers(model: nn.Module, x: Tensor) -> list[str]:
    """Layers with parameters, the last to finish in a forward pass first.

    They are the children of the host; an `nn.Sequential` or `nn.ModuleList` is opened, so that stages give their
    blocks. What holds parameters without being called comes behind them, and last "", the host's own parameters, if
    any: together they are all parameters.

    Args:
        model: the host.
        x: (B, C, H, W); its first image is run.
    """
    twin = twin_of(model)
    layers = {name: module for name, module in _opened("", twin) if next(module.parameters(), None) is not None}
    finished: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            finished.setdefault(name)

        return hook

    for name, module in layers.items():  # hooks of our own copy, which ends here
        module.register_forward_hook(note(name))
    with torch.no_grad(), frozen(twin):
        run_host(twin, x[:1])
    uncalled = [name for name in layers if name not in finished]
    own = [""] if next(twin.parameters(recurse=False), None) is not None else []
    return [*reversed(finished), *reversed(uncalled), *own]


def randomised_twin(model: nn.Module, seed: int) -> nn.Module:
    """A deep copy of the host with all parameters drawn anew."""
    twin = twin_of(model)
    randomise(twin, ["", *(name for name, _ in twin.named_children())], seed)
    return twin


def randomise(twin: nn.Module, layers: Sequence[str], seed: int) -> None:
    """Draw the parameters of these layers and of all inside anew, in place; "" is the host's own ones alone."""
    # By identity: a module that the host holds under several names goes by any of them.
    chosen = {id(module) for layer in layers if layer for module in find_module(twin, layer).modules()}
    if "" in layers:
        chosen.add(id(twin))
    for place, module in enumerate(twin.modules()):
        if id(module) in chosen and next(module.parameters(recurse=False), None) is not None:
            draw_again(module, seed * 1_000_003 + place)


def draw_again(module: nn.Module, seed: int) -> None:
    """Initialise a module by its own rule or, where it has none for itself, shuffle its own parameters."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset) and next(module.children(), None) is None:
        fresh = copy.deepcopy(module).cpu()  # on the CPU the draws are the same for every device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed would seed every GPU too
            fresh.reset_parameters()  # type: ignore[operator]
        module.load_state_dict(fresh.state_dict())
        return
    generator = generator_of(seed)
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            order = torch.randperm(parameter.numel(), generator=generator, device="cpu").to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _opened(prefix: str, module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _opened(f"{prefix}{name}.", child)
        else:
            yield prefix + name, child

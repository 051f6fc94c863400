"""Seeds: one check, one generator, one context, so that any integer is a seed and means the same everywhere."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_seed", "generator_of", "normal", "own_generators_seeded", "random_state_kept", "seeded"]
__all__ += ["uniform"]


def check_seed(seed: Any) -> int:
    """Return `seed` as an int, or raise a TypeError that says what came instead (bool is refused)."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    return int(seed.__index__())


def generator_of(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers of their own on a device; seeds that differ by a multiple of 2^63 are one."""
    return torch.Generator(device).manual_seed(seed % 2**63)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """N(0, 1), float32 on the generator's device, whatever torch's default precision and device are."""
    return torch.randn(shape, dtype=torch.float32, generator=generator, device=generator.device)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in [0, 1), float32 on the generator's device, whatever torch's default precision and device are."""
    return torch.rand(shape, dtype=torch.float32, generator=generator, device=generator.device)


def random_state_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Put torch's random state of the CPU, and of this device if it is a GPU, back at the end."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's random numbers, and put their states back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - loaders use the old API
    # torch.manual_seed would seed all GPUs, also those that are not in use yet, where nothing could be put back.
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed % 2**63)
        if on_gpus:
            torch.cuda.manual_seed_all(seed % 2**63)
        yield
    finally:
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def own_generators_seeded(loader: Any, seed: int) -> Iterator[None]:
    """Seed the generators that a DataLoader and its samplers were given, and put their states back at the end."""
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    given = [getattr(holder, "generator", None) for holder in holders]
    states = {g: g.get_state() for g in given if isinstance(g, torch.Generator)}  # one that several hold counts once
    try:
        for generator in states:
            generator.manual_seed(seed % 2**63)
        yield
    finally:
        for generator, state in states.items():
            generator.set_state(state)

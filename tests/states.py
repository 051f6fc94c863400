"""What a host is, put beside what it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def state(model: nn.Module) -> dict[str, Any]:
    """All that a hook could leave behind."""
    kinds = [name for name in vars(model) if name.endswith("_hooks")]
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "hooks": [len(getattr(m, kind)) for m in model.modules() for kind in kinds],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in ("training", "requires_grad", "gradients", "hooks", "attributes"):
        assert after[name] == before[name], name
    torch.testing.assert_close(after["weights"], before["weights"], rtol=0, atol=0)
    assert torch.equal(after["random"], before["random"])


def mixed(model: nn.Module) -> nn.Module:
    """Training flags and requires_grad that no blunt train() or requires_grad_() would give back."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    return model

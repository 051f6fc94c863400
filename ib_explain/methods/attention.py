"""Reads the attention matrices of a transformer: its fused kernels are switched off meanwhile, its hooks must fire."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.hooks import capture
from ib_explain.lending import run_host
from ib_explain.methods.base import Call, NotApplicable
from ib_explain.methods.cam import cam_layer
from ib_explain.methods.captum_host import inspect
from ib_explain.sites import resolve_site
from ib_explain.targets import resolve_target, target_scores

__all__ = ["AttentionPass", "read_attention", "unfused"]


@dataclass(frozen=True)
class AttentionPass:
    """The attention of one forward pass, float32, detached.

    Attributes:
        matrices: per layer (B, heads, T, T), rows sum to 1.
        gradients: of the target's logit with respect to each; empty if not asked for.
        readers: (B, T), which tokens the classifier reads behind the last layer, summing to 1: the class token, or
            all tokens that are pooled.
        prefix: tokens before the grid.
        grid: (h, w).
    """

    matrices: list[Tensor]
    gradients: list[Tensor]
    readers: Tensor
    prefix: int
    grid: tuple[int, int]

    def to_map(self, relevance: Tensor) -> Tensor:
        """What the readers take from each grid token: (B, T, T) -> (B, 1, h, w)."""
        taken = (self.readers[:, None] @ relevance)[:, 0]  # (B, T)
        h, w = self.grid
        return taken[:, self.prefix : self.prefix + h * w].reshape(-1, 1, h, w)


@contextlib.contextmanager
def unfused(host: nn.Module) -> Iterator[list[str]]:
    """Make timm's attention compute its matrix in the open; yields the names of the modules that hand it out.

    timm's attention passes softmax(q k) through its `attn_drop`, an identity in eval mode, unless `fused_attn` is set.
    """
    changed = []
    try:
        for module in host.modules():
            if getattr(module, "fused_attn", False) is True:
                changed.append(module)
                module.fused_attn = False  # type: ignore[assignment]
        yield [
            f"{name}.attn_drop".lstrip(".")
            for name, module in host.named_modules()
            if isinstance(getattr(module, "attn_drop", None), nn.Module)
        ]
    finally:
        for module in changed:
            module.fused_attn = True  # type: ignore[assignment]


def read_attention(call: Call, *, gradients: bool) -> AttentionPass:
    """Run the host once and collect its attention; backward through the last layer, or all with `gradients`.

    Raises:
        NotApplicable: the host shows no attention matrices, or they are not over one set of tokens with a grid.
    """
    host = type(call.model).__name__
    with unfused(call.model) as exposed:
        if not exposed:
            raise NotApplicable(f"no module of this {host} exposes its attention matrix (timm's attn_drop)")
        runs = {id(module): count for module, count in inspect(call.model, call.x).calls.items()}
        order = list(runs)
        modules = {name: call.model.get_submodule(name) for name in exposed}
        for name, module in modules.items():
            if runs.get(id(module)) != 1:
                raise NotApplicable(f"the attention matrix of {name!r} shows {runs.get(id(module), 0)} times in a pass")
        names = sorted(exposed, key=lambda name: order.index(id(modules[name])))
        kept: dict[str, Tensor] = {}

        def at(name: str, output: Any) -> Any:
            kept[name] = output
            if name == (names[0] if gradients else names[-1]):
                torch.set_grad_enabled(True)  # until the end of the pass: the no_grad around it puts it back
                kept[name] = output.detach().requires_grad_()
            return kept[name]

        with torch.no_grad(), capture(call.model, names, at=at):
            logits = run_host(call.model, call.x)
            classes = resolve_target(call.target, logits)
            asked = [kept[name] for name in (names if gradients else names[-1:])]
            reached = [matrix for matrix in asked if matrix.requires_grad]  # not those of a branch of its own
            found: dict[int, Tensor | None] = {}
            if logits.requires_grad:
                with torch.enable_grad():
                    score = target_scores(logits.float(), classes).sum()
                gradients_of = torch.autograd.grad(score, reached, allow_unused=True)
                found = {id(matrix): gradient for matrix, gradient in zip(reached, gradients_of, strict=True)}
    matrices = [kept[name].detach().float() for name in names]
    prefix, grid = _tokens(call, names, matrices)
    slopes = [torch.zeros_like(a) if (g := found.get(id(a))) is None else g.detach().float() for a in asked]
    # Behind the last attention tokens do not mix: a token that the classifier does not read has no gradient at all.
    readers = (slopes[-1].abs().amax(dim=(1, 3)) > 0).float()  # (B, T)
    readers = readers / readers.sum(dim=1, keepdim=True).clamp_min(1)
    return AttentionPass(matrices, slopes if gradients else [], readers, prefix, grid)


def _tokens(call: Call, names: list[str], matrices: list[Tensor]) -> tuple[int, tuple[int, int]]:
    """Where the grid is among the tokens, the same in every layer."""
    host = type(call.model).__name__
    layout = resolve_site(call.model, cam_layer(call.model, call.input_size), call.input_size).layout
    tokens = layout.prefix + layout.suffix + layout.grid[0] * layout.grid[1]
    for name, matrix in zip(names, matrices, strict=True):
        if matrix.ndim != 4 or matrix.shape[0] != len(call.x) or matrix.shape[2:] != (tokens, tokens):
            raise NotApplicable(
                f"{name!r} of this {host} holds attention of shape {tuple(matrix.shape)}, not over all {tokens} tokens"
            )
        if not torch.allclose(matrix.sum(dim=-1), matrix.new_ones(()), atol=2e-2):
            raise NotApplicable(f"the rows of {name!r} of this {host} do not sum to 1")
    if layout.fold != 1 or len(layout.axes) != 1 or layout.order is not None:
        raise NotApplicable(f"the tokens of this {host} are not in raster order: {layout.kind}")
    return layout.prefix, layout.grid

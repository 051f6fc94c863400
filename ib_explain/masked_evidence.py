"""Evidence from the picture with parts of it hidden: what refining goes by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain.lending import HostArgs, run_host
from ib_explain.perturb import rise_masks
from ib_explain.randomness import generator_of, uniform
from ib_explain.targets import target_scores

__all__ = ["masked_evidence"]

CELLS = 3  # of a mask, a side: it hides large parts, so that what is left is seen without its context


def masked_evidence(
    host: nn.Module, x: Tensor, target: Tensor, grid: tuple[int, int], *, pairs: int, seed: int, args: HostArgs
) -> Tensor:
    """What each place of a picture brings the target, summed over random masks on the picture: (B, 1, h, w).

    A place's evidence is the derivative of ln p(target) by the mask there: what the host's answer gains when a little
    more of the place is shown, among whatever else the mask shows. So one pass forward and one backward tell of all
    places at once, where RISE (Petsiuk et al. 2018, arXiv 1806.07421) learns one number from a forward pass with the
    same masks; over many masks it tends to the expected gradients (Erion et al. 2021, arXiv 1906.10670) of the mask.
    Masks come in pairs, each hiding what the other shows; a hidden pixel is zero in normalised space. All images see
    the same masks, so that a batch gives what one image at a time would give. Where the answer stays certain to the
    last digit under all masks, the evidence is zero.

    Args:
        host: the host, frozen by the caller.
        x: images (B, 3, H, W).
        target: class of each, (B,).
        grid: (h, w) of the evidence.
        pairs: of masks; two passes forward and two backward through the whole host for each.
        seed: of the masks.
        args: further arguments of the host's forward.
    """
    generator = generator_of(seed)  # on the CPU: the same masks on every device
    cells = uniform(generator, pairs, CELLS, CELLS) < 0.5
    shifts = uniform(generator, pairs, 2)
    size = (int(x.shape[2]), int(x.shape[3]))
    shown = torch.stack([rise_masks(cells, shifts, size), rise_masks(~cells, shifts, size)], dim=1)
    evidence = torch.zeros((len(x), 1, *grid), device=x.device)
    for mask in shown.flatten(0, 1).to(x):
        leaf = mask.expand(len(x), 1, *size).clone().requires_grad_()
        with torch.enable_grad():
            logits = run_host(host, x.detach() * leaf, args)
            if not logits.requires_grad:  # the host detaches its images, or runs under no_grad before the layer
                return evidence
            score = target_scores(logits.float().log_softmax(1), target).sum()
        try:
            (gained,) = torch.autograd.grad(score, leaf)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                told = "refine needs the gradient through the whole model, whose forward changes a tensor in place"
                raise ValueError(f"{told} that the gradient needs; use refine=0: {str(error).split(':')[0]}") from error
            raise
        evidence += F.adaptive_avg_pool2d(gained.float(), grid)
    return evidence

"""What the bottleneck trades: nats about the target against nats that pass, and the price between them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["PRICE", "nats_at_stake"]

PRICE = 0.25  # one nat a feature element costs this share of what is at stake


def nats_at_stake(logits: Tensor, closed: Tensor, target: Tensor | None = None) -> Tensor:
    """What is lost about the class when nothing passes, in nats for each image, (B,).

    Args:
        logits: of the intact images, (B, K).
        closed: with nothing let through, (B, K).
        target: class of each image (B,); None for classes drawn from the host's own p, in expectation: KL(p || closed).
    """
    own, without = logits.float().log_softmax(1), closed.float().log_softmax(1)
    if target is not None:
        return (own - without).gather(1, target[:, None])[:, 0]
    return (own.exp() * (own - without)).sum(dim=1)

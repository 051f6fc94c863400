"""The host's score of one class per image, for any number of perturbed copies, `batch_size` at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ib_explain.checks import ONE_CLASS, check_images, check_maps, check_positive_int, did_you_mean
from ib_explain.lending import frozen, run_host
from ib_explain.metrics.values import evened
from ib_explain.modules import host_device
from ib_explain.perturb import fill_images
from ib_explain.targets import Target, resolve_target, target_scores

__all__ = ["SCORES", "Explain", "Probe", "check_explain"]

SCORES = ("probability", "logit")

Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""A method: (model, x (b, C, H, W), target (b,)) -> maps (b, 1, H, W) or (b, H, W)."""

T = TypeVar("T")


class Probe:
    """Images, their target class and the host, asked again and again.

    What no map enters is scored once, however many maps are measured: the intact images, each fully replaced one, and
    what `keep` is given. The host is used in eval mode, without gradients, and handed back as it came after every
    question.

    Args:
        model: the host, (b, C, H, W) -> (b, K) logits.
        x: (B, C, H, W), on the host's device.
        target: the class whose score is read; None is the host's top-1 on the intact images.
        batch_size: number of images in one forward pass; None is B, at least 32. It bounds the memory whatever the
            number of perturbed images, and changes no result.

    Attributes:
        target: (B,) int64, the classes that were resolved.
        logits: (B, K) float32, of the intact images.
    """

    def __init__(self, model: nn.Module, x: Tensor, target: Target = None, *, batch_size: int | None = None) -> None:
        self.model = model
        self.x = check_images(x, device=host_device(model)).detach()
        self.batch_size = max(len(x), 32) if batch_size is None else check_positive_int(batch_size, "batch_size")
        self._known: dict[Hashable, Any] = {}
        with frozen(model) as host, torch.no_grad():
            self.logits = torch.cat([run_host(host, images).float() for images in self.x.split(self.batch_size)])
        self.target = resolve_target(target, self.logits)
        self._intact = _both(self.logits, self.target)

    def check_maps(self, maps: Tensor | None) -> Tensor:
        """Return maps of these images as (B, H, W) float32 on their device, or raise as `checks.check_maps` does."""
        checked = check_maps(maps, size=(self.x.shape[2], self.x.shape[3]), batch=len(self.x))
        return evened(checked).to(self.x.device)

    def predicted(self, images: Tensor) -> Tensor:
        """The host's top-1 of other images, (b,) int64."""
        with frozen(self.model) as host, torch.no_grad():
            return torch.cat([run_host(host, part).argmax(dim=1) for part in images.split(self.batch_size)])

    def intact(self, score: str = "probability") -> Tensor:
        """Scores of the images as they are, (B,) float32."""
        return self._intact[self._column(score)]

    def filled(self, fill: str | Tensor, score: str = "probability", *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Fully replaced images (B, C, H, W), see `perturb.fill_images`, and their scores (B,) float32."""
        column = self._column(score)

        def replaced() -> tuple[Tensor, Tensor]:
            images = fill_images(self.x, fill, seed=seed)
            return images, self._ask(1, lambda image, _: images[image])[:, :, 0]

        images, scores = self.keep(("filled", fill, seed), replaced) if isinstance(fill, str) else replaced()
        return images, scores[column]

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when it was first asked for under this key; for what depends on the images alone."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def explained(
        self,
        explain: Explain,
        *,
        model: nn.Module | None = None,
        x: Tensor | None = None,
        target: Tensor | None = None,
        finite: bool = True,
    ) -> Tensor:
        """Maps (B, H, W) float32 by `explain`, `batch_size` images in one call; checked, finite unless told.

        Args:
            explain: the method.
            model: lent to it in eval mode and handed back as it came; None is the host.
            x, target: other images or classes.
            finite: refuse NaN and infinite values.

        Raises:
            TypeError: `explain` is no function.
            ValueError: maps of another shape or, if `finite`, with NaN or infinite values.
        """
        check_explain(explain)
        x = self.x if x is None else x
        target = self.target if target is None else target
        size, maps = (int(x.shape[2]), int(x.shape[3])), []
        with frozen(self.model if model is None else model) as host:
            for images, classes in zip(x.split(self.batch_size), target.split(self.batch_size), strict=True):
                found = explain(host, images, classes)
                maps.append(check_maps(found, size=size, batch=len(images), finite=finite).to(x.device))
        return torch.cat(maps)

    def scores(self, settings: int, perturb: Callable[[Tensor, Tensor], Tensor], score: str = "probability") -> Tensor:
        """Score every image under every setting.

        Args:
            settings: number S of perturbed copies of an image.
            perturb: called with the image index and the setting index of each copy, both (b,) int64; returns the
                copies, (b, C, H, W). The setting index never falls from one call to the next.
            score: "probability" (softmax) or "logit".

        Returns:
            (B, S) float32.
        """
        return self._ask(settings, perturb)[self._column(score)]

    def _column(self, score: str) -> int:
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}{did_you_mean(str(score), SCORES)}")
        if score == "probability" and self.logits.shape[1] < 2:
            raise ValueError(ONE_CLASS)  # whose softmax is 1 for every image
        return SCORES.index(score)

    def _ask(self, settings: int, perturb: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        images = len(self.x)
        if not settings:  # a curve of one step has only its end points
            return self._intact.new_empty(len(SCORES), images, 0)
        jobs = torch.arange(settings * images, device=self.x.device)
        both = []
        with frozen(self.model) as host, torch.no_grad():
            for chunk in jobs.split(self.batch_size):
                image, setting = chunk % images, chunk // images
                both.append(_both(run_host(host, perturb(image, setting)), self.target[image]))
        return torch.cat(both, dim=1).view(len(SCORES), settings, images).transpose(1, 2)


def check_explain(explain: Any) -> None:
    """Raise a TypeError for a method that is no function, such as its name."""
    if not callable(explain):
        raise TypeError(f"explain must be a function (model, x, target) -> maps, got {explain!r}")


def _both(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.float()
    return torch.stack([target_scores(logits.softmax(dim=1), target), target_scores(logits, target)])

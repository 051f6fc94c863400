"""From a batch of images to the rows of a benchmark: maps, scores of the maps, or why there are none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ib_explain.contenders import Contender
from ib_explain.guard import HostChanged, is_ours
from ib_explain.lending import lacks_memory
from ib_explain.methods.base import NotApplicable
from ib_explain.metrics import Case, Curve, Metric, centred_gaussian
from ib_explain.metrics.perturbation import deletion_curve, insertion_curve
from ib_explain.metrics.probe import Explain
from ib_explain.modules import on_host
from ib_explain.progress import Progress
from ib_explain.rows import WITH_CURVES, CurveBatch, Row
from ib_explain.samples import ImageBatch

__all__ = ["Measure"]

CURVES: dict[str, Callable[[Case], Curve]] = dict(zip(WITH_CURVES, (insertion_curve, deletion_curve), strict=True))
"""Metrics whose whole curves are kept."""
COST_IMAGES = 8  # the cost of a method is that of the first images, not of each


class Outcome(NamedTuple):
    """What a metric said of a method's maps."""

    values: list[float]
    status: str = "ok"
    reason: str = ""
    curve: Curve | None = None


class Measure:
    """Measures batches: all methods, all metrics, on the same images and classes.

    Args:
        host: frozen by the caller.
        contenders: the methods.
        metrics: a metric of the family "cost" is measured on the first images of batch 0 alone.
        by_label: explain the labels instead of the host's top-1.
        classes: number of the host's classes.
        layer, batch_size, seed: as for `benchmark`.
        fixations: of all images, where a metric asks for those of other images.
    """

    def __init__(
        self,
        host: nn.Module,
        contenders: Sequence[Contender],
        metrics: Sequence[Metric],
        *,
        by_label: bool,
        classes: int,
        layer: str | nn.Module | None,
        batch_size: int | None,
        seed: int,
        fixations: Sequence[Tensor] | None = None,
    ) -> None:
        self.host, self.contenders, self.metrics = host, contenders, metrics
        self.by_label, self.classes = by_label, classes
        self.layer, self.batch_size, self.seed = layer, batch_size, seed
        self._kept: dict[Hashable, Any] = {}
        self._told: set[str] = set()  # methods whose first failure was told
        self._everyone: Tensor | None = None
        if fixations is not None:
            self._everyone = torch.cat(list(fixations))
            self._starts = [0, *itertools.accumulate(len(points) for points in fixations)]

    def lacking(self, batch: int, stored: Collection[tuple[str, str]]) -> dict[str, list[Metric]]:
        """By method, the metrics that a batch is to be measured by and is not yet; `stored` are (method, metric)."""
        of_batch = [metric for metric in self.metrics if batch == 0 or metric.family != "cost"]
        by_method = {
            contender.name: [metric for metric in of_batch if (contender.name, metric.name) not in stored]
            for contender in self.contenders
        }
        return {method: metrics for method, metrics in by_method.items() if metrics}

    def __call__(
        self, batch: ImageBatch, wanted: Mapping[str, Sequence[Metric]], progress: Progress
    ) -> tuple[list[Row], list[CurveBatch]]:
        """The rows of a batch for these metrics of these methods, and the curves behind some of them.

        Raises:
            IndexError: a label that is no class of the host.
            ValueError: no labels where they are explained.
        """
        rows: list[Row] = []
        curves: list[CurveBatch] = []
        shared = self._case(batch)
        for contender in self.contenders:
            if contender.name not in wanted:
                continue
            for metric, outcome in self._outcomes(contender, shared, wanted[contender.name]).items():
                if outcome.status == "failed" and contender.name not in self._told:
                    self._told.add(contender.name)
                    progress.note(f"benchmark: {contender.name} failed under {metric}: {outcome.reason}")
                # The cost has fewer values than the batch has images.
                for image, name, value in zip(batch.images, batch.names, outcome.values, strict=False):
                    rows.append(Row(image, name, contender.name, metric, value, outcome.status, outcome.reason))
                if outcome.curve is not None:
                    fractions, scores = outcome.curve.fractions.cpu().numpy(), outcome.curve.scores.cpu().numpy()
                    images = np.asarray(batch.images)
                    curves.append(CurveBatch(contender.name, metric, images, fractions, scores))
            progress.step(len(batch.images))
        return rows, curves

    def maps_of(self, contender: Contender, batch: ImageBatch) -> tuple[Tensor, Tensor] | None:
        """Maps of a method and the classes (B,) that they explain; None where the method fails or does not apply."""
        case = self._case(batch)
        assert case.x is not None
        try:
            return self._explain(contender)(self.host, case.x, case.probe.target), case.probe.target
        except Exception as error:
            _problem(error)
            return None

    def _outcomes(self, contender: Contender, shared: Case, metrics: Sequence[Metric]) -> dict[str, Outcome]:
        x, target, explain = shared.probe.x, shared.probe.target, self._explain(contender)
        try:
            maps = explain(self.host, x, target)
        except Exception as error:
            return {metric.name: _none(_measured(metric, len(x)), error) for metric in metrics}
        case = shared.with_maps(maps, explain)
        first = slice(COST_IMAGES)
        small = Case(self.host, x[first], maps[first], target[first], explain, batch_size=self.batch_size)
        found = {}
        for metric in metrics:
            count, given = _measured(metric, len(x)), small if metric.family == "cost" else case
            if not is_ours(metric.score):  # a user's may write into what it is given
                given = given.spared()
            try:
                values = metric(given)
                if tuple(values.shape) != (count,):
                    raise ValueError(f"metric {metric.name!r} must return {count} scores, got {tuple(values.shape)}")
                curve = CURVES[metric.name](case) if metric.name in CURVES else None
                found[metric.name] = Outcome(values.tolist(), curve=curve)
            except Exception as error:
                found[metric.name] = _none(count, error)
        return found

    def _explain(self, contender: Contender) -> Explain:
        def explain(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
            return contender.explain(model, x, target, layer=self.layer, seed=self.seed, batch_size=self.batch_size)

        return explain

    def _case(self, batch: ImageBatch) -> Case:
        """The batch on the host's device, with no maps yet."""
        self._check_labels(batch)
        x = on_host(batch.x, self.host)
        x = x.clone() if x is batch.x else x  # the user's, which may be read again

        def here(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(x.device)

        return Case(
            model=self.host,
            x=x,
            target=here(batch.labels) if self.by_label else None,
            masks=here(batch.masks),
            density=here(batch.density),
            fixations=None if batch.fixations is None else [points.to(x.device) for points in batch.fixations],
            other=None if self._everyone is None else _Others(self._everyone.to(x.device), self._starts, batch.images),
            baseline=centred_gaussian((x.shape[2], x.shape[3]), device=x.device),
            seed=self.seed,
            batch_size=self.batch_size,
            kept=self._kept,
        )

    def _check_labels(self, batch: ImageBatch) -> None:
        if batch.labels is None:
            if self.by_label:
                raise ValueError(f"target='label' needs labels, which batch {batch.number} of the data does not have")
            return
        for name, label in zip(batch.names, batch.labels.tolist(), strict=True):
            if label >= self.classes:
                raise IndexError(
                    f"label {label} of {name!r} is out of range for a model with {self.classes} classes; "
                    "data and model do not belong together"
                )


class _Others(Sequence[Tensor]):
    """For each image of a batch the fixations on all other images of the data, made when they are asked for."""

    def __init__(self, everyone: Tensor, starts: Sequence[int], images: Sequence[int]) -> None:
        self.everyone, self.starts, self.images = everyone, starts, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: Any) -> Any:
        image = self.images[row]
        return torch.cat([self.everyone[: self.starts[image]], self.everyone[self.starts[image + 1] :]])


def _measured(metric: Metric, images: int) -> int:
    """How many of a batch's images a metric is measured on."""
    return min(images, COST_IMAGES) if metric.family == "cost" else images


def _none(count: int, error: Exception) -> Outcome:
    return Outcome([float("nan")] * count, *_problem(error))


def _problem(error: Exception) -> tuple[str, str]:
    """Status and reason of a cell.

    What says nothing about the method is raised again, lack of memory or a dead GPU, and what would spoil the cells of
    others: a host with other weights.
    """
    if isinstance(error, HostChanged) or lacks_memory(error):
        raise error
    try:
        told = str(error).strip()
    except Exception as another:  # the error's own __str__ is the user's
        told = f"(its text cannot be had: {type(another).__name__})"
    if isinstance(error, NotApplicable):
        return "not_applicable", told or "not applicable"
    return "failed", f"{type(error).__name__}: {told}" if told else type(error).__name__

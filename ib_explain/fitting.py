"""Fitting a bottleneck: statistics of the features, then a few hundred steps that train the attention network only.

What a step does is in `ib_explain.training`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn

from ib_explain.bottleneck.module import Bottleneck, Restriction
from ib_explain.checks import ONE_CLASS, check_bool, check_number, check_positive_int, did_you_mean
from ib_explain.data.batches import Batches
from ib_explain.modules import host_device, on_host
from ib_explain.observation import observe
from ib_explain.places import Place
from ib_explain.progress import Progress
from ib_explain.statistics import Moments, RunningMean, RunningMoments
from ib_explain.targets import class_rows
from ib_explain.training import PRECISIONS, FitSettings, Trainer

__all__ = ["OBJECTIVES", "Statistics", "check_fit_options", "check_varies", "choose_precision", "default_steps"]
__all__ += ["doubts", "estimate_statistics", "launched", "new_bottleneck", "train"]

OBJECTIVES = ("prediction", "label")

STATISTICS_IMAGES = 2000
# Of a fit whose number of steps is not given: without the gradient, evidence for a class has to be learned.
DEFAULT_IMAGES = {"gradient": 6_400, "features": 8_960}
GRID_ALONE_IN_DOUBT = 0.9
SHUT_IN_DOUBT = 0.05


@dataclass
class Statistics:
    """Moments at the site and at the deeper layers, means of what stands beside the grid, the host's classes K."""

    moments: Moments
    deep: list[Moments]
    side: list[Tensor]
    classes: int


@contextlib.contextmanager
def launched(device: torch.device) -> Iterator[Accelerator]:
    """This process among all of a launch; alone without `accelerate launch` or `torchrun`.

    accelerate keeps one state for the whole process: what was not there before is not left behind, or a later
    `Accelerator(mixed_precision=...)` by the user would be refused.
    """
    theirs, processes = bool(AcceleratorState._shared_state), bool(PartialState._shared_state)
    # A slow method's batch may take longer than the ten minutes after which NCCL gives up on a process that waits.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))
    # A state that is there keeps its device; asked for the CPU, it would refuse.
    accelerator = Accelerator(cpu=device.type == "cpu" and not theirs, kwargs_handlers=[patient])
    if accelerator.num_processes > 1 and device.type == "cuda" and device != accelerator.device:
        rank, own = accelerator.process_index, accelerator.device
        raise ValueError(f"process {rank} of this launch must have its model on {own}, got {device}; move it there")
    try:
        yield accelerator
    finally:
        if not theirs:  # the process group of a launch stays
            AcceleratorState._reset_state(reset_partial_state=not processes and accelerator.num_processes == 1)


def choose_precision(precision: str | None, accelerator: Accelerator) -> str:
    """The asked precision, or the launcher's choice.

    Raises:
        ValueError: an unknown precision.
    """
    chosen = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    if precision is not None:
        chosen = precision
    if chosen not in PRECISIONS:
        raise ValueError(f"precision must be 'fp32', 'bf16', 'fp16' or None, got {chosen!r}")
    return chosen


def check_fit_options(
    objective: str,
    beta: float | None,
    lr: float | None,
    checkpoint: str | Path | None,
    every: int | None,
    resume: bool,
    show_progress: bool,
) -> None:
    """Raise as `IBAttention.fit` says of its options, before anything is computed."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}{did_you_mean(str(objective), OBJECTIVES)}")
    for name, value in (("beta", beta), ("lr", lr)):
        if value is not None:
            check_number(value, name, above=0)
    if check_bool(resume, "resume") and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=FOLDER, got None")
    if every is not None:
        check_positive_int(every, "every")
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"checkpoint must be the name of a folder, got {type(checkpoint).__name__}")
    check_bool(show_progress, "show_progress")


def default_steps(reads: str, batch_size: int) -> int:
    """Batches of a fit whose number is not given; `batch_size` over all processes."""
    return max(100, round(DEFAULT_IMAGES[reads] / batch_size))


def estimate_statistics(
    host: nn.Module,
    place: Place,
    data: Batches,
    *,
    per_element: bool = False,
    show_progress: bool = False,
) -> Statistics:
    """Mean and standard deviation of the features over the first images of the data, in one streaming pass."""
    share = data.share
    running = [RunningMoments(per_element=per_element), *(RunningMoments() for _ in place.deeper)]
    side = RunningMean()
    classes = 0
    total = STATISTICS_IMAGES if data.images is None else min(STATISTICS_IMAGES, data.images)
    # Closed at once, also after an error: an open epoch holds the caller's random state.
    with (
        Progress(total, "statistics", show=show_progress) as progress,
        contextlib.closing(data.first(STATISTICS_IMAGES)) as first,
    ):
        for x, _labels in first:
            x = on_host(x, host)
            seen = observe(host, place.site, x, deeper=place.deeper)
            classes = seen.logits.shape[1]
            for moments, features in zip(running, [seen.features, *seen.deep], strict=True):
                moments.update(features)
            side.update(place.site.layout.side_of(seen.output))
            progress.step(len(x) * share.world)
    if share.world > 1:
        everyone = gather_object([(running, side)])
        running = [RunningMoments(per_element=r.per_element) for r in running]
        side = RunningMean()
        for others, other_side in everyone:
            for mine, theirs in zip(running, others, strict=True):
                mine.merge(theirs)
            side.merge(other_side)
    device = host_device(host)
    check_varies(place.site.name, running[0].varies, running[0].images)
    site, *deep = [r.result().to(device) for r in running]
    return Statistics(site, deep, [s.to(device) for s in side.result()], classes)


def new_bottleneck(
    host: nn.Module,
    found: Statistics,
    *,
    gate: str,
    gradient: bool,
    anchors: int,
    relevance: bool,
    seed: int,
) -> Bottleneck:
    """A bottleneck with the data's statistics and fresh weights, on the host's device.

    Called inside `frozen`, which puts the user's random state back.

    Raises:
        ValueError: a host of one class.
    """
    if found.classes < 2:
        raise ValueError(ONE_CLASS)
    restriction = Restriction(gate, found.moments, found.side)
    classes = None if gradient else class_rows(host, found.classes, seed)
    torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed would seed all GPUs as well
    bottleneck = Bottleneck(
        restriction,
        found.deep,
        gradient=gradient,
        classes=classes,
        anchors=anchors,
        relevance=found.classes if relevance else 0,
    )
    return bottleneck.to(host_device(host))


def check_varies(layer: str, varies: bool, images: int) -> None:
    """Refuse features that are the same for all images: nothing could be told from them."""
    if not varies:
        raise ValueError(
            f"the features of layer {layer!r} do not vary over the {images} images; statistics need images that differ"
        )


def train(
    bottleneck: Bottleneck,
    host: nn.Module,
    place: Place,
    data: Batches,
    settings: FitSettings,
    accelerator: Accelerator,
    *,
    state: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    every: int = 10,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train the bottleneck's attention and return the record of the run.

    Args:
        bottleneck: on the host's device; trained in place.
        host: frozen by the caller.
        place: where the bottleneck sits and reads.
        data: this process's batches.
        settings: see `FitSettings`.
        accelerator: device, precision, other processes.
        state: what `save` was given last, to continue from there.
        save: called by the main process every `every` steps, and at the end, with the state of the run.
        every: steps between two saves.
        show_progress: bar or lines on standard error.
    """
    trainer = Trainer(bottleneck, host, place, data.share, settings, accelerator)
    if state is not None:
        trainer.load(state)
    record: dict[str, Any] = {"settings": asdict(settings), "processes": data.share.world}
    label = f"fit {place.site.name}"
    shown = show_progress and data.share.rank == 0
    with (
        Progress(settings.steps, label, show=shown, done=trainer.step_number) as progress,
        contextlib.closing(data(skip=trainer.step_number)) as batches,
    ):
        while trainer.step_number < settings.steps:
            x, labels = next(batches)
            trainer.step(on_host(x, host), labels)
            figures = trainer.figures
            progress.step(loss=figures["loss"], bits=figures["bits"], agreement=figures["agreement"])
            due = trainer.step_number % every == 0 or trainer.step_number == settings.steps
            if save is not None and due and accelerator.is_main_process:
                save(trainer.state())
    record |= {f"final_{name}": value for name, value in trainer.figures.items()}
    record["classes"] = trainer.classes
    record["grid_alone"] = trainer.grid_alone
    record["seconds"] = round(trainer.seconds, 2)
    record["images"] = trainer.images
    record["history"] = trainer.history
    return record


def doubts(record: dict[str, Any]) -> list[str]:
    """What a user should know of a finished fit before trusting its maps; empty if all is well."""
    found = []
    if record["grid_alone"] < GRID_ALONE_IN_DOUBT:
        found.append(
            f"the grid of layer {record['layer']!r} alone keeps {record['grid_alone']:.0%} of the host's answers: "
            "the rest is in what stands beside it, such as class tokens; an earlier layer keeps more"
        )
    if record["final_shut"] > SHUT_IN_DOUBT:
        found.append(
            f"attention has closed for {record['final_shut']:.0%} of the images, whose answers are lost by it: "
            "their maps are empty, perhaps those of a whole class; take more steps, or reads='gradient'"
        )
    return found

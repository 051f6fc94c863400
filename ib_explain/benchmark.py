"""`benchmark`: methods times metrics over data. One pass: the maps of a batch, their scores, rows on disk."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ib_explain.checks import ONE_CLASS, check_bool, check_positive_int, did_you_mean
from ib_explain.contenders import Contender, contenders_of
from ib_explain.data.origins import check_outside
from ib_explain.fitting import launched
from ib_explain.gallery import draw_pictures
from ib_explain.guard import is_ours
from ib_explain.identity import Identity
from ib_explain.io import host_facts, versions
from ib_explain.leaderboard import Leaderboard
from ib_explain.lending import frozen, run_host
from ib_explain.measuring import Measure
from ib_explain.metrics import CONVENTIONS, METRICS, Metric
from ib_explain.modules import find_module, host_device, module_name, on_host
from ib_explain.progress import Progress
from ib_explain.randomness import check_seed, seeded
from ib_explain.results import RunStore
from ib_explain.samples import TRUTHS, ImageBatch
from ib_explain.sources import Source

__all__ = ["available_metrics", "benchmark"]

TARGETS = ("prediction", "label")


def benchmark(
    model: nn.Module,
    data: Any,
    *,
    methods: Any,
    metrics: Iterable[str],
    images: int | None = None,
    out: str | os.PathLike[str] | None = None,
    reference: str | None = "grad_cam",
    target: str = "prediction",
    layer: str | nn.Module | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    data_name: str | None = None,
    extend: bool = False,
    show_progress: bool = True,
) -> Leaderboard:
    """Compare methods by metrics on the same images and the same classes.

    Rows are stored batch by batch: the same call with the same `out` goes on where a killed one stopped and ends with
    the same numbers. Under `torchrun` or `accelerate launch` the batches are split among the processes, with the
    numbers of one process.

    A method or metric that raises an `Exception` on a batch costs the cells of that batch, with its reason in the
    report; so do maps with NaN. `NotApplicable` is listed as such. Not recorded but raised are what says nothing about
    the method: KeyboardInterrupt, lack of memory, a device that has failed, and mistakes in the data.

    Args:
        model: the host, (B, C, H, W) -> (B, K) logits; handed back as it came.
        data: see `ib_explain.sources.Source`: a data set (`BoxImages`, `GazeImages`, `Synthetic`, ...), a DataLoader,
            or an iterable of images, (images, labels), or batches with masks, boxes, fixations or a density.
            Transforms must be deterministic.
        methods: a list, or a dict by name, of registered names, (name, options), `IBAttention`s, Captum's objects,
            functions f(model, x, target), dataclasses of registered methods.
        metrics: names of `available_metrics`.
        images: how many of the data; from a data set or DataLoader evenly over its length, else the first.
        out: folder of rows, tables, figures and `report.html`. None keeps them until `Leaderboard.save`.
        reference: the method that others are held against. "grad_cam" is the first Grad-CAM that takes part, under
            whatever name, and nobody where none does.
        target: the class that is explained and scored: the host's top-1 ("prediction"), or the data's ("label").
        layer: where those registered methods look that look at a layer; None is each one's own default. An
            `IBAttention` keeps the layer that it was made with.
        batch_size: rows of a forward pass at most; bounds the memory and changes no result. None is 32, or as many as
            a batch of the data holds.
        seed: of methods, metrics, the bootstrap, and the order of a shuffling loader.
        names: of the images by index; None takes those of the data.
        data_name: what the report calls the data.
        extend: add methods or metrics to the run in `out`. The call names all of them; what is new is measured.
        show_progress: a bar with the time left on a terminal, lines in a pipe.

    Returns:
        The standings, the same on every process; the pictures are the first one's.

    Raises:
        TypeError, ValueError: in one line, before anything is computed: unknown or unfit methods, metrics, options; no
            data; a metric that needs what the data does not have; a folder that holds another run. Later: what
            `Source.batches` says of a batch.
        IndexError: a label that is no class of the host.
        HostChanged: a method left the model with other weights; a RuntimeError.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}{did_you_mean(str(target), TARGETS)}")
    check_bool(extend, "extend")
    rows_at_once = None if batch_size is None else check_positive_int(batch_size, "batch_size")
    if out is not None and not isinstance(out, str | os.PathLike):
        raise TypeError(f"out must be the path of a folder, got {out!r}")
    contenders = contenders_of(methods, model)
    chosen = _metrics(metrics)
    reference = _reference(reference, contenders)
    seed = check_seed(seed)
    with frozen(model) as host, seeded(seed), launched(host_device(model)) as accelerator:
        if out is None and accelerator.num_processes > 1:
            raise ValueError("several processes need a folder that all can write to; give out=FOLDER")
        source = Source(data, images=images, names=names, seed=seed)
        _check_needs(chosen, source)
        if out is not None:
            check_outside(out, source.root)
        classes = _check_host(host, source.first)
        if layer is not None:
            layer = module_name(host, layer if isinstance(layer, nn.Module) else find_module(host, layer))
        if target == "label" and source.first.labels is None:
            raise ValueError("target='label' needs labels, which the data does not have")
        settings = {
            "model": _model_facts(host, classes),
            "data": source.facts(),
            "target": target,
            "seed": seed,
            **({} if layer is None else {"layer": layer}),
            "methods": {contender.name: contender.facts for contender in contenders},
            "metrics": {metric.name: _facts(metric, host) for metric in chosen},
        }
        info = {
            "reference": reference,
            **({"data": data_name} if data_name else {}),
            "command": shlex.join(sys.argv),
            "device": _device(host_device(model)),
            "processes": accelerator.num_processes,
            **({} if rows_at_once is None else {"batch_size": rows_at_once}),
            "versions": versions(),
        }
        store = _open(out, settings, info, accelerator, extend=extend)
        measure = Measure(
            host,
            contenders,
            chosen,
            by_label=target == "label",
            classes=classes,
            layer=layer,
            batch_size=rows_at_once,
            seed=seed,
            fixations=source.all_fixations() if any("other" in metric.needs for metric in chosen) else None,
        )
        try:
            _run(measure, source, store, accelerator, show_progress)
        except BaseException:
            if accelerator.num_processes == 1:  # others may be at work in it
                store.undo_if_empty()
            raise
        board = Leaderboard.of(store, reference=reference)
        if accelerator.is_main_process:
            if out is not None:
                board.save_tables(out)  # a drawing that fails must not cost them
            pictures = draw_pictures(board, source, contenders, measure.maps_of, model)
            board = replace(board, pictures=pictures)
            if out is not None:
                board.save(out)
    return board


def available_metrics() -> dict[str, str]:
    """Every registered metric with one line about it."""
    return METRICS.summaries()


def _run(measure: Measure, source: Source, store: RunStore, accelerator: Accelerator, show_progress: bool) -> None:
    """Measure the batches that fall to this process and are not stored yet, then bring all together."""
    rank, world, methods = accelerator.process_index, accelerator.num_processes, len(measure.contenders)
    mine = {} if source.sizes is None else dict(list(enumerate(source.sizes))[rank::world])

    def lacking(number: int) -> Mapping[str, Sequence[Metric]]:
        return measure.lacking(number, store.cells(number))

    left = sum(size * len(lacking(number)) for number, size in mine.items())
    total = sum(mine.values()) * methods
    # Without a length nobody knows what is left.
    show = show_progress and rank == 0 and source.sizes is not None
    with Progress(total, "benchmark", show=show, done=total - left) as progress:
        for batch in source.batches(lambda number: not lacking(number), rank, world):
            rows, curves = measure(batch, lacking(batch.number), progress)
            store.append(batch.number, rows, curves)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        store.finish()
    accelerator.wait_for_everyone()


def _open(
    out: Any, settings: Mapping[str, Any], info: Mapping[str, Any], accelerator: Accelerator, *, extend: bool
) -> RunStore:
    """The store of this process; the first one makes the folder, or takes it over with what it is extended by."""
    store = RunStore.open(out, settings, info, extend=extend) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    return store or RunStore.open(out, settings, info, rank=accelerator.process_index)


def _metrics(names: Any) -> list[Metric]:
    if isinstance(names, str | Mapping) or not isinstance(names, Iterable):
        came = f"the string {names!r}; write [{names!r}]" if isinstance(names, str) else type(names).__name__
        raise TypeError(f"metrics must be a list of names, got {came}")
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"the name of a metric must be a str, got {name!r}; metrics take no options: other settings are a "
                "metric of your own (ib_explain.metrics.register_metric)"
            )
    found = [METRICS.get(name) for name in dict.fromkeys(names)]
    if not found:
        raise ValueError("metrics must hold at least one name, got none")
    return found


def _reference(reference: str | None, contenders: Sequence[Contender]) -> str | None:
    methods = [contender.name for contender in contenders]
    if reference is None or reference in methods:
        return reference
    if reference == "grad_cam":  # the default: under another name, or it does not take part
        return next((contender.name for contender in contenders if contender.facts.get("method") == "grad_cam"), None)
    hint = did_you_mean(str(reference), methods)
    raise ValueError(f"the reference must be one of the methods, got {reference!r}{hint}")


def _check_needs(metrics: Sequence[Metric], source: Source) -> None:
    """Refuse metrics whose truth the data does not hold."""
    has = source.first.truths
    for metric in metrics:
        lacking = [need for need in metric.needs if need in TRUTHS and need not in has]
        if lacking:
            holds = ", ".join(["images", *(["labels"] if source.first.labels is not None else []), *has])
            raise ValueError(
                f"metric {metric.name!r} needs {' and '.join(lacking)}, which the data does not have; it holds {holds}"
            )
        if "other" in metric.needs and ("fixations" not in has or not source.readable_again):
            raise ValueError(
                f"metric {metric.name!r} needs the fixations of all other images beforehand; the data must have "
                "fixations and be a data set, a loader or a list, not a one-time iterator"
            )


def _check_host(host: nn.Module, batch: ImageBatch) -> int:
    """The host's number of classes, from one image.

    Raises:
        ValueError: it has one class: its probability is 1 whatever the image shows.
    """
    with torch.no_grad():
        classes = int(run_host(host, on_host(batch.x[:1], host)).shape[1])
    if classes < 2:
        raise ValueError(ONE_CLASS)
    return classes


def _model_facts(host: nn.Module, classes: int) -> dict[str, Any]:
    facts = host_facts(host)
    digests = {key: facts[key][:16] for key in ("structure", "weights")}
    return {"name": facts["architecture"], "class": facts["class"], "classes": classes, **digests}


def _facts(metric: Metric, host: nn.Module) -> dict[str, Any]:
    """What run.json says of a metric; the first four are what tables show."""
    facts: dict[str, Any] = {"family": metric.family, "unit": metric.unit, "higher_is_better": metric.higher_is_better}
    facts["protocol"] = (metric.__doc__ or "").strip().split("\n")[0]
    if metric.derived:
        facts["derived"] = True
    if not is_ours(metric.score):
        facts["code"] = Identity(host).code(metric.score)
    return facts | dict(CONVENTIONS.get(metric.name, {}))


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)

"""Does the bottleneck sit in every timm module? One small, randomly initialised model of each, and a row for it.

    python benchmarks/timm_coverage.py [--modules swin_transformer,vgg | --models resnet18 | --all] [--retry] [--jobs N]

For the default layer and another cut: attach, fit, attribute, close the attention, and compare the model before and
after. A layer drawn anywhere in the model is probed as well. Each model runs in a process of its own with a time
limit, so a crash costs one row. Rows are kept in results/timm_coverage.csv: a second run does what is missing, with
`--retry` also what failed. The weights are random and no branch is left switched off by its initialisation (`shake`).
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import random
import resource
import signal
import statistics
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ib_explain.attribution import attribute
from ib_explain.ib import IBAttention
from ib_explain.sites import Site, candidate_layers, resolve_site
from ib_explain.stripes import probe_images

RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "timm_coverage.csv"
LIMIT_SECONDS = 600  # of processor time: other work on the machine must not fail a model
LARGE = 40_000_000  # parameters; larger models are made smaller where they take it, and shown smaller images
SMALLER = [{"depth": 4, "img_size": 96}, {"depth": 4}, {"img_size": 96}]
SIZES = [(160, 224), (192, 240), (192, 320)]  # not square, so that rows and columns cannot be swapped unnoticed
SMALL_SIZES = [(96, 128), (112, 140)]
PER_LAYER = ["layer", "layout", "grid", "channels", "verified", "score", "depth", "leak", "effect", "reached", "closed"]
FIELDS = [
    *("module", "model", "made_smaller", "parameters", "input", "status", "reason"),
    *PER_LAYER,
    *(f"other_{name}" for name in PER_LAYER),
    *(f"inner_{name}" for name in ("layer", "layout", "grid", "verified", "score", "leak", "refused")),
    *("choose_seconds", "seconds"),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", help="comma-separated timm modules (default: all)")
    parser.add_argument("--models", help="comma-separated model names instead of the smallest of each module")
    parser.add_argument("--all", action="store_true", help="every registered model name; needs hours")
    parser.add_argument("--retry", action="store_true", help="run failed rows again")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, one thread each")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = {row["model"]: row for row in read_rows(options.out)}
    if options.retry:
        rows = {name: row for name, row in rows.items() if row["status"] == "ok"}
    modules = options.modules.split(",") if options.modules else timm.list_modules()
    if options.models:
        names = options.models.split(",")
    elif options.all:
        names = [name for module in modules for name in timm.list_models(module=module)]
    else:
        done = {row["module"] for row in rows.values()}
        names = (smallest(module) for module in modules if module not in done)
    write_rows(options.out, rows.values())
    for row in run([name for name in names if name not in rows], options.jobs):
        rows[row["model"]] = row
        write_rows(options.out, rows.values())
        reason = f": {row['reason']}" if row["reason"] else ""
        print(f"{row['module']:22} {row['model']:34} {row['status']:8} {row['seconds']:>6} s{reason}", flush=True)
    write_summary(options.out, list(rows.values()))
    return 0 if all(row["status"] == "ok" for row in rows.values()) else 1


def smallest(module: str) -> str:
    """Name of the module's classifier with the fewest parameters (counted on the meta device)."""
    sizes = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            host = timm.create_model(name, num_classes=10)
        if any(isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == 10 for m in host.modules()):
            sizes[name] = sum(p.numel() for p in host.parameters())
    return min(sizes, key=lambda name: sizes[name])


def run(names: Iterable[str], jobs: int) -> Iterator[dict[str, Any]]:
    """Measure models in forked processes, `jobs` at a time, each with the time limit."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(names)[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, theirs))
            process.start()
            theirs.close()
            running[mine] = (name, process, time.monotonic())
        for mine in wait(list(running), timeout=1):
            name, process, started = running.pop(mine)
            try:
                row = mine.recv()
            except EOFError:
                process.join()
                late = process.exitcode == -signal.SIGXCPU
                what = f"not done in {LIMIT_SECONDS} s" if late else f"the process ended with code {process.exitcode}"
                row = _failed(name, what)
            process.join()
            yield row
        for mine, (name, process, started) in list(running.items()):
            if time.monotonic() - started > 10 * LIMIT_SECONDS:
                del running[mine]
                process.kill()
                process.join()
                yield _failed(name, f"hangs: not done in {10 * LIMIT_SECONDS} s")


def _child(name: str, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS + 10))
    try:
        row = measure(name)
    except Exception as error:  # one row tells what happened; the sweep goes on
        traceback.print_exc()
        row = _failed(name, f"{type(error).__name__}: {error}".splitlines()[0])
    pipe.send(row)


def _failed(name: str, reason: str) -> dict[str, Any]:
    return _row(name, status="failed", reason=reason, seconds=0)


def _row(name: str, **values: Any) -> dict[str, Any]:
    entry = timm.models.model_entrypoint(name)
    return dict.fromkeys(FIELDS, "") | {"module": entry.__module__.rsplit(".", 1)[-1], "model": name} | values


def measure(name: str) -> dict[str, Any]:
    """All checks of one model."""
    warnings.simplefilter("ignore")  # a leaking layer warns; here the figure is in the table
    torch.manual_seed(0)
    host, size, smaller = build(name)
    shake(host, size)
    for index, module in enumerate(host.modules()):
        module.training = index % 3 > 0  # every module must get its own mode back
    for index, parameter in enumerate(host.parameters()):
        parameter.requires_grad_(index % 2 > 0)
    row = _row(name, parameters=sum(p.numel() for p in host.parameters()), input="x".join(map(str, size)))
    row["made_smaller"] = " ".join(f"{key}={value}" for key, value in smaller.items())
    before = snapshot(host)
    x = probe_images(4, size, seed=11)
    problems = []
    choosing = time.process_time()
    default = resolve_site(host, None, size)
    row["choose_seconds"] = round(time.process_time() - choosing, 1)
    problems += check_layer(host, default, x, ("gradient", "features"), "", row)
    draw = random.Random(zlib.crc32(name.encode()))
    others = [name for name in candidate_layers(host, size) if name != default.name]
    for other in draw.sample(others, len(others))[:4]:
        try:
            site = resolve_site(host, other, size)
        except ValueError:  # a tensor whose shape allows a grid and holds none
            continue
        if site.reached == 0:  # refused, as behind it only the class token is read
            continue
        problems += check_layer(host, site, x[:2], ("gradient",), "other_", row)
        break
    probe_anywhere(host, size, draw, row)
    problems += differences(before, snapshot(host))
    row["status"], row["reason"] = ("failed", "; ".join(problems)) if problems else ("ok", "")
    row["seconds"] = round(time.process_time(), 1)
    return row


def build(name: str) -> tuple[nn.Module, tuple[int, int, int], dict[str, int]]:
    """The model with ten classes, an input size that it accepts, and what was passed to make it smaller."""
    host, smaller = timm.create_model(name, num_classes=10), {}
    large = sum(p.numel() for p in host.parameters()) > LARGE
    if large:
        host, smaller = _smaller(name)
    config = host.pretrained_cfg
    default = (smaller["img_size"],) * 2 if "img_size" in smaller else tuple(config["input_size"][1:])
    sizes = [default] if config.get("fixed_input_size") else [*(SMALL_SIZES if large else []), *SIZES, default]
    for size in sizes:
        try:
            with torch.no_grad():
                logits = host.eval()(torch.zeros(1, 3, *size))
        except (AssertionError, RuntimeError, ValueError) as error:
            refusal = error
            continue
        if logits.shape == (1, 10):
            return host, (3, *size), smaller
        raise ValueError(f"not a classifier: the output has shape {tuple(logits.shape)}")
    raise refusal


def _smaller(name: str) -> tuple[nn.Module, dict[str, int]]:
    for smaller in SMALLER:
        try:
            return timm.create_model(name, num_classes=10, **smaller), smaller
        except TypeError:  # the model has no such argument
            continue
    return timm.create_model(name, num_classes=10), {}


def shake(host: nn.Module, size: tuple[int, int, int]) -> None:
    """Give what the initialisation leaves at or near zero a working value, and batch norms real statistics.

    Layer scales, last norms of residual branches and heads often start at zero; a branch that is switched off would
    make a layer look like a cut that is none.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if not parameter.numel() or parameter.abs().max() > 0.02:
                continue
            if parameter.ndim > 1:
                fan_in = max(parameter[0].numel(), 1)
                parameter.normal_(0, fan_in**-0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.uniform_(0.3, 0.7, generator=generator)
        norms = [m for m in host.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None: the mean over all batches
        for seed in range(2 if norms else 0):
            host(probe_images(4, size, seed=100 + seed))
        for norm in norms:
            norm.momentum, norm.training = 0.1, False


def check_layer(
    host: nn.Module, site: Site, x: Tensor, reads: tuple[str, ...], prefix: str, row: dict[str, Any]
) -> list[str]:
    """Fit, attribute and close a bottleneck at the site; fill the row and return what went wrong."""
    problems = []
    where = f"{prefix or 'default_'}layer {site.name}".replace("_", " ", 1)
    row |= {prefix + key: value for key, value in _facts(site).items()}
    if not site.effect > 0.01 and site.usable:
        problems.append(f"{where}: the grid alone has no effect")
    for choice in reads:
        ib = IBAttention(host, site.name, reads=choice).fit([x[:2], x[-2:]], steps=3, show_progress=False)
        if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in ib.bottleneck.parameters()):
            problems.append(f"{where}: no gradient reaches the bottleneck ({choice})")
        problems += [f"{where}: fitted map ({choice}) {fault}" for fault in _faults(ib.attribute(x), x)]
    heat = attribute(host, x[:2], layer=site.name, steps=4, reference=x)
    problems += [f"{where}: map per image {fault}" for fault in _faults(heat, x[:2])]
    with torch.no_grad(), ib.restrict(attention=1.0) as restricted:
        free = restricted(x)
    with torch.no_grad(), ib.restrict(attention=0.0) as restricted:
        closed = restricted(x)
    row[prefix + "closed"] = share = _digits(_spread(closed) / max(_spread(free), 1e-30))
    if site.leak < 1e-3 and share > 1e-3:
        problems.append(f"{where}: with attention 0 the output still depends on the image ({share})")
    if not prefix and not site.leak <= 0.05:
        problems.append(f"{where}: no cut, leak {site.leak:.2f}")
    if not prefix and site.reached == 0:
        problems.append(f"{where}: no gradient reaches the grid")
    return problems


def probe_anywhere(host: nn.Module, size: tuple[int, int, int], draw: random.Random, row: dict[str, Any]) -> None:
    """Probe one layer out of all that the model has; a refusal is an answer as well."""
    refused = 0
    names = [name for name, _ in host.named_modules() if name]
    for name in draw.sample(names, len(names))[:8]:
        try:
            facts = _facts(resolve_site(host, name, size))
        except (ValueError, RuntimeError) as refusal:
            if f"layer {name!r}" not in str(refusal):
                raise
            refused += 1
            continue
        row |= {f"inner_{key}": facts[key] for key in ("layer", "layout", "grid", "verified", "score", "leak")}
        break
    row["inner_refused"] = refused


def _facts(site: Site) -> dict[str, Any]:
    return {
        "layer": site.name,
        "layout": site.layout.kind,
        "grid": "x".join(map(str, site.grid)),
        "channels": site.channels,
        "verified": site.layout.verified,
        "score": _digits(site.layout.score),
        "depth": _digits(site.depth),
        "leak": _digits(site.leak),
        "effect": _digits(site.effect),
        "reached": _digits(site.reached),
    }


def _faults(maps: Tensor, x: Tensor) -> list[str]:
    if maps.shape != (len(x), 1, *x.shape[2:]):
        return [f"has shape {tuple(maps.shape)}"]
    if not torch.isfinite(maps).all() or maps.requires_grad:
        return ["is not finite and detached"]
    return [] if (maps.flatten(1).std(dim=1) > 0).all() else ["is constant"]


def _spread(logits: Tensor) -> float:
    return float(torch.pdist(logits.double()).mean())


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def snapshot(host: nn.Module) -> dict[str, Any]:
    """Everything that must be the same afterwards."""
    hooks = [name for name in vars(host) if name.endswith("_hooks")]
    return {
        "weights": {name: tensor.clone() for name, tensor in host.state_dict().items()},
        "training flags": [module.training for module in host.modules()],
        "requires_grad": [parameter.requires_grad for parameter in host.parameters()],
        "gradients": [parameter.grad is None for parameter in host.parameters()],
        "hooks": [len(getattr(module, hook)) for module in host.modules() for hook in hooks],
        "attributes": [sorted(vars(module)) for module in host.modules()],
        "random state": torch.get_rng_state(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of the model is not as it was."""
    changed = [key for key in before if key not in ("weights", "random state") and before[key] != after[key]]
    if not torch.equal(before["random state"], after["random state"]):
        changed.append("random state")
    pairs = zip(before["weights"].items(), after["weights"].items(), strict=True)
    if any(a != b or not torch.equal(u, v) for (a, u), (b, v) in pairs):
        changed.append("weights")
    return [f"the model came back with other {what}" for what in changed]


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["module"], row["model"])))
    part.replace(path)


def write_summary(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the figures beside the table as JSON and as Markdown."""
    good = [row for row in rows if row["status"] == "ok"]
    modules, passed = {row["module"] for row in rows}, {row["module"] for row in good}

    def numbers(key: str) -> list[float]:
        return [float(row[key]) for row in good if row[key] != ""]

    layouts = Counter(row["layout"].split(",")[0] for row in good)
    figures = {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "registered_modules": len(timm.list_modules()),
        "modules": len(modules),
        "modules_ok": len(passed),
        "models": len(rows),
        "models_ok": len(good),
        "default_verified_by_probe": sum(row["verified"] == "probe" for row in good),
        "default_verified_by_shape": sum(row["verified"] == "shape" for row in good),
        "default_layouts": dict(layouts.most_common()),
        "default_leak_max": max(numbers("leak"), default=None),
        "default_closed_max": max(numbers("closed"), default=None),
        "default_effect_min": min(numbers("effect"), default=None),
        "default_reached_min": min(numbers("reached"), default=None),
        "other_layers": len(numbers("other_leak")),
        "other_cuts": sum(leak <= 0.05 for leak in numbers("other_leak")),
        "inner_layers": len(numbers("inner_leak")),
        "inner_cuts": sum(leak <= 0.05 for leak in numbers("inner_leak")),
        "inner_refused": sum(int(row["inner_refused"]) for row in good),
        "choose_seconds_median": statistics.median(numbers("choose_seconds") or [0]),
        "seconds": round(sum(float(row["seconds"]) for row in rows), 0),
        "failed": {row["model"]: row["reason"] for row in rows if row["status"] != "ok"},
    }
    stem = path.with_name(path.stem + "_summary")
    stem.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    lines = [
        f"# timm coverage: {len(passed)} of {len(modules)} modules, {len(good)} of {len(rows)} models",
        "",
        "| figure | value |",
        "| --- | --- |",
        *(f"| {key} | {_text(value)} |" for key, value in figures.items() if key != "failed"),
        "",
        *(f"- failed: `{name}`: {reason}" for name, reason in figures["failed"].items()),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")


def _text(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())

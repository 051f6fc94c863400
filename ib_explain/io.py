"""Saving and loading a bottleneck: a folder with `bottleneck.safetensors` and `config.json`; never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ib_explain.checks import warn_user
from ib_explain.files import current_folder
from ib_explain.hosts import timm_config
from ib_explain.layouts import Layout
from ib_explain.modules import host_dtype, unwrap

__all__ = [
    "CONFIG",
    "FILES",
    "FORMAT",
    "WEIGHTS",
    "check_host",
    "data_config",
    "fingerprint",
    "host_facts",
    "layout_from_json",
    "read_folder",
    "saved_folder",
]
__all__ += ["versions", "write_folder"]

FORMAT = 1
WEIGHTS, CONFIG = "bottleneck.safetensors", "config.json"
FILES = (WEIGHTS, CONFIG)


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write tensors and config into an existing folder."""
    # By way of bytes: a full disk is then an OSError that names the file.
    (folder / WEIGHTS).write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
    config = {**config, "digest": _folder_digest(folder / WEIGHTS, config)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def saved_folder(path: str | Path) -> Path:
    """Where a saved bottleneck is: at `path`, or set aside by a save that was killed; `path` if there is none."""
    return current_folder(path) or Path(path)


def read_folder(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and config of the folder at `saved_folder`.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a damaged file, or a format that this version does not know.
    """
    folder = saved_folder(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no saved bottleneck: it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder / CONFIG} has format {got!r}; this version of ib_explain reads format {FORMAT}")
    for key, fits in CHECKS.items():
        if not fits(config.get(key)):
            what = f"{key}={config[key]!r}" if key in config else f"no {key!r}"
            raise ValueError(f"{folder} is damaged: its {CONFIG} has {what}"[:300])
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{folder} is damaged: {broken[0]} in {WEIGHTS} has NaN or infinite values")
    deviations = [(name, tensor) for name, tensor in tensors.items() if name.endswith(".std")]
    if broken := [name for name, tensor in deviations if tensor.is_complex() or not (tensor > 0).all()]:
        raise ValueError(f"{folder} is damaged: {broken[0]} in {WEIGHTS} must be above 0")
    if config.get("digest") != _folder_digest(folder / WEIGHTS, config):
        raise ValueError(f"{folder} is damaged: {WEIGHTS} or {CONFIG} was changed since they were written together")
    return tensors, config


def check_host(folder: str | os.PathLike[str], config: dict[str, Any], model: nn.Module) -> None:
    """Hold the host that a bottleneck was fitted to, by its config, against the one it is read for.

    Raises:
        ValueError: another architecture.

    Warns:
        UserWarning: same architecture, other weights or images normalised otherwise; or a checkpoint of a fit that was
            not at its end.
    """
    theirs, ours = config["host"], host_facts(model)
    if theirs["structure"] != ours["structure"]:
        names = theirs["architecture"]
        if names != ours["architecture"]:
            names += f", not to this {ours['architecture']}"
        classes, others = config.get("classes"), getattr(unwrap(model), "num_classes", None)
        more = f" ({classes} classes there, {others} here)" if classes and others and classes != others else ""
        raise ValueError(f"{folder} was fitted to the model {names}: names or shapes of the parameters differ{more}")
    # Rounded to another precision the same weights cannot be compared.
    if theirs["weights"] != ours["weights"] and theirs.get("precision") == ours["precision"]:
        told = f"{folder} was fitted to the model {theirs['architecture']} with other weights"
        warn_user(f"{told}; fit again for bits that hold")
    normalised, says = config.get("data_config"), data_config(model)
    if normalised and says and normalised != says:
        told = " and ".join(f"{name} {now}, not {normalised[name]}" for name, now in says.items())
        warn_user(f"the model's images are normalised by {told}, as those that {folder} was fitted to")
    if isinstance(run := config.get("run"), dict):
        step, steps = run.get("step"), run.get("settings", {}).get("steps")
        if step != steps:
            told = f"{folder} is the checkpoint of a fit after step {step} of {steps}"
            warn_user(f"{told}; fit(..., checkpoint=, resume=True) goes on")


def _folder_digest(weights: Path, config: dict[str, Any]) -> str:
    """Of the tensors' file and of all else that the config says."""
    digest = hashlib.blake2b(weights.read_bytes(), digest_size=16)
    told = json.dumps({name: value for name, value in config.items() if name != "digest"})
    digest.update(json.dumps(json.loads(told), sort_keys=True).encode())
    return digest.hexdigest()


def _is_layout(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {field.name for field in fields(Layout)}


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(n) is int and n > 0 for n in value)


# What each entry of a config must be; what it names (a layer, a gate) is checked where it is used.
CHECKS: dict[str, Callable[[Any], bool]] = {
    "host": lambda v: isinstance(v, dict) and {"architecture", "structure", "weights"} <= v.keys(),
    "layer": lambda v: isinstance(v, str),
    "input_size": _is_size,
    "layout": _is_layout,
    "deeper": lambda v: (
        isinstance(v, list) and all(isinstance(e, list) and len(e) == 2 and _is_layout(e[1]) for e in v)
    ),
    "gate": lambda v: isinstance(v, str),
    "reads": lambda v: isinstance(v, str),
    "anchors": lambda v: isinstance(v, int),
    "per_element": lambda v: isinstance(v, bool),
    "relevance": lambda v: isinstance(v, bool),
    "seed": lambda v: isinstance(v, int),
    "record": lambda v: v is None or isinstance(v, dict),
}


def host_facts(model: nn.Module) -> dict[str, Any]:
    """What tells a host from another: class, timm's architecture name, shape and weights fingerprints, precision."""
    host = unwrap(model)
    return {
        "class": type(host).__name__,
        "architecture": timm_config(host).get("architecture") or type(host).__name__,
        "structure": _digest(f"{key}{tuple(t.shape)}" for key, t in _tensors(host).items()),
        "weights": fingerprint(host),
        "precision": str(host_dtype(host)).removeprefix("torch."),
    }


def fingerprint(model: nn.Module) -> str:
    """A digest of the host's weights: all values of a parameter or buffer, of a large one 1,024 or a few more."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in _tensors(unwrap(model)).items():
        tensor = tensor.detach()
        flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()
        digest.update(name.encode())
        values = flat[:: max(1, flat.numel() // 1024)]
        digest.update(np.ascontiguousarray(values.to("cpu", torch.float64).numpy()).tobytes())
    return digest.hexdigest()


def _tensors(host: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a module's own extra state may be anything and is left out."""
    return {name: value for name, value in host.state_dict().items() if isinstance(value, Tensor)}


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    found = {"python": platform.python_version()}
    for package in ("ib-explain", "torch", "timm", "captum", "numpy"):
        try:
            found[package] = torch.__version__ if package == "torch" else version(package)  # with its build: +cu132
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def layout_from_json(stored: dict[str, Any]) -> Layout:
    """The `Layout` that `dataclasses.asdict` wrote."""
    order = stored["order"]
    return Layout(
        **{
            **stored,
            "path": tuple(stored["path"]),
            "axes": tuple(stored["axes"]),
            "grid": tuple(stored["grid"]),
            "order": None if order is None else tuple(order),
            "others": tuple(tuple(path) for path in stored["others"]),
        }
    )


def data_config(model: nn.Module) -> dict[str, Any] | None:
    """Mean and standard deviation with which the host's images are normalised, where its timm config tells them."""
    config = timm_config(model)
    if config.get("mean") is None or config.get("std") is None:
        return None
    return {"mean": list(config["mean"]), "std": list(config["std"])}


def _digest(lines: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()

"""Saving and loading a bottleneck: a folder with `bottleneck.safetensors` and `config.json`; never pickle."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ib_explain.hooks import unwrap
from ib_explain.layouts import Layout

__all__ = ["FILES", "FORMAT", "data_config", "fingerprint", "host_facts", "layout_from_json", "read_folder", "versions"]
__all__ += ["write_folder"]

FORMAT = 1
WEIGHTS, CONFIG = "bottleneck.safetensors", "config.json"
FILES = (WEIGHTS, CONFIG)
NEEDED = ("host", "layer", "input_size", "layout", "deeper", "gate", "reads", "anchors", "per_element", "seed")


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write tensors and config into an existing folder."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and config.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a damaged file, or a format that this version does not know.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no saved bottleneck: it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder / CONFIG} has format {got!r}; this version of ib_explain reads format {FORMAT}")
    if missing := [key for key in NEEDED if key not in config]:
        raise ValueError(f"{folder} is damaged: its {CONFIG} has no {missing[0]!r}")
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{folder} is damaged: {broken[0]} in {WEIGHTS} has NaN or infinite values")
    return tensors, config


def host_facts(model: nn.Module) -> dict[str, Any]:
    """What tells a host from another: class, timm's architecture name, classes, shape and weights fingerprints."""
    host = unwrap(model)
    config = getattr(host, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    return {
        "class": type(host).__name__,
        "architecture": name or type(host).__name__,
        "structure": _digest(f"{key}{tuple(t.shape)}" for key, t in host.state_dict().items()),
        "weights": fingerprint(host),
    }


def fingerprint(model: nn.Module) -> str:
    """A digest of the host's weights: up to 1,024 evenly spaced values of every parameter and buffer."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in unwrap(model).state_dict().items():
        flat = tensor.detach().flatten()
        digest.update(name.encode())
        values = flat[:: max(1, flat.numel() // 1024)]
        digest.update(np.ascontiguousarray(values.to("cpu", torch.float64).numpy()).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    found = {"python": platform.python_version()}
    for package in ("ib-explain", "torch", "timm", "captum", "numpy"):
        try:
            found[package] = torch.__version__ if package == "torch" else version(package)  # with its build: +cu132
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def layout_from_json(fields: dict[str, Any]) -> Layout:
    """The `Layout` that `dataclasses.asdict` wrote."""
    order = fields["order"]
    return Layout(
        **{
            **fields,
            "path": tuple(fields["path"]),
            "axes": tuple(fields["axes"]),
            "grid": tuple(fields["grid"]),
            "order": None if order is None else tuple(order),
        }
    )


def data_config(model: nn.Module) -> dict[str, Any] | None:
    """Mean and standard deviation with which the host's images are normalised, where its timm config tells them."""
    config = getattr(unwrap(model), "pretrained_cfg", None)
    if not isinstance(config, dict) or "mean" not in config:
        return None
    return {"mean": list(config["mean"]), "std": list(config["std"])}


def _digest(lines: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()

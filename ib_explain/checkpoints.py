"""Checkpoints of a fit: a folder with the bottleneck and the state of the run, written beside its name and renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ib_explain.files import current_folder, replace_folder
from ib_explain.io import FORMAT, read_folder, write_folder

__all__ = ["read_checkpoint", "write_checkpoint"]

OPTIMISER = "optimiser.safetensors"


def write_checkpoint(
    path: Path, weights: dict[str, Tensor], description: dict[str, Any], state: dict[str, Any]
) -> None:
    """Replace the checkpoint at `path` by a new one."""
    with replace_folder(path) as folder:
        write_folder(folder, weights, {"format": FORMAT, **description, "run": state["run"]})
        save_file(state["tensors"], folder / OPTIMISER)


def read_checkpoint(path: str | Path, description: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state to resume from, or None if there is no checkpoint yet.

    Returns:
        {"weights": the bottleneck's, "tensors": the optimiser's, "run": counters and figures}.

    Raises:
        ValueError: the checkpoint is another run's (naming the first setting that differs), or damaged.
    """
    folder = current_folder(path)
    if folder is None:
        return None
    weights, config = read_folder(folder)
    theirs = {**config, **config["run"]["settings"]}
    for name, value in json.loads(json.dumps({**description, **settings})).items():
        if theirs.get(name) != value:
            raise ValueError(f"{folder} is the checkpoint of a fit with {name}={theirs.get(name)!r}, not {value!r}")
    try:
        tensors = load_file(folder / OPTIMISER)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / OPTIMISER} is damaged: {error}") from error
    return {"weights": weights, "tensors": tensors, "run": config["run"]}

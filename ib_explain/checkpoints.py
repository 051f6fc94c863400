"""Checkpoints of a fit: a folder with the bottleneck and the state of the run, written beside its name and renamed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ib_explain.checks import warn_user
from ib_explain.files import check_replaceable, current_folder, replace_folder
from ib_explain.io import CONFIG, FILES, FORMAT, WEIGHTS, read_folder, write_folder

__all__ = ["CHECKPOINT_FILES", "check_checkpoint_folder", "digest", "read_checkpoint", "write_checkpoint"]

OPTIMISER = "optimiser.safetensors"
CHECKPOINT_FILES = (*FILES, OPTIMISER)
RUN = ("step", "images", "seconds", "grid_alone", "figures", "history", "settings", "scaler")


def check_checkpoint_folder(path: str | Path, *, resume: bool) -> None:
    """Make sure that checkpoints can be written at `path`, over none but older ones.

    Raises:
        FileExistsError: it holds other files, a saved bottleneck, which a checkpoint would replace, or, unless the fit
            is to `resume`, one that was interrupted.
        ValueError: a checkpoint that lacks a file.
        OSError: the place cannot be written to.
    """
    check_replaceable(path, CHECKPOINT_FILES)
    path = Path(path)
    if not resume and (steps := _interrupted(path)):
        told = f"{path} holds a fit that was interrupted after step {steps[0]} of {steps[1]}"
        raise FileExistsError(f"{told}; resume=True goes on from there, or remove it or name another folder")
    if (path / CONFIG).exists() and not (path / OPTIMISER).exists():
        if _run_of(path) is not None:
            raise ValueError(
                f"{path} is a damaged checkpoint: it has no {OPTIMISER}; remove it, or name another folder"
            )
        raise FileExistsError(f"{path} holds a saved bottleneck; name another folder for checkpoints")


def _interrupted(path: Path) -> tuple[int, int] | None:
    """After which step of how many the fit of this checkpoint was stopped; None if it was not, or cannot be read."""
    folder = current_folder(path)
    run = None if folder is None or not (folder / OPTIMISER).exists() else _run_of(folder)
    settings = (run or {}).get("settings")
    step, steps = (run or {}).get("step"), settings.get("steps") if isinstance(settings, dict) else None
    return (step, steps) if isinstance(step, int) and isinstance(steps, int) and step < steps else None


def _run_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's config says of its run; None for a saved bottleneck, or where it cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, RecursionError, UnicodeDecodeError):
        return None
    run = config.get("run") if isinstance(config, dict) else None
    return run if isinstance(run, dict) else None


def write_checkpoint(
    path: Path, weights: dict[str, Tensor], description: dict[str, Any], state: dict[str, Any], first: str
) -> None:
    """Replace the checkpoint at `path` by a new one.

    Args:
        path: of the folder.
        weights: of the bottleneck.
        description: all that has to be the same for a run to go on from here.
        state: of the run.
        first: `digest` of the data's first images.

    Raises:
        FileExistsError: the folder holds other files.
    """
    with replace_folder(path, CHECKPOINT_FILES) as folder:
        config = {"format": FORMAT, **description, "first_batch": first, "run": state["run"]}
        write_folder(folder, weights, config)
        (folder / OPTIMISER).write_bytes(save(state["tensors"]))


def read_checkpoint(
    path: str | Path, description: dict[str, Any], settings: dict[str, Any], first: str | None
) -> dict[str, Any] | None:
    """The state to resume from, or None if there is no checkpoint yet.

    Args:
        path: of the folder.
        description: what the run would write.
        settings: of the run.
        first: `digest` of the data's first images; None for a process that reads others than the writer of checkpoints.

    Returns:
        {"weights": the bottleneck's, "tensors": the optimiser's, "run": counters and figures}.

    Warns:
        UserWarning: the data begins with other images. Random augmentations may do that, too.

    Raises:
        ValueError: the checkpoint is another run's (naming the first setting that differs), or damaged.
    """
    folder = current_folder(path)
    if folder is None:
        return None
    try:
        weights, config = read_folder(folder)
    except FileNotFoundError as error:
        lost = CONFIG if not (folder / CONFIG).exists() else WEIGHTS
        told = f"{folder} is a damaged checkpoint: it has no {lost}; remove it, or name another folder"
        raise ValueError(told) from error
    run = config.get("run")
    kinds = {"step": int, "figures": dict, "history": list, "settings": dict, "scaler": dict}
    if (
        not isinstance(run, dict)
        or any(key not in run for key in RUN)
        or any(not isinstance(run[key], kind) for key, kind in kinds.items())
    ):
        raise ValueError(f"{folder} is no checkpoint of a fit, or damaged: its config.json has no whole 'run'")
    theirs, ours = {**config, **run["settings"]}, json.loads(json.dumps({**description, **settings}))
    for kind, what in (("structure", "to another architecture"), ("weights", "to a host with other weights")):
        if theirs["host"].get(kind) != ours["host"][kind]:
            raise ValueError(f"{folder} is the checkpoint of a fit {what}")
    for name, value in ours.items():
        if _decisive(theirs.get(name)) != _decisive(value):
            short = not isinstance(value, dict | list)
            what = f"{name}={theirs.get(name)!r}, not {value!r}" if short else f"another {name}"
            raise ValueError(f"{folder} is the checkpoint of a fit with {what}")
    try:
        tensors = load_file(folder / OPTIMISER)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / OPTIMISER} is damaged: {error}") from error
    if first is not None and config.get("first_batch", first) != first:
        done = f"its {run['step']} of {settings['steps']} steps are not taken again on these"
        warn_user(f"{folder} is the checkpoint of a fit whose data began with other images: {done}")
    return {"weights": weights, "tensors": tensors, "run": run}


def digest(images: Tensor) -> str:
    """What tells images from others, exactly."""
    values = images.detach().float().cpu().contiguous().numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()


def _decisive(value: Any) -> Any:
    """A description without how well layouts scored in their probes, which another machine may round otherwise."""
    if isinstance(value, dict):
        return {key: _decisive(item) for key, item in value.items() if key != "score"}
    return [_decisive(item) for item in value] if isinstance(value, list) else value

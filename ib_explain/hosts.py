"""Hosts by name: any timm model, with its own weights or a checkpoint's, and the names of its classes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.modules import unwrap

__all__ = ["channels_of", "class_names", "input_size_of", "load_host", "pick_device", "timm_config", "timm_data_config"]


def load_host(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    in_chans: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Create a timm model in eval mode.

    Args:
        name: timm's name, with or without a tag of its weights ("resnet50", "resnet50.a1_in1k"), or an id with a source
            ("hf-hub:owner/name", "local-dir:PATH"), whose weights are then loaded unless there is a checkpoint.
        pretrained: load timm's weights, downloading them where they are not cached. Without these or a checkpoint's
            the weights are random, the same ones each time.
        checkpoint: file of a state dict, .safetensors or torch.save's, as timm writes it (averaged weights first).
        num_classes: where it is not the model's own.
        input_size: (H, W); needed here only by models that are built for one size.
        in_chans: image channels, where they are not the model's own.
        mean, std: of each channel, or one for all, by which the model's images are normalised, where that is not as in
            timm's config; that of the model is changed.
        device: "cpu", "cuda", "cuda:1", ...; None picks one.

    Raises:
        ValueError: unknown model (with the nearest names), tag or repository, no weights to load, an unknown device, or
            a checkpoint that is missing, damaged or of other shapes (with what was expected and what came).
        ConnectionError: the weights are not cached and cannot be fetched.
    """
    import timm

    target = pick_device(device)
    from_source = ":" in name
    if not from_source and not timm.is_model(name.rsplit("/", 1)[-1]):
        raise ValueError(f"unknown model {name!r}{_near_models(name)}")
    options: dict[str, Any] = {"num_classes": num_classes}
    if in_chans is not None:
        options["in_chans"] = in_chans
    if input_size is not None and not from_source and _has_fixed_size(name):
        options["img_size"] = input_size
    weights = pretrained or (from_source and checkpoint is None)
    try:
        with torch.random.fork_rng(devices=[]):  # a model without weights is the same in every run
            torch.default_generator.manual_seed(0)
            model = timm.create_model(name, pretrained=weights, **options)
    except Exception as error:  # the hub's, the network's and timm's errors have no common base
        raise _as_ours(error, name) from error
    if checkpoint is not None:
        _load(model, Path(checkpoint), name)
    normalised = {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    if normalised:
        model.pretrained_cfg = timm_config(model) | normalised  # type: ignore[assignment]
    return model.eval().to(target)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The named device; for "cuda" this process's GPU, for None that one if there is one, else the CPU.

    Raises:
        ValueError: no device of that name here.
    """
    import os

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus) if gpus else torch.device("cpu")
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None and gpus:  # of several processes, each has its own
            return pick_device()
        torch.zeros(1, device=found).tolist()  # a device that cannot say a value is none to compute on
    except (RuntimeError, AssertionError):
        have = ", ".join(["cpu", *(f"cuda:{i}" for i in range(gpus))])
        raise ValueError(f"no device {str(device)!r} here; there: {have}") from None
    return found


def timm_config(model: nn.Module) -> dict[str, Any]:
    """What timm says of a model, wrapped or not (`pretrained_cfg`); empty for a model that timm did not make."""
    host = unwrap(model)
    config = getattr(host, "pretrained_cfg", None) or getattr(host, "default_cfg", None) or {}
    if not isinstance(config, Mapping):
        # timm's own class, or somebody else's attribute.
        config = config.to_dict() if hasattr(config, "to_dict") else {}
    config = dict(config)
    if config.get("input_size") and (insists := _size_of_patches(host, config.get("first_conv"))):
        config["input_size"] = (config["input_size"][0], *insists)
    return config


def _size_of_patches(host: nn.Module, first_conv: Any) -> tuple[int, int] | None:
    """(H, W) that a model which cuts the image into patches was made for: timm's config keeps that of its weights."""
    from timm.layers import PatchEmbed

    for name, module in host.named_modules():
        if isinstance(module, PatchEmbed) and f"{name}.proj" == first_conv:
            return tuple(module.img_size) if module.img_size else None
    return None


def channels_of(model: nn.Module) -> int | None:
    """Image channels of a timm host; None for another, whose first pass has to tell."""
    return input_size_of(model)[0] if timm_config(model) else None


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) from the host's own data config (timm), else 224 px and the channels of its first convolution, or 3."""
    host = unwrap(model)
    config = timm_config(host)
    if not config:
        first_conv = next((m for m in host.modules() if isinstance(m, nn.Conv2d) and m.groups == 1), None)
        return 3 if first_conv is None else first_conv.in_channels, 224, 224
    size = config.get("input_size") or (3, 224, 224)
    # timm keeps three channels in it when a model is made with in_chans=1 or 6. The first convolution knows better.
    first = config.get("first_conv")
    first = first[0] if isinstance(first, tuple | list) and first else first
    stem = dict(host.named_modules()).get(first) if isinstance(first, str) else None
    channels = size[0]
    if isinstance(stem, nn.Conv2d) and stem.groups == 1:
        channels = stem.in_channels // _pixels_folded(host)
    return int(channels), int(size[1]), int(size[2])


def _pixels_folded(host: nn.Module) -> int:
    """Pixels that become channels of one position before the first convolution: 1, or 4 x 4 in TResNet."""
    from timm.layers import SpaceToDepth

    return next((module.bs**2 for module in host.modules() if isinstance(module, SpaceToDepth)), 1)


def timm_data_config(model: nn.Module) -> dict[str, Any] | None:
    """Input size, mean, std, crop and interpolation, as `timm.data.resolve_data_config` has them; None without any.

    timm itself answers with ImageNet's for a model that it did not make.
    """
    from timm.data import resolve_data_config

    config = timm_config(model)
    return dict(resolve_data_config(pretrained_cfg=config)) if config else None


def class_names(model: nn.Module, *, imagenet: bool = False, folders: list[str] | None = None) -> list[str] | None:
    """One name for each class of the host, or None where they are not known.

    Args:
        model: the host; its timm configuration may hold the names.
        imagenet: the weights are timm's, so 1000 classes are ImageNet's.
        folders: names of the data set's class folders; WordNet ids are turned into words.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    host, config = unwrap(model), timm_config(model)
    count = getattr(host, "num_classes", config.get("num_classes"))
    names = list(config.get("label_names") or ())
    words = dict(config.get("label_descriptions") or {})
    if not names and imagenet and (subset := infer_imagenet_subset(host)):
        names = ImageNetInfo(subset).label_names()
    names = names or list(folders or ())
    if not names or len(names) != count:
        return None
    if not words and all(name[:1] == "n" and name[1:].isdigit() and len(name) == 9 for name in names):
        info = ImageNetInfo("imagenet-22k")
        words = {name: info.label_name_to_description(name) for name in names if name in info.label_names()}
    return [words.get(name, name).split(", ")[0].replace("_", " ") for name in names]


def _near_models(name: str) -> str:
    import timm

    wanted = name.rsplit("/", 1)[-1].split(".", 1)[0].lower().replace("-", "_")
    known = timm.list_models()
    flat = {entry.replace("_", ""): entry for entry in reversed(known)}
    near = [flat[key] for key in [wanted.replace("_", "")] if key in flat]
    near += [entry for entry in difflib.get_close_matches(wanted, known, n=3, cutoff=0.6) if entry not in near]
    hint = f"did you mean {' or '.join(near[:3])}? " if near else ""
    return f"; {hint}timm.list_models() names all {len(known)}"


def _has_fixed_size(name: str) -> bool:
    import timm

    config = timm.get_pretrained_cfg(name.rsplit("/", 1)[-1].split(".", 1)[0], allow_unregistered=True)
    return bool(config is not None and getattr(config, "fixed_input_size", False))


def _as_ours(error: Exception, name: str) -> Exception:
    """Say in one line what went wrong in `timm.create_model`; what is not known keeps its own type."""
    text, kind = _first_line(error), type(error).__name__
    if kind in ("RepositoryNotFoundError", "HFValidationError", "GatedRepoError", "RevisionNotFoundError"):
        return ValueError(f"no model {name!r} on the hub, or no access to it: {text}")
    if isinstance(error, OSError) or kind in ("ConnectError", "ConnectTimeout", "OfflineModeIsEnabled"):
        return ConnectionError(f"cannot fetch {name!r}: {text}")
    if isinstance(error, RuntimeError | ValueError | AssertionError):
        return ValueError(f"timm cannot create {name!r}: {text}")
    return error


def _load(model: nn.Module, path: Path, name: str) -> None:
    """Load a checkpoint, every tensor of it, or say what does not fit."""
    import timm.models
    from safetensors import SafetensorError

    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a checkpoint" if path.is_dir() else f"no such checkpoint: {path}")
    try:
        found = timm.models.load_state_dict(str(path), weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"cannot read checkpoint {path}: {_first_line(error)}") from None
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {path}: {error.strerror or error}") from None
    except Exception:  # unpickling what is no pickle raises anything, and torch's own words advise to load unsafely
        told = "it is neither safetensors nor a torch state dict"
        raise ValueError(f"cannot read checkpoint {path}: {told}") from None
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        holds = ", ".join(map(repr, list(found)[:6])) if found else "nothing"
        told = f"must hold named tensors, the state dict of a model (alone, or as 'state_dict' or 'model'), got {holds}"
        raise ValueError(f"checkpoint {path} {told}")
    expected = model.state_dict()
    missing, others = [k for k in expected if k not in found], [k for k in found if k not in expected]
    if missing or others:
        lacks = f"it lacks {len(missing)} of {len(expected)} tensors (first: {missing[0]})" if missing else ""
        has = f"it has {len(others)} that the model lacks (first: {others[0]})" if others else ""
        raise ValueError(f"checkpoint {path} does not fit {name}: {' and '.join(filter(None, (lacks, has)))}")
    wrong = [k for k in expected if expected[k].shape != found[k].shape]
    if wrong:
        came = {found[k].shape[0] for k in wrong if found[k].ndim}
        tails = all(expected[k].shape[1:] == found[k].shape[1:] for k in wrong)
        hint = f"; try --num-classes {came.pop()}" if tails and len(came) == 1 and len(wrong) <= 4 else ""
        rest = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"checkpoint {path} does not fit {name}: {wrong[0]} must be {tuple(expected[wrong[0]].shape)}, "
            f"got {tuple(found[wrong[0]].shape)}{rest}{hint}"
        )
    model.load_state_dict(found)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

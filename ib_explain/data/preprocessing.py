"""A host's preprocessing at test time, where it puts points, boxes and densities of a picture, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ib_explain.checks import check_images, check_number, check_positive_int
from ib_explain.hosts import channels_of, timm_data_config
from ib_explain.modules import unwrap

__all__ = ["Channels", "CropMode", "Placement", "Preprocess", "denormalize", "preprocess"]

Channels = float | Sequence[float] | Tensor | None
"""Of a mean or a standard deviation: one number or one a channel."""
CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(frozen=True)
class Placement:
    """Where one picture's pixels end up in the input: each axis is scaled, then a window is cut out (or padded around).

    Coordinates are x to the right and y down, 0 at the centre of the first pixel: x' = (x + 0.5) * scale - 0.5 - left.

    Attributes:
        original: (h, w) of the picture.
        resized: (h, w) after the resize.
        top: first row of the window in the resized picture; negative where the picture is padded.
        left: its first column, likewise.
        size: (H, W) of the window, the host's input.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]

    def points(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Move points (n, 2) of (x, y): the new points (n, 2), and which of them lie in the window, (n,) bool."""
        points = points.float()  # whole numbers, too, are scaled by fractions
        moved = (points + 0.5) * self._scale(points) - 0.5 - points.new_tensor([self.left, self.top])
        end = moved.new_tensor([self.size[1] - 0.5, self.size[0] - 0.5])
        return moved, ((moved >= -0.5) & (moved < end)).all(dim=-1)

    def boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Move boxes (n, 4) of xmin, ymin, xmax, ymax, both ends inside, and cut them at the window.

        Returns:
            The boxes (n, 4), fractions kept, and the share of each box's area that the window holds, (n,) in [0, 1].
            A box with share 0 lies outside: its corners mean nothing, leave it out.
        """
        boxes = boxes.float()
        shift, scale = boxes.new_tensor([self.left, self.top]), self._scale(boxes)
        # Outer edges, counted from the window's own: the first pixel of a box begins at its number, the last ends at
        # its number + 1.
        low, high = boxes[:, :2] * scale - shift, (boxes[:, 2:] + 1) * scale - shift
        window = boxes.new_tensor([self.size[1], self.size[0]])
        cut_low, cut_high = low.clamp_min(0), high.minimum(window)
        share = (cut_high - cut_low).clamp_min(0).prod(dim=1) / (high - low).prod(dim=1)
        return torch.cat([cut_low, cut_high - 1], dim=1), share

    def density(self, density: Tensor) -> Tensor:
        """Move a density (1, h, w) of the picture to (1, H, W): antialiased bilinear resize, window, 0 in padding."""
        if tuple(density.shape[-2:]) != self.original:
            raise ValueError(f"density must have the picture's size {self.original}, got {tuple(density.shape[-2:])}")
        resized = F.interpolate(density[None].float(), self.resized, mode="bilinear", antialias=True)[0]
        # Negative padding is cropping.
        bottom, right = self.size[0] + self.top - self.resized[0], self.size[1] + self.left - self.resized[1]
        return F.pad(resized, (-self.left, right, -self.top, bottom)).clamp_min(0)

    def _scale(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.resized[1] / self.original[1], self.resized[0] / self.original[0]])


@dataclass(frozen=True)
class Preprocess:
    """A host's preprocessing at test time: a picture to its input (C, H, W), made by timm from these fields.

    Attributes:
        size: (H, W) of the input.
        mean: one a channel: of three, or the one of a host that takes grey pictures.
        std: likewise.
        crop_pct: the picture is resized to size / crop_pct before the window is cut from its middle.
        crop_mode: "center": the shorter side fits, what juts out is lost; "squash": both sides fit, the aspect ratio is
            lost; "border": the longer side fits, the rest is padded with the mean colour.
        interpolation: the resize's filter, by timm's name.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: CropMode
    interpolation: Interpolation

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the normalised input, (C, H, W) float32, C = 3, or 1 of the picture's luminance (ITU-R 601-2)."""
        return self._transform(image.convert("L") if len(self.mean) == 1 else image)

    def placement(self, original: tuple[int, int]) -> Placement:
        """Where the pixels of a picture of (h, w) = `original` end up: the geometry of `__call__`."""
        h, w = original
        goal_h, goal_w = (int(side / self.crop_pct) for side in self.size)
        if self.crop_mode == "squash":
            resized = goal_h, goal_w
        elif self.crop_mode == "center" and goal_h == goal_w:
            # torchvision's resize of the shorter side, which rounds the longer one down.
            resized = (int(goal_h * h / w), goal_w) if w <= h else (goal_h, int(goal_w * w / h))
        else:
            pick = max if self.crop_mode == "border" else min
            ratio = pick(h / goal_h, w / goal_w)
            resized = round(h / ratio), round(w / ratio)
        top, left = (_offset(there, window) for there, window in zip(resized, self.size, strict=True))
        return Placement(original, resized, top, left, self.size)

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        from timm.data import create_transform

        return create_transform(
            (len(self.mean), *self.size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )


def preprocess(
    model: nn.Module,
    *,
    size: int | tuple[int, int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    crop_pct: float | None = None,
    crop_mode: CropMode | None = None,
    interpolation: Interpolation | None = None,
) -> Preprocess:
    """Return the host's own preprocessing, from timm's data config; what is given here goes before it.

    A host that timm did not make carries no such config, and nothing is guessed: it needs `size`, `mean` and `std`; the
    rest is then the usual 0.875, "center" and "bicubic". `crop_mode="squash", crop_pct=1.0` keeps the whole picture. To
    a host of one channel pictures come in grey; where its config has three values (timm leaves those of the coloured
    model), their average is taken.

    Args:
        model: the host.
        size: side, or (H, W), of the input.
        mean: of each channel, or one number for all, for pixels in [0, 1]. For a host that timm did not make, a
            sequence of one tells that it takes grey pictures.
        std: likewise, > 0.
        crop_pct: in (0, 1].
        crop_mode: "center", "squash" or "border".
        interpolation: the resize's filter: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos".

    Raises:
        TypeError, ValueError: no config and no size, mean and std; a value out of range; a host of other than 1 or 3
            channels.
    """
    channels = channels_of(model) or (3 if mean is None or isinstance(mean, int | float) else len(mean))
    if channels not in (1, 3):
        raise ValueError(f"the model takes {channels} channels, a picture has 3, or 1 in grey; make the input yourself")
    config: dict[str, Any] = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
    if (own := timm_data_config(model)) is not None:
        config = own
        config["size"] = tuple(config.pop("input_size")[-2:])
    if isinstance(size, str) or (size is not None and not isinstance(size, int) and len(size) != 2):
        raise TypeError(f"size must be a side or (height, width), got {size!r}")
    given = {
        "size": (size, size) if isinstance(size, int) else size,
        "mean": mean,
        "std": std,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
    }
    config.update({key: value for key, value in given.items() if value is not None})
    missing = [key for key in ("size", "mean", "std") if key not in config]
    if missing:
        name = type(unwrap(model)).__name__
        raise ValueError(f"{name} carries no timm preprocessing (pretrained_cfg); give {', '.join(missing)}")
    result = Preprocess(
        size=(check_positive_int(config["size"][0], "size"), check_positive_int(config["size"][1], "size")),
        mean=_of_channels(config["mean"], "mean", channels),
        std=_of_channels(config["std"], "std", channels),
        crop_pct=check_number(config["crop_pct"], "crop_pct (a share in (0, 1])", above=0),
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
    )
    if result.crop_pct > 1:
        raise ValueError(f"crop_pct must be in (0, 1], got {result.crop_pct}")
    for name, known in (("crop_mode", get_args(CropMode)), ("interpolation", get_args(Interpolation))):
        if getattr(result, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(result, name)!r}")
    if len(result.mean) != channels or len(result.std) != channels or min(result.std) <= 0:
        raise ValueError(f"mean and std must hold {channels} values, std > 0, got {result.mean} and {result.std}")
    return result


def denormalize(x: Tensor, *, model: nn.Module | None = None, mean: Channels = None, std: Channels = None) -> Tensor:
    """Return the pictures behind normalised images: (B, 3, H, W) float32 in [0, 1] on the CPU, clipped to that range.

    Mean and std are those given, else those in the model's timm configuration; with neither, `x` must lie in [0, 1].

    Raises:
        TypeError, ValueError: no batch of images with 1 or 3 channels; one of mean and std alone, or of another length;
            neither they nor a model that carries them, for values outside [0, 1].
    """
    images = check_images(x.clone() if isinstance(x, Tensor) and x.is_inference() else x).detach().float().cpu()
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"x must have 1 or 3 channels to be drawn, got {channels} (shape {tuple(x.shape)})")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together, got only {'std' if mean is None else 'mean'}")
    if mean is None and model is not None:
        mean, std = _configured(model)
    if mean is not None:
        images = images * _per_channel(std, "std", channels) + _per_channel(mean, "mean", channels)
    elif images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"x lies in [{images.min():.3g}, {images.max():.3g}], so it is normalised; "
            "pass model= (a timm model) or mean= and std= to undo that"
        )
    return images.clamp(0, 1).expand(-1, 3, -1, -1)


def _of_channels(given: float | Sequence[float], name: str, channels: int) -> tuple[float, ...]:
    values = [check_number(value, name) for value in ([given] if isinstance(given, int | float) else given)]
    if channels == 1 and len(values) == 3:  # timm keeps three of a model that was made for grey images
        values = [sum(values) / 3]
    return tuple(values * channels if len(values) == 1 else values)


def _offset(there: int, window: int) -> int:
    """First row or column of a central window, rounded as torchvision does; negative for padding."""
    return -((window - there) // 2) if window > there else round((there - window) / 2)


def _configured(model: nn.Module) -> tuple[Channels, Channels]:
    """Mean and std of a timm model; timm would answer with ImageNet's for any other, so those are refused."""
    config = timm_data_config(model)
    if config is None:
        name = type(unwrap(model)).__name__
        raise ValueError(f"{name} carries no timm configuration (pretrained_cfg); pass mean= and std=")
    return config["mean"], config["std"]


def _per_channel(values: Channels, name: str, channels: int) -> Tensor:
    numbers = torch.as_tensor(values, dtype=torch.float32, device="cpu").flatten()
    if channels == 1:
        numbers = numbers.mean(0, keepdim=True)  # timm keeps three of a model that was made for grey images
    if len(numbers) not in (1, channels):
        raise ValueError(f"{name} must be one number or one for each of the {channels} channels, got {len(numbers)}")
    if name == "std" and not (numbers > 0).all():
        raise ValueError(f"std must be above 0, got {numbers.tolist()}")
    return numbers.view(1, -1, 1, 1)

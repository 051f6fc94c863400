"""Pictures the package draws itself: one object of a known class among clutter, and the exact mask of the evidence.

Eight classes that differ in outline or texture alone. Colour, size, angle and place carry no class information; every
picture also holds distractors of no class in the same colours and sizes (fragments of the classes' own outlines,
ellipses, plain and speckled blobs, lines) on a textured background. So a map is right only if it finds the object.

Picture i of a seed is the same whatever the number of pictures, the batch or the machine: all randomness is an integer
hash of (seed, i), all else float32 arithmetic rounded to 8 bits (`ib_explain.data.drawing`). `demo_host` is a small
classifier of these pictures.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ib_explain.checks import check_bool, check_positive_int
from ib_explain.data.drawing import CLASS_NAMES, draw_pictures
from ib_explain.randomness import check_seed

__all__ = ["CLASS_NAMES", "MEAN", "STD", "Synthetic", "SyntheticSample", "build_demo_host", "demo_host", "render"]

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

_CHUNK = 32  # pictures drawn at once: their working set stays in the processor's cache


@dataclass(frozen=True)
class SyntheticSample:
    """One picture, or a batch of them with one more axis in front.

    With `pairs=True`, label and mask hold both objects: `mask[..., k, :, :]` is the evidence for `label[..., k]`.

    Attributes:
        image: (3, H, W) float32, normalised with MEAN and STD.
        label: () int64 index into CLASS_NAMES; (2,) for pairs, which are of two different classes.
        mask: (1, H, W) bool, the pixels that the object covers to at least half, its hole included; (2, H, W) for
            pairs.
    """

    image: Tensor
    label: Tensor
    mask: Tensor


class Synthetic(Dataset[tuple[Tensor, Tensor]]):
    """`n` pictures of `size` x `size` pixels; every run of eight from a multiple of eight holds each class once.

    Items are (image, label), as `torch.utils.data.DataLoader` expects them, and drawn a batch at a time there.

    Args:
        n: number of pictures.
        size: pixels on each side, at least 32.
        seed: integer >= 0; another seed gives other pictures.
        pairs: two objects of two classes in each picture, with a label and a mask for each.

    Raises:
        ValueError, TypeError: `n` or `size` is no positive integer, `size` is below 32, `seed` is negative.
    """

    def __init__(self, n: int, size: int = 64, seed: int = 0, pairs: bool = False) -> None:
        self.n = check_positive_int(n, "n")
        self.size = check_positive_int(size, "size")
        if size < 32:
            raise ValueError(
                f"size must be at least 32 pixels, below that the classes cannot be told apart, got {size}"
            )
        if check_seed(seed) < 0:
            raise ValueError(f"seed must be an integer >= 0, got {seed}")
        self.seed = check_seed(seed) % 2**64
        self.pairs = check_bool(pairs, "pairs")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = self.sample(index)
        return drawn.image, drawn.label

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        drawn = self.batch(indices)
        return list(zip(drawn.image, drawn.label, strict=True))

    def sample(self, index: int) -> SyntheticSample:
        """Return picture `index` (negative counts from the end) with its label and mask."""
        drawn = self.batch([index])
        return SyntheticSample(drawn.image[0], drawn.label[0], drawn.mask[0])

    def batch(self, indices: Sequence[int] | range | Tensor) -> SyntheticSample:
        """Return these pictures as one sample: image (B, 3, H, W), label (B,) or (B, 2), mask (B, 1 or 2, H, W).

        Raises:
            IndexError: an index outside [-n, n).
            ValueError: no index at all.
        """
        wanted = [operator.index(i) for i in indices]
        if not wanted:
            raise ValueError("indices must name at least one picture, got none")
        for index in wanted:
            if not -self.n <= index < self.n:
                raise IndexError(f"index {index} is out of range for {self.n} pictures")
        objects = 2 if self.pairs else 1
        drawn = render([i % self.n for i in wanted], self.size, self.seed, objects)
        return drawn if self.pairs else SyntheticSample(drawn.image, drawn.label[:, 0], drawn.mask)


def render(indices: Sequence[int], size: int, seed: int, objects: int) -> SyntheticSample:
    """Draw pictures with 0, 1 or 2 objects: image (B, 3, H, W), label (B, objects), mask (B, objects, H, W).

    With 0 objects there is clutter only: pictures without evidence, on which a good host is undecided.
    """
    parts = [
        draw_pictures(np.asarray(indices[i : i + _CHUNK], np.uint64), size, seed, objects)
        for i in range(0, len(indices), _CHUNK)
    ]
    pixels, label, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return SyntheticSample((pixels - MEAN[0]) / STD[0], label, mask)


# The demo's host -----------------------------------------------------------------------------------------------------


def build_demo_host() -> nn.Module:
    """Return the demo host's architecture, untrained: a narrow residual net of timm for 64 px, about 0.5 M parameters.

    Its stages `stages.0` to `stages.3` have grids of 32, 16, 8 and 4 positions a side.
    """
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    widths_strides = ((24, 1), (48, 2), (96, 2), (160, 2))
    blocks = tuple(ByoBlockCfg(type="basic", d=1, c=c, s=s, gs=0, br=1.0) for c, s in widths_strides)
    host: Any = ByobNet(
        ByoModelCfg(blocks=blocks, stem_chs=24, stem_type="3x3", stem_pool=""), num_classes=len(CLASS_NAMES)
    )
    host.pretrained_cfg = host.default_cfg = {
        "architecture": "ib_explain_demo_host",
        "num_classes": len(CLASS_NAMES),
        "label_names": list(CLASS_NAMES),
        "input_size": (3, 64, 64),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
    }
    return host


def demo_host() -> nn.Module:
    """Return the trained classifier of these pictures, in eval mode, on the CPU; no download.

    Its mean, std and input size are found by `timm.data.resolve_model_data_config`. The training record (script,
    settings, held-out accuracy) is in `host.pretrained_cfg["record"]`.
    """
    from safetensors import safe_open

    host: Any = build_demo_host()
    with safe_open(Path(__file__).with_name("demo_host.safetensors"), framework="pt") as weights:
        host.load_state_dict({name: weights.get_tensor(name).float() for name in weights.keys()})  # noqa: SIM118
        host.pretrained_cfg["record"] = json.loads(weights.metadata()["record"])
    host.eval()
    return host

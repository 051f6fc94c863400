"""Small hosts of different layout for the synthetic pictures: what they are built of, and their trained weights.

`cnn` is the package's demo host (channels first); `swin` an NHWC pyramid; `vit` tokens with a class and four register
tokens in front; `mixer` tokens alone. train_hosts.py trains the last three.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ib_explain.data.synthetic import CLASS_NAMES, MEAN, STD, demo_host

SIZE = 64  # pixels a side


@dataclass(frozen=True)
class Builder:
    """How to make an untrained host."""

    make: Callable[[], nn.Module]
    description: str
    first_conv: str
    classifier: str


def _swin() -> nn.Module:
    return SwinTransformer(
        SIZE,
        patch_size=4,
        num_classes=8,
        embed_dim=48,
        depths=(2, 4, 1),
        num_heads=(2, 4, 8),
        window_size=4,
        mlp_ratio=3.0,
        drop_path_rate=0.0,
    )


def _vit() -> nn.Module:
    return VisionTransformer(
        SIZE,
        patch_size=8,
        num_classes=8,
        global_pool="token",
        embed_dim=128,
        depth=6,
        num_heads=2,
        mlp_ratio=2.0,
        reg_tokens=4,
    )


def _mixer() -> nn.Module:
    return MlpMixer(num_classes=8, img_size=SIZE, patch_size=8, embed_dim=128, num_blocks=6)


BUILDERS = {
    "swin": Builder(
        _swin,
        "timm SwinTransformer, patch 4, window 4, depths 2-4-1, widths 48-96-192; grids 16, 8, 4 a side, NHWC",
        "patch_embed.proj",
        "head.fc",
    ),
    "vit": Builder(
        _vit,
        "timm VisionTransformer, patch 8, depth 6, width 128; tokens: class (read by the head), 4 registers, 8 x 8",
        "patch_embed.proj",
        "head",
    ),
    "mixer": Builder(_mixer, "timm MlpMixer, patch 8, depth 6, width 128; 8 x 8 tokens alone", "stem.proj", "head"),
}


def build(name: str) -> nn.Module:
    """Return the untrained host `name` ("swin", "vit" or "mixer") for images (B, 3, 64, 64), with timm's configuration.

    Raises:
        ValueError: there is no such host.
    """
    if name not in BUILDERS:
        raise ValueError(f"name must be one of {', '.join(BUILDERS)}, got {name!r}")
    builder = BUILDERS[name]
    host: Any = builder.make()
    host.pretrained_cfg = host.default_cfg = {
        "architecture": f"ib_explain_{name}_host",
        "num_classes": len(CLASS_NAMES),
        "label_names": list(CLASS_NAMES),
        "input_size": (3, SIZE, SIZE),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
        "first_conv": builder.first_conv,
        "classifier": builder.classifier,
    }
    return host


def load(name: str, folder: str | Path | None = None) -> nn.Module:
    """Return the trained host `name` in float32 and eval mode, its record in `pretrained_cfg["record"]`.

    Args:
        name: "cnn" (in the package, needs no folder), "swin", "vit" or "mixer".
        folder: where train_hosts.py wrote <name>.safetensors.

    Raises:
        ValueError: there is no such host, or no folder for one that needs it.
        FileNotFoundError: the folder lacks its weights.
    """
    if name == "cnn":
        return demo_host()
    host: Any = build(name)
    if folder is None:
        raise ValueError(f"folder must name where {name}.safetensors is, got None")
    path = Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; python benchmarks/train_hosts.py --hosts {name} writes it")
    with safe_open(path, framework="pt") as weights:
        host.load_state_dict({key: weights.get_tensor(key).float() for key in weights.keys()})  # noqa: SIM118
        host.pretrained_cfg["record"] = json.loads(weights.metadata()["record"])
    return host.eval()

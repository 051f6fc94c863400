"""Classifiers small enough for many tests: a CNN, NHWC, tokens with a class token, and hosts that misbehave."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 5


class TinyCNN(nn.Module):
    """(B, 3, H, W) -> (B, 5): three residual stages, in-place ReLUs; `stages.1` has a quarter of the input side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.act = nn.ReLU(inplace=True)
        self.stages = nn.Sequential(_Block(8, 8, 1), _Block(8, 12, 2), _Block(12, 16, 2))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.act(self.stem(x))).mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1, stride=stride)
        self.skip = nn.Conv2d(inside, outside, 1, stride=stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + self.skip(x))


class TinyViT(nn.Module):
    """Patches of 4, a class token that is read out, three blocks."""

    def __init__(self, size: int = 24, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 1 + (size // 4) ** 2, width) * 0.1)
        self.blocks = nn.Sequential(*(_Attention(width) for _ in range(3)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.place
        return self.head(self.blocks(tokens)[:, 0])


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(x)


class TinyNHWC(nn.Module):
    """Channels last between its stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Last(3, 8)
        self.middle = _Last(8, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x.permute(0, 2, 3, 1))).mean(dim=(1, 2)))


class _Last(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).tanh().permute(0, 2, 3, 1)


def tiny(kind: str = "cnn", seed: int = 0) -> nn.Module:
    """A host whose logits differ between images by about 2; the caller's random state is kept."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        host = {"cnn": TinyCNN, "vit": TinyViT, "nhwc": TinyNHWC}[kind]().eval()
        logits = host(images(32, seed=99))
        head = host.fc if kind == "cnn" else host.head
        head.bias -= logits.mean(dim=0)
        head.weight *= 2 / logits.std(dim=0)[:, None]
        head.bias *= 2 / logits.std(dim=0)
    return host


def images(count: int = 4, size: int = 24, seed: int = 0) -> Tensor:
    """Smooth random images, (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * 1.5 + 0.5 * fine


class Brightness(nn.Module):
    """Class 1 where the mean is above a threshold."""

    def __init__(self, threshold: float = -100.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        score = x.mean((1, 2, 3)) - self.threshold
        return torch.stack([-score, score], 1)

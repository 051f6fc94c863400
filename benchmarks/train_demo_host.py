"""Train the demo's host on pictures drawn on the fly and write ib_explain/data/demo_host.safetensors.

    python benchmarks/train_demo_host.py [--steps 1300] [--out FILE]

It learns the shapes from close-ups and then to find them in whole pictures, which takes far fewer steps than whole
pictures alone. These are of four sorts: one object; pairs (both classes equally likely); clutter alone (all classes
equally likely); and parts painted over. A host for explanations should be undecided where the evidence is gone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain.data.synthetic import CLASS_NAMES, Synthetic, build_demo_host, render

OUT = Path(__file__).resolve().parents[1] / "ib_explain" / "data" / "demo_host.safetensors"
TRAIN_SEED, TEST_SEED = 1, 2
CLOSE_UPS, WINDOW = 300, 32  # steps, and pixels a side of what they show
SINGLES, PAIRS, EMPTY = 96, 24, 16  # pictures of each sort in a batch


def close_ups(step: int) -> tuple[Tensor, Tensor]:
    """Windows about the object (136, 3, 32, 32) and class probabilities (136, K) of one step."""
    count = SINGLES + PAIRS + EMPTY
    drawn = render(range(step * count, (step + 1) * count), 64, TRAIN_SEED + 100, objects=1)
    inside, axis = drawn.mask[:, 0].float(), torch.arange(64.0)
    area = inside.sum(dim=(1, 2))
    centres = torch.stack([(inside.sum(dim=2) @ axis) / area, (inside.sum(dim=1) @ axis) / area], dim=1)
    corners = (centres.round().long() - WINDOW // 2).clamp(0, 64 - WINDOW)  # (136, 2), row and column
    rows, columns = (corners + torch.arange(WINDOW)[:, None, None]).unbind(dim=2)  # (32, 136) each
    at = (torch.arange(count)[:, None, None], slice(None), rows.T[:, :, None], columns.T[:, None, :])
    return drawn.image[at].permute(0, 3, 1, 2), F.one_hot(drawn.label[:, 0], len(CLASS_NAMES)).float()


def training_batch(step: int) -> tuple[Tensor, Tensor]:
    """Images (136, 3, 64, 64) and class probabilities (136, K) of one step; no picture comes twice."""
    classes = len(CLASS_NAMES)
    images, targets = [], []
    for objects, count in ((1, SINGLES), (2, PAIRS), (0, EMPTY)):
        drawn = render(range(step * count, (step + 1) * count), 64, TRAIN_SEED, objects)
        images.append(paint_over(drawn.image, drawn.mask, torch.Generator().manual_seed(3 * step + objects)))
        shares = F.one_hot(drawn.label, classes).float()  # (count, objects, K)
        targets.append(shares.mean(dim=1) if objects else torch.full((count, classes), 1 / classes))
    return torch.cat(images), torch.cat(targets)


def paint_over(images: Tensor, masks: Tensor, generator: torch.Generator) -> Tensor:
    """Cover one rectangle of half of the pictures with a flat colour, except where it would hide evidence."""
    batch, _, height, width = images.shape
    corner = torch.rand(batch, 2, 1, generator=generator) * 0.8
    side = 0.15 + 0.4 * torch.rand(batch, 2, 1, generator=generator)
    rows, columns = (((torch.arange(n) + 0.5) / n).expand(batch, n) for n in (height, width))
    inside_rows = (rows >= corner[:, 0]) & (rows < corner[:, 0] + side[:, 0])
    inside_columns = (columns >= corner[:, 1]) & (columns < corner[:, 1] + side[:, 1])
    hidden = inside_rows[:, :, None] & inside_columns[:, None, :]
    hidden &= (torch.rand(batch, 1, 1, generator=generator) < 0.5) & ~masks.any(dim=1)
    colour = 2 * torch.rand(batch, 3, 1, 1, generator=generator) - 1
    return torch.where(hidden[:, None], colour, images)


def train_demo_host(steps: int, lr: float = 3e-3, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """Return the trained host, its weights rounded to half precision as stored, and the record of the run."""
    torch.manual_seed(seed)
    host = build_demo_host().to(memory_format=torch.channels_last)
    decayed = [p for p in host.parameters() if p.ndim > 1]
    plain = [p for p in host.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    started = time.perf_counter()
    for step in range(steps):
        images, targets = close_ups(step) if step < CLOSE_UPS else training_batch(step)
        loss = F.cross_entropy(host(images.contiguous(memory_format=torch.channels_last)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    host = host.to(memory_format=torch.contiguous_format).half().float().eval()
    record = {
        "script": "benchmarks/train_demo_host.py",
        "architecture": "timm ByobNet, one basic block a stage, widths 24-48-96-160",
        "steps": {"close-ups": CLOSE_UPS, "whole pictures": steps - CLOSE_UPS},
        "batch": {"one object": SINGLES, "pairs": PAIRS, "clutter alone": EMPTY},
        "optimizer": f"AdamW, one cycle, lr {lr}, weight decay 0.05",
        "seed": seed,
        "train_seed": TRAIN_SEED,
        "seconds": round(time.perf_counter() - started),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "held_out": evaluate(host),
    }
    return host, record


@torch.no_grad()
def evaluate(host: nn.Module, count: int = 4000) -> dict[str, Any]:
    """Accuracy on unseen pictures; on pairs, share whose two top classes are those present; doubt on clutter alone."""
    singles = Synthetic(count, seed=TEST_SEED).batch(range(count))
    logits = _logits(host, singles.image)
    correct = logits.argmax(dim=1) == singles.label
    pairs = Synthetic(count // 2, seed=TEST_SEED, pairs=True).batch(range(count // 2))
    top = _logits(host, pairs.image).topk(2, dim=1).indices.sort(dim=1).values
    empty = _logits(host, render(range(count // 2), 64, TEST_SEED, 0).image).softmax(dim=1).amax(dim=1)
    return {
        "seed": TEST_SEED,
        "images": count,
        "accuracy": round(correct.float().mean().item(), 4),
        "accuracy_by_class": {
            name: round(correct[singles.label == k].float().mean().item(), 3) for k, name in enumerate(CLASS_NAMES)
        },
        "pairs_both_on_top": round((top == pairs.label.sort(dim=1).values).all(dim=1).float().mean().item(), 4),
        "median_top_probability_on_clutter": round(empty.median().item(), 3),
    }


def _logits(host: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([host(part) for part in images.split(250)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    host, record = train_demo_host(options.steps)
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in host.state_dict().items()
    }
    beside = options.out.with_suffix(".partial")
    safetensors.torch.save_file(weights, beside, metadata={"record": json.dumps(record)})
    beside.chmod(0o644)  # safetensors writes for the owner alone; the package is read by others
    beside.replace(options.out)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

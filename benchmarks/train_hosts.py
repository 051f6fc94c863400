"""Train the small hosts of small_hosts.py on synthetic pictures, each in some twelve minutes on one core.

    python benchmarks/train_hosts.py [--hosts swin,vit,mixer] [--out FOLDER]

Writes FOLDER/<name>.safetensors (half precision, the record in its metadata) and results/hosts.json (all records).

The pictures are those of train_demo_host.py: close-ups first, then whole ones. Attention and MLPs learn these shapes
slowly from labels alone, so the demo host teaches: its probabilities are half of the target on whole pictures, and its
stages should be told from the host's features by linear maps (hints, as in FitNets, Romero et al. 2015; see hints.py).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from hints import Hints, grid_of
from small_hosts import BUILDERS, SIZE, build, load
from timm.layers import build_sincos2d_pos_embed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from train_demo_host import TEST_SEED, TRAIN_SEED, close_ups, evaluate, training_batch

from ib_explain.data.synthetic import Synthetic, demo_host
from ib_explain.io import versions
from ib_explain.sites import default_layer, sites

__all__ = ["load", "main", "train"]

RESULTS = Path(__file__).parent / "results" / "hosts.json"
POOL = {"close-ups": 150, "whole pictures": 400}  # batches of the demo's trainer, 136 pictures each, drawn once
BATCH = {"close-ups": 256, "whole pictures": 64}  # four close-ups for the price of one picture
MUON_LR, ADAM_LR, WARM_UP = 0.02, 2e-3, 0.05
TEACHER = 0.5  # share of the demo host's probabilities in the targets of whole pictures
CHECK_SEED = 3  # of the pictures that settings were chosen on; the record is of TEST_SEED
Pool = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """Steps on each sort of picture, and the demo host's stage that each module should tell of."""

    close_ups: int
    whole_pictures: int
    hints: dict[str, str]
    seed: int = 0


RECIPES = {
    "swin": Recipe(450, 1250, {"layers.0": "stages.1", "layers.1": "stages.2", "layers.2": "stages.3"}),
    "vit": Recipe(600, 1500, {"blocks.1": "stages.1", "blocks.3": "stages.2", "blocks.5": "stages.3"}),
    "mixer": Recipe(500, 1500, {"blocks.1": "stages.1", "blocks.3": "stages.2", "blocks.5": "stages.3"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default=",".join(RECIPES), help="names with commas between, of swin, vit, mixer")
    parser.add_argument("--out", type=Path, default=Path("hosts"))
    options = parser.parse_args()
    names = options.hosts.split(",")
    if unknown := set(names) - set(RECIPES):
        parser.error(f"--hosts must be of {', '.join(RECIPES)}, got {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)

    started = time.process_time()
    pools = draw_pools(POOL)
    drawing = round(time.process_time() - started)
    for name in names:
        host, record = train(name, RECIPES[name], pools)
        path = options.out / f"{name}.safetensors"
        write(host, path, record)
        record = describe(name, options.out) | {"training": record | {"cpu_seconds_of_drawing": drawing}}
        write(host, path, record)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(known | {name: record}, indent=2) + "\n")
        print(json.dumps(record, indent=2), flush=True)


def write(host: nn.Module, path: Path, record: dict[str, Any]) -> None:
    """Store the host's weights in half precision, with the record."""
    weights = {name: tensor.half().contiguous() for name, tensor in host.state_dict().items()}
    beside = path.with_suffix(".partial")
    safetensors.torch.save_file(weights, beside, metadata={"record": json.dumps(record)})
    beside.chmod(0o644)  # safetensors writes for the owner alone
    beside.replace(path)


def describe(name: str, folder: Path) -> dict[str, Any]:
    """What the stored host is and can do."""
    host: Any = load(name, folder)
    default = next(site for site in sites(host) if site.name == default_layer(host))
    images = Synthetic(64, seed=TEST_SEED).batch(range(64)).image
    with torch.no_grad():
        seconds = []
        for _ in range(3):
            started = time.process_time()
            host(images)
            seconds.append(time.process_time() - started)
    return {
        "architecture": BUILDERS[name].description,
        "parameters": sum(p.numel() for p in host.parameters()),
        "cpu_milliseconds_per_image": round(1e3 * min(seconds) / len(images), 2),
        "default_layer": {"name": default.name, "grid": list(default.grid), "leak": round(default.leak, 4)},
        "held_out": evaluate(host),
    }


# Training ------------------------------------------------------------------------------------------------------------


def train(name: str, recipe: Recipe, pools: Pool) -> tuple[nn.Module, dict[str, Any]]:
    """Return the trained host and the record of how.

    Args:
        name: of the host.
        recipe: its steps and hints.
        pools: what `draw_pools` returned.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    host: Any = prepare(build(name))
    hints = Hints(host, demo_host(), recipe.hints)
    optimizers = make_optimizers(host, hints)
    steps = recipe.close_ups + recipe.whole_pictures
    sources = {sort: batches(pools[sort], BATCH[sort], generator) for sort in BATCH}
    check = Synthetic(512, seed=CHECK_SEED).batch(range(512))
    for step in range(steps):
        # rises to 1, then falls to 0 at the last step
        pace = min((step + 1) / (WARM_UP * steps), (steps - step) / (steps - WARM_UP * steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * pace
        close = step < recipe.close_ups
        images, targets = next(sources["close-ups" if close else "whole pictures"])
        with torch.autocast("cpu", torch.bfloat16):
            if close:
                logits, error, _ = close_up_logits(host, hints, images, generator)
            else:
                logits, error, taught = hints(lambda pictures: host(pictures), images)
                targets = torch.lerp(targets, taught.float().softmax(dim=1), TEACHER)
        loss = F.cross_entropy(logits.float(), targets)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + error).backward()
        nn.utils.clip_grad_norm_(host.parameters(), 5.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % 100 == 0:
            accuracy = (predict(host, check.image) == check.label).float().mean().item()
            print(
                f"{name}: step {step + 1}/{steps}  loss {loss.item():.3f}  hints {error.item():.3f}  "
                f"accuracy {accuracy:.3f}  {time.process_time() - cpu:.0f} s",
                flush=True,
            )
    return host, {
        "script": "benchmarks/train_hosts.py",
        "recipe": asdict(recipe),
        "batch": BATCH,
        "pictures_drawn": {sort: len(images) for sort, (images, _) in pools.items()},
        "train_seeds": {"close-ups": TRAIN_SEED + 100, "whole pictures": TRAIN_SEED},
        "optimizer": f"Muon on the blocks' matrices, lr {MUON_LR}; AdamW on the rest, lr {ADAM_LR}; linear to 0",
        "precision": "bfloat16 autocast",
        "teacher": f"demo_host: hints, and {TEACHER} of the targets on whole pictures",
        "cpu_seconds": round(time.process_time() - cpu),
        "wall_seconds": round(time.perf_counter() - wall),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def prepare(host: Any) -> nn.Module:
    """Make an untrained host quicker to train."""
    for module in host.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # PyTorch's fused attention is half as fast in bfloat16 on CPUs
    if isinstance(host, VisionTransformer):
        side = host.patch_embed.grid_size[0]
        with torch.no_grad():  # it need not learn where the patches lie
            sines = build_sincos2d_pos_embed([side, side], host.embed_dim)
            positions: Any = host.pos_embed
            positions[0, host.num_prefix_tokens :] = 0.5 * sines
    return host


def make_optimizers(host: nn.Module, hints: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and MLPs, AdamW for all else."""
    matrices: list[nn.Parameter] = []
    others = list(hints.parameters())
    for name, parameter in host.named_parameters():
        inner = "blocks." in name and parameter.ndim == 2 and not name.endswith("relative_position_bias_table")
        (matrices if inner else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, MUON_LR, weight_decay=0.02),
        torch.optim.AdamW(others, ADAM_LR, betas=(0.9, 0.99)),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def predict(host: nn.Module, images: Tensor) -> Tensor:
    """Top class (B,) while training goes on."""
    host.eval()
    with torch.autocast("cpu", torch.bfloat16):
        top = torch.cat([host(part).argmax(dim=1) for part in images.split(128)])
    host.train()
    return top


# Pictures ------------------------------------------------------------------------------------------------------------


def draw_pools(counts: dict[str, int]) -> Pool:
    """Pictures (N, 3, H, W) as uint8 and class probabilities (N, K) of each sort, drawn once for all hosts."""
    draw = {"close-ups": close_ups, "whole pictures": training_batch}
    pools = {}
    for sort, count in counts.items():
        images, targets = zip(*(draw[sort](step) for step in range(count)), strict=True)
        pools[sort] = torch.cat([((i + 1) * 127.5).round().to(torch.uint8) for i in images]), torch.cat(targets)
    return pools


def batches(pool: tuple[Tensor, Tensor], size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in random order: images (size, 3, H, W), each time another variant, and class probabilities."""
    images, targets = pool
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(size):
            if len(rows) == size:
                yield vary(images[rows].float() / 127.5 - 1, generator), targets[rows]


def vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, flip and recolour: no class depends on it, and the pictures stay as likely as they were."""

    def die(faces: int, *shape: int) -> Tensor:
        return torch.randint(faces, shape, generator=generator)

    parts = []
    for part in images.chunk(8):
        part = part[:, torch.randperm(3, generator=generator)]
        part = part.flip(-1) if die(2, 1) else part
        parts.append(part.rot90(int(die(4, 1)), (-2, -1)))
    return torch.cat(parts) * (1.0 - 2.0 * die(2, len(images), 3, 1, 1))  # the negative of each channel or not


# Close-ups: four windows for the price of one picture ----------------------------------------------------------------


def close_up_logits(
    host: nn.Module, hints: Hints, windows: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (4B, K) of windows (4B, 3, 32, 32), and the error of the hints."""
    if isinstance(host, VisionTransformer):
        return hints(lambda pictures: window_logits(host, pictures, generator), windows)
    a, b, c, d = windows.chunk(4)
    mosaic = torch.cat([torch.cat([a, b], dim=3), torch.cat([c, d], dim=3)], dim=2)
    cells = 4 if isinstance(host, SwinTransformer) else 8  # a side of the last grid
    shift = torch.randint(cells, (2,), generator=generator).tolist()
    mosaic = mosaic.roll([SIZE // cells * s for s in shift], (2, 3))
    return hints(lambda pictures: quarter_logits(host, pictures, shift), mosaic)


def window_logits(host: Any, windows: Tensor, generator: torch.Generator) -> Tensor:
    """Run a ViT on the window's tokens alone, as if they lay somewhere in a whole picture."""
    tokens = host.patch_embed.proj(windows)  # (B, C, n, n)
    n, whole = tokens.shape[-1], host.patch_embed.grid_size[0]
    row, column = torch.randint(whole - n + 1, (2,), generator=generator).tolist()
    beside, places = host.pos_embed.split([host.num_prefix_tokens, whole * whole], dim=1)
    places = places.unflatten(1, (whole, whole))[:, row : row + n, column : column + n].flatten(1, 2)
    others = (torch.cat([host.cls_token, host.reg_token], dim=1) + beside).expand(len(windows), -1, -1)
    tokens = torch.cat([others, tokens.flatten(2).transpose(1, 2) + places], dim=1)
    return host.forward_head(host.norm(host.blocks(tokens)))


def quarter_logits(host: Any, mosaic: Tensor, shift: list[int]) -> Tensor:
    """Classify the features of each quarter of a mosaic by themselves, which was shifted by so many cells."""
    features = host.forward_features(mosaic)
    grid = grid_of(host, features).roll([-s for s in shift], (1, 2))
    quarters = torch.cat([part for half in grid.chunk(2, dim=1) for part in half.chunk(2, dim=2)])
    return host.forward_head(quarters if features.ndim == 4 else quarters.flatten(1, 2))


if __name__ == "__main__":
    main()

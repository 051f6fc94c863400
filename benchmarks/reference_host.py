"""The whole path on a real host and real images: fit on training images, attribute validation images, look, measure.

    python benchmarks/reference_host.py --data FOLDER --weights FILE [--steps N] [--images 1000] [--reads gradient]
    python benchmarks/reference_host.py --data FOLDER --weights FILE --fitted FOLDER   # a bottleneck of quality.py

FOLDER holds train.tar, val.tar and boxes.csv (file, corners, split); FILE a timm resnet18 with one output a class, for
128 px. Writes to benchmarks/results/reference_host/: figures.json (fit time, bits per image, agreement, share of the
map inside the boxes against a centred Gaussian and Grad-CAM, with standard errors), contact_sheet.png, and the fitted
bottleneck's folder into --out. Nothing is chosen on the validation images.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import ib_explain as ibx
from ib_explain.commands.common import class_folders
from ib_explain.data import BoxImages, open_dataset, preprocess, read_boxes
from ib_explain.hosts import class_names, load_host
from ib_explain.io import versions
from ib_explain.metrics import boxes_to_masks, centred_gaussian, energy_inside, pointing_game
from ib_explain.visualize import contact_sheet

RESULTS = Path(__file__).parent / "results" / "reference_host"
SIZE = (128, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("reference-ib"))
    parser.add_argument("--fitted", type=Path, help="a saved bottleneck, instead of a fit")
    parser.add_argument("--reads", default="gradient")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    host = load_host("resnet18", checkpoint=options.weights, num_classes=100, input_size=SIZE)
    host.pretrained_cfg["input_size"] = (3, *SIZE)
    pictures = preprocess(host, size=SIZE, crop_pct=1.0, crop_mode="squash", interpolation="bilinear")

    if options.fitted:
        ib = ibx.IBAttention.load(options.fitted, host)
    else:
        train = DataLoader(open_dataset(options.data / "train.tar", transform=pictures), batch_size=32, shuffle=True)
        ib = ibx.IBAttention(host, reads=options.reads, seed=options.seed)
        ib.fit(train, steps=options.steps, checkpoint=options.out.with_name(options.out.name + "-run"), resume=True)
        ib.save(options.out)

    boxes = read_boxes(options.data / "boxes.csv", split="val")
    val = BoxImages(open_dataset(options.data / "val.tar"), boxes, pictures)
    chosen = torch.randperm(len(val), generator=torch.Generator().manual_seed(options.seed))[: options.images]
    loader = DataLoader(
        torch.utils.data.Subset(val, chosen.tolist()), batch_size=options.batch, collate_fn=BoxImages.collate
    )
    names = class_names(host, folders=class_folders(val.images))
    figures = measure(host, ib, loader, names)
    record = {k: v for k, v in (ib.record or {}).items() if k not in ("history", "data", "versions")}
    figures |= {
        "fit": record,
        "images": len(chosen),
        "device": f"CPU, {torch.get_num_threads()} threads" if not torch.cuda.is_available() else "CUDA",
        "command": " ".join(["python", "benchmarks/reference_host.py", *(os.path.basename(a) for a in sys.argv[1:])]),
        "versions": versions(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"figures_{ib.reads}.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def measure(
    host: torch.nn.Module, ib: ibx.IBAttention, loader: DataLoader, names: list[str] | None
) -> dict[str, object]:
    """Means over images with standard errors; one page of pictures on the way."""
    rows: dict[str, list[Tensor]] = {}
    shown: list[tuple[Tensor, Tensor]] = []
    titles: list[str] = []
    for batch in loader:
        x = batch.image
        masks = boxes_to_masks(batch.boxes, SIZE)
        with torch.no_grad():
            own = host(x).argmax(1)
            with ib.restrict() as restricted:
                kept = restricted(x).argmax(1)
        maps = {
            "ib": ib.attribute(x),
            "grad_cam": ibx.attribute(host, x, method="grad_cam"),
            "grad_cam_layer3": ibx.attribute(host, x, method="grad_cam", layer="layer3"),
            "center_gaussian": centred_gaussian(SIZE).expand(len(x), 1, *SIZE),
        }
        rows.setdefault("bits", []).append(maps["ib"].sum(dim=(1, 2, 3)))
        rows.setdefault("agreement", []).append((own == kept).float())
        rows.setdefault("accuracy", []).append((own == batch.label).float())
        rows.setdefault("box_share", []).append(masks.float().mean(dim=(1, 2, 3)))
        for name, heat in maps.items():
            rows.setdefault(f"energy_inside/{name}", []).append(energy_inside(heat, masks))
            rows.setdefault(f"pointing/{name}", []).append(pointing_game(heat, masks))
        if sum(len(s[0]) for s in shown) < 36:
            shown.append((x, maps["ib"]))
            for said, label in zip(own.tolist(), batch.label.tolist(), strict=True):
                titles.append((names[said] if names else f"class {said}") + ("" if said == label else " (wrong)"))
    x, heat = (torch.cat(parts)[:36] for parts in zip(*shown, strict=True))
    RESULTS.mkdir(parents=True, exist_ok=True)
    contact_sheet(x, heat, RESULTS / f"contact_sheet_{ib.reads}.png", model=host, titles=titles[:36])
    result: dict[str, object] = {}
    for name, parts in rows.items():
        values = torch.cat(parts)
        values = values[torch.isfinite(values)]
        error = values.std().item() / math.sqrt(len(values))
        result[name] = {"mean": round(values.mean().item(), 4), "standard_error": round(error, 4), "n": len(values)}
    return result


if __name__ == "__main__":
    main()

"""Several methods on the same pictures, side by side, and how much of each map lies on the evidence.

python examples/compare_methods.py [--images 64]
"""

import argparse

import ib_explain as ibx
from ib_explain.data import CLASS_NAMES, Synthetic, demo_host
from ib_explain.metrics.localisation import energy_inside, pointing_game

METHODS = ["ib", "grad_cam", "layer_cam", "hires_cam"]  # any of ibx.available_methods()

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--images", type=int, default=64, help="pictures to compare on")
args = parser.parse_args()

model = demo_host()
drawn = Synthetic(args.images, seed=2).batch(range(args.images))
layer = ibx.default_layer(model)
print(f"all at {layer!r}; the evidence covers {drawn.mask.float().mean():.1%} of the pictures")

maps = {}
for name in METHODS:
    maps[name] = ibx.attribute(model, drawn.image, target=drawn.label, method=name, layer=layer)
    # NaN stands for a map without any heat: a miss.
    inside = energy_inside(maps[name], drawn.mask).nan_to_num(0).mean()
    pointing = pointing_game(maps[name], drawn.mask).nan_to_num(0).mean()
    print(f"{name:<10}  map inside {inside:6.1%}   peak inside {pointing:6.1%}")

shown = {name: heat[:4] for name, heat in maps.items()}
units = {name: "bits" if name == "ib" else name for name in METHODS}  # a scale of its own for each
titles = [CLASS_NAMES[k] for k in drawn.label[:4].tolist()]
ibx.visualize(drawn.image[:4], shown, model=model, titles=titles, unit=units).savefig("compare_methods.png")
print("wrote compare_methods.png")

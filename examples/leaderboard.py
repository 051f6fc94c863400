"""A leaderboard on the package's own pictures: a fitted bottleneck beside other methods, and a page to look at.

python examples/leaderboard.py [--steps 200] [--images 128]
"""

import argparse

from torch.utils.data import DataLoader

import ib_explain as ibx
from ib_explain.data import Synthetic, demo_host

OTHERS = ["grad_cam", "layer_cam", "br_npa", "integrated_gradients", "center_gaussian", "random"]

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=200, help="steps of the fit")
parser.add_argument("--images", type=int, default=128, help="pictures to compare on")
args = parser.parse_args()

model = demo_host()  # any timm model in eval mode
loader = DataLoader(Synthetic(32 * min(args.steps, 64), seed=1), batch_size=32, shuffle=True)
ib = ibx.IBAttention(model).fit(loader, steps=args.steps)

board = ibx.benchmark(
    model,
    Synthetic(args.images, seed=2),
    methods={"ib": ib, **{name: name for name in OTHERS}},
    metrics=["insertion", "deletion", "road", "energy_inside", "forward_passes"],
    out="leaderboard",  # goes on where it was stopped, and is not written over
    data_name="synthetic pictures",
)
print(board)
print("wrote leaderboard/report.html")

"""Two objects in a picture: `target=` asks where the evidence for each of them is.

python examples/class_conditional.py [--steps 100]
"""

import argparse

from torch.utils.data import DataLoader

import ib_explain as ibx
from ib_explain.data import CLASS_NAMES, Synthetic, demo_host

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=100, help="steps of the fit")
parser.add_argument("--images", type=int, default=1024, help="pictures to fit on")
args = parser.parse_args()

model = demo_host()
loader = DataLoader(Synthetic(args.images, seed=1), batch_size=64, shuffle=True)
ib = ibx.IBAttention(model).fit(loader, steps=args.steps)

pairs = Synthetic(64, seed=2, pairs=True).batch(range(64))
both = [ib.attribute(pairs.image, target=pairs.label[:, k]) for k in (0, 1)]
for k in (0, 1):
    on_objects = (both[k] * pairs.mask).sum(dim=(2, 3))  # (B, 2): heat on each of the two
    share = (on_objects[:, k] / on_objects.sum(dim=1)).nanmean()
    print(f"asked for object {k + 1}: {share:.0%} of the heat on objects is on it (chance: 50%)")

names = [[CLASS_NAMES[c] for c in row] for row in pairs.label[:3].tolist()]
shown = {"first object": both[0][:3], "second object": both[1][:3]}
titles = [f"{first}, {second}" for first, second in names]
ibx.visualize(pairs.image[:3], shown, model=model, titles=titles).savefig("class_conditional.png")
print("wrote class_conditional.png")

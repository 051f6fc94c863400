"""What speaks for a class and what against it: relevance, in label bits whose sum is what the model knows of the class.

python examples/for_and_against.py [--steps 200]
"""

import argparse

import ib_explain as ibx
from ib_explain.data import CLASS_NAMES, Synthetic, demo_host

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=200, help="steps of the fit")
parser.add_argument("--images", type=int, default=1024, help="pictures to fit on")
args = parser.parse_args()

model = demo_host()
pictures = Synthetic(args.images, seed=1, pairs=True).batch(range(args.images)).image
ib = ibx.IBAttention(model, relevance=True).fit(pictures.split(64), steps=args.steps)

pairs = Synthetic(4, seed=2, pairs=True).batch(range(4))
maps = {}
for k, which in enumerate(("first", "second")):
    heat = ib.attribute(pairs.image, target=pairs.label[:, k], output="relevance")
    own = (heat * pairs.mask[:, k : k + 1]).sum(dim=(1, 2, 3))
    other = (heat * pairs.mask[:, 1 - k : 2 - k]).sum(dim=(1, 2, 3))
    print(f"asked for the {which} object: it brings {own.mean():.2f} bits of its class, the other {other.mean():.2f}")
    maps[f"{which} object"] = heat

titles = [", ".join(CLASS_NAMES[c] for c in row) for row in pairs.label.tolist()]
ibx.visualize(pairs.image, maps, model=model, titles=titles, unit="label bits").savefig("for_and_against.png")
print("wrote for_and_against.png")

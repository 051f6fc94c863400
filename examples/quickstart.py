"""The README's ten lines on the package's own pictures and classifier: no data, no download.

python examples/quickstart.py [--steps 100]
"""

import argparse

from torch.utils.data import DataLoader

import ib_explain as ibx
from ib_explain.data import CLASS_NAMES, Synthetic, demo_host

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=100, help="steps of the fit")
parser.add_argument("--images", type=int, default=1024, help="pictures to fit on")
args = parser.parse_args()

model = demo_host()  # any timm model in eval mode
loader = DataLoader(Synthetic(args.images, seed=1), batch_size=64, shuffle=True)
drawn = Synthetic(4, seed=2).batch(range(4))
x = drawn.image

heat = ibx.attribute(model, x)  # (B, 1, H, W), bits; nothing fitted: optimised for these images
# Of features normalised by noise images, so on another scale than the bits of a fit on training images.
print("per image:", [f"{bits:.0f} bits" for bits in heat.sum(dim=(1, 2, 3)).tolist()])

ib = ibx.IBAttention(model).fit(loader, steps=args.steps)  # trains the bottleneck, never the model
heat = ib.attribute(x)
print("fitted:   ", [f"{bits:.0f} bits" for bits in heat.sum(dim=(1, 2, 3)).tolist()])

ib.save("quickstart-ib")
ib = ibx.IBAttention.load("quickstart-ib", model)
names = [CLASS_NAMES[k] for k in model(x).argmax(dim=1).tolist()]
ibx.visualize(x, heat, model=model, titles=names).savefig("quickstart.png")
print("wrote quickstart-ib/ and quickstart.png")

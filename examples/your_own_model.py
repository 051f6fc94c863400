"""Any `nn.Module` that maps (B, 3, H, W) to (B, K) can be the host; name the layer, or let the rule choose.

python examples/your_own_model.py [--steps 150]
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader

import ib_explain as ibx
from ib_explain.data import Synthetic


class Classifier(nn.Module):
    """A plain network, nothing of timm's."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Sequential:
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())

        self.early = nn.Sequential(block(3, 32), block(32, 64))
        self.late = block(64, 128)
        self.classify = nn.Linear(128, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.late(self.early(x)).mean(dim=(2, 3)))


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=150, help="steps to train the model, and to fit the bottleneck")
args = parser.parse_args()

torch.manual_seed(0)
model = Classifier()
loader = DataLoader(Synthetic(64 * args.steps, seed=1), batch_size=64, num_workers=0)
optimiser = torch.optim.Adam(model.parameters(), 3e-3)
for x, label in loader:
    loss = nn.functional.cross_entropy(model(x), label)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
model.eval()
print(f"trained for {args.steps} steps, loss {loss.item():.2f}")

for site in ibx.sites(model, input_size=(3, 64, 64)):
    print(f"{site.name:<10} {site.channels} channels on {site.grid}, leak {site.leak:.1%}, effect {site.effect:.0%}")

ib = ibx.IBAttention(model, layer="early").fit(loader, steps=args.steps)
drawn = Synthetic(4, seed=2).batch(range(4))
heat = ib.attribute(drawn.image)
ibx.visualize(drawn.image, heat, mean=0.5, std=0.5).savefig("your_own_model.png")
print(f"{heat.sum(dim=(1, 2, 3)).mean():.0f} bits per image; wrote your_own_model.png")

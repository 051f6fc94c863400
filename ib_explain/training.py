"""The training loop's step: what a batch costs, what moves the attention, and what a run carries over.

The loss is the target's cross-entropy behind the bottleneck plus beta times the rate (`ib_explain.objective`). Beta is
found, not tuned: it is a fixed multiple of what is at stake in each image, the divergence of the host's prediction from
that with nothing let through. So one default carries over from layer to layer and host to host, whatever their widths,
the number of classes and the scale of the logits. Images whose class the host sees in average content as well have no
say in it: nothing that passes could keep what is not lost, and they would teach the attention to close.

An attention that reads no gradient is fitted with one all the same: it prices the places. It has to learn where the
evidence is before it closes, so the rate's weight rises to beta over the first 18 % of its fit: for a class that it
closes for too early it would stay closed, since a closed gate says little of what an open one would show.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ib_explain.bottleneck.anchors import Anchors
from ib_explain.bottleneck.module import Bottleneck
from ib_explain.data.batches import Share
from ib_explain.modules import host_device, host_dtype
from ib_explain.objective import BETA_PER_STAKE, location_price, nats_at_stake, rate, worth_fitting
from ib_explain.observation import Observation, observe
from ib_explain.places import Place
from ib_explain.randomness import generator_of, normal, uniform
from ib_explain.relevance import LEAST_TYPICAL_BITS, coalitions, label_information, regression_loss

__all__ = ["PRECISIONS", "UPDATES", "FitSettings", "Trainer"]

UPDATES = 2  # of the weights on each batch: they share the clean pass, which costs as much as the restricted one
BETA_RISES = 0.18  # share of the batches, of a fit without the gradient
SHUT = 0.01  # of the batch's mean bits: an image with fewer, whose answer is lost by it, counts as shut out
LOOK_AGAIN = 8  # batches until the fully closed and the fully open bottleneck are looked at again
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FitSettings:
    """All that decides a fit, besides data and host.

    Attributes:
        steps: number of batches, with `UPDATES` steps of the optimiser on each.
        beta: weight of the rate in the loss; None for `BETA_PER_STAKE` times what is at stake in each image.
        lr: peak learning rate of Adam; one cosine cycle with a short warm-up.
        objective: "prediction" draws targets from the host's own predictive distribution, "label" takes the labels.
        precision: "fp32", "bf16" or "fp16"; statistics, gate and bits are float32 in any case.
        seed: decides initial weights, order of data, targets and noise.
    """

    steps: int
    beta: float | None
    lr: float
    objective: str
    precision: str
    seed: int


class _Terms(NamedTuple):
    """What the loss needs from a clean pass, the same for all steps on it: (B,) each, the price (B, 1, h, w)."""

    stake: Tensor
    beta: Tensor
    price: Tensor
    worth: Tensor
    intact: Tensor
    """Cross-entropy of the target without a bottleneck."""


class _StepMetrics(NamedTuple):
    """Metrics of one optimiser step: scalars, means over its images or, the last three, counts of them."""

    loss: Tensor
    lost: Tensor
    """Nats of cross-entropy that the bottleneck costs."""
    bits: Tensor
    attention: Tensor
    stake: Tensor
    beta: Tensor
    relevance_error: Tensor
    agreed: Tensor
    shut: Tensor
    asked: Tensor
    """For whose top-1 the attention was."""


class Trainer:
    """One fit: the optimiser, beta, and running figures. `state` and `load` carry it over an interruption."""

    def __init__(
        self,
        bottleneck: Bottleneck,
        host: nn.Module,
        place: Place,
        share: Share,
        settings: FitSettings,
        accelerator: Accelerator,
    ) -> None:
        self.bottleneck, self.host, self.place = bottleneck, host, place
        self.share, self.settings, self.accelerator = share, settings, accelerator
        anchors = list(bottleneck.anchors.parameters()) if bottleneck.anchors is not None else []
        network = list(bottleneck.network.parameters())
        self.parameters = [*network, *anchors]
        groups = [{"params": network, "lr": settings.lr}]
        if anchors:
            groups.append({"params": anchors, "lr": Anchors.LEARNING_RATE})
        if bottleneck.relevance is not None:
            relevance = list(bottleneck.relevance.parameters())
            self.parameters += relevance
            groups.append({"params": relevance, "lr": settings.lr})
        self.optimiser = torch.optim.Adam(groups)
        device = host_device(host)
        halved = settings.precision == "fp16" or host_dtype(host) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=halved)
        # No cache: it is emptied when the outermost autocast ends, and the weights change before that.
        self.autocast = functools.partial(
            torch.autocast,
            device.type,
            PRECISIONS[settings.precision],
            enabled=settings.precision != "fp32",
            cache_enabled=False,
        )
        self.peaks = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.step_number, self.images = 0, 0
        self.closed: Tensor | None = None  # what the host says with nothing let through: running mean of p, (1, K)
        self.grid_alone = 1.0  # share of the answers that the intact grid keeps with all beside it held: running mean
        self.figures: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self._seconds_before, self._started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the fit began, the time between an interruption and its continuation left out."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def classes(self) -> int | None:
        """The host's, known from the first step on."""
        return None if self.closed is None else self.closed.shape[1]

    def step(self, x: Tensor, labels: Tensor | None) -> None:
        """One clean pass of a batch, and `UPDATES` steps of the optimiser on it, each with noise of its own."""
        first, *later = (
            _BatchNoise(self.settings.seed, self.step_number * (1 + UPDATES) + part, len(x), self.share, x.device)
            for part in range(1 + UPDATES)
        )
        with self.autocast():
            seen = observe(
                self.host,
                self.place.site,
                x,
                self._targets(labels, first),
                deeper=self.place.deeper,
                gradient=True,
            )
        if self.step_number % LOOK_AGAIN == 0:
            self._look_at_both_ends(seen, first)
        terms = self._terms(seen)
        number = self.step_number * UPDATES
        metrics = [self._update(seen, terms, noise, number + part) for part, noise in enumerate(later)]
        self._follow(metrics)
        self.step_number += 1
        self.images += len(x) * self.share.world
        if self.step_number % 10 == 1:
            self.history.append({"step": self.step_number - 1, **{k: round(v, 5) for k, v in self.figures.items()}})

    def _terms(self, seen: Observation) -> _Terms:
        assert self.closed is not None
        closed = self.closed.clamp_min(1e-30).log()
        stake = nats_at_stake(seen.logits, closed)
        worth = worth_fitting(seen.logits, closed, seen.target)
        # A batch in which no image tells more than average content (an untrained host's) still moves the attention.
        worth = torch.where(self._mean_over_processes(worth.sum()) > 0, worth, torch.ones_like(worth))
        beta = BETA_PER_STAKE * stake if self.settings.beta is None else torch.full_like(stake, self.settings.beta)
        if not self.bottleneck.gradient:
            beta = beta * min(1.0, (self.step_number + 1) / (BETA_RISES * self.settings.steps))
        return _Terms(
            stake=stake,
            beta=beta,
            price=location_price(seen),
            worth=worth,
            intact=F.cross_entropy(seen.logits.float(), seen.target, reduction="none"),
        )

    def _update(self, seen: Observation, terms: _Terms, noise: _BatchNoise, number: int) -> _StepMetrics:
        """Step `number` of the optimiser."""
        bottleneck = self.bottleneck
        with self.autocast():
            attention = bottleneck.attend(seen, noise.normal((1, *self.place.site.grid)))
            restricted = bottleneck.restriction.apply_to(
                seen, self.place.site.layout, attention.value, noise.normal(seen.features.shape[1:])
            )
            logits = seen.tail(restricted).float()
        kept = F.cross_entropy(logits, seen.target, reduction="none")  # (B,)
        passed = bottleneck.restriction.bits(seen, attention.value)  # (B, 1, h, w)
        cost = rate(passed, terms.price, seen.features.shape[1])  # (B,)
        loss = (terms.worth * (kept + terms.beta * cost)).mean() + attention.loss
        error = loss.new_zeros(()) if bottleneck.relevance is None else self._relevance_error(seen, noise, number)
        self._schedule(number)
        self.optimiser.zero_grad()
        self.scaler.scale(loss + error).backward()
        self._join_gradients()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        # Agreement is asked of the top-1's own attention: another class's keeps evidence against the top-1.
        top = seen.logits.argmax(1)
        asked, agreed = seen.target == top, logits.argmax(1) == top
        bits = passed.sum(dim=(1, 2, 3))
        shut = asked & ~agreed & (bits < SHUT * bits.mean())
        return _StepMetrics(
            loss=loss.detach(),
            lost=(kept - terms.intact).detach().mean(),
            bits=bits.detach().mean(),
            attention=attention.mean.detach().mean(),
            stake=terms.stake.mean(),
            beta=terms.beta.mean(),
            relevance_error=error.detach(),
            agreed=(asked & agreed).sum(),
            shut=shut.sum(),
            asked=asked.sum(),
        )

    def state(self) -> dict[str, Any]:
        """Everything a later run needs to go on: {"tensors": ..., "run": ...}."""
        tensors: dict[str, Tensor] = {}
        for index, values in self.optimiser.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"{index}.{name}"] = torch.as_tensor(value, device="cpu").detach().cpu().contiguous()
        if self.closed is not None:
            tensors["closed"] = self.closed.cpu()
        run = {
            "step": self.step_number,
            "images": self.images,
            "seconds": self.seconds,
            "grid_alone": self.grid_alone,
            "figures": self.figures,
            "history": self.history,
            "settings": asdict(self.settings),
            "scaler": self.scaler.state_dict(),
        }
        return {"tensors": tensors, "run": run}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: it is damaged.
        """
        run, tensors = state["run"], dict(state["tensors"])
        expected = {f"{i}.{key}": p.shape for i, p in enumerate(self.parameters) for key in ("exp_avg", "exp_avg_sq")}
        expected |= {f"{i}.step": torch.Size() for i in range(len(self.parameters))}
        found = {name: value.shape for name, value in tensors.items() if name != "closed"}
        steps = self.settings.steps
        if found != expected or "closed" not in tensors or not 0 < run["step"] <= steps:
            wrong = sorted({*found.items()} ^ {*expected.items()})
            what = f"{wrong[0][0]} is missing or of another shape" if wrong else f"step {run['step']} of {steps}"
            raise ValueError(f"the checkpoint is damaged: {what}")
        self.closed = tensors.pop("closed").to(self.parameters[0].device)
        optimiser = self.optimiser.state_dict()
        optimiser["state"] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            optimiser["state"].setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict(optimiser)
        self.scaler.load_state_dict(run["scaler"])
        self.step_number, self.images, self._seconds_before = run["step"], run["images"], run["seconds"]
        self.grid_alone, self.figures, self.history = run["grid_alone"], run["figures"], run["history"]

    def _targets(self, labels: Tensor | None, noise: _BatchNoise) -> Callable[[Tensor], Tensor] | Tensor:
        if self.settings.objective == "label":
            if labels is None:
                raise ValueError(
                    "objective='label' needs data that yields (images, labels), got images alone or labels of -1"
                )
            return labels
        return lambda logits: noise.draw(logits.float().softmax(dim=1))

    def _schedule(self, number: int) -> None:
        total = UPDATES * self.settings.steps
        warmup = min(20, total // 10 + 1)
        factor = min(1.0, (number + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * number / total))
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * max(factor, 1e-3)

    def _join_gradients(self) -> None:
        """Mean of the gradients over processes, in one message."""
        if self.share.world == 1:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _look_at_both_ends(self, seen: Observation, noise: _BatchNoise) -> None:
        """What the host says with nothing let through, and how often it says the same with the whole grid."""
        mixed = noise.normal(seen.features.shape[1:])
        shut, wide = torch.zeros((), device=mixed.device), torch.ones((), device=mixed.device)
        now = self._mean_over_processes(self._logits(seen, shut, mixed).softmax(dim=1).mean(dim=0, keepdim=True))
        self.closed = now if self.closed is None else 0.7 * self.closed + 0.3 * now
        if self.place.site.layout.has_side and self.bottleneck.restriction.gate.measures_bits:
            same = self._logits(seen, wide, mixed).argmax(1) == seen.logits.argmax(1)
            share = self._mean_over_processes(same.float().mean()).item()
            looks = self.step_number // LOOK_AGAIN
            self.grid_alone = (self.grid_alone * looks + share) / (looks + 1)

    def _logits(self, seen: Observation, attention: Tensor, noise: Tensor) -> Tensor:
        """What the host says where this attention decides what passes, (B, K) float32, without gradient."""
        restriction, layout = self.bottleneck.restriction, self.place.site.layout
        with torch.no_grad(), self.autocast():
            return seen.tail(restriction.apply_to(seen, layout, attention, noise)).float()

    def _relevance_error(self, seen: Observation, noise: _BatchNoise, number: int) -> Tensor:
        """Of a random set of positions in each image, and of all others: see `regression_loss`."""
        bottleneck = self.bottleneck
        chosen = coalitions(noise.uniform(), noise.normal((1, *self.place.site.grid)))
        mixed = noise.normal(seen.features.shape[1:])
        nothing = self._logits(seen, torch.zeros_like(chosen), mixed)
        closed, typical = bottleneck.get_buffer("closed"), bottleneck.get_buffer("typical_bits")
        now = self._mean_over_processes(nothing.log_softmax(dim=1).mean(dim=0, keepdim=True))
        closed.lerp_(now, 1 / (number + 1))  # the mean of all steps
        total = label_information(seen.logits, closed, seen.target).abs().mean()
        typical.lerp_(self._mean_over_processes(total), 1 / (number + 1)).clamp_min_(LEAST_TYPICAL_BITS)
        by_chance = label_information(nothing, closed, seen.target)
        with self.autocast():
            relevance = bottleneck.label_bits(seen)
        error = relevance.new_zeros(())
        for passing in (chosen, 1 - chosen):
            worth = label_information(self._logits(seen, passing, mixed), closed, seen.target)
            # Of small sets the noise says more than they do; what it says alone is known, and zero in the mean.
            worth = worth - (1 - passing.mean(dim=(1, 2, 3))) * by_chance
            error = error + regression_loss(relevance / typical, passing, worth / typical).mean() / 2
        return error

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        return values if self.share.world == 1 else self.accelerator.reduce(values, reduction="mean")

    def _follow(self, metrics: list[_StepMetrics]) -> None:
        """Take the metrics of the steps on a batch into the running figures: the same on every process."""
        rows = torch.stack([torch.stack([value.float() for value in one]) for one in metrics])
        for values in self._mean_over_processes(rows).tolist():  # one look at the device for all of them
            found = dict(zip(_StepMetrics._fields, values, strict=True))
            whole = found["loss"] + found["relevance_error"]
            if not math.isfinite(whole):
                raise FloatingPointError(
                    f"the loss became {whole} at step {self.step_number}; try a smaller lr or fp32"
                )
            now = {name: found[name] for name in ("loss", "bits", "attention")}
            now |= {"lost": found["lost"] / found["stake"], "beta": found["beta"]}
            if self.bottleneck.relevance is not None:
                now["relevance_error"] = found["relevance_error"]
            asked = found["asked"]
            now["agreement"] = found["agreed"] / asked if asked else self.figures.get("agreement", 1.0)
            now["shut"] = found["shut"] / asked if asked else self.figures.get("shut", 0.0)
            old = self.figures or now
            self.figures = {name: 0.95 * old[name] + 0.05 * value for name, value in now.items()}


class _BatchNoise:
    """Random numbers of one use of a batch. They belong to the images of the global batch, not to a process."""

    def __init__(self, seed: int, use: int, batch: int, share: Share, device: torch.device) -> None:
        self.generator = generator_of((seed * 1_000_003 + use) * 7919 + 17, device)
        self.batch, self.share, self.device = batch, share, device

    def normal(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """N(0, 1) for this process's images, (B, *shape)."""
        return self._mine(normal(self.generator, self.batch * self.share.world, *shape))

    def uniform(self) -> Tensor:
        """In [0, 1), (B, 1)."""
        return self._mine(uniform(self.generator, self.batch * self.share.world, 1))

    def draw(self, probabilities: Tensor) -> Tensor:
        """One class for each row of (B, K) probabilities."""
        drawn = (probabilities.cumsum(dim=1) < self.uniform()).sum(dim=1)
        return drawn.clamp_max(probabilities.shape[1] - 1)

    def _mine(self, values: Tensor) -> Tensor:
        return values[self.share.rank * self.batch : (self.share.rank + 1) * self.batch]

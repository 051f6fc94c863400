"""Hosts as people build them: they resize, crop, count, draw random numbers, or return something else than logits."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain import buffers
from ib_explain.data import demo_host
from ib_explain.lending import run_host
from ib_explain.methods import NotApplicable
from tests.states import assert_same, state


class Net(nn.Module):
    """A small CNN; its variants change what goes in or comes out."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.a, self.b, self.head = nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 5)
        self.act = nn.ReLU()
        self.register_buffer("centre", torch.zeros(32))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "squash":
            x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        elif self.kind == "crop":
            x = x[..., 16:-16, 16:-16]
        elif self.kind == "pad":
            x = F.pad(x, (12, 12, 12, 12))
        x = self.act(self.a(x))
        if self.kind == "in place":
            x.mul_(2)
        x = self.b(x).relu()
        if self.kind == "quarter":
            x = x[..., : x.shape[2] // 2, : x.shape[3] // 2]
        pooled = x.mean((2, 3))
        if self.kind in ("moves", "moves hidden", "replaces"):
            self.passes += 1
            moved = self.centre * 0.9 + pooled.detach().mean(0)
            if self.kind == "replaces":
                self.centre = moved
            else:
                (self.centre if self.kind == "moves" else self.centre.data).copy_(moved)
            pooled = pooled - self.centre
        if self.kind == "random":
            pooled = F.dropout(pooled, 0.5, training=True)
        return self.head(pooled)


class Raster(nn.Module):
    """Its positions go through an MLP one by one, folded into the batch in raster order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.mlp, self.head = (
            nn.Conv2d(3, 16, 8, 8),
            nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        count, channels = x.shape[:2]
        x = self.mlp(x.permute(0, 2, 3, 1).reshape(-1, channels))
        return self.head(x.view(count, -1, channels).mean(1))


class Wrapped(nn.Module):
    def __init__(self, host: nn.Module, output: str) -> None:
        super().__init__()
        self.host, self.output = host, output

    def forward(self, x: Tensor):
        logits = self.host(x)
        return {
            "dict": {"logits": logits, "loss": logits.sum()},
            "softmax": logits.softmax(1),
            "sigmoid": logits.sigmoid(),
            "log_softmax": logits.log_softmax(1),
        }[self.output]


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 128), (96, 64)])
def test_a_host_that_squashes_its_images_has_the_grid_it_has(size):
    host = Net("squash").eval()
    site = {site.name: site for site in ibx.sites(host, (3, *size))}["b"]
    assert (site.grid, site.layout.axes, site.channels, site.layout.verified) == ((16, 16), (2, 3), 32, "probe")
    ib = ibx.IBAttention(host)
    assert ib.attribute(torch.randn(2, 3, *size)).shape == (2, 1, *size)
    assert ib.site.grid == (16, 16)


def test_positions_folded_into_the_batch_in_raster_order(pictures):
    ib = ibx.IBAttention(Raster().eval(), "mlp")
    ib.attribute(pictures)
    assert (ib.site.grid, ib.site.channels, ib.site.layout.fold, ib.site.layout.verified) == ((8, 8), 16, 64, "probe")


@pytest.mark.parametrize("kind", ["crop", "pad"])
def test_a_host_that_crops_or_pads_is_told(kind, pictures):
    with pytest.warns(
        UserWarning, match=r"grid of layer '(a|act|b)' does not cover the image .*: the model crops or pads it"
    ):
        ibx.attribute(Net(kind).eval(), pictures, steps=1)
    untrained = timm.create_model("resnet18", num_classes=5).eval()  # whose branches start at zero
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ibx.attribute(untrained, pictures, layer="layer3", steps=1)
    for size in ((64, 64), (66, 71), (9, 9)):  # pixels that are left over at the border are no crop
        assert all(site.layout.aligned for site in ibx.sites(Net().eval(), (3, *size)))


@pytest.mark.parametrize("kind", ["moves", "moves hidden", "replaces"])
def test_buffers_that_each_pass_moves_come_back(kind, pictures):
    host = Net(kind).eval()
    before, centre = state(host), host.centre
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of weights that were changed since the fit, say
        ibx.sites(host, (3, 64, 64))
        ib = ibx.IBAttention(host).fit([pictures, pictures + 1], steps=2, show_progress=False)
        ib.attribute(pictures, refine=1)
        ibx.attribute(host, pictures, method="grad_cam", layer="b")
        ibx.benchmark(host, [pictures], methods=[ib, "edges"], metrics=["insertion"], show_progress=False)
    assert_same(state(host), before)
    assert host.centre is centre


class Cache(Net):
    """Keeps a grid of the images' size, and beside it the size that it is of."""

    def __init__(self) -> None:
        super().__init__()
        self.size: tuple[int, ...] = ()
        self.register_buffer("grid", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.size != tuple(x.shape[2:]):
            self.size = tuple(x.shape[2:])
            self.grid = torch.arange(float(x.shape[2] * x.shape[3])) * x.shape[2]
        return super().forward(x)


def test_a_cache_of_the_images_size_stays_with_what_tells_its_size():
    host = Cache().eval()
    for size in ((64, 32), (32, 64), (64, 32)):
        ibx.attribute(host, torch.randn(2, 3, *size), method="saliency")
        assert host.size == size and host.grid[1] == size[0]


class Odd(Net):
    """Buffers of unusual kinds, of which two are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(4).to_sparse())
        self.register_buffer("expanded", torch.zeros(1).expand(5))
        self.register_buffer("graphed", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.expanded = self.expanded + 1
        self.graphed.mul_(0.9).add_(x.mean())
        return super().forward(x)


def test_buffers_of_unusual_kinds_come_back(pictures):
    host = Odd().eval()
    for _ in range(2):
        ibx.attribute(host, pictures, method="saliency")
    assert host.expanded.eq(0).all() and host.graphed == 0 and not host.graphed.requires_grad
    copy.deepcopy(host)


def test_a_host_that_was_moved_after_a_call_without_passes(pictures):
    host = Net("moves").eval()
    ibx.attribute(host, pictures, method="random")  # after which nothing is known of its buffers
    came, left = buffers._UNSETTLED[host]
    meta = {name: kept._replace(value=kept.value.to("meta")) for name, kept in left.items()}  # as from another device
    buffers._UNSETTLED[host] = came, meta
    assert torch.isfinite(ibx.attribute(host, pictures, method="saliency")).all()


def test_a_host_of_random_answers_is_told_as_such(pictures):
    told = "gives other logits each time for the same images, as with dropout in eval mode"
    with pytest.raises((ValueError, NotApplicable), match=told):
        ibx.attribute(Net("random").eval(), pictures)
    with pytest.warns(UserWarning, match=told):
        ibx.attribute(Net("random").eval(), pictures, layer="b", steps=1)


def test_a_few_probabilities_at_a_time_are_told_when_there_are_enough():
    host, x = Wrapped(demo_host(), "sigmoid").eval(), torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):  # 16 outputs a pass
            run_host(host, x)
    with pytest.warns(UserWarning, match="outputs look like probabilities"):
        run_host(host, x)


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_probabilities_in_place_of_logits_are_told_once(output):
    host, x = Wrapped(demo_host(), output).eval(), torch.randn(8, 3, 64, 64)
    with pytest.warns(UserWarning, match="outputs look like probabilities, and are explained as if they were logits"):
        ibx.attribute(host, x, steps=1)
    for quiet in (host, Wrapped(demo_host(), "log_softmax").eval()):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            ibx.attribute(quiet, x, steps=1)


class Outer(Net):
    """One of its modules is called with too little."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = WithMore()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_the_hosts_own_faults_stay_what_they_are(pictures):
    with pytest.raises(TypeError, match=r"WithMore.forward\(\) missing 1 required positional argument: 'mask'"):
        ibx.attribute(Outer().eval(), pictures, method="saliency")
    broken = Net().eval()
    broken.head = nn.Linear(32, 100)
    nn.init.constant_(broken.head.bias, torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # NaN is no probability
        with pytest.raises(ValueError, match="NaN"):
            ibx.attribute(broken, pictures, steps=1)


def test_a_head_of_zeros_gives_no_probabilities(pictures):
    host = Net().eval()
    host.head = nn.Linear(32, 100)
    for parameter in host.head.parameters():
        nn.init.zeros_(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ibx.sites(host, (3, 64, 64))


def test_other_outputs_are_told_with_the_way_out(pictures):
    told = r"got dict with 'logits', 'loss'; wrap it in a module whose forward returns the logits alone"
    with pytest.raises(ValueError, match=told):
        ibx.attribute(Wrapped(Net(), "dict").eval(), pictures)


class ByKeyword(Net):
    def forward(self, *, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixel_values)


class WithMore(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask)


@pytest.mark.parametrize("kind", [ByKeyword, WithMore])
def test_a_forward_that_takes_something_else_is_told_with_the_way_out(kind, pictures):
    with pytest.raises(ValueError, match="model must take the images as its one positional argument; wrap it"):
        ibx.attribute(kind().eval(), pictures)


def test_a_model_without_its_classifier_is_refused(pictures):
    headless = timm.create_model("test_resnet", num_classes=0).eval()
    with pytest.raises(ValueError, match=r"no classifier \(num_classes=0\): it returns features"):
        ibx.attribute(headless, pictures, steps=1)
    headed = copy.deepcopy(headless)
    headed.fc = nn.Linear(headed.num_features, 4)  # a head put in by hand
    assert torch.isfinite(ibx.attribute(headed, pictures, steps=1)).all()
    other = timm.create_model("test_convnext", num_classes=0).eval()
    other.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(other.num_features, 5))
    assert torch.isfinite(ibx.attribute(other, pictures, method="saliency")).all()


def test_a_fault_of_the_host_is_no_refusal_of_a_size(pictures):
    broken = timm.create_model("test_resnet", num_classes=4, global_pool="").eval()
    with pytest.raises(ValueError, match=r"runs neither on images of size \(3, 64, 64\) nor on those of its own"):
        ibx.attribute(broken, pictures)
    host = Net().eval()
    host.head = nn.Linear(33, 5)
    with pytest.raises(
        ValueError, match=r"refuses images of size \(3, 64, 64\), or its layers do not fit each other: .*mat1"
    ):
        ibx.attribute(host, pictures)


def test_refining_a_host_that_works_in_place_is_refused_in_words(pictures):
    ib = ibx.IBAttention(Net("in place").eval()).fit([pictures], steps=1, show_progress=False)
    assert torch.isfinite(ib.attribute(pictures)).all()
    with pytest.raises(ValueError, match="refine needs the gradient through the whole model, whose forward changes"):
        ib.attribute(pictures, refine=1)


def test_a_grid_that_is_read_in_part_is_told_as_such(pictures):
    with pytest.raises(
        NotApplicable, match=r"reaches in at least 50% of its positions \(at best \d+%, at '(a|act|b)'\)"
    ):
        ibx.attribute(Net("quarter").eval(), pictures, method="grad_cam")

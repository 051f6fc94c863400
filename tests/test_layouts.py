"""Layouts: found by the probe, read and written back bit for bit, refused with what was seen."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ib_explain.hooks import capture
from ib_explain.io import layout_from_json
from ib_explain.layouts import Layout, _of_size, leaves
from ib_explain.readings import finest_grid
from ib_explain.stripes import find_layouts, probe_images

SIZE = (3, 40, 60)
GRID = (10, 15)
CHANNELS = 8


class Pack(nn.Module):
    """The layer under test: a map (B, C, h, w) in, some arrangement of it out."""

    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(x)


class Host(nn.Module):
    """Patches of 4 -> `layer` -> logits; `unpack` undoes the arrangement."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor], channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.layer = Pack(pack)
        self.unpack = unpack
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.unpack(self.layer(self.stem(x))).tanh().mean(dim=(2, 3)))


class Pair(NamedTuple):
    count: int
    grid: Tensor


class Output(OrderedDict):
    """A dict whose items are attributes too, as Hugging Face models return."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.__dict__[key] = value


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def untokens(t: Tensor) -> Tensor:
    return t.transpose(1, 2).unflatten(2, GRID)


def summary(x: Tensor, count: int) -> Tensor:
    """Tokens that know the whole image."""
    mean = x.mean(dim=(2, 3))[:, None]
    return torch.cat([mean * (k + 1) for k in range(count)], dim=1)


def windows(x: Tensor) -> Tensor:
    """(B, C, 10, 15) -> (B, 6 windows, 25 cells, C)."""
    return x.unflatten(3, (3, 5)).unflatten(2, (2, 5)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def unwindows(w: Tensor) -> Tensor:
    return w.unflatten(2, (5, 5)).unflatten(1, (2, 3)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


CASES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], str]] = {
    "NCHW": (lambda x: x, lambda o: o, "NCHW"),
    "NHWC": (lambda x: x.permute(0, 2, 3, 1), lambda o: o.permute(0, 3, 1, 2), "NHWC"),
    "NCWH": (lambda x: x.transpose(2, 3), lambda o: o.transpose(2, 3), "NCWH"),
    "NLC": (tokens, untokens, "NLC"),
    "one prefix token": (
        lambda x: torch.cat([summary(x, 1), tokens(x)], dim=1),
        lambda o: untokens(o[:, 1:]) + o[:, 0, :, None, None] - o[:, 0, :, None, None],
        "NLC, 1 token beside the grid",
    ),
    "five prefix tokens": (
        lambda x: torch.cat([summary(x, 5), tokens(x)], dim=1),
        lambda o: untokens(o[:, 5:]),
        "NLC, 5 tokens beside the grid",
    ),
    "suffix token": (
        lambda x: torch.cat([tokens(x), summary(x, 1)], dim=1),
        lambda o: untokens(o[:, :-1]),
        "NLC, 1 token beside the grid",
    ),
    "NCL": (lambda x: x.flatten(2), lambda o: o.unflatten(2, GRID), "NCL"),
    "sequence first": (
        lambda x: tokens(x).transpose(0, 1),
        lambda o: untokens(o.transpose(0, 1)),
        "NLC, batch on axis 1",
    ),
    "folded windows": (
        lambda x: windows(x).flatten(0, 1),
        lambda o: unwindows(o.unflatten(0, (-1, 6))),
        "6 folded into the batch, permuted",
    ),
    "window order": (
        lambda x: windows(x).flatten(1, 2),
        lambda o: unwindows(o.unflatten(1, (6, 25))),
        "NLC, permuted",
    ),
    "tuple": (lambda x: (3, x), lambda o: o[1], "NCHW, tensor 1 of several"),
    "list": (lambda x: [x, "grid"], lambda o: o[0], "NCHW, tensor 0 of several"),
    "dict": (lambda x: {"map": x}, lambda o: o["map"], "NCHW, tensor map of several"),
    "model output": (lambda x: Output(map=x), lambda o: o.map, "NCHW, tensor map of several"),
    "named tuple": (lambda x: Pair(2, x), lambda o: o.grid, "NCHW, tensor 1 of several"),
}


def found(
    pack: Callable[[Tensor], Any],
    unpack: Callable[[Any], Tensor],
    channels: int = CHANNELS,
    size: tuple[int, int, int] = SIZE,
) -> tuple[Host, Layout | str]:
    host = Host(pack, unpack, channels).eval()
    return host, find_layouts(host, ["layer"], size)["layer"]


def seen(host: Host, batch: int, size: tuple[int, int, int] = SIZE) -> tuple[Tensor, Any]:
    """The true map and the layer's output on some images."""
    x = probe_images(batch, size, seed=3)
    with torch.no_grad(), capture(host, ["stem", "layer"]) as outputs:
        host(x)
    return outputs["stem"], outputs["layer"]


class TestRoundTrip:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("batch", [1, 3])
    def test_reads_the_map_and_writes_it_back_bit_for_bit(self, name: str, batch: int) -> None:
        pack, unpack, kind = CASES[name]
        host, layout = found(pack, unpack)
        assert isinstance(layout, Layout), layout
        assert (layout.kind, layout.grid, layout.channels, layout.verified) == (kind, GRID, CHANNELS, "probe")
        true, output = seen(host, batch)
        assert torch.equal(layout.to_grid(output), true)
        fresh = torch.randn(batch, CHANNELS, *GRID, generator=torch.Generator().manual_seed(5))
        written = layout.with_grid(output, fresh)
        assert type(written) is type(output)
        assert torch.equal(layout.to_grid(written), fresh)
        assert torch.equal(layout.to_grid(output), true), "the original was changed"
        for (path, old), (_, new) in zip(leaves(output), leaves(layout.with_grid(output, true)), strict=True):
            assert torch.equal(old, new), path

    @pytest.mark.parametrize("name", CASES)
    def test_survives_a_config_file(self, name: str) -> None:
        _, layout = found(*CASES[name][:2])
        assert isinstance(layout, Layout)
        assert layout_from_json(json.loads(json.dumps(asdict(layout)))) == layout

    @pytest.mark.parametrize("name", ["NCHW", "one prefix token", "folded windows", "tuple"])
    def test_gradient_of_a_written_map_is_the_maps_own(self, name: str) -> None:
        pack, unpack, _ = CASES[name]
        host, layout = found(pack, unpack)
        assert isinstance(layout, Layout)
        true, output = seen(host, 2)
        leaf, plain = true.clone().requires_grad_(), true.clone().requires_grad_()
        weight = torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
        (unpack(layout.with_grid(output, leaf)) * weight).sum().backward()
        (plain * weight).sum().backward()
        torch.testing.assert_close(leaf.grad, plain.grad)


class TestSide:
    def test_tokens_before_and_behind_are_replaced_by_what_is_held(self) -> None:
        host, layout = found(lambda x: torch.cat([summary(x, 2), tokens(x)], dim=1), lambda o: untokens(o[:, 2:]))
        assert isinstance(layout, Layout)
        assert layout.has_side
        true, output = seen(host, 3)
        (side,) = layout.side_of(output)
        assert torch.equal(side, output[:, :2])
        mean = side.mean(dim=0, keepdim=True)
        held = layout.with_grid(output, true, [mean])
        assert torch.equal(held[:, :2], mean.expand(3, -1, -1))
        assert torch.equal(held[:, 2:], output[:, 2:])

    @pytest.mark.parametrize("batch", [1, 3, 10])
    def test_other_tensors_are_held_and_tables_are_not(self, batch: int) -> None:
        """A table has no batch axis, also where its length happens to be that of the batch."""
        table = torch.randn(10, CHANNELS)
        host, layout = found(lambda x: (x, x.mean(dim=(2, 3)), table, 4), lambda o: o[0])
        assert isinstance(layout, Layout)
        assert layout.others == ((1,),)
        true, output = seen(host, batch)
        (side,) = layout.side_of(output)
        assert side.shape == (batch, 1, CHANNELS)
        mean = side.mean(dim=0, keepdim=True)
        held = layout.with_grid(output, true, [mean])
        torch.testing.assert_close(held[1], mean[0].expand(batch, -1))
        assert torch.equal(held[2], table)
        assert held[3] == 4

    def test_a_plain_map_has_nothing_beside_it(self) -> None:
        host, layout = found(*CASES["NCHW"][:2])
        assert isinstance(layout, Layout)
        assert not layout.has_side
        assert layout.side_of(seen(host, 2)[1]) == []


class TestAmbiguousShapes:
    """Channels, rows and columns of one size: only the probe can tell."""

    SQUARE = (3, 40, 40)

    @pytest.mark.parametrize("order", ["NCHW", "NHWC", "NHCW", "NCWH", "NWHC"])
    def test_maps(self, order: str) -> None:
        axes = ["NCHW".index(letter) for letter in order]
        back = [axes.index(axis) for axis in range(4)]
        host, layout = found(lambda x: x.permute(axes), lambda o: o.permute(back), 10, self.SQUARE)
        assert isinstance(layout, Layout), layout
        true, output = seen(host, 2, self.SQUARE)
        assert torch.equal(layout.to_grid(output), true)
        assert layout.verified == "probe"

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_tokens_with_as_many_channels_as_positions(self, channels_last: bool) -> None:
        def pack(x: Tensor) -> Tensor:
            return tokens(x) if channels_last else x.flatten(2)

        def unpack(o: Tensor) -> Tensor:
            return (o.transpose(1, 2) if channels_last else o).unflatten(2, (10, 10))

        host, layout = found(pack, unpack, 100, self.SQUARE)
        assert isinstance(layout, Layout), layout
        true, output = seen(host, 2, self.SQUARE)
        assert torch.equal(layout.to_grid(output), true)

    def test_the_batch_axis_is_the_one_that_follows_the_batch(self) -> None:
        """21 is the number of images of the probe; here it is also a channel count."""
        host, layout = found(lambda x: x.permute(1, 0, 2, 3), lambda o: o.permute(1, 0, 2, 3), 21)
        assert isinstance(layout, Layout), layout
        assert layout.batch_axis == 1
        true, output = seen(host, 2)
        assert torch.equal(layout.to_grid(output), true)


class TestRefusal:
    def test_pooled_vector(self) -> None:
        _, answer = found(lambda x: x.mean(dim=(2, 3)), lambda o: o[:, :, None, None])
        rule = "at least 2 x 2 positions in the aspect of the 40 x 60 input, or 9 beside other tokens"
        assert answer == f"expected {rule}, got (B, 8)"

    def test_gate(self) -> None:
        _, answer = found(lambda x: x.mean(dim=(2, 3), keepdim=True), lambda o: o)
        assert isinstance(answer, str)
        assert "(B, 8, 1, 1)" in answer

    def test_nothing_with_a_batch(self) -> None:
        _, answer = found(lambda x: x.sum() * torch.ones(2, 3), lambda o: o.sum() * torch.ones(4, CHANNELS, 2, 2))
        assert answer == "expected a float tensor that follows the image, and its output holds none"

    def test_a_table_repeated_over_the_batch(self) -> None:
        table = torch.randn(1, 150, CHANNELS)
        _, answer = found(lambda x: table.expand(len(x), -1, -1), lambda o: untokens(o))
        assert answer == "expected a float tensor that follows the image, and its output holds none"

    def test_shuffled_tokens(self) -> None:
        """An order that is no arrangement of rows and columns is not taken for a grid."""
        shuffle = torch.randperm(150, generator=torch.Generator().manual_seed(0))
        _, answer = found(lambda x: tokens(x)[:, shuffle], lambda o: untokens(o[:, shuffle.argsort()]))
        assert isinstance(answer, str)
        rule = "at least 9 positions that follow the input's with a correlation of 0.85"
        assert answer.startswith(f"expected {rule}, got ")
        assert answer.endswith(" at best, for 10 x 15 positions of (B, 150, 8)")

    def test_tokens_of_a_tiny_grid(self) -> None:
        """Four positions beside a class token: the error names the rule that they break."""
        _, answer = found(
            lambda x: torch.cat([summary(x, 1), tokens(x)], dim=1),
            lambda o: o[:, 1:].transpose(1, 2).unflatten(2, (2, 2)),
            size=(3, 8, 8),
        )
        rule = "at least 2 x 2 positions in the aspect of the 8 x 8 input, or 9 beside other tokens"
        assert answer == f"expected {rule}, got (B, 5, 8)"


def test_a_leaf_that_one_draw_does_not_move() -> None:
    """A flag of the image beside scrambled positions, which take two draws: it may follow the images of one alone."""
    scrambled = torch.randperm(GRID[0] * GRID[1], generator=torch.Generator().manual_seed(0))
    flags: list[bool] = []

    for threshold in torch.arange(-1, 1, 0.05).tolist():
        moved = []

        def pack(x: Tensor, threshold: float = threshold, moved: list[bool] = moved) -> tuple[Tensor, Tensor]:
            flag = x[:, 0, 0, 0] > threshold
            moved.append(bool(flag.any()) and not bool(flag.all()))
            return x.flatten(2)[:, :, scrambled].view_as(x), flag.float()

        _, answer = found(pack, lambda o: o[0])
        assert isinstance(answer, str)
        flags.append(moved[-1] != moved[-3])  # the longer passes of the two draws
    assert any(flags)  # it did happen


class TestFinestGrid:
    """Upper bounds from the shape alone, for a batch of 2."""

    @pytest.mark.parametrize(
        ("shape", "grid"),
        [
            ((2, 8, 10, 15), (10, 15)),
            ((2, 10, 15, 8), (10, 15)),
            ((2, 151, 8), (10, 15)),
            ((12, 25, 8), (10, 15)),
            ((151, 2, 8), (10, 15)),
            ((2, 8), None),
            ((2, 8, 1, 1), None),
        ],
    )
    def test_bound(self, shape: tuple[int, ...], grid: tuple[int, int] | None) -> None:
        assert finest_grid(shape, 2, SIZE) == grid


def test_probe_images_are_seeded_and_of_unit_variance() -> None:
    a, b = probe_images(2, SIZE, seed=1), probe_images(2, SIZE, seed=1)
    assert torch.equal(a, b)
    assert not torch.equal(a, probe_images(2, SIZE, seed=2))
    torch.testing.assert_close(a.std(dim=(1, 2, 3)), torch.ones(2))


@pytest.mark.parametrize("size", [(32, 1024), (1024, 32)])
def test_tokens_of_a_strip_are_found_lying_and_standing(size):
    class Strip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 16, stride=16)
            self.tokens = nn.Identity()
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.tokens(self.patch(x).flatten(2).transpose(1, 2)).mean(dim=1))

    torch.manual_seed(0)
    found = find_layouts(Strip().eval(), ["tokens"], (3, *size))["tokens"]
    assert isinstance(found, Layout) and found.grid == (size[0] // 16, size[1] // 16)


def test_side_of_another_size_is_held_at_its_mean():
    mean = torch.tensor([[[1.0], [3.0]]])
    assert torch.equal(_of_size(mean, torch.Size((4, 3, 1))), torch.full((4, 3, 1), 2.0))

"""Streaming moments: any split of the data gives the figures of the whole."""

import pytest
import torch

from ib_explain.statistics import STD_FLOOR, RunningMean, RunningMoments


def data():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 5.0, 0.3, 20.0]).view(1, 4, 1, 1)
    return torch.randn(30, 4, 3, 5, generator=generator, dtype=torch.float64) * scale + torch.arange(4.0).view(
        1, 4, 1, 1
    )


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("sizes", [[30], [1] * 30, [7, 13, 10]])
def test_any_split_gives_the_moments_of_the_whole(per_element, sizes):
    x, running = data(), RunningMoments(per_element=per_element)
    for part in x.split(sizes):
        running.update(part)
    axes = (0,) if per_element else (0, 2, 3)
    result = running.result()
    torch.testing.assert_close(result.mean.double(), x.mean(axes, keepdim=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.std.double(), x.std(axes, keepdim=True), rtol=1e-5, atol=1e-5)
    assert result.count == 30


def test_merge_equals_one_stream():
    x, whole, halves = data(), RunningMoments(), [RunningMoments(), RunningMoments()]
    whole.update(x)
    halves[0].update(x[:11])
    halves[1].update(x[11:])
    halves[0].merge(halves[1])
    torch.testing.assert_close(halves[0].result().mean, whole.result().mean)
    torch.testing.assert_close(halves[0].result().std, whole.result().std)


def test_stable_far_from_zero():
    x = data().float() + 1e4
    running = RunningMoments()
    for part in x.split(3):
        running.update(part)
    torch.testing.assert_close(running.result().std, x.double().std((0, 2, 3), keepdim=True).float(), rtol=2e-2, atol=0)


def test_half_precision_features_are_counted_in_float32():
    x, running = data(), RunningMoments()
    running.update(x.half())
    assert running.result().mean.dtype == torch.float32
    torch.testing.assert_close(running.result().std.double(), x.std((0, 2, 3), keepdim=True), rtol=1e-2, atol=1e-3)


def test_a_dead_channel_gets_the_floor_not_zero():
    x = data()
    x[:, 2] = 7.0
    running = RunningMoments()
    running.update(x)
    std = running.result().std.flatten()
    expected = torch.tensor([x[:, c].std().item() for c in (0, 1, 3)] + [0.0]).mean() * STD_FLOOR
    assert std[2].item() == pytest.approx(expected.item(), rel=1e-3)


def test_nothing_seen_and_changed_shapes_are_errors():
    with pytest.raises(ValueError, match="at least one image"):
        RunningMoments().result()
    running = RunningMoments()
    running.update(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="changed their shape"):
        running.update(torch.zeros(2, 5, 4, 4))


def test_running_mean_of_several_tensors():
    a, b = torch.randn(6, 2, 3), torch.randn(6, 4)
    running, rest = RunningMean(), RunningMean()
    running.update([a[:2], b[:2]])
    rest.update([a[2:], b[2:]])
    running.merge(rest)
    torch.testing.assert_close(running.result()[0], a.mean(0, keepdim=True))
    torch.testing.assert_close(running.result()[1], b.mean(0, keepdim=True))
    assert RunningMean().result() == []

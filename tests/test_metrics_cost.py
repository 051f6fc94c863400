import functools
import time
import weakref

import pytest
import timm
import torch
from torch import nn

from ib_explain import IBAttention, attribute
from ib_explain.metrics import cost
from ib_explain.metrics.cost import _metered, _time_ratios, count_passes, measure_cost, peak_bytes
from tests.models import images, tiny

CPU = torch.device("cpu")


def saliency(model, x, target):
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        score = model(x).gather(1, target[:, None]).sum()
        return torch.autograd.grad(score, x)[0].abs().sum(1, keepdim=True)


def forward_only(model, x, target, times=1, grad=torch.no_grad):
    with grad():
        for _ in range(times):
            model(x)
    return x[:, :1]


def occlusion(model, x, target):
    from captum.attr import Occlusion

    with torch.no_grad():
        return Occlusion(model).attribute(x, target=target, sliding_window_shapes=(3, 8, 8), strides=(3, 8, 8)).mean(1)


@pytest.mark.parametrize("kind", ["cnn", "vit", "nhwc"])
def test_saliency_is_one_forward_and_one_backward_pass(kind):
    assert count_passes(tiny(kind), images(3), saliency) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_forward_passes_are_counted_in_every_autograd_mode(kind, grad):
    explain = functools.partial(forward_only, times=3, grad=grad)
    assert count_passes(tiny(kind), images(2), explain) == (3.0, 0.0)


def test_occlusion_is_one_pass_for_each_window_and_one_intact():
    assert count_passes(tiny(), images(2), occlusion) == (1.0 + 9.0, 0.0)  # 24 pixels in windows of 8: 3 x 3


def test_passes_do_not_depend_on_the_batch_a_method_chooses():
    def one_by_one(model, x, target):
        return torch.cat([saliency(model, x[i : i + 1], target[i : i + 1]) for i in range(len(x))])

    assert count_passes(tiny(), images(4), one_by_one) == (1.0, 1.0)


def test_a_part_of_the_host_counts_by_its_arithmetic():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 2)), images(2, 4)
    first, second, last = 3 * 4 * 16, 4 * 4 * 16, 64 * 2  # products of one image
    whole = first + second + last

    def half(model, x, target):
        with torch.no_grad():
            return model[:2](x)[:, :1]

    assert count_passes(model, x, half) == (pytest.approx((first + second) / whole), 0.0)

    def to_the_middle(model, x, target):
        with torch.no_grad():
            features = model[0](x)
        with torch.enable_grad():
            features.requires_grad_()
            return torch.autograd.grad(model[1:](features).sum(), features)[0][:, :1]

    forwards, backwards = count_passes(model, x, to_the_middle)
    assert (forwards, backwards) == (1.0, pytest.approx((second + last) / whole))


def test_grad_cam_goes_back_a_small_part_only():
    def explain(model, x, target):
        return attribute(model, x, target=target, method="grad_cam")

    model, x = tiny(), images(4)
    explain(model, x, 0)  # the layer is looked for once
    forwards, backwards = count_passes(model, x, explain)
    assert 1 <= forwards <= 1.25 and 0 < backwards < 0.01


def test_a_host_without_products_has_no_count():
    class Sums(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1)

    forwards, backwards = count_passes(Sums(), images(2), saliency)
    assert forwards != forwards and backwards != backwards


def test_counting_leaves_the_fused_attention_switch_and_the_host_alone():
    model, x = tiny("vit").train(), images(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.backends.mha.get_fastpath_enabled()
    count_passes(model, x, forward_only)
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="stop"), _metered():
        model(x)
        raise RuntimeError("stop")
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: torch.empty(1000), 4000),
        (lambda: (torch.empty(1000), torch.empty(1000)), 8000),
        (lambda: (torch.empty(1000).sum(), torch.empty(1000).sum()), 4000 + 4 + 4),  # the first is freed in between
        (lambda: torch.empty(1000).view(10, 100).t(), 4000),  # views share memory
        (lambda: torch.empty(1000).add_(1), 4000),
        (lambda: torch.ones(1000, requires_grad=True).exp().exp(), 12000),  # autograd holds the one in the middle
    ],
)
def test_peak_memory_on_the_cpu_by_hand(run, expected):
    assert [peak_bytes(run, CPU) for _ in range(3)] == [expected] * 3


def test_the_meter_does_not_outlive_the_measurement():
    with _metered() as meter:
        kept = torch.ones(1000) * 2
    gone = weakref.ref(meter)
    del meter
    assert gone() is None and kept.sum() == 2000


def test_what_was_there_before_is_no_memory_of_the_method():
    held = torch.zeros(1000)
    assert peak_bytes(lambda: held.view(10, 100).sum(), CPU) == 4


def test_peak_memory_of_a_host_by_hand_and_of_twice_the_rows():
    model, x = tiny(), images(4)

    def run(rows):
        with torch.no_grad():
            model(rows)

    # The first block holds its input, both convolutions and their sum: 8 channels of 12 x 12 for 4 images each.
    assert peak_bytes(lambda: run(x), CPU) == 4 * (4 * 8 * 12 * 12) * 4

    def doubled(model, x, target):
        with torch.no_grad():
            return model(x.repeat(2, 1, 1, 1))

    measured = measure_cost(model, x, doubled, rounds=1)
    assert measured.forwards == 2 and measured.memory_ratio == pytest.approx(2 + x.nbytes * 2 / (4 * 18432), rel=1e-6)


def test_time_is_divided_by_the_passes_around_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ib_explain.metrics.cost.time.process_time", lambda: now[0])
    # Slower with every call, as a machine that heats up: pairs of neighbours cancel it, the ratio stays 3.
    calls = iter(range(10**6))

    def takes(seconds):
        def run():
            now[0] += seconds * (1 + 0.01 * next(calls))

        return run

    ratios = _time_ratios(takes(3.0), takes(1.0), 5, CPU)
    assert len(ratios) == 5 and ratios == pytest.approx([3.0] * 5, rel=1e-6)


def test_short_calls_are_repeated_until_a_turn_is_long_enough(monkeypatch):
    now, calls = [0.0], [0]
    monkeypatch.setattr("ib_explain.metrics.cost.time.process_time", lambda: now[0])

    def run():
        now[0] += 0.001
        calls[0] += 1

    _time_ratios(run, run, 2, CPU)
    assert calls[0] == 2 + 5 * 50  # two looks, then P M P M P of 0.05 s each


def test_time_of_four_passes(monkeypatch):
    host, passes = tiny(), [0]

    def count(_module, _inputs):
        passes[0] += 1

    host.register_forward_pre_hook(count)
    monkeypatch.setattr(time, "process_time", lambda: 0.01 * passes[0])  # a clock that only the host moves
    measured = measure_cost(host, images(4), functools.partial(forward_only, times=4), rounds=3)
    assert measured.forwards == 4
    assert (measured.time_ratio, *measured.time_range) == pytest.approx((4, 4, 4))


def test_bad_input():
    with pytest.raises(ValueError, match="rounds must be an integer >= 1, got 0"):
        measure_cost(tiny(), images(1), saliency, rounds=0)
    with pytest.raises(IndexError, match="target class 7 is out of range"):
        count_passes(tiny(), images(1), saliency, 7)
    with pytest.raises(ValueError, match="x must have shape"):
        count_passes(tiny(), images(1)[0], saliency)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model, x = tiny().cuda(), images(4).cuda()
    measured = measure_cost(model, x, saliency, rounds=3)
    assert (measured.forwards, measured.backwards) == (1.0, 1.0)
    assert measured.time_ratio > 1 and measured.memory_ratio > 1


@pytest.mark.parametrize("reads", ["features", "gradient"])
def test_a_fitted_map_takes_at_most_a_tenth_more_than_its_passes(reads):
    """In arithmetic: one forward pass and, with the gradient, one backward pass behind the site."""
    model = timm.create_model("resnet50", num_classes=10).eval()
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ib = IBAttention(model, "layer3", reads=reads).fit([x], steps=1, show_progress=False)
    forwards, backwards = count_passes(model, x, lambda _model, images, target: ib.attribute(images, target))

    def by_hand(_model, images, target):
        with torch.no_grad():
            front = model.layer3(model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(images)))))))
        front.requires_grad_(reads == "gradient")
        score = model.forward_head(model.layer4(front)).gather(1, target[:, None]).sum()
        return torch.autograd.grad(score, front) if reads == "gradient" else score

    plain = count_passes(model, x, by_hand)
    assert plain[0] == pytest.approx(1.0) and (plain[1] > 0) == (reads == "gradient")
    assert forwards + backwards <= 1.10 * sum(plain)


def test_the_time_is_the_median(monkeypatch):
    monkeypatch.setattr(cost, "_time_ratios", lambda *_: [2.0, 30.0, 3.0])
    host = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    found = measure_cost(host, torch.rand(2, 3, 4, 4), lambda model, x, target: x[:, :1], rounds=3)
    assert (found.time_ratio, found.time_range) == (3, (2, 30))

"""Fitting: what trains, beta from what is at stake, seeds, several processes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import ib_explain as ibx
from ib_explain.bottleneck.attention import AttentionNetwork
from ib_explain.data.synthetic import Synthetic, demo_host
from ib_explain.ib import IBAttention
from ib_explain.metrics import deletion
from ib_explain.objective import BETA_PER_STAKE
from tests.fitting import ENVIRONMENT, assert_equal, batches, fit, run_script, weights
from tests.models import images, tiny
from tests.optimising import dear_on_the_left


class TestWhatTrains:
    def test_only_the_attention_moves_and_its_statistics_are_the_datas(self):
        data = batches()
        one, six = fit(data, steps=1), fit(data, steps=6)
        changed = {n for n, v in weights(one).items() if not torch.equal(v, weights(six)[n])}
        assert changed and all(name.startswith("network.") for name in changed)
        features = six.host.stages[:2](six.host.act(six.host.stem(torch.cat([x for x, _ in data]))))
        torch.testing.assert_close(
            weights(six)["restriction.moments.mean"], features.mean((0, 2, 3), keepdim=True), rtol=1e-4, atol=1e-5
        )
        assert int(weights(six)["restriction.moments.count"]) == 32

    def test_training_lowers_the_loss(self):
        record = fit([images(16, seed=s) for s in range(4)], steps=80, beta=0.1, lr=5e-3).record
        first, last = record["history"][0], record["history"][-1]
        assert last["loss"] < 0.9 * first["loss"]

    def test_anchors_measurably_move(self):
        ib = fit(batches(), steps=40, anchors=5)
        moved = (ib.bottleneck.anchors.values.detach() - torch.linspace(0, 1, 5)).abs()
        assert moved.max() > 0.02
        attention = ib.attribute(images(2), output="attention")
        assert torch.isfinite(attention).all()

    def test_a_small_beta_lets_more_bits_pass_than_a_large_one(self):
        data = [images(16, seed=s) for s in range(4)]
        few, many = fit(data, steps=60, beta=10.0, lr=1e-2), fit(data, steps=60, beta=1e-3, lr=1e-2)
        x = images(8, seed=77)
        assert few.information(x).mean() < 0.5 * many.information(x).mean()

    def test_beta_is_a_multiple_of_what_is_at_stake(self):
        x = images(96)
        data = [x]
        history = fit(data, steps=1).record["history"]
        host, ib = tiny(), fit(data, steps=1)
        with torch.no_grad():
            free = host(x)
            with ib.restrict(0.0) as restricted:
                closed = restricted(x)
        at_stake = torch.nn.functional.kl_div(closed.log_softmax(1), free.softmax(1), reduction="batchmean")
        assert at_stake > 0.3
        # Its one draw of noise is another.
        assert history[0]["beta"] == pytest.approx(BETA_PER_STAKE * at_stake.item(), rel=0.6)
        assert fit(data, steps=2, beta=3.0).record["history"][0]["beta"] == 3.0

    @pytest.mark.slow
    @pytest.mark.parametrize(("reads", "rising"), [("gradient", []), ("features", [1 / 2.88, 2 / 2.88])])
    def test_without_the_gradient_the_price_rises_over_18_percent_of_the_batches(self, reads, rising):
        record = fit(batches(), steps=16, reads=reads, beta=1.0).record  # 2.88 batches of 16
        weights = [*rising, *[1.0] * (16 - len(rising))]
        running = weights[0]
        for weight in weights:
            for _step in range(2):  # of the optimiser on a batch
                running = 0.95 * running + 0.05 * weight
        assert record["history"][0]["beta"] == pytest.approx(weights[0], abs=1e-5)
        assert record["final_beta"] == pytest.approx(running)

    def test_the_class_that_the_host_sees_in_average_content_keeps_a_map(self):
        pictures = Synthetic(512, seed=1)
        batch = pictures.batch(range(512))
        ib = IBAttention(demo_host(), reads="features")
        ib.fit(DataLoader(TensorDataset(batch.image), 32, shuffle=True), steps=120, show_progress=False)
        bits, labels = ib.information(batch.image[:128]), batch.label[:128]
        of_class = torch.stack([bits[labels == c].mean() for c in labels.unique()])
        assert of_class.min() > 0.3 * of_class.mean()

    def test_the_seed_decides(self):
        data = batches()
        assert_equal(weights(fit(data)), weights(fit(data)), rtol=0, atol=0)
        assert not torch.equal(
            weights(fit(data, seed=1))["network.head.weight"], weights(fit(data))["network.head.weight"]
        )

    def test_what_the_grid_alone_keeps_is_told(self):
        x, host = images(64), tiny("vit")
        with pytest.warns(UserWarning, match="the grid of layer 'blocks.1' alone keeps .*% of the host's answers"):
            ib = IBAttention(host, "blocks.1").fit([x], steps=1, show_progress=False)
        with torch.no_grad():
            own = host(x).argmax(1)
            with ib.restrict(1.0) as restricted:
                same = (restricted(x).argmax(1) == own).float().mean().item()
        assert ib.record["grid_alone"] == pytest.approx(same, abs=3 / 64)  # A = .999 lets a little noise in
        assert fit(batches()).record["grid_alone"] == 1

    def test_images_that_attention_has_closed_for_are_told(self, monkeypatch):
        """Half of the images, by their first pixel, get no attention."""
        x = images(64)
        own = tiny()(x).argmax(1)
        plain = AttentionNetwork.forward

        def closes(self, reading):
            mean, std = plain(self, reading)
            open_ = torch.arange(len(mean)) >= len(mean) // 2
            return mean * open_[:, None, None, None] + 0 * std, 0 * std

        monkeypatch.setattr(AttentionNetwork, "forward", closes)
        with pytest.warns(UserWarning, match="attention has closed for .*% of the images"):
            record = fit([x], steps=1).record
        with torch.no_grad(), IBAttention(tiny(), "stages.1").restrict(0.0) as closed:
            lost = (closed(x[:32]).argmax(1) != own[:32]).sum().item()
        assert 0.05 < record["final_shut"] <= lost / 64 + 0.2

    def test_the_record_tells_the_run(self):
        record = fit(DataLoader(TensorDataset(images(16)), batch_size=8)).record
        assert record["settings"]["steps"] == 6 and record["images"] == 48 and record["layer"] == "stages.1"
        assert record["data"] == "DataLoader over TensorDataset" and record["versions"]["torch"] == torch.__version__
        json.dumps(record)

    def test_each_batch_serves_two_steps_of_the_optimiser(self, tmp_path):
        reads = []

        class Counted(list):
            def __iter__(self):
                for batch in super().__iter__():
                    reads.append(len(batch[0]))
                    yield batch

        data = Counted(batches(count=4))
        before = len(data)  # for the statistics
        fit(data, steps=3, checkpoint=tmp_path / "run", every=3)
        optimiser = load_file(tmp_path / "run" / "optimiser.safetensors")
        assert {int(value) for name, value in optimiser.items() if name.endswith(".step")} == {6}
        assert len(reads) == 1 + before + 3  # the first is looked at for its size


def test_the_callers_autocast_is_no_precision_of_the_fit():
    plain, inside = (IBAttention(tiny(), "stages.1") for _ in range(2))
    plain.fit(batches(), steps=3, show_progress=False)
    data = batches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.fit(data, steps=3, show_progress=False)
    assert_equal(weights(inside), weights(plain))
    assert inside.record["settings"]["precision"] == "fp32"


def test_a_samplers_own_generator_starts_anew_with_each_fit_and_is_left_as_it_was():
    generator, data = torch.Generator().manual_seed(5), TensorDataset(images(24))
    loader = DataLoader(data, batch_size=8, sampler=RandomSampler(data, generator=generator))
    before = generator.get_state()
    one, again = (weights(fit(loader, steps=5)) for _ in "12")
    assert_equal(one, again, rtol=0, atol=0)
    assert torch.equal(generator.get_state(), before)


def test_an_error_puts_the_random_state_back_at_once():
    host, before = tiny(), torch.get_rng_state()
    loader = DataLoader(TensorDataset(images(16)), batch_size=4, shuffle=True)
    runs = []

    def breaks(*_):
        runs.append(1)
        if len(runs) == 40:
            raise ArithmeticError

    host.register_forward_hook(breaks)
    try:
        IBAttention(host, "stages.1").fit(loader, steps=50, show_progress=False)
    except ArithmeticError:  # the traceback, which holds what was open, is still there
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(123)
    expected = torch.Generator().manual_seed(123)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))


def test_accelerate_is_left_to_the_user():
    code = """
        from accelerate import Accelerator
        from ib_explain.ib import IBAttention
        from tests.models import images, tiny

        IBAttention(tiny(), "stages.1").fit([images(4)], steps=2, show_progress=False)
        assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
        IBAttention(tiny(), "stages.1").fit([images(4)], steps=2, show_progress=False)
        assert Accelerator(cpu=True).mixed_precision == "bf16"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_host_of_one_class_is_refused():
    class Single(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.host = tiny()

        def forward(self, x):
            return self.host(x)[:, :1]

    for use in (lambda ib: ib.attribute(images(2)), lambda ib: ib.fit([images(4)], steps=2, show_progress=False)):
        with pytest.raises(ValueError, match=r"at least 2 classes, got 1; wrap a single logit z as torch.cat"):
            use(IBAttention(Single(), "host.stages.1"))
    x, maps = images(2), torch.rand(2, 24, 24)
    # The probability of the only class is 1 whatever is removed.
    for measure in (
        lambda: deletion(Single().eval(), x, maps),
        lambda: ibx.benchmark(Single().eval(), [x], methods=["edges"], metrics=["insertion"], show_progress=False),
    ):
        with pytest.raises(ValueError, match=r"at least 2 classes, got 1; wrap a single logit z as torch.cat"):
            measure()
    assert deletion(Single().eval(), x, maps, score="logit").auc.isfinite().all()


TWO = """
    import sys, torch
    from ib_explain.ib import IBAttention
    from tests.models import images, tiny

    whole = images(48)
    data = list(whole.split(int(sys.argv[2])))
    ib = IBAttention(tiny(), "stages.1", relevance=True).fit(data, steps=5, show_progress=False)
    from accelerate import PartialState
    if PartialState().is_main_process:
        ib.save(sys.argv[1])
    assert ib.record["processes"] == PartialState().num_processes
"""


def test_two_processes_give_the_bottleneck_of_one_with_twice_the_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO))
    one = run_script(script, tmp_path / "one", 16)
    assert one.returncode == 0, one.stderr
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = run_script(script, tmp_path / "two", 8, launcher=launcher)
    assert two.returncode == 0, two.stderr
    host = tiny()
    a, b = (IBAttention.load(tmp_path / n, host) for n in ("one", "two"))
    # Adam moves each weight by up to 2e-3 a step: rounding in a tiny gradient may show in a single one.
    assert_equal(weights(a), weights(b), rtol=1e-3, atol=1e-4)


def test_another_default_precision_changes_nothing():
    data = [images(8)]
    expected = fit(data, steps=2)
    torch.set_default_dtype(torch.float64)
    try:
        ib = IBAttention(expected.host, "stages.1").fit(data, steps=2, show_progress=False)
        assert {value.dtype for value in weights(ib).values() if value.is_floating_point()} == {torch.float32}
        assert torch.isfinite(ib.attribute(data[0], refine=2)).all()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("reads", ["gradient", "features"])
def test_dear_places_are_learned_to_pass_less(monkeypatch, reads):
    def share_on_the_left():
        maps = fit(batches(), steps=30, reads=reads, beta=3.0).attribute(images(8, seed=9), output="attention")
        return float(maps[..., :12].sum() / maps.sum())

    even = share_on_the_left()
    monkeypatch.setattr("ib_explain.training.location_price", dear_on_the_left)
    assert share_on_the_left() < 0.9 * even

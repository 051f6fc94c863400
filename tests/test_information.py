"""Bits against torch's own KL, Monte Carlo, and the mutual information that they are."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ib_explain.bottleneck.gates import GATES
from ib_explain.bottleneck.information import MOST_ATTENTION, energy, gaussian_bits, noise_bits

LN2 = math.log(2)
SPREADS = {"gaussian": lambda a: (1 - a**2).sqrt(), "noise": lambda a: 1 - a}


def features(count=3, channels=7, seed=0):
    return torch.randn(count, channels, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", SPREADS)
def test_bits_equal_torchs_kl_of_what_the_gate_samples(name):
    r, a = features(), torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(1)) * 0.95
    expected = kl_divergence(Normal(a * r, SPREADS[name](a)), Normal(0.0, 1.0)).sum(1, keepdim=True) / LN2
    got = GATES.get(name)().bits(a, energy(r), r.shape[1])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", SPREADS)
def test_the_gate_samples_with_the_standard_deviation_that_its_bits_assume(name):
    gate, a = GATES.get(name)(), torch.full((1, 1, 1, 1), 0.6)
    noise = torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    samples = gate.mix(torch.full((1, 1, 1, 1), 1.5), a, noise)
    assert samples.mean().item() == pytest.approx(0.9, abs=0.01)
    assert samples.std().item() == pytest.approx(float(SPREADS[name](torch.tensor(0.6))), rel=0.01)


@pytest.mark.parametrize("name", SPREADS)
def test_monte_carlo_estimate_agrees_with_the_closed_form(name):
    r, a = torch.tensor(1.3), torch.tensor(0.7)
    passed = Normal(a * r, SPREADS[name](a))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = passed.sample((400_000,))
    estimate = (passed.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).mean() / LN2
    exact = GATES.get(name)().bits(a.view(1, 1, 1, 1), r.square().view(1, 1, 1, 1), 1)
    assert estimate.item() == pytest.approx(exact.item(), abs=0.01)


@pytest.mark.parametrize("bits", [gaussian_bits, noise_bits])
def test_no_attention_is_no_information_and_more_is_never_negative(bits):
    r_energy = torch.linspace(0, 50, 11).view(1, 1, 1, -1)
    assert torch.equal(bits(torch.zeros(1, 1, 1, 11), r_energy, 4), torch.zeros(1, 1, 1, 11))
    for a in (0.01, 0.3, 0.9, 1.0):
        assert (bits(torch.full((1, 1, 1, 11), a), r_energy, 4) >= -1e-6).all()


def test_gaussian_gate_averages_to_the_true_mutual_information_and_the_mix_to_a_bound():
    r_energy = energy(torch.randn(1, 400_000, 1, 1, generator=torch.Generator().manual_seed(3)))
    a = torch.full((1, 1, 1, 1), 0.5)
    truth = -0.5 * math.log2(1 - 0.25)
    assert gaussian_bits(a, r_energy, 400_000).item() / 400_000 == pytest.approx(truth, rel=0.01)
    mixed_truth = 0.5 * math.log2(1 + 0.25 / 0.25)  # signal a^2, noise (1 - a)^2
    assert noise_bits(a, r_energy, 400_000).item() / 400_000 > mixed_truth * 1.2


def test_full_attention_is_finite_and_leaves_features_nearly_intact():
    r = features().float()
    gate = GATES.get("gaussian")()
    passed = gate.mix(r, torch.ones(3, 1, 4, 5), torch.zeros_like(r))
    torch.testing.assert_close(passed, MOST_ATTENTION * r)
    assert torch.isfinite(gate.bits(torch.ones(3, 1, 4, 5), energy(r), 7)).all()


def test_gaussian_gate_keeps_the_variance_and_the_mix_does_not():
    r = torch.randn(100_000, 1, 1, 1, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(100_000, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    half = torch.full((1, 1, 1, 1), 0.5)
    assert GATES.get("gaussian")().mix(r, half, noise).var().item() == pytest.approx(1.0, rel=0.02)
    assert GATES.get("noise")().mix(r, half, noise).var().item() == pytest.approx(0.5, rel=0.02)


def test_residual_gate_is_no_cut_and_says_that_it_measures_no_bits():
    gate = GATES.get("residual")()
    r = features().float()
    torch.testing.assert_close(gate.mix(r, torch.zeros(3, 1, 4, 5), torch.randn(r.shape)), r)
    assert not gate.measures_bits


def test_unknown_gate_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown gate 'gausian'; did you mean 'gaussian'"):
        GATES.get("gausian")

"""The density: its numbers, its gradients, its tails, and that it learns."""

import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cifd_clip import FactorizedDensity, InformationBottleneck, entropy
from cifd_clip.entropy import _effective, _LogLikelihood

REFERENCE = Path(__file__).parent.parent / "../shared/reference/entropy_bottleneck.npz"


def seeded(channels: int, seed: int = 0, bent: bool = False) -> FactorizedDensity:
    """A density away from its initial shape if ``bent``: gates open, slopes and offsets mixed."""
    generator = torch.Generator().manual_seed(seed)
    density = FactorizedDensity(channels, generator=generator)
    if bent:
        with torch.no_grad():
            for parameter in density.parameters():
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return density


def textbook(density: FactorizedDensity, values: torch.Tensor) -> torch.Tensor:
    """−log(F(v + ½) − F(v − ½)) in float64 by the chain of matrix products, (B, C)."""

    def logits(v):
        x = v.t().unsqueeze(1)  # (C, 1, B)
        for i, (matrix, bias) in enumerate(zip(density.matrices, density.biases)):
            x = F.softplus(matrix.double()) @ x + bias.double()
            if i < len(density.factors):
                x = x + torch.tanh(density.factors[i].double()) * torch.tanh(x)
        return x.squeeze(1).t()

    lower, upper = logits(values - 0.5), logits(values + 0.5)
    sign = -torch.sign(lower + upper).detach()
    p = torch.abs(torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower))
    return -torch.log(p)


def exact(density: FactorizedDensity, channel: int, v) -> mpmath.mpf:
    """−log p of one value in the arithmetic of `mpmath.mp`, by the logits' own difference."""
    precise = np.vectorize(mpmath.mpf, otypes=[object])
    apply = np.vectorize(lambda function, x: function(x), otypes=[object])

    def logit(x):
        for layer, (matrix, bias) in enumerate(zip(density.matrices, density.biases)):
            weight = precise(matrix[channel].detach().double())
            weight = apply(lambda w: mpmath.log1p(mpmath.exp(w)), weight)
            x = weight @ x + precise(bias[channel].detach().double())
            if layer < len(density.factors):
                gate = apply(
                    mpmath.tanh, precise(density.factors[layer][channel].detach().double())
                )
                x = x + gate * apply(mpmath.tanh, x)
        return x[0, 0]

    half = mpmath.mpf("0.5")
    lower, upper = (logit(np.array([[v + side]], dtype=object)) for side in (-half, half))
    tails = mpmath.log1p(mpmath.exp(-upper)) + mpmath.log1p(mpmath.exp(lower))
    return tails - mpmath.log(-mpmath.expm1(lower - upper))


def values(rows: int, channels: int, spread: float, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def test_likelihoods_are_those_of_the_reference_in_float32():
    if not REFERENCE.is_file():
        pytest.skip(f"{REFERENCE} is not there")
    data = np.load(REFERENCE)
    density = FactorizedDensity(data["value"].shape[1])
    with torch.no_grad():
        for kind, parameters in (
            ("matrix", density.matrices),
            ("bias", density.biases),
            ("factor", density.factors),
        ):
            for i, parameter in enumerate(parameters):
                parameter.copy_(torch.from_numpy(data[f"{kind}{i}"]))
    nats = density(torch.from_numpy(data["value"]).float())
    assert nats.dtype == torch.float32
    likelihood = torch.from_numpy(data["likelihood"])
    error = ((-nats.double()).exp() / likelihood - 1).abs().max().item()
    assert error < 1e-5, f"largest relative error of a likelihood: {error:.2e}"


@pytest.mark.parametrize("bent", [False, True], ids=["at init", "away from init"])
def test_nats_and_gradients_are_those_of_the_textbook_chain(bent):
    density = seeded(5, bent=bent)
    v = values(40, 5, 6.0).double().requires_grad_()
    weights = torch.rand(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    expected = textbook(density, v)
    wanted = torch.autograd.grad((weights * expected).sum(), [v, *density.parameters()])
    nats = density(v)
    found = torch.autograd.grad((weights * nats).sum(), [v, *density.parameters()])

    torch.testing.assert_close(nats.double(), expected, rtol=2e-5, atol=1e-6)
    names = ["values", *(name for name, _ in density.named_parameters())]
    for name, a, b in zip(names, found, wanted):
        scale = b.abs().max().item()
        off = (a - b).abs().max().item() / scale
        assert off < 1e-4, f"gradient of {name} is off by {off:.1e} of its largest element"


@pytest.mark.parametrize("closing", [0.0, 3.0], ids=["gates open", "gates near -1"])
def test_the_written_backward_is_the_derivative_of_the_forward(closing):
    density = seeded(2, bent=True)
    with torch.no_grad():
        for factor in density.factors:
            factor -= closing
    kinds = (density.matrices, density.biases, density.factors)
    parameters = [p.detach().double().requires_grad_() for kind in kinds for p in kind]
    v = values(4, 2, 5.0).double().requires_grad_()

    def log_p(v, *parameters):
        return _LogLikelihood.apply(
            v, *_effective(parameters[:5], parameters[5:10], parameters[10:])
        )

    assert torch.autograd.gradcheck(log_p, (v, *parameters))


@pytest.mark.parametrize("bent", [False, True], ids=["at init", "away from init"])
def test_outliers_have_finite_nats_and_are_pulled_back(bent):
    density = seeded(3, bent=bent)
    far = torch.tensor([-1e4, -3e3, -200.0, 200.0, 3e3, 1e4])
    v = far.unsqueeze(1).expand(-1, 3).clone().requires_grad_()
    nats = density(v)
    nats.sum().backward()
    assert torch.isfinite(nats).all(), nats
    assert (v.grad * far.sign().unsqueeze(1) > 1e-3).all(), (
        f"descending the nats must move each outlier towards zero; gradients {v.grad}"
    )
    for name, parameter in density.named_parameters():
        assert torch.isfinite(parameter.grad).all(), f"gradient of {name} at |v| = 1e4"
    expected = textbook(density, v[2:4].detach().double())
    assert (nats[2:4].double() - expected)[torch.isfinite(expected)].abs().max() < 1e-2


def test_between_two_modes_nats_and_gradients_are_those_of_sixty_digits():
    modes, generator = torch.tensor([6.0, 20.0]), torch.Generator().manual_seed(0)
    density = FactorizedDensity(2, generator=generator)
    optimizer = torch.optim.Adam(density.parameters(), lr=0.05)
    for _ in range(600):
        signs = torch.randint(2, (64, 2), generator=generator) * 2 - 1
        noise = torch.rand(64, 2, generator=generator) - 0.5
        optimizer.zero_grad()
        density(signs * modes + noise).mean().backward()
        optimizer.step()
    assert max(torch.tanh(f).min() for f in density.factors) < -0.99, "no gate is near −1"
    v = torch.linspace(-30, 30, 21).unsqueeze(1).repeat(1, 2).requires_grad_()
    nats = density(v)
    (slopes,) = torch.autograd.grad(nats.sum(), v)
    with mpmath.workdps(60):
        for channel in range(2):
            for row in range(len(v)):
                x = mpmath.mpf(v[row, channel].item())
                wanted = float(exact(density, channel, x))
                where = f"at {float(x)} between modes at ±{modes[channel]:g}"
                assert nats[row, channel].item() == pytest.approx(wanted, rel=1e-5), where
                slope = float(mpmath.diff(lambda y: exact(density, channel, y), x))  # noqa: B023
                found = slopes[row, channel].item()
                assert found == pytest.approx(slope, rel=1e-3, abs=1e-4), f"slope {where}"


def test_mass_over_integers_is_one_wherever_the_bins_lie():
    density = seeded(4, bent=True)
    bins = torch.arange(-3000.0, 3001.0).unsqueeze(1)
    for offset in (0.0, 0.25, -0.4):
        mass = (-density((bins + offset).expand(-1, 4)).double()).exp().sum(0)
        assert (mass - 1).abs().max() < 1e-4, f"offset {offset}: masses {mass.tolist()}"


def test_autocast_does_not_change_the_nats():
    density, v = seeded(32, bent=True), values(64, 32, 8.0)
    plain = density(v)
    with torch.autocast("cpu", torch.bfloat16):
        cast = density(v)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


def test_a_bfloat16_model_has_the_same_nats():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(32, 32)
            self.bottleneck = InformationBottleneck(32, torch.Generator().manual_seed(0))

    model, v = Model(), values(64, 32, 8.0).bfloat16()
    noise = torch.rand(64, 32, generator=torch.Generator().manual_seed(1)) - 0.5
    noisy, plain = model.bottleneck(v.float(), noise)
    model.bfloat16()
    assert model.linear.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.bottleneck.parameters()} == {torch.float32}
    noisy_cast, cast = model.bottleneck(v, noise)
    assert noisy_cast.dtype == cast.dtype == torch.float32
    torch.testing.assert_close(cast.mean(), plain.mean(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(noisy_cast, noisy)


@pytest.mark.parametrize("slab", [1, 7 * 5, 10**6])
def test_slabs_do_not_change_nats_or_gradients(monkeypatch, slab):
    def run():
        density, v = seeded(7, bent=True), values(33, 7, 6.0).requires_grad_()
        nats = density(v)
        grads = torch.autograd.grad(nats.square().sum(), [v, *density.parameters()])
        return nats, grads

    nats, grads = run()
    monkeypatch.setattr(entropy, "CPU_SLAB_VALUES", slab)
    nats_slabs, grads_slabs = run()
    assert torch.equal(nats, nats_slabs)
    for a, b in zip(grads, grads_slabs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item())


def test_training_finds_the_entropy_of_what_it_sees():
    """Integers from a known distribution, under the noise of training: bits → its entropy.

    With noise in [-½, ½] the differential entropy of ŷ is the entropy of the integers.
    """
    probabilities = torch.tensor([0.05, 0.7, 0.15, 0.1])
    true_bits = -(probabilities * probabilities.log2()).sum().item()
    generator = torch.Generator().manual_seed(0)
    density = FactorizedDensity(2, generator=generator)
    optimizer = torch.optim.Adam(density.parameters(), lr=0.05)

    def bits(noisy: bool, rows: int = 512) -> torch.Tensor:
        drawn = torch.multinomial(probabilities, 2 * rows, replacement=True, generator=generator)
        v = drawn.view(rows, 2).float() + 3
        if noisy:
            v = v + torch.rand(v.shape, generator=generator) - 0.5
        return density(v).mean() / math.log(2)

    before = bits(noisy=False, rows=20000).item()
    for _ in range(400):
        optimizer.zero_grad()
        bits(noisy=True).backward()
        optimizer.step()
    after = bits(noisy=False, rows=20000).item()
    assert before > true_bits + 2, f"{before:.2f} bits before training: nothing to learn"
    assert after > true_bits - 0.05, f"{after:.3f} bits, below the entropy of {true_bits:.3f}"
    assert after < true_bits + 0.25, (
        f"{before:.2f} bits before, {after:.3f} after; the entropy is {true_bits:.3f}"
    )

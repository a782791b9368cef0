"""The learned density q(ŷ) of a bottleneck: factorized, non-parametric, one per channel.

Ballé et al., "Variational image compression with a scale hyperprior", 2018, appendix 6.1 (the
paper's [24, 25]): a small monotone network gives each channel's cumulative distribution F through
its logit, F(v) = σ(l(v)), and a unit bin has the probability p(v) = F(v + ½) − F(v − ½).

Two things are done differently from the textbook chain of 3×3 matrix products:

* log p is computed in the logarithmic domain. With lower and upper logits l < u,

      σ(u) − σ(l) = σ(u) · σ(−l) · (1 − e^{−(u − l)}),

  so both tails are exact and finite at any |v| without a floor, and the gradient there is the
  slope of the tail, which pulls outliers back. The difference δ = u − l is carried through the
  layers by itself, forward and backward: subtracting two large logits would cancel, and so would
  their gradients. Between the modes of a trained channel, where gates g are near −1, so would
  d + g·t, t = tanh(a + d) − tanh(a): it is written (d − t) + (1 + g)·t, two positive terms. On a
  CPU, which can look at them first, only where a gate is.
* The network has three units a layer: as matrix products it is all overhead. It is written as
  element-wise arithmetic on (rows, channels) slabs, which stay in a CPU's cache and which a GPU
  runs compiled to a few kernels; the backward pass recomputes them instead of storing some forty
  activations per value.
"""

import math
from collections.abc import Iterable
from itertools import pairwise, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cifd_clip.compiled import Compiled

FILTERS = (1, 3, 3, 3, 3, 1)
LAYERS = [(fan_out, fan_in) for fan_in, fan_out in pairwise(FILTERS)]
# Values per slab, of which three units are computed together. On a CPU: large enough for torch to
# share them between threads, small enough for the last-level cache (`benchmarks.entropy`). On a
# GPU: so many that launches don't count, so few that sixty float32 tensors of them fit in 2 GiB.
CPU_SLAB_VALUES = 1 << 15
GPU_SLAB_VALUES = 1 << 23
# A gate below this cancels more than a float32's last digit.
CLOSING = -0.9


class FactorizedDensity(nn.Module):
    """Density of ``channels`` independent variables that carry uniform noise in [-½, ½].

    Parameters stay float32 whatever the model around them is cast to, and the arithmetic is
    float32 under autocast too: in bfloat16 several percent of the likelihoods would be zero.

    Args:
        channels: C.
        init_scale: half-width of the initial density, about.
        generator: draws the initial biases.
    """

    def __init__(
        self, channels: int, init_scale: float = 10.0, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.channels = channels
        scale = init_scale ** (1 / len(LAYERS))
        self.matrices = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.factors = nn.ParameterList()
        for fan_out, fan_in in LAYERS:
            weight = math.log(math.expm1(1 / scale / fan_out))
            self.matrices.append(torch.full((channels, fan_out, fan_in), weight))
            bias = torch.empty(channels, fan_out, 1)
            self.biases.append(bias.uniform_(-0.5, 0.5, generator=generator))
        for units in FILTERS[1:-1]:
            self.factors.append(torch.zeros(channels, units, 1))

    def forward(self, values: Tensor) -> Tensor:
        """The information content −log q(v) of each value.

        Args:
            values: (B, C), already noisy (training) or rounded (evaluation).

        Returns:
            (B, C) float32, in nats.
        """
        parameters = _effective(self.matrices, self.biases, self.factors)
        return -_LogLikelihood.apply(values.float(), *parameters)

    def _apply(self, fn, recurse=True):
        def move_without_cast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_without_cast, recurse)


def _effective(
    matrices: Iterable[Tensor], biases: Iterable[Tensor], factors: Iterable[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Monotone weights (33, C), biases (13, C), gates g (12, C) and 1 + g, of all layers.

    1 + g comes from the factor: made of a g near −1 it would be rounding. Its gradient is in g's.
    None on a CPU where no gate is near.
    """

    def packed(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([t.flatten(1) for t in tensors], 1).t().contiguous()

    factors = packed(factors)
    gates, opening = torch.tanh(factors), None
    if gates.device.type != "cpu" or gates.min() < CLOSING:
        opening = 2 * torch.sigmoid(2 * factors.detach())
    return F.softplus(packed(matrices)), packed(biases), gates, opening


def _layers(weights: Tensor, biases: Tensor, gates: Tensor, opening: Tensor | None) -> list[tuple]:
    """Each layer's weights (out, in, C), biases, gates and 1 + g (out, C); the last has no gate."""
    units = [fan_out for fan_out, _ in LAYERS]
    by_layer = weights.split([fan_out * fan_in for fan_out, fan_in in LAYERS])
    return list(
        zip_longest(
            [weight.unflatten(0, shape) for weight, shape in zip(by_layer, LAYERS)],
            biases.split(units),
            gates.split(units[:-1]),
            () if opening is None else opening.split(units[:-1]),
        )
    )


def _affine(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """(out, rows, C): Σ_i weight[o, i]·inputs[i] (+ bias[o])."""
    outputs = inputs[0] * weight[:, 0, None]
    if bias is not None:
        outputs += bias[:, None]
    for i in range(1, weight.shape[1]):
        outputs.addcmul_(inputs[i], weight[:, i, None])
    return outputs


def _remainder(a: Tensor, d: Tensor, tanh_lower: Tensor, tanh_upper: Tensor) -> Tensor:
    """d − t for t = tanh(a + d) − tanh(a), d > 0, without cancellation.

    Up to ½ t = tanh(d)·(1 − tanh(a)·tanh(a + d)), where d − tanh(d) is, by Lambert's continued
    fraction and to float32's last place, d·m / (105 + 10z + m) with z = d² and m = z·(35 + z). What
    d has above ½ is added as it is: nothing cancels there.
    """
    near = d.clamp(max=0.5)
    tanh_near = (a + near).tanh_()
    z = near.square()
    m = (z + 35).mul_(z)
    of_tanh = (m * near).div_(m.add_(z, alpha=10).add_(105))
    rest = of_tanh.addcmul(near - of_tanh, tanh_lower * tanh_near)
    return rest.add_((d - near).sub(tanh_upper).add_(tanh_near))


def _run(values: Tensor, parameters: tuple[Tensor, ...], tape: list | None = None):
    """Lower logit and difference of the logits of one slab, (rows, C) each.

    Args:
        tape: receives per layer its inputs, lower and difference, and of a hidden layer's units
            tanh(a), tanh(a + d) and their difference t.
    """
    lower = values[None] - 0.5
    difference = torch.ones_like(values[None, :1])  # of a bin: the same in every row
    for weight, bias, gates, opening in _layers(*parameters):
        kept = [lower, difference]
        lower, difference = _affine(weight, lower, bias), _affine(weight, difference, None)
        if gates is not None:
            tanh_lower, tanh_upper = torch.tanh(lower), (lower + difference).tanh_()
            if opening is None:
                change, share = tanh_upper - tanh_lower, gates
            else:
                rest = _remainder(lower, difference, tanh_lower, tanh_upper)
                change, share, difference = difference - rest, opening, rest
            lower = lower.addcmul_(tanh_lower, gates[:, None])
            difference = torch.addcmul(difference, change, share[:, None])
            kept += [tanh_lower, tanh_upper, change]
        if tape is not None:
            tape.append(kept)
    return lower[0], difference[0]


def _log_p(values: Tensor, *parameters: Tensor) -> Tensor:
    """log p of one slab of values."""
    lower, delta = _run(values, parameters)
    log_p = F.logsigmoid(lower + delta)
    log_p += F.logsigmoid(lower.neg_())
    log_p += delta.neg_().expm1_().neg_().log_()
    return log_p


def _gradients(values: Tensor, grad: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Gradients of one slab: of its values, and sums over it of weights, biases and gates."""
    tape: list = []
    lower, delta = _run(values, parameters, tape)
    # d log p / dl = σ(−u) − σ(l) at a constant δ,  d log p / dδ = σ(−u) + 1/(e^δ − 1)
    slope = torch.sigmoid(-(lower + delta))
    grad_lower = (slope - torch.sigmoid(lower)).mul_(grad)[None]
    grad_difference = (slope + delta.expm1().reciprocal_()).mul_(grad)[None]
    of_weights, of_biases, of_gates = [], [], []
    for layer, kept in zip(reversed(_layers(*parameters)), reversed(tape)):
        (weight, _, gates, opening), (inputs, differences, *hidden) = layer, kept
        if hidden:
            tanh_lower, tanh_upper, change = hidden
            closing = -gates[:, None]
            opening = (1 + gates if opening is None else opening)[:, None]
            of_gates.append((grad_lower * tanh_lower).addcmul_(grad_difference, change).sum(1))
            # a + g·tanh(a) has the slope 1 + g − g·tanh²(a) …
            grad_lower.mul_((tanh_lower.square() * closing).add_(opening))
            # … which at a + d is −g·t·(tanh(a) + tanh(a + d)) more.
            grad_lower.addcmul_(
                (tanh_lower + tanh_upper).mul_(change).mul_(closing), grad_difference
            )
            grad_difference.mul_((tanh_upper.square() * closing).add_(opening))
        of_biases.append(grad_lower.sum(1))
        products = [
            (grad_lower * a).addcmul_(grad_difference, d).sum(1)
            for a, d in zip(inputs, differences)
        ]
        of_weights.append(torch.stack(products, 1).flatten(0, 1))
        transposed = weight.transpose(0, 1)
        grad_lower = _affine(transposed, grad_lower, None)
        grad_difference = _affine(transposed, grad_difference, None)
    sums = (torch.cat(kind[::-1]) for kind in (of_weights, of_biases, of_gates))
    return grad_lower[0], *sums


_log_p_slab, _gradients_slab = Compiled(_log_p), Compiled(_gradients)


def _slabs(values: Tensor) -> tuple[Tensor, ...]:
    size = CPU_SLAB_VALUES if values.device.type == "cpu" else GPU_SLAB_VALUES
    return values.split(max(1, size // values.shape[1]))


class _LogLikelihood(torch.autograd.Function):
    """log p(v), element-wise; backward recomputes the network slab by slab."""

    @staticmethod
    def forward(ctx, values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(values, *parameters)
        return torch.cat([_log_p_slab(slab, *parameters) for slab in _slabs(values)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        values, *parameters = ctx.saved_tensors
        slabs = zip(_slabs(values), _slabs(grad.contiguous()))  # one layout: compiled once
        parts = [_gradients_slab(slab, grad_slab, *parameters) for slab, grad_slab in slabs]
        of_values, *of_parameters = zip(*parts)
        return torch.cat(of_values), *(sum(part) for part in of_parameters), None

"""The learned density q(ŷ) of a bottleneck: factorized, non-parametric, one per channel.

Ballé et al., "Variational image compression with a scale hyperprior", 2018, appendix 6.1 (the
paper's [24, 25]): a small monotone network gives each channel's cumulative distribution F through
its logit, F(v) = σ(l(v)), and a unit bin has the probability p(v) = F(v + ½) − F(v − ½).

Two things are done differently from the textbook chain of 3×3 matrix products:

* log p is computed in the logarithmic domain. With lower and upper logits l < u,

      σ(u) − σ(l) = σ(u) · σ(−l) · (1 − e^{−(u − l)}),

  so both tails are exact and finite at any |v| without a floor, and the gradient there is the
  slope of the tail, which pulls outliers back. The difference δ = u − l is carried through the
  layers by itself: subtracting two large logits would cancel.
* The network has three units a layer: as matrix products it is all overhead. It is written as
  element-wise arithmetic on (rows, channels) slabs that stay in the processor's cache, and the
  backward pass recomputes them instead of storing some forty activations per value.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FILTERS = (1, 3, 3, 3, 3, 1)
# Values per slab on a CPU: large enough for torch to share a slab between threads (from 32,768
# values each), small enough for the last-level cache. See `python -m benchmarks.entropy`.
CPU_SLAB_VALUES = 1 << 17

Units = list[Tensor]  # one (rows, channels) tensor per unit of a layer


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
        layers = len(FILTERS) - 1
        scale = init_scale ** (1 / layers)
        self.matrices = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.factors = nn.ParameterList()
        for fan_in, fan_out in pairwise(FILTERS):
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
        return -_LogLikelihood.apply(values.float(), *self._effective_parameters())

    def _effective_parameters(self) -> list[Tensor]:
        """Monotone weights, biases and gates, laid out with channels innermost."""
        weights = [F.softplus(m).permute(1, 2, 0).contiguous() for m in self.matrices]
        biases = [b.squeeze(-1).t().contiguous() for b in self.biases]
        gates = [torch.tanh(f).squeeze(-1).t().contiguous() for f in self.factors]
        return [*weights, *biases, *gates]

    def _apply(self, fn, recurse=True):
        def move_without_cast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_without_cast, recurse)


def _split(parameters: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    layers = len(FILTERS) - 1
    return (
        list(parameters[:layers]),
        list(parameters[layers : 2 * layers]),
        list(parameters[2 * layers :]),
    )


def _affine(weight: Tensor, inputs: Units, bias: Tensor | None) -> Units:
    """One (rows, C) tensor per output unit: Σ_i weight[o, i]·inputs[i] (+ bias[o])."""
    outputs = []
    for o in range(weight.shape[0]):
        first = inputs[0] * weight[o, 0]
        unit = first if bias is None else first.add_(bias[o])
        for i in range(1, weight.shape[1]):
            unit.addcmul_(inputs[i], weight[o, i])
        outputs.append(unit)
    return outputs


def _run(values: Tensor, parameters: tuple[Tensor, ...], tape: list | None = None):
    """Lower logit and difference of the logits of one slab, (rows, C) each.

    Args:
        tape: receives per hidden layer (lower inputs, upper inputs, tanh lower, tanh upper).
    """
    weights, biases, gates = _split(parameters)
    lower: Units = [values - 0.5]
    difference: Units = [torch.ones_like(values)]
    for layer, (weight, bias) in enumerate(zip(weights, biases)):
        if tape is not None:
            inputs = (lower, [a + d for a, d in zip(lower, difference)])
        lower, difference = _affine(weight, lower, bias), _affine(weight, difference, None)
        if layer == len(gates):
            if tape is not None:
                tape.append((*inputs, None, None))
            break
        tanh_lower = [torch.tanh(a) for a in lower]
        tanh_upper = [(a + d).tanh_() for a, d in zip(lower, difference)]
        for unit, (a, d) in enumerate(zip(lower, difference)):
            a.addcmul_(tanh_lower[unit], gates[layer][unit])
            d.addcmul_(tanh_upper[unit] - tanh_lower[unit], gates[layer][unit])
        if tape is not None:
            tape.append((*inputs, tanh_lower, tanh_upper))
    return lower[0], difference[0]


def _slabs(values: Tensor) -> list[Tensor]:
    if values.device.type != "cpu":
        return [values]
    return list(values.split(max(1, CPU_SLAB_VALUES // values.shape[1])))


class _LogLikelihood(torch.autograd.Function):
    """log p(v), element-wise; backward recomputes the network slab by slab."""

    @staticmethod
    def forward(ctx, values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(values, *parameters)
        slabs = []
        for slab in _slabs(values):
            lower, delta = _run(slab, parameters)
            log_p = F.logsigmoid(lower + delta)
            log_p += F.logsigmoid(lower.neg_())
            log_p += delta.neg_().expm1_().neg_().log_()
            slabs.append(log_p)
        return torch.cat(slabs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        values, *parameters = ctx.saved_tensors
        sums = [torch.zeros_like(p) for p in parameters]
        grad_slabs = [
            _backward_slab(slab, grad_slab, parameters, sums)
            for slab, grad_slab in zip(_slabs(values), _slabs(grad))
        ]
        return (torch.cat(grad_slabs), *sums)


def _backward_slab(values: Tensor, grad: Tensor, parameters, sums: list[Tensor]) -> Tensor:
    """Gradient of one slab's values; adds the parameters' gradients to ``sums``."""
    weights, _, gates = _split(parameters)
    weight_sums, bias_sums, gate_sums = _split(sums)
    tape: list = []
    lower, delta = _run(values, parameters, tape)
    # d log p / du = σ(−u) + 1/(e^δ − 1),  d log p / dl = −σ(l) − 1/(e^δ − 1)
    bin_slope = delta.expm1().reciprocal_()
    grad_upper = [(torch.sigmoid(-(lower + delta)) + bin_slope).mul_(grad)]
    grad_lower = [(torch.sigmoid(lower) + bin_slope).mul_(grad).neg_()]
    for layer in reversed(range(len(weights))):
        lower_in, upper_in, tanh_lower, tanh_upper = tape[layer]
        if tanh_lower is not None:
            for unit, gate in enumerate(gates[layer]):
                for tanh, g in (
                    (tanh_lower[unit], grad_lower[unit]),
                    (tanh_upper[unit], grad_upper[unit]),
                ):
                    gate_sums[layer][unit] += (g * tanh).sum(0)
                    slope = tanh.square_().neg_().add_(1).mul_(gate).add_(1)
                    g.mul_(slope)
        for o, (gl, gu) in enumerate(zip(grad_lower, grad_upper)):
            bias_sums[layer][o] += (gl + gu).sum(0)
            for i, (a, b) in enumerate(zip(lower_in, upper_in)):
                weight_sums[layer][o, i] += (gl * a).addcmul_(gu, b).sum(0)
        transposed = weights[layer].transpose(0, 1)
        grad_lower = _affine(transposed, grad_lower, None)
        grad_upper = _affine(transposed, grad_upper, None)
    return grad_lower[0].add_(grad_upper[0])

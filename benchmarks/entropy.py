"""``python -m benchmarks.entropy``: our density against the textbook chain of small matmuls.

Forward and backward of −log p at (rows, channels), same parameters, in turn; and the memory that
each needs beyond parameters and values, in a process of its own.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import command_line, memory, paired, ratios, record, spelled
from cifd_clip.entropy import FactorizedDensity
from training.errors import cli


class Textbook(nn.Module):
    """The same density as its papers and common libraries write it: batched 3×3 products.

    Args:
        density: whose parameters it shares.
    """

    def __init__(self, density: FactorizedDensity):
        super().__init__()
        self.density = density

    def logits(self, values: Tensor) -> Tensor:
        """Logits of the cumulative distribution at values (C, 1, B)."""
        d = self.density
        for layer, (matrix, bias) in enumerate(zip(d.matrices, d.biases)):
            values = torch.matmul(F.softplus(matrix), values) + bias
            if layer < len(d.factors):
                values = values + torch.tanh(d.factors[layer]) * torch.tanh(values)
        return values

    def forward(self, values: Tensor) -> Tensor:
        """−log p of values (B, C), with the sign trick and a floor."""
        values = values.t().unsqueeze(1)
        lower, upper = self.logits(values - 0.5), self.logits(values + 0.5)
        sign = -torch.sign(lower + upper).detach()
        likelihood = torch.abs(torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower))
        return -likelihood.clamp_min(1e-9).log().squeeze(1).t()


def calls(name: str, rows: int, channels: int, device: str, seed: int) -> list[Callable[[], None]]:
    """Forward and backward of a contestant: on two rows, then on all."""
    generator = torch.Generator().manual_seed(seed)
    density = FactorizedDensity(channels, generator=generator)
    values = (torch.randn(rows, channels, generator=generator) * 5).to(device)
    module = (density if name == "ours" else Textbook(density)).to(device)

    def call(values: Tensor) -> Callable[[], None]:
        def run() -> None:
            module.zero_grad()
            values.grad = None
            module(values).sum(1).mean().backward()

        values = values.clone().requires_grad_()
        return run

    return [call(values[:2]), call(values)]


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = command_line("entropy", __doc__, rounds=10)
    add = parser.add_argument
    add("--rows", type=int, default=4096, help="B of the values")
    add("--channels", type=int, default=768, help="C of the values")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    shape, names = (args.rows, args.channels, args.device, args.seed), ("ours", "textbook")
    peaks = {name: memory(calls, name, *shape) for name in names}
    beyond = {name: peak - before for name, (before, peak) in peaks.items()}
    steps = {name: calls(name, *shape)[1] for name in names}
    seconds = paired(steps, args.rounds, device=torch.device(args.device))
    ratio = ratios(seconds, "textbook", "ours")
    for name, times in seconds.items():
        print(f"{name:10} {1000 * statistics.median(times):8.1f} ms {beyond[name]:8.0f} MiB")
    print(f"textbook / ours, pair by pair: {spelled(ratio)}")
    print(f"memory: textbook / ours = {beyond['textbook'] / max(beyond['ours'], 1e-9):.1f}")
    record("entropy", args, {"seconds": seconds, "memory_mib": beyond, "speedup": ratio})


if __name__ == "__main__":
    cli(main)

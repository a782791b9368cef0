"""``python -m benchmarks.entropy``: our density against the textbook chain of small matmuls.

Forward and backward of −log p at (rows, channels), same parameters, in turn; peak memory of each
in a process of its own.
"""

import argparse
import multiprocessing
import resource
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import paired, ratios, record
from cifd_clip.entropy import FactorizedDensity


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


def _step(module: nn.Module, values: Tensor) -> None:
    module.zero_grad()
    values.grad = None
    module(values).sum(1).mean().backward()


def _setup(name: str, rows: int, channels: int, device: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    density = FactorizedDensity(channels, generator=generator)
    values = torch.randn(rows, channels, generator=generator) * 5
    module = density if name == "ours" else Textbook(density)
    return module.to(device), values.to(device).requires_grad_()


def _peak(name, rows, channels, device, seed, queue) -> None:
    module, values = _setup(name, rows, channels, device, seed)
    _step(module, values[:2].detach().requires_grad_())
    if device == "cpu":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _step(module, values)
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(module, values)
        queue.put((torch.cuda.max_memory_allocated() - before) / 2**20)


def peak_megabytes(name: str, rows: int, channels: int, device: str, seed: int) -> float:
    """Memory that one step needs beyond parameters and values, in MiB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(name, rows, channels, device, seed, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="save the figures here")
    args = parser.parse_args()
    shape = (args.rows, args.channels, args.device, args.seed)
    # First: a child process starts with its parent's peak.
    memory = {name: peak_megabytes(name, *shape) for name in ("ours", "textbook")}
    steps = {name: _setup(name, *shape) for name in memory}
    seconds = paired(
        {name: lambda pair=pair: _step(*pair) for name, pair in steps.items()},
        args.rounds,
        device=torch.device(args.device),
    )
    ratio = ratios(seconds, "textbook", "ours")
    for name, times in seconds.items():
        print(f"{name:10} {1000 * statistics.median(times):8.1f} ms {memory[name]:8.0f} MiB")
    print(f"textbook / ours, pair by pair: {ratio}")
    print(f"memory: textbook / ours = {memory['textbook'] / max(memory['ours'], 1e-9):.1f}")
    figures = {"seconds": seconds, "memory_mib": memory, "speedup": ratio, "seed": args.seed}
    figures["shape"] = [args.rows, args.channels]
    record("entropy", figures, args.json)


if __name__ == "__main__":
    main()

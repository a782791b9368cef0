"""AdamW, the learning rate, and the average of weights."""

from argparse import Namespace

import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from torch import nn

from cifd_clip import FactorizedDensity, Task
from training.errors import UsageError


def make_optimizer(args: Namespace, task: Task) -> torch.optim.Optimizer:
    """AdamW over four kinds of parameters.

    Matrices decay; gains, biases and temperatures don't (OpenCLIP's rule). A density's parameters
    never decay, although they are matrices: decay would pull it to a fixed shape. They learn
    faster, because a rate term can only shape the features once the density fits them.
    """
    density = {
        id(p) for m in task.modules() if isinstance(m, FactorizedDensity) for p in m.parameters()
    }
    groups = {
        "decay": {"params": [], "weight_decay": args.wd, "lr_scale": 1.0},
        "plain": {"params": [], "weight_decay": 0.0, "lr_scale": 1.0},
        "density": {"params": [], "weight_decay": 0.0, "lr_scale": args.density_lr},
    }
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or any(
            word in name for word in ("bn", "ln", "bias", "logit_scale")
        )
        kind = "density" if id(parameter) in density else "plain" if plain else "decay"
        groups[kind]["params"].append(parameter)
    return torch.optim.AdamW(
        [g for g in groups.values() if g["params"]],
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.eps,
        fused=True,
    )


def make_schedule(args: Namespace, optimizer: torch.optim.Optimizer, steps_per_epoch: int):
    """step → learning rate, by OpenCLIP's schedulers; warm-up is a sixth of training by default."""
    total = args.epochs * steps_per_epoch
    warmup = total // 6 if args.warmup is None else args.warmup
    if warmup >= total:
        raise UsageError(
            f"--warmup {warmup} leaves nothing of the {total} steps; the paper warms up for 1/6"
        )
    if args.lr_scheduler == "cosine":
        return cosine_lr(optimizer, args.lr, warmup, total)
    if args.lr_scheduler == "const":
        return const_lr(optimizer, args.lr, warmup, total)
    return const_lr_cooldown(
        optimizer,
        args.lr,
        warmup,
        total,
        args.epochs_cooldown * steps_per_epoch,
        args.lr_cooldown_power,
        args.lr_cooldown_end,
    )


class MovingAverage:
    """The exponential moving average of a model's weights (``--ema``).

    After each step, average ← d·average + (1 − d)·model; buffers (batch statistics) are copied.
    d is the decay, at first min(decay, (1 + step) / (10 + step)), TensorFlow's warm-up, or the
    initial weights would stay in the average of a short run. Nothing waits for the device.

    Args:
        average: a copy of the model, averaged in place.
        model: what trains.
        decay: d, in (0, 1).
    """

    def __init__(self, average: nn.Module, model: nn.Module, decay: float):
        self.decay = decay
        self._weights = list(average.parameters()), list(model.parameters())
        self._buffers = list(average.buffers()), list(model.buffers())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (from 0).

        A step that was skipped, its gradient not being finite, counts with the weights it left.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        average, model = self._weights
        torch._foreach_lerp_(average, model, 1 - decay)
        if self._buffers[0]:
            torch._foreach_copy_(*self._buffers)

"""Optimizers, the learning rate, and the average of weights."""

import math
from collections.abc import Callable

import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from cifd_clip import FactorizedDensity
from training.engine.config import OptimConfig
from training.errors import UsageError


def density_parameters(task: nn.Module) -> list[nn.Parameter]:
    """The parameters of a task's densities."""
    densities = (m for m in task.modules() if isinstance(m, FactorizedDensity))
    return [p for density in densities for p in density.parameters()]


def one_adamw(config: OptimConfig, task: nn.Module) -> list[Optimizer]:
    """AdamW over three kinds of parameters, as CLIP models are trained.

    Matrices decay; gains, biases and temperatures don't (OpenCLIP's rule). A density's parameters
    never decay, although they are matrices: decay would pull it to a fixed shape. They learn
    faster, because a rate term can only shape the features once the density fits them.
    """
    density = {id(p) for p in density_parameters(task)}
    groups = {
        "decay": {"params": [], "weight_decay": config.wd, "lr_scale": 1.0},
        "plain": {"params": [], "weight_decay": 0.0, "lr_scale": 1.0},
        "density": {"params": [], "weight_decay": 0.0, "lr_scale": config.density_lr},
    }
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or any(
            word in name for word in ("bn", "ln", "bias", "logit_scale")
        )
        kind = "density" if id(parameter) in density else "plain" if plain else "decay"
        groups[kind]["params"].append(parameter)
    return [
        AdamW(
            [g for g in groups.values() if g["params"]],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
    ]


def with_adam_for_densities(
    config: OptimConfig, task: nn.Module, momentum: float
) -> list[Optimizer]:
    """SGD or AdamW over all parameters but the densities', which learn under Adam.

    Whatever trains the rest: the weight of a rate term scales the density's gradient too, and under
    SGD a small λ_I would leave the density as it was drawn.
    """
    densities = density_parameters(task)
    known = {id(p) for p in densities}
    rest = [p for p in task.parameters() if p.requires_grad and id(p) not in known]
    options = {"lr": config.lr, "weight_decay": config.wd, "fused": True}
    if config.opt == "sgd":
        optimizers: list[Optimizer] = [SGD(rest, momentum=momentum, **options)]
        for parameter in rest if momentum else ():
            # torch would leave it as memory held it where the first step is skipped
            optimizers[0].state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    else:
        betas = (config.beta1, config.beta2)
        optimizers = [AdamW(rest, betas=betas, eps=config.eps, **options)]
    if densities:
        optimizers.append(Adam(densities, lr=config.lr * config.density_lr, fused=True))
        optimizers[-1].param_groups[0]["lr_scale"] = config.density_lr
    optimizers[0].param_groups[0]["lr_scale"] = 1.0
    return optimizers


def make_schedule(
    config: OptimConfig, optimizer: Optimizer, steps_per_epoch: int
) -> Callable[[int], float]:
    """step → learning rate; by OpenCLIP's schedulers where it has them.

    Raises:
        UsageError: the warm-up leaves no step.
    """
    total = config.epochs * steps_per_epoch
    if config.warmup_epochs is not None:
        warmup = config.warmup_epochs * steps_per_epoch  # not always whole
    else:
        warmup = total // 6 if config.warmup is None else config.warmup
    if warmup >= total:
        raise UsageError(
            f"--warmup {warmup} leaves nothing of the {total} steps; the paper warms up for 1/6"
        )
    if config.lr_scheduler == "cosine":
        return cosine_lr(optimizer, config.lr, warmup, total)
    if config.lr_scheduler == "const":
        return const_lr(optimizer, config.lr, warmup, total)
    if config.lr_scheduler == "const-cooldown":
        return const_lr_cooldown(
            optimizer,
            config.lr,
            warmup,
            total,
            config.epochs_cooldown * steps_per_epoch,
            config.lr_cooldown_power,
            config.lr_cooldown_end,
        )

    def by_epochs(step: int) -> float:
        if step < warmup:
            return config.lr * (step + 1) / warmup
        if config.lr_scheduler == "linear":
            return config.lr * (total - step) / (total - warmup)
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return config.lr * math.pow(config.gamma, passed)

    return by_epochs


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

"""``python -m experiments.gradient_shares RUN``: what each term of a loss pulls with.

Of a run of training.main: the norm of each term's gradient on the student's image and text tower,
relative to the gradient of the whole loss, before its first step and after its last.
"""

from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from cifd_clip import Noise, World
from experiments.seeds import table
from experiments.study import command_line
from training.clip.config import recorded
from training.clip.models import add_model_configs
from training.clip.run import epoch_steps, make_loader, open_data
from training.clip.stages import StudentStage
from training.engine.checkpoint import Checkpoints
from training.engine.environment import origin
from training.engine.run import bank_folder, holds_bank
from training.engine.trainer import Trainer
from training.errors import UsageError, cli

TOWERS = ("image", "text")


def towers(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each tower of an OpenCLIP model."""
    parameters: dict[str, list[nn.Parameter]] = {tower: [] for tower in TOWERS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "logit" not in name:
            parameters["image" if name.startswith("visual.") else "text"].append(parameter)
    return parameters


def shares(losses: dict[str, Tensor], model: nn.Module) -> dict[str, dict[str, float]]:
    """Term → tower → the norm of its gradient over that of the sum of all terms."""
    parameters = towers(model)

    def norms(loss: Tensor) -> dict[str, float]:
        norms = {}
        for tower, own in parameters.items():
            gradients = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
            norms[tower] = sum(g.square().sum() for g in gradients if g is not None) ** 0.5
        return norms

    whole = norms(sum(losses.values()))
    return {
        name: {tower: float(norm / whole[tower]) for tower, norm in norms(loss).items()}
        for name, loss in losses.items()
    }


def measure(run: Path, batches: int) -> dict[str, dict[str, dict[str, float]]]:
    """``start`` and ``end`` → term → tower → its relative gradient, the mean over batches."""
    config = recorded(run)
    trained = Checkpoints(run / "checkpoints").newest()
    if config.distill == "rdm" or config.lock_image or config.lock_text or trained is None:
        raise UsageError(f"{run}: expected a student with both towers trained, and a checkpoint")
    add_model_configs(config.model_config)
    world, cpu = World(), torch.device("cpu")
    sources = open_data(config, world)
    banks = config.banks or [folder for folder in [bank_folder(run)] if holds_bank(folder)]
    by_moment = {}
    for moment in ("start", "end"):
        stage = StudentStage(config, cpu, world, banks)
        trainer = Trainer(stage, config, epoch_steps(config, sources))
        if moment == "end":
            trainer.load(trained[1])
        stage.task.train()
        loader = make_loader(config, sources, trainer)
        measured, first = [], trainer.progress.step
        for step, batch in enumerate(loader.batches(first, first + batches), first):
            noise = Noise(config.seed, step)
            targets = stage.with_assistants(stage.targets(batch), noise)
            losses, _ = stage.task(*stage.inputs(batch), targets, noise)
            measured.append(shares(losses, stage.task.student.model))
        loader.close()
        by_moment[moment] = {
            term: {tower: fmean(one[term][tower] for one in measured) for tower in TOWERS}
            for term in measured[0]
        }
    return by_moment


def main(argv: list[str]) -> int:
    """Print the table of a run."""
    parser = command_line("experiments.gradient_shares", __doc__)
    parser.add_argument("run", type=Path, help="a run directory of training.main")
    parser.add_argument("--batches", type=int, default=8, help="whose mean is taken")
    args = parser.parse_args(argv)
    measured = measure(args.run, args.batches)
    heads = ["term", *(f"{moment}, {tower} tower" for moment in measured for tower in TOWERS)]
    rows = [
        [term, *(f"{measured[m][term][t]:.3f}" for m in measured for t in TOWERS)]
        for term in measured["end"]
    ]
    print("`{command}`, commit {commit}\n".format(**origin()), table(heads, rows), sep="\n")
    return 0


if __name__ == "__main__":
    cli(main)

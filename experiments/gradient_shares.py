"""``python -m experiments.gradient_shares RUN``: what each term of a loss pulls with.

Of a run of ``training.main``: the norm of each term's gradient on the student's image and text
tower, relative to the gradient of the whole loss, before its first step and after its last.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from cifd_clip import Noise, World
from eval.tables import markdown
from training.clip.models import add_model_configs
from training.clip.run import epoch_steps, make_loader, open_data
from training.clip.stages import StudentStage
from training.engine.checkpoint import Checkpoints
from training.engine.environment import origin
from training.engine.trainer import Trainer
from training.errors import UsageError, cli

TOWERS = ("image", "text")


def towers(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each tower of an OpenCLIP model."""
    found: dict[str, list[nn.Parameter]] = {tower: [] for tower in TOWERS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "logit" not in name:
            found["image" if name.startswith("visual.") else "text"].append(parameter)
    return found


def pulls(losses: dict[str, Tensor], model: nn.Module) -> dict[str, dict[str, float]]:
    """Term → tower → the norm of its gradient over that of the sum of all terms."""
    wanted = towers(model)

    def norms(loss: Tensor) -> dict[str, float]:
        gradients = {
            tower: torch.autograd.grad(loss, ps, retain_graph=True, allow_unused=True)
            for tower, ps in wanted.items()
        }
        return {
            tower: sum(g.square().sum() for g in of_tower if g is not None) ** 0.5
            for tower, of_tower in gradients.items()
        }

    whole = norms(sum(losses.values()))
    return {
        name: {tower: float(norm / whole[tower]) for tower, norm in norms(loss).items()}
        for name, loss in losses.items()
    }


def measure(run: Path, batches: int) -> dict[str, dict[str, dict[str, float]]]:
    """``start`` and ``end`` → term → tower → its relative gradient, the mean over batches."""
    config = run / "config.json"
    if not config.is_file():
        raise UsageError(f"{run} is no run of training.main: {config.name} is not there")
    args = argparse.Namespace(**json.loads(config.read_text()))
    trained = Checkpoints(run / "checkpoints").newest()
    if args.distill == "rdm" or args.lock_image or args.lock_text or trained is None:
        raise UsageError(f"{run}: expected a student with both towers trained, and a checkpoint")
    add_model_configs(args.model_config)
    world, cpu = World(), torch.device("cpu")
    sources = open_data(args, world)
    found = {}
    for moment in ("start", "end"):
        stage = StudentStage(args, cpu, world)
        trainer = Trainer(args, stage, world, cpu, epoch_steps(args, sources, args.batch_size))
        if moment == "end":
            trainer.load(trained[1])
        stage.task.train()
        loader = make_loader(args, sources, trainer, args.batch_size)
        seen, first = [], trainer.progress.step
        for step, batch in enumerate(loader.batches(first, first + batches), first):
            noise = Noise(args.seed, step)
            teachers = stage.assisted(stage.teachers(batch), noise)
            losses, _ = stage.task(*stage.student_inputs(batch), teachers, noise)
            seen.append(pulls(losses, stage.task.student.model))
        loader.close()
        found[moment] = {
            term: {tower: fmean(one[term][tower] for one in seen) for tower in TOWERS}
            for term in seen[0]
        }
    return found


def main(argv: list[str]) -> int:
    """Print the table of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gradient_shares", description=__doc__
    )
    parser.add_argument("run", type=Path, help="a run directory of training.main")
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args(argv)
    found = measure(args.run, args.batches)
    heads = [f"{moment}, {tower} tower" for moment in found for tower in TOWERS]
    lines = [["term", *heads], ["---", *["---:"] * len(heads)]]
    for term in found["end"]:
        lines.append([term, *(f"{found[m][term][t]:.3f}" for m in found for t in TOWERS)])
    made = origin()
    print(f"`{made['command']}`, commit {made['commit']}\n\n{markdown(lines)}")
    return 0


if __name__ == "__main__":
    cli(main)

"""Runs of `training.classify`: the one place where studies spell its flags."""

from collections.abc import Sequence

from experiments.study import Run

#: The student in bfloat16.
BF16 = "--precision amp_bf16"
#: What tuning varies: flag → (lowest, highest, whether on a logarithmic scale).
SPACE = {
    "lr": (3e-3, 0.2, True),
    "momentum": (0.8, 0.98, False),
    "tau": (1.0, 10.0, True),
    "kd-dropout": (0.0, 0.7, False),
    "lambda-kl": (0.05, 20.0, True),
    "lambda-n": (0.05, 5.0, True),
    "lambda-emb": (1e-3, 100.0, True),
    "lambda-i": (1e-4, 1.0, True),
    "lambda-ft": (1.0, 1000.0, True),
    "density-lr": (0.05, 5.0, True),  # in multiples of the learning rate
}
#: The decay of the learning rate is tuned too: flag → choices.
CHOICES = {"lr-scheduler": ("cosine", "linear", "const")}


def classifier(
    name: str,
    method: str,
    settings: str,
    model: str = "",
    teachers: Sequence[str] = (),
    *more: str,
    data: str = "{data}",
    where: Sequence[str] = (),
    **other,
) -> Run:
    """A run on the CPU that goes on where it was stopped.

    Args:
        settings: flags in one string; of one given twice, the later holds.
        model: what trains; empty for RDMs and paraphrasers.
        teachers: names of runs.
        more: flags after all others.
        data: the data set's folder.
        where, other: of `Run`.
    """
    flags = [f"--method={method}", *settings.split()]
    if model:
        flags.append(f"--model={model}")
    if teachers:
        flags.append("--teacher=" + ",".join(f"{{{teacher}}}" for teacher in teachers))
    place = (f"--data={data}", "--logs={logs}", "--name={name}", "--resume=latest", *where)
    return Run(name, "training.classify", (*flags, *more), where=(*place, "--device=cpu"), **other)

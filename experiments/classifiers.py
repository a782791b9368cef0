"""Runs of `training.classify`: the one place where studies spell its flags."""

from collections.abc import Sequence

from experiments.study import Run

#: The student in bfloat16.
BF16 = "--precision amp_bf16"


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

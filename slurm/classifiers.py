"""Studies of classifiers: grids whose lines are flags of `training.classify`.

    classify-1 (array)  ->  classify-2 (array)  ->  ...  ->  report

A run comes after those that its ``--teacher``, ``--rdm-bank`` and ``--paraphraser`` name: teachers
are in the first job, RDM banks and students that need only them in the second, and so on. Those on
ImageNet have the site's processes, which share each batch; those on CIFAR-100 one each.
"""

from pathlib import Path

from cifd_clip.classification.models import STOCK
from slurm.jobs import Job, Line, Site, read_lines
from training.classifier.config import parse, resolve
from training.errors import UsageError


def read_grid(path: Path, site: Site, extra: list[str]) -> list[Line]:
    """The runs of a grid file; `extra` flags win over every line's.

    Raises:
        UsageError: a line is no valid command line, or needs a run that neither an earlier line
            nor the disk has. Files of weights may be `missing`.
    """
    logs = str(site.logs(path))
    device = "cuda" if site["GRES"] else "cpu"
    earlier: set[Path] = set()

    def read(line: list[str]) -> Line:
        flags = ["--device", device, *line, "--logs", logs]
        given = parse(flags)
        run = Line(flags, resolve(given, site.ranks if given.get("dataset") == "imagenet" else 1))
        for needed in needs(run):
            if not (needed in earlier or needed in weights([run]) or needed.exists()):
                raise UsageError(f"'{needed}' neither exists nor is trained by an earlier line")
        earlier.add(run.path)
        return run

    return read_lines(path, site, read, extra)


def needs(run: Line) -> list[Path]:
    """The runs, or files of weights, that a run reads."""
    config = run.config
    places = [*config.teachers, config.rdm_bank, config.paraphraser]
    return [Path(place.partition(":")[2] or place) for place in places if place]


def weights(runs: list[Line]) -> dict[Path, str]:
    """The files of stock models' weights that runs read, and whose they are."""
    places = (place.partition(":") for run in runs for place in run.config.teachers)
    return {Path(file): name for name, _, file in places if file and name in STOCK}


def missing(runs: list[Line]) -> list[str]:
    """Files that are not there and that no job makes, with where they come from."""
    files = weights(runs).items()
    return [f"{file} ({origin(name)})" for file, name in files if not file.is_file()]


def origin(name: str) -> str:
    """Where the weights of a stock model come from: torchvision's first ones are the paper's."""
    if STOCK[name][0] != "torchvision":
        return f"{STOCK[name][0]}'s {name}"
    from torchvision.models import get_model_weights  # takes seconds to import

    return get_model_weights(name)["IMAGENET1K_V1"].url


def levels(runs: list[Line]) -> list[list[Line]]:
    """Runs by how many others, one needing the next, have to end before."""
    level: dict[Path, int] = {}
    for run in runs:  # those it needs come earlier
        level[run.path] = 1 + max((level.get(path, 0) for path in needs(run)), default=0)
    deepest = max(level.values())
    return [[run for run in runs if level[run.path] == n] for n in range(1, deepest + 1)]


def chain(runs: list[Line], site: Site) -> list[Job]:
    """The jobs of a study, each after the one before.

    Whatever became of the others: a task whose teacher failed says so and ends, and the rest of
    its job does not suffer.
    """
    jobs: list[Job] = []
    large = any(run.config.dataset == "imagenet" for run in runs)
    shape = (site.number("NODES"), site.number("RANKS_PER_NODE")) if large else (1, 1)
    for number, level in enumerate(levels(runs), 1):
        after = (("afterany", jobs[-1].name),) if jobs else ()
        jobs.append(Job(f"classify-{number}", [run.flags for run in level], *shape, after=after))
    page = [str(runs[0].path.parent / "report.html"), *(str(run.path) for run in runs)]
    return [*jobs, Job("report", [page], gpus=False, after=(("afterany", jobs[-1].name),))]


def cost(job: Job, site: Site) -> tuple[float, float] | str:
    """GPU hours and bytes; or, as here, why there is no telling."""
    return "classifiers are not estimated"


def preparation(runs: list[Line], site: Site) -> str:
    """What has to be there before; of what is missing, where it comes from."""
    images = dict.fromkeys(f"{run.config.dataset}'s images in {run.config.data}" for run in runs)
    trained = {run.path for run in runs}
    teachers = {str(path): None for run in runs for path in needs(run) if path not in trained}
    files = missing(runs)
    parts = {"": images, "its teachers ": teachers, "not there yet: ": files}
    return "; ".join(f"{what}{', '.join(these)}" for what, these in parts.items() if these)

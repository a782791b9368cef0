"""Studies of tuning: grids whose lines are flags of `training.tune`.

    tune (array: TUNE_TASKS tasks work on each line's study)

Each task is a process on one GPU, or on a node's share of cores; flags after -- are of the runs.
"""

from pathlib import Path

from slurm.jobs import Job, Line, Site, read_lines
from training.tuning.plan import parse


def read_grid(path: Path, site: Site, extra: list[str]) -> list[Line]:
    """The studies of a grid file; `extra` flags are of every run.

    Raises:
        UsageError: a line is no valid command line, or names what is not there.
    """
    device = "cuda" if site["GRES"] else "cpu"

    def read(line: list[str]) -> Line:
        place = line.index("--") if "--" in line else len(line)
        ours = [*line[:place], "--logs", str(site.logs(path))]
        flags = [*ours, "--", "--device", device, *line[place + 1 :]]
        return Line(flags, parse(flags))

    return read_lines(path, site, read, extra)


def missing(runs: list[Line]) -> list[str]:
    """Nothing: what a line names was there when it was read."""
    return []


def chain(runs: list[Line], site: Site) -> list[Job]:
    """One job, whose tasks share the studies."""
    tasks = [run.flags for run in runs for _ in range(site.number("TUNE_TASKS"))]
    return [Job("tune", tasks)]


def cost(job: Job, site: Site) -> str:
    """Why there is no telling."""
    return "studies are not estimated"


def preparation(runs: list[Line], site: Site) -> str:
    """What has to be there before."""
    return "the data, teacher caches and banks that the lines name"

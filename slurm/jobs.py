"""What a study on SLURM is made of: the site, lines of a grid, jobs, and how they get there."""

import shlex
import string
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifd_clip.files import BadFile, write_text
from training.engine.flags import expand_files, line_words
from training.errors import Failure, UsageError


class Site(dict[str, str]):
    """The variables of ``slurm/cluster.env``: what your cluster and data are called."""

    @classmethod
    def read(cls, path: Path) -> "Site":
        """Let the shell read the file, as the jobs do."""
        if not path.is_file():
            raise UsageError(f"--cluster '{path}': no such file; see slurm/cluster.env")
        script = 'set -a; source "$1"; env -0'
        done = subprocess.run(["bash", "-ec", script, "-", path], capture_output=True, check=False)
        if done.returncode:
            raise UsageError(f"--cluster '{path}': {done.stderr.decode().strip()}")
        lines = done.stdout.decode().split("\0")
        site = cls(line.split("=", 1) for line in lines if "=" in line)
        site["CLUSTER"] = str(path)  # the jobs read it too
        for name in ("PYTHON", "MAX_RESTARTS"):  # or they would be the first to miss them
            site[name]
        return site

    def __missing__(self, name: str) -> str:
        raise UsageError(
            f"unknown variable '{name}': {self.file} does not set it; slurm/cluster.env does, and "
            "a file of your own may source that first"
        )

    @property
    def file(self) -> str:
        return self.get("CLUSTER", "cluster.env")

    def number(self, name: str) -> int:
        if not self[name].isdecimal() or not int(self[name]):
            raise UsageError(f"{name}='{self[name]}' in {self.file}: expected a positive number")
        return int(self[name])

    @property
    def ranks(self) -> int:
        return self.number("NODES") * self.number("RANKS_PER_NODE")

    def logs(self, grid: Path) -> Path:
        """Where a study's runs, its page and the logs of its jobs go."""
        logs = Path(self["LOGS"]) / grid.stem
        if "%" in str(logs):
            raise UsageError(
                f"'{logs}' (LOGS of {self.file}, and the study's name): SLURM reads a % in the "
                "name of a log as a pattern; choose a path without"
            )
        return logs


@dataclass(frozen=True)
class Line:
    """A run, as a line of a grid: its flags, recipes included, and as its program reads them."""

    flags: list[str]
    config: Any

    @property
    def path(self) -> Path:
        return Path(self.config.logs) / self.config.name


@dataclass
class Job:
    """One batch script, the flags of each of its tasks, and their nodes and processes per node.

    ``after``: (kind of dependency, name of a job), where that job exists.
    """

    name: str
    tasks: list[list[str]]
    nodes: int = 1
    ranks: int = 1
    gpus: bool = True
    after: tuple[tuple[str, str], ...] = ()

    @property
    def script(self) -> str:
        return f"slurm/{self.name.partition('-')[0]}.sbatch"


def read_lines(
    path: Path, site: Site, read: Callable[[list[str]], Line], extra: list[str]
) -> list[Line]:
    """The runs of a grid file, one per line, with the `extra` words after those of each.

    In it ``$VARIABLES`` are the site's, ``$LOGS`` the study's folder. Recipes are read now and not
    in the tasks: one that is edited meanwhile changes none that waits.

    Raises:
        UsageError: a line is no valid command line, a name comes twice, or there is none.
    """
    logs, runs = site.logs(path), dict[str, Line]()
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            text = string.Template(text).substitute(site, LOGS=str(logs))
            if not (line := line_words(text)):
                continue
            run = read(expand_files([*line, *extra]))
        except (UsageError, BadFile, ValueError) as error:
            raise UsageError(f"{path}:{number}: {error}") from error
        name = run.config.name
        if name in runs:
            raise UsageError(f"{path}:{number}: a second run '{name}'; give it a --name")
        # always with a --name, by which its batch script knows the run's directory
        end = run.flags.index("--") if "--" in run.flags else len(run.flags)
        runs[name] = Line([*run.flags[:end], "--name", name, *run.flags[end:]], run.config)
    if not runs:
        raise UsageError(f"{path} has no runs: every line is one, as flags of its program")
    return list(runs.values())


def sbatch(job: Job, study: str, logs: Path, site: Site, submitted: dict[str, str]) -> list[str]:
    """The command that submits a job; `submitted` maps jobs before it to their numbers."""
    lines = logs / "plan" / f"{job.name}.lines"
    command = [
        *("sbatch", "--parsable", f"--job-name={study}-{job.name}", f"--array=1-{len(job.tasks)}"),
        *(f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks}"),
        f"--cpus-per-task={site.number('CPUS_PER_RANK')}",
        f"--output={logs}/slurm/{job.name}-%a.log",
    ]
    if site["GRES"] and job.gpus:
        command.append(f"--gres={site['GRES']}:{job.ranks}")
    after = [f"{kind}:{submitted[name]}" for kind, name in job.after if name in submitted]
    if after:
        command.append(f"--dependency={','.join(after)}")
    return [*command, job.script, str(lines)]


def shell_line(words: list[str]) -> str:
    """Words as bash reads them back, on one line whatever is in them."""
    return shlex.join(words).replace("\n", "'$'\\n''")  # a line's end stands within '...'


def submit(jobs: list[Job], study: str, logs: Path, site: Site) -> dict[str, str]:
    """Submit the chain, all of it or, if SLURM refuses a job, nothing; job numbers by name."""
    (logs / "slurm").mkdir(parents=True, exist_ok=True)
    submitted: dict[str, str] = {}
    for job in jobs:
        text = "".join(f"{shell_line(task)}\n" for task in job.tasks)
        # for its user alone: a source of shards may hold a password
        write_text(logs / "plan" / f"{job.name}.lines", text, mode=0o600)
        command = sbatch(job, study, logs, site, submitted)
        done = _slurm(command, site)
        if done.returncode:
            if submitted:
                subprocess.run(["scancel", *submitted.values()], env=dict(site), check=False)
            raise Failure(f"sbatch refused {job.name}, nothing was left: {done.stderr.strip()}")
        submitted[job.name] = done.stdout.strip().partition(";")[0]
    return submitted


def running(jobs: list[Job], study: str, site: Site) -> list[str]:
    """Numbers of the study's jobs, of these names, that wait or run already."""
    names = {f"{study}-{job.name}" for job in jobs}
    done = _slurm(["squeue", "--noheader", "--me", "--format=%i %j"], site)
    listed = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return [number for number, name in listed if name in names]


def _slurm(command: list[str], site: Site) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, env=dict(site), check=False)
    except FileNotFoundError as error:
        raise UsageError(f"{command[0]} is not here: submit from a login node of SLURM") from error

"""``slurm/submit.sh STUDY``: the runs of a grid as one chain of SLURM jobs.

    cache  ->  rdm  ->  distill (array)  ->  eval (array, task by task)  ->  report

A grid has one run per line, flags of `training.main`; lines with ``--distill rdm`` are stage 1 and
come first. What every task of every job runs is one line of ``LOGS/STUDY/plan/JOB.lines``, written
when the study is submitted: editing the grid later does not move a task to another run. Submitting
a study again goes on with it: what is finished ends at once.
"""

import argparse
import re
import shlex
import string
import subprocess
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from training.errors import Failure, UsageError, cli
from training.params import batch_share, parse_args, teacher_names

GRIDS = Path("slurm/grids")


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
        return cls(line.split("=", 1) for line in done.stdout.decode().split("\0") if "=" in line)

    def number(self, name: str) -> int:
        """A variable that counts something."""
        if not self[name].isdecimal() or not int(self[name]):
            raise UsageError(f"{name}='{self[name]}' in cluster.env: expected a positive number")
        return int(self[name])

    @property
    def ranks(self) -> int:
        """Processes of a training run."""
        return self.number("NODES") * self.number("RANKS_PER_NODE")


@dataclass
class Run:
    """One line of a grid: the flags as given, and as `training.main` understands them."""

    flags: list[str]
    args: Namespace

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.args.logs) / self.args.name


@dataclass
class Job:
    """One batch script, its tasks, and what they wait for.

    Args:
        name: of the job, of its script and of its file of lines.
        tasks: the flags of each task.
        nodes, ranks: processes per task.
        after: (kind of dependency, name of a job), where that job exists.
    """

    name: str
    tasks: list[list[str]]
    nodes: int = 1
    ranks: int = 1
    gpus: bool = True
    after: tuple[tuple[str, str], ...] = ()

    @property
    def script(self) -> str:
        """The batch script."""
        return f"slurm/{self.name.partition('-')[0]}.sbatch"


def read_grid(path: Path, site: Site, extra: list[str]) -> list[Run]:
    """The runs of a grid file; `extra` flags win over every line's.

    Raises:
        UsageError: a line is no valid command line, or the lines contradict each other.
    """
    logs = Path(site["LOGS"]) / path.stem
    runs: dict[str, Run] = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            text = string.Template(text).substitute(site, LOGS=str(logs))
            line = shlex.split(text, comments=True)
            if not line:
                continue
            flags = [
                *("--train-data", site["TRAIN_DATA"], *line, *extra, "--logs", str(logs)),
                *("--wandb-project-name", path.stem),  # a W&B run is called by the run's name
            ]
            run = Run(flags, parse_args(flags))
            if run.args.global_batch is not None:
                batch_share(run.args, site.ranks)
        except (UsageError, ValueError, KeyError) as error:
            what = f"unknown variable {error}" if isinstance(error, KeyError) else error
            raise UsageError(f"{path}:{number}: {what}") from error
        if run.args.name in runs:
            raise UsageError(f"{path}:{number}: a second run '{run.args.name}'; give it a --name")
        runs[run.args.name] = run
    if not runs:
        raise UsageError(f"{path} has no runs: every line is one, as flags of training.main")
    banks = {run.path / "bank" for run in runs.values() if run.args.distill == "rdm"}
    for run in runs.values():
        bank = run.args.rdm_bank
        if bank and Path(bank) not in banks and not Path(bank).is_dir():
            raise UsageError(
                f"{path}: --rdm-bank '{bank}' of {run.args.name} neither exists nor is trained by "
                "a line with --distill rdm"
            )
    return list(runs.values())


def with_caches(runs: list[Run], site: Site) -> tuple[list[Run], list[list[str]]]:
    """Runs that read their teachers' caches under ``TEACHER_CACHE``, where that is set.

    Runs that validate keep the live teacher, which held-out images need.

    Returns:
        The runs, and the command lines that write the caches, part by part.
    """
    if not site.get("TEACHER_CACHE"):
        return runs, []
    views, parts = ["--views", site["VIEWS"]], site.number("CACHE_PARTS")
    reading, writers = [], {}
    for run in runs:
        if run.args.teacher_cache or run.args.val_data or run.args.distill == "none":
            reading.append(run)
            continue
        names = []
        for name, weights in teacher_names(run.args):
            names.append(str(Path(site["TEACHER_CACHE"]) / slug(f"{name}-{weights or ''}")))
            model = ["--distill-model", name, "--distill-pretrained", weights or ""]
            writer = [*run.flags, *model, *views, "--teacher-cache", names[-1]]
            writers.setdefault(names[-1], writer)
        flags = [*run.flags, *views, "--teacher-cache", ",".join(names)]
        reading.append(Run(flags, parse_args(flags)))
    shares = [f"{i}/{parts}" for i in range(1, parts + 1)]
    return reading, [[*w, "--part", share] for w in writers.values() for share in shares]


def slug(text: str) -> str:
    """Text as part of a path."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text.removeprefix("local-dir:")).strip("-")


def teachers(runs: list[Run]) -> list[str]:
    """The distinct teachers as `eval.benchmark` names models."""
    named = (t for run in runs for t in teacher_names(run.args) if run.args.distill != "none")
    return list(dict.fromkeys(f"{name}:{weights}" if weights else name for name, weights in named))


def chain(runs: list[Run], site: Site) -> list[Job]:
    """The jobs of a study, each after those it waits for."""
    runs, caches = with_caches(runs, site)
    banks = [run for run in runs if run.args.distill == "rdm"]
    students = [run for run in runs if run.args.distill != "rdm"]
    logs = Path(runs[0].args.logs)
    evaluation = ["--data-root", site["DATA_ROOT"], "--datasets", *shlex.split(site["DATASETS"])]
    results = str(logs / "teachers")
    shape = {"nodes": site.number("NODES"), "ranks": site.number("RANKS_PER_NODE")}
    ready = (("afterok", "cache"), ("afterok", "rdm"))
    jobs = [
        Job("cache", caches),
        Job("rdm", [run.flags for run in banks], **shape, after=ready[:1]),
        Job("distill", [run.flags for run in students], **shape, after=ready),
        Job(
            "eval",
            [[str(run.path), *evaluation] for run in students],
            after=(("aftercorr", "distill"),),
        ),
        Job("eval-teachers", [[t, *evaluation, "--out", results] for t in teachers(runs)]),
        # Whatever became of them: the page of fourteen runs should not wait for a fifteenth that
        # diverged. The job names those that are missing.
        Job(
            "report",
            [[str(logs / "report.html"), *(str(run.path) for run in runs), results]],
            gpus=False,
            after=(("afterany", "eval"), ("afterany", "eval-teachers"), ("afterany", "rdm")),
        ),
    ]
    if not students:
        jobs = jobs[:2]
    return [job for job in jobs if job.tasks]


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


def submit(jobs: list[Job], study: str, logs: Path, site: Site) -> dict[str, str]:
    """Write the lines and submit the chain; all of it or, if SLURM refuses a job, nothing.

    Returns:
        Job numbers by name.
    """
    (logs / "slurm").mkdir(parents=True, exist_ok=True)
    (logs / "plan").mkdir(exist_ok=True)
    submitted: dict[str, str] = {}
    for job in jobs:
        text = "".join(f"{shlex.join(task)}\n" for task in job.tasks)
        (logs / "plan" / f"{job.name}.lines").write_text(text)
        command = sbatch(job, study, logs, site, submitted)
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=site, check=False)
        except FileNotFoundError as error:
            raise UsageError("sbatch is not here: submit from a login node of SLURM") from error
        if done.returncode:
            if submitted:
                subprocess.run(["scancel", *submitted.values()], env=site, check=False)
            raise Failure(f"sbatch refused {job.name}, nothing was left: {done.stderr.strip()}")
        submitted[job.name] = done.stdout.strip().partition(";")[0]
    return submitted


def running(study: str, site: Site) -> list[str]:
    """Jobs of this study that wait or run already."""
    command = ["squeue", "--noheader", "--me", "--format=%i %j"]
    done = subprocess.run(command, capture_output=True, text=True, env=site, check=False)
    found = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return [number for number, name in found if name.startswith(f"{study}-")]


def describe(jobs: list[Job], runs: list[Run], site: Site) -> str:
    """The plan as a table: tasks, GPUs, GPU hours, disk; then what to fetch before."""
    from eval import datasets  # takes seconds to import

    head = f"{'job':14} {'tasks':>5}  {'each':18} {'GPU hours':>9}  {'disk':>9}  waits for"
    out, total_hours, total_disk = [head], 0.0, 0.0
    there = {job.name for job in jobs}
    for job in jobs:
        processes = job.nodes * job.ranks
        unit = "GPU" if site["GRES"] and job.gpus else "process"
        each = f"{processes} {unit}{'s' * (processes > 1)}, {job.nodes} node{'s' * (job.nodes > 1)}"
        hours, disk = cost(job, site)
        total_hours, total_disk = total_hours + (hours or 0), total_disk + (disk or 0)
        told = [
            f"{hours:9,.1f}" if hours is not None else f"{'?':>9}",
            f"{disk / 2**30:6,.1f} GiB" if disk is not None else f"{'?':>10}",
        ]
        after = ", ".join(f"{name} ({kind})" for kind, name in job.after if name in there)
        out.append(f"{job.name:14} {len(job.tasks):5}  {each:18} {told[0]} {told[1]}  {after}")
    out.append(f"{'total':39} {total_hours:9,.1f} {total_disk / 2**30:6,.1f} GiB  (without '?')")
    finished = [run.args.name for run in runs if (run.path / "finished.json").is_file()]
    if finished:
        out.append(f"finished already, end at once: {', '.join(finished)}")
    models = [*teachers(runs), *(r.args.model for r in runs if r.args.distill != "rdm")]
    sets = datasets.names(shlex.split(site["DATASETS"]))
    fetch = ["python", "-m", "training.prefetch", *dict.fromkeys(models)]
    fetch += ["--datasets", *sets, "--data-root", site["DATA_ROOT"]]
    out.append(f"before, where there is a network: {shlex.join(fetch)}")
    return "\n".join(out)


def cost(job: Job, site: Site) -> tuple[float | None, float | None]:
    """GPU hours and bytes of a job's training; None where the flags don't tell, or none trains."""
    from eval.cost import parse, summary  # takes seconds to import

    stage = {"cache": "cache", "rdm": "rdm", "distill": "student"}.get(job.name)
    if stage is None:
        return None, None
    hours = disk = 0.0
    for task in job.tasks:
        parts = site.number("CACHE_PARTS") if stage == "cache" else 1
        options = ["--gpus", str(site.ranks)]
        if stage == "cache":  # its tasks read every shard, whatever an epoch is
            task = task[: task.index("--part")]
            if parse_args(task).train_data == site["TRAIN_DATA"]:
                options += ["--dataset-samples", site["TRAIN_SAMPLES"]]
        try:
            found = summary(parse([*task, *options]))
        except UsageError:  # no --train-num-samples: the shards are not counted here
            return None, None
        for name in (stage, "rdm") if stage == "student" else (stage,):
            hours += found["hours"].get(name, 0) / parts
            disk += found["disk_bytes"].get(name, 0) / parts
    return hours, disk


def grid_path(study: str) -> Path:
    """The file of a study: its path, or the name of one in slurm/grids."""
    path = Path(study) if study.endswith(".grid") else GRIDS / f"{study}.grid"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in GRIDS.glob("*.grid")))
        raise UsageError(f"STUDY '{study}': no such grid; expected a FILE.grid or one of {known}")
    return path


def main(argv: list[str]) -> None:
    """Entry point of ``slurm/submit.sh``."""
    place = argv.index("--") if "--" in argv else len(argv)
    own, extra = argv[:place], argv[place + 1 :]
    parser = argparse.ArgumentParser(
        prog="slurm/submit.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="slurm/submit.sh [--dry-run] [--cluster FILE] STUDY ... [-- FLAGS OF training.main]",
    )
    parser.add_argument("studies", nargs="+", metavar="STUDY", help="a grid's name, or a FILE.grid")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and cost")
    parser.add_argument(
        "--cluster", type=Path, default=Path("slurm/cluster.env"), help="settings [%(default)s]"
    )
    args = parser.parse_args(own)
    site = Site.read(args.cluster)
    site["CLUSTER"] = str(args.cluster)  # the jobs read it too
    plans = [(grid_path(s), read_grid(grid_path(s), site, extra)) for s in args.studies]
    for path, runs in plans:
        jobs, logs = chain(runs, site), Path(site["LOGS"]) / path.stem
        if args.dry_run:
            print(f"{path} -> {logs}\n{describe(jobs, runs, site)}\n")
            continue
        if busy := running(path.stem, site):
            raise UsageError(
                f"{path.stem} is under way (jobs {', '.join(busy)}): wait for it, or scancel them"
            )
        submitted = submit(jobs, path.stem, logs, site)
        told = "  ".join(f"{name} {number}" for name, number in submitted.items())
        print(f"{path.stem}: {told}; logs in {logs}/slurm")


if __name__ == "__main__":
    cli(main)

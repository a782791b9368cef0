"""``slurm/submit.sh STUDY``: the runs of a grid as one chain of SLURM jobs.

A grid has one run per line: flags of training.main, or in grids/classify of training.classify. What
every task of every job runs is one line of LOGS/STUDY/plan/JOB.lines, written when the study is
submitted, flags of recipes and all: editing the grid or a recipe later does not move a task to
another run. Submitting a study again goes on with it: what is finished ends at once.
"""

from pathlib import Path
from types import ModuleType

from cifd_clip.names import did_you_mean
from experiments.study import command_line
from slurm.jobs import Job, Line, Site, running, submit
from training.errors import UsageError, cli

GRIDS = Path("slurm/grids")


def kind(path: Path) -> ModuleType:
    """What a grid's lines are flags of: the folder tells."""
    from slurm import classifiers, clip, tuning  # torch comes in after the command line

    return {"classify": classifiers, "tune": tuning}.get(path.parent.name, clip)


def describe(study: ModuleType, jobs: list[Job], runs: list[Line], site: Site) -> str:
    """The plan as a table: tasks, GPUs, GPU hours, disk; why some are ?; what to have before."""
    head = f"{'job':14} {'tasks':>5}  {'each':18} {'GPU hours':>9}  {'disk':>9}  waits for"
    out, total_hours, total_disk = [head], 0.0, 0.0
    reasons: dict[str, list[str]] = {}  # jobs by why they have a ?
    names = {job.name for job in jobs}
    for job in jobs:
        processes = job.nodes * job.ranks
        unit = "GPU" if site["GRES"] and job.gpus else "process"
        each = f"{processes} {unit}{'s' * (processes > 1)}, {job.nodes} node{'s' * (job.nodes > 1)}"
        cost = study.cost(job, site)
        if isinstance(cost, str):
            reasons.setdefault(cost, []).append(job.name)
            cells = [f"{'?':>9}", f"{'?':>10}"]
        else:
            total_hours, total_disk = total_hours + cost[0], total_disk + cost[1]
            cells = [f"{cost[0]:9,.1f}", f"{cost[1] / 2**30:6,.1f} GiB"]
        after = ", ".join(f"{name} ({kind})" for kind, name in job.after if name in names)
        out.append(f"{job.name:14} {len(job.tasks):5}  {each:18} {' '.join(cells)}  {after}")
    out.append(f"{'total':39} {total_hours:9,.1f} {total_disk / 2**30:6,.1f} GiB  (without '?')")
    out += [f"? of {', '.join(these)}: {reason}" for reason, these in reasons.items()]
    finished = [run.config.name for run in runs if (run.path / "finished.json").is_file()]
    if finished:
        out.append(f"finished already, end at once: {', '.join(finished)}")
    out.append(f"before: {study.preparation(runs, site)}")
    return "\n".join(out)


def grid_path(study: str) -> Path:
    """The file of a study: its path, or the name of one in slurm/grids."""
    path = Path(study) if study.endswith(".grid") else GRIDS / f"{study}.grid"
    if not path.is_file():
        grids = (p.relative_to(GRIDS).with_suffix("") for p in GRIDS.rglob("*.grid"))
        known = sorted(map(str, grids))
        raise UsageError(
            f"STUDY '{study}': no such grid; expected a FILE.grid or one of {', '.join(known)}"
            f"{did_you_mean(study, known)}"
        )
    return path


def main(argv: list[str]) -> None:
    """Entry point of ``slurm/submit.sh``."""
    place = argv.index("--") if "--" in argv else len(argv)
    own, extra = argv[:place], argv[place + 1 :]
    parser = command_line("slurm.plan", __doc__)
    parser.usage = "slurm/submit.sh [--dry-run] [--cluster FILE] STUDY ... [-- FLAGS OF EVERY RUN]"
    add = parser.add_argument
    add("studies", nargs="+", metavar="STUDY", help="a grid's name, or a FILE.grid")
    add("--dry-run", action="store_true", help="say what would be done and cost")
    add("--cluster", type=Path, default=Path("slurm/cluster.env"), metavar="FILE", help="settings")
    args = parser.parse_args(own)
    site = Site.read(args.cluster)
    paths = [grid_path(study) for study in args.studies]
    plans = [(path, kind(path), kind(path).read_grid(path, site, extra)) for path in paths]
    missing = [file for _, study, runs in plans for file in study.missing(runs)]
    if missing and not args.dry_run:
        raise UsageError(f"not there yet: {', '.join(dict.fromkeys(missing))}")
    for path, study, runs in plans:
        jobs, logs = study.chain(runs, site), site.logs(path)
        if args.dry_run:
            print(f"{path} -> {logs}\n{describe(study, jobs, runs, site)}\n")
            continue
        if busy := running(jobs, path.stem, site):
            raise UsageError(
                f"{path.stem} is under way (jobs {', '.join(busy)}): wait for it, or scancel them"
            )
        submitted = submit(jobs, path.stem, logs, site)
        numbers = "  ".join(f"{name} {number}" for name, number in submitted.items())
        print(f"{path.stem}: {numbers}; logs in {logs}/slurm")


if __name__ == "__main__":
    cli(main)

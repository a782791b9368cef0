"""``python -m experiments.clip_small``: CIFD and its peers on CIFAR-100 and Flickr8k, over seeds.

Two teachers, then two students under every method, each an ordinary command of ``training.main``
and ``eval.benchmark``. Stages: ``tune`` finds one learning rate for all and each method's own
weight on held-out training pairs; ``students`` is the study; ``choices`` asks what the paper leaves
open. Tables are written from what is kept in ``--results`` as soon as a run ends. Stopped, it goes
on where it was.
"""

import argparse
import json
import shlex
from collections import Counter
from pathlib import Path

from eval.report import main as report
from experiments.clip_small import plan as plans
from experiments.clip_small import table
from experiments.clip_small.data import prepare
from experiments.clip_small.keep import keep_result, read_results, score
from experiments.clip_small.plan import METHODS, SCALES, Plan, Tuned
from experiments.runs import Queue, Run, all_there, check_settings, outstanding, write_json
from training.engine.control import STOPPED_EXIT
from training.engine.environment import environment
from training.errors import UsageError, cli

STAGES = ("tune", "students", "choices")


class Study:
    """The study in its directories.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.scale = args, SCALES[args.scale]
        self.logs, self.results = args.logs, args.results
        self.data = args.logs / "data"

    def tune(self) -> bool:
        """Find the learning rate, then the weights, and write them."""
        if not self._make(self._planned(plans.tune_lr)):
            return False
        lr = self._best_lr()
        if not self._make(self._planned(plans.tune_weights, lr)):
            return False
        tried = [kept for kept in read_results(self.results) if "tune" in kept["about"]["stage"]]
        weights = {
            method: max(of_method, key=score)["about"]["weight"]
            for method in METHODS
            if (of_method := [k for k in tried if _is_weight(k, method, lr)])
        }
        content = {
            "lr": lr,
            "weights": weights,
            "criterion": "mean of zero-shot top-1 (CIFAR-100) and mean recall (Flickr8k) on "
            "held-out training pairs, percent; the learning rate by its mean over "
            + ", ".join(plans.JUDGES),
            "tried": [{**k["about"], "score": score(k), "commands": k["commands"]} for k in tried],
            "environment": environment(),
        }
        write_json(self.results / "tuned.json", content)
        print(f"lr {lr:g}; " + ", ".join(f"{m} {w:g}" for m, w in weights.items()), flush=True)
        return True

    def students(self) -> bool:
        """Every method, student and seed."""
        return self._make(
            self._planned(plans.students, self._tuned(), self.args.seeds, self.args.students)
        )

    def choices(self) -> bool:
        """What the paper leaves open."""
        tuned, seeds = self._tuned(), self.args.seeds
        return all(
            self._make(self._planned(ask, tuned, seeds))
            for ask in (plans.choices, plans.calibrated)
        )

    def planned(self) -> list[Run]:
        """The runs of all stages asked for; until tuned, with the defaults."""
        tuned = self._tuned(default=Tuned())
        seeds = self.args.seeds
        plan = Plan(self.scale, self.args.device)
        steps = {
            "tune": lambda: (plans.tune_lr(plan), plans.tune_weights(plan, tuned.lr)),
            "students": lambda: plans.students(plan, tuned, seeds, self.args.students),
            "choices": lambda: (
                plans.choices(plan, tuned, seeds),
                plans.calibrated(plan, tuned, seeds),
            ),
        }
        for stage in self.args.stage:
            steps[stage]()
        return plan.runs

    def all_there(self) -> str | None:
        """If all that the stages give is there already, a sentence that says so."""
        runs = self.planned()
        said = all_there(runs, self.results)
        if said is None or not (self.results / "tuned.json").is_file():
            return None
        check_settings(runs, self.results)
        return said

    def dry_run(self) -> None:
        """Print the commands that are left, and about how long they take."""
        todo = outstanding(self.planned(), self.logs, self.results)
        for run in todo:
            print(shlex.join(["python", *run.command(self.data, self.logs)]))
        by_module = Counter()
        for run in todo:
            by_module[run.module] += run.cost
        told = ", ".join(f"{module} {minutes:.0f}" for module, minutes in by_module.items())
        if not (self.results / "tuned.json").is_file():
            print("# not tuned yet: learning rate and weights above are the defaults")
        print(f"# {len(todo)} runs, about {sum(by_module.values()):.0f} core-minutes: {told}")

    def write_tables(self) -> str:
        """The tables, from all that is kept; as Markdown."""
        kept = read_results(self.results)
        path = self.results / "tuned.json"
        tuned = json.loads(path.read_text()) if path.is_file() else None
        rows, brought = table.summaries(kept, self.scale), table.parts(kept)
        found = table.answers(kept)
        text = table.to_markdown(rows, brought, found, tuned)
        self.results.mkdir(parents=True, exist_ok=True)
        (self.results / "table.md").write_text(text)
        (self.results / "table.csv").write_text(table.to_csv(kept))
        content = {
            "scale": self.args.scale, "students": rows, "parts": brought, "choices": found,
        }  # fmt: skip
        write_json(self.results / "table.json", content)
        return text

    def write_report(self) -> None:
        """The page of curves and results of the students that lie in the logs."""
        kept = read_results(self.results)
        names = [k["about"]["run"] for k in kept if k["about"]["stage"] == "students"]
        runs = [str(self.logs / name) for name in names if (self.logs / name).is_dir()]
        if runs:
            report([*runs, f"--out={self.logs / 'report.html'}", "--title=CIFAR-100 and Flickr8k"])

    def _planned(self, fill, *arguments) -> Plan:
        plan = Plan(self.scale, self.args.device)
        fill(plan, *arguments)
        return plan

    def _make(self, plan: Plan) -> bool:
        def keep(run: Run) -> None:
            keep_result(plan, run, self.data, self.logs, self.results)

        check_settings(plan.runs, self.results)
        for run in plan.runs:
            keep(run)
        todo = outstanding(plan.runs, self.logs, self.results)
        return Queue(todo, self.data, self.logs, self.args.jobs, keep).run()

    def _best_lr(self) -> float:
        scores: dict[float, list[float]] = {}
        for kept in read_results(self.results):
            if kept["about"]["stage"] == "tune lr":
                scores.setdefault(kept["about"]["lr"], []).append(score(kept))
        return max(scores, key=lambda lr: sum(scores[lr]) / len(scores[lr]))

    def _tuned(self, default: Tuned | None = None) -> Tuned:
        path = self.results / "tuned.json"
        if path.is_file():
            found = json.loads(path.read_text())
            return Tuned(found["lr"], found["weights"])
        if default is None:
            raise UsageError(f"{path} is not there: make it with --stage tune")
        return default


def _is_weight(kept: dict, method: str, lr: float) -> bool:
    about = kept["about"]
    return (about["stage"], about["method"], about["lr"]) == ("tune weight", method, lr)


def main(argv: list[str]) -> int:
    """Make what is missing; exit 0 when everything is there."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.clip_small",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cifar100", type=Path, required=True, help="folder with cifar-100-python/")
    add("--flickr8k", type=Path, required=True, help="folder with train/*.tar and test/*.tar")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--stage", nargs="+", choices=STAGES, default=STAGES, help="(default: all)")
    add(
        "--students",
        nargs="+",
        choices=plans.STUDENTS,
        default=plans.STUDENTS,
        help="(default: all)",
    )
    add("--scale", choices=SCALES, default="cpu", help="how large everything is: %(choices)s")
    add("--trial", action="store_const", const="trial", dest="scale", help="some steps of it all")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each; 0: in this process")
    add("--device", default="cpu", help="such as cuda")
    add("--logs", type=Path, help="(default: logs/clip_small, with _SCALE for another than cpu)")
    add("--results", type=Path, help="(default: results/clip_small, likewise)")
    add("--dry-run", action="store_true", help="print the commands that are left and their cost")
    args = parser.parse_args(argv)
    suffix = "" if args.scale == "cpu" else f"_{args.scale}"
    args.logs = args.logs or Path(f"logs/clip_small{suffix}")
    args.results = args.results or Path(f"results/clip_small{suffix}")
    study = Study(args)
    said = study.all_there()
    if args.dry_run:
        print(f"# {said}") if said else study.dry_run()
        return 0
    prepare(study.data, args.cifar100, args.flickr8k, study.scale.sizes)
    if said:
        print(said, flush=True)
    stages = [] if said else [stage for stage in STAGES if stage in args.stage]
    finished = all(getattr(study, stage)() for stage in stages)
    text = study.write_tables()
    if not finished:
        return STOPPED_EXIT
    print(text)
    study.write_report()
    return 0


if __name__ == "__main__":
    cli(main)

"""``python -m experiments.clip_small``: CIFD and its peers on CIFAR-100 and Flickr8k, over seeds.

Two teachers, then two students under every method, each an ordinary command of training.main and
eval.benchmark. Stages: tune gives one learning rate for all and each method's own weight, on
held-out training pairs; students is the study; choices asks what the paper leaves open. Tables are
written from what is kept in --results as soon as a run ends. Stopped, it goes on where it was.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cifd_clip.files import read_json, write_text
from experiments.clip_small import plan as plans
from experiments.clip_small.keep import keep_result, score
from experiments.clip_small.plan import METHODS, SCALES, STAGES, Plan, Tuned
from experiments.study import STOPPED, Study, command_line, read_results, write_result
from training.engine.environment import environment
from training.errors import UsageError, cli


def planned(args: Namespace, steps: list[Callable[[Plan], None]], tuned: Tuned) -> Study:
    """The study of some steps."""
    plan = Plan(SCALES[args.scale], args.device, tuned, args.seeds, args.students)
    for step in steps:
        step(plan)
    keep = partial(keep_result, plan)
    return Study(plan.by_name.values(), args.logs, args.logs / "data", args.results, keep)


def tuned_for(step: Callable[[Plan], None], results: Path) -> Tuned:
    """The learning rate and weights that a step's runs have.

    Raises:
        UsageError: the study is not tuned yet.
    """
    if step is plans.tune_lr:
        return Tuned()
    if step is plans.tune_weights:
        return Tuned(best_lr(results))
    if tuned := read_tuned(results):
        return tuned
    raise UsageError(f"{results / 'tuned.json'} is not there: make it with --stage tune")


def read_tuned(results: Path) -> Tuned | None:
    """What tuning gave, if it has ended."""
    path = results / "tuned.json"
    if not path.is_file():
        return None
    content = read_json(path)
    return Tuned(content["lr"], content["weights"])


def best_lr(results: Path) -> float:
    """The learning rate that is best on average over the judges."""
    scores: dict[float, list[float]] = {}
    for kept in read_results(results).values():
        if kept["about"]["stage"] == "tune lr":
            scores.setdefault(kept["about"]["lr"], []).append(score(kept))
    return max(scores, key=lambda lr: sum(scores[lr]) / len(scores[lr]))


def write_tuned(results: Path, lr: float) -> None:
    """Write the best weight of every method that has one, and what was tried."""
    tried = [k for k in read_results(results).values() if "tune" in k["about"]["stage"]]
    weights = {}
    for method in METHODS:
        key = {"stage": "tune weight", "method": method, "lr": lr}
        if of_method := [kept for kept in tried if kept["about"].items() >= key.items()]:
            weights[method] = max(of_method, key=score)["about"]["weight"]
    content = {
        "lr": lr,
        "weights": weights,
        "criterion": "mean of zero-shot top-1 (CIFAR-100) and mean recall (Flickr8k) on "
        "held-out training pairs, percent; the learning rate by its mean over "
        + ", ".join(plans.JUDGES),
        "tried": [{**k["about"], "score": score(k), "commands": k["commands"]} for k in tried],
        "environment": environment(),
    }
    write_result(results / "tuned.json", content)
    print(f"lr {lr:g}; " + ", ".join(f"{m} {w:g}" for m, w in weights.items()), flush=True)


def write_tables(args: Namespace) -> str:
    """The tables, from all that is kept; as Markdown."""
    from experiments.clip_small import table  # takes seconds to import

    kept = list(read_results(args.results).values())
    path = args.results / "tuned.json"
    rows, parts = table.summaries(kept, SCALES[args.scale]), table.parts(kept)
    answers = table.answers(kept)
    text = table.to_markdown(rows, parts, answers, read_json(path) if path.is_file() else None)
    content = {"scale": args.scale, "students": rows, "parts": parts, "choices": answers}
    write_result(args.results / "table.json", content)
    write_text(args.results / "table.md", text)
    write_text(args.results / "table.csv", table.to_csv(kept))
    return text


def write_report(args: Namespace) -> None:
    """The page of curves and results of the students that lie in the logs."""
    from eval.report import main as report  # takes seconds to import

    kept = [kept["about"] for kept in read_results(args.results).values()]
    runs = [args.logs / about["run"] for about in kept if about["stage"] == "students"]
    if runs := [str(run) for run in runs if run.is_dir()]:
        report([*runs, f"--out={args.logs / 'report.html'}", "--title=CIFAR-100 and Flickr8k"])


def parse(argv: list[str]) -> Namespace:
    """The command line."""
    parser = command_line("experiments.clip_small", __doc__)
    add = parser.add_argument
    add("--cifar100", type=Path, required=True, metavar="DIR", help="with cifar-100-python/")
    add("--flickr8k", type=Path, required=True, metavar="DIR", help="with train/*.tar, test/*.tar")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    add("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="which of them")
    names = plans.STUDENTS
    add("--students", nargs="+", choices=names, default=names, help="which of them")
    add("--scale", choices=SCALES, default="cpu", help="how large everything is")
    add("--trial", action="store_const", const="trial", dest="scale", help="some steps of it all")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each; 0: in this process")
    add("--device", default="cpu", help="such as cuda")
    add("--logs", type=Path, metavar="DIR", help="[logs/clip_small, _SCALE if it is not cpu]")
    add("--results", type=Path, metavar="DIR", help="[results/clip_small, likewise]")
    add("--dry-run", action="store_true", help="print the commands that are left and their cost")
    args = parser.parse_args(argv)
    suffix = "" if args.scale == "cpu" else f"_{args.scale}"
    args.logs = args.logs or Path(f"logs/clip_small{suffix}")
    args.results = args.results or Path(f"results/clip_small{suffix}")
    return args


def main(argv: list[str]) -> int:
    """Execute what is missing; exit 0 when everything is there."""
    args = parse(argv)
    steps = [step for stage in STAGES if stage in args.stage for step in STAGES[stage]]
    tuned = read_tuned(args.results)
    whole = planned(args, steps, tuned or Tuned())
    if args.dry_run:
        if tuned is None:
            print("# not tuned yet: learning rate and weights below are the defaults")
        whole.dry_run()
        return 0
    from experiments.clip_small.data import prepare  # takes seconds to import

    prepare(args.logs / "data", args.cifar100, args.flickr8k, SCALES[args.scale].sizes)
    if tuned and (sentence := whole.complete()):
        whole.check()
        print(sentence, flush=True)
        steps = []
    for step in steps:
        tuned = tuned_for(step, args.results)
        if not planned(args, [step], tuned).execute(args.jobs):
            write_tables(args)
            return STOPPED
        if step is plans.tune_weights:
            write_tuned(args.results, tuned.lr)
    print(write_tables(args))
    write_report(args)
    return 0


if __name__ == "__main__":
    cli(main)

"""``python -m demo``: the whole method on real handwriting in ten minutes, without a download.

It reads from top to bottom and runs the commands a user runs. Stopped, it goes on where it was;
delete OUT to begin again.
"""

import os
import shutil
import time
from pathlib import Path

from cifd_clip.files import read_json, write_json
from demo import scenes
from experiments.study import STOPPED, Run, Study, command_line, output, say
from training.engine.environment import cores
from training.engine.run import read_run
from training.errors import cli

MODELS = Path(os.path.relpath(Path(__file__).parent / "models"))
EPOCHS = {"teacher": 10, "bank": 4, "student": 6}
RATES = ("3000", "1000", "300")


def plan(quick: bool) -> list[Run]:
    """Every command up to the report, each after those whose files it reads."""
    epochs = {name: 1 if quick else count for name, count in EPOCHS.items()}
    where = (
        "--name={name}", "--logs={logs}", "--resume=latest",
        "--train-data={data}/train", "--val-data={data}/val",
    )  # fmt: skip

    def train(name: str, seconds: float, *flags: str) -> Run:
        common = (
            "--batch-size=128", "--lr=2e-3", "--wd=0.1", "--workers=1", "--keep=1",
            "--image-mean", ".5", ".5", ".5", "--image-std", ".25", ".25", ".25",
        )  # fmt: skip
        return Run(name, "training.main", (*common, *flags), where=where, cost=seconds / 60)

    # 1. A teacher, plain CLIP; and beside it the student that has none.
    student = (
        f"--model-config={MODELS}/student.json", "--model=student", f"--epochs={epochs['student']}",
    )  # fmt: skip
    teacher = train(
        "teacher", 130, "--distill=none", f"--model-config={MODELS}/teacher.json",
        "--model=teacher", f"--epochs={epochs['teacher']}",
    )  # fmt: skip
    none = train("none", 50, "--distill=none", *student)

    # 2. Stage 1: assistants of three rates for both modalities, in one pass.
    distill = "--distill-model=local-dir:{teacher}/student"
    bank = train(
        "bank", 30, "--distill=rdm", distill, "--rates", *RATES, f"--epochs={epochs['bank']}"
    )

    # 3. The same student under CLIP-KD, and under stage 2 of CIFD.
    clipkd = train("clipkd", 80, "--distill=clipkd", distill, *student)
    cifd = train("cifd", 80, "--distill=cifd", distill, "--rdm-bank={bank}/bank", *student)

    # 4. Zero-shot classification and retrieval on handwriting that no model has seen, by the models
    # and by what the assistants keep of their teacher.
    models = [teacher, none, clipkd, cifd]
    on = ("--datasets", "digits", "digit_scenes", "--workers=0")
    options = {"where": ("--data-root={data}/benchmark",), "cost": 20 / 60}
    trained = (f"{{{run.name}}}" for run in models)
    return [
        *models,
        bank,
        Run("evaluation", "eval.benchmark", (*trained, *on), **options),
        Run("bank_evaluation", "eval.bank", ("{bank}", *on), **options),
    ]


def demo(out: Path, quick: bool, record: Path | None = None) -> int:
    """Data, teacher, bank, three students, evaluation, report; the record is kept if wanted."""
    begin = time.monotonic()

    # 1. Scenes of coloured handwritten digits with captions, as WebDataset tars.
    if not (out / "data").exists():
        say("scenes of handwritten digits")
        sizes = {"train": 1_000, "val": 256, "scenes": 100} if quick else {}
        scenes.write(out / "data", **sizes)

    # 2. Training and evaluation, two at a time: a thread for each model, and cores for what decodes
    # images, because waiting OpenMP threads spin.
    study = Study(plan(quick), out / "logs", out / "data")
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cores() // 2)))
    if not study.execute(2, threads, show=True):
        return STOPPED

    # 3. The report.
    report = out / "report.html"
    trained = [run.name for run in study.runs.values() if run.module == "training.main"]
    title = "--title=CIFD on scenes of handwritten digits"
    folders = [str(study.logs / name) for name in trained]
    print(output("eval.report", *folders, f"--out={report}", title))
    print((out / "report.md").read_text())
    seconds = time.monotonic() - begin
    if record:
        keep(out, study, trained, record, seconds)
    say(f"{report} after {seconds:.0f} s")
    return 0


def keep(out: Path, study: Study, trained: list[str], record: Path, seconds: float) -> None:
    """Copy the tables, and what they were made with, to where they can be committed."""
    record.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.csv"):
        shutil.copy(out / name, record / name)
    runs = {}
    for name in sorted(trained):
        run = study.logs / name
        environment = read_run(run, "environment.json")["starts"][-1]
        runs[name] = {
            **{k: environment[k] for k in ("command", "commit", "packages", "processor", "cpus")},
            "seed": read_run(run)["seed"],
            "data": read_run(run, "data.json")["hash"],
            "seconds": round(read_json(run / "finished.json")["seconds"], 1),
        }
    write_json(record / "record.json", {"seconds": round(seconds, 1), "runs": runs})


def main(argv: list[str]) -> int:
    """Entry point of ``python -m demo``."""
    parser = command_line("demo", __doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="of everything [demo/out; quick: demo/out/quick]")
    add("--quick", action="store_true", help="a minute: all steps, nothing learnt")
    add("--record", type=Path, metavar="DIR", help="also keep tables and what made them there")
    args = parser.parse_args(argv)
    out = args.out or Path("demo/out/quick" if args.quick else "demo/out")
    return demo(out, args.quick, args.record)


if __name__ == "__main__":
    cli(main)

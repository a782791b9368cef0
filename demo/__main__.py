"""The whole method on real handwriting in ten minutes, without a download: ``python -m demo``.

It reads from top to bottom and runs the commands a user runs. Each step leaves its own mark in
``OUT`` (a run's ``finished.json``), so the demo goes on where it was stopped; delete ``OUT`` to
begin again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo import scenes
from training.engine.environment import cores
from training.errors import UsageError, cli

MODELS = Path(os.path.relpath(Path(__file__).parent / "models"))
EPOCHS = {"teacher": 10, "bank": 4, "student": 6}
RATES = ["3000", "1000", "300"]


def demo(out: Path, quick: bool, record: Path | None = None) -> None:
    """Data, teacher, bank, three students, evaluation, report; the record is kept if asked for."""
    start = time.monotonic()
    data, logs = out / "data", out / "logs"
    epochs = {name: 1 if quick else count for name, count in EPOCHS.items()}

    # 1. Scenes of coloured handwritten digits with captions, as WebDataset tars.
    if not data.exists():
        say("scenes of handwritten digits")
        sizes = {"train": 1_000, "val": 256, "scenes": 100} if quick else {}
        draft = out / "data.draft"
        shutil.rmtree(draft, ignore_errors=True)
        scenes.write(draft, **sizes)
        draft.rename(data)

    def train(**runs: list[str]) -> None:
        """``training.main`` on the scenes, side by side, for the runs not finished yet."""
        common = [
            f"--logs={logs}", "--resume=latest",
            f"--train-data={data}/train", f"--val-data={data}/val",
            "--batch-size=128", "--lr=2e-3", "--wd=0.1", "--workers=1", "--keep=1",
            "--image-mean", ".5", ".5", ".5", "--image-std", ".25", ".25", ".25",
        ]  # fmt: skip
        wanted = {
            n: flags for n, flags in runs.items() if not (logs / n / "finished.json").exists()
        }
        call(*(["training.main", f"--name={n}", *common, *flags] for n, flags in wanted.items()))

    # 2. A teacher, plain CLIP; and beside it the student that has none.
    student = [
        f"--model-config={MODELS}/student.json", "--model=student",
        f"--epochs={epochs['student']}",
    ]  # fmt: skip
    train(
        teacher=[
            "--distill=none", f"--model-config={MODELS}/teacher.json", "--model=teacher",
            f"--epochs={epochs['teacher']}",
        ],
        none=["--distill=none", *student],
    )  # fmt: skip

    # 3. Stage 1: assistants of three rates for both modalities, in one pass.
    distill = [f"--distill-model=local-dir:{logs}/teacher/student"]
    train(bank=["--distill=rdm", *distill, "--rates", *RATES, f"--epochs={epochs['bank']}"])

    # 4. The same student under CLIP-KD, and under stage 2 of CIFD.
    train(
        clipkd=["--distill=clipkd", *distill, *student],
        cifd=["--distill=cifd", *distill, f"--rdm-bank={logs}/bank/bank", *student],
    )

    # 5. Zero-shot classification and retrieval on handwriting that no model has seen, by the models
    # and by what the assistants keep of their teacher.
    models = [f"{logs}/{name}" for name in ("teacher", "none", "clipkd", "cifd")]
    where = [f"--data-root={data}/benchmark", "--datasets", "digits", "digit_scenes", "--workers=0"]
    call(["eval.benchmark", *models, *where], ["eval.bank", f"{logs}/bank", *where])

    # 6. The report.
    report = out / "report.html"
    call([
        "eval.report", *models, f"{logs}/bank", f"--out={report}",
        "--title=CIFD on scenes of handwritten digits",
    ])  # fmt: skip
    print((out / "report.md").read_text())
    seconds = time.monotonic() - start
    if record:
        keep(out, record, seconds)
    say(f"{report} after {seconds:.0f} s")


def keep(out: Path, directory: Path, seconds: float) -> None:
    """Copy the tables, and what they were made with, to where they can be committed."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.csv"):
        shutil.copy(out / name, directory / name)
    runs = {}
    for run in sorted((out / "logs").iterdir()):
        made = json.loads((run / "environment.json").read_text())[-1]
        config = json.loads((run / "config.json").read_text())
        finished = json.loads((run / "finished.json").read_text())
        runs[run.name] = {
            **{k: made[k] for k in ("command", "commit", "packages", "processor", "cpus")},
            "seed": config["seed"],
            "data": json.loads((run / "data.json").read_text())["hash"],
            "seconds": round(finished["seconds"], 1),
        }
    content = {"seconds": round(seconds, 1), "runs": runs}
    (directory / "record.json").write_text(json.dumps(content, indent=2) + "\n")


def call(*commands: list[str]) -> None:
    """Print and run ``python -m MODULE ...``, several side by side; a failure is the demo's."""
    # a thread for each model, and cores for what decodes images: waiting OpenMP threads spin
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // 2)), **os.environ}
    processes = []
    for module, *arguments in commands:
        say(shlex.join(["python", "-m", module, *arguments]))
        command = [sys.executable, "-m", module, *arguments]
        processes.append((module, subprocess.Popen(command, env=environment)))
    failed = [module for module, process in processes if process.wait()]
    if failed:
        raise UsageError(f"python -m {failed[0]} failed; its message is above")


def say(text: str) -> None:
    """A line of the demo's own."""
    print(f"\n\033[1m▸ {text}\033[0m" if sys.stdout.isatty() else f"\n> {text}", flush=True)


def main(argv: list[str]) -> None:
    """Entry point of ``python -m demo``."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of everything (default: demo/out)")
    parser.add_argument("--quick", action="store_true", help="a minute: all steps, nothing learnt")
    parser.add_argument("--record", type=Path, help="also keep tables and their making there")
    args = parser.parse_args(argv)
    out = args.out or Path("demo/out/quick" if args.quick else "demo/out")
    demo(out, args.quick, args.record)


if __name__ == "__main__":
    cli(main)

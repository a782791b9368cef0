"""The whole method on real handwriting in ten minutes, without a download: ``python -m demo``.

It reads from top to bottom and runs the commands a user runs. Each step leaves its own mark in
``OUT`` (a run's ``finished.json``), so the demo goes on where it was stopped; delete ``OUT`` to
begin again.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo import scenes
from training.errors import UsageError, cli

MODELS = Path(os.path.relpath(Path(__file__).parent / "models"))
EPOCHS = {"teacher": 10, "bank": 4, "student": 6}
RATES = ["1000", "300", "100"]


def demo(out: Path, quick: bool) -> None:
    """Data, teacher, bank, three students, evaluation, report."""
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

    def train(name: str, *flags: str) -> Path:
        """``training.main`` on the scenes, unless this run is finished."""
        run = logs / name
        common = [
            f"--name={name}", f"--logs={logs}", "--resume=latest",
            f"--train-data={data}/train", f"--val-data={data}/val",
            "--batch-size=128", "--lr=2e-3", "--wd=0.1", "--workers=1", "--keep=1",
            "--image-mean", ".5", ".5", ".5", "--image-std", ".25", ".25", ".25",
        ]  # fmt: skip
        if not (run / "finished.json").exists():
            call("training.main", *common, *flags)
        return run

    # 2. A teacher: plain CLIP.
    teacher = train(
        "teacher", "--distill=none", f"--model-config={MODELS}/teacher.json", "--model=teacher",
        f"--epochs={epochs['teacher']}",
    )  # fmt: skip
    distill = [f"--distill-model=local-dir:{teacher}/student"]

    # 3. Stage 1: assistants of three rates for both modalities, in one pass.
    bank = train(
        "bank", "--distill=rdm", *distill, "--rates", *RATES, f"--epochs={epochs['bank']}",
    )  # fmt: skip

    # 4. Students: no distillation, CLIP-KD, and stage 2 of CIFD.
    student = [
        f"--model-config={MODELS}/student.json", "--model=student",
        f"--epochs={epochs['student']}",
    ]  # fmt: skip
    none = train("none", "--distill=none", *student)
    clipkd = train("clipkd", "--distill=clipkd", *distill, *student)
    cifd = train("cifd", "--distill=cifd", *distill, f"--rdm-bank={bank}/bank", *student)

    # 5. Zero-shot classification and retrieval on handwriting that no model has seen.
    models = [teacher, none, clipkd, cifd]
    call(
        "eval.benchmark", *map(str, models), f"--data-root={data}/benchmark",
        "--datasets", "digits", "digit_scenes", "--workers=0",
    )  # fmt: skip

    # 6. The report.
    report = out / "report.html"
    call(
        "eval.report", *map(str, [teacher, bank, none, clipkd, cifd]), f"--out={report}",
        "--title=CIFD on scenes of handwritten digits",
    )  # fmt: skip
    print((out / "report.md").read_text())
    say(f"{report} after {time.monotonic() - start:.0f} s")


def call(module: str, *arguments: str) -> None:
    """Print and run ``python -m MODULE ...``; its failure is the demo's."""
    say(shlex.join(["python", "-m", module, *arguments]))
    # half of the cores for the model: the others decode images, and a waiting OpenMP thread spins
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    threads = str(max(1, cores // 2))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    command = [sys.executable, "-m", module, *arguments]
    if subprocess.run(command, env=environment).returncode:
        raise UsageError(f"python -m {module} failed; its message is above")


def say(text: str) -> None:
    """A line of the demo's own."""
    print(f"\n\033[1m▸ {text}\033[0m" if sys.stdout.isatty() else f"\n> {text}", flush=True)


def main(argv: list[str]) -> None:
    """Entry point of ``python -m demo``."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of everything (default: demo/out)")
    parser.add_argument("--quick", action="store_true", help="a minute: all steps, nothing learnt")
    args = parser.parse_args(argv)
    demo(args.out or Path("demo/out/quick" if args.quick else "demo/out"), args.quick)


if __name__ == "__main__":
    cli(main)

"""``python -m benchmarks.gpu --minutes 9 --out DIR``: what one GPU shows, the most telling first.

Each stage has a deadline and writes DIR/STAGE.json, also of what it had when its time was up, when
it failed, or when it did not come back: the others then go on in a new process. On a machine
without a GPU the same stages run small on the CPU. Nothing is downloaded: teachers and students
have random weights. Beside Python, torch, torchvision, timm, transformers and safetensors
these go along as wheels: open_clip_torch, webdataset, braceexpand, clip-benchmark, ftfy, wcwidth,
numpy<2.4.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.contestants import add_flags
from benchmarks.gpu import correct, speed
from benchmarks.gpu.bench import LITTLE, Bench
from benchmarks.harness import command_line
from cifd_clip.files import write_json
from training.engine.environment import environment
from training.errors import UsageError, cli


class Stage(NamedTuple):
    """A part of the run: it fills the figures that it is given, most telling first."""

    run: Callable[[Bench, dict[str, Any]], None]
    seconds: float  # at most


STAGES = {
    "correct": Stage(correct.correct, 45),  # while other processes compile
    "steps": Stage(speed.steps, 240),
    "card": Stage(speed.card, 30),
    "memory": Stage(speed.memory, 45),
}


GRACE = 20.0  # seconds after its deadline until a stage is given up: no signal ends a compiler


class Late(Exception):
    """A stage's time is up."""


def main(argv: list[str]) -> None:
    """Run the stages, print the table of steps."""
    started = time.monotonic()
    parser = command_line("gpu", __doc__, rounds=6)
    add = parser.add_argument
    small = not torch.cuda.is_available()
    add_flags(parser, "small-gap10-vit", "tiny-gap10-vit")
    add("--students", nargs="+", default=["tiny-gap10-vit"] if small else ["ViT-S-16", "ViT-B-16"])
    add("--minutes", type=float, default=9.0, help="after which nothing is begun")
    add("--out", type=Path, required=True, metavar="DIR", help="where the figures go")
    add("--stages", nargs="*", default=list(STAGES), choices=list(STAGES), help="only these")
    add("--block", type=int, default=1 if small else 4, help="steps a turn")
    add("--warm", metavar="NAME", help="only compile what steps of one student need")
    args = parser.parse_args(argv)
    if not LITTLE.is_dir():
        raise UsageError(f"{LITTLE} is not there: run this from the root of a checkout")
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, Path(temporary))
        if args.warm:
            speed.warm(bench, args.warm)
            print(f"compiled {args.warm} ahead in {time.monotonic() - started:.0f} s", flush=True)
            return
        args.out.mkdir(parents=True, exist_ok=True)
        bench.warming = compile_ahead(args) if bench.on_gpu and "steps" in args.stages else []
        end = started + 60 * args.minutes
        for place, name in enumerate(args.stages, 1):
            left = min(STAGES[name].seconds, end - time.monotonic())
            minutes = max(0.0, end - time.monotonic() - left - GRACE) / 60
            others = [*argv, f"--minutes={minutes}", "--stages", *args.stages[place:]]
            path = args.out / f"{name}.json"
            figures = within(left, STAGES[name].run, bench, path, others)
            print(f"{name}: {figures['seconds']:.0f} s {figures.get('error', '')}", flush=True)
    print(speed.table(args.out))


def within(
    seconds: float, run: Callable[[Bench, dict], None], bench: Bench, path: Path, others: list[str]
) -> dict[str, Any]:
    """A stage's figures, written to a file.

    Args:
        seconds: after which it is interrupted, and a little later given up.
        run, bench: the stage.
        path: of its figures.
        others: the command line of the stages after it.
    """
    figures: dict[str, Any] = {"environment": environment()}
    write_json(path, figures | {"error": "the process ended in it"})  # what is left if it does
    watchdog = threading.Timer(max(0.0, seconds) + GRACE, give_up, (path, figures, others))
    watchdog.daemon = True
    watchdog.start()
    start = time.monotonic()

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    try:
        if seconds <= 0:
            raise Late
        signal.setitimer(signal.ITIMER_REAL, seconds)
        run(bench, figures)
    except Late:
        figures["error"] = "its time was up"
    except Exception as error:  # the other stages are worth having
        figures["error"] = f"{type(error).__name__}: {error}"[:2000]
        traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watchdog.cancel()
    figures["seconds"] = time.monotonic() - start
    write_json(path, figures)
    if bench.on_gpu:
        torch.cuda.empty_cache()
    return figures


def give_up(path: Path, figures: dict[str, Any], others: list[str]) -> None:
    """Write what a stage has that doesn't come back, and where it is; go on with the others anew.

    A signal waits for the main thread to run Python, which in a backward it doesn't.
    """
    stacks = (traceback.format_stack(frame)[-6:] for frame in sys._current_frames().values())
    where = "\n".join("".join(stack) for stack in stacks)
    print(f"{path.stem}: it did not come back\n{where}", flush=True)
    write_json(path, figures | {"error": f"it did not come back; its threads are at\n{where}"})
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *others])


def compile_ahead(args: Any) -> list[subprocess.Popen]:
    """Processes that fill Inductor's cache with the graphs of each student and of the teacher."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(args.out)]
    command += ["--teacher", args.teacher, f"--batch-size={args.batch_size}", "--warm"]
    few = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}  # the machine's cores are shared
    names = (*args.students, args.teacher)
    return [subprocess.Popen([*command, name], env=few) for name in names]


if __name__ == "__main__":
    cli(main)

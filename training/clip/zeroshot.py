"""Zero-shot evaluation of a student while it trains: `eval.benchmark` in a process beside it.

A checkpoint that is due is linked into ``RUN/zeroshot`` and evaluated there, one after another.
Training goes on meanwhile; the figures are logged under the checkpoint's step when they are there,
and the link goes. What a stop leaves is evaluated when the run goes on.
"""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cifd_clip.files import BadFile, make_folder
from training import children
from training.clip.config import Config
from training.engine import result
from training.engine.environment import cores
from training.engine.metrics import MetricWriter
from training.errors import UsageError

log = logging.getLogger(__name__)


def check_zeroshot(config: Config) -> None:
    """Refuse data sets that can't be evaluated.

    Raises:
        UsageError: says which, and why.
    """
    if config.data_root:
        command = [sys.executable, *_command(config, "any"), "--dry-run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = done.stderr.strip().removeprefix("error: ")
            raise UsageError(why.replace("--datasets", "--zeroshot-datasets"))


def _command(config: Config, model: str) -> list[str]:
    return [
        *("-m", "eval.benchmark", model, "--data-root", config.data_root),
        *("--datasets", *config.zeroshot_datasets, "--samples", str(config.zeroshot_samples)),
        *("--device", config.zeroshot_device, "--workers", str(min(config.workers, 2))),
    ]


class ZeroShot:
    """Evaluates checkpoints one after another, and writes their figures.

    Args:
        config: which data sets, how many images of each, and where.
        run: the run directory.
        writer: where figures go.
        step: where the run goes on: of an earlier process's links those up to it are evaluated.
        due: whether the checkpoint of a step is to be evaluated.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        writer: MetricWriter,
        step: int,
        due: Callable[[int], bool],
    ):
        self.config, self.folder, self.writer, self.due = config, run / "zeroshot", writer, due
        self.pool, self.closing = ThreadPoolExecutor(1), threading.Event()
        self.pending: list[Future] = []
        for link in sorted(self.folder.glob("step_*.pt")):
            if (of := int(link.stem[5:])) <= step:
                self._submit(of, link)
            else:  # it is made again
                link.unlink()

    def saved(self, step: int, path: Path) -> None:
        """Take a checkpoint that is on disk; see `Checkpoints`."""
        if not self.due(step):
            return
        make_folder(self.folder)
        link = self.folder / path.name
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # of a file system without links
            shutil.copyfile(path, link)
        self._submit(step, link)

    def wait(self, stopping: Callable[[], bool]) -> None:
        """Wait until all is evaluated, or this process is asked to stop."""
        while not all(future.done() for future in self.pending) and not stopping():
            time.sleep(0.1)

    def close(self) -> None:
        """End what is under way."""
        self.closing.set()
        self.pool.shutdown(cancel_futures=True)

    def _submit(self, step: int, link: Path) -> None:
        self.pending.append(self.pool.submit(self._evaluate, step, link))

    def _evaluate(self, step: int, link: Path) -> None:
        out = link.with_suffix("")
        errors = out.with_suffix(".log")
        command = [*_command(self.config, str(link)), "--out", str(out)]
        child = children.start(command, max(1, cores() // 4), errors)
        while child.exitcode is None:
            if self.closing.wait(0.1):
                child.terminate()
                child.join()
                return
        link.unlink()
        if child.exitcode:
            why = children.last_line(errors.read_text(errors="replace"))
            log.warning("zero-shot evaluation of step %d is not whole: %s", step, why)
        try:
            results = [result.read(path) for path in sorted(out.glob("*.json"))]
        except BadFile as error:
            log.warning("zero-shot evaluation of step %d: %s", step, error)
            return
        figures = {
            f"{each.dataset}/{name}": value
            for each in results
            for name, value in each.metrics.items()
            if value is not None
        }
        self.writer.write("zeroshot", step, figures)
        first = {k: 100 * v for k, v in figures.items() if k.endswith(("/acc1", "recall@1"))}
        shown = ", ".join(f"{name} {value:.2f}" for name, value in first.items())
        log.info("zero-shot, step %d | %s", step, shown)

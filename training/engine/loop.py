"""The one training loop: stage 1, stage 2, every method and every classifier go through it."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from tqdm.auto import tqdm

from training.children import duration
from training.engine.checkpoint import Checkpoints
from training.engine.config import RunConfig
from training.engine.control import STOP, StopFlag, barrier
from training.engine.metrics import Meter, MetricWriter
from training.engine.stage import Batch
from training.engine.trainer import LOOK_BACK, Progress, Trainer
from training.errors import NonFinite, Stopped

log = logging.getLogger(__name__)

#: Seconds that data may take to come after a signal, before a process gives up to save.
PATIENCE = 15


class Loader(Protocol):
    """Delivers this rank's part of each global batch."""

    def batches(
        self,
        start_step: int,
        stop_step: int,
        stopping: Callable[[], bool] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Batch]:
        """Those of steps ``start_step`` .. ``stop_step - 1``.

        Where batches are waited for, they end when ``stopping()``, and fail after ``timeout``
        seconds.
        """


class Validation(Protocol):
    """Held-out data: how often they are looked at, and their batches."""

    every_epochs: int

    def __call__(
        self, stopping: Callable[[], bool], timeout: float | None = None
    ) -> Iterable[Batch]:
        """This rank's held-out batches; ``stopping`` and ``timeout`` as of `Loader.batches`."""


def train(
    trainer: Trainer,
    loader: Loader,
    config: RunConfig,
    checkpoints: Checkpoints | None = None,
    writer: MetricWriter | None = None,
    stop: StopFlag | None = None,
    validation: Validation | None = None,
    check_samples: Callable[[Progress], None] = lambda progress: None,
) -> bool:
    """Run a trainer to its last step, or until it is told to stop.

    Args:
        trainer: what trains, at the step it starts from.
        loader: gives this rank's part of each global batch.
        config: when to log and to save, and how long to wait for a batch.
        checkpoints, writer: where rank 0 writes; None on the others.
        stop: asked at every step boundary, if there is one.
        validation: looked at when an epoch ends.
        check_samples: raises when too many samples could not be used; called at log lines.

    Returns:
        Whether all steps are done and nobody asked to stop; after a stop the checkpoint is on disk.

    Raises:
        NonFinite: training diverged; the last good weights are on disk.
        Stopped: asked to stop while data are waited for that don't come, where it can't save.
        UsageError: too many samples can't be used.
    """
    progress, meter = trainer.progress, Meter()
    clock = _Clock(progress)
    saver = _Saver(trainer, loader, config, checkpoints, writer, clock)
    bar = _bar(trainer)

    stopping = False
    trainer.stage.task.train()
    # One process looks for a signal while it waits for data. Of several, all stop at one step,
    # unless its data don't come to one: the others wait for that one, where no signal reaches them.
    alone = trainer.world.size == 1

    def asked_to_stop() -> bool:
        return stop is not None and stop.raised()

    def hangs() -> bool:
        return asked_to_stop() and clock.waiting() > PATIENCE

    stopping_early = asked_to_stop if alone else hangs
    timeout = config.data_timeout or None
    batches = loader.batches(progress.step, trainer.total_steps, stopping_early, timeout)

    with contextlib.closing(bar):
        for batch in _delivered(clock.timed(batches), progress, saver, alone):
            meter.add(trainer.step(batch.to(trainer.device)))
            bar.update()
            step, epoch_end = progress.step, progress.step % trainer.steps_per_epoch == 0
            # A line in the log, and what it may find out.
            every = config.log_every_n_steps
            line_due = epoch_end or (every and step % every == 0)
            if line_due:
                _log(trainer, meter, clock, writer, bar)
                check_samples(progress)
            _check_finite(trainer, saver, 0 if line_due else LOOK_BACK)
            # Held-out data.
            if epoch_end and validation and _due(trainer, validation.every_epochs):
                rows = clock.timed(iter(validation(hangs, timeout)))
                held_out = trainer.flat(trainer.validate(rows))
                if hangs():
                    raise Stopped(f"{stop.name}: held-out data don't come, after step {step}")
                clock.pause()
                if writer is not None:
                    writer.write("val", step, held_out)
                    log.info("held out | %s", _format(held_out))
            # A checkpoint, when one is due, and the end, when somebody asks for it.
            overdue = saver.overdue()
            wanted = stop.agreed(overdue) if stop is not None else overdue
            stopping = wanted == STOP
            if wanted or saver.due(epoch_end):
                saver.save()
            if stopping:
                log.warning("%s: saving step %d; --resume latest goes on", stop.name, step)
                break
        if asked_to_stop() and not stopping and progress.step < trainer.total_steps:
            stopping = True
            saver.save(alone)
            log.warning("%s: stopping at step %d, waiting for data", stop.name, progress.step)
            if not alone:
                saver.wait()
                raise Stopped(f"{stop.name}: data don't come, after step {progress.step}")
    saver.wait()
    clock.account()
    return progress.step == trainer.total_steps and not stopping


def _delivered(
    batches: Iterator[Batch], progress: Progress, saver: "_Saver", alone: bool
) -> Iterator[Batch]:
    """Batches; where they end in an error, what was trained is saved before it is told."""
    begun = progress.step
    try:
        yield from batches
    except Exception:  # of a worker or its data: the weights are good
        if progress.step > begun:
            saver.save(alone)
            saver.wait()
        raise


def _check_finite(trainer: Trainer, saver: "_Saver", look_back: int) -> None:
    """Save the last good weights of a run that diverged, and raise."""
    try:
        trainer.check_finite(look_back)
    except NonFinite:
        saver.save()
        saver.wait()
        barrier(trainer.world)  # who leaves first would end who still saves
        raise


def _bar(trainer: Trainer) -> tqdm:
    """Rank 0's progress, on a terminal or in a notebook."""
    seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        total=trainer.total_steps,
        initial=trainer.progress.step,
        unit="step",
        disable=not seen or trainer.world.rank != 0,
        dynamic_ncols=True,
    )


class _Saver:
    """Saves a run's state, and knows when it is due."""

    def __init__(
        self,
        trainer: Trainer,
        loader: Loader,
        config: RunConfig,
        checkpoints: Checkpoints | None,
        writer: MetricWriter | None,
        clock: "_Clock",
    ):
        self.trainer, self.loader, self.config = trainer, loader, config
        self.checkpoints, self.writer, self.clock = checkpoints, writer, clock
        self.last = time.monotonic()

    def due(self, epoch_end: bool) -> bool:
        """Whether the last step, an epoch or a number of steps asks for it."""
        step, every = self.trainer.progress.step, self.config.save_every_n_steps
        return bool(
            step == self.trainer.total_steps
            or (epoch_end and _due(self.trainer, self.config.save_frequency))
            or (every and step % every == 0)
        )

    def overdue(self) -> bool:
        """Whether this process's clock asks for it."""
        minutes, patience = (time.monotonic() - self.last) / 60, self.config.save_every_n_minutes
        return bool(patience and minutes >= patience)

    def save(self, together: bool = True) -> None:
        """Copy the state, to be written in the background; all ranks count the time.

        Args:
            together: whether all ranks save: then what each has skipped is in it.
        """
        if together:
            self.trainer.agree_on_skipped()
        self.clock.account()
        self.trainer.progress.shards = getattr(self.loader, "shards_consumed", 0)
        if self.writer is not None:
            self.writer.sync()
        if self.checkpoints is not None:
            self.checkpoints.save(self.trainer.progress.step, self.trainer.payload())
        self.last = time.monotonic()

    def wait(self) -> None:
        """Wait until what was saved is on disk."""
        if self.checkpoints is not None:
            self.checkpoints.wait()


class _Clock:
    """Time of the run, of the interval between log lines, and of waiting for data in it.

    Attributes:
        skipped: samples that the last line told of.
    """

    def __init__(self, progress: Progress):
        self._progress, self.skipped = progress, progress.skipped.copy()
        self._before = progress.seconds, progress.cpu_seconds
        self._start = time.monotonic(), time.process_time()
        self._mark, self._waited, self._samples = self._start[0], 0.0, 0
        self._asked, self._first = self._start[0], True

    def waiting(self) -> float:
        """Seconds since the last batch was asked for."""
        return time.monotonic() - self._asked

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            self._asked = time.monotonic()
            batch = next(batches, None)
            self._waited += self.waiting()
            if batch is None:
                return
            self._samples += len(batch)
            start = time.monotonic()
            yield batch
            if self._first:  # what is compiled is compiled in it
                log.info("the first step took %.1f s", time.monotonic() - start)
            self._first = False

    def pause(self) -> None:
        """Leave what was done since the last line (a validation) out of the next one."""
        self._mark, self._waited, self._samples = time.monotonic(), 0.0, 0

    def read(self) -> tuple[float, float]:
        """Samples per second and share of time spent waiting for data since the last reading."""
        elapsed = max(time.monotonic() - self._mark, 1e-9)
        result = self._samples / elapsed, self._waited / elapsed
        self.pause()
        return result

    def account(self) -> None:
        """Bring the progress's times up to date."""
        self._progress.seconds = self._before[0] + time.monotonic() - self._start[0]
        self._progress.cpu_seconds = self._before[1] + time.process_time() - self._start[1]


def _log(
    trainer: Trainer, meter: Meter, clock: _Clock, writer: MetricWriter | None, bar: tqdm
) -> None:
    """Write the means since the last line; every rank must call."""
    progress = trainer.progress
    trainer.agree_on_skipped()
    line = _line(trainer, meter, clock)
    if writer is not None:
        writer.write("train", progress.step, line)
        if progress.skipped != clock.skipped:
            clock.skipped = progress.skipped.copy()
            writer.write("skipped", progress.step, progress.skipped)
            log.warning("samples replaced so far: %s", dict(progress.skipped))
    if bar.disable:  # no terminal
        _say(trainer, line)
    else:
        bar.set_postfix_str(f"loss {line['loss']:.4g}, {line['samples_per_s']:.0f} samples/s")


def _line(trainer: Trainer, meter: Meter, clock: _Clock) -> dict[str, Any]:
    values = trainer.flat(meter.read(trainer.world))  # waits for the device
    rate, wait = clock.read()
    progress = trainer.progress
    return {
        "epoch": progress.step / trainer.steps_per_epoch,
        "samples": progress.samples,
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        **values,
        "samples_per_s": rate * trainer.world.size,
        "data_wait": wait,
        "skipped_samples": progress.skipped.total(),
        "skipped_steps": int(trainer.bad_total.item()),
    }


def _say(trainer: Trainer, line: dict[str, Any]) -> None:
    terms = {k: v for k, v in line.items() if k.endswith("_loss") or k in ("loss", "contrastive")}
    step, steps = trainer.progress.step, trainer.total_steps
    left = (steps - step) * line["samples"] / step / line["samples_per_s"]
    log.info(
        "epoch %.2f/%d, step %d/%d, %s left | %s | lr %.3g | %.0f samples/s | data wait %.0f %%",
        line["epoch"],
        trainer.config.epochs,
        step,
        steps,
        duration(left / 60),
        _format(terms),
        line["lr"],
        line["samples_per_s"],
        100 * line["data_wait"],
    )


def _format(values: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in values.items())


def _due(trainer: Trainer, frequency: int) -> bool:
    return frequency > 0 and trainer.epoch % frequency == 0

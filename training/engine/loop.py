"""The one training loop: stage 1, stage 2 and every method go through it."""

import contextlib
import logging
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from training.data.loader import Batch, Loader
from training.data.stream import StreamLoader
from training.engine.checkpoint import Checkpoints
from training.engine.control import StopFlag
from training.engine.metrics import Meter, Sinks, flatten
from training.engine.trainer import Progress, Trainer
from training.errors import NonFinite, UsageError

log = logging.getLogger(__name__)


def train(
    trainer: Trainer,
    loader: Loader | StreamLoader,
    checkpoints: Checkpoints | None,
    sinks: Sinks | None,
    stop: StopFlag,
    validation=None,
) -> bool:
    """Run a trainer to its last step, or until it is told to stop.

    Args:
        trainer: what trains, at the step it starts from.
        loader: gives this rank's part of each global batch.
        checkpoints, sinks: where rank 0 writes; None on the others.
        stop: asked at every step boundary.
        validation: called without arguments, gives the held-out batches of an epoch's end.

    Returns:
        Whether all steps are done; False after a stop, whose checkpoint is on disk.

    Raises:
        NonFinite: training diverged; the last good weights are on disk.
        UsageError: too many samples can't be used.
    """
    args, progress, meter = trainer.args, trainer.progress, Meter()
    clock = _Clock(progress.seconds)
    last_save = time.monotonic()
    bar = tqdm(
        total=trainer.total_steps,
        initial=progress.step,
        unit="step",
        disable=None if sinks else True,
        dynamic_ncols=True,
    )

    def save() -> None:
        nonlocal last_save
        progress.seconds = clock.total()
        progress.shards = getattr(loader, "shards_consumed", 0)
        if checkpoints is not None:
            checkpoints.save(progress.step, trainer.payload())
        last_save = time.monotonic()

    trainer.stage.task.train()
    batches = loader.batches(progress.step, trainer.total_steps)
    with contextlib.closing(bar):
        for batch in clock.timed(batches):
            values = trainer.step(batch.to(trainer.device))
            meter.add(values)
            bar.update()
            step, epoch_end = progress.step, progress.step % trainer.steps_per_epoch == 0
            if step % args.log_every_n_steps == 0 or epoch_end:
                before = sum(progress.skipped.values())
                trainer.agree_on_skipped()
                line = _line(trainer, meter, clock)
                if sinks is not None:
                    sinks.write("train", step, line)
                    _say(bar, trainer, line)
                    if sum(progress.skipped.values()) > before:
                        sinks.write("skipped", step, progress.skipped)
                        log.warning("samples replaced so far: %s", dict(progress.skipped))
                _check_bad_fraction(args, progress)
                try:
                    trainer.check_finite()
                except NonFinite:
                    save()
                    if checkpoints is not None:
                        checkpoints.wait()
                    raise
            if epoch_end and validation and _due(args, trainer, args.val_frequency):
                held_out = trainer.validate(validation())
                clock.pause()
                if sinks is not None:
                    sinks.write("val", step, held_out)
                    log.info("held out | %s", _format(held_out))
            done = step == trainer.total_steps
            stopping = not done and stop.agreed()
            minutes = (time.monotonic() - last_save) / 60
            if (
                done
                or stopping
                or (epoch_end and _due(args, trainer, args.save_frequency))
                or (args.save_every_n_steps and step % args.save_every_n_steps == 0)
                or (args.save_every_n_minutes and minutes >= args.save_every_n_minutes)
            ):
                save()
            if stopping:
                log.warning("%s: saving step %d and stopping", stop.name, step)
                break
    if checkpoints is not None:
        checkpoints.wait()
    progress.seconds = clock.total()
    return progress.step == trainer.total_steps


class _Clock:
    """Wall time of the run, of the interval, and of waiting for data."""

    def __init__(self, before: float):
        self._before, self._start = before, time.monotonic()
        self._mark, self._waited, self._samples, self._paused = self._start, 0.0, 0, 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - start
            if batch is None:
                return
            self._samples += len(batch)
            yield batch

    def pause(self) -> None:
        """Leave what was done since the last line (a validation) out of the next one."""
        self._mark, self._waited, self._samples = time.monotonic(), 0.0, 0

    def read(self) -> tuple[float, float]:
        """Samples per second and share of time spent waiting for data since the last reading."""
        elapsed = max(time.monotonic() - self._mark, 1e-9)
        result = self._samples / elapsed, self._waited / elapsed
        self.pause()
        return result

    def total(self) -> float:
        return self._before + time.monotonic() - self._start


def _line(trainer: Trainer, meter: Meter, clock: _Clock) -> dict[str, Any]:
    values = flatten(meter.read(trainer.world), trainer.stage.rates)  # waits for the device
    rate, wait = clock.read()
    progress = trainer.progress
    return {
        "epoch": progress.step / trainer.steps_per_epoch,
        "samples": progress.samples,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        **values,
        "samples_per_s": rate * trainer.world.size,
        "data_wait": wait,
        "skipped_samples": sum(progress.skipped.values()),
        "skipped_steps": int(trainer.bad_total.item()),
    }


def _say(bar: tqdm, trainer: Trainer, line: dict[str, Any]) -> None:
    if not bar.disable:
        bar.set_postfix_str(f"loss {line['loss']:.4g}, {line['samples_per_s']:.0f} samples/s")
        return
    terms = {k: v for k, v in line.items() if k.endswith("_loss") or k == "loss"}
    log.info(
        "step %d/%d | %s | lr %.3g | %.0f samples/s | data wait %.0f %%",
        trainer.progress.step,
        trainer.total_steps,
        _format(terms),
        line["lr"],
        line["samples_per_s"],
        100 * line["data_wait"],
    )


def _format(values: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in values.items())


def _due(args: Namespace, trainer: Trainer, frequency: int) -> bool:
    return frequency > 0 and trainer.progress.step // trainer.steps_per_epoch % frequency == 0


def _check_bad_fraction(args: Namespace, progress: Progress) -> None:
    bad = sum(progress.skipped.values())
    # A handful proves nothing.
    if bad > 10 and bad > args.max_bad_fraction * progress.samples:
        raise UsageError(
            f"{bad} of {progress.samples} samples could not be used "
            f"({dict(progress.skipped)}), more than --max-bad-fraction {args.max_bad_fraction}; "
            "run `python -m training.check_data --deep` on --train-data"
        )

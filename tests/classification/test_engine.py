"""What classifiers have from the engine: accumulation, skipped steps, W&B's and TensorBoard's."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from cifd_clip.classification.methods import (
    ClassifierTask,
    Distillation,
    Paraphraser,
    RDMTraining,
    Weights,
)
from cifd_clip.classification.models import simple_cnn
from cifd_clip.files import BadFile
from classification.command import run_photos
from classification.small import bank, generator, table
from runs import final
from trainers import gradients, worst
from training.classifier.cifar import Batches
from training.classifier.config import resolve
from training.classifier.stage import ClassifierStage
from training.classifier.teachers import TeacherNetworks
from training.engine.config import RunConfig
from training.engine.metrics import MetricWriter, Sink
from training.engine.run import read_metrics
from training.engine.trainer import LOOK_BACK, Trainer
from training.errors import NonFinite, UsageError

ROWS, STEPS = 16, 4


def tasks() -> dict[str, ClassifierTask]:
    """What trains, under a teacher of 256 dimensions and two reconstructing RDMs."""
    weights = Weights(embedding=0.5, information=0.05, kd_dropout=0.25, tau=2.0)
    student = simple_cnn("cnn4", generator=generator(1))
    rdms = bank("reconstruct", dim=256)
    return {
        "cifd": Distillation(student, [256], weights, ibm=True, generator=generator(2)),
        "rdm": RDMTraining(rdms, weights),
        "paraphraser": Paraphraser(256, 12, 1.0, generator(3)),
    }


def trainer(method: str, **flags) -> Trainer:
    """Without a command line, data and directories."""
    stage1 = method in ("rdm", "paraphraser")
    own = {"method": method, "teacher": "a"} | ({} if stage1 else {"model": "cnn4"})
    config = resolve({"data": "none", "epochs": 1, **own, **flags})
    teacher = simple_cnn("cnn2", generator=generator()).eval().requires_grad_(False)
    rdms = None if stage1 else bank("reconstruct", dim=256).requires_grad_(False).eval()
    source = TeacherNetworks([teacher], rdms, [0, 1], [1.0, 0.5])
    stage = ClassifierStage(tasks()[method], source)
    stage.task.train()
    return Trainer(stage, config, STEPS)


def batches() -> list:
    return list(
        Batches(table(ROWS * STEPS), np.arange(ROWS * STEPS), "flip", 0, ROWS).epoch(0, 0, True)
    )


@pytest.mark.parametrize("method", tasks())
def test_accumulated_micro_batches_have_the_loss_and_gradient_of_the_whole_batch(method):
    whole = trainer(method, batch_size=ROWS)
    parts = trainer(method, batch_size=ROWS // 4, accum_freq=4)
    assert whole.config.global_batch == parts.config.global_batch == ROWS
    batch = batches()[0]
    expected, values = whole.step(batch), parts.step(batch)
    assert expected.keys() == values.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6, msg=name)
    off, where = worst(gradients(parts), gradients(whole))
    assert off < 1e-4, where


def test_accumulation_is_refused_where_there_is_batch_normalisation(photos, tmp_path):
    flags = ["--global-batch=4", "--accum-freq=2", "--lr=0.001", f"--logs={tmp_path}"]
    with pytest.raises(UsageError, match="--accum-freq 2 with --model resnet18: batch normal"):
        run_photos(photos, "normalised", "--model=resnet18", *flags)
    run_photos(photos, "plain", "--model=cnn2", *flags)
    assert final(tmp_path / "plain")["progress"]["step"] == 2


def test_a_step_whose_gradient_is_not_finite_is_skipped_by_every_optimizer():
    cifd = trainer("cifd", max_nonfinite_steps=2, grad_clip_norm=1.0)
    assert len(cifd.optimizers) == 2, "SGD, and Adam for the density"
    first, second, third, last = batches()
    cifd.step(first)
    before = copy.deepcopy(cifd.stage.task.state_dict())
    second.images[3] = float("nan")
    cifd.step(second)
    for name, tensor in cifd.stage.task.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} moved"
    cifd.check_finite()
    cifd.step(third)
    for name, parameter in cifd.stage.task.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} does not train any more"
    assert cifd.payload()["progress"]["nonfinite_steps"] == 1
    last.images[0] = float("inf")
    cifd.step(last)
    cifd.step(last)
    with pytest.raises(NonFinite, match=r"2 steps in a row .*ce_loss = nan"):
        cifd.check_finite()


def test_too_many_skipped_steps_are_noticed_some_steps_later_or_at_the_end():
    """In a row, as a share of all, and in a run that is shorter than either; without log lines."""

    def steps(*bad: bool, of: int = 1000, **options) -> None:
        stepping = trainer("cifd", max_nonfinite_steps=3, **options)
        stepping.total_steps = of
        for spoilt, batch in zip(bad, itertools.cycle(batches())):
            images = torch.full_like(batch.images, torch.nan) if spoilt else batch.images
            stepping.step(replace(batch, images=images))
            stepping.check_finite(0 if stepping.progress.step == of else LOOK_BACK)

    with pytest.raises(NonFinite, match=r"3 steps in a row .* at step 5;"):
        steps(False, False, *[True] * 3, *[False] * LOOK_BACK)
    steps(False, False, *[True] * 3, *[False] * (LOOK_BACK - 1))
    with pytest.raises(NonFinite, match=r"4 of 7 steps had .* at step 7;"):
        steps(*[True, False] * 6)
    with pytest.raises(NonFinite, match=r"2 of 2 steps had"):
        steps(True, True, of=2)
    steps(True, False, of=2)


def test_a_run_that_diverges_ends_with_the_weights_it_had(photos, tmp_path):
    flags = ["--model=cnn2", "--lr=1e30", "--epochs=3", "--max-nonfinite-steps=2"]
    with pytest.raises(NonFinite, match="steps in a row had a non-finite gradient"):
        run_photos(photos, "diverged", *flags, f"--logs={tmp_path}")
    saved = final(tmp_path / "diverged")
    assert all(t.isfinite().all() for t in saved["task"].values())
    assert saved["progress"]["nonfinite_steps"] >= 2
    assert not (tmp_path / "diverged" / "finished.json").exists()


def test_a_place_for_metrics_that_fails_is_told_once_and_training_goes_on(tmp_path, caplog):
    """W&B without a network on a compute node, TensorBoard over a full quota."""

    def fail(*_) -> None:
        raise ConnectionError("no network")

    (tmp_path / "tensorboard").touch()
    writer = MetricWriter(tmp_path, RunConfig(report_to="tensorboard"))
    writer._sinks["wandb"] = Sink(fail, fail)
    for step in (1, 2):
        writer.write("train", step, {"loss": 1.0})
    writer.close()
    told = [
        r.getMessage() for r in caplog.records if "gets no more of this run's" in r.getMessage()
    ]
    assert len(told) == 2 and "no network" in told[1] and "tensorboard" in told[0]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("line", ["[]", "{}", '{"kind": "train"}', "nonsense"])
def test_a_damaged_line_of_metrics_is_named_and_a_resumed_run_goes_on_without_it(line, tmp_path):
    good = ['{"kind": "train", "step": 1}', '{"kind": "train", "step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([good[0], line, good[1], '{"ki']))
    with pytest.raises(BadFile, match=r"metrics.jsonl:2 is damaged"):
        read_metrics(tmp_path)
    MetricWriter(tmp_path, RunConfig(), step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == good[0] + "\n"
    (tmp_path / "metrics.jsonl").write_text("\n".join([*good, '{"ki']))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3], "one is being written"


def test_metrics_go_to_tensorboard_as_well(photos, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--model=cnn2", "--lr=0.001", "--holdout=2", "--log-every-n-steps=1"]
    run = run_photos(photos, "board", *flags, "--report-to=tensorboard", f"--logs={tmp_path}")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/ce_loss")] == [1, 2]
    assert [event.step for event in events.Scalars("val/acc1")] == [2]

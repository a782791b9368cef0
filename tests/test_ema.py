"""``--ema``: the average of the student's weights is what ships."""

import copy
import os
import signal

import open_clip
import pytest
import torch
from torch import nn

from runs import assert_bit_equal, final, lines
from tiny import clip, pairs
from training.clip.flags import parse_args
from training.engine.optim import MovingAverage
from training.engine.trainer import Trainer
from training.errors import UsageError
from training.main import main

DECAY = 0.7
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


def test_the_average_follows_its_formula_and_batch_statistics_are_copied():
    model = clip(RESNET).train()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    moving = MovingAverage(average, model, DECAY)
    expected = [p.detach().double() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(40):
        optimizer.zero_grad()
        image, text, scale = model(*pairs(4, seed=step))
        (scale * (image * text).sum()).backward()
        optimizer.step()
        moving.update(step)
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = [
            decay * e + (1 - decay) * p.detach().double()
            for e, p in zip(expected, model.parameters())
        ]
    for (name, found), wanted in zip(average.named_parameters(), expected):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)
    norms = [m for m in average.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.num_batches_tracked == 40 for m in norms)
    for (name, found), wanted in zip(average.named_buffers(), model.buffers()):
        assert torch.equal(found, wanted), name


@pytest.fixture(scope="module")
def runs(flags, teacher, bank, scenes, tmp_path_factory):
    """The same CIFD run without an average, with one, and with one and a stop in the middle."""
    logs = tmp_path_factory.mktemp("ema")
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--rdm-bank", str(bank)]
    command += ["--val-data", str(scenes / "val"), "--epochs", "2", "--logs", str(logs)]
    averaged = [*command, "--ema", str(DECAY)]
    assert main([*command, "--name", "plain"]) == 0
    assert main([*averaged, "--name", "averaged"]) == 0
    step = Trainer.step

    def interrupted(self, batch):
        values = step(self, batch)
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert main([*averaged, "--name", "parts"]) == 75
    assert final(logs / "parts")["progress"]["step"] == 5
    assert main([*averaged, "--name", "parts", "--resume", "latest"]) == 0
    with pytest.raises(UsageError, match=r"--ema was 0\.7, now None"):
        main([*command, "--name", "averaged", "--resume", "latest"])
    return logs


def test_a_stopped_run_ends_with_the_bits_of_a_whole_one(runs):
    assert_bit_equal(final(runs / "parts"), final(runs / "averaged"))
    assert lines(runs / "parts", "val")[-1].items() >= {"step": 8}.items()
    for kind in ("train", "val"):
        whole, parts = (lines(runs / name, kind) for name in ("averaged", "parts"))
        terms = [k for k in whole[0] if k.endswith("loss")]
        assert [[row[k] for k in terms] for row in whole] == [[r[k] for k in terms] for r in parts]


def test_averaging_changes_nothing_of_what_trains(runs):
    plain, averaged = final(runs / "plain"), final(runs / "averaged")
    trained = averaged["training"]
    assert_bit_equal(trained["state_dict"], plain["state_dict"])
    assert_bit_equal(trained["method"], plain["method"])
    assert_bit_equal(averaged["optimizers"], plain["optimizers"])


def test_the_average_ships_as_a_stock_model_and_is_what_validation_scored(runs):
    content = final(runs / "averaged")
    stock = open_clip.create_model("tiny-student")
    stock.load_state_dict(content["state_dict"], strict=True)
    shipped, *_ = open_clip.create_model_and_transforms(f"local-dir:{runs}/averaged/student")
    moved = 0.0
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, shipped.state_dict()[name]), f"{name} differs in student/"
        moved += (tensor - content["training"]["state_dict"][name]).abs().sum().item()
    assert moved > 0, "what ships is the last weights, not their average"
    plain, averaged = (lines(runs / name, "val")[-1] for name in ("plain", "averaged"))
    assert averaged["contrastive_loss"] != plain["contrastive_loss"]


@pytest.mark.parametrize("decay", ["0", "1", "-0.5", "2"])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(UsageError, match="--ema must be positive and below 1"):
        parse_args(["--train-data", "x", "--ema", decay])

"""A student as wide as its teacher: Û of eq. 10 to 13 lies in the teacher's space and ships."""

import open_clip
import torch

from cifd_clip import Noise
from eval import models
from runs import final
from tiny import pairs
from trainers import CPU, batch, prepare, trainer
from training.main import main

WIDE = ["--force-embed-dim", "48"]  # the teacher's T; the student's configuration says 32
FLAGS = ["--lambda-cl", "0.3", "--no-ibm", *WIDE]


def test_contrast_and_embedding_terms_read_one_embedding_in_the_teachers_space(tmp_path):
    stage = trainer("cifd", prepare(tmp_path), *FLAGS).stage
    assert not list(stage.task.method.parameters()), "nothing is projected, nothing thrown away"
    data = batch(6)
    inputs, teachers = stage.inputs(data), stage.with_assistants(stage.targets(data), None)
    losses, _ = stage.task(*inputs, teachers, Noise(0, 0))
    model = stage.task.student.model
    image = model.encode_image(inputs[0], normalize=True)
    text = model.encode_text(inputs[1], normalize=True)
    assert image.shape == text.shape == teachers[0].image.shape == (6, 48)
    contrast = 2 * open_clip.ClipLoss()(image, text, model.logit_scale.exp())
    torch.testing.assert_close(losses["contrastive_loss"], 0.3 * contrast)
    for name, mine in (("image", image), ("text", text)):
        terms = [t.weight * (mine - getattr(t, name)).square().mean() for t in teachers]
        torch.testing.assert_close(losses[f"{name}_embedding_loss"], sum(terms))


def test_what_is_shipped_and_what_a_checkpoint_holds_is_that_embedding(
    flags, teacher, bank, tmp_path
):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--rdm-bank", str(bank)]
    assert main([*command, *FLAGS, "--logs", str(tmp_path), "--name", "run"]) == 0
    stock = open_clip.create_model("tiny-student", embed_dim=48).eval()
    stock.load_state_dict(final(tmp_path / "run")["state_dict"], strict=True)
    newest = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
    shipped, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'run' / 'student'}")
    images, texts = pairs(4)
    with torch.no_grad():
        expected = stock.encode_image(images), stock.encode_text(texts)
        assert expected[0].shape == expected[1].shape == (4, 48)
        for model in (shipped.eval(), models.load(str(newest), CPU).model):
            found = model.encode_image(images), model.encode_text(texts)
            assert all(map(torch.equal, found, expected))

"""A classifier's RDMs: equations 5 and 22, both forms, and the artefacts of a teacher."""

import math

import pytest
import torch
import torch.nn.functional as F

from cifd_clip import RateDistortionModules, RDMBank
from cifd_clip.artefact import FORMS
from cifd_clip.classification.methods import (
    Paraphraser,
    RDMTraining,
    Targets,
    TeacherOutput,
    Weights,
)
from cifd_clip.files import BadFile
from cifd_clip.noise import Noise
from cifd_clip.rdm import classifier_loss, unit_scale
from classification.small import BATCH, bank, batch, generator, rdms


def by_hand(modules: RateDistortionModules, k: int, x, noise):
    """One assistant as plain layers: latents after noise or rounding, and what follows."""

    def layer(i, x):
        return x @ modules.weights[i][k] + modules.biases[i][k]

    y = layer(1, F.relu(layer(0, x * modules.scale)))
    noisy = y.round() if noise is None else y + noise[:, k * y.shape[1] : (k + 1) * y.shape[1]]
    third = F.relu(layer(2, noisy))
    if modules.form == "classify":
        return noisy, third, layer(3, third)
    reconstruction = layer(3, third)
    return noisy, reconstruction / modules.scale, layer(4, reconstruction)


@pytest.mark.parametrize("form", ["classify", "reconstruct"])
@pytest.mark.parametrize("rounds", [True, False], ids=["rounding", "noise"])
def test_an_assistant_is_its_layers_and_no_other_assistants(form, rounds):
    modules = rdms(form, scale=0.5)
    x = 3 * torch.randn(BATCH, 12, generator=generator())
    width = 2 * modules.channels
    noise = None if rounds else Noise(0, 0).uniform("rdm", BATCH, width, x.device)
    output = modules(x, noise)
    latents = []
    for k in range(2):
        noisy, embedding, logits = by_hand(modules, k, x, noise)
        torch.testing.assert_close(output.embedding[k], embedding, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.logits[k], logits, rtol=1e-4, atol=1e-4)
        latents.append(noisy)
    if rounds:
        assert all(torch.equal(noisy, noisy.round()) for noisy in latents)
    nats = modules.density(torch.cat(latents, 1)).view(BATCH, 2, -1).sum(-1).t()
    torch.testing.assert_close(output.nats, nats, rtol=1e-4, atol=1e-2)


def test_the_simple_form_has_the_layers_of_appendix_a11():
    modules = rdms("classify", dim=512)
    shapes = [tuple(w.shape[1:]) for w in modules.weights]
    assert shapes == [(512, 512), (512, 306), (306, 100), (100, 100)]
    assert modules.channels == 306 and modules.embedding_dim == 100


@pytest.mark.parametrize("form", ["classify", "reconstruct"])
def test_the_rdm_loss_is_equation_22(form):
    modules = rdms(form)
    x = torch.randn(BATCH, 12, generator=generator())
    teacher = torch.randn(BATCH, 100, generator=generator(5))
    labels = batch()[1]
    noise = Noise(0, 1).uniform("rdm", BATCH, 2 * modules.channels, x.device)
    output = modules(x, noise)
    weights = {"lambda_ce": 0.9, "lambda_kl": 0.4, "tau": 2.0}
    terms = classifier_loss(modules, output, x, teacher, labels, **weights)
    for k, rate in enumerate(modules.rates):
        ce = F.cross_entropy(output.logits[k], labels)
        p, q = (teacher / 2).softmax(-1), (output.logits[k] / 2).softmax(-1)
        supervised = 0.9 * ce + 0.4 * 4 * (p * (p.log() - q.log())).sum(-1).mean()
        expected = output.nats[k].mean()
        if form == "classify":
            expected = expected + rate * supervised
        else:
            distortion = (x - output.embedding[k]).square().sum(-1).mean()
            expected = expected + supervised + rate * distortion
        assert sum(t[k] for t in terms.values()).item() == pytest.approx(expected.item(), rel=1e-5)


def test_rounding_keeps_the_signal_at_the_start():
    x = 7 * torch.randn(64, 12, generator=generator())
    modules = rdms("classify", scale=unit_scale(x))
    output = modules(x, None)
    distance = (output.logits[:, 1:] - output.logits[:, :-1]).norm(dim=-1)
    assert distance.min() > 0.1, "rounding makes different embeddings one"


@pytest.mark.parametrize("form", FORMS)
def test_a_bank_comes_back_from_disk_and_refuses_another_teacher(form, tmp_path):
    made = bank(form, hidden=[20, 8, 16])
    made.save(tmp_path / "bank")
    x = torch.randn(4, 12, generator=generator())
    again = RDMBank.load(tmp_path / "bank", made.teacher)
    assert again.config() == made.config() and again.task == "classifier"
    for ours, theirs in zip(again.image(x, None), made.image(x, None)):
        assert torch.equal(ours, theirs)
    said = "on cnn2 with weights aaaaaaaaaaaa, but the teacher is cnn4 with weights bbbbbbbbbbbb"
    with pytest.raises(ValueError, match=said):
        RDMBank.load(tmp_path / "bank", {"model": "cnn4", "weights": "b" * 64})


def test_a_paraphraser_comes_back_from_disk_and_refuses_another_teacher(tmp_path):
    made, teacher = Paraphraser(12, 5, 0.3, generator()), {"model": "cnn2", "weights": "a" * 64}
    made.save(tmp_path / "p", teacher)
    x = torch.randn(4, 12, generator=generator())
    again = Paraphraser.load(tmp_path / "p", teacher)
    assert torch.equal(again.factors_of(x), made.factors_of(x))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    with pytest.raises(ValueError, match="but the teacher is cnn4 with weights bbbbbbbbbbbb"):
        Paraphraser.load(tmp_path / "p", {"model": "cnn4", "weights": "b" * 64})
    with pytest.raises(FileNotFoundError, match="holds no paraphraser"):
        Paraphraser.load(tmp_path, teacher)
    config = tmp_path / "p" / "config.json"
    config.write_text(config.read_text().replace('"factors": 5', '"factors": -5'))
    with pytest.raises(BadFile, match=r"config\.json is damaged"):
        Paraphraser.load(tmp_path / "p", teacher)


def test_more_rate_buys_more_accuracy():
    """Figure 5 in small: separable clusters, a few hundred steps."""
    g = generator()
    centres = 2 * torch.randn(20, 12, generator=g)
    labels = torch.randint(20, (128,), generator=g)
    x = centres[labels] + 0.3 * torch.randn(128, 12, generator=g)
    shape = {"hidden": [32, 8, 32], "scale": unit_scale(x), "classes": 20}
    task = RDMTraining(bank("classify", [0.01, 100.0], **shape), Weights(kl=0.0))
    density = {id(p) for p in task.bank.image.density.parameters()}
    rest = [p for p in task.parameters() if id(p) not in density]
    optimizer = torch.optim.Adam(
        [{"params": rest, "lr": 6e-3}, {"params": task.bank.image.density.parameters(), "lr": 6e-2}]
    )
    targets = Targets(labels, [TeacherOutput(F.one_hot(labels, 20).float(), x)])
    for step in range(120):
        losses, _ = task(None, targets, Noise(0, step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    measured = {k: v.mean(-1) for k, v in task.measure(None, targets).items()}
    poor, rich = measured["acc1"].tolist()
    assert rich > 0.9 > 0.5 > poor
    assert measured["bits"][0] < measured["bits"][1]


def test_bits_are_nats_in_another_unit():
    made = bank("classify")
    x = torch.randn(BATCH, 12, generator=generator())
    targets = Targets(batch()[1], [TeacherOutput(torch.zeros(BATCH, 100), x)])
    measured = RDMTraining(made, Weights()).measure(None, targets)
    nats = made.image(x, None).nats
    torch.testing.assert_close(measured["bits"], nats / math.log(2))

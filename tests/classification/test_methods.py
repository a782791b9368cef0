"""Supervised CIFD is equation 9, and the other methods are special cases of it."""

import pytest
import torch
import torch.nn.functional as F

from cifd_clip.classification.losses import kd_dropout_mask, kl_per_sample
from cifd_clip.classification.methods import Distillation, Paraphraser, Targets, Weights
from cifd_clip.classification.models import simple_cnn
from cifd_clip.noise import Noise
from classification.small import BATCH, batch, generator, teacher_outputs


def test_the_cifd_loss_is_equation_9():
    images, labels = batch()
    weights = Weights(ce=0.7, kl=0.3, embedding=2.0, information=0.05, tau=2.0)
    student = simple_cnn("cnn2", generator=generator())
    task = Distillation(student, [5, 6, 7], weights, ibm=True, generator=generator())
    teachers = teacher_outputs(0.5, 0.25)
    noise = Noise(seed=3, step=8)
    losses, _ = task(images, Targets(labels, teachers), noise)

    w = student.features(images)
    w = w + noise.uniform("ibm", BATCH, 256, w.device)
    logits = student.classify(w)
    expected = 0.7 * F.cross_entropy(logits, labels)
    expected += 0.05 * task.bottleneck.density(w).mean()
    for i, (teacher, weight) in enumerate(zip(teachers, (1.0, 0.5, 0.25))):
        p, q = (teacher.logits / 2).softmax(-1), (logits / 2).softmax(-1)
        expected += 0.3 * weight * 4 * (p * (p.log() - q.log())).sum(-1).mean()
        u = task.projectors[i](w)
        expected += 2.0 * weight * (u - teacher.embedding).square().mean()
    assert sum(losses.values()).item() == pytest.approx(expected.item(), rel=1e-5)


def test_kd_is_cifd_without_assistants_bottleneck_and_embedding_terms():
    images, labels = batch()
    task = Distillation(simple_cnn("cnn2", generator=generator()), [], Weights())
    losses, _ = task(images, Targets(labels, teacher_outputs()[:1]), Noise(0, 0))
    assert set(losses) == {"ce_loss", "kl_loss"}


def test_the_bottleneck_is_there_in_training_only():
    images, labels = batch()
    student = simple_cnn("cnn2", generator=generator())
    task = Distillation(student, [], Weights(information=1.0), ibm=True, generator=generator())
    clean, _ = task(images, Targets(labels, []), None)
    noisy, _ = task(images, Targets(labels, []), Noise(0, 0))
    assert "rate_loss" not in clean and noisy["rate_loss"] > 0
    assert clean["ce_loss"].item() == pytest.approx(
        F.cross_entropy(student(images), labels).item(), rel=1e-6
    )
    assert noisy["ce_loss"] != clean["ce_loss"]
    with torch.no_grad():
        hits = task.measure(images, Targets(labels, []))["acc1"]
        assert torch.equal(hits, (student(images).argmax(-1) == labels).float())


def test_dropout_removes_whole_terms_of_the_sum():
    images, labels = batch()
    teachers = teacher_outputs(1.0, 1.0)
    noise = Noise(1, 1)
    student = simple_cnn("cnn2", generator=generator())
    task = Distillation(student, [], Weights(kd_dropout=0.5, tau=1.0))
    losses, _ = task(images, Targets(labels, teachers), noise)
    terms = torch.stack([kl_per_sample(t.logits, student(images), 1.0) for t in teachers])
    mask = kd_dropout_mask(noise, terms, 0.5)
    assert 0 < mask.mean() < 1
    expected = (terms * mask).sum(0).mean().item()
    assert losses["kl_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_term_that_a_batch_leaves_out_is_not_in_its_loss():
    images, labels = batch()
    teachers = teacher_outputs(1.0, 1.0)
    student = simple_cnn("cnn2", generator=generator())
    task = Distillation(student, [], Weights(kd_drop=1, tau=1.0))
    terms = [kl_per_sample(t.logits, student(images), 1.0).mean().item() for t in teachers]
    left = sorted(sum(terms) - term for term in terms)
    seen = set()
    for step in range(20):
        loss = task(images, Targets(labels, teachers), Noise(1, step))[0]["kl_loss"].item()
        near = [i for i, one in enumerate(left) if loss == pytest.approx(one, rel=1e-5)]
        assert near, f"{loss} is none of {left}"
        seen.add(near[0])
    assert len(seen) == len(left), "some term is never left out"


def test_factor_transfer_trains_the_translator_and_not_the_paraphraser():
    images, labels = batch()
    paraphraser = Paraphraser(5, 3, 1.0, generator()).requires_grad_(False)
    student = simple_cnn("cnn2", generator=generator())
    task = Distillation(student, [5], Weights(kl=0, factor=10.0), paraphraser=paraphraser)
    losses, _ = task(images, Targets(labels, teacher_outputs()), Noise(0, 0))
    losses["factor_loss"].backward()
    assert all(p.grad is not None for p in task.translator.parameters())
    assert student.body[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in paraphraser.parameters())

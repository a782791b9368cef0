"""Classification's losses, recomputed by hand, and their draws."""

import pytest
import torch

from cifd_clip.classification.losses import (
    factor_loss,
    kd_drop_mask,
    kd_dropout_mask,
    kl_per_sample,
)
from cifd_clip.noise import Noise
from classification.small import generator


def test_kl_is_tau_squared_times_the_divergence_of_softened_distributions():
    teacher, student = torch.randn(2, 7, generator=generator()).double()
    tau = 3.0
    p, q = (teacher / tau).exp(), (student / tau).exp()
    p, q = p / p.sum(), q / q.sum()
    expected = tau**2 * (p * (p / q).log()).sum()
    assert kl_per_sample(teacher.float(), student.float(), tau).item() == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_kd_dropout_drops_its_share_for_each_teacher_by_itself():
    kl = torch.ones(3, 20_000)
    mask = kd_dropout_mask(Noise(0, 5), kl, 0.25)
    kept = mask.mean(-1)
    assert torch.all((kept - 0.75).abs() < 0.015), f"kept {kept.tolist()} of three teachers' terms"
    both = (mask[0] * mask[1]).mean().item()
    assert both == pytest.approx(0.75**2, abs=0.02), "teachers are not dropped independently"
    assert torch.equal(mask, kd_dropout_mask(Noise(0, 5), kl, 0.25))
    assert not torch.equal(mask, kd_dropout_mask(Noise(0, 6), kl, 0.25))
    assert kd_dropout_mask(None, kl, 0.25) is None, "nothing is dropped in evaluation"


def test_a_batch_leaves_out_so_many_teachers_each_as_often_on_every_rank():
    kl = torch.ones(4, 8)
    masks = torch.cat([kd_drop_mask(Noise(0, step), kl, 1) for step in range(2000)], 1)
    assert torch.all(masks.sum(0) == 3), "another number than one was left out"
    assert torch.all((masks.mean(1) - 0.75).abs() < 0.04), f"kept {masks.mean(1).tolist()}"
    elsewhere = kd_drop_mask(Noise(0, 5, start=300), kl, 1)
    assert torch.equal(elsewhere, kd_drop_mask(Noise(0, 5), kl, 1)), "ranks leave out others"
    assert kd_drop_mask(None, kl, 1) is None, "nothing is dropped in evaluation"


def test_factors_are_compared_by_direction():
    factors = torch.randn(4, 8, generator=generator())
    assert factor_loss(factors, 3 * factors).item() == pytest.approx(0, abs=1e-7)
    assert factor_loss(factors, -factors) > 0.3

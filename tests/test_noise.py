"""Noise is a pure function of (seed, step, site, row of the global batch)."""

from itertools import pairwise

import pytest
import torch

from cifd_clip import Noise
from cifd_clip.noise import BLOCK_ROWS, derive_seed

CPU = torch.device("cpu")


def test_the_same_place_draws_the_same_noise_whatever_was_drawn_before():
    first = Noise(1, 7).uniform("ibm/image", 20, 5, CPU)
    torch.rand(3)
    Noise(1, 8).uniform("ibm/text", 300, 9, CPU)
    assert torch.equal(first, Noise(1, 7).uniform("ibm/image", 20, 5, CPU))


def test_drawing_leaves_torchs_own_generator_alone():
    before = torch.get_rng_state()
    Noise(1, 7).uniform("ibm/image", 20, 5, CPU)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("ranks", [2, 3, 5, BLOCK_ROWS, 600])
def test_ranks_draw_together_what_one_would_draw_alone(ranks):
    rows = 600
    whole = Noise(0, 3).uniform("rdm/image", rows, 4, CPU)
    edges = [rows * r // ranks for r in range(ranks + 1)]
    parts = [
        Noise(0, 3, start).uniform("rdm/image", stop - start, 4, CPU)
        for start, stop in pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_wide_draw_begins_with_the_narrow_one():
    """No draw is wider: what a GPU would give for one depends on how many processors it has."""
    wide, narrow = (Noise(0, 3).uniform("rdm/image", 5, width, CPU) for width in (2304, 1024))
    assert torch.equal(wide[:, :1024], narrow[:, :1024])
    assert not torch.equal(wide[:, 1024:2048], narrow)


def test_seeds_steps_sites_and_blocks_draw_differently():
    draws = [
        Noise(0, 0).uniform("ibm/image", BLOCK_ROWS, 8, CPU),
        Noise(0, 0).uniform("ibm/text", BLOCK_ROWS, 8, CPU),
        Noise(0, 1).uniform("ibm/image", BLOCK_ROWS, 8, CPU),
        Noise(1, 0).uniform("ibm/image", BLOCK_ROWS, 8, CPU),
        Noise(0, 0, BLOCK_ROWS).uniform("ibm/image", BLOCK_ROWS, 8, CPU),
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(correlation) < 0.15, "two places share their noise"


def test_rows_and_columns_are_independent_and_uniform():
    noise = Noise(0, 0).uniform("ibm/image", 4096, 64, CPU).double()
    assert noise.min() >= -0.5
    assert noise.max() <= 0.5
    n = noise.numel()
    # within six standard errors of the moments of U[-½, ½]
    assert abs(noise.mean()) < 6 * (1 / 12 / n) ** 0.5
    assert abs(noise.square().mean() - 1 / 12) < 6 * (1 / 180 / n) ** 0.5
    assert abs(noise.pow(3).mean()) < 6 * (1 / 448 / n) ** 0.5
    assert abs(noise.pow(4).mean() - 1 / 80) < 6 * (1 / 2304 - 1 / 6400) ** 0.5 / n**0.5
    for sample in (noise[:256], noise.t()):
        off = torch.corrcoef(sample) - torch.eye(len(sample))
        assert off.abs().max() < 6 / sample.shape[1] ** 0.5


def test_seeds_do_not_change_with_machines_or_versions():
    # written down once: a resumed run must draw what the interrupted one would have drawn
    assert derive_seed(0, 1, "ibm/image", 2) == 5654926618003829314
    assert derive_seed("a", "b") != derive_seed("ab")

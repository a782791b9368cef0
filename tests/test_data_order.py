"""The order of training is a pure function of (seed, position)."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from training.data.draws import permutation, seed_of, words
from training.data.order import Order


def sources(counts, source=None, weights=None):
    source = np.zeros(len(counts), dtype=int) if source is None else source
    return SimpleNamespace(counts=counts, source=source, weights=weights)


def test_draws_do_not_change_with_versions():
    # written down once: a run that resumes under another numpy must find the same data
    assert seed_of(0, "view", 3, b"key") == 0xA305C1B5B765D5DC
    assert words(2, 1, "a").tolist() == [1686763383432428407, 17692698202137716115]
    assert permutation(5, 7).tolist() == [3, 2, 0, 4, 1]


def test_each_pass_holds_each_sample_once():
    order = Order(sources([7, 0, 13, 1, 29]), seed=3, window=10)
    for turn in range(3):
        rows = order.rows(50 * turn, 50 * (turn + 1))
        assert sorted(rows[:, 0]) == list(range(50))
        assert set(rows[:, 1]) == {turn}


def test_passes_and_seeds_differ():
    first = Order(sources([20, 20]), seed=0).rows(0, 80)[:, 0]
    other = Order(sources([20, 20]), seed=1).rows(0, 40)[:, 0]
    assert list(first[:40]) != list(first[40:])
    assert list(first[:40]) != list(other)
    assert list(first[:40]) != sorted(first[:40])


@pytest.mark.parametrize("replacement", [False, True])
def test_a_slice_does_not_depend_on_where_reading_began(replacement):
    make = lambda: Order(sources([5, 11, 3, 8]), seed=1, window=8, replacement=replacement)  # noqa: E731
    whole = make().rows(0, 120)
    for start in range(0, 100, 7):
        fresh = make()
        assert (fresh.rows(start, start + 20) == whole[start : start + 20]).all()
        assert (fresh.rows(0, 20) == whole[:20]).all(), "and one may seek back"


def test_a_window_stays_within_few_shards():
    order = Order(sources([10] * 100), seed=0, window=50)
    rows = order.rows(0, 1000)[:, 0].reshape(20, 50)
    assert all(len(set(window // 10)) == 5 for window in rows)
    # ... and is shuffled across them
    assert all(len(set(window[:10] // 10)) > 1 for window in rows)


def test_factors_weigh_the_samples_of_their_source():
    # 100 samples at factor 1, 50 at factor 4: one third, two thirds
    order = Order(sources([60, 40, 50], [0, 0, 1], [1.0, 4.0]), seed=0, window=1000)
    rows = order.rows(0, 30_000)
    counts = np.bincount(rows[:, 0], minlength=150)
    assert abs((rows[:, 0] < 100).mean() - 1 / 3) < 0.01  # 4 standard errors: 0.011
    assert counts[:100].min() > 50 and counts[100:].min() > 300  # expected 100 and 400
    assert len(set(rows[:, 1])) > 29_000, "each draw has a view of its own"


def test_drawing_from_a_source_larger_than_a_window_is_uniform_and_local():
    order = Order(sources([40, 10, 30, 20] * 50), seed=0, window=200, replacement=True)
    rows = order.rows(0, 200 * 500)[:, 0]
    shards = np.searchsorted(order.first_row, rows, side="right") - 1
    assert max(len(set(window)) for window in shards.reshape(500, 200)) <= 8
    sizes = [40, 10, 30, 20]
    shares = [np.isin(shards, range(i, 200, 4)).mean() for i in range(4)]
    # 500 windows of 8 shard picks: standard error below 0.008
    assert np.allclose(shares, [size / 100 for size in sizes], atol=0.03)


def test_seeking_deep_into_eleven_million_samples_costs_one_window():
    order = Order(sources([10_000] * 1100), seed=0)
    tracemalloc.start()
    rows = order.rows(9_000_000, 9_001_024)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.shape == (1024, 2) and rows[:, 0].max() < 11_000_000
    assert peak < 100_000_000, f"seeking took {peak} bytes"

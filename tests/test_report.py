"""Statistics over seeds and tasks: interquartile mean, bootstrap interval, profile."""

import numpy as np
import pytest
from scipy import stats

from algos.launch import report


def test_iqm_by_hand():
    assert report.iqm(np.array([100.0, 1.0, 2.0, 3.0, 4.0, -50.0, 5.0, 6.0])) == 3.5
    assert report.iqm(np.array([1.0, np.nan, 3.0])) == 2.0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 10, 16, 50])
def test_iqm_is_the_trimmed_mean(n):
    x = np.random.default_rng(n).normal(size=n) ** 3
    np.testing.assert_allclose(report.iqm(x), stats.trim_mean(x, 0.25), rtol=1e-12)
    middle = np.sort(x)[n // 4 : n - n // 4]
    np.testing.assert_allclose(report.iqm(x), middle.mean(), rtol=1e-12)


def test_iqm_leaves_dead_seeds_out():
    assert report.iqm(np.array([np.nan, 1.0, 2.0, 3.0, 1000.0])) == 2.5
    assert np.isnan(report.iqm(np.array([np.nan])))
    assert np.isnan(report.iqm_interval(np.array([1.0, np.nan]))).all()


@pytest.mark.parametrize("n", [5, 16])
def test_interval_agrees_with_scipys_bootstrap(n):
    x = np.random.default_rng(n).normal(100.0, 20.0, n)
    lo, hi = report.iqm_interval(x)
    reference = stats.bootstrap(
        (x,),
        lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = reference.high - reference.low
    assert abs(lo - reference.low) < 0.1 * width
    assert abs(hi - reference.high) < 0.1 * width
    assert lo < report.iqm(x) < hi


def test_interval_covers():
    rng = np.random.default_rng(0)
    intervals = [report.iqm_interval(rng.normal(size=16), num_resamples=500) for _ in range(200)]
    inside = np.mean([lo < 0.0 < hi for lo, hi in intervals])
    assert 0.85 < inside < 0.99  # a percentile bootstrap of 16 is a little too narrow


def test_an_interval_of_a_difference_is_a_bootstrap_of_both():
    """Over seeds, which are not paired; a dead one is left out."""
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([11.0, 12.0, 13.0, 14.0, np.nan])
    rng = np.random.default_rng(1)
    middle = lambda v: np.sort(rng.choice(v, (20_000, 4)), 1)[:, 1:3].mean(1)
    lo, hi = np.percentile(middle(y[:4]) - middle(x), [2.5, 97.5])
    middle, interval = report.difference(y, x)
    assert middle == 10.0
    np.testing.assert_allclose(interval, [lo, hi], atol=0.15)
    dead, alone = np.full(4, np.nan), np.array([7.0])
    assert np.isnan([report.difference(dead, x)[0], *report.difference(dead, x)[1]]).all()
    middle, interval = report.difference(alone, x)
    assert middle == 4.5
    assert np.isnan(interval).all()


@pytest.mark.parametrize(
    ("num_seeds", "name"),
    [
        ((5, 10), "95 % interval"),
        ((2, 4), "lowest and highest seed"),
        ((4, 10), "95 % interval; of 4 seeds or fewer their range"),
    ],
)
def test_an_interval_of_few_seeds_is_their_range(num_seeds, name):
    assert report.interval_name(*num_seeds) == name
    low, high = report.iqm_interval(np.arange(float(min(num_seeds))))
    assert ((low, high) == (0.0, min(num_seeds) - 1)) == (min(num_seeds) <= 4)


def test_seeds_are_drawn_anew_within_each_task():
    """By hand: two tasks of two seeds, of whose four draws the IQM is the mean of the middle two.

    The lowest is (0, 0) or (0, 0.2) with (0.4, 0.4): 0.2 or 0.3. The highest is (1, 1) with either:
    0.6. Both ends have 1 chance in 16 or more. If all four seeds were drawn alike, (0, 0, 0, x)
    would come in 5 % of the draws, with an IQM of 0.
    """
    easy, hard = np.array([0.4, 1.0]), np.array([0.0, 0.2])
    lo, hi = report.iqm_interval(hard, easy)
    assert (lo, hi) == pytest.approx((0.2, 0.6))
    assert report.iqm(np.array([hard, easy])) == pytest.approx(0.3)
    lo, _ = report.iqm_interval(np.concatenate([hard, easy]))
    assert lo == pytest.approx(0.0)


def test_interval_over_tasks_leaves_dead_seeds_out():
    x, y = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])
    with_dead = np.append(x, np.nan), np.append(y, np.nan)
    assert report.iqm_interval(*with_dead) == report.iqm_interval(x, y)
    assert np.isnan(report.iqm_interval(x, np.array([1.0]))).all()


def test_profile_by_hand():
    """Task one has scores 0, 0.5, 1 and a dead seed; task two has 0.5, 0.5, 2 and 2."""
    scores = np.array([[0.0, 0.5, 1.0, np.nan], [0.5, 0.5, 2.0, 2.0]])
    share, lo, hi = report.profile(scores, np.array([-1.0, 0.0, 0.5, 1.0, 2.0]))
    above = [(3 / 3, 4 / 4), (2 / 3, 4 / 4), (1 / 3, 2 / 4), (0 / 3, 2 / 4), (0 / 3, 0 / 4)]
    np.testing.assert_allclose(share, np.mean(above, 1))
    # All draws of task two are above 0; of the three of task one none is with chance 1 in 27.
    np.testing.assert_allclose(lo[[0, 1, 4]], [1.0, 0.5, 0.0])
    np.testing.assert_allclose(hi[[0, 1, 4]], [1.0, 1.0, 0.0])
    # Above 1 nothing of task one: half of 0 of 4 (1 in 16) to half of 4 of 4.
    np.testing.assert_allclose((lo[3], hi[3]), (0.0, 0.5))


def test_profile_of_one_seed_has_no_interval():
    share, lo, hi = report.profile(np.array([[0.3]]), np.array([0.2, 0.4]))
    assert share.tolist() == [1.0, 0.0]
    assert np.isnan([lo, hi]).all()


def test_a_curve_is_made_of_the_means_of_seeds():
    returns = np.array([[[0.0, 0.0, 9.0], [1.0, 2.0, 6.0]], [[0.0, 6.0, 9.0], [np.nan] * 3]])
    middle, lo, hi = report.curve_of(returns)  # 2 seeds, 2 evaluations of 3 episodes
    np.testing.assert_allclose(middle, [4.0, 3.0])
    np.testing.assert_allclose(lo, [3.0, np.nan])
    np.testing.assert_allclose(hi, [5.0, np.nan])

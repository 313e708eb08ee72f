"""Statistics over seeds: the interquartile mean and its bootstrap interval."""

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
    intervals = [report.iqm_interval(rng.normal(size=16), 500) for _ in range(200)]
    inside = np.mean([lo < 0.0 < hi for lo, hi in intervals])
    assert 0.85 < inside < 0.99  # a percentile bootstrap of 16 is a little too narrow

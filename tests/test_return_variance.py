"""Variances of what BPO learns from, on numbers by hand and on a small run."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from algos import common, launch
from experiments import return_variance


def test_spread_of_gradients():
    weight = jnp.array([1.0, 3.0])
    score = jnp.array([[1.0, 0.0], [1.0, 2.0]])  # gradients [1, 0] and [3, 6]
    norm, trace = return_variance.gradient_spread(weight, score)
    np.testing.assert_allclose([norm, trace], [13**0.5, 2.0 + 18.0], rtol=1e-6)


def test_variances_are_compared_in_the_same_states():
    spread, of_pi = np.array([2.0, 8.0]), np.array([1.0, 16.0])  # ratios 2 and 1/2
    half = 1.96 * np.log(2.0)  # the standard error of log ratios ln 2 and -ln 2 is ln 2
    found = return_variance.relative(spread, of_pi)
    np.testing.assert_allclose(found, [1.0, np.exp(-half), np.exp(half)])
    for zero, one in itertools.permutations((np.array([0.0, 1.0]), spread)):
        assert return_variance.relative(zero, one) == [None] * 3


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [(1.0, 2.0, 2.0), (1.3, 2.0, 0.0), (1.3, -2.0, -2.6), (0.7, 2.0, 1.4), (0.7, -2.0, 0.0)],
)
def test_a_clipped_surrogate_has_no_gradient(ratio, advantage, weight):
    found = return_variance.gradient_weight(jnp.array(ratio), jnp.array(advantage), 0.2)
    np.testing.assert_allclose(found, weight, rtol=1e-6)


@pytest.mark.xdist_group("ppo")
@pytest.mark.parametrize("env", ["probe/action", "probe/truncation", "probe/action-continuous"])
def test_a_run_is_measured(env, tmp_path, monkeypatch, signals, capsys):
    run_dir, out = tmp_path / "run", tmp_path / "out"
    sizes = ["--num-envs", "4", "--num-steps", "8", "--hidden", "8", "--total-timesteps", "64"]
    flags = ["--env", env, *sizes, "--num-seeds", "1", "--num-evals", "1", "--normalize-reward"]
    launch.main("bpo", [*flags, "--run-dir", str(run_dir)])
    size = ["--starts", "3", "--repeats", "4", "--num-steps", "5"]
    with pytest.raises(SystemExit):
        return_variance.main(["--num-steps", "64", "--out", str(out)])
    assert "--num-steps has no effect without --run-dir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        return_variance.main(["--run-dir", str(run_dir), "--row", "1", "--out", str(out)])
    assert "--row 1: the run has rows 0 to 0" in capsys.readouterr().err
    for flag in ("--repeats", "--starts"):  # no variance
        with pytest.raises(SystemExit):
            return_variance.main(["--run-dir", str(run_dir), flag, "1", "--out", str(out)])
        assert "--starts and --repeats must be at least 2" in capsys.readouterr().err
    means = lambda *spreads: [float(np.mean(x)) for x in (*spreads, 0.0)]
    monkeypatch.setattr(return_variance, "relative", means)
    return_variance.main(["--run-dir", str(run_dir), *size, "--out", str(out)])
    with pytest.raises(SystemExit):
        return_variance.main(["--run-dir", str(run_dir), *size, "--out", str(out)])
    assert "out.md exists: choose another name, or --force" in capsys.readouterr().err
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    found = {(row["acting"], row["estimate"]): row for row in rows}
    discrete = env != "probe/action-continuous"
    assert len(found) == len(rows) == (4 if discrete else 2) * 5
    assert all(np.isfinite(row["variance"]) for row in rows)
    for (acting, estimate), row in found.items():
        if acting != "pi":  # compared with pi, its own variance first
            known = [row["variance"], found["pi", estimate]["variance"]]
            np.testing.assert_allclose(row["relative"][:2], known, rtol=1e-6)
    # on policy both are the discounted sum of rewards and the last value
    one, other = (found["pi", x] for x in ("PDIS", "V-trace, no clipping, lambda 1"))
    np.testing.assert_allclose(one["mean"], other["mean"], rtol=1e-4)
    clipped, free = found["pi", "gradient as trained"], found["pi", "gradient"]
    np.testing.assert_allclose(clipped["variance"], free["variance"], rtol=1e-5)  # its ratio is 1
    if env == "probe/action":
        # pi is nearly uniform and V nearly 0: both actions give the same gradient
        assert free["variance"] < 0.1 * free["mean"] ** 2
        squares = lambda reward, *_: (jnp.zeros_like(reward), reward**2)
        monkeypatch.setattr(return_variance.bpo, "step_estimator", squares)
        monkeypatch.setattr(common.RewardScale, "factor", lambda self: 0.25)
        return_variance.main(["--run-dir", str(run_dir), *size, "--force", "--out", str(out)])
        rows = json.loads(out.with_suffix(".json").read_text())["rows"]
        gradients = [row["mean"] for row in rows if row["estimate"] == "gradient"]
        assert gradients == [0.0] * 4  # of the advantage, not of the target
        targets = [row["mean"] for row in rows if row["estimate"] == "value target as trained"]
        assert targets == [0.25**2] * 4  # rewards are 1 and -1, before they are scaled

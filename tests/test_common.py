"""Distributions, running statistics, episode metrics, swept fields."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from algos import common

# --- distributions ---


def test_categorical():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) * 3
    action = np.array([0, 2, 1, 2])
    policy = common.Categorical(jnp.asarray(logits))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        policy.log_prob(action), np.log(probs[np.arange(4), action]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(policy.entropy(), stats.entropy(probs, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(policy.mode(), probs.argmax(-1))
    noise = jax.random.gumbel(jax.random.key(0), (20_000, 4, 3))
    frequency = jax.nn.one_hot(policy.sample(noise), 3).mean(0)
    np.testing.assert_allclose(frequency, probs, atol=0.015)


def test_gaussian():
    rng = np.random.default_rng(0)
    mean, log_std, action, noise = rng.normal(size=(4, 5, 2)).astype(np.float32)
    policy = common.Gaussian(jnp.asarray(mean), jnp.asarray(log_std))
    reference = stats.norm(mean, np.exp(log_std))
    np.testing.assert_allclose(policy.log_prob(action), reference.logpdf(action).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(policy.entropy(), reference.entropy().sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(policy.mode(), mean)
    np.testing.assert_allclose(policy.sample(noise), mean + np.exp(log_std) * noise, rtol=1e-5)


# --- running statistics ---


@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_statistics_are_those_of_everything_seen(offset):
    rng = np.random.default_rng(0)
    batches = [
        rng.normal(offset + i, 1.0 + i, (*shape, 2)).astype(np.float32)
        for i, shape in enumerate([(1,), (5,), (3, 4)])
    ]
    seen = common.Stats.empty((2,))
    for n, batch in enumerate(batches, 1):
        seen = seen.add(jnp.asarray(batch))
        rows = np.concatenate([b.reshape(-1, 2) for b in batches[:n]]).astype(np.float64)
        np.testing.assert_allclose(seen.mean, rows.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(seen.var, rows.var(0), rtol=1e-3, atol=1e-3)
        assert seen.count == len(rows)


def test_statistics_of_scalars_and_integers():
    seen = common.Stats.empty(()).add(jnp.arange(6, dtype=jnp.uint8).reshape(2, 3))
    np.testing.assert_allclose([seen.mean, seen.var], [2.5, np.arange(6).var()], rtol=1e-6)


def test_normalizing_standardises_and_clips():
    rows = jnp.asarray(np.random.default_rng(0).normal(5.0, 2.0, (1000, 3)))
    seen = common.Stats.empty((3,)).add(rows)
    x = seen.normalize(rows)
    np.testing.assert_allclose(x.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(x.std(0), 1.0, atol=1e-4)
    np.testing.assert_allclose(seen.normalize(jnp.array([1e9, -1e9, 5.0]))[:2], [10, -10])


def test_normalizing_changes_nothing_before_any_data():
    x = jnp.array([-3.0, 0.5, 9.0])
    np.testing.assert_allclose(common.Stats.empty((3,)).normalize(x), x, rtol=1e-6)


def test_constant_features_stay_near_zero():
    rows = jnp.full((64, 1), 0.3)
    seen = common.Stats.empty((1,)).add(rows).add(rows)
    assert jnp.abs(seen.normalize(rows)).max() < 1e-2


def test_reward_scale_is_the_deviation_of_the_running_discounted_return():
    reward = jnp.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    done = jnp.array([[False, True], [False, False], [True, False]])
    scale = common.RewardScale.empty(2)
    np.testing.assert_allclose(scale.factor(), 1.0, rtol=1e-6)
    scale = scale.add(reward, done, 0.5)
    first = [[1.0, 1.0], [2.5, 2.0], [5.25, 5.0]]
    np.testing.assert_allclose(scale.running_return, [0.0, 5.0])
    np.testing.assert_allclose(scale.factor(), 1 / np.std(first), rtol=1e-5)
    scale = scale.add(reward, done, 0.5)
    second = [[1.0, 3.5], [2.5, 2.0], [5.25, 5.0]]
    np.testing.assert_allclose(scale.factor(), 1 / np.std([first, second]), rtol=1e-5)


def test_a_silent_start_does_not_blow_rewards_up():
    silent = jnp.zeros((8, 2))
    scale = common.RewardScale.empty(2).add(silent, silent > 0, 0.99)
    np.testing.assert_allclose(scale.factor(), 10.0)


# --- metrics ---


def test_episode_metrics_count_episodes_not_steps():
    info = {
        "returned": jnp.array([[False, True], [True, False], [False, True]]),
        "episode_return": jnp.array([[1.0, 5.0], [2.0, 100.0], [100.0, 7.0]]),
        "episode_length": jnp.array([[1, 3], [2, 50], [50, 4]]),
        "env_nan": jnp.array([[False, True], [False, False], [False, True]]),
    }
    metrics = common.run_metrics(info, jnp.zeros(1))
    values = {k: float(v) for k, v in metrics.items()}
    assert values == {
        "episodes/count": 3,
        "episodes/return": 14,
        "episodes/length": 9,
        "health/env_nan": 2,
        "health/finite": 1,
    }


def test_episode_metrics_of_no_episode_are_zero_even_if_a_return_is_not_finite():
    info = {
        "returned": jnp.zeros((2, 1), bool),
        "episode_return": jnp.full((2, 1), jnp.nan),
        "episode_length": jnp.ones((2, 1), int),
        "env_nan": jnp.zeros((2, 1), bool),
    }
    assert all(v == 0 for v in common.run_metrics(info, jnp.full(1, jnp.nan)).values())


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_all_finite(bad):
    tree = {"a": jnp.ones(3), "n": jnp.arange(2), "k": jax.random.key(0)}
    assert common.all_finite(tree)
    assert not common.all_finite(tree | {"b": jnp.array([[0.0, bad]])})


def test_swept_fields_are_replaced_and_others_refused():
    @dataclasses.dataclass(frozen=True)
    class Config:
        gamma: float = 0.9
        num_envs: int = 4

    gamma = jnp.float32(0.5)
    config = common.with_hparams(Config(), {"gamma": gamma}, ("gamma",))
    assert config.gamma is gamma
    with pytest.raises(ValueError, match="cannot sweep over 'num_envs': choose from gamma"):
        common.with_hparams(Config(), {"num_envs": gamma}, ("gamma",))

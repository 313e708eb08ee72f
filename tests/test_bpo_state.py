"""BPO: what an update takes over from earlier ones, what it shuffles and what it bounds."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import tiny
from test_bpo_update import CONTINUOUS, FOREVER, SMALL, shifted
from tiny import assert_allclose, assert_close

from algos import common


def of(config, pick, change=lambda state: state):
    """`pick` of (state, metrics) after one update of a state that `change` has prepared."""
    algo = tiny.build("bpo", config)
    # XLA drops what is not picked, so this compiles fast.
    return jax.jit(lambda key: pick(algo.update(change(algo.init(key)))))(jax.random.key(0))


def test_bounds_remember_earlier_rollouts():
    change = lambda state: state._replace(reward_range=jnp.array([-7.0, 3.0]))
    assert_allclose(of(FOREVER, lambda x: x[0].reward_range, change), [-7.0, 3.0])
    change = lambda state: state._replace(r_hat_max=jnp.float32(1e6))
    assert of(replace(FOREVER, learning_rate=0.0), lambda x: x[0].r_hat_max, change) == 1e6


def test_rewards_are_scaled_by_whole_episodes():
    """A time limit ends the return whose variance is taken."""
    scale, replay = of(FOREVER, lambda x: (x[0].reward_scale, x[0].replay))
    rows = jax.tree.map(lambda x: x[:16], replay)
    assert rows.done.any()
    assert_close(scale, common.RewardScale.empty(4).add(rows.reward, rows.done, FOREVER.gamma))


def test_observations_are_counted_where_an_action_was_taken():
    stats, replay = of(SMALL, lambda x: (x[0].obs_stats, x[0].replay))
    assert_close(stats, common.Stats.empty((4,)).add(replay.obs[:8]))


def test_what_learns_from_replay_is_shuffled_too(monkeypatch):
    """The rollout of 32 steps, and the 64 steps of the replay buffer."""
    sizes, permutation = [], jax.random.permutation
    spy = lambda key, n: sizes.append(n) or permutation(key, n)
    monkeypatch.setattr(jax.random, "permutation", spy)
    algo = tiny.build("bpo", SMALL)
    jax.eval_shape(algo.update, jax.eval_shape(algo.init, jax.random.key(0)))
    assert {*sizes} == {32, 64}


def test_the_ratio_of_the_targets_is_bounded():
    far = of(
        replace(SMALL, learning_rate=0.0), lambda x: x[1]["health/kl_mu_pi"], shifted("actor", 30.0)
    )
    assert far < 19.1


def test_the_target_networks_do_not_bootstrap_in_symlog_space():
    """Of continuous actions: moved far away, they leave no target at its bound."""
    config = replace(CONTINUOUS, symlog_targets=True, learning_rate=0.0)
    change = lambda state: state._replace(
        target_params=jax.tree.map(lambda x: x + 50.0, state.target_params)
    )
    assert of(config, lambda x: x[1]["health/q_target_clip_fraction"], change) == 0.0

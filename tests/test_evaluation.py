"""Greedy evaluation: first episodes only, rows apart, in slices."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

import envs
from algos.launch import evaluation, rows

ENV = envs.make("cartpole", 6, stagger=False, max_steps=30)


def push(policy, obs, key, greedy):
    """Push against the pole's fall, or with it if `policy` is -1."""
    assert greedy
    return (policy * (obs[:, 2] + 0.3 * obs[:, 3]) > 0).astype(jnp.int32)


def test_the_first_episode_of_each_environment_counts():
    """Environments of the second row fall early, and start again while others still balance."""
    policies, keys = jnp.array([1.0, -1.0]), jax.random.split(jax.random.key(3), 2)
    play = jax.jit(lambda policies, keys: evaluation.evaluate(push, policies, ENV, keys))
    returns, lengths = play(policies, keys)
    step = jax.jit(ENV.step)
    for row, key in enumerate(keys):
        key_reset, key = jax.random.split(key)
        obs, state = jax.jit(ENV.reset)(key_reset)
        expected, alive = np.zeros(6), np.ones(6, bool)
        while alive.any():
            key, key_act, key_step = jax.random.split(key, 3)
            action = push(policies[row], obs, key_act, True)
            obs, state, reward, terminated, truncated, _ = step(key_step, state, action)
            expected += alive * np.asarray(reward)
            alive &= ~np.asarray(terminated | truncated)
        np.testing.assert_array_equal(returns[row], expected)  # cartpole pays 1 for each step
        np.testing.assert_array_equal(lengths[row], expected)
    assert len(set(lengths[1].tolist())) > 1
    assert lengths[1].max() * 2 < lengths[0].max()  # these played a second episode


def test_slices_change_nothing():
    policies, keys = jnp.array([1.0, -1.0]), jax.random.split(jax.random.key(3), 2)
    advance = jax.jit(lambda play, n: evaluation.advance(push, policies, ENV, play, n))
    whole = advance(evaluation.begin(ENV, keys), 100)
    play = evaluation.begin(ENV, keys)
    while play.alive.any():
        before, play = play, advance(play, 7)
    assert before.alive.any()
    np.testing.assert_array_equal(play.returns, whole.returns)
    np.testing.assert_array_equal(play.lengths, whole.lengths)


def test_every_seed_evaluation_and_part_has_its_own_start_states():
    three = rows.Rows(np.array([3, 4, 3]), {}, ["", "", "gamma=0.5"])
    keys = [rows.evaluation_keys(three, *x) for x in ((0, 0), (1, 0), (1, 1))]
    starts = np.stack([evaluation.begin(ENV, x).obs for x in keys])  # [evaluations, R, K, 4]
    np.testing.assert_array_equal(starts[:, 0], starts[:, 2])  # the same seed, another swept value
    different = starts[:, :2].reshape(6, -1)
    assert len(np.unique(different, axis=0)) == 6
    assert len(np.unique(starts[0, 0], axis=0)) == 6


def test_a_seed_alone_starts_as_it_does_in_a_launch():
    alone = rows.evaluation_keys(rows.Rows(np.array([4]), {}, [""]), 2, 1)
    beside = rows.evaluation_keys(rows.Rows(np.array([3, 4]), {}, ["", ""]), 2, 1)
    np.testing.assert_array_equal(
        evaluation.begin(ENV, alone).obs[0], evaluation.begin(ENV, beside).obs[1]
    )


def generous():
    """`counter` that pays 3 a step."""
    raw = tiny.counter(discrete=True)

    def step(*args):
        obs, state, reward, *rest = raw.step(*args)
        return obs, state, 3.0 * reward, *rest

    return raw._replace(step=step)


def test_evaluations_are_returns_of_whole_episodes():
    """Of the launcher's program: 4 steps of reward 3; none begins in the middle."""
    config = tiny.config_of("ppo", env="test_evaluation:generous")
    program, keys, hparams = tiny.program_of("ppo", config)
    plays = program.begin(rows.evaluation_keys(rows.Rows(np.arange(2), {}, ["", ""]), 0))
    play = program.play(program.init(keys, hparams), plays, jnp.int32(100))[""]
    np.testing.assert_array_equal(play.returns, np.full((2, 2), 12.0))
    np.testing.assert_array_equal(play.lengths, np.full((2, 2), 4))


def fragile():
    """`counter`, in which every other episode breaks at its first step."""
    raw = tiny.counter(discrete=True)

    def step(key, state, action):
        t, breaks = state
        obs, t, *rest, info = raw.step(key, t, action)
        return obs, (t, breaks), *rest, info | {"env_nan": breaks & (t == 1)}

    def reset(key):
        obs, t = raw.reset(key)
        return obs, (t, jax.random.bernoulli(key))

    return raw._replace(reset=reset, step=step)


def test_broken_steps_are_those_of_first_episodes():
    """What broke at once starts again, and breaks again, while the others play their 4 steps."""
    env = envs.make("test_evaluation:fragile", 20, stagger=False)
    act = lambda policy, obs, key, greedy: jnp.zeros(20, jnp.int32)
    play = evaluation.begin(env, jax.random.split(jax.random.key(0), 2))
    play = jax.jit(lambda play: evaluation.advance(act, jnp.zeros(2), env, play, 100))(play)
    broke = np.asarray(play.lengths == 1).sum(1)
    assert set(np.unique(play.lengths)) == {1, 4}
    np.testing.assert_array_equal(play.broken, broke)

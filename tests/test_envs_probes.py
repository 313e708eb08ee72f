"""Probe environments: the numbers their docstrings promise, by rolling out a given policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs

GAMMA = 0.9


def rollout(name, policy, num_steps=8, num_envs=16):
    """Trajectory [T, N] of policy(obs, t) -> action from unstaggered starts."""
    env = envs.make(name, num_envs, stagger=False)

    @jax.jit
    def run(key):
        key_reset, key_steps = jax.random.split(key)

        def step(carry, key):
            obs, state = carry
            action = jax.vmap(policy)(obs)
            action = action.astype(jnp.int32) if env.discrete else action.reshape(num_envs, 1)
            next_obs, state, reward, terminated, truncated, info = env.step(key, state, action)
            return (next_obs, state), (
                obs, reward, terminated, truncated, info["final_observation"]
            )  # fmt: skip

        carry = env.reset(key_reset)
        return jax.lax.scan(step, carry, jax.random.split(key_steps, num_steps))[1]

    return [np.asarray(x) for x in run(jax.random.key(0))]


def returns(reward, terminated, truncated):
    """Discounted return of the first episode of each environment, which must end by itself."""
    total, discount = np.zeros(reward.shape[1]), np.ones(reward.shape[1])
    for r, done in zip(reward, terminated | truncated, strict=True):
        total, discount = total + discount * r, discount * GAMMA * ~done
    return total


CASES = [  # name, policy, value at the start given its observation
    ("value", lambda obs: obs[0] * 0, lambda obs: 1.0),
    ("value-continuous", lambda obs: obs[0] * 0, lambda obs: 1.0),
    ("observation", lambda obs: obs[0] * 0, lambda obs: obs[0]),
    ("discount", lambda obs: obs[0] * 0, lambda obs: GAMMA),
    ("action", lambda obs: obs[0] * 0 + 1, lambda obs: 1.0),
    ("action", lambda obs: obs[0] * 0, lambda obs: -1.0),
    ("action-continuous", lambda obs: obs[0] * 0 + 0.5, lambda obs: 0.0),
    ("action-continuous", lambda obs: obs[0] * 0 - 0.5, lambda obs: -1.0),
    ("action-continuous", lambda obs: obs[0] * 0 + 3.0, lambda obs: -0.25),  # clipped to 1
    ("both", lambda obs: obs[0] > 0, lambda obs: 1.0),
    ("both", lambda obs: obs[0] < 0, lambda obs: -1.0),
    ("both-continuous", lambda obs: obs[0] / 2, lambda obs: 0.0),
    ("both-continuous", lambda obs: -obs[0] / 2, lambda obs: -1.0),
    ("termination", lambda obs: obs[0] * 0, lambda obs: (1 - GAMMA**8) / (1 - GAMMA)),
    ("termination-continuous", lambda obs: obs[0] * 0, lambda obs: (1 - GAMMA**8) / (1 - GAMMA)),
    ("rare", lambda obs: obs[0] * 0 + 1, lambda obs: 1.0),
    ("rare", lambda obs: obs[0] * 0, lambda obs: 0.0),
]


@pytest.mark.parametrize(
    ("name", "policy", "value"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_value_is_the_promised_one(name, policy, value):
    obs, reward, terminated, truncated, _ = rollout(f"probe/{name}", policy)
    assert not truncated.any()
    expected = [value(start) for start in obs[0]]
    np.testing.assert_allclose(returns(reward, terminated, truncated), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["observation", "both", "both-continuous"])
def test_signs_are_both_drawn(name):
    obs = rollout(f"probe/{name}", lambda obs: obs[0] * 0)[0]
    assert set(np.unique(obs)) == {-1.0, 1.0}


@pytest.mark.parametrize("name", ["truncation", "truncation-continuous"])
def test_truncation_hides_the_time_and_never_terminates(name):
    obs, reward, terminated, truncated, final = rollout(
        f"probe/{name}", lambda obs: obs[0] * 0, num_steps=16
    )
    assert (obs == 1).all()
    assert (final == 1).all()
    assert (reward == 1).all()
    assert not terminated.any()
    assert truncated.any(axis=1).tolist() == 2 * (7 * [False] + [True])


def test_termination_shows_the_time():
    obs, _, terminated, truncated, _ = rollout("probe/termination", lambda obs: obs[0] * 0, 16)
    assert (obs[:, 0].argmax(-1) == np.tile(np.arange(8), 2)).all()
    assert terminated.any(axis=1).tolist() == 2 * (7 * [False] + [True])
    assert not truncated.any()


def test_discount_tells_its_two_states_apart():
    obs = rollout("probe/discount", lambda obs: obs[0] * 0)[0]
    assert (obs[:, 0, 0] == np.tile([0.0, 1.0], 4)).all()

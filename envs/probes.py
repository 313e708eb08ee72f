"""Tiny environments whose values are known by hand: each says which part of an algorithm is broken.

`gamma` below is the algorithm's discount. A "-continuous" twin has one action in [-1, 1] in place
of two actions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from envs.wrappers import RawEnv

# Long enough that the clock never ends an episode that ends by itself, unless it is staggered.
LONG = 100


class ProbeState(NamedTuple):
    """Observation of the present state, and steps since the start of the episode."""

    obs: jax.Array  # [obs_size] float32
    t: jax.Array  # int32


def make(task: str) -> RawEnv:
    """Build the probe of this name."""
    base = task.removesuffix("-continuous")
    return PROBES[base](discrete=base == task)


def _value(discrete):
    """One step, reward 1 whatever is done: V = 1."""
    return _probe(discrete, lambda state, action: (1.0, True, state.obs))


def _observation(discrete):
    """One step, reward equal to the observation, +1 or -1 with equal chance: V(s) = s."""
    return _probe(discrete, lambda state, action: (state.obs[0], True, state.obs), start=_sign)


def _discount(discrete):
    """Two steps, observations 0 then 1, reward 1 at the end only: V(0) = gamma, V(1) = 1."""
    return _probe(
        discrete,
        lambda state, action: (state.t == 1, state.t == 1, jnp.ones(1)),
        start=lambda key: jnp.zeros(1),
    )


def _action(discrete):
    """One step, reward from the action. Two actions: +1 for 1, -1 for 0; the best V = 1.

    Continuous: reward -(a - 0.5)^2; the best action is 0.5, with V = 0.
    """
    if discrete:
        return _probe(True, lambda state, action: (2.0 * action - 1.0, True, state.obs))
    return _probe(False, lambda state, action: (-((action[0] - 0.5) ** 2), True, state.obs))


def _both(discrete):
    """One step, observation +1 or -1. Two actions: +1 for `action == (obs > 0)`, else -1; the best
    V = 1.

    Continuous: reward -(a - obs / 2)^2; the best action is obs / 2, with V = 0.
    """
    if discrete:
        reward = lambda obs, action: jnp.where(action == (obs > 0), 1.0, -1.0)
    else:
        reward = lambda obs, action: -((action[0] - obs / 2) ** 2)
    return _probe(
        discrete,
        lambda state, action: (reward(state.obs[0], action), True, state.obs),
        start=_sign,
    )


def _truncation(discrete):
    """Reward 1 for ever, stopped by a time limit of 8 that the constant observation does not show.

    V = 1 / (1 - gamma), 10 for gamma 0.9. An algorithm that treats truncation as
    termination learns less than half of it.
    """
    return _probe(discrete, lambda state, action: (1.0, False, state.obs), max_steps=8)


def _termination(discrete):
    """Reward 1, terminates after 8 steps; the observation is the step, one-hot [8].

    V(s_t) = (1 - gamma^(8 - t)) / (1 - gamma): termination taken for truncation gives 1 / (1 -
    gamma) in its place.
    """
    return _probe(
        discrete,
        lambda state, action: (1.0, state.t == 7, jax.nn.one_hot(state.t + 1, 8)),
        obs_size=8,
        start=lambda key: jax.nn.one_hot(0, 8),
    )


def _rare(discrete):
    """One step, two actions, reward 1 for action 1 and 0 for action 0: V under a policy is pi(1).

    Meant for tests that start from, or sample with, an old policy of known small pi(1): action 1
    then has advantage 1 - pi(1) and ratios far from 1, so that a wrong sign, clip or weight shows.
    """
    return _probe(discrete, lambda state, action: (1.0 * action, True, state.obs))


PROBES = {
    "value": _value,
    "observation": _observation,
    "discount": _discount,
    "action": _action,
    "both": _both,
    "truncation": _truncation,
    "termination": _termination,
    "rare": _rare,
}


def _sign(key):
    return 2.0 * jax.random.bernoulli(key, shape=(1,)) - 1.0


def _probe(discrete, transition, obs_size=1, start=lambda key: jnp.ones(1), max_steps=LONG):
    """Probe of transition(state, action) -> reward, terminated, next_obs; start(key) -> obs."""

    def reset(key):
        obs = start(key).astype(jnp.float32)
        return obs, ProbeState(obs, jnp.int32(0))

    def step(key, state, action):
        reward, terminated, obs = transition(state, action)
        obs = jnp.asarray(obs, jnp.float32)
        state = ProbeState(obs, state.t + 1)
        return obs, state, jnp.asarray(reward, jnp.float32), jnp.asarray(terminated), {}

    return RawEnv(
        reset=reset,
        step=step,
        obs_size=obs_size,
        obs_shape=(obs_size,),
        action_size=2 if discrete else 1,
        discrete=discrete,
        max_steps=max_steps,
        reset_mode="fresh",
    )

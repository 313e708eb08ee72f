"""Greedy evaluation: every row plays the first episode of environments of its own.

Rows lie inside one loop: a `vmap` over the loop itself would trace the physics several times. The
loop runs for a number of steps and can go on later, so that a signal can stop it in between.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import envs


class Play(NamedTuple):
    """An evaluation in progress: R rows with the K environments of `env` each."""

    key: jax.Array  # [R]
    obs: jax.Array  # [R, K, obs_size]
    env_state: Any
    alive: jax.Array  # [R, K] the first episode has not ended
    returns: jax.Array  # [R, K] of the first episode, 0 until it ends
    lengths: jax.Array  # [R, K]
    broken: jax.Array  # [R] steps of first episodes in which the physics broke


def begin(env: envs.Env, keys: jax.Array) -> Play:
    """Start states of every row, drawn from its key; keys [R]."""
    keys = jax.vmap(jax.random.split)(keys)
    obs, env_state = jax.vmap(env.reset)(keys[:, 0])
    shape = obs.shape[:2]
    return Play(
        key=keys[:, 1],
        obs=obs,
        env_state=env_state,
        alive=jnp.ones(shape, bool),
        returns=jnp.zeros(shape),
        lengths=jnp.zeros(shape, jnp.int32),
        broken=jnp.zeros(len(obs), jnp.int32),
    )


def advance(act: Callable, policies: Any, env: envs.Env, play: Play, num_steps) -> Play:
    """Go on for `num_steps` steps, or until every first episode has ended; policies [R, ...].

    Policies and their observation statistics do not change.
    """

    def step(carry):
        t, play = carry
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(play.key)
        act_row = lambda policy, obs, key: act(policy, obs, key, True)
        action = jax.vmap(act_row)(policies, play.obs, keys[:, 1])
        obs, env_state, *_, info = jax.vmap(env.step)(keys[:, 2], play.env_state, action)
        ended = play.alive & info["returned"]
        return t + 1, Play(
            key=keys[:, 0],
            obs=obs,
            env_state=env_state,
            alive=play.alive & ~info["returned"],
            returns=jnp.where(ended, info["episode_return"], play.returns),
            lengths=jnp.where(ended, info["episode_length"], play.lengths),
            broken=play.broken + (play.alive & info["env_nan"]).sum(1),
        )

    unfinished = lambda carry: (carry[0] < num_steps) & carry[1].alive.any()
    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), play))[1]


def evaluate(act: Callable, policies: Any, env: envs.Env, keys: jax.Array):
    """Returns and lengths [R, K] of the first episodes; policies [R, ...], keys [R]."""
    play = advance(act, policies, env, begin(env, keys), jnp.iinfo(jnp.int32).max)
    return play.returns, play.lengths

"""Device-side helpers that hold no algorithmic idea and must be identical in every file.

Pure functions of arrays: running statistics, a ring of rows, greedy evaluation, episode metrics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import envs


class Algo(NamedTuple):
    """An algorithm as pure functions; what `build(config)` of every file returns.

    The train state has a field `update`: int32, the number of finished updates. It is the same for
    all seeds and stays unbatched under `vmap`, so schedules and ring positions cost no select.
    """

    init: Callable  # key -> state
    update: Callable  # state -> state, metrics: dict of scalars
    act: Callable  # policy, obs [N, obs_size], key, greedy: bool -> action [N] or [N, action_size]
    policy_of: Callable  # state -> policy: actor parameters plus observation statistics


def traceable(hparams: dict[str, Any], allowed: tuple[str, ...]) -> dict[str, Any]:
    """`hparams` itself, if each names a field that may be an array, as a vmapped sweep needs.

    Raises ValueError naming the field otherwise.
    """
    for name in hparams:
        if name not in allowed:
            raise ValueError(f"cannot sweep over {name!r}: choose from {', '.join(allowed)}")
    return hparams


# --- running statistics ---


class Stats(NamedTuple):
    """Mean and variance of all rows seen so far; `count` rows."""

    mean: jax.Array  # [...]
    var: jax.Array  # [...]
    count: jax.Array  # []  # type: ignore[assignment]  (hides tuple.count)


def init_stats(shape: tuple[int, ...]) -> Stats:
    """Statistics of nothing: mean 0, variance 1, so that normalising is the identity at first."""
    return Stats(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(()))


def update_stats(stats: Stats, rows: jax.Array) -> Stats:
    """Add `rows` [..., *shape of the statistics] (Chan et al. 1979, parallel variance)."""
    rows = rows.astype(jnp.float32).reshape((-1, *stats.mean.shape))
    n = rows.shape[0]
    count = stats.count + n
    delta = rows.mean(0) - stats.mean
    mean = stats.mean + delta * n / count
    sum_squares = stats.var * stats.count + rows.var(0) * n + delta**2 * stats.count * n / count
    return Stats(mean, sum_squares / count, count)


def normalize(stats: Stats, x: jax.Array) -> jax.Array:
    """Standardise `x` and clip to [-10, 10]; features that never vary stay near 0."""
    return jnp.clip((x - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


# --- replay ---


def ring_write(ring: Any, rows: Any, index: jax.Array) -> Any:
    """Write `rows` [n, ...] at row `index % capacity` of `ring` [capacity, ...], trees alike.

    `capacity` must be a multiple of n and `index` too, so that a write never wraps.
    """

    def write(buffer, new):
        start = index % buffer.shape[0]
        return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), start, 0)

    return jax.tree.map(write, ring, rows)


# --- evaluation and metrics ---


def evaluate(act: Callable, policy: Any, env: envs.Env, key: jax.Array):
    """Play one greedy episode in each environment of `env`.

    Returns the returns [N] and lengths [N]; only what happens before an environment's first `done`
    counts. Nothing of the policy, its statistics included, changes.
    """
    key_reset, key = jax.random.split(key)
    obs, env_state = env.reset(key_reset)

    def step(carry):
        key, obs, env_state, alive, returns, lengths = carry
        key, key_act, key_step = jax.random.split(key, 3)
        action = act(policy, obs, key_act, True)
        obs, env_state, _, _, _, info = env.step(key_step, env_state, action)
        ended = alive & info["returned"]
        returns = jnp.where(ended, info["episode_return"], returns)
        lengths = jnp.where(ended, info["episode_length"], lengths)
        return key, obs, env_state, alive & ~info["returned"], returns, lengths

    n = env.num_envs
    carry = key, obs, env_state, jnp.ones(n, bool), jnp.zeros(n), jnp.zeros(n, jnp.int32)
    *_, returns, lengths = jax.lax.while_loop(lambda carry: carry[3].any(), step, carry)
    return returns, lengths


def episode_metrics(info: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums over the episodes that ended in a rollout; `info` holds arrays [T, N].

    Sums and a count, not means: a rollout in which no episode ended must not count as a zero.
    The launcher divides, and leaves the metric out where the count is 0.
    """
    ended = info["returned"]
    return {
        "episodes/count": ended.sum(),
        "episodes/return": jnp.where(ended, info["episode_return"], 0.0).sum(),
        "episodes/length": jnp.where(ended, info["episode_length"], 0).sum(),
        "health/env_nan": info["env_nan"].sum(),
    }


def all_finite(tree: Any) -> jax.Array:
    """True if every floating-point leaf of `tree` is finite everywhere."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()

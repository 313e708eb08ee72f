"""Shared by all algorithms; nothing here holds an algorithmic idea.

Checks of a configuration, distributions, running statistics, episode metrics.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
from annotated_types import Interval
from pydantic import ConfigDict, TypeAdapter, ValidationError


class Algo(NamedTuple):
    """An algorithm as pure functions; what `build(config, env)` of every file returns.

    The train state has a field `update`: int32, the number of finished updates. It is the same for
    all seeds and is not batched by `vmap`, so that loops and branches which depend on it are not
    batched either.

    An offline algorithm learns from data that exist before it starts. `data` reads them: arrays
    that all seeds share, and arrays with one row for each seed. They are arguments of the compiled
    program, not constants in it.
    """

    init: Callable  # key -> state
    update: Callable  # state, *shared, *own -> state, metrics: dict of scalars
    act: Callable  # policy, obs [N, obs_size], key, greedy: bool -> action [N] or [N, action_size]
    policy_of: Callable  # state -> policy: what `act` needs, such as parameters and statistics
    data: Callable = lambda seeds: ((), ())  # seeds [R] -> shared arrays, own arrays [R, ...]
    further: Mapping[str, Callable] = {}  # name -> function like `act`, evaluated and reported too


# --- configurations ---

UnitFloat = Annotated[float, Interval(ge=0, le=1)]  # a number in [0, 1]
SMALLEST, LARGEST = (float(getattr(jnp.finfo(jnp.float32), x)) for x in ("tiny", "max"))


def check(config: Any) -> None:
    """Check every field of a `Config` against its annotation, then call `config.validate()`.

    Raises ValueError in one line that names the field, its value and what is allowed.
    """
    for name, annotation in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        try:
            adapter = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"].removeprefix("Input ")
            raise ValueError(f"{name}={value!r}: it {wanted}") from None
        for x in value if isinstance(value, tuple) else (value,):
            # the program counts in int32; total_timesteps and seed have limits of their own
            if isinstance(x, int) and abs(x) >= 2**31 and name not in ("total_timesteps", "seed"):
                raise ValueError(f"{name}={x}: it should be less than 2**31 in size")
            if isinstance(x, float) and x and not SMALLEST <= abs(x) <= LARGEST:
                raise ValueError(f"{name}={x:g}: float32 has no such number")
    config.validate()


def with_hparams(config: Any, hparams: Mapping[str, Any], traceable: tuple[str, ...]) -> Any:
    """`config` with fields replaced by arrays, as a vmapped sweep needs.

    Raises ValueError naming the first field that is not in `traceable`.
    """
    for name in hparams:
        if name not in traceable:
            raise ValueError(f"cannot sweep over {name!r}: choose from {', '.join(traceable)}")
    return dataclasses.replace(config, **hparams)


# --- distributions ---


class Categorical(NamedTuple):
    """Discrete policy; `logits` [..., number of actions]."""

    logits: jax.Array

    def sample(self, noise):
        """Action [...] from Gumbel noise of the shape of the logits."""
        return jnp.argmax(self.logits + noise, -1)

    def mode(self):
        """Most probable action [...]."""
        return jnp.argmax(self.logits, -1)

    def log_prob(self, action):
        """Log-probability [...] of `action` [...], int."""
        log_probs = jax.nn.log_softmax(self.logits)
        return jnp.take_along_axis(log_probs, action[..., None], -1)[..., 0]

    def entropy(self):
        """Entropy [...] in nats."""
        log_probs = jax.nn.log_softmax(self.logits)
        return -(jnp.exp(log_probs) * log_probs).sum(-1)


class Gaussian(NamedTuple):
    """Diagonal Gaussian policy, not squashed; `mean` and `log_std` [..., action_size]."""

    mean: jax.Array
    log_std: jax.Array

    def sample(self, noise):
        """Action [..., action_size] from standard normal noise of the same shape."""
        return self.mean + jnp.exp(self.log_std) * noise

    def mode(self):
        """The mean."""
        return self.mean

    def log_prob(self, action):
        """Log-density [...] of `action` [..., action_size]."""
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return -(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self):
        """Entropy [...] in nats."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class TanhGaussian(NamedTuple):
    """Policy over actions tanh(u), u Gaussian with `mean` and `std` [..., action_size].

    `sample` returns u and `log_prob` takes u, so that tanh is never inverted.
    """

    mean: jax.Array
    std: jax.Array

    def sample(self, noise):
        """Draw u [..., action_size] from standard normal noise of the same shape."""
        return self.mean + self.std * noise

    def log_prob(self, u):
        """Log-density [...] of the action tanh(u)."""
        z = (u - self.mean) / self.std
        log_normal = -0.5 * z**2 - jnp.log(self.std) - 0.5 * math.log(2 * math.pi)
        log_slope = 2.0 * (math.log(2) - u - jax.nn.softplus(-2.0 * u))  # log(1 - tanh(u)^2)
        return (log_normal - log_slope).sum(-1)


# --- running statistics ---


class Stats(NamedTuple):
    """Mean and variance of all rows seen so far."""

    mean: jax.Array  # [...]
    var: jax.Array  # [...]
    count: jax.Array  # type: ignore[assignment]  # [], number of rows; hides tuple.count

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Stats":
        """No rows yet: mean 0 and variance 1, so that `normalize` only clips at first."""
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(()))

    def add(self, rows: jax.Array) -> "Stats":
        """The statistics after `rows` [..., *shape] (parallel variance, Chan et al. 1979)."""
        rows = rows.astype(jnp.float32).reshape((-1, *self.mean.shape))
        n = rows.shape[0]
        count = self.count + n
        delta = rows.mean(0) - self.mean
        mean = self.mean + delta * n / count
        squares = self.var * self.count + rows.var(0) * n + delta**2 * self.count * n / count
        return Stats(mean, squares / count, count)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Standardise `x` and clip it to [-10, 10]; a constant feature stays near 0."""
        return jnp.clip((x - self.mean) / jnp.sqrt(self.var + 1e-8), -10.0, 10.0)


class RewardScale(NamedTuple):
    """Scales rewards by 1 / std of a discounted return of past rewards, R_t = gamma R_{t-1} + r_t.

    R_t starts at 0 in each episode.
    """

    stats: Stats
    running_return: jax.Array  # [N], R_t of the running episodes

    @classmethod
    def empty(cls, num_envs: int) -> "RewardScale":
        """No reward seen: scale 1."""
        return cls(Stats.empty(()), jnp.zeros(num_envs))

    def factor(self) -> jax.Array:
        """Reward scale: 1 / std of the discounted return.

        At most 10: while rewards are rare the std is close to 0, and the next reward would be huge.
        """
        return jnp.minimum(1.0 / jnp.sqrt(self.stats.var + 1e-8), 10.0)

    def add(self, reward: jax.Array, done: jax.Array, gamma: float) -> "RewardScale":
        """The statistics after the rewards [T, N] of a rollout; a return restarts after `done`."""

        def forward(running_return, step):
            reward, done = step
            running_return = gamma * running_return + reward
            return jnp.where(done, 0.0, running_return), running_return

        running_return, returns = jax.lax.scan(forward, self.running_return, (reward, done))
        return RewardScale(self.stats.add(returns), running_return)


# --- metrics ---


def run_metrics(info: dict[str, jax.Array], learned: Any) -> dict[str, jax.Array]:
    """Sums over the episodes that ended in a rollout, and whether `learned` is finite.

    `info` holds arrays [T, N]; `learned` is any tree, for example parameters and losses.

    Sums and a count instead of means: a rollout in which no episode ended must not count as a
    return of 0. The launcher divides, and leaves the metric out where the count is 0.
    """
    ended = info["returned"]
    return {
        "episodes/count": ended.sum(),
        "episodes/return": jnp.where(ended, info["episode_return"], 0.0).sum(),
        "episodes/length": jnp.where(ended, info["episode_length"], 0).sum(),
        "health/env_nan": info["env_nan"].sum(),
        "health/finite": all_finite(learned),
    }


def all_finite(tree: Any) -> jax.Array:
    """True if every floating-point leaf of `tree` is finite everywhere."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()

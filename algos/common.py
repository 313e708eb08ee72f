"""Device-side helpers that hold no algorithmic idea and must be identical in every file.

Pure functions of arrays: distributions, natural gradient steps, running statistics, greedy
evaluation, episode metrics.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import envs


class Algo(NamedTuple):
    """An algorithm as pure functions; what `build(config)` of every file returns.

    The train state has a field `update`: int32, the number of finished updates. It is the same for
    all seeds and stays unbatched under `vmap`, so schedules and ring positions cost no select.

    An offline algorithm learns from arrays that were there before it. `data` reads them: those that
    all seeds share, and those with one row for each seed. They are arguments of the compiled
    program and no constants in it.
    """

    init: Callable  # key -> state
    update: Callable  # state, *shared, *own -> state, metrics: dict of scalars
    act: Callable  # policy, obs [N, obs_size], key, greedy: bool -> action [N] or [N, action_size]
    policy_of: Callable  # state -> policy: actor parameters plus observation statistics
    data: Callable = lambda seeds: ((), ())  # seeds [R] -> shared arrays, own arrays [R, ...]
    further: Mapping[str, Callable] = {}  # like `act`: more ways to play that evaluations report


def traceable(hparams: dict[str, Any], allowed: tuple[str, ...]) -> dict[str, Any]:
    """`hparams` itself, if each names a field that may be an array, as a vmapped sweep needs.

    Raises ValueError naming the field otherwise.
    """
    for name in hparams:
        if name not in allowed:
            raise ValueError(f"cannot sweep over {name!r}: choose from {', '.join(allowed)}")
    return hparams


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
    """Diagonal Gaussian policy, neither squashed nor bounded; `mean`, `log_std` [..., action_size].

    Under gSDE the noise of an action is `features @ (weight_std * noise)`, and `log_std` is the
    deviation that this gives in each state.
    """

    mean: jax.Array
    log_std: jax.Array
    features: jax.Array | None = None  # [..., H]
    weight_std: jax.Array | None = None  # [H, action_size]

    def sample(self, noise):
        """Action from normal noise [..., action_size], under gSDE [..., H, action_size]."""
        if self.features is None:
            return self.mean + jnp.exp(self.log_std) * noise
        return self.mean + jnp.einsum("...h,...ha->...a", self.features, self.weight_std * noise)

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
    """Policy tanh(u), u from a diagonal Gaussian; `mean` and `std` [..., action_size] of u."""

    mean: jax.Array
    std: jax.Array

    def sample(self, noise):
        """Draw u [..., action_size] from normal noise."""
        return self.mean + self.std * noise

    def log_prob(self, u):
        """Log-density [...] of the action tanh(u), from u, so that nothing is inverted."""
        z = (u - self.mean) / self.std
        log_normal = -0.5 * z**2 - jnp.log(self.std) - 0.5 * math.log(2 * math.pi)
        log_slope = 2.0 * (math.log(2) - u - jax.nn.softplus(-2.0 * u))
        return (log_normal - log_slope).sum(-1)


# --- natural gradient ---


def gaussian_kl(p: Gaussian, q: Gaussian):
    """KL(p || q) [...] of two Gaussians."""
    moments = jnp.exp(2.0 * p.log_std) + (p.mean - q.mean) ** 2
    return (q.log_std - p.log_std + 0.5 * moments * jnp.exp(-2.0 * q.log_std) - 0.5).sum(-1)


def fisher_product(policy_of, params, vector, damping):
    """(F + damping I) v of the Gaussians [B, A] that `policy_of(params)` gives, exactly.

    F is the mean over states of J' M J, J the derivative of mean and log deviation, and M their
    Fisher matrix: 1 / variance, and 2. It is the Hessian of the mean KL where both are equal.
    """
    policy, change = jax.jvp(policy_of, (params,), (vector,))
    mean, log_std = jnp.exp(-2.0 * policy.log_std) * change.mean, 2.0 * change.log_std
    (product,) = jax.vjp(policy_of, params)[1](Gaussian(mean, log_std))
    return jax.tree.map(lambda p, v: p / len(mean) + damping * v, product, vector)


def natural_step(loss_of, policy_of, params, grads, delta=1e-3, damping=1e-3, iterations=10):
    """Parameters after a natural gradient step to a mean KL of `delta`, halved until it helps.

    Schulman et al. 2015, appendix C. Of 10 halvings the first is taken whose loss falls by a
    thousandth of what the gradient promises and whose KL is at most 1.5 delta; else none.
    """
    product = partial(fisher_product, policy_of, params, damping=damping)
    downhill = jax.tree.map(jnp.negative, grads)
    direction, _ = jax.scipy.sparse.linalg.cg(product, downhill, maxiter=iterations)
    size = jnp.sqrt(2.0 * delta / (optax.tree.vdot(direction, product(direction)) + 1e-12))
    slope = size * jnp.abs(optax.tree.vdot(grads, direction))
    moved = lambda scale: jax.tree.map(lambda p, d: p + scale * size * d, params, direction)
    policy, loss = policy_of(params), loss_of(params)

    def accepted(scale):
        new = moved(scale)
        near = gaussian_kl(policy, policy_of(new)).mean() <= 1.5 * delta
        return (loss_of(new) < loss - 1e-3 * scale * slope) & near

    # One after the other, no more than are needed.
    least = 0.5**9
    tries = lambda scale: (scale >= least) & ~accepted(scale)
    scale = jax.lax.while_loop(tries, lambda scale: 0.5 * scale, 1.0)
    return moved(jnp.where(scale >= least, scale, 0.0))


# --- running statistics ---


class Stats(NamedTuple):
    """Mean and variance of all rows seen so far; `count` rows."""

    mean: jax.Array  # [...]
    var: jax.Array  # [...]
    count: jax.Array  # type: ignore[assignment]  # [], hides tuple.count

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Stats":
        """Nothing seen: mean 0, variance 1, so that normalising is the identity at first."""
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(()))

    def add(self, rows: jax.Array) -> "Stats":
        """With `rows` [..., *shape] added (Chan et al. 1979, parallel variance)."""
        rows = rows.astype(jnp.float32).reshape((-1, *self.mean.shape))
        n = rows.shape[0]
        count = self.count + n
        delta = rows.mean(0) - self.mean
        mean = self.mean + delta * n / count
        squares = self.var * self.count + rows.var(0) * n + delta**2 * self.count * n / count
        return Stats(mean, squares / count, count)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Standardise `x` and clip to [-10, 10]; features that never vary stay near 0."""
        return jnp.clip((x - self.mean) / jnp.sqrt(self.var + 1e-8), -10.0, 10.0)


class RewardScale(NamedTuple):
    """Statistics of the discounted return of the running episodes, to bring rewards to scale 1."""

    stats: Stats
    running_return: jax.Array  # [N]

    @classmethod
    def empty(cls, num_envs: int) -> "RewardScale":
        """No reward seen: scale 1."""
        return cls(Stats.empty(()), jnp.zeros(num_envs))

    def factor(self) -> jax.Array:
        """What rewards are to be multiplied by: one over the deviation of the discounted return.

        At most 10, so that the first reward after a silent start does not blow up the critic.
        """
        return jnp.minimum(1.0 / jnp.sqrt(self.stats.var + 1e-8), 10.0)

    def add(self, reward: jax.Array, done: jax.Array, gamma: float) -> "RewardScale":
        """With the rewards [T, N] of a rollout added; an episode's sum ends at `done`."""

        def forward(running_return, step):
            reward, done = step
            running_return = gamma * running_return + reward
            return jnp.where(done, 0.0, running_return), running_return

        running_return, returns = jax.lax.scan(forward, self.running_return, (reward, done))
        return RewardScale(self.stats.add(returns), running_return)


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


def run_metrics(info: dict[str, jax.Array], learned: Any) -> dict[str, jax.Array]:
    """Sums over the episodes that ended in a rollout, and whether what was learned is finite.

    `info` holds arrays [T, N]; `learned` is any tree, of parameters and losses say.

    Sums and a count, not means: a rollout in which no episode ended must not count as a zero.
    The launcher divides, and leaves the metric out where the count is 0.
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

"""Behaviour cloning (BC): fits a policy to the actions of a dataset by maximum likelihood.

This is the form of Wu et al. 2019 (https://arxiv.org/abs/1911.11361), which also keeps the entropy
of the policy above a target. A gradient step draws a minibatch uniformly with replacement and takes
one step of Adam on each loss, in this order:

    policy loss      = E[T log pi(b | s) - log pi(clip(a) | s)],  T = max(v, 0)
    temperature loss = v E[-log pi(c | s) + m A]

The first loss trains pi, with v as a constant. The second trains v, with pi as a constant; its
gradient is 0 where descent would move v further below 0.
b and c are new draws from the current policy, each tanh(u) with u Gaussian. clip(a) is the
dataset's action a, clipped to [-0.999, 0.999]. A is the number of action dimensions, and -m A is
the target entropy (m: `target_entropy_mult`). While the entropy is above its target, T falls to 0,
and the policy loss becomes the negative log-likelihood.

Differences from ppo.py:

1. Nothing is collected: all seeds share one dataset, an argument of the compiled program. An
   update is a fixed number of gradient steps, which count as timesteps.
2. Rewards are not used, so there is no critic, no advantage and no ratio.
3. Actions are continuous. Layers are ReLU with Glorot-uniform weights, the log standard deviation
   is squashed into [-5, 0], gradients are not clipped, and observations are not normalised.

    python algos/bc.py --env hopper --dataset data/hopper-pure.npz --num-seeds 5
    python algos/bc.py --env Hopper-v5 --dataset minari:mujoco/hopper/medium-v0 --num-seeds 5

Documentation: docs/bc.md
"""

import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # the checkout, not algos/, comes first on the import path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends the imports at once

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from pydantic import NonNegativeFloat, PositiveInt

import envs
from algos import common, launch
from algos.launch import datasets


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "hopper"  # task of the dataset, in which the policy is evaluated
    dataset: str = ""  # file of transitions, or minari:NAME, see docs/datasets.md
    total_timesteps: PositiveInt = 500_000  # gradient steps per seed

    # batch
    gradient_steps: PositiveInt = 100  # gradient steps in one update
    batch_size: PositiveInt = 256  # transitions in a minibatch

    # optimiser: Adam
    learning_rate: NonNegativeFloat = 5e-4  # learning rate of the policy and of the temperature

    # objective
    target_entropy_mult: float = 1.0  # target entropy, in nats: minus this times action_size

    # network
    hidden: tuple[PositiveInt, ...] = (200, 200)  # fully connected hidden layers of the policy

    @property
    def steps_per_update(self) -> int:
        """Gradient steps in one update, which count as timesteps."""
        return self.gradient_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    def validate(self) -> None:
        """Raise ValueError if there is no dataset."""
        if not self.dataset:
            raise ValueError(
                "dataset='': give --dataset PATH or --dataset minari:NAME (docs/datasets.md)"
            )


# --- networks ---

MIN_LOG_STD, MAX_LOG_STD = -5.0, 0.0  # of the policy, before tanh
MAX_ACTION = 0.999  # given actions are clipped to this, because arctanh is infinite at 1


class Actor(nn.Module):
    """Policy network: observation [..., obs_size] -> TanhGaussian."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs):
        init = nn.initializers.glorot_uniform()
        x = obs.astype(jnp.float32)
        for size in self.config.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=init)(x))
        out = nn.Dense(2 * self.action_size, kernel_init=init)(x)
        mean, raw = jnp.split(out, 2, -1)
        log_std = MIN_LOG_STD + 0.5 * (MAX_LOG_STD - MIN_LOG_STD) * (jnp.tanh(raw) + 1.0)
        return common.TanhGaussian(mean, jnp.exp(log_std))


# --- data types ---


class Batch(NamedTuple):
    """What the losses need of the dataset; arrays [rows, ...]."""

    obs: jax.Array
    action: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # keys "actor" and "temperature", which is v
    opt_state: dict  # the same keys
    key: jax.Array
    update: jax.Array  # [] int32, finished updates


# --- targets and losses ---


def given_log_prob(policy, action):
    """Log-density [...] of `action` [..., action_size], which is clipped to +-MAX_ACTION first."""
    return policy.log_prob(jnp.arctanh(jnp.clip(action, -MAX_ACTION, MAX_ACTION)))


def policy_loss(own_log_prob, log_prob, temperature):
    """Negative log-likelihood of the dataset's actions, minus the weighted entropy.

    `own_log_prob` [B] is of actions that the policy drew, `log_prob` [B] of the dataset's actions.
    """
    return (jax.lax.stop_gradient(temperature) * own_log_prob - log_prob).mean()


def temperature_loss(v, own_log_prob, target_entropy):
    """Loss whose gradient step raises v while the entropy is below its target.

    The gradient is 0 where descent would move v further below 0.
    """
    surplus = jax.lax.stop_gradient(-own_log_prob - target_entropy).mean()
    return jnp.where((surplus > 0.0) & (v <= 0.0), 0.0, surplus) * v


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environment that the dataset comes from."""
    env = envs.make(config.env, 1)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions, and BC needs continuous ones")
    return env


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose network and optimiser into the pure functions of a run."""
    actor = Actor(config, env.action_size)
    optimizer = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-7)  # no learning rate: see descend
    target_entropy = -config.target_entropy_mult * env.action_size

    def data(seeds):
        """The dataset, which all seeds share, and no arrays per seed."""
        dataset = datasets.load(config.dataset, env)
        return (Batch(*(getattr(dataset, name) for name in Batch._fields)),), ()

    def init(key) -> TrainState:
        key_actor, key = jax.random.split(key)
        params = {
            "actor": actor.init(key_actor, jnp.zeros((1, env.obs_size))),
            "temperature": jnp.float32(1.0),
        }
        return TrainState(
            params=params,
            opt_state={name: optimizer.init(params[name]) for name in params},
            key=key,
            update=jnp.int32(0),
        )

    def noise_of(key, shape):
        """Noise [*shape, action_size] for sampling actions of batch shape `shape`."""
        return jax.random.normal(key, (*shape, env.action_size))

    def draw(params, obs, key):
        """The policy at `obs`, and the log-probability of a new action of it."""
        policy = actor.apply(params, obs)
        return policy, policy.log_prob(policy.sample(noise_of(key, obs.shape[:-1])))

    def policy_loss_fn(params, state, batch, key):
        policy, own_log_prob = draw(params, batch.obs, key)
        log_prob = given_log_prob(policy, batch.action)
        temperature = jnp.maximum(state.params["temperature"], 0.0)
        loss = policy_loss(own_log_prob, log_prob, temperature)
        return loss, {
            "losses/policy_loss": loss,
            "losses/log_likelihood": log_prob.mean(),
            "losses/entropy": -own_log_prob.mean(),
            "losses/std": policy.std.mean(),
            "losses/mode_error": ((jnp.tanh(policy.mean) - batch.action) ** 2).mean(),
        }

    def temperature_loss_fn(v, state, batch, key):
        _, own_log_prob = draw(state.params["actor"], batch.obs, key)
        loss = temperature_loss(v, own_log_prob, target_entropy)
        return loss, {"losses/temperature": jnp.maximum(v, 0.0)}

    # In the order of a gradient step; the gradient is with respect to the first argument.
    losses = {"actor": policy_loss_fn, "temperature": temperature_loss_fn}

    def descend(state, grads):
        """One step of the optimiser on each network in `grads`."""
        params, opt_state = dict(state.params), dict(state.opt_state)
        rate = config.learning_rate
        for name, grad in grads.items():
            direction, opt_state[name] = optimizer.update(grad, opt_state[name], params[name])
            params[name] = jax.tree.map(lambda p, u: p - rate * u, params[name], direction)
        return state._replace(params=params, opt_state=opt_state)

    def gradient_step(state, batch, key):
        """Descend on one loss after the other.

        Each loss sees the parameters that the steps before it changed.
        """
        aux = {}
        keys = jax.random.split(key, len(losses))
        for name, key_loss in zip(losses, keys, strict=True):
            grad_fn = jax.grad(losses[name], has_aux=True)
            grads, loss_aux = grad_fn(state.params[name], state, batch, key_loss)
            aux |= loss_aux | {f"losses/{name}_grad_norm": optax.global_norm(grads)}
            state = descend(state, {name: grads})
        return state, aux

    def update(state, rows):
        key, key_index, key_steps = jax.random.split(state.key, 3)
        shape = config.gradient_steps, config.batch_size
        index = jax.random.randint(key_index, shape, 0, len(rows.obs))

        def step(state, x):
            index, key = x
            return gradient_step(state, jax.tree.map(lambda x: x[index], rows), key)

        xs = index, jax.random.split(key_steps, config.gradient_steps)
        state, aux = jax.lax.scan(step, state, xs)

        metrics = {name: x.mean() for name, x in aux.items()}
        learned = state.params, metrics["losses/policy_loss"]
        metrics["health/finite"] = common.all_finite(learned)
        metrics["charts/learning_rate"] = jnp.asarray(config.learning_rate)
        return state._replace(key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], obs)
        if greedy:
            return jnp.tanh(distribution.mean)
        return jnp.tanh(distribution.sample(noise_of(key, obs.shape[:-1])))

    def policy_of(state):
        return {"actor": state.params["actor"]}

    return common.Algo(init, update, act, policy_of, data)


def make_train(config: Config):
    """The whole run as one pure function; `hparams` overrides fields of TRACEABLE with arrays.

    `data` are the arrays that `Algo.data` reads.
    """
    common.check(config)
    env = make_env(config)

    def train(key, hparams, *data):
        algo = build(common.with_hparams(config, hparams or {}, TRACEABLE), env)
        step = lambda state, _: algo.update(state, *data)
        state, metrics = jax.lax.scan(step, algo.init(key), length=config.num_updates)
        return {"state": state, "metrics": metrics}

    return train


def config_for(env: str, *presets: str, **changes) -> Config:
    """What the command line would run: defaults, the task's preset, `presets`, `changes`."""
    return launch.config_for(Config, PRESETS, env, presets, changes)


# Fields that may be arrays, so that a sweep is one more vmap: no `if`, shape or `act` reads them.
TRACEABLE = ("learning_rate", "target_entropy_mult")

# --- presets ---

# fmt: off
# Values that replace the defaults; docs/presets.md has their origins.
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "pendulum": {"total_timesteps": 10_000, "batch_size": 128, "hidden": (64, 64)},
}
# fmt: on


if __name__ == "__main__":
    launch.main("bc")

"""Behaviour cloning (BC): the policy that a dataset was most probably collected with.

In the form that Wu et al. 2019 (https://arxiv.org/abs/1911.11361) use it, in which the clone also
keeps some entropy, so that the density of any action stays finite. A gradient step takes a
minibatch drawn uniformly with replacement and descends, in this order,

    pi:      E[w log pi(b | s) - log pi(clip(a) | s)],  w = max(v, 0)
    v:       w E[-log pi(c | s) + m A]

where b and c are drawn anew from the policy as it then is, a is the dataset's action clipped to
+-0.999, and A is the dimension of actions. Where the entropy is above -m A, w falls to 0 and
maximum likelihood is left.

Differences from ppo.py:

1. Nothing is collected: all seeds share one dataset, an argument of the program. An update is a
   fixed number of gradient steps, and these are what is counted as steps.
2. There is no critic, no ratio and no advantage.
3. Glorot-uniform weights, ReLU, log-deviations squashed into [-5, 0]; gradients are not clipped,
   observations are not normalised.

    python algos/bc.py --env hopper --dataset data/hopper-pure.npz --num-seeds 5
    python algos/bc.py --env hopper --dataset minari:mujoco/hopper/medium-v0 --preset likelihood

Documentation: docs/bc.md
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import envs
from algos import common, datasets, launch


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "hopper"  # task that evaluates, and that the dataset is of
    dataset: str = ""  # file of transitions, or minari:NAME, see docs/datasets.md
    total_timesteps: int = 500_000  # gradient steps per seed

    # batch
    gradient_steps: int = 100  # gradient steps of an update
    batch_size: int = 256  # transitions of a gradient step

    # optimiser: Adam, for the policy and the weight of its entropy alike
    learning_rate: float = 5e-4  # step size of Adam

    # objective
    entropy_floor: bool = True  # keep the entropy from falling below its target
    target_entropy_mult: float = 1.0  # that target is minus this for each action

    # network
    hidden: tuple[int, ...] = (200, 200)  # hidden layers of the policy

    @property
    def steps_per_update(self) -> int:
        """Gradient steps of an update, which is what the launcher counts."""
        return self.gradient_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    def validate(self) -> None:
        """Raise ValueError if there is nothing to learn from, or nothing is learned."""
        if not self.dataset:
            raise ValueError("dataset='': give --dataset PATH or --dataset minari:NAME")
        if self.gradient_steps < 1:
            raise ValueError(f"gradient_steps={self.gradient_steps}: at least 1 is needed")


# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("learning_rate", "target_entropy_mult")

# --- presets ---

# Origins are in docs/presets.md.
PRESETS: dict[str, dict[str, Any]] = {
    # to follow a task
    "likelihood": {"entropy_floor": False},
}


# --- networks ---

MIN_LOG_STD, MAX_LOG_STD = -5.0, 0.0
MAX_ACTION = 0.999  # actions of the dataset are clipped to this


class Actor(nn.Module):
    """Policy network: observation [..., obs_size] -> common.TanhGaussian."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs):
        x = obs.astype(jnp.float32)
        for size in self.config.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=nn.initializers.glorot_uniform())(x))
        out = nn.Dense(2 * self.action_size, kernel_init=nn.initializers.glorot_uniform())(x)
        mean, raw = jnp.split(out, 2, -1)
        log_std = MIN_LOG_STD + 0.5 * (MAX_LOG_STD - MIN_LOG_STD) * (jnp.tanh(raw) + 1.0)
        return common.TanhGaussian(mean, jnp.exp(log_std))


# --- data types ---


class Batch(NamedTuple):
    """What is learned from; arrays [rows, ...]."""

    obs: jax.Array
    action: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "actor", and the "entropy_weight" v
    opt_state: dict  # of each of the two
    key: jax.Array
    update: jax.Array  # [] int32


# --- targets and losses ---


def given_log_prob(policy, action):
    """Log-density of actions of others, which may lie on the bounds."""
    return policy.log_prob(jnp.arctanh(jnp.clip(action, -MAX_ACTION, MAX_ACTION)))


def policy_loss(own_log_prob, log_prob, entropy_weight):
    """Negative log-likelihood of the dataset's actions, and the entropy's bonus."""
    return (jax.lax.stop_gradient(entropy_weight) * own_log_prob - log_prob).mean()


@jax.custom_vjp
def floor_at_zero(x):
    """max(x, 0), with a gradient that can always bring x back: only from 0 down nothing passes."""
    return jnp.maximum(x, 0.0)


def _floor_forward(x):
    return floor_at_zero(x), x


def _floor_backward(x, grad):
    return (jnp.where((grad > 0.0) & (x <= 0.0), 0.0, grad),)


floor_at_zero.defvjp(_floor_forward, _floor_backward)


def entropy_loss(entropy_weight, own_log_prob, target_entropy):
    """Loss whose gradient raises the weight while the entropy is below its target."""
    surplus = jax.lax.stop_gradient(-own_log_prob - target_entropy).mean()
    return floor_at_zero(entropy_weight) * surplus


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, network and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, 1)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions, and BC needs continuous ones")
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    actor = Actor(config, env.action_size)
    optimizer = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-7)
    target_entropy = -config.target_entropy_mult * env.action_size

    def data(seeds):
        dataset = datasets.load(config.dataset, env)
        return (Batch(dataset.obs, dataset.action),), ()

    def init(key) -> TrainState:
        key_actor, key = jax.random.split(key)
        params = {
            "actor": actor.init(key_actor, jnp.zeros((1, env.obs_size))),
            "entropy_weight": jnp.float32(config.entropy_floor),
        }
        opt_state = {name: optimizer.init(params[name]) for name in params}
        return TrainState(params, opt_state, key, jnp.zeros((), jnp.int32))

    def draw(policy, key):
        """Log-probabilities of the policy's own actions."""
        return policy.log_prob(policy.sample(jax.random.normal(key, policy.mean.shape)))

    def policy_loss_fn(actor_params, params, batch, key):
        policy = actor.apply(actor_params, batch.obs)
        own_log_prob, log_prob = draw(policy, key), given_log_prob(policy, batch.action)
        loss = policy_loss(own_log_prob, log_prob, floor_at_zero(params["entropy_weight"]))
        return loss, {
            "losses/policy_loss": loss,
            "losses/log_likelihood": log_prob.mean(),
            "losses/entropy": -own_log_prob.mean(),
            "losses/std": policy.std.mean(),
            "losses/mode_error": ((jnp.tanh(policy.mean) - batch.action) ** 2).mean(),
        }

    def entropy_loss_fn(entropy_weight, params, batch, key):
        own_log_prob = draw(actor.apply(params["actor"], batch.obs), key)
        loss = entropy_loss(entropy_weight, own_log_prob, target_entropy)
        return loss, {"losses/entropy_weight": floor_at_zero(entropy_weight)}

    def descend(name, loss_fn, params, opt_state, *args):
        """One step of Adam on one of the two: params, opt_state, metrics."""
        grads, aux = jax.grad(loss_fn, has_aux=True)(params[name], params, *args)
        direction, new = optimizer.update(grads, opt_state[name])
        move = lambda p, u: p - config.learning_rate * u
        params = params | {name: jax.tree.map(move, params[name], direction)}
        return params, opt_state | {name: new}, aux

    def update(state, rows):
        key, key_index, key_steps = jax.random.split(state.key, 3)
        shape = config.gradient_steps, config.batch_size
        index = jax.random.randint(key_index, shape, 0, len(rows.obs))

        def gradient_step(carry, x):
            params, opt_state = carry
            index, key = x
            batch = jax.tree.map(lambda x: x[index], rows)
            key_policy, key_entropy = jax.random.split(key)
            params, opt_state, aux = descend(
                "actor", policy_loss_fn, params, opt_state, batch, key_policy
            )
            if config.entropy_floor:
                params, opt_state, entropy_aux = descend(
                    "entropy_weight", entropy_loss_fn, params, opt_state, batch, key_entropy
                )
                aux |= entropy_aux
            return (params, opt_state), aux

        carry = state.params, state.opt_state
        xs = index, jax.random.split(key_steps, config.gradient_steps)
        (params, opt_state), aux = jax.lax.scan(gradient_step, carry, xs)
        metrics = {name: x.mean() for name, x in aux.items()}
        metrics["health/finite"] = common.all_finite((params, metrics["losses/policy_loss"]))
        metrics["charts/learning_rate"] = jnp.asarray(config.learning_rate)
        return TrainState(params, opt_state, key, state.update + 1), metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], obs)
        if greedy:
            return jnp.tanh(distribution.mean)
        return jnp.tanh(distribution.sample(jax.random.normal(key, distribution.mean.shape)))

    def policy_of(state):
        return {"actor": state.params["actor"]}

    return common.Algo(init, update, act, policy_of, data)


def make_train(config: Config):
    """The whole run as one pure function; `hparams` overrides fields of TRACEABLE with arrays.

    `rows` is what `build(config).data(seeds)` reads, an argument so that all seeds share it.
    """
    build(config)  # fails here, not while tracing, if the configuration is wrong

    def train(key, hparams, rows):
        algo = build(replace(config, **common.traceable(hparams or {}, TRACEABLE)))
        step = lambda state, _: algo.update(state, rows)
        state, metrics = jax.lax.scan(step, algo.init(key), length=config.num_updates)
        return {"state": state, "metrics": metrics}

    return train


def main():
    """Train from the command line."""
    launch.main("bc", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

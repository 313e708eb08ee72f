"""Batch-constrained Q-learning (BCQ): the best action among those that look like the dataset's.

Fujimoto et al. 2019, https://arxiv.org/abs/1812.02900, in the form that Wu et al. 2019
(https://arxiv.org/abs/1911.11361) compare with. A variational autoencoder (encoder e, decoder g)
learns which actions the dataset has in a state. A perturbation network f moves each decoded action
by at most P, towards a higher Q_1:

    G(s)             = g(s, clip(z, -1/2, 1/2)),  z ~ N(0, I)
    x(s, c)          = clip(c + P tanh(f(s, c)), -1, 1)

A gradient step draws a minibatch uniformly with replacement, moves the target networks Qbar_i and
fbar, and takes one step of Adam on each loss, in this order:

    Qbar_i          <- (1 - tau) Qbar_i + tau Q_i,  and fbar in the same way
    y                = r + gamma (1 - terminated) max_k mix Qbar(s', xbar(s', c_k)),  k = 1, .., 10
    critic loss      = sum_i E[(Q_i(s, a) - y)^2]
    policy loss      = -E[Q_1(s, x(s, c))]
    vae loss         = E[(g(s, z) - a)^2] + E[KL(e(s, a) || N(0, I))] / 2,  z ~ e(s, a)

The first loss trains the Q_i, the second f, the third e and g. In each, y and all other parameters
are constants. c ~ G(s) and c_k ~ G(s') are new draws, xbar is x with fbar, and mix Q is the
weighted sum l min_i Q_i + (1 - l) max_i Q_i, with l = `min_weight`. P is `max_perturbation`. Both
terms of the vae loss are means over dimensions too. The policy takes 10 draws c and plays the
x(s, c) with the largest Q_1, greedy or not.

s' is the true successor of s, taken before any reset. A time limit (truncated) therefore bootstraps
from it, and a terminal state (terminated) does not.

Differences from ppo.py:

1. Nothing is collected: all seeds share one dataset, an argument of the compiled program. An
   update is a fixed number of gradient steps, which count as timesteps.
2. The gradient reaches the perturbation through the action and the first critic.
3. The policy is a choice among draws, whose density is not known, so there is no ratio.
4. Actions are continuous. Layers are ReLU with Glorot-uniform weights, gradients are not clipped,
   and observations are not normalised.

    python algos/bcq.py --env hopper --dataset data/hopper-eps1.npz --num-seeds 5
    python algos/bcq.py --env hopper --dataset data/hopper-eps1.npz --max-perturbation 0.05 0.15 0.5

Documentation: docs/bcq.md
"""

import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if __name__ == "__main__":  # the checkout, not algos/, comes first on the import path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends the imports at once

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from annotated_types import Interval
from pydantic import NonNegativeFloat, PositiveInt

import envs
from algos import common, launch
from algos.common import UnitFloat
from algos.launch import datasets


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "hopper"  # task of the dataset, in which the policy is evaluated
    dataset: str = ""  # file of transitions, or minari:NAME, see docs/datasets.md
    total_timesteps: PositiveInt = 500_000  # gradient steps per seed

    # batch
    gradient_steps: PositiveInt = 100  # gradient steps in one update
    batch_size: PositiveInt = 100  # transitions in a minibatch

    # optimiser: Adam
    critic_lr: NonNegativeFloat = 1e-3  # learning rate of the critics
    learning_rate: NonNegativeFloat = 3e-5  # learning rate of the perturbation
    vae_lr: NonNegativeFloat = 1e-3  # learning rate of the autoencoder
    polyak_tau: UnitFloat = 0.005  # Polyak step of the target networks

    # objective
    gamma: UnitFloat = 0.99  # discount
    min_weight: UnitFloat = 0.75  # weight of the smallest Q_i; the largest gets the rest
    # largest change of a decoded action in each dimension; actions are in [-1, 1]
    max_perturbation: Annotated[float, Interval(ge=0, le=2)] = 0.15

    # networks
    hidden: tuple[PositiveInt, ...] = (300, 300)  # hidden layers of the perturbation
    critic_hidden: tuple[PositiveInt, ...] = (300, 300)  # hidden layers of each critic
    vae_hidden: tuple[PositiveInt, ...] = (750, 750)  # hidden layers of encoder and decoder

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

MIN_LOG_STD, MAX_LOG_STD = -4.0, 15.0  # of the latents
MAX_LATENT = 0.5  # sampled latents are clipped to this before they are decoded
NUM_CANDIDATES = 10  # draws from which targets and the policy take the best


class MLP(nn.Module):
    """Hidden layers and a linear layer: inputs [..., size], concatenated -> [..., out]."""

    hidden: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, *inputs):
        init = nn.initializers.glorot_uniform()
        x = jnp.concatenate([x.astype(jnp.float32) for x in inputs], -1)
        for size in self.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=init)(x))
        return nn.Dense(self.out, kernel_init=init)(x)


class Encoder(nn.Module):
    """Latents of an action: observation, action -> mean and log std, each [..., 2 action_size]."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs, action):
        out = MLP(self.config.vae_hidden, 4 * self.action_size)(obs, action)
        mean, log_std = jnp.split(out, 2, -1)
        return mean, jnp.clip(log_std, MIN_LOG_STD, MAX_LOG_STD)


class Decoder(nn.Module):
    """Action of latents: observation, latents -> action [..., action_size] in (-1, 1)."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs, latent):
        return jnp.tanh(MLP(self.config.vae_hidden, self.action_size)(obs, latent))


class Critic(nn.Module):
    """Two action values: observation [..., obs_size], action [..., action_size] -> [2, ...]."""

    config: Config

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return ensemble(self.config.critic_hidden, 1)(obs, action)[..., 0]


# --- data types ---


class Batch(NamedTuple):
    """What the losses need of the dataset; arrays [rows, ...]."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    next_obs: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # keys "critic", "perturbation" and "vae": a dict of "encoder" and "decoder"
    target_params: dict  # keys "critic" and "perturbation"
    opt_state: dict  # the same keys as params
    max_perturbation: jax.Array  # [] a part of the policy, because a sweep may vary it
    key: jax.Array
    update: jax.Array  # [] int32, finished updates


# --- targets and losses ---


def perturb(action, direction, max_perturbation):
    """Actions [..., A], moved by at most `max_perturbation` and clipped to [-1, 1]."""
    return jnp.clip(action + max_perturbation * jnp.tanh(direction), -1.0, 1.0)


def mix(value, min_weight):
    """Weighted sum of the smallest and the largest of the critics' values [critics, ...]."""
    return min_weight * value.min(0) + (1.0 - min_weight) * value.max(0)


def best_target(reward, terminated, next_value, gamma, min_weight):
    """Targets [B] of the critics; no gradient passes through them.

    `next_value` [2, draws, B] holds the target critics' values of several actions at the true
    successor. Each action's values are mixed first, then the best action is taken. A terminated
    step does not bootstrap.
    """
    value = mix(next_value, min_weight).max(0)
    return jax.lax.stop_gradient(reward + gamma * jnp.where(terminated, 0.0, value))


def critic_loss(value, target):
    """Sum over critics of the mean squared error of values [critics, B] to targets [B]."""
    return ((value - target) ** 2).mean(-1).sum()


def latent_kl(mean, log_std):
    """KL(N(mean, std) || N(0, 1)) [B, L] of each latent; mean, log_std [B, L]."""
    return 0.5 * (mean**2 + jnp.exp(2.0 * log_std) - 1.0 - 2.0 * log_std)


def vae_loss(decoded, action, mean, log_std):
    """Squared error plus half the KL of the latents; both are means over rows and dimensions.

    decoded, action [B, A]; mean, log_std [B, L].
    """
    return ((decoded - action) ** 2).mean() + 0.5 * latent_kl(mean, log_std).mean()


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environment that the dataset comes from."""
    env = envs.make(config.env, 1)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions, and BCQ needs continuous ones")
    return env


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose networks and optimiser into the pure functions of a run."""
    A = env.action_size
    encoder, decoder = Encoder(config, A), Decoder(config, A)
    perturbation, critic = MLP(config.hidden, A), Critic(config)
    optimizer = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-7)  # no learning rate: see descend
    learning_rate = {
        "critic": config.critic_lr,
        "perturbation": config.learning_rate,
        "vae": config.vae_lr,
    }

    def data(seeds):
        """The dataset, which all seeds share, and no arrays per seed."""
        dataset = datasets.load(config.dataset, env)
        return (Batch(*(getattr(dataset, name) for name in Batch._fields)),), ()

    def init(key) -> TrainState:
        # One key is unused, so that a seed gives the same run as in earlier versions.
        key_networks, _, key_encoder, key_decoder, key = jax.random.split(key, 5)
        key_critic, key_perturbation = jax.random.split(key_networks)
        obs, action, latent = (jnp.zeros((1, size)) for size in (env.obs_size, A, 2 * A))
        params = {
            "critic": critic.init(key_critic, obs, action),
            "perturbation": perturbation.init(key_perturbation, obs, action),
            "vae": {
                "encoder": encoder.init(key_encoder, obs, action),
                "decoder": decoder.init(key_decoder, obs, latent),
            },
        }
        return TrainState(
            params=params,
            target_params={name: params[name] for name in ("critic", "perturbation")},
            opt_state={name: optimizer.init(params[name]) for name in params},
            max_perturbation=jnp.float32(config.max_perturbation),
            key=key,
            update=jnp.int32(0),
        )

    def draw(policy, obs, key):
        """A decoded action [..., A] at each observation, before and after its perturbation."""
        latent = jax.random.normal(key, (*obs.shape[:-1], 2 * A))
        latent = jnp.clip(latent, -MAX_LATENT, MAX_LATENT)
        action = decoder.apply(policy["decoder"], obs, latent)
        direction = perturbation.apply(policy["perturbation"], obs, action)
        return action, perturb(action, direction, policy["max_perturbation"])

    def candidates(policy, obs, key):
        """Perturbed draws [draws, ..., A] at each observation; their values [2, draws, ...]."""
        obs = jnp.broadcast_to(obs, (NUM_CANDIDATES, *obs.shape))
        _, action = draw(policy, obs, key)
        return action, critic.apply(policy["critic"], obs, action)

    def critic_loss_fn(params, state, batch, key):
        target_policy = policy_of(state) | state.target_params  # with the online decoder
        _, next_value = candidates(target_policy, batch.next_obs, key)
        target = best_target(
            batch.reward, batch.terminated, next_value, config.gamma, config.min_weight
        )
        value = critic.apply(params, batch.obs, batch.action)
        loss = critic_loss(value, target)
        return loss, {
            "losses/qf_loss": loss,
            "losses/q_data": value.mean(),
            "losses/target": target.mean(),
        }

    def policy_loss_fn(params, state, batch, key):
        drawn, action = draw(policy_of(state) | {"perturbation": params}, batch.obs, key)
        loss = -critic.apply(state.params["critic"], batch.obs, action)[0].mean()
        return loss, {
            "losses/policy_loss": loss,
            "losses/perturbation": jnp.abs(action - drawn).mean(),
            "losses/saturated_fraction": (jnp.abs(action) > 0.99).mean(),
        }

    def vae_loss_fn(params, state, batch, key):
        mean, log_std = encoder.apply(params["encoder"], batch.obs, batch.action)
        latent = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        decoded = decoder.apply(params["decoder"], batch.obs, latent)
        loss = vae_loss(decoded, batch.action, mean, log_std)
        return loss, {
            "losses/vae_loss": loss,
            "losses/reconstruction_error": ((decoded - batch.action) ** 2).mean(),
            "losses/latent_kl": latent_kl(mean, log_std).mean(),
        }

    # In the order of a gradient step; the gradient is with respect to the first argument.
    losses = {
        "critic": critic_loss_fn,
        "perturbation": policy_loss_fn,
        "vae": vae_loss_fn,
    }

    def descend(state, grads):
        """One step of the optimiser on each network in `grads`."""
        params, opt_state = dict(state.params), dict(state.opt_state)
        for name, grad in grads.items():
            direction, opt_state[name] = optimizer.update(grad, opt_state[name], params[name])
            move = lambda p, u, rate=learning_rate[name]: p - rate * u
            params[name] = jax.tree.map(move, params[name], direction)
        return state._replace(params=params, opt_state=opt_state)

    def gradient_step(state, batch, key):
        """Move the target networks, then descend on one loss after the other.

        Each loss sees the parameters that the steps before it changed.
        """
        online = {name: state.params[name] for name in state.target_params}
        target_params = optax.incremental_update(online, state.target_params, config.polyak_tau)
        state, aux = state._replace(target_params=target_params), {}
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
        learned = state.params, metrics["losses/qf_loss"], metrics["losses/vae_loss"]
        metrics["health/finite"] = common.all_finite(learned)
        metrics["charts/learning_rate"] = jnp.asarray(config.learning_rate)
        return state._replace(key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        """The perturbed draw with the largest value of the first critic, greedy or not."""
        action, value = candidates(policy, obs, key)
        best = jnp.argmax(value[0], 0)[None, ..., None]
        return jnp.take_along_axis(action, best, 0)[0]

    def policy_of(state):
        return {
            "critic": state.params["critic"],
            "perturbation": state.params["perturbation"],
            "decoder": state.params["vae"]["decoder"],
            "max_perturbation": state.max_perturbation,
        }

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
TRACEABLE = (
    "critic_lr", "learning_rate", "vae_lr", "polyak_tau", "gamma", "min_weight", "max_perturbation",
)  # fmt: skip

# --- presets ---

# fmt: off
# Values that replace the defaults; docs/presets.md has their origins.
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "pendulum": {
        "total_timesteps": 10_000, "batch_size": 128,
        "hidden": (64, 64), "critic_hidden": (64, 64), "vae_hidden": (128, 128),
    },
}
# fmt: on


if __name__ == "__main__":
    launch.main("bcq")

"""Batch-constrained Q-learning (BCQ): the best action among those that look like the data.

Fujimoto et al. 2019, https://arxiv.org/abs/1812.02900, in the form that Wu et al. 2019
(https://arxiv.org/abs/1911.11361) compare with. A variational autoencoder (e, g) learns which
actions the dataset shows in a state. A perturbation f moves each of them a little, to where a
critic is larger:

    c ~ G(s): c = g(s, clip(z, -1/2, 1/2)),  z ~ N(0, I)
    x(s, c) = clip(c + P tanh(f(s, c)), -1, 1)

A gradient step draws a minibatch uniformly with replacement and updates, in this order,

    targets       Qbar_i <- (1 - tau) Qbar_i + tau Q_i,  the same for xbar and x
    critics       sum_i E[(Q_i(s, a) - y)^2],
                  y = r + gamma (1 - terminated) max_k mix Qbar(s', xbar(s', c_k)),  k = 1 .. 10
    perturbation  -E[Q_1(s, x(s, c))]
    autoencoder   E[(g(s, z) - a)^2] + E[KL(e(s, a) || N(0, 1))] / 2,  z ~ e(s, a)

c ~ G(s) and c_k ~ G(s') are new draws, and mix Q = l min_i Q_i + (1 - l) max_i Q_i. The means of
the last line are over action or latent dimensions too. Acting takes 10 draws x(s, c) and plays the
one with the largest Q_1, in evaluations as well.

Differences from ppo.py:

1. Nothing is collected: all seeds share one dataset, an argument of the program. An update is a
   fixed number of gradient steps, and these count as timesteps.
2. No network is the policy, and its density is not known, so there is no ratio.
3. The gradient of the perturbation passes through the action into a critic.
4. Actions are continuous. Layers are ReLU with Glorot-uniform weights, gradients are not clipped,
   and observations are not normalised.

    python algos/bcq.py --env hopper --dataset data/hopper-eps1.npz --num-seeds 5
    python algos/bcq.py --env hopper --dataset data/hopper-eps1.npz --max-perturbation 0.05 0.15 0.5

Documentation: docs/bcq.md
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from annotated_types import Interval
from pydantic import NonNegativeFloat, PositiveInt

if __name__ == "__main__":  # import from this checkout, and nothing by accident from algos/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

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
    gradient_steps: PositiveInt = 100  # gradient steps of an update
    batch_size: PositiveInt = 100  # transitions in a minibatch

    # optimiser: Adam
    critic_lr: NonNegativeFloat = 1e-3  # learning rate of the critics
    learning_rate: NonNegativeFloat = 3e-5  # learning rate of the perturbation
    vae_lr: NonNegativeFloat = 1e-3  # learning rate of the autoencoder
    polyak_tau: UnitFloat = 0.005  # how far the targets move towards their networks in a step

    # objective
    gamma: UnitFloat = 0.99  # discount
    min_weight: UnitFloat = 0.75  # weight of the smaller critic; the larger one gets the rest
    # largest change of a drawn action, in units of the action range [-1, 1]
    max_perturbation: Annotated[float, Interval(ge=0, le=2)] = 0.15

    # networks
    hidden: tuple[PositiveInt, ...] = (300, 300)  # hidden layers of the perturbation
    critic_hidden: tuple[PositiveInt, ...] = (300, 300)  # hidden layers of each critic
    vae_hidden: tuple[PositiveInt, ...] = (750, 750)  # hidden layers of encoder and decoder

    @property
    def steps_per_update(self) -> int:
        """Gradient steps of an update, which count as timesteps."""
        return self.gradient_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    def validate(self) -> None:
        """Raise ValueError if there is no dataset."""
        if not self.dataset:
            raise ValueError("dataset='': give --dataset PATH or --dataset minari:NAME")


# --- networks ---

MIN_LOG_STD, MAX_LOG_STD = -4.0, 15.0  # of the encoder
MAX_LATENT = 0.5  # latents are clipped to this before an action is decoded from them
NUM_CANDIDATES = 10  # draws among which targets and actions take the best


class MLP(nn.Module):
    """Hidden layers and a linear layer: inputs [..., any size], side by side -> [..., out]."""

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
    """Latent of an action: observation, action -> mean and log std [..., 2 action_size]."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs, action):
        out = MLP(self.config.vae_hidden, 4 * self.action_size)(obs, action)
        mean, log_std = jnp.split(out, 2, -1)
        return mean, jnp.clip(log_std, MIN_LOG_STD, MAX_LOG_STD)


class Decoder(nn.Module):
    """Action of a latent: observation, latent -> action [..., action_size] in (-1, 1)."""

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
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )
        return ensemble(self.config.critic_hidden, 1)(obs, action)[..., 0]


# --- data types ---


class Batch(NamedTuple):
    """What the losses need of the dataset; arrays [rows, ...]."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array
    terminated: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "critic" and "perturbation", and of "vae", a dict of "encoder" and "decoder"
    target_params: dict  # of "critic" and "perturbation"
    opt_state: dict  # of what is in params
    max_perturbation: jax.Array  # [] kept here because its policy needs it, and a sweep may vary it
    key: jax.Array
    update: jax.Array  # [] int32, finished updates


# --- targets and losses ---


def perturb(action, direction, max_perturbation):
    """Actions [..., A], each moved by at most `max_perturbation` and kept in [-1, 1]."""
    return jnp.clip(action + max_perturbation * jnp.tanh(direction), -1.0, 1.0)


def mix(value, min_weight):
    """Weighted sum of the smallest and the largest of the critics' values [2, ...]."""
    return min_weight * value.min(0) + (1.0 - min_weight) * value.max(0)


def best_target(reward, terminated, next_value, gamma, min_weight):
    """Targets [B] of the critics, through which no gradient passes.

    `next_value` [2, draws, B] is what the target critics say of several actions at the true
    successor. The critics are mixed for each action first; then the best action counts, unless the
    step terminated.
    """
    best = mix(next_value, min_weight).max(0)
    return jax.lax.stop_gradient(reward + jnp.where(terminated, 0.0, gamma) * best)


def critic_loss(value, target):
    """Sum over critics of the mean squared error of values [2, B] to targets [B]."""
    return ((value - target) ** 2).mean(-1).sum()


def latent_kl(mean, log_std):
    """KL(N(mean, std) || N(0, 1)), elementwise."""
    return 0.5 * (mean**2 + jnp.exp(2.0 * log_std) - 1.0 - 2.0 * log_std)


def vae_loss(decoded, action, mean, log_std):
    """Squared error plus half the KL of the latents; both are means over dimensions too."""
    return ((decoded - action) ** 2).mean() + 0.5 * latent_kl(mean, log_std).mean()


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environment that the dataset is of."""
    env = envs.make(config.env, 1)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions, and BCQ needs continuous ones")
    return env


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose networks and optimiser into the pure functions of a run."""
    A = env.action_size
    encoder, decoder = Encoder(config, A), Decoder(config, A)
    perturbation, critic = MLP(config.hidden, A), Critic(config)
    optimizer = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-7)
    learning_rate = {
        "critic": config.critic_lr,
        "perturbation": config.learning_rate,
        "vae": config.vae_lr,
    }

    def data(seeds):
        """The dataset, which all seeds share."""
        dataset = datasets.load(config.dataset, env)
        return (Batch(*(getattr(dataset, name) for name in Batch._fields)),), ()

    def init(key) -> TrainState:
        # The second key belonged to an option that is gone: seeds still give the same runs.
        key_start, _, key_encoder, key_decoder, key = jax.random.split(key, 5)
        key_critic, key_perturbation = jax.random.split(key_start)
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
        """A decoded action [..., A] for each observation [..., obs_size], and its perturbation."""
        latent = jax.random.normal(key, (*obs.shape[:-1], 2 * A))
        latent = jnp.clip(latent, -MAX_LATENT, MAX_LATENT)
        action = decoder.apply(policy["decoder"], obs, latent)
        direction = perturbation.apply(policy["perturbation"], obs, action)
        return action, perturb(action, direction, policy["max_perturbation"])

    def candidates(policy, obs, key):
        """Perturbed draws [draws, ..., A] for each observation; their values [2, draws, ...]."""
        obs = jnp.broadcast_to(obs, (NUM_CANDIDATES, *obs.shape))
        _, action = draw(policy, obs, key)
        return action, critic.apply(policy["critic"], obs, action)

    def critic_loss_fn(params, state, batch, key):
        target_policy = policy_of(state) | state.target_params
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

    # In the order of a gradient step.
    losses = {"critic": critic_loss_fn, "perturbation": policy_loss_fn, "vae": vae_loss_fn}

    def descend(state, grads):
        """One step of the optimiser on each network in `grads`."""
        params, opt_state = dict(state.params), dict(state.opt_state)
        for name in grads:
            direction, opt_state[name] = optimizer.update(grads[name], opt_state[name])
            move = lambda p, u, rate=learning_rate[name]: p - rate * u
            params[name] = jax.tree.map(move, params[name], direction)
        return state._replace(params=params, opt_state=opt_state)

    def gradient_step(state, batch, key):
        """Move the targets, then descend on each loss with what the one before learned."""
        online = {name: state.params[name] for name in state.target_params}
        target_params = optax.incremental_update(online, state.target_params, config.polyak_tau)
        state, aux = state._replace(target_params=target_params), {}
        keys = jax.random.split(key, len(losses))
        for (name, loss_fn), key in zip(losses.items(), keys, strict=True):
            grads, more = jax.grad(loss_fn, has_aux=True)(state.params[name], state, batch, key)
            aux |= more | {f"losses/{name}_grad_norm": optax.global_norm(grads)}
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
        """Of several perturbed draws the one that the first critic prefers, greedy or not."""
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

    `data` is what `Algo.data` reads: an argument, so that all seeds share it.
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


# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("critic_lr", "learning_rate", "vae_lr", "polyak_tau", "gamma", "min_weight")
TRACEABLE += ("max_perturbation",)

# --- presets ---

# fmt: off
# Values that differ from the defaults; docs/presets.md has their origins.
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "pendulum": {
        "total_timesteps": 10_000, "batch_size": 128, "hidden": (64, 64), "critic_hidden": (64, 64),
        "vae_hidden": (128, 128),
    },
}
# fmt: on


if __name__ == "__main__":
    launch.main("bcq")

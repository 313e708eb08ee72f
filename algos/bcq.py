"""Batch-constrained Q-learning (BCQ): the best, by its critics, of actions that look like data.

Fujimoto et al. 2019, https://arxiv.org/abs/1812.02900, in the form that Wu et al. 2019
(https://arxiv.org/abs/1911.11361) compare with. A variational autoencoder (e, g) learns which
actions a state shows, and a small perturbation x of them learns to please a critic:

    c ~ G(s): c = g(s, clip(z, -1/2, 1/2)),  z ~ N(0, I)
    x(s, c) = clip(c + P tanh(f(s, c)), -1, 1)

A gradient step takes a minibatch drawn uniformly with replacement and goes, in this order,

    Qbar_i <- (1 - tau) Qbar_i + tau Q_i,  xbar <- (1 - tau) xbar + tau x
    y       = r + gamma (1 - terminated) max_k mix Qbar(s', xbar(s', c_k)),  c_1 ... c_10 ~ G(s')
    Q:        sum_i E[(Q_i(s, a) - y)^2]
    x:       -E[Q_1(s, x(s, c))],  c ~ G(s)
    e, g:     E[(g(s, z) - a)^2] + E[KL(e(s, a) || N(0, 1))] / 2,  z ~ e(s, a)

with mix Q = l min_i Q_i + (1 - l) max_i Q_i, and the last line a mean over dimensions too. It acts
by the one of 10 perturbed draws of G that Q_1 prefers, also where others would act greedily.

Differences from ppo.py:

1. Nothing is collected: all seeds share one dataset, an argument of the program. An update is a
   fixed number of gradient steps, and these are what is counted as steps.
2. No network is the policy, and no density of actions is known: there is no ratio.
3. The gradient of the perturbation goes through the action into a critic.
4. Glorot-uniform weights, ReLU; gradients are not clipped, observations are not normalised.
5. `fidelity="official"` brings back three defects of the code of Wu et al., to show their effect:
   targets start at random weights of their own, that of the perturbation stays there, and the
   autoencoder shares the perturbation's Adam, its step size and its counter.

    python algos/bcq.py --env hopper --dataset data/hopper-eps1.npz --num-seeds 5
    python algos/bcq.py --env hopper --dataset data/hopper-eps1.npz --max-perturbation 0.05 0.15 0.5

Documentation: docs/bcq.md
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

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
    batch_size: int = 100  # transitions of a gradient step

    # optimiser: Adam, for the critics, the perturbation and the autoencoder apart
    critic_lr: float = 1e-3  # step size of the critics
    learning_rate: float = 3e-5  # step size of the perturbation
    vae_lr: float = 1e-3  # step size of the autoencoder
    polyak_tau: float = 0.005  # step of the targets towards the critics and the perturbation

    # objective
    gamma: float = 0.99  # discount
    min_weight: float = 0.75  # weight of the smaller critic in the targets, the other gets the rest
    max_perturbation: float = 0.15  # largest change of a drawn action, whose range is [-1, 1]

    # networks
    hidden: tuple[int, ...] = (300, 300)  # hidden layers of the perturbation
    critic_hidden: tuple[int, ...] = (300, 300)  # hidden layers of each critic
    vae_hidden: tuple[int, ...] = (750, 750)  # hidden layers of the encoder and of the decoder
    fidelity: Literal["fixed", "official"] = "fixed"  # restore three defects of the published code

    @property
    def steps_per_update(self) -> int:
        """Gradient steps of an update, which is what the launcher counts."""
        return self.gradient_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    def validate(self) -> None:
        """Raise ValueError if there is nothing to learn from, or a setting has no effect."""
        if not self.dataset:
            raise ValueError("dataset='': give --dataset PATH or --dataset minari:NAME")
        if self.gradient_steps < 1:
            raise ValueError(f"gradient_steps={self.gradient_steps}: at least 1 is needed")
        if self.fidelity == "official" and self.vae_lr != Config.vae_lr:
            raise ValueError(
                f"vae_lr={self.vae_lr:g}: leave it out, in the official code the autoencoder has "
                "the step size of the perturbation, learning_rate"
            )


# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("critic_lr", "learning_rate", "vae_lr", "polyak_tau", "gamma", "min_weight")
TRACEABLE += ("max_perturbation",)

# --- presets ---

# Origins are in docs/presets.md.
PRESETS: dict[str, dict[str, Any]] = {
    # to follow a task
    "official": {"fidelity": "official"},
}


# --- networks ---

MIN_LOG_STD, MAX_LOG_STD = -4.0, 15.0  # of the encoder
MAX_LATENT = 0.5  # latents that actions are decoded from are clipped to this
NUM_CANDIDATES = 10  # draws of which targets and actions take the best


class MLP(nn.Module):
    """Fully connected: hidden layers with ReLU, then a linear layer of `out` units."""

    hidden: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, *inputs):
        x = jnp.concatenate([x.astype(jnp.float32) for x in inputs], -1)
        for size in self.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=nn.initializers.glorot_uniform())(x))
        return nn.Dense(self.out, kernel_init=nn.initializers.glorot_uniform())(x)


class Encoder(nn.Module):
    """Mean and log-deviation [..., 2 action_size] of an action's latent."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs, action):
        out = MLP(self.config.vae_hidden, 4 * self.action_size)(obs, action)
        mean, log_std = jnp.split(out, 2, -1)
        return mean, jnp.clip(log_std, MIN_LOG_STD, MAX_LOG_STD)


class Decoder(nn.Module):
    """Action [..., action_size] in (-1, 1) of a latent [..., 2 action_size]."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs, latent):
        return jnp.tanh(MLP(self.config.vae_hidden, self.action_size)(obs, latent))


class Critic(nn.Module):
    """Two values [2, ...] of observation [..., obs_size] and action [..., action_size]."""

    config: Config

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )
        return ensemble(self.config.critic_hidden, 1)(obs, action)[..., 0]


# --- data types ---


class Batch(NamedTuple):
    """What is learned from; arrays [rows, ...]."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array
    terminated: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "critic", "perturbation" and "vae", the last of "encoder" and "decoder"
    target_params: dict  # of "critic" and "perturbation"
    opt_state: dict  # of each of the three
    max_perturbation: jax.Array  # [] the row's own, for its policy
    key: jax.Array
    update: jax.Array  # [] int32


# --- targets and losses ---


def perturb(action, direction, max_perturbation):
    """Actions [..., A], each moved by at most `max_perturbation` and kept in [-1, 1]."""
    return jnp.clip(action + max_perturbation * jnp.tanh(direction), -1.0, 1.0)


def mix(value, min_weight):
    """Weighted smallest and largest of the critics' values [2, ...]."""
    return min_weight * value.min(0) + (1.0 - min_weight) * value.max(0)


def best_target(reward, terminated, next_value, gamma, min_weight):
    """Targets [B] from the values [2, draws, B] of actions at the next state.

    The critics are mixed for each action, and then the best action counts.
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
    """Squared error and half the divergence of the latents, both means over dimensions too."""
    return ((decoded - action) ** 2).mean() + 0.5 * latent_kl(mean, log_std).mean()


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, 1)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions, and BCQ needs continuous ones")
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    A = env.action_size
    encoder, decoder = Encoder(config, A), Decoder(config, A)
    perturbation, critic = MLP(config.hidden, A), Critic(config)
    optimizer = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-7)
    official = config.fidelity == "official"
    learning_rate = {
        "critic": config.critic_lr,
        "perturbation": config.learning_rate,
        "vae": config.learning_rate if official else config.vae_lr,
    }
    followed = ("critic",) if official else ("critic", "perturbation")
    share_counter = ("perturbation", "vae") if official else ()

    def data(seeds):
        dataset = datasets.load(config.dataset, env)
        return (Batch(*(getattr(dataset, name) for name in Batch._fields)),), ()

    def init(key) -> TrainState:
        key_start, key_targets, key_encoder, key_decoder, key = jax.random.split(key, 5)
        obs, action, latent = (jnp.zeros((1, size)) for size in (env.obs_size, A, 2 * A))

        def with_targets(key):
            key_critic, key_perturbation = jax.random.split(key)
            return {
                "critic": critic.init(key_critic, obs, action),
                "perturbation": perturbation.init(key_perturbation, obs, action),
            }

        params = with_targets(key_start)
        target_params = with_targets(key_targets) if official else params
        vae = {
            "encoder": encoder.init(key_encoder, obs, action),
            "decoder": decoder.init(key_decoder, obs, latent),
        }
        params = params | {"vae": vae}
        opt_state = {name: optimizer.init(params[name]) for name in params}
        most = jnp.float32(config.max_perturbation)
        return TrainState(params, target_params, opt_state, most, key, jnp.zeros((), jnp.int32))

    def draw(decoder_params, perturbation_params, obs, key, most):
        """A decoded action [..., A] for each observation [..., obs_size], and its perturbation."""
        latent = jax.random.normal(key, (*obs.shape[:-1], 2 * A))
        latent = jnp.clip(latent, -MAX_LATENT, MAX_LATENT)
        action = decoder.apply(decoder_params, obs, latent)
        direction = perturbation.apply(perturbation_params, obs, action)
        return action, perturb(action, direction, most)

    def candidates(decoder_params, perturbation_params, critic_params, obs, key, most):
        """Draws [draws, ..., A] for each observation, and their values [2, draws, ...]."""
        obs = jnp.broadcast_to(obs, (NUM_CANDIDATES, *obs.shape))
        _, action = draw(decoder_params, perturbation_params, obs, key, most)
        return action, critic.apply(critic_params, obs, action)

    def critic_loss_fn(critic_params, params, target_params, batch, key):
        networks = params["vae"]["decoder"], target_params["perturbation"], target_params["critic"]
        _, next_value = candidates(*networks, batch.next_obs, key, config.max_perturbation)
        target = best_target(
            batch.reward, batch.terminated, next_value, config.gamma, config.min_weight
        )
        value = critic.apply(critic_params, batch.obs, batch.action)
        loss = critic_loss(value, target)
        return loss, {
            "losses/qf_loss": loss,
            "losses/q_data": value.mean(),
            "losses/target": target.mean(),
        }

    def policy_loss_fn(perturbation_params, params, batch, key):
        networks, most = (params["vae"]["decoder"], perturbation_params), config.max_perturbation
        drawn, action = draw(*networks, batch.obs, key, most)
        loss = -critic.apply(params["critic"], batch.obs, action)[0].mean()
        return loss, {
            "losses/policy_loss": loss,
            "losses/perturbation": jnp.abs(action - drawn).mean(),
            "losses/saturated_fraction": (jnp.abs(action) > 0.99).mean(),
        }

    def vae_loss_fn(vae_params, params, batch, key):
        mean, log_std = encoder.apply(vae_params["encoder"], batch.obs, batch.action)
        latent = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        decoded = decoder.apply(vae_params["decoder"], batch.obs, latent)
        loss = vae_loss(decoded, batch.action, mean, log_std)
        return loss, {
            "losses/vae_loss": loss,
            "losses/reconstruction_error": ((decoded - batch.action) ** 2).mean(),
            "losses/latent_kl": latent_kl(mean, log_std).mean(),
        }

    def descend(name, loss_fn, params, opt_state, *args):
        """One step of Adam on one of the three: params, opt_state, metrics."""
        grads, aux = jax.grad(loss_fn, has_aux=True)(params[name], params, *args)
        direction, new = optimizer.update(grads, opt_state[name])
        move = lambda p, u: p - learning_rate[name] * u
        params = params | {name: jax.tree.map(move, params[name], direction)}
        opt_state = opt_state | {name: new}
        if name in share_counter:
            opt_state |= {x: opt_state[x]._replace(count=new.count) for x in share_counter}
        return params, opt_state, aux

    def gradient_step(state, batch, key):
        """Targets, critics, perturbation, autoencoder, in this order."""
        key_critic, key_policy, key_vae = jax.random.split(key, 3)
        follow = lambda name: optax.incremental_update(
            state.params[name], state.target_params[name], config.polyak_tau
        )
        targets = state.target_params | {name: follow(name) for name in followed}
        learned = state.params, state.opt_state
        *learned, aux = descend("critic", critic_loss_fn, *learned, targets, batch, key_critic)
        *learned, policy_aux = descend("perturbation", policy_loss_fn, *learned, batch, key_policy)
        *learned, vae_aux = descend("vae", vae_loss_fn, *learned, batch, key_vae)
        params, opt_state = learned
        state = state._replace(params=params, target_params=targets, opt_state=opt_state)
        return state, aux | policy_aux | vae_aux

    def update(state, rows):
        key, key_index, key_steps = jax.random.split(state.key, 3)
        shape = config.gradient_steps, config.batch_size
        index = jax.random.randint(key_index, shape, 0, len(rows.obs))

        def step(carry, x):
            index, key = x
            return gradient_step(carry, jax.tree.map(lambda x: x[index], rows), key)

        xs = index, jax.random.split(key_steps, config.gradient_steps)
        state, aux = jax.lax.scan(step, state, xs)
        metrics = {name: x.mean() for name, x in aux.items()}
        losses = metrics["losses/qf_loss"], metrics["losses/vae_loss"]
        metrics["health/finite"] = common.all_finite((state.params, losses))
        metrics["charts/learning_rate"] = jnp.asarray(config.learning_rate)
        return state._replace(key=key, update=state.update + 1), metrics

    def act(policy, obs, key, _):
        """Of several draws the one that the first critic prefers, greedy or not."""
        networks = policy["decoder"], policy["perturbation"], policy["critic"]
        action, value = candidates(*networks, obs, key, policy["max_perturbation"])
        best = jnp.argmax(value[0], 0)[None, ..., None]
        return jnp.take_along_axis(action, best, 0)[0]

    def policy_of(state):
        trained = {name: state.params[name] for name in ("critic", "perturbation")}
        trained["max_perturbation"] = state.max_perturbation
        return trained | {"decoder": state.params["vae"]["decoder"]}

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
    launch.main("bcq", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

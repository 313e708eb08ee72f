"""Proximal policy optimisation (PPO), the reference against which every other file is read.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347. One update collects a rollout [T, N] with
the current policy, pi_old, and takes several epochs of minibatch gradient steps on

    delta_t  = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
    A_t      = delta_t + gamma lambda (1 - done_t) A_{t+1},  A_T = 0                  (GAE)
    target_t = V(s_t) + A_t
    ratio_t  = pi(a_t | s_t) / pi_old(a_t | s_t)
    loss     = -E[min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)]
               + vf_coef E[(V - target)^2] - ent_coef E[H(pi)]

A and target are computed once per rollout and are constants in the loss.

s'_t is the true successor of s_t, taken before any reset. A time limit (truncated) therefore
bootstraps from V(s'_t), and a terminal state (terminated) does not; both end the trace (done).

Choices that the equations leave open: actor and critic share no parameters, and the gradient of
each is clipped by its own norm; the value loss has neither 1/2 nor clipping; advantages are
standardised within each minibatch; the running statistics of observations and rewards change once
per update, after its gradient steps; actions are stored unclipped, and the environment clips them
to [-1, 1].

    python algos/ppo.py --env cartpole --num-seeds 16
    python algos/ppo.py --env hopper --preset mujoco_ppo_gsde --num-seeds 4

Documentation: docs/ppo.md
"""

import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # the checkout, not algos/, comes first on the import path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends the imports at once

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

import envs
from algos import common, launch
from algos.common import UnitFloat


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "cartpole"  # task, see docs/environments.md
    total_timesteps: PositiveInt = 500_000  # environment steps per seed, all environments together

    # batch
    num_envs: PositiveInt = 16  # parallel environments per seed
    num_steps: PositiveInt = 64  # length of a rollout in each environment
    num_epochs: PositiveInt = 8  # epochs per rollout
    num_minibatches: PositiveInt = 4  # gradient steps per epoch
    # unit of shuffling: single transitions, or rows (one time step of all environments)
    shuffle: Literal["transitions", "rows"] = "transitions"

    # optimiser: Adam, after clipping by global norm
    learning_rate: NonNegativeFloat = 3e-4  # learning rate of every network
    anneal_lr: bool = False  # decrease the learning rate linearly to 0 over the run
    max_grad_norm: PositiveFloat = 0.5  # largest global norm of one network's gradient
    adam_eps: PositiveFloat = 1e-5  # epsilon of Adam

    # objective
    gamma: UnitFloat = 0.99  # discount
    gae_lambda: UnitFloat = 0.95  # lambda of GAE
    clip_eps: NonNegativeFloat = 0.2  # clip range of the ratio
    anneal_clip: bool = False  # decrease the clip range linearly to 0 over the run
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss

    # observations and rewards
    normalize_obs: bool = False  # standardise observations by running statistics
    normalize_reward: bool = False  # divide rewards by the std of the discounted return

    # exploration
    noise_interval: PositiveInt = 1  # steps for which each draw of exploration noise is held

    # networks
    hidden: tuple[PositiveInt, ...] = (64, 64)  # fully connected hidden layers of each network
    activation: Literal["tanh", "relu"] = "tanh"  # activation of the hidden layers
    kernel_init: Literal["orthogonal", "lecun_normal"] = "orthogonal"  # initial weights
    policy_gain: NonNegativeFloat = 0.01  # factor on the initial weights of the policy's last layer
    log_std_init: float = 0.0  # initial log standard deviation of a Gaussian policy

    @property
    def steps_per_update(self) -> int:
        """Environment steps in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    def validate(self) -> None:
        """Raise ValueError for unequal or one-transition minibatches."""
        size = self.steps_per_update if self.shuffle == "transitions" else self.num_steps
        if size % self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} does not divide the {size} {self.shuffle} "
                f"of a rollout (num_envs={self.num_envs}, num_steps={self.num_steps}): "
                "change one of them"
            )
        if self.steps_per_update == self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} makes minibatches of one transition, "
                "whose standardised advantage is 0: lower it"
            )


# --- networks ---


class Torso(nn.Module):
    """Hidden layers: observation [..., obs_size] -> features [..., hidden[-1]].

    If `obs_shape` is [height, width, channels], a 3 x 3 convolution with 16 channels comes first.
    """

    config: Config
    obs_shape: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        activation, init = getattr(nn, self.config.activation), initializer(self.config)
        x = obs.astype(jnp.float32)
        if len(self.obs_shape) == 3:
            x = patches(x.reshape((*obs.shape[:-1], *self.obs_shape)))
            x = activation(nn.Dense(16, kernel_init=init)(x)).reshape((*obs.shape[:-1], -1))
        for size in self.config.hidden:
            x = activation(nn.Dense(size, kernel_init=init)(x))
        return x


class Actor(nn.Module):
    """Policy network: observation [..., obs_size] -> Categorical or Gaussian."""

    config: Config
    obs_shape: tuple[int, ...]
    action_size: int
    discrete: bool

    @nn.compact
    def __call__(self, obs):
        config, size = self.config, self.action_size
        init = initializer(config, config.policy_gain)
        out = nn.Dense(size, kernel_init=init)(Torso(config, self.obs_shape)(obs))
        if self.discrete:
            return common.Categorical(out)
        log_std = self.param("log_std", nn.initializers.constant(config.log_std_init), (size,))
        return common.Gaussian(out, jnp.broadcast_to(log_std, out.shape))


class Critic(nn.Module):
    """State value: observation [..., obs_size] -> [...]."""

    config: Config
    obs_shape: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        x = Torso(self.config, self.obs_shape)(obs)
        return nn.Dense(1, kernel_init=initializer(self.config))(x)[..., 0]


def initializer(config: Config, gain: float = 1.0):
    """Kernel initialiser of the configuration, scaled by `gain`."""
    if config.kernel_init == "orthogonal":
        return nn.initializers.orthogonal(gain)
    return nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal")


def patches(x):
    """3 x 3 patches [..., H - 2, W - 2, 9 C] of images [..., H, W, C].

    A dense layer on patches is a convolution. XLA's own convolution is slow inside a loop on a CPU.
    """
    for axis in (-2, -3):
        size = x.shape[axis] - 2
        parts = [jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(3)]
        x = jnp.concatenate(parts, -1)
    return x


# --- data types ---


class Transition(NamedTuple):
    """One step of the rollout; arrays [T, N, ...]."""

    obs: jax.Array  # as the environment gave it
    action: jax.Array  # unclipped; the environment clips
    log_prob: jax.Array
    reward: jax.Array
    terminated: jax.Array
    done: jax.Array  # terminated or truncated
    valid: jax.Array  # the physics was finite
    next_obs: jax.Array  # true successor, never a reset observation


class Batch(NamedTuple):
    """What the loss needs of a rollout; arrays [T N, ...], or [T, N, ...] if rows are shuffled."""

    obs: jax.Array  # normalised
    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    target: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # keys "actor" and "critic"
    opt_state: dict  # the same keys
    obs_stats: common.Stats
    reward_scale: common.RewardScale
    obs: jax.Array  # [N, obs_size], as the environment gave it
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32, finished updates


# --- targets and losses ---


def gae(reward, value, next_value, terminated, done, gamma, lam):
    """Generalised advantage estimates [T, N] (Schulman et al. 2016, eq. 16); arrays [T, N].

    `next_value` is the value of the true successor. A terminated step does not bootstrap from it,
    and every done step ends the trace.
    """
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value

    def backward(advantage, step):
        delta, done = step
        advantage = delta + gamma * lam * jnp.where(done, 0.0, advantage)
        return advantage, advantage

    return jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, done), reverse=True)[1]


def policy_loss(log_prob, old_log_prob, advantage, clip_eps):
    """Clipped surrogate loss (Schulman et al. 2017, eq. 7) and its metrics; arrays [...]."""
    log_ratio = jnp.clip(log_prob - old_log_prob, -20.0, 20.0)  # so that exp stays finite
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    return loss, {
        "losses/approx_kl": (ratio - 1.0 - log_ratio).mean(),
        "losses/clip_fraction": (jnp.abs(ratio - 1.0) > clip_eps).mean(),
    }


def value_loss(value, target):
    """Mean squared error to the value target."""
    return ((value - target) ** 2).mean()


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environments that a run learns in."""
    env = envs.make(config.env, config.num_envs)
    if len(env.obs_shape) == 3 and min(env.obs_shape[:2]) >= 36:  # the networks are for MinAtar
        raise ValueError(f"{env.name} has large images: run it with algos/p3o.py")
    return env


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose environments, networks and optimiser into the pure functions of a run."""
    actor = Actor(config, env.obs_shape, env.action_size, env.discrete)
    critic = Critic(config, env.obs_shape)
    optimizer = optax.chain(  # no learning rate: see descend
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=config.adam_eps),
    )
    T, N = config.num_steps, config.num_envs

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        params = {
            "actor": actor.init(key_actor, obs[:1]),
            "critic": critic.init(key_critic, obs[:1]),
        }
        return TrainState(
            params=params,
            opt_state={name: optimizer.init(params[name]) for name in params},
            obs_stats=common.Stats.empty((env.obs_size,)),
            reward_scale=common.RewardScale.empty(N),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.int32(0),
        )

    def normalize(obs_stats, obs):
        return obs_stats.normalize(obs.astype(jnp.float32)) if config.normalize_obs else obs

    def noise_of(key, shape):
        """Noise [*shape, action_size] for sampling actions of batch shape `shape`."""
        draw = jax.random.gumbel if env.discrete else jax.random.normal
        return draw(key, (*shape, env.action_size))

    def rollout(state, key):
        """Act for T steps; returns the state, transitions [T, N] and infos [T, N]."""
        key_noise, key_env, key_refresh = jax.random.split(key, 3)
        noise = noise_of(key_noise, (math.ceil(T / config.noise_interval), N))
        env_state = env.refresh(key_refresh, state.env_state)  # redraws cached start states

        def step(carry, x):
            obs, env_state = carry
            t, key = x
            policy = actor.apply(state.params["actor"], normalize(state.obs_stats, obs))
            action = policy.sample(noise[t // config.noise_interval])
            next_obs, env_state, reward, terminated, truncated, info = env.step(
                key, env_state, action
            )
            transition = Transition(
                obs=obs,
                action=action,
                log_prob=policy.log_prob(action),
                reward=reward,
                terminated=terminated,
                done=terminated | truncated,
                valid=~info["env_nan"],
                next_obs=info.pop("final_observation"),
            )
            return (next_obs, env_state), (transition, info)

        xs = jnp.arange(T), jax.random.split(key_env, T)
        (obs, env_state), (traj, info) = jax.lax.scan(step, (state.obs, env_state), xs)
        return state._replace(obs=obs, env_state=env_state), traj, info

    def targets(state, traj) -> Batch:
        """Advantages and value targets of a rollout, computed once before its gradient steps."""
        obs, next_obs = (normalize(state.obs_stats, x) for x in (traj.obs, traj.next_obs))
        value, next_value = (critic.apply(state.params["critic"], x) for x in (obs, next_obs))
        reward = traj.reward * (state.reward_scale.factor() if config.normalize_reward else 1.0)
        reward = jnp.where(traj.valid, reward, value)  # physics not finite: V is its own target
        advantage = gae(
            reward, value, next_value, traj.terminated, traj.done, config.gamma, config.gae_lambda
        )
        target = advantage + value
        # Not finite: the mean advantage, because 0 would favour such steps while V is too high.
        mean = (advantage * traj.valid).sum() / jnp.maximum(traj.valid.sum(), 1)
        advantage = jnp.where(traj.valid, advantage, mean)
        batch = Batch(obs, traj.action, traj.log_prob, advantage, target)
        if config.shuffle == "transitions":
            batch = jax.tree.map(lambda x: x.reshape((T * N, *x.shape[2:])), batch)
        return batch

    def remaining(state):
        """Share of the run that is left, for schedules: 1 in the first update."""
        return jnp.maximum(1.0 - state.update / config.num_updates, 0.0)

    def loss_fn(params, state, batch):
        policy = actor.apply(params["actor"], batch.obs)
        value = critic.apply(params["critic"], batch.obs)
        advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
        clip_eps = config.clip_eps * (remaining(state) if config.anneal_clip else 1.0)
        log_prob = policy.log_prob(batch.action)
        pg_loss, aux = policy_loss(log_prob, batch.log_prob, advantage, clip_eps)
        vf_loss = value_loss(value, batch.target)
        entropy = policy.entropy().mean()
        loss = pg_loss + config.vf_coef * vf_loss - config.ent_coef * entropy
        return loss, aux | {
            "losses/policy_loss": pg_loss,
            "losses/value_loss": vf_loss,
            "losses/entropy": entropy,
        }

    def learning_rate(state):
        return config.learning_rate * (remaining(state) if config.anneal_lr else 1.0)

    def descend(state, grads):
        """One step of the optimiser on each network in `grads`."""
        params, opt_state = dict(state.params), dict(state.opt_state)
        rate = learning_rate(state)
        for name, grad in grads.items():
            direction, opt_state[name] = optimizer.update(grad, opt_state[name], params[name])
            params[name] = jax.tree.map(lambda p, u: p - rate * u, params[name], direction)
        return state._replace(params=params, opt_state=opt_state)

    def gradient_step(state, batch):
        grads, aux = jax.grad(loss_fn, has_aux=True)(state.params, state, batch)
        aux |= {f"losses/{name}_grad_norm": optax.global_norm(grads[name]) for name in grads}
        return descend(state, grads), aux

    def epoch(state, batch, key):
        """Gradient steps on all of the batch, in shuffled minibatches."""
        index = jax.random.permutation(key, len(batch.obs)).reshape(config.num_minibatches, -1)
        step = lambda state, i: gradient_step(state, jax.tree.map(lambda x: x[i], batch))
        return jax.lax.scan(step, state, index)

    def update(state):
        key, key_rollout, key_epochs = jax.random.split(state.key, 3)
        state, traj, info = rollout(state, key_rollout)
        batch = targets(state, traj)
        keys = jax.random.split(key_epochs, config.num_epochs)
        state, aux = jax.lax.scan(lambda state, key: epoch(state, batch, key), state, keys)

        metrics = {name: x.mean() for name, x in aux.items()}
        metrics |= common.run_metrics(info, (state.params, metrics["losses/value_loss"]))
        # advantage = target - V, the critic's error before the gradient steps
        unexplained = batch.advantage.var() / (batch.target.var() + 1e-8)
        metrics["losses/explained_variance"] = 1.0 - unexplained
        metrics["charts/learning_rate"] = jnp.asarray(learning_rate(state))
        state = state._replace(
            obs_stats=state.obs_stats.add(traj.obs),
            reward_scale=state.reward_scale.add(traj.reward, traj.done, config.gamma),
            key=key,
            update=state.update + 1,
        )
        return state, metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], normalize(policy["obs_stats"], obs))
        if greedy:
            return distribution.mode()
        return distribution.sample(noise_of(key, obs.shape[:-1]))

    def policy_of(state):
        return {"actor": state.params["actor"], "obs_stats": state.obs_stats}

    return common.Algo(init, update, act, policy_of)


def make_train(config: Config):
    """The whole run as one pure function; `hparams` overrides fields of TRACEABLE with arrays."""
    common.check(config)
    env = make_env(config)

    def train(key, hparams=None):
        algo = build(common.with_hparams(config, hparams or {}, TRACEABLE), env)
        step = lambda state, _: algo.update(state)
        state, metrics = jax.lax.scan(step, algo.init(key), length=config.num_updates)
        return {"state": state, "metrics": metrics}

    return train


def config_for(env: str, *presets: str, **changes) -> Config:
    """What the command line would run: defaults, the task's preset, `presets`, `changes`."""
    return launch.config_for(Config, PRESETS, env, presets, changes)


# Fields that may be arrays, so that a sweep is one more vmap: no `if`, shape or `act` reads them.
TRACEABLE = (
    "learning_rate", "max_grad_norm", "gamma", "gae_lambda", "clip_eps", "ent_coef", "vf_coef",
)  # fmt: skip

# --- presets ---

# fmt: off
# Values that replace the defaults; docs/presets.md has their origins.
PHYSICS = {
    "total_timesteps": 1_000_000, "num_envs": 64, "num_steps": 64, "num_epochs": 8,
    "num_minibatches": 16, "anneal_lr": True, "normalize_obs": True, "normalize_reward": True,
}
FAST = {**PHYSICS, "learning_rate": 1e-3}
MINATAR = {
    "total_timesteps": 5_000_000, "num_envs": 128, "num_steps": 32, "num_epochs": 4,
    "num_minibatches": 8, "learning_rate": 1e-3, "anneal_lr": True, "ent_coef": 0.01,
    "hidden": (128,), "activation": "relu",
}
PAPER = {  # a named preset follows the task's, so it sets all that a task's preset may change
    "shuffle": "rows", "learning_rate": 3e-4, "anneal_lr": False, "adam_eps": 1e-5, "gamma": 0.99,
    "gae_lambda": 0.95, "clip_eps": 0.2, "anneal_clip": False, "ent_coef": 0.0, "vf_coef": 0.5,
    "normalize_obs": False, "normalize_reward": False, "noise_interval": 1, "hidden": (64, 64),
    "policy_gain": 1.0, "log_std_init": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    # sources of tasks, for those that have no preset of their own
    "gym": {
        "total_timesteps": 1_000_000, "num_envs": 16, "num_steps": 128, "num_epochs": 10,
        "num_minibatches": 16, "anneal_lr": True, "normalize_obs": True, "normalize_reward": True,
        "log_std_init": -1.0,
    },
    **dict.fromkeys(("brax", "playground"), PHYSICS),
    "arm": FAST,
    # tasks
    "cartpole": {
        "total_timesteps": 100_000, "num_envs": 8, "num_steps": 32, "num_epochs": 20,
        "num_minibatches": 1, "learning_rate": 1e-3, "anneal_lr": True, "adam_eps": 1e-3,
        "gamma": 0.98, "gae_lambda": 0.8, "anneal_clip": True, "kernel_init": "lecun_normal",
        "policy_gain": 1.0,
    },
    "pendulum": {
        "total_timesteps": 200_000, "num_envs": 16, "num_steps": 128, "num_epochs": 10,
        "num_minibatches": 16, "learning_rate": 1e-3, "anneal_lr": True, "gamma": 0.9,
        "normalize_reward": True,
    },
    "inverted_pendulum": {**FAST, "total_timesteps": 300_000},
    "inverted_double_pendulum": {**FAST, "total_timesteps": 300_000},
    **dict.fromkeys(("CartpoleBalance", "CartpoleSwingup", "ReacherEasy", "CheetahRun"), FAST),
    "reacher": {**PHYSICS, "gamma": 0.95},
    "ant": {  # with an initial std of 1, actions cost more than standing still earns
        **FAST, "total_timesteps": 20_000_000, "num_envs": 512, "num_steps": 32, "num_epochs": 4,
        "num_minibatches": 4, "learning_rate": 5e-4, "gamma": 0.97, "hidden": (256, 256),
        "log_std_init": -1.0,
    },
    **dict.fromkeys(("breakout", "asterix", "freeway", "space_invaders"), MINATAR),
    # the PPO baselines of Goodall et al. 2026 (BPO); gsde is their name for noise that is held
    "cartpole_ppo": {
        **PAPER, "total_timesteps": 100_000, "num_envs": 8, "num_steps": 32, "num_epochs": 20,
        "num_minibatches": 1, "learning_rate": 1e-3, "anneal_lr": True, "gamma": 0.98,
        "gae_lambda": 0.8, "anneal_clip": True, "activation": "tanh", "kernel_init": "lecun_normal",
    },
    "mujoco_ppo": {
        **PAPER, "total_timesteps": 1_500_000, "num_envs": 1, "num_steps": 2048, "num_epochs": 10,
        "num_minibatches": 32, "ent_coef": 0.001, "activation": "relu", "kernel_init": "orthogonal",
    },
    "mujoco_ppo_gsde": {
        **PAPER, "total_timesteps": 2_000_000, "num_envs": 16, "num_steps": 512, "num_epochs": 20,
        "num_minibatches": 64, "learning_rate": 3e-5, "gae_lambda": 0.9, "clip_eps": 0.4,
        "noise_interval": 4, "hidden": (256, 256), "activation": "relu",
        "kernel_init": "lecun_normal", "log_std_init": -1.0,
    },
    # the PPO baseline of Voelcker et al. 2025 (REPPO), without its clipped value loss and its gain
    # of sqrt(2) for hidden layers
    "dmc_ppo": {
        **PAPER, "total_timesteps": 50_000_000, "num_envs": 2048, "num_steps": 64, "num_epochs": 16,
        "num_minibatches": 32, "shuffle": "transitions", "normalize_obs": True,
        "activation": "tanh", "kernel_init": "orthogonal", "policy_gain": 0.01,
    },
}
# fmt: on


if __name__ == "__main__":
    launch.main("ppo")

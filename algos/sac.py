"""Soft actor-critic (SAC): off-policy, with two critics and a learned temperature.

Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905, in the form that Wu et al. 2019
(https://arxiv.org/abs/1911.11361) use to collect data. One update collects a rollout [T, N], writes
it into the replay buffer, and takes `updates_per_step` gradient steps for each of its environment
steps. A gradient step draws a minibatch uniformly with replacement, moves the target critics Qbar_i
and takes one step of Adam on each loss, in this order:

    Qbar_i          <- (1 - tau) Qbar_i + tau Q_i
    y                = r + gamma (1 - terminated) (min_i Qbar_i(s', a') - alpha log pi(a' | s'))
    critic loss      = sum_i E[(Q_i(s, a) - y)^2]
    policy loss      = E[alpha log pi(b | s) - min_i Q_i(s, b)]
    temperature loss = alpha E[-log pi(c | s) + m A]             (minimised over log alpha)

a', b and c are new draws from the current policy, each tanh(u) with u Gaussian. A is the number of
action dimensions, and -m A is the target entropy (m: `target_entropy_mult`). y is a constant in the
critic loss, alpha in the policy loss, and log pi in the temperature loss.

s' is the true successor of s, taken before any reset. A time limit (truncated) therefore bootstraps
from it, and a terminal state (terminated) does not.

Differences from ppo.py:

1. Minibatches come from a replay buffer, so there is no ratio, no advantage and no epoch.
2. The gradient reaches the policy through the action and the critics.
3. The first `learning_starts` steps take uniform actions, and nothing is learned during them.
4. Actions are continuous. Layers are ReLU with Glorot-uniform weights, the log standard deviation
   is squashed into [-5, 0], and gradients are not clipped.
5. The replay buffer holds observations as the environment gave them. They are normalised when they
   are drawn, and the running statistics change before an update's gradient steps.
6. The losses leave out transitions whose physics was not finite.

    python algos/sac.py --env pendulum --num-seeds 8
    python algos/sac.py --env hopper --num-seeds 4 --partial-at-return 1000

Documentation: docs/sac.md
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
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

import envs
from algos import common, launch
from algos.common import UnitFloat


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "pendulum"  # task, see docs/environments.md
    total_timesteps: PositiveInt = 1_000_000  # environment steps per seed, all environments

    # batch
    num_envs: PositiveInt = 16  # parallel environments per seed
    num_steps: PositiveInt = 8  # length of a rollout in each environment
    updates_per_step: PositiveFloat = 0.5  # gradient steps per environment step (UTD ratio)
    batch_size: PositiveInt = 256  # transitions in a minibatch

    # replay buffer
    buffer_size: PositiveInt = 1_000_000  # capacity in transitions, rounded down to whole rollouts
    learning_starts: NonNegativeInt = 10_000  # steps with uniform actions, before any gradient step

    # optimiser: Adam
    learning_rate: NonNegativeFloat = 5e-4  # learning rate of every network and of the temperature
    polyak_tau: UnitFloat = 0.005  # Polyak step of the target networks

    # objective
    gamma: UnitFloat = 0.99  # discount
    temperature_init: PositiveFloat = 1.0  # initial weight of the entropy (alpha)
    target_entropy_mult: float = 1.0  # target entropy, in nats: minus this times action_size

    # observations and rewards
    normalize_obs: bool = False  # standardise observations by running statistics
    reward_scale: PositiveFloat = 1.0  # factor on rewards; logged returns are not scaled

    # networks
    hidden: tuple[PositiveInt, ...] = (200, 200)  # fully connected hidden layers of the policy
    critic_hidden: tuple[PositiveInt, ...] = (300, 300)  # hidden layers of each critic

    @property
    def steps_per_update(self) -> int:
        """Environment steps in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    @property
    def gradient_steps(self) -> int:
        """Gradient steps in one update."""
        return round(self.updates_per_step * self.steps_per_update)

    @property
    def num_slots(self) -> int:
        """Rollouts in the replay buffer."""
        return self.buffer_size // self.steps_per_update

    @property
    def random_updates(self) -> int:
        """Updates at the start that take uniform actions and learn nothing."""
        return math.ceil(self.learning_starts / self.steps_per_update)

    def validate(self) -> None:
        """Raise ValueError if nothing would be learned, or the replay buffer holds no rollout."""
        rollout = f"a rollout of {self.num_envs} x {self.num_steps} steps"
        steps = self.updates_per_step * self.steps_per_update
        if self.gradient_steps < 1 or not math.isclose(steps, self.gradient_steps):
            raise ValueError(
                f"updates_per_step={self.updates_per_step:g} gives {steps:g} gradient steps after "
                f"{rollout}: choose it so that this is a whole number, 1 or more"
            )
        if self.num_slots < 1:
            raise ValueError(
                f"buffer_size={self.buffer_size} is less than {rollout}: raise it to "
                f"{self.steps_per_update}, or shorten the rollout"
            )
        if self.random_updates >= self.num_updates:
            raise ValueError(
                f"learning_starts={self.learning_starts}, rounded up to whole rollouts, leaves no "
                f"rollout of total_timesteps={self.total_timesteps} to learn from: lower it"
            )


# --- networks ---

MIN_LOG_STD, MAX_LOG_STD = -5.0, 0.0  # of the policy, before tanh


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


class Actor(nn.Module):
    """Policy network: observation [..., obs_size] -> TanhGaussian."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs):
        out = MLP(self.config.hidden, 2 * self.action_size)(obs)
        mean, raw = jnp.split(out, 2, -1)
        log_std = MIN_LOG_STD + 0.5 * (MAX_LOG_STD - MIN_LOG_STD) * (jnp.tanh(raw) + 1.0)
        return common.TanhGaussian(mean, jnp.exp(log_std))


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


class Transition(NamedTuple):
    """One step; arrays [T, N, ...], [S T N, ...] in the replay buffer, [B, ...] in a minibatch."""

    obs: jax.Array  # as the environment gave it; normalised in a minibatch
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    next_obs: jax.Array  # true successor, never a reset observation
    valid: jax.Array  # the physics was finite


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # keys "actor", "critic" and "temperature", which is log alpha
    target_params: dict  # key "critic"
    opt_state: dict  # the same keys as params
    replay: Transition  # the newest num_slots = S rollouts, [S T N, ...]
    obs_stats: common.Stats
    obs: jax.Array  # [N, obs_size], as the environment gave it
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32, finished updates


# --- targets and losses ---


def soft_target(reward, terminated, next_value, log_prob, temperature, gamma):
    """Targets [B] of the critics; no gradient passes through them.

    `next_value` [2, B] holds the target critics' values of the policy's actions at the true
    successor, and `log_prob` [B] is that of these actions. A terminated step does not bootstrap.
    """
    value = next_value.min(0) - temperature * log_prob
    return jax.lax.stop_gradient(reward + gamma * jnp.where(terminated, 0.0, value))


def critic_loss(value, target, valid):
    """Sum over critics of the mean squared error of values [2, B] to targets [B].

    A transition that is not `valid` [B] counts as 0, here and in the other losses.
    """
    return jnp.where(valid, (value - target) ** 2, 0.0).mean(-1).sum()


def policy_loss(value, log_prob, temperature, valid):
    """Mean of alpha log pi minus the smaller of the values [2, B] of the policy's actions.

    `log_prob` [B] is log pi of these actions, and `temperature` is alpha.
    """
    loss = jax.lax.stop_gradient(temperature) * log_prob - value.min(0)
    return jnp.where(valid, loss, 0.0).mean()


def temperature_loss(temperature, log_prob, target_entropy, valid):
    """Loss whose gradient step raises the temperature while the entropy is below its target.

    `log_prob` [B] is log pi of actions that the policy drew.
    """
    surplus = jax.lax.stop_gradient(-log_prob - target_entropy)
    return temperature * jnp.where(valid, surplus, 0.0).mean()


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environments that a run learns in."""
    env = envs.make(config.env, config.num_envs)
    if env.discrete:
        raise ValueError(
            f"{env.name} has discrete actions, and SAC needs continuous ones: "
            "run it with ppo.py, bpo.py, p3o.py or reppo_discrete.py"
        )
    return env


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose environments, networks and optimiser into the pure functions of a run."""
    actor = Actor(config, env.action_size)
    critic = Critic(config)
    optimizer = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-7)  # no learning rate: see descend
    T, N, S = config.num_steps, config.num_envs, config.num_slots
    target_entropy = -config.target_entropy_mult * env.action_size

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        action, scalar, flag = jnp.zeros((1, env.action_size)), jnp.zeros(1), jnp.zeros(1, bool)
        row = Transition(obs, action, scalar, flag, obs, flag)  # for shapes and types
        params = {
            "actor": actor.init(key_actor, obs[:1]),
            "critic": critic.init(key_critic, obs[:1], action),
            "temperature": jnp.log(jnp.float32(config.temperature_init)),
        }
        empty = lambda x: jnp.zeros((S * T * N, *x.shape[1:]), x.dtype)
        return TrainState(
            params=params,
            target_params={"critic": params["critic"]},
            opt_state={name: optimizer.init(params[name]) for name in params},
            replay=jax.tree.map(empty, row),
            obs_stats=common.Stats.empty((env.obs_size,)),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.int32(0),
        )

    def normalize(obs_stats, obs):
        return obs_stats.normalize(obs.astype(jnp.float32)) if config.normalize_obs else obs

    def noise_of(key, shape):
        """Noise [*shape, action_size] for sampling actions of batch shape `shape`."""
        return jax.random.normal(key, (*shape, env.action_size))

    def rollout(state, key):
        """Act for T steps; returns the state, transitions [T, N] and infos [T, N]."""
        key_noise, key_uniform, key_env, key_refresh = jax.random.split(key, 4)
        noise = noise_of(key_noise, (T, N))
        uniform = jax.random.uniform(key_uniform, noise.shape, minval=-1.0, maxval=1.0)
        env_state = env.refresh(key_refresh, state.env_state)  # redraws cached start states

        def step(carry, x):
            obs, env_state = carry
            noise, uniform, key = x
            policy = actor.apply(state.params["actor"], normalize(state.obs_stats, obs))
            action = jnp.tanh(policy.sample(noise))
            action = jnp.where(state.update < config.random_updates, uniform, action)
            next_obs, env_state, reward, terminated, _, info = env.step(key, env_state, action)
            transition = Transition(
                obs=obs,
                action=action,
                reward=reward,
                terminated=terminated,
                next_obs=info.pop("final_observation"),
                valid=~info["env_nan"],
            )
            return (next_obs, env_state), (transition, info)

        xs = noise, uniform, jax.random.split(key_env, T)
        (obs, env_state), (traj, info) = jax.lax.scan(step, (state.obs, env_state), xs)
        return state._replace(obs=obs, env_state=env_state), traj, info

    def store(state, traj):
        """Replace the oldest rollout in the replay buffer."""
        row = (state.update % S) * T * N
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)
        rows = jax.tree.map(lambda x: x.reshape((T * N, *x.shape[2:])), traj)
        return state._replace(replay=jax.tree.map(write, state.replay, rows))

    def sample(state, key) -> Transition:
        """A minibatch of the transitions in the replay buffer, with normalised observations."""
        filled = jnp.minimum(state.update + 1, S) * T * N
        index = jax.random.randint(key, (config.batch_size,), 0, filled)
        batch = jax.tree.map(lambda x: x[index], state.replay)
        obs, next_obs = (normalize(state.obs_stats, x) for x in (batch.obs, batch.next_obs))
        return batch._replace(obs=obs, next_obs=next_obs)

    def draw(params, obs, key):
        """New actions of the policy at `obs`, and their log-probabilities."""
        policy = actor.apply(params, obs)
        u = policy.sample(noise_of(key, obs.shape[:-1]))
        return jnp.tanh(u), policy.log_prob(u)

    def critic_loss_fn(params, state, batch, key):
        temperature = jnp.exp(state.params["temperature"])
        action, log_prob = draw(state.params["actor"], batch.next_obs, key)
        next_value = critic.apply(state.target_params["critic"], batch.next_obs, action)
        reward = config.reward_scale * batch.reward
        target = soft_target(
            reward, batch.terminated, next_value, log_prob, temperature, config.gamma
        )
        value = critic.apply(params, batch.obs, batch.action)
        loss = critic_loss(value, target, batch.valid)
        return loss, {
            "losses/qf_loss": loss,
            "losses/q_data": value.mean(),
            "losses/target": target.mean(),
        }

    def policy_loss_fn(params, state, batch, key):
        temperature = jnp.exp(state.params["temperature"])
        action, log_prob = draw(params, batch.obs, key)
        value = critic.apply(state.params["critic"], batch.obs, action)
        loss = policy_loss(value, log_prob, temperature, batch.valid)
        return loss, {
            "losses/policy_loss": loss,
            "losses/q_policy": value.mean(),
            "losses/entropy": -log_prob.mean(),
            "losses/saturated_fraction": (jnp.abs(action) > 0.99).mean(),
        }

    def temperature_loss_fn(log_temperature, state, batch, key):
        temperature = jnp.exp(log_temperature)
        _, log_prob = draw(state.params["actor"], batch.obs, key)
        loss = temperature_loss(temperature, log_prob, target_entropy, batch.valid)
        return loss, {"losses/temperature": temperature}

    # In the order of a gradient step; the gradient is with respect to the first argument.
    losses = {"critic": critic_loss_fn, "actor": policy_loss_fn, "temperature": temperature_loss_fn}

    def descend(state, grads):
        """One step of the optimiser on each network in `grads`."""
        params, opt_state = dict(state.params), dict(state.opt_state)
        rate = config.learning_rate
        for name, grad in grads.items():
            direction, opt_state[name] = optimizer.update(grad, opt_state[name], params[name])
            params[name] = jax.tree.map(lambda p, u: p - rate * u, params[name], direction)
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

    def learn(state, key):
        """The update's gradient steps; returns sums of their metrics too.

        The launcher divides all `losses/` metrics by `losses/count`, and leaves them out where
        it is 0. A metric of the update, not of a gradient step, goes into another group.
        """
        # `update` is the same for all seeds, so `vmap` does not batch the loop.
        count = jnp.where(state.update < config.random_updates, 0, config.gradient_steps)

        def step(i, carry):
            state, sums = carry
            key_batch, key_step = jax.random.split(jax.random.fold_in(key, i))
            state, aux = gradient_step(state, sample(state, key_batch), key_step)
            return state, jax.tree.map(jnp.add, sums, aux)

        aux = jax.eval_shape(gradient_step, state, jax.eval_shape(sample, state, key), key)[1]
        sums = {k: jnp.zeros(()) for k in aux}
        state, sums = jax.lax.fori_loop(0, count, step, (state, sums))
        return state, sums | {"losses/count": count}

    def update(state):
        key, key_rollout, key_learn = jax.random.split(state.key, 3)
        state, traj, info = rollout(state, key_rollout)
        state = store(state, traj)._replace(obs_stats=state.obs_stats.add(traj.obs))
        state, metrics = learn(state, key_learn)

        metrics |= common.run_metrics(info, (state.params, metrics["losses/qf_loss"]))
        metrics["charts/learning_rate"] = jnp.asarray(config.learning_rate)
        return state._replace(key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], normalize(policy["obs_stats"], obs))
        if greedy:
            return jnp.tanh(distribution.mean)
        return jnp.tanh(distribution.sample(noise_of(key, obs.shape[:-1])))

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
    "learning_rate", "polyak_tau", "gamma", "temperature_init", "target_entropy_mult",
    "reward_scale",
)  # fmt: skip

# --- presets ---

# fmt: off
# Values that replace the defaults; docs/presets.md has their origins.
SMALL = {
    "total_timesteps": 100_000, "num_envs": 8, "num_steps": 4, "updates_per_step": 0.25,
    "batch_size": 128, "buffer_size": 100_000, "learning_starts": 1_000, "learning_rate": 1e-3,
    "hidden": (64, 64), "critic_hidden": (64, 64),
}
PHYSICS = {"num_envs": 128, "updates_per_step": 0.25}
PRESETS: dict[str, dict[str, Any]] = {
    # sources of tasks, for those that have no preset of their own
    "gym": {
        "num_envs": 8, "num_steps": 1, "updates_per_step": 1.0, "learning_rate": 3e-4,
        "hidden": (256, 256), "critic_hidden": (256, 256),
    },
    **dict.fromkeys(("brax", "playground"), PHYSICS),
    "arm": {  # reward_scale makes a touch worth 1, not 0.04
        **SMALL, "buffer_size": 400_000, "normalize_obs": True, "reward_scale": 25.0,
    },
    # tasks
    **dict.fromkeys(("pendulum", "inverted_pendulum", "reacher"), SMALL),
}
# fmt: on


if __name__ == "__main__":
    launch.main("sac")

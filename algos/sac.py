"""Soft actor-critic (SAC): a replay of everything, two critics, a temperature that follows entropy.

Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905, in the form that the behaviour regularised
methods of Wu et al. 2019 (https://arxiv.org/abs/1911.11361) build on. One update collects a rollout
[T, N] into a ring of transitions and then takes `updates_per_step` gradient steps for each of its
environment steps, each on a minibatch drawn uniformly with replacement, in this order:

    Qbar_i  <- (1 - tau) Qbar_i + tau Q_i
    y       =  r + gamma (1 - terminated) (min_i Qbar_i(s', a') - alpha log pi(a' | s'))
    Q:         sum_i E[(Q_i(s, a) - y)^2]
    pi:        E[alpha log pi(b | s) - min_i Q_i(s, b)]
    alpha:     alpha E[-log pi(c | s) + m A]

where a', b and c are drawn anew from the policy as it then is, a = tanh(u) with Gaussian u, A is
the dimension of actions, and alpha is trained as its logarithm. Actions are continuous.

Differences from ppo.py:

1. Data are replayed, so that there is no ratio, no advantage and no epoch.
2. The gradient of the policy goes through the action into the critics.
3. Only a failure ends a return: s' is the true successor, whose value a time limit does not cut.
4. The first `learning_starts` steps act uniformly, and nothing is learned during them.
5. Glorot-uniform weights, ReLU, log-deviations squashed into [-5, 0]; gradients are not clipped.
6. The replay keeps observations as the environment gave them.

    python algos/sac.py --env pendulum --num-seeds 8
    python algos/sac.py --env hopper --num-seeds 4 --stop-at-return 1000

Documentation: docs/sac.md
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import envs
from algos import common, launch


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "pendulum"  # task, see docs/environments.md
    total_timesteps: int = 1_000_000  # environment steps per seed, all environments together

    # batch
    num_envs: int = 16  # parallel environments per seed
    num_steps: int = 8  # length of a rollout in each environment
    updates_per_step: float = 0.5  # gradient steps per environment step (update-to-data ratio)
    batch_size: int = 256  # transitions of a gradient step

    # replay
    buffer_size: int = 1_000_000  # most recent transitions that are kept
    learning_starts: int = 10_000  # steps with uniform actions before the first gradient step

    # optimiser: Adam, for the critics, the actor and the temperature alike
    learning_rate: float = 5e-4  # step size of Adam
    polyak_tau: float = 0.005  # step of the target critics towards the critics

    # objective
    gamma: float = 0.99  # discount
    temperature_init: float = 1.0  # initial weight of the entropy (alpha)
    target_entropy_mult: float = 1.0  # mean entropy is held at minus this for each action

    # observations and rewards
    normalize_obs: bool = False  # standardise observations by running statistics
    reward_scale: float = 1.0  # factor on the rewards, not on the logged returns

    # networks
    hidden: tuple[int, ...] = (200, 200)  # hidden layers of the actor
    critic_hidden: tuple[int, ...] = (300, 300)  # hidden layers of each critic

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
        """Gradient steps of an update."""
        return round(self.updates_per_step * self.steps_per_update)

    @property
    def num_slots(self) -> int:
        """Rollouts in the replay."""
        return self.buffer_size // self.steps_per_update

    @property
    def random_updates(self) -> int:
        """Updates that act uniformly and learn nothing."""
        return math.ceil(self.learning_starts / self.steps_per_update)

    def validate(self) -> None:
        """Raise ValueError if nothing would be learned, or the replay holds no rollout."""
        rollout = f"a rollout of {self.num_envs} x {self.num_steps} steps"
        steps = self.updates_per_step * self.steps_per_update
        if self.gradient_steps < 1 or not math.isclose(steps, self.gradient_steps):
            raise ValueError(
                f"updates_per_step={self.updates_per_step:g} of {rollout} makes {steps:g} gradient "
                "steps: choose it so that they are a whole number, 1 or more"
            )
        if self.num_slots < 1:
            raise ValueError(
                f"buffer_size={self.buffer_size} is less than {rollout}: raise it to "
                f"{self.steps_per_update}, or shorten the rollout"
            )
        if self.random_updates >= self.num_updates:
            raise ValueError(
                f"learning_starts={self.learning_starts} leaves nothing of "
                f"total_timesteps={self.total_timesteps} to learn in: lower it"
            )


# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("learning_rate", "polyak_tau", "gamma", "temperature_init", "target_entropy_mult")
TRACEABLE += ("reward_scale",)

# --- presets ---

# fmt: off
# Origins are in docs/presets.md.
SMALL = {
    "total_timesteps": 100_000, "num_envs": 8, "num_steps": 4, "updates_per_step": 0.25,
    "batch_size": 128, "buffer_size": 100_000, "learning_starts": 1_000, "learning_rate": 1e-3,
    "hidden": (64, 64), "critic_hidden": (64, 64),
}
PHYSICS = {"num_envs": 128, "updates_per_step": 0.25}
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "pendulum": SMALL, "inverted_pendulum": SMALL, "reacher": SMALL,
    # A touch pays 0.04, here 1, and all steps are kept.
    "arm": {**SMALL, "buffer_size": 400_000, "normalize_obs": True, "reward_scale": 25.0},
    **dict.fromkeys(("hopper", "walker2d", "halfcheetah", "ant"), PHYSICS),
}
# fmt: on


# --- networks ---

MIN_LOG_STD, MAX_LOG_STD = -5.0, 0.0


class MLP(nn.Module):
    """Fully connected: hidden layers with ReLU, then a linear layer of `out` units."""

    hidden: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x):
        for size in self.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=nn.initializers.glorot_uniform())(x))
        return nn.Dense(self.out, kernel_init=nn.initializers.glorot_uniform())(x)


class Actor(nn.Module):
    """Policy network: observation [..., obs_size] -> common.TanhGaussian."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs):
        out = MLP(self.config.hidden, 2 * self.action_size)(obs)
        mean, raw = jnp.split(out, 2, -1)
        log_std = MIN_LOG_STD + 0.5 * (MAX_LOG_STD - MIN_LOG_STD) * (jnp.tanh(raw) + 1.0)
        return common.TanhGaussian(mean, jnp.exp(log_std))


class Critic(nn.Module):
    """Two values [2, ...] of observation [..., obs_size] and action [..., action_size]."""

    config: Config

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )
        x = jnp.concatenate([obs, action], -1)
        return ensemble(self.config.critic_hidden, 1)(x)[..., 0]


# --- data types ---


class Transition(NamedTuple):
    """Environment steps; arrays [T, N, ...] of a rollout, [rows, ...] of the replay."""

    obs: jax.Array  # as the environment gave it
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    next_obs: jax.Array  # true successor, never a reset observation
    valid: jax.Array  # the physics was finite


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "actor" and "critic", and the logarithm of the "temperature"
    target_params: dict  # of the target critics
    opt_state: dict  # of each of the three
    replay: Transition  # [S T N, ...], a ring of S rollouts
    obs_stats: common.Stats
    obs: jax.Array  # [N, obs_size]
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32


# --- targets and losses ---


def soft_target(reward, terminated, next_value, log_prob, temperature, gamma):
    """Targets [B] from the values [2, B] of the target critics at actions of the policy.

    No gradient passes. Only a terminated step has no successor: a truncated one is bootstrapped.
    """
    soft_value = next_value.min(0) - temperature * log_prob
    return jax.lax.stop_gradient(reward + jnp.where(terminated, 0.0, gamma) * soft_value)


def critic_loss(value, target, valid):
    """Sum over critics of the mean squared error of values [2, B] to targets [B]."""
    return jnp.where(valid, (value - target) ** 2, 0.0).mean(-1).sum()


def policy_loss(value, log_prob, temperature, valid):
    """Mean over states of entropy's cost minus the smaller of the values [2, B]."""
    loss = jax.lax.stop_gradient(temperature) * log_prob - value.min(0)
    return jnp.where(valid, loss, 0.0).mean()


def temperature_loss(temperature, log_prob, target_entropy, valid):
    """Loss whose gradient raises the temperature while the entropy is below its target."""
    surplus = jax.lax.stop_gradient(-log_prob - target_entropy)
    return temperature * jnp.where(valid, surplus, 0.0).mean()


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, config.num_envs)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions, and SAC needs continuous ones")
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    actor, critic = Actor(config, env.action_size), Critic(config)
    optimizer = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-7)
    T, N, A, S = config.num_steps, config.num_envs, env.action_size, config.num_slots
    target_entropy = -config.target_entropy_mult * A

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        sample, action = jnp.zeros((1, env.obs_size)), jnp.zeros((1, A))
        params = {
            "actor": actor.init(key_actor, sample),
            "critic": critic.init(key_critic, sample, action),
            "temperature": jnp.log(jnp.float32(config.temperature_init)),
        }
        empty = lambda x: jnp.zeros((S * T * N, *x.shape[1:]), x.dtype)
        scalar, flag = jnp.zeros((1,)), jnp.zeros((1,), bool)
        return TrainState(
            params=params,
            target_params=params["critic"],
            opt_state={name: optimizer.init(params[name]) for name in params},
            replay=jax.tree.map(empty, Transition(obs, action, scalar, flag, obs, flag)),
            obs_stats=common.Stats.empty((env.obs_size,)),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.zeros((), jnp.int32),
        )

    def normalize(obs_stats, obs):
        obs = obs.astype(jnp.float32)
        return obs_stats.normalize(obs) if config.normalize_obs else obs

    def draw(actor_params, obs, key):
        """Actions of the policy and their log-probabilities."""
        policy = actor.apply(actor_params, obs)
        u = policy.sample(jax.random.normal(key, policy.mean.shape))
        return jnp.tanh(u), policy.log_prob(u)

    def rollout(state, key):
        """Act for T steps; returns state, transitions and infos [T, N] of the environments."""
        key_noise, key_uniform, key_env, key_refresh = jax.random.split(key, 4)
        env_state = env.refresh(key_refresh, state.env_state)
        noise = jax.random.normal(key_noise, (T, N, A))
        uniform = jax.random.uniform(key_uniform, (T, N, A), minval=-1.0, maxval=1.0)

        def step(carry, x):
            obs, env_state = carry
            noise, uniform, key = x
            policy = actor.apply(state.params["actor"], normalize(state.obs_stats, obs))
            learned = jnp.tanh(policy.sample(noise))
            action = jnp.where(state.update < config.random_updates, uniform, learned)
            next_obs, env_state, reward, terminated, _, info = env.step(key, env_state, action)
            final_obs = info.pop("final_observation")
            valid = ~info["env_nan"]
            transition = Transition(obs, action, reward, terminated, final_obs, valid)
            return (next_obs, env_state), (transition, info)

        xs = noise, uniform, jax.random.split(key_env, T)
        (obs, env_state), (traj, info) = jax.lax.scan(step, (state.obs, env_state), xs)
        obs_stats = state.obs_stats.add(traj.obs)
        return state._replace(obs=obs, obs_stats=obs_stats, env_state=env_state), traj, info

    def critic_loss_fn(critic_params, params, target_params, batch, key):
        action, log_prob = draw(params["actor"], batch.next_obs, key)
        next_value = critic.apply(target_params, batch.next_obs, action)
        target = soft_target(
            config.reward_scale * batch.reward, batch.terminated, next_value, log_prob,
            jnp.exp(params["temperature"]), config.gamma,
        )  # fmt: skip
        value = critic.apply(critic_params, batch.obs, batch.action)
        loss = critic_loss(value, target, batch.valid)
        return loss, {
            "losses/qf_loss": loss,
            "losses/q_data": value.mean(),
            "losses/target": target.mean(),
        }

    def policy_loss_fn(actor_params, params, batch, key):
        action, log_prob = draw(actor_params, batch.obs, key)
        value = critic.apply(params["critic"], batch.obs, action)
        loss = policy_loss(value, log_prob, jnp.exp(params["temperature"]), batch.valid)
        return loss, {
            "losses/policy_loss": loss,
            "losses/q_policy": value.mean(),
            "losses/entropy": -log_prob.mean(),
            "losses/saturated_fraction": (jnp.abs(action) > 0.99).mean(),
        }

    def temperature_loss_fn(log_temperature, params, batch, key):
        _, log_prob = draw(params["actor"], batch.obs, key)
        temperature = jnp.exp(log_temperature)
        loss = temperature_loss(temperature, log_prob, target_entropy, batch.valid)
        return loss, {"losses/temperature": temperature}

    def descend(name, loss_fn, params, opt_state, *args):
        """One step of Adam on one of the three: params, opt_state, metrics."""
        grads, aux = jax.grad(loss_fn, has_aux=True)(params[name], params, *args)
        direction, new = optimizer.update(grads, opt_state[name])
        move = lambda p, u: p - config.learning_rate * u
        params = params | {name: jax.tree.map(move, params[name], direction)}
        aux[f"losses/{name}_grad_norm"] = optax.global_norm(grads)
        return params, opt_state | {name: new}, aux

    def gradient_step(params, target_params, opt_state, batch, key):
        """Target critics, critics, actor, temperature: each sees what was updated before it."""
        key_critic, key_actor, key_temperature = jax.random.split(key, 3)
        online = params["critic"]
        target_params = optax.incremental_update(online, target_params, config.polyak_tau)
        params, opt_state, aux = descend(
            "critic", critic_loss_fn, params, opt_state, target_params, batch, key_critic
        )
        params, opt_state, actor_aux = descend(
            "actor", policy_loss_fn, params, opt_state, batch, key_actor
        )
        params, opt_state, temperature_aux = descend(
            "temperature", temperature_loss_fn, params, opt_state, batch, key_temperature
        )
        return params, target_params, opt_state, aux | actor_aux | temperature_aux

    def sample(state, key):
        """A minibatch of the transitions that the replay holds."""
        filled = jnp.minimum(state.update + 1, S) * T * N
        index = jax.random.randint(key, (config.batch_size,), 0, filled)
        batch = jax.tree.map(lambda x: x[index], state.replay)
        obs, next_obs = (normalize(state.obs_stats, x) for x in (batch.obs, batch.next_obs))
        return batch._replace(obs=obs, next_obs=next_obs)

    def fit(state, key):
        """All gradient steps of an update: state, sums of metrics and their number."""

        def one(learned, key):
            key_batch, key_step = jax.random.split(key)
            return gradient_step(*learned, sample(state, key_batch), key_step)

        def step(i, carry):
            learned, sums = carry
            *learned, aux = one(learned, jax.random.fold_in(key, i))
            return learned, jax.tree.map(jnp.add, sums, aux)

        learned = [state.params, state.target_params, state.opt_state]
        aux = jax.eval_shape(one, learned, key)[-1]
        # A loop of length 0 at first, not a branch: the length is the same for all seeds.
        count = jnp.where(state.update < config.random_updates, 0, config.gradient_steps)
        carry = learned, {name: jnp.zeros(()) for name in aux}
        learned, sums = jax.lax.fori_loop(0, count, step, carry)
        params, target_params, opt_state = learned
        state = state._replace(params=params, target_params=target_params, opt_state=opt_state)
        return state, sums | {"losses/count": count}

    def update(state):
        key, key_rollout, key_fit = jax.random.split(state.key, 3)
        state, traj, info = rollout(state, key_rollout)
        row = (state.update % S) * T * N
        flat = jax.tree.map(lambda x: x.reshape((T * N, *x.shape[2:])), traj)
        write = lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new, row, 0)
        state = state._replace(replay=jax.tree.map(write, state.replay, flat))
        state, metrics = fit(state, key_fit)

        metrics |= common.run_metrics(info, (state.params, metrics["losses/qf_loss"]))
        metrics["charts/learning_rate"] = jnp.asarray(config.learning_rate)
        return state._replace(key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], normalize(policy["obs_stats"], obs))
        if greedy:
            return jnp.tanh(distribution.mean)
        return jnp.tanh(distribution.sample(jax.random.normal(key, distribution.mean.shape)))

    def policy_of(state):
        return {"actor": state.params["actor"], "obs_stats": state.obs_stats}

    return common.Algo(init, update, act, policy_of)


def make_train(config: Config):
    """The whole run as one pure function; `hparams` overrides fields of TRACEABLE with arrays."""
    build(config)  # fails here, not while tracing, if the configuration is wrong

    def train(key, hparams=None):
        algo = build(replace(config, **common.traceable(hparams or {}, TRACEABLE)))
        step = lambda state, _: algo.update(state)
        state, metrics = jax.lax.scan(step, algo.init(key), length=config.num_updates)
        return {"state": state, "metrics": metrics}

    return train


def main():
    """Train from the command line."""
    launch.main("sac", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

"""Proximal policy optimisation (PPO), the reference that every other file is read against.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347. One update collects a rollout [T, N] with
the policy pi_old and takes several epochs of minibatch steps on

    delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
    A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}                 (GAE)
    x       = pi(a_t | s_t) / pi_old(a_t | s_t)
    loss    = -E[min(x A, clip(x, 1 - eps, 1 + eps) A)] + vf_coef E[(A + V_old - V)^2] - ent_coef H

where s'_t is the true successor, so a time limit (truncated) is bootstrapped and a failure
(terminated) is not. Choices that the equations leave open:

1. Actor and critic share nothing; each gradient is clipped by its own global norm.
2. The value loss is a plain mean square, without 1/2 and without clipping.
3. Advantages are normalised per minibatch.
4. Schedules follow training progress (finished updates over all updates), not optimiser counts.
5. Observation and reward statistics are in the train state; one snapshot serves a whole update.
6. Actions are stored unclipped; the environment clips them to [-1, 1].
7. Exploration noise of continuous actions is independent per step ("iid"), held for a few steps
   ("sticky"), or a function of the state ("gsde", Raffin et al. 2021).

    python algos/ppo.py --env cartpole --num-seeds 16
    python algos/ppo.py --env hopper --preset mujoco_ppo_gsde --num-seeds 4

Documentation: docs/ppo.md
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import envs
from algos import common, launch


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "cartpole"  # task, see docs/environments.md
    total_timesteps: int = 500_000  # environment steps per seed, all parallel environments together

    # batch
    num_envs: int = 16  # parallel environments per seed
    num_steps: int = 64  # length of a rollout in each environment
    num_epochs: int = 8  # passes over a rollout
    num_minibatches: int = 4  # gradient steps per pass
    shuffle: Literal["transitions", "rows"] = "transitions"  # rows: of all environments at a time

    # optimiser: Adam after clipping by global norm, for the actor and the critic alike
    learning_rate: float = 3e-4  # step size of Adam
    anneal_lr: bool = False  # decrease the step size linearly to 0 over the run
    max_grad_norm: float = 0.5  # largest global norm of the gradient of one network
    adam_eps: float = 1e-5  # epsilon of Adam

    # objective
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # decay of the advantage's trace
    clip_eps: float = 0.2  # clip range of the ratio
    anneal_clip: bool = False  # decrease the clip range linearly to 0 over the run
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    normalize_advantage: bool = True  # standardise advantages within each minibatch

    # observations and rewards
    normalize_obs: bool = False  # standardise observations by running statistics
    normalize_reward: bool = False  # divide rewards by the deviation of the discounted return

    # exploration, continuous actions only
    # noise drawn every step, held for some steps, or linear in the actor's last hidden layer
    exploration: Literal["iid", "sticky", "gsde"] = "iid"
    noise_interval: int = 1  # steps for which noise is held; -1: the whole rollout

    # networks
    hidden: tuple[int, ...] = (64, 64)  # hidden layers of the actor and of the critic
    activation: Literal["tanh", "relu", "swish"] = "tanh"  # activation of the hidden layers
    kernel_init: Literal["orthogonal", "lecun_normal"] = "orthogonal"  # of every layer
    policy_gain: float = 0.01  # factor on the initial weights of the policy's output layer
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
        """Raise ValueError if a rollout cannot be cut into equal minibatches or noise not held."""
        size = self.steps_per_update if self.shuffle == "transitions" else self.num_steps
        if size % self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} does not divide the {size} {self.shuffle} "
                f"of a rollout (num_envs={self.num_envs}, num_steps={self.num_steps}): "
                "change one of them"
            )
        if self.noise_interval != -1 and self.noise_interval < 1:
            raise ValueError(f"noise_interval={self.noise_interval}: at least 1, or -1, is needed")


# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("learning_rate", "max_grad_norm", "gamma", "gae_lambda", "clip_eps", "ent_coef")

# --- presets ---

# fmt: off
# Origins are in docs/presets.md. First the two families that several presets share.
PHYSICS = {
    "num_envs": 64, "num_steps": 64, "num_epochs": 8, "num_minibatches": 16, "anneal_lr": True,
    "normalize_obs": True, "normalize_reward": True, "total_timesteps": 1_000_000,
}
FAST = {**PHYSICS, "learning_rate": 1e-3}
MINATAR = {
    "total_timesteps": 5_000_000, "num_envs": 128, "num_steps": 32, "num_epochs": 4,
    "num_minibatches": 8, "learning_rate": 1e-3, "anneal_lr": True, "ent_coef": 0.01,
    "hidden": (128, 128), "activation": "relu",
}
PAPER = {  # everything a task's own preset may have changed, back to the published default
    "shuffle": "rows", "learning_rate": 3e-4, "anneal_lr": False, "gamma": 0.99, "gae_lambda": 0.95,
    "clip_eps": 0.2, "anneal_clip": False, "ent_coef": 0.0, "vf_coef": 0.5, "normalize_obs": False,
    "normalize_reward": False, "exploration": "iid", "noise_interval": 1, "hidden": (64, 64),
    "policy_gain": 1.0, "log_std_init": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "cartpole": {
        "total_timesteps": 200_000, "num_envs": 32, "num_steps": 32, "num_epochs": 4,
        "num_minibatches": 4, "learning_rate": 2.5e-3, "anneal_lr": True,
    },
    "pendulum": {
        "total_timesteps": 200_000, "num_envs": 16, "num_steps": 128, "num_epochs": 10,
        "num_minibatches": 16, "gamma": 0.9, "learning_rate": 1e-3, "anneal_lr": True,
        "normalize_reward": True,
    },
    "inverted_pendulum": {**FAST, "total_timesteps": 300_000},
    "inverted_double_pendulum": {**FAST, "total_timesteps": 300_000},
    **dict.fromkeys(("CartpoleBalance", "CartpoleSwingup", "ReacherEasy", "CheetahRun"), FAST),
    **dict.fromkeys(("hopper", "walker2d", "halfcheetah"), PHYSICS),
    "reacher": {**PHYSICS, "gamma": 0.95}, "arm": FAST,
    "ant": {  # a deviation of 1 at first, and actions would cost more than standing pays
        **PHYSICS, "num_envs": 512, "num_steps": 32, "num_epochs": 4, "hidden": (256, 256),
        "log_std_init": -1.0, "total_timesteps": 2_000_000,
    },
    **dict.fromkeys(("breakout", "asterix", "freeway", "space_invaders"), MINATAR),
    # the PPO baselines of Goodall et al. 2026 (BPO), their published values
    "cartpole_ppo": {
        **PAPER, "total_timesteps": 100_000, "num_envs": 8, "num_steps": 32, "num_epochs": 20,
        "num_minibatches": 1, "gamma": 0.98, "gae_lambda": 0.8, "learning_rate": 1e-3,
        "anneal_lr": True, "anneal_clip": True, "activation": "tanh", "kernel_init": "lecun_normal",
    },
    "mujoco_ppo": {
        **PAPER, "total_timesteps": 1_500_000, "num_envs": 1, "num_steps": 2048, "num_epochs": 10,
        "num_minibatches": 32, "ent_coef": 0.001, "activation": "relu", "kernel_init": "orthogonal",
    },
    "mujoco_ppo_gsde": {
        **PAPER, "total_timesteps": 2_000_000, "num_envs": 16, "num_steps": 512, "num_epochs": 20,
        "num_minibatches": 64, "gae_lambda": 0.9, "clip_eps": 0.4, "learning_rate": 3e-5,
        "exploration": "sticky", "noise_interval": 4, "hidden": (256, 256), "activation": "relu",
        "kernel_init": "lecun_normal", "log_std_init": -1.0,
    },
    # the PPO baseline of Voelcker et al. 2025 (REPPO), without its clipping of values
    "dmc_ppo": {
        **PAPER, "total_timesteps": 50_000_000, "shuffle": "transitions", "num_envs": 2048,
        "num_steps": 64, "num_epochs": 16, "num_minibatches": 32, "normalize_obs": True,
        "activation": "tanh", "kernel_init": "orthogonal", "policy_gain": 0.01,
    },
}
# fmt: on


# --- networks ---


class Torso(nn.Module):
    """Fully connected hidden layers."""

    config: Config

    @nn.compact
    def __call__(self, x):
        activation = getattr(nn, self.config.activation)
        for size in self.config.hidden:
            x = activation(nn.Dense(size, kernel_init=initializer(self.config))(x))
        return x


class Actor(nn.Module):
    """Policy network: observation [..., obs_size] -> Categorical or Gaussian."""

    config: Config
    action_size: int
    discrete: bool

    @nn.compact
    def __call__(self, obs):
        config, size = self.config, self.action_size
        x = Torso(config)(obs)
        out = nn.Dense(size, kernel_init=initializer(config, config.policy_gain))(x)
        if self.discrete:
            return common.Categorical(out)
        shape = (x.shape[-1], size) if config.exploration == "gsde" else (size,)
        log_std = self.param("log_std", nn.initializers.constant(config.log_std_init), shape)
        if config.exploration == "gsde":
            # The features are constants here: exploration must not bend the representation.
            features, weight_std = jax.lax.stop_gradient(x), jnp.exp(log_std)
            variance = features**2 @ weight_std**2
            return common.Gaussian(out, 0.5 * jnp.log(variance + 1e-6), features, weight_std)
        return common.Gaussian(out, jnp.broadcast_to(log_std, out.shape))


class Critic(nn.Module):
    """State value: observation [..., obs_size] -> [...]."""

    config: Config

    @nn.compact
    def __call__(self, obs):
        x = Torso(self.config)(obs)
        return nn.Dense(1, kernel_init=initializer(self.config))(x)[..., 0]


def initializer(config: Config, gain: float = 1.0):
    """Kernel initialiser of the configuration, scaled by `gain`."""
    if config.kernel_init == "orthogonal":
        return nn.initializers.orthogonal(gain)
    return nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal")


# --- data types ---


class Transition(NamedTuple):
    """One step of the rollout; arrays [T, N, ...]."""

    obs: jax.Array  # as the environment gave it
    action: jax.Array  # unclipped
    log_prob: jax.Array
    reward: jax.Array
    terminated: jax.Array
    done: jax.Array  # terminated or truncated
    next_obs: jax.Array  # true successor, never a reset observation


class Batch(NamedTuple):
    """What the losses need of a transition."""

    obs: jax.Array  # normalised
    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    target: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "actor" and "critic"
    opt_state: dict  # likewise
    obs_stats: common.Stats
    reward_scale: common.RewardScale
    obs: jax.Array  # [N, obs_size]
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32


# --- targets and losses ---


def gae(reward, value, next_value, terminated, done, gamma, lam):
    """Generalised advantage estimates [T, N] (Schulman et al. 2016), arrays [T, N].

    `next_value` is the value of the true successor: it counts unless the step terminated. The trace
    is cut at every `done`.
    """
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value

    def backward(advantage, step):
        delta, done = step
        advantage = delta + gamma * lam * jnp.where(done, 0.0, advantage)
        return advantage, advantage

    return jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, done), reverse=True)[1]


def policy_loss(log_prob, old_log_prob, advantage, clip_eps):
    """Clipped surrogate loss (Schulman et al. 2017, eq. 7), with its diagnostics."""
    log_ratio = log_prob - old_log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    aux = {
        "losses/approx_kl": (ratio - 1.0 - log_ratio).mean(),
        "losses/clip_fraction": (jnp.abs(ratio - 1.0) > clip_eps).mean(),
    }
    return loss, aux


def value_loss(value, target):
    """Mean squared error to the lambda-return."""
    return ((value - target) ** 2).mean()


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, config.num_envs)
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    actor = Actor(config, env.action_size, env.discrete)
    critic = Critic(config)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=config.adam_eps),
    )
    T, N = config.num_steps, config.num_envs
    held = config.noise_interval if config.noise_interval > 0 else T
    if config.exploration == "iid" or env.discrete:
        held = 1

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        sample = jnp.zeros((1, env.obs_size))
        params = {
            "actor": actor.init(key_actor, sample),
            "critic": critic.init(key_critic, sample),
        }
        return TrainState(
            params=params,
            opt_state={name: optimizer.init(params[name]) for name in params},
            obs_stats=common.Stats.empty((env.obs_size,)),
            reward_scale=common.RewardScale.empty(N),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.zeros((), jnp.int32),
        )

    def normalize(obs_stats, obs):
        obs = obs.astype(jnp.float32)
        return obs_stats.normalize(obs) if config.normalize_obs else obs

    def noise_of(key, shape):
        """Exploration noise for `shape` actions: a vector or, under gSDE, a matrix for each."""
        if env.discrete:
            return jax.random.gumbel(key, (*shape, env.action_size))
        features = config.hidden[-1:] if config.exploration == "gsde" else ()
        return jax.random.normal(key, (*shape, *features, env.action_size))

    def rollout(state, key):
        """Act for T steps; returns the next observation and state, and arrays [T, N]."""
        key_noise, key_env, key_refresh = jax.random.split(key, 3)
        noise = noise_of(key_noise, (math.ceil(T / held), N))
        env_state = env.refresh(key_refresh, state.env_state)

        def step(carry, x):
            obs, env_state = carry
            t, key = x
            policy = actor.apply(state.params["actor"], normalize(state.obs_stats, obs))
            action = policy.sample(noise[t // held])
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
                next_obs=info.pop("final_observation"),
            )
            return (next_obs, env_state), (transition, info)

        xs = jnp.arange(T), jax.random.split(key_env, T)
        (obs, env_state), (traj, info) = jax.lax.scan(step, (state.obs, env_state), xs)
        return obs, env_state, traj, info

    def loss_fn(params, batch, clip_eps):
        policy = actor.apply(params["actor"], batch.obs)
        advantage = batch.advantage
        if config.normalize_advantage:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        pg_loss, aux = policy_loss(
            policy.log_prob(batch.action), batch.log_prob, advantage, clip_eps
        )
        vf_loss = value_loss(critic.apply(params["critic"], batch.obs), batch.target)
        entropy = policy.entropy().mean()
        loss = pg_loss + config.vf_coef * vf_loss - config.ent_coef * entropy
        aux |= {
            "losses/policy_loss": pg_loss,
            "losses/value_loss": vf_loss,
            "losses/entropy": entropy,
        }
        return loss, aux

    def update(state):
        key, key_rollout, key_shuffle = jax.random.split(state.key, 3)
        remaining = 1.0 - state.update / config.num_updates
        learning_rate = config.learning_rate * (remaining if config.anneal_lr else 1.0)
        clip_eps = config.clip_eps * (remaining if config.anneal_clip else 1.0)

        obs, env_state, traj, info = rollout(state, key_rollout)

        reward = traj.reward
        if config.normalize_reward:
            reward = reward * state.reward_scale.factor()
        normalized_obs = normalize(state.obs_stats, traj.obs)
        value, next_value = (
            critic.apply(state.params["critic"], x)
            for x in (normalized_obs, normalize(state.obs_stats, traj.next_obs))
        )
        advantage = gae(
            reward, value, next_value, traj.terminated, traj.done, config.gamma, config.gae_lambda
        )
        batch = Batch(normalized_obs, traj.action, traj.log_prob, advantage, advantage + value)

        if config.shuffle == "transitions":
            batch = jax.tree.map(lambda x: x.reshape((T * N, *x.shape[2:])), batch)
        size = len(batch.obs)

        def gradient_step(carry, index):
            params, opt_state = carry
            minibatch = jax.tree.map(lambda x: x[index], batch)
            grads, aux = jax.grad(loss_fn, has_aux=True)(params, minibatch, clip_eps)
            aux["losses/grad_norm"] = optax.global_norm(grads)
            steps = {name: optimizer.update(grads[name], opt_state[name]) for name in params}
            params = {
                name: jax.tree.map(lambda p, u: p - learning_rate * u, params[name], steps[name][0])
                for name in params
            }
            return (params, {name: steps[name][1] for name in params}), aux

        def epoch(carry, key):
            index = jax.random.permutation(key, size).reshape(config.num_minibatches, -1)
            return jax.lax.scan(gradient_step, carry, index)

        (params, opt_state), aux = jax.lax.scan(
            epoch,
            (state.params, state.opt_state),
            jax.random.split(key_shuffle, config.num_epochs),
        )

        metrics = {name: x.mean() for name, x in aux.items()}
        metrics |= common.run_metrics(info, (params, metrics["losses/value_loss"]))
        metrics["losses/explained_variance"] = 1.0 - advantage.var() / (batch.target.var() + 1e-8)
        metrics["charts/learning_rate"] = jnp.asarray(learning_rate)
        state = state._replace(
            params=params,
            opt_state=opt_state,
            obs_stats=state.obs_stats.add(traj.obs),
            reward_scale=state.reward_scale.add(traj.reward, traj.done, config.gamma),
            obs=obs,
            env_state=env_state,
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
    build(config)  # fails here, not while tracing, if the configuration is wrong

    def train(key, hparams=None):
        algo = build(replace(config, **common.traceable(hparams or {}, TRACEABLE)))
        step = lambda state, _: algo.update(state)
        state, metrics = jax.lax.scan(step, algo.init(key), length=config.num_updates)
        return {"state": state, "metrics": metrics}

    return train


def main():
    """Train from the command line."""
    launch.main("ppo", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

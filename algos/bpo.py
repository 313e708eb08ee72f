"""Behaviour policy optimisation (BPO): PPO on data from a second policy, for lower variance.

Goodall et al. 2026, https://arxiv.org/abs/2511.10843. A behaviour policy mu acts; the target policy
pi is improved and evaluated. After each rollout of mu, pi and V take PPO's gradient steps with

    delta_t  = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
    ratio_t  = pi(a_t | s_t) / mu(a_t | s_t)
    D_t      = min(ratio_t, clip_rho) delta_t
               + gamma lambda (1 - done_t) min(ratio_t, clip_c) D_{t+1}            (V-trace)
    A_t      = delta_t + gamma lambda (1 - done_t) D_{t+1}
    target_t = V(s_t) + D_t

A and target are computed once per rollout and are constants in the loss.

Then Q and Q^, the second moment of pi's return, are learned by fitted Q evaluation on a replay
buffer of the last rollouts. Finally, mu is fitted to pi and Q^ for the next rollout:

    Q(s, a)   = r + gamma (1 - terminated) E_pi[Q(s', a')]
    Q^(s, a)  = 2 r Q(s, a) - r^2 + gamma^2 (1 - terminated) E_pi[Q^(s', a')]
    mu(a | s) = pi(a | s) sqrt(Q^(s, a)) / Z(s)                          (Z normalises)

s'_t is the true successor of s_t, taken before any reset. A time limit (truncated) therefore
bootstraps from V(s'_t), and a terminal state (terminated) does not; both end the trace (done).

Differences from ppo.py:

1. mu acts. The ratio of the surrogate loss is pi / mu: it is not 1 at first, and the clip range is
   around mu. It is the importance weight of a_t, so A_t has only the weights of later actions.
2. `learn_from_replay` trains Q, Q^ and mu; `mu_target` separates mu from pi.
3. The entropy bonus is that of mu, not of pi.

    python algos/bpo.py --env cartpole --num-seeds 16
    python algos/bpo.py --env Ant-v5 --preset mujoco_ppo_gsde ppo_bpo_zero --num-seeds 4

Documentation: docs/bpo.md
"""

import math
import signal
import sys
from dataclasses import dataclass, replace
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
    num_epochs: PositiveInt = 8  # epochs of pi and V per rollout
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
    gae_lambda: UnitFloat = 0.95  # lambda of V-trace
    clip_eps: NonNegativeFloat = 0.2  # clip range of pi / mu around 1
    anneal_clip: bool = False  # decrease the clip range linearly to 0 over the run
    ent_coef: float = 0.0  # weight of the entropy bonus of mu
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss

    # importance weights
    clip_rho: NonNegativeFloat = 1.5  # largest ratio that weights a TD error
    clip_c: NonNegativeFloat = 1.5  # largest ratio that weights the trace of the next step
    clip_traj: bool = False  # clip_c bounds the product of all later ratios, clip_rho the first

    # replay buffer and fitted Q evaluation of Q and Q^
    replay_rollouts: PositiveInt = 1  # rollouts in the replay buffer
    num_vf_epochs: PositiveInt = 4  # epochs of Q, and of Q^, on the replay buffer
    num_vf_minibatches: PositiveInt = 4  # gradient steps per epoch on a full replay buffer
    weight_td: bool = False  # weight squared errors by pi / mu in [0.1, 10], scaled to mean 1
    # clip targets, and the Q and Q^ that are learned from, to what the rewards so far make possible
    clip_targets: bool = True
    clip_actions: bool = True  # clip the actions that Q and Q^ see, as the environment does
    symlog_targets: bool = True  # fit symlog(target): biased towards 0 where targets are noisy
    symlog_reg_coef: NonNegativeFloat = 1.0  # with symlog: weight of the distance to the old output
    polyak_tau: UnitFloat = 0.02  # Polyak step of the target networks; 0: copy after each epoch
    zero_norm_final: bool = True  # Q and Q^: LayerNorm, orthogonal layers, last layer starts at 0

    # behaviour policy
    num_mu_epochs: PositiveInt = 4  # epochs of mu on the replay buffer
    num_mu_minibatches: PositiveInt = 4  # gradient steps per epoch on a full replay buffer
    # kl_qhat: fit mu to pi sqrt(Q^); kl: to pi; centred: to pi sqrt(Q^ - 2 V Q + V^2)
    mu_loss: Literal["kl_qhat", "kl", "centred"] = "kl_qhat"

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
        """Raise ValueError for unequal or one-transition minibatches, and for unbounded targets."""
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
        kept = self.replay_rollouts
        for name in ("num_vf_minibatches", "num_mu_minibatches"):
            n = getattr(self, name)
            if n % kept or size % (n // kept):
                raise ValueError(
                    f"{name}={n} must be a multiple of replay_rollouts={kept}, and their "
                    f"quotient must divide the {size} {self.shuffle} of a rollout "
                    f"(num_envs={self.num_envs}, num_steps={self.num_steps}): change one of them"
                )
        if self.clip_targets and self.gamma == 1.0:
            raise ValueError(
                "clip_targets=True needs gamma below 1: at gamma=1 returns have no bounds"
            )


# --- networks ---


class Torso(nn.Module):
    """Hidden layers: observation [..., obs_size] -> features [..., hidden[-1]].

    If `obs_shape` is [height, width, channels], a 3 x 3 convolution with 16 channels comes first.
    """

    config: Config
    obs_shape: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, obs):
        activation, init = getattr(nn, self.config.activation), initializer(self.config)
        x = obs.astype(jnp.float32)
        if len(self.obs_shape) == 3:
            x = patches(x.reshape((*obs.shape[:-1], *self.obs_shape)))
            x = activation(nn.Dense(16, kernel_init=init)(x)).reshape((*obs.shape[:-1], -1))
        for size in self.config.hidden:
            x = nn.Dense(size, kernel_init=init)(x)
            x = activation(nn.LayerNorm(epsilon=1e-6)(x) if self.layer_norm else x)
        return x


class Actor(nn.Module):
    """Policy network of pi or mu: observation [..., obs_size] -> Categorical or Gaussian."""

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


class ActionCritic(nn.Module):
    """Q, or Q^ if `positive`: observation [..., obs_size] and action -> [...].

    With `symlog_targets` the output is the symlog of the value.
    If actions are discrete and `action` is None: the values of all actions, [..., action_size].
    """

    config: Config
    obs_shape: tuple[int, ...]
    action_size: int
    discrete: bool
    positive: bool

    @nn.compact
    def __call__(self, obs, action=None):
        config, zero = self.config, self.config.zero_norm_final
        x, shape, size = obs, self.obs_shape, self.action_size
        if not self.discrete:
            action = jnp.clip(action, -1.0, 1.0) if config.clip_actions else action
            x = jnp.concatenate([obs, action], -1)
            shape, size = x.shape[-1:], 1
        hidden = replace(config, kernel_init="orthogonal") if zero else config
        init = nn.initializers.zeros if zero else initializer(config)
        out = nn.Dense(size, kernel_init=init)(Torso(hidden, shape, layer_norm=zero)(x))
        out = nn.softplus(out) + 1e-6 if self.positive else out
        if not self.discrete:
            return out[..., 0]
        return out if action is None else jnp.take_along_axis(out, action[..., None], -1)[..., 0]


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
    """Steps of a rollout, arrays [T, N, ...], or of the replay buffer, [K T, N, ...].

    `learn_from_replay` works on a copy with observations and rewards as the networks see them.
    """

    obs: jax.Array  # as the environment gave it
    action: jax.Array  # unclipped; the environment clips
    log_prob: jax.Array  # of mu
    reward: jax.Array
    terminated: jax.Array
    done: jax.Array  # terminated or truncated
    valid: jax.Array  # the physics was finite
    next_obs: jax.Array  # true successor, never a reset observation


class Batch(NamedTuple):
    """What the loss needs of a rollout; arrays [T N, ...], or [T, N, ...] if rows are shuffled."""

    obs: jax.Array  # normalised
    action: jax.Array
    log_prob: jax.Array  # of mu
    advantage: jax.Array
    target: jax.Array
    value: jax.Array  # V at obs; only for metrics
    log_ratio: jax.Array  # log pi - log mu in the rollout; only for metrics


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # keys "actor", "critic", "mu", "q" and "qhat"
    target_params: dict  # keys "q" and "qhat"
    opt_state: dict  # the same keys as params
    replay: Transition  # the last replay_rollouts = K rollouts, [K T, N, ...]
    reward_range: jax.Array  # [2] smallest and largest reward so far, 0 included; not scaled
    r_hat_max: jax.Array  # [] largest `second_moment_reward` so far; not scaled
    obs_stats: common.Stats
    reward_scale: common.RewardScale
    obs: jax.Array  # [N, obs_size], as the environment gave it
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32, finished updates


# --- targets and losses ---


def step_estimator(
    reward, value, next_value, terminated, done, log_ratio, gamma, lam, clip_rho, clip_c
):
    """Advantages and value targets [T, N] by V-trace with lambda (Espeholt et al. 2018, remark 2).

    Arrays [T, N]; `next_value` is the value of the true successor. A terminated step does not
    bootstrap from it, and every done step ends the trace. The ratio of the surrogate loss weights
    the first action, so the advantage has only the weights of later ones.
    """
    ratio = jnp.exp(log_ratio)
    rho, c = jnp.minimum(ratio, clip_rho), jnp.minimum(ratio, clip_c)
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value

    def backward(trace, step):
        delta, rho, c, done = step
        later = gamma * lam * jnp.where(done, 0.0, trace)
        trace = rho * delta + c * later
        return trace, (delta + later, trace)

    steps = delta, rho, c, done
    advantage, trace = jax.lax.scan(backward, jnp.zeros_like(delta[0]), steps, reverse=True)[1]
    return advantage, value + trace


def trajectory_estimator(
    reward, value, next_value, terminated, done, log_ratio, gamma, lam, clip_rho, clip_c
):
    """As `step_estimator`, but `clip_c` bounds the product of the ratios after the first.

        A_t      = sum_{k >= t} (gamma lambda)^(k - t) min(ratio_{t+1} ... ratio_k, clip_c) delta_k
        target_t = V(s_t) + min(ratio_t, clip_rho) A_t

    The sum ends with the episode of t; for k = t there is no ratio, and the factor is 1.
    """
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    lag = (jnp.arange(len(delta)) - jnp.arange(len(delta))[:, None])[..., None]  # [t, k, 1]: k - t
    episode = jnp.cumsum(done, 0) - done  # [T, N] number of the episode; a done step is its last
    total = jnp.cumsum(log_ratio, 0)
    product = jnp.exp(jnp.minimum(jnp.log(clip_c), total - total[:, None]))  # steps t + 1 to k
    weight = (gamma * lam) ** jnp.maximum(lag, 0) * jnp.where(lag > 0, product, 1.0)
    weight = jnp.where((lag >= 0) & (episode[:, None] == episode), weight, 0.0)  # [t, k, N]
    advantage = jnp.einsum("tkn,kn->tn", weight, delta)
    return advantage, value + jnp.minimum(jnp.exp(log_ratio), clip_rho) * advantage


def policy_loss(log_prob, old_log_prob, advantage, clip_eps):
    """Clipped surrogate loss (Schulman et al. 2017, eq. 7), with mu for the old policy."""
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


def symlog(x):
    """Signed logarithm, sign(x) log(1 + |x|): compresses large values, keeps small ones."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x):
    """Inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def fqe_target(reward, terminated, next_value, gamma):
    """Target of fitted Q evaluation; a terminated step does not bootstrap."""
    return reward + gamma * jnp.where(terminated, 0.0, next_value)


def fqe_loss(output, label, old_output, weight, reg_coef):
    """Weighted mean squared error to `label`, and to the target network's `old_output`."""
    return (weight * ((output - label) ** 2 + reg_coef * (output - old_output) ** 2)).mean()


def td_weight(log_ratio):
    """Ratios pi / mu of a minibatch, clipped to [0.1, 10] and scaled to mean 1."""
    weight = jnp.clip(jnp.exp(log_ratio), 0.1, 10.0)
    return weight / (weight.mean() + 1e-6)


def second_moment_reward(reward, q):
    """Reward of Q^. From G = r + gamma G' follows G^2 = 2 r G - r^2 + gamma^2 G'^2.

    Q = E[G] takes the place of G, which is exact if r is a function of s and a.
    """
    return 2.0 * reward * q - reward**2


def centred_moment(qhat, q, value):
    """E[(G - V)^2 | s, a], on which the variance of V-trace depends (an extension of ours)."""
    return jnp.maximum(qhat - 2.0 * value * q + value**2, 1e-6)


def mu_target(log_pi, moment):
    """Log of pi sqrt(moment), not normalised. Only the moment separates it from pi."""
    return log_pi + 0.5 * jnp.log(moment)


def mu_loss_discrete(log_mu, log_target):
    """KL(target || mu) up to a constant, from log-probabilities [..., number of actions]."""
    return -(jax.nn.softmax(log_target) * log_mu).sum(-1).mean()


def mu_loss_continuous(log_mu, log_target):
    """KL(mu || target), the other direction, up to log Z, from reparameterised actions of mu."""
    return (log_mu - log_target).mean()


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environments that a run learns in."""
    env = envs.make(config.env, config.num_envs)
    if len(env.obs_shape) == 3 and min(env.obs_shape[:2]) >= 36:  # the networks are for MinAtar
        raise ValueError(f"{env.name} has large images: run it with algos/p3o.py")
    return env


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose environments, networks and optimiser into the pure functions of a run."""
    sizes = env.obs_shape, env.action_size, env.discrete
    actor = Actor(config, *sizes)
    critic = Critic(config, env.obs_shape)
    nets = {"q": ActionCritic(config, *sizes, False), "qhat": ActionCritic(config, *sizes, True)}
    optimizer = optax.chain(  # no learning rate: see descend
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=config.adam_eps),
    )
    T, N, K = config.num_steps, config.num_envs, config.replay_rollouts
    gammas = {"q": config.gamma, "qhat": config.gamma**2}

    def init(key) -> TrainState:
        key_actor, key_critic, key_q, key_qhat, key_env, key = jax.random.split(key, 6)
        obs, env_state = env.reset(key_env)
        action = jnp.zeros((1,), jnp.int32) if env.discrete else jnp.zeros((1, env.action_size))
        params = {
            "actor": actor.init(key_actor, obs[:1]),
            "critic": critic.init(key_critic, obs[:1]),
            "mu": actor.init(key_actor, obs[:1]),  # equal to pi: the first rollout is on-policy
            "q": nets["q"].init(key_q, obs[:1], action),
            "qhat": nets["qhat"].init(key_qhat, obs[:1], action),
        }
        state = TrainState(
            params=params,
            opt_state={name: optimizer.init(params[name]) for name in params},
            target_params={name: params[name] for name in nets},
            replay=None,
            reward_range=jnp.zeros(2),
            r_hat_max=jnp.float32(1e-8),
            obs_stats=common.Stats.empty((env.obs_size,)),
            reward_scale=common.RewardScale.empty(N),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.int32(0),
        )
        traj = jax.eval_shape(lambda: rollout(state, key)[1])  # shapes only
        empty = lambda x: jnp.zeros((K * T, *x.shape[1:]), x.dtype)
        return state._replace(replay=jax.tree.map(empty, traj))

    def normalize(obs_stats, obs):
        return obs_stats.normalize(obs.astype(jnp.float32)) if config.normalize_obs else obs

    def noise_of(key, shape):
        """Noise [*shape, action_size] for sampling actions of batch shape `shape`."""
        draw = jax.random.gumbel if env.discrete else jax.random.normal
        return draw(key, (*shape, env.action_size))

    def rollout(state, key):
        """Act with mu for T steps; returns the state, transitions [T, N] and infos [T, N]."""
        key_noise, key_env, key_refresh = jax.random.split(key, 3)
        noise = noise_of(key_noise, (math.ceil(T / config.noise_interval), N))
        env_state = env.refresh(key_refresh, state.env_state)  # redraws cached start states

        def step(carry, x):
            obs, env_state = carry
            t, key = x
            policy = actor.apply(state.params["mu"], normalize(state.obs_stats, obs))
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

    def reward_scale(state):
        return state.reward_scale.factor() if config.normalize_reward else 1.0

    def targets(state, traj) -> Batch:
        """Advantages and value targets of a rollout, computed once before its gradient steps."""
        obs, next_obs = (normalize(state.obs_stats, x) for x in (traj.obs, traj.next_obs))
        value, next_value = (critic.apply(state.params["critic"], x) for x in (obs, next_obs))
        log_pi = actor.apply(state.params["actor"], obs).log_prob(traj.action)
        log_ratio = jnp.clip(log_pi - traj.log_prob, -20.0, 20.0)
        reward = traj.reward * reward_scale(state)
        reward = jnp.where(traj.valid, reward, value)  # physics not finite: V is its own target
        steps = reward, value, next_value, traj.terminated, traj.done, log_ratio
        estimator = trajectory_estimator if config.clip_traj else step_estimator
        advantage, target = estimator(
            *steps, config.gamma, config.gae_lambda, config.clip_rho, config.clip_c
        )
        # Not finite: the mean advantage, because 0 would favour such steps while V is too high.
        mean = (advantage * traj.valid).sum() / jnp.maximum(traj.valid.sum(), 1)
        advantage = jnp.where(traj.valid, advantage, mean)
        batch = Batch(obs, traj.action, traj.log_prob, advantage, target, value, log_ratio)
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
        loss = pg_loss + config.vf_coef * vf_loss
        return loss, aux | {
            "losses/policy_loss": pg_loss,
            "losses/value_loss": vf_loss,
            "losses/entropy": entropy,
        }

    def bounded(name, state, value):
        """Clip values of Q or Q^ to what the rewards so far make possible, with `clip_targets`.

        The bound of Q^ is the largest `second_moment_reward` so far, which is itself an estimate.
        """
        if not config.clip_targets:
            return value
        scale = reward_scale(state)
        rewards = {"q": scale * state.reward_range, "qhat": (1e-8, scale**2 * state.r_hat_max)}
        return jnp.clip(value, *(reward / (1.0 - gammas[name]) for reward in rewards[name]))

    def to_value(output):
        return symexp(output) if config.symlog_targets else output

    def q_value(name, state, obs, action):
        """Q or Q^ within its bounds."""
        return bounded(name, state, to_value(nets[name].apply(state.params[name], obs, action)))

    def sample_or_all(policy, key):
        """A sampled action for each state. Discrete: None, for all actions of `ActionCritic`."""
        return None if env.discrete else policy.sample(noise_of(key, policy.mean.shape[:-1]))

    def fqe_loss_fn(params, state, batch, key):
        """Fitted Q evaluation of Q or Q^, the only network in `params`; the target is constant."""
        (name,) = params
        apply, online, target_net = nets[name].apply, params[name], state.target_params[name]
        # As in the authors' code, the target network gives the bootstrap value only if actions are
        # continuous and symlog_targets is off.
        bootstrap_net = online if config.symlog_targets or env.discrete else target_net
        pi = actor.apply(state.params["actor"], batch.next_obs)
        next_value = to_value(apply(bootstrap_net, batch.next_obs, sample_or_all(pi, key)))
        if env.discrete:
            next_value = (jax.nn.softmax(pi.logits) * next_value).sum(-1)
        target = fqe_target(batch.reward, batch.terminated, next_value, gammas[name])
        clipped = bounded(name, state, target)
        label = jax.lax.stop_gradient(symlog(clipped) if config.symlog_targets else clipped)
        reg_coef = config.symlog_reg_coef if config.symlog_targets else 0.0
        weight = batch.valid
        if config.weight_td:
            log_pi = actor.apply(state.params["actor"], batch.obs).log_prob(batch.action)
            weight = weight * td_weight(log_pi - batch.log_prob)
        output, old_output = (apply(x, batch.obs, batch.action) for x in (online, target_net))
        loss = fqe_loss(output, label, old_output, weight, reg_coef)
        return loss, {
            f"losses/{name}_loss": loss,
            f"health/{name}_target_clip_fraction": (clipped != target).mean(),
        }

    def mu_loss_fn(params, state, batch, key):
        """Loss of mu, fitted to `mu_target`; the parameters of pi, V, Q and Q^ are constant.

        With continuous actions the gradient also passes through the sampled action of mu.
        """
        pi, mu = (actor.apply(x, batch.obs) for x in (state.params["actor"], params["mu"]))
        action = sample_or_all(mu, key)
        moment = 1.0
        if config.mu_loss != "kl":
            moment = jnp.maximum(q_value("qhat", state, batch.obs, action), 1e-6)
        if config.mu_loss == "centred":
            value = critic.apply(state.params["critic"], batch.obs)
            value = value[..., None] if env.discrete else value
            moment = centred_moment(moment, q_value("q", state, batch.obs, action), value)
        if env.discrete:
            log_pi, log_mu = (jax.nn.log_softmax(x.logits) for x in (pi, mu))
            loss = mu_loss_discrete(log_mu, mu_target(log_pi, moment))
        else:
            log_pi, log_mu = (x.log_prob(action) for x in (pi, mu))
            loss = mu_loss_continuous(log_mu, mu_target(log_pi, moment))
        return loss - config.ent_coef * mu.entropy().mean(), {"losses/mu_loss": loss}

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
        params = {name: state.params[name] for name in ("actor", "critic")}
        grads, aux = jax.grad(loss_fn, has_aux=True)(params, state, batch)
        aux |= {f"losses/{name}_grad_norm": optax.global_norm(grads[name]) for name in grads}
        return descend(state, grads), aux

    def epoch(state, batch, key):
        """Gradient steps on all of the batch, in shuffled minibatches."""
        index = jax.random.permutation(key, len(batch.obs)).reshape(config.num_minibatches, -1)
        step = lambda state, i: gradient_step(state, jax.tree.map(lambda x: x[i], batch))
        return jax.lax.scan(step, state, index)

    def store(state, traj):
        """Replace the oldest rollout in the replay buffer, and widen the range of rewards."""
        start = (state.update % K) * T
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0)
        rewards = jnp.append(traj.reward, state.reward_range)
        return state._replace(
            replay=jax.tree.map(write, state.replay, traj),
            reward_range=jnp.stack([rewards.min(), rewards.max()]),
        )

    fqe = fqe_loss_fn, config.num_vf_epochs, config.num_vf_minibatches
    mu_fit = mu_loss_fn, config.num_mu_epochs, config.num_mu_minibatches
    phases = {"q": fqe, "qhat": fqe, "mu": mu_fit}  # loss, epochs, gradient steps per epoch

    def fit(state, name, data, key):
        """Epochs of gradient steps on one network over the replay buffer; returns mean metrics too.

        Until the buffer is full, an epoch has fewer gradient steps. Their number depends on
        `state.update` alone, so that it is the same for all seeds under vmap.
        """
        loss, num_epochs, num_minibatches = phases[name]
        rollouts = jnp.minimum(state.update + 1, K)
        filled, steps = rollouts * (len(data.obs) // K), rollouts * (num_minibatches // K)

        def fit_epoch(carry, key):
            key_order, key_steps = jax.random.split(key)
            index = jax.random.permutation(key_order, len(data.obs))
            index = index[jnp.argsort(index >= filled)]  # empty rollouts last: never used
            index = index.reshape(num_minibatches, -1)

            def step(i, carry):
                state, metrics = carry
                batch = jax.tree.map(lambda x: x[index[i]], data)
                key = jax.random.fold_in(key_steps, i)
                params = {name: state.params[name]}
                grads, aux = jax.grad(loss, has_aux=True)(params, state, batch, key)
                state = descend(state, grads)
                if name in nets:  # mu has no target network
                    # polyak_tau 0 copies the network after the last step of an epoch
                    tau = config.polyak_tau or jnp.where(i == steps - 1, 1.0, 0.0)
                    online, target_net = state.params[name], state.target_params[name]
                    target_net = optax.incremental_update(online, target_net, tau)
                    state = state._replace(target_params=state.target_params | {name: target_net})
                return state, {k: metrics[k] + aux[k] / (num_epochs * steps) for k in aux}

            return jax.lax.fori_loop(0, steps, step, carry), None

        aux = jax.eval_shape(loss, {name: state.params[name]}, state, data, key)[1]  # for its keys
        carry = state, {k: jnp.zeros(()) for k in aux}
        return jax.lax.scan(fit_epoch, carry, jax.random.split(key, num_epochs))[0]

    def learn_from_replay(state, key):
        """Fit Q, then Q^, then mu, all for the new pi, which is fixed here; returns metrics too."""
        key_q, key_qhat, key_mu = jax.random.split(key, 3)
        scale = reward_scale(state)
        data = state.replay._replace(
            obs=normalize(state.obs_stats, state.replay.obs),
            next_obs=normalize(state.obs_stats, state.replay.next_obs),
            reward=scale * state.replay.reward,
        )
        if config.shuffle == "transitions":
            data = jax.tree.map(lambda x: x.reshape((K * T * N, *x.shape[2:])), data)

        state, metrics = fit(state, "q", data, key_q)

        r_hat = second_moment_reward(data.reward, q_value("q", state, data.obs, data.action))
        filled = jnp.arange(K)[:, None] <= state.update  # [K, 1] rollouts
        r_hat_max = jnp.max(r_hat.reshape(K, -1), where=filled, initial=0.0) / scale**2
        state = state._replace(r_hat_max=jnp.maximum(state.r_hat_max, r_hat_max))
        state, aux_qhat = fit(state, "qhat", data._replace(reward=r_hat), key_qhat)
        state, aux_mu = fit(state, "mu", data, key_mu)
        return state, metrics | aux_qhat | aux_mu

    def diagnostics(state, batch):
        """How far mu was from pi in the rollout, and how Q^ compares with the square of Q."""
        ratio = jnp.exp(batch.log_ratio)
        q, qhat = (to_value(nets[x].apply(state.params[x], batch.obs, batch.action)) for x in nets)
        standardize = lambda x: (x - x.mean()) / (x.std() + 1e-8)
        return {
            "ratios/mean": ratio.mean(),
            "ratios/max": ratio.max(),
            "ratios/ess": ratio.mean() ** 2 / (ratio**2).mean(),
            "ratios/clip_fraction": (ratio > config.clip_rho).mean(),
            "health/kl_mu_pi": (ratio - 1.0 - batch.log_ratio).mean(),
            "health/qhat_q2_corr": (standardize(qhat) * standardize(q**2)).mean(),
            "health/qhat_below_q2": (qhat < q**2).mean(),
        }

    def update(state):
        key, key_rollout, key_epochs, key_replay = jax.random.split(state.key, 4)
        state, traj, info = rollout(state, key_rollout)
        batch = targets(state, traj)
        keys = jax.random.split(key_epochs, config.num_epochs)
        state, aux = jax.lax.scan(lambda state, key: epoch(state, batch, key), state, keys)
        state, replay_metrics = learn_from_replay(store(state, traj), key_replay)

        metrics = {name: x.mean() for name, x in aux.items()}
        metrics |= common.run_metrics(info, (state.params, metrics["losses/value_loss"]))
        metrics |= replay_metrics | diagnostics(state, batch)
        unexplained = (batch.target - batch.value).var() / (batch.target.var() + 1e-8)
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
    "clip_rho", "clip_c", "symlog_reg_coef",
)  # fmt: skip

# --- presets ---

# fmt: off
# Values that replace the defaults; docs/presets.md has their origins.
REPLAY = {
    "num_vf_epochs": 2, "num_vf_minibatches": 16, "num_mu_epochs": 10, "num_mu_minibatches": 16,
}
PHYSICS = {
    "total_timesteps": 1_000_000, "num_envs": 64, "num_steps": 64, "num_epochs": 8,
    "num_minibatches": 16, "anneal_lr": True, "normalize_obs": True, "normalize_reward": True,
    **REPLAY,
}
FAST = {**PHYSICS, "learning_rate": 1e-3}
PAPER = {  # published values of fields that tasks' presets change; those below set the others
    "shuffle": "rows", "learning_rate": 3e-4, "anneal_lr": False, "adam_eps": 1e-5, "gamma": 0.99,
    "gae_lambda": 0.95, "clip_eps": 0.2, "anneal_clip": False, "ent_coef": 0.0, "vf_coef": 0.5,
    "clip_rho": 1.5, "clip_c": 1.5, "replay_rollouts": 4, "weight_td": True, "clip_targets": True,
    "clip_actions": True, "symlog_targets": False, "polyak_tau": 0.0, "zero_norm_final": False,
    "normalize_obs": False, "normalize_reward": False, "noise_interval": 1, "hidden": (64, 64),
    "policy_gain": 1.0, "log_std_init": 0.0,
}
BPO = {
    "clip_rho": 1.5, "clip_c": 1.5, "clip_traj": False, "symlog_targets": True, "polyak_tau": 0.02,
    "zero_norm_final": False,
}
ZERO = {**BPO, "zero_norm_final": True}
PRESETS: dict[str, dict[str, Any]] = {
    # sources of tasks, for those that have no preset of their own
    "gym": {  # the clip range is around mu, which lags behind pi: a narrow one slows pi down
        "total_timesteps": 1_000_000, "num_envs": 16, "num_steps": 128, "num_epochs": 10,
        "num_minibatches": 16, "anneal_lr": True, "clip_eps": 0.4, "normalize_obs": True,
        "normalize_reward": True, "log_std_init": -1.0, **REPLAY,
    },
    **dict.fromkeys(("brax", "playground"), PHYSICS),
    # tasks
    "cartpole": {
        "total_timesteps": 100_000, "num_envs": 8, "num_steps": 32, "num_epochs": 20,
        "num_minibatches": 1, "shuffle": "rows", "learning_rate": 1e-3, "anneal_lr": True,
        "adam_eps": 1e-3, "gamma": 0.98, "gae_lambda": 0.8, "anneal_clip": True, "num_vf_epochs": 2,
        "num_mu_epochs": 2, "num_mu_minibatches": 8, "kernel_init": "lecun_normal",
        "policy_gain": 1.0,
    },
    "pendulum": {
        "total_timesteps": 300_000, "num_envs": 16, "num_steps": 128, "num_epochs": 10,
        "num_minibatches": 16, "shuffle": "rows", "learning_rate": 1e-3, "anneal_lr": True,
        "gamma": 0.9, "normalize_reward": True, **REPLAY,
    },
    "inverted_pendulum": {**FAST, "total_timesteps": 300_000, "num_mu_epochs": 2},
    "inverted_double_pendulum": {**FAST, "total_timesteps": 300_000, "num_mu_epochs": 2},
    "reacher": {**PHYSICS, "gamma": 0.95},
    "ant": {  # with an initial std of 1, actions cost more than standing still earns
        **FAST, "total_timesteps": 20_000_000, "num_envs": 512, "num_steps": 32, "num_epochs": 4,
        "num_minibatches": 4, "learning_rate": 5e-4, "gamma": 0.97, "clip_eps": 0.4,
        "num_vf_minibatches": 4, "num_mu_epochs": 4, "num_mu_minibatches": 4, "hidden": (256, 256),
        "log_std_init": -1.0,
    },
    # the base configurations of the authors' code; gsde is their name for noise that is held
    "cartpole_ppo": {
        **PAPER, "total_timesteps": 100_000, "num_envs": 8, "num_steps": 32, "num_epochs": 20,
        "num_minibatches": 1, "learning_rate": 1e-3, "anneal_lr": True, "gamma": 0.98,
        "gae_lambda": 0.8, "anneal_clip": True, "num_vf_epochs": 10, "num_vf_minibatches": 4,
        "clip_actions": False, "num_mu_epochs": 10, "num_mu_minibatches": 8, "activation": "tanh",
        "kernel_init": "lecun_normal",
    },
    "mujoco_ppo": {
        **PAPER, "total_timesteps": 1_500_000, "num_envs": 1, "num_steps": 2048, "num_epochs": 10,
        "num_minibatches": 32, "ent_coef": 0.001, "num_vf_epochs": 20, "num_vf_minibatches": 32,
        "num_mu_epochs": 20, "num_mu_minibatches": 64, "activation": "relu",
        "kernel_init": "orthogonal",
    },
    "mujoco_ppo_gsde": {
        **PAPER, "total_timesteps": 2_000_000, "num_envs": 16, "num_steps": 512, "num_epochs": 20,
        "num_minibatches": 64, "learning_rate": 3e-5, "gae_lambda": 0.9, "clip_eps": 0.4,
        "replay_rollouts": 1, "num_vf_epochs": 40, "num_vf_minibatches": 64, "weight_td": False,
        "clip_targets": False, "num_mu_epochs": 40, "num_mu_minibatches": 64, "noise_interval": 4,
        "hidden": (256, 256), "activation": "relu", "kernel_init": "lecun_normal",
        "log_std_init": -1.0,
    },
    # the authors' additions to a base configuration; numbers: <clip_c>_<clip_rho>, or one for both
    "ppo_bpo": BPO,
    "ppo_bpo_zero": ZERO,
    "ppo_bpo_zero1.0": {**ZERO, "clip_rho": 1.0, "clip_c": 1.0},
    "ppo_bpo_zero1.0_1.5": {**ZERO, "clip_c": 1.0},
    "ppo_bpo_zero1.0_1.4": {**ZERO, "clip_rho": 1.4, "clip_c": 1.0},
    "ppo_bpo_zero1.0_traj": {**ZERO, "clip_rho": 1.0, "clip_c": 1.0, "clip_traj": True},
    "ppo_bpo_zero1.5_traj": {**ZERO, "clip_traj": True},
}
# fmt: on


if __name__ == "__main__":
    launch.main("bpo")

"""Behaviour policy optimisation (BPO): PPO on data from a second policy, chosen for low variance.

Goodall et al. 2026, https://arxiv.org/abs/2511.10843. A behaviour policy mu acts, the target policy
pi is learned and evaluated. With ratio_t = pi(a_t | s_t) / mu(a_t | s_t) and delta_t as in ppo.py,

    A_t = delta_t + gamma lambda (1 - done_t) D_{t+1},  targets of V: V(s_t) + D_t,  where
    D_t = min(ratio_t, clip_rho) delta_t + gamma lambda (1 - done_t) min(ratio_t, clip_c) D_{t+1}
    Q(s, a)  = r + gamma (1 - terminated) E_pi[Q(s', a')]
    Q^(s, a) = 2 r Q(s, a) - r^2 + gamma^2 (1 - terminated) E_pi[Q^(s', a')]     (second moment)
    mu(a | s) -> pi(a | s) sqrt(Q^(s, a)) / Z(s)

Differences from ppo.py:

1. mu acts, and the surrogate's ratio is pi / mu: it carries the weight of the first action.
2. Advantages and targets are corrected by the ratios, clipped one by one or as running products.
3. After the step of pi and V, a replay of the last rollouts trains Q and Q^ by fitted Q evaluation
   (in symlog space, pulled to a moving average), and then mu.
4. The entropy bonus acts on mu alone; there is no gSDE.

`fidelity="official"` brings back four defects of the authors' code, to show their effect: Q^ fitted
to raw rewards of other transitions; one moment, the minibatch's smallest, for all of mu's actions;
trajectory clipping that sees an episode end one step late; step sizes that decay by each network's
own count.

    python algos/bpo.py --env cartpole --num-seeds 16
    python algos/bpo.py --env ant --preset mujoco_ppo_gsde ppo_bpo_zero --num-seeds 4

Documentation: docs/bpo.md
"""

import math
from dataclasses import dataclass, replace
from functools import partial
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

    # optimiser: Adam after clipping by global norm, for every network alike
    learning_rate: float = 3e-4  # step size of Adam
    anneal_lr: bool = False  # decrease the step size linearly to 0 over the run
    max_grad_norm: float = 0.5  # largest global norm of the gradient of one network
    adam_eps: float = 1e-5  # epsilon of Adam

    # objective
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # decay of the advantage's trace
    clip_eps: float = 0.2  # clip range of the ratio
    anneal_clip: bool = False  # decrease the clip range linearly to 0 over the run
    ent_coef: float = 0.0  # weight of the entropy bonus of mu
    vf_coef: float = 0.5  # weight of the value loss
    normalize_advantage: bool = True  # standardise advantages within each minibatch

    # return estimator
    estimator: Literal["vtrace", "pdis"] = "vtrace"  # pdis: per-decision weights, for theory
    clip_rho: float = 1.5  # largest ratio of a target's first step
    clip_c: float = 1.5  # largest ratio of the steps after it
    clip_traj: bool = False  # clip_c bounds the product of the ratios instead of each one
    weight_on_adv: bool = False  # first ratio on the advantage, surrogate of pi / pi_old

    # fitted Q evaluation, of Q and of Q^ each
    replay_rollouts: int = 1  # rollouts kept in the replay
    num_vf_epochs: int = 4  # passes over the replay
    num_vf_minibatches: int = 4  # gradient steps per pass over a full replay
    weight_td: bool = False  # weight the regression by pi / mu
    clip_targets: bool = True  # bound targets by what the rewards seen so far can add up to
    clip_actions: bool = True  # show the Q networks actions as the environment clips them
    symlog_targets: bool = True  # regress symlog(target)
    symlog_reg_coef: float = 1.0  # weight of the pull to the target network in symlog space
    polyak_tau: float = 0.02  # step of the target networks; 0: copy after each pass
    zero_norm_final: bool = True  # layer normalisation and an output layer that starts at 0
    q_kernel_init: Literal["orthogonal", "lecun_normal"] = "orthogonal"  # of Q and Q^

    # behaviour policy
    num_mu_epochs: int = 4  # passes over the replay
    num_mu_minibatches: int = 4  # gradient steps per pass over a full replay
    # fit mu to pi sqrt(Q^), to pi, or to pi sqrt(Q^ - 2 V Q + V^2)
    mu_loss: Literal["kl_qhat", "kl", "centred"] = "kl_qhat"
    fidelity: Literal["fixed", "official"] = "fixed"  # restore four defects of the authors' code

    # observations and rewards
    normalize_obs: bool = False  # standardise observations by running statistics
    normalize_reward: bool = False  # divide rewards by the deviation of the discounted return

    # exploration, continuous actions only
    exploration: Literal["iid", "sticky"] = "iid"  # noise drawn every step, or held for some
    noise_interval: int = 1  # steps for which noise is held; -1: the whole rollout

    # networks
    hidden: tuple[int, ...] = (64, 64)  # hidden layers of every network
    activation: Literal["tanh", "relu", "swish"] = "tanh"  # activation of the hidden layers
    kernel_init: Literal["orthogonal", "lecun_normal"] = "orthogonal"  # of the policies and V
    policy_gain: float = 0.01  # factor on the initial weights of the policies' output layer
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
        """Raise ValueError if rollouts cannot be cut into equal minibatches, or clips conflict."""
        size = self.steps_per_update if self.shuffle == "transitions" else self.num_steps
        kept = self.replay_rollouts
        for name, rollouts in ("", 1), ("_vf", kept), ("_mu", kept):
            n = getattr(self, f"num{name}_minibatches")
            if n % rollouts or rollouts * size % n:
                raise ValueError(
                    f"num{name}_minibatches={n} does not cut each of {rollouts} rollouts of {size} "
                    f"{self.shuffle} (num_envs={self.num_envs}, num_steps={self.num_steps}, "
                    f"replay_rollouts={kept}) into whole minibatches: change one of them"
                )
        if self.noise_interval != -1 and self.noise_interval < 1:
            raise ValueError(f"noise_interval={self.noise_interval}: at least 1, or -1, is needed")
        if self.clip_traj and self.estimator == "pdis":
            raise ValueError("estimator='pdis' clips single ratios: set clip_traj=False")


# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("learning_rate", "max_grad_norm", "gamma", "gae_lambda", "clip_eps", "ent_coef")
TRACEABLE += ("vf_coef", "clip_rho", "clip_c", "symlog_reg_coef")

# --- presets ---

# fmt: off
# Tasks keep the values of PPO's presets, see docs/presets.md.
REPLAY = {
    "num_vf_epochs": 2, "num_vf_minibatches": 16, "num_mu_epochs": 2, "num_mu_minibatches": 16,
}
PHYSICS = {
    **REPLAY, "num_envs": 64, "num_steps": 64, "num_epochs": 8, "num_minibatches": 16,
    "anneal_lr": True, "normalize_obs": True, "normalize_reward": True,
    "total_timesteps": 1_000_000,
}
PAPER = {  # everything a task's own preset may have changed, back to the published default
    "shuffle": "rows", "learning_rate": 3e-4, "anneal_lr": False, "gamma": 0.99, "gae_lambda": 0.95,
    "clip_eps": 0.2, "anneal_clip": False, "ent_coef": 0.0, "vf_coef": 0.5, "normalize_obs": False,
    "normalize_reward": False, "exploration": "iid", "noise_interval": 1, "hidden": (64, 64),
    "policy_gain": 1.0, "log_std_init": 0.0, "adam_eps": 1e-5,
    "clip_rho": 1.5, "clip_c": 1.5, "replay_rollouts": 4, "weight_td": True, "clip_targets": True,
    "clip_actions": True, "symlog_targets": False, "polyak_tau": 0.0, "zero_norm_final": False,
}
SYMLOG = {"symlog_targets": True, "polyak_tau": 0.02}
ZERO = {**SYMLOG, "zero_norm_final": True, "q_kernel_init": "orthogonal"}
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "cartpole": {
        "total_timesteps": 100_000, "num_envs": 8, "num_steps": 32, "num_epochs": 20,
        "num_minibatches": 1, "shuffle": "rows", "learning_rate": 1e-3, "anneal_lr": True,
        "gamma": 0.98, "gae_lambda": 0.8, "anneal_clip": True, "policy_gain": 1.0,
        "kernel_init": "lecun_normal", "num_vf_epochs": 2, "num_mu_epochs": 2,
        "num_mu_minibatches": 8, "adam_eps": 1e-3,
    },
    "pendulum": {
        **REPLAY, "total_timesteps": 300_000, "num_envs": 16, "num_steps": 128, "num_epochs": 10,
        "num_minibatches": 16, "shuffle": "rows", "gamma": 0.9, "learning_rate": 1e-3,
        "anneal_lr": True, "normalize_reward": True,
    },
    "inverted_pendulum": {**PHYSICS, "total_timesteps": 300_000, "learning_rate": 1e-3},
    "inverted_double_pendulum": {**PHYSICS, "total_timesteps": 300_000, "learning_rate": 1e-3},
    "hopper": PHYSICS,
    "walker2d": PHYSICS,
    "halfcheetah": PHYSICS,
    "reacher": {**PHYSICS, "gamma": 0.95},
    "ant": {  # a deviation of 1 at first, and actions would cost more than standing pays
        **PHYSICS, "num_envs": 512, "num_steps": 32, "num_epochs": 4, "hidden": (256, 256),
        "log_std_init": -1.0, "total_timesteps": 2_000_000,
    },
    # the authors' base blocks
    "cartpole_ppo": {
        **PAPER,
        "total_timesteps": 100_000, "num_envs": 8, "num_steps": 32, "num_epochs": 20,
        "num_minibatches": 1, "learning_rate": 1e-3, "anneal_lr": True, "gamma": 0.98,
        "gae_lambda": 0.8, "anneal_clip": True, "num_vf_epochs": 10, "num_vf_minibatches": 4,
        "num_mu_epochs": 10, "num_mu_minibatches": 8, "clip_actions": False,
        "activation": "tanh", "kernel_init": "lecun_normal", "q_kernel_init": "lecun_normal",
    },
    "mujoco_ppo": {
        **PAPER,
        "total_timesteps": 1_500_000, "num_envs": 1, "num_steps": 2048, "num_epochs": 10,
        "num_minibatches": 32, "ent_coef": 0.001, "num_vf_epochs": 20, "num_vf_minibatches": 32,
        "num_mu_epochs": 20, "num_mu_minibatches": 64,
        "activation": "relu", "kernel_init": "orthogonal", "q_kernel_init": "orthogonal",
    },
    "mujoco_ppo_gsde": {
        **PAPER,
        "total_timesteps": 2_000_000, "num_envs": 16, "num_steps": 512, "num_epochs": 20,
        "num_minibatches": 64, "learning_rate": 3e-5, "gae_lambda": 0.9, "clip_eps": 0.4,
        "replay_rollouts": 1, "num_vf_epochs": 40, "num_vf_minibatches": 64, "num_mu_epochs": 40,
        "num_mu_minibatches": 64, "weight_td": False, "clip_targets": False,
        "exploration": "sticky", "noise_interval": 4, "hidden": (256, 256), "activation": "relu",
        "kernel_init": "lecun_normal", "q_kernel_init": "lecun_normal", "log_std_init": -1.0,
    },
    # the authors' add-on blocks, to follow one of these
    "ppo_bpo": {**SYMLOG, "clip_rho": 1.5, "clip_c": 1.5, "clip_traj": False},
    "ppo_bpo_zero": {**ZERO, "clip_rho": 1.5, "clip_c": 1.5, "clip_traj": False},
    "ppo_bpo_zero1.0": {**ZERO, "clip_rho": 1.0, "clip_c": 1.0, "clip_traj": False},
    "ppo_bpo_zero1.0_1.5": {**ZERO, "clip_rho": 1.5, "clip_c": 1.0, "clip_traj": False},
    "ppo_bpo_zero1.0_1.4": {**ZERO, "clip_rho": 1.4, "clip_c": 1.0, "clip_traj": False},
    "ppo_bpo_zero1.0_traj": {**ZERO, "clip_rho": 1.0, "clip_c": 1.0, "clip_traj": True},
    "ppo_bpo_zero1.5_traj": {**ZERO, "clip_rho": 1.5, "clip_c": 1.5, "clip_traj": True},
}
# fmt: on


# --- networks ---


class Torso(nn.Module):
    """Fully connected hidden layers."""

    config: Config
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        activation = getattr(nn, self.config.activation)
        for size in self.config.hidden:
            x = nn.Dense(size, kernel_init=initializer(self.config))(x)
            x = activation(nn.LayerNorm(epsilon=1e-6)(x) if self.layer_norm else x)
        return x


class Actor(nn.Module):
    """Policy network, of pi and mu: observation [..., obs_size] -> Categorical or Gaussian."""

    config: Config
    action_size: int
    discrete: bool

    @nn.compact
    def __call__(self, obs):
        config, size = self.config, self.action_size
        init = initializer(config, config.policy_gain)
        out = nn.Dense(size, kernel_init=init)(Torso(config)(obs))
        if self.discrete:
            return common.Categorical(out)
        log_std = self.param("log_std", nn.initializers.constant(config.log_std_init), (size,))
        return common.Gaussian(out, jnp.broadcast_to(log_std, out.shape))


class Critic(nn.Module):
    """State value: observation [..., obs_size] -> [...]."""

    config: Config

    @nn.compact
    def __call__(self, obs):
        x = Torso(self.config)(obs)
        return nn.Dense(1, kernel_init=initializer(self.config))(x)[..., 0]


class ActionCritic(nn.Module):
    """Q, or Q^ if `positive`, of an observation [..., obs_size] and an action -> [...].

    Without an action, if actions are discrete, of each of them: [..., action_size].
    """

    config: Config
    action_size: int
    discrete: bool
    positive: bool

    @nn.compact
    def __call__(self, obs, action=None):
        config = replace(self.config, kernel_init=self.config.q_kernel_init)
        if not self.discrete:
            action = jnp.clip(action, -1.0, 1.0) if config.clip_actions else action
            obs = jnp.concatenate([obs, action], -1)
        zero = config.zero_norm_final
        init = nn.initializers.zeros if zero else initializer(config)
        size = self.action_size if self.discrete else 1
        out = nn.Dense(size, kernel_init=init)(Torso(config, layer_norm=zero)(obs))
        out = nn.softplus(out) + 1e-6 if self.positive else out
        if not self.discrete:
            return out[..., 0]
        return out if action is None else jnp.take_along_axis(out, action[..., None], -1)[..., 0]


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
    log_prob: jax.Array  # of mu
    reward: jax.Array
    terminated: jax.Array
    done: jax.Array  # terminated or truncated
    next_obs: jax.Array  # true successor, never a reset observation


class Batch(NamedTuple):
    """What the losses of pi and V need of a transition."""

    obs: jax.Array  # normalised
    action: jax.Array
    log_prob: jax.Array  # of mu, or of pi when it was collected (weight_on_adv)
    advantage: jax.Array
    target: jax.Array


class Experience(NamedTuple):
    """What the losses of Q, Q^ and mu need of a transition in the replay."""

    obs: jax.Array  # normalised
    action: jax.Array
    reward: jax.Array  # of the task, without the bootstrap of a time limit
    terminated: jax.Array
    policy: common.Categorical | common.Gaussian  # pi at obs
    log_ratio: jax.Array  # log pi - log mu: pi as it is now, mu as it acted
    value: jax.Array  # V(obs)
    next_obs: jax.Array
    next_policy: common.Categorical | common.Gaussian  # pi at next_obs


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "actor", "critic", "mu", "q" and "qhat"
    target_params: dict  # of "q" and "qhat"
    opt_state: dict  # like params
    replay: Transition  # [K T, N, ...]
    reward_range: jax.Array  # [2] smallest and largest reward so far, and 0
    r_hat_max: jax.Array  # [] largest reward of Q^ so far
    obs_stats: common.Stats
    reward_scale: common.RewardScale
    obs: jax.Array  # [N, obs_size]
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32


# --- targets and losses ---


def step_estimator(
    reward, value, next_value, terminated, done, log_ratio, gamma, lam, clip_rho, clip_c,
    weight_on_adv=False, pdis=False,
):  # fmt: skip
    """Advantages and value targets [T, N], each ratio clipped by itself (V-trace with a lambda).

    Arrays [T, N]; `next_value` is the value of the true successor. The advantage leaves the first
    action's weight to the surrogate, unless `weight_on_adv`. With `pdis` the ratio multiplies
    r + gamma V' instead of the temporal difference: per-decision importance sampling.
    """
    ratio = jnp.exp(log_ratio)
    rho, c = jnp.minimum(ratio, clip_rho), jnp.minimum(ratio, clip_c)
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    weighted = rho * (delta + value) - value if pdis else rho * delta

    def backward(trace, step):
        delta, weighted, c, done = step
        later = gamma * lam * jnp.where(done, 0.0, trace)
        trace = weighted + c * later
        return trace, (delta + later, trace)

    xs = delta, weighted, c, done
    advantage, trace = jax.lax.scan(backward, jnp.zeros_like(delta[0]), xs, reverse=True)[1]
    return rho * advantage if weight_on_adv else advantage, value + trace


def trajectory_estimator(
    reward, value, next_value, terminated, done, log_ratio, gamma, lam, clip_rho, clip_c,
    weight_on_adv=False, official=False,
):  # fmt: skip
    """As `step_estimator`, with the product of the ratios after the first step clipped as a whole.

    `official` counts the end of an episode one step late, as the authors' code does.
    """
    T = len(reward)
    rho = jnp.minimum(jnp.exp(log_ratio), clip_rho)
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    ends = jnp.cumsum(done, 0)
    episode = ends if official else ends - done
    total = jnp.cumsum(log_ratio, 0)
    lag = jnp.arange(T) - jnp.arange(T)[:, None]  # [t, k] = k - t
    together = (lag >= 0)[..., None] & (episode[:, None] == episode)  # [t, k, N]
    weight = jnp.exp(jnp.minimum(jnp.log(clip_c), total - total[:, None]))
    weight = jnp.where(together, (gamma * lam) ** jnp.maximum(lag, 0)[..., None] * weight, 0.0)
    advantage = jnp.einsum("tkn,kn->tn", weight, delta)
    return rho * advantage if weight_on_adv else advantage, value + rho * advantage


def policy_loss(log_prob, old_log_prob, advantage, clip_eps):
    """Clipped surrogate loss (Schulman et al. 2017, eq. 7), with its diagnostics."""
    log_ratio = jnp.clip(log_prob - old_log_prob, -20.0, 20.0)  # far from 0 before any step
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


def standardize(x):
    """`x` with mean 0 and deviation 1."""
    return (x - x.mean()) / (x.std() + 1e-8)


def symlog(x):
    """Logarithm of magnitudes that is odd and the identity near 0."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x):
    """Inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def fqe_target(reward, terminated, next_value, gamma):
    """Target of fitted Q evaluation: a time limit bootstraps, a failure does not."""
    return reward + gamma * jnp.where(terminated, 0.0, next_value)


def fqe_loss(output, target, anchor, weight, reg_coef):
    """Weighted squared error to the target, plus a pull to the target network's output `anchor`."""
    return (weight * ((output - target) ** 2 + reg_coef * (output - anchor) ** 2)).mean()


def td_weight(log_ratio):
    """Clipped ratios pi / mu of a minibatch, with mean 1."""
    weight = jnp.clip(jnp.exp(jnp.clip(log_ratio, -10.0, 10.0)), 0.1, 10.0)
    return weight / (weight.mean() + 1e-6)


def second_moment_reward(reward, q):
    """Reward of Q^, from E[(r + gamma G)^2] with Q = r + gamma E[G]; for deterministic rewards."""
    return 2.0 * reward * q - reward**2


def centred_moment(qhat, q, value):
    """E[(G - V)^2 | s, a], which V-trace's variance grows with. Extension, not in the paper."""
    return jnp.maximum(qhat - 2.0 * value * q + value**2, 1e-6)


def mu_target(log_pi, moment):
    """Log-probabilities of the policy proportional to pi sqrt(moment), [..., number of actions]."""
    return jax.nn.log_softmax(log_pi + 0.5 * jnp.log(moment))


def mu_loss_discrete(log_mu, log_target):
    """Cross-entropy of mu to its target, both [..., number of actions]."""
    return -(jnp.exp(log_target) * log_mu).sum(-1).mean()


def mu_loss_continuous(log_mu, log_pi, moment, official=False):
    """Reverse KL to pi sqrt(moment), up to log Z, from reparameterised actions of mu [B].

    The `official` code takes the smallest moment of the minibatch for all actions (B2).
    """
    moment = moment.min() if official else moment
    return (log_mu - log_pi - 0.5 * jnp.log(moment)).mean()


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, config.num_envs)
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    actor = Actor(config, env.action_size, env.discrete)
    critic = Critic(config)
    nets = {
        name: ActionCritic(config, env.action_size, env.discrete, positive=name == "qhat")
        for name in ("q", "qhat")
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=config.adam_eps),
    )
    T, N, K = config.num_steps, config.num_envs, config.replay_rollouts
    held = config.noise_interval if config.noise_interval > 0 else T
    if config.exploration == "iid" or env.discrete:
        held = 1
    official = config.fidelity == "official"
    # As in the authors' code: with symlog the target networks only pull, and without it they make
    # the targets of continuous actions alone.
    from_online = config.symlog_targets or env.discrete

    def init(key) -> TrainState:
        key_actor, key_critic, key_q, key_qhat, key_env, key = jax.random.split(key, 6)
        obs, env_state = env.reset(key_env)
        sample = jnp.zeros((1, env.obs_size))
        action = jnp.zeros((N,), jnp.int32) if env.discrete else jnp.zeros((N, env.action_size))
        params = {
            "actor": actor.init(key_actor, sample),
            "critic": critic.init(key_critic, sample),
            "q": nets["q"].init(key_q, sample, action[:1]),
            "qhat": nets["qhat"].init(key_qhat, sample, action[:1]),
        }
        params["mu"] = jax.tree.map(jnp.copy, params["actor"])  # the first rollout is on-policy
        scalar, flag = jnp.zeros(N), jnp.zeros(N, bool)
        row = Transition(obs, action, scalar, scalar, flag, flag, obs)
        return TrainState(
            params=params,
            target_params={name: jax.tree.map(jnp.copy, params[name]) for name in nets},
            opt_state={name: optimizer.init(params[name]) for name in params},
            replay=jax.tree.map(lambda x: jnp.zeros((K * T, *x.shape), x.dtype), row),
            reward_range=jnp.zeros(2),
            r_hat_max=jnp.float32(1e-8),
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
        """Exploration noise for `shape` actions."""
        draw = jax.random.gumbel if env.discrete else jax.random.normal
        return draw(key, (*shape, env.action_size))

    def rollout(state, key):
        """Let mu act for T steps; returns the next observation and state, and arrays [T, N]."""
        key_noise, key_env, key_refresh = jax.random.split(key, 3)
        noise = noise_of(key_noise, (math.ceil(T / held), N))
        env_state = env.refresh(key_refresh, state.env_state)

        def step(carry, x):
            obs, env_state = carry
            t, key = x
            policy = actor.apply(state.params["mu"], normalize(state.obs_stats, obs))
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

    def ppo_loss_fn(clip_eps, params, _target, batch, _key):
        policy = actor.apply(params["actor"], batch.obs)
        advantage = batch.advantage
        if config.normalize_advantage:
            advantage = standardize(advantage)
        pg_loss, aux = policy_loss(
            policy.log_prob(batch.action), batch.log_prob, advantage, clip_eps
        )
        vf_loss = value_loss(critic.apply(params["critic"], batch.obs), batch.target)
        aux |= {
            "losses/policy_loss": pg_loss,
            "losses/value_loss": vf_loss,
            "losses/entropy": policy.entropy().mean(),
        }
        return pg_loss + config.vf_coef * vf_loss, aux

    def to_value(output):
        return symexp(output) if config.symlog_targets else output

    def sampled(policy, key):
        """One action for each state; None, which stands for all of them, if they are discrete."""
        return None if env.discrete else policy.sample(noise_of(key, policy.mean.shape[:-1]))

    def q_value(params, obs, action, bounds):
        """Q, clipped to `bounds` where its targets are."""
        q = to_value(nets["q"].apply(params, obs, action))
        return jnp.clip(q, *bounds) if config.clip_targets else q

    def fqe_loss_fn(name, gamma, bounds, params, target_params, batch, key):
        net, params, target_params = nets[name], params[name], target_params[name]
        source = params if from_online else target_params
        next_value = to_value(net.apply(source, batch.next_obs, sampled(batch.next_policy, key)))
        if env.discrete:
            next_value = (jax.nn.softmax(batch.next_policy.logits) * next_value).sum(-1)
        target = fqe_target(batch.reward, batch.terminated, next_value, gamma)
        bounded = jnp.clip(target, *bounds) if config.clip_targets else target
        wanted = jax.lax.stop_gradient(symlog(bounded) if config.symlog_targets else bounded)
        output, anchor = (net.apply(x, batch.obs, batch.action) for x in (params, target_params))
        reg_coef = config.symlog_reg_coef if config.symlog_targets else 0.0
        weight = td_weight(batch.log_ratio) if config.weight_td else 1.0
        loss = fqe_loss(output, wanted, anchor, weight, reg_coef)
        clipped = (bounded != target).mean()
        return loss, {f"losses/{name}_loss": loss, f"health/{name}_target_clip_fraction": clipped}

    def mu_loss_fn(critic_params, q_bounds, qhat_max, params, _target, batch, key):
        mu = actor.apply(params["mu"], batch.obs)
        action = sampled(mu, key)
        moment = jnp.ones(())
        if config.mu_loss != "kl":
            moment = to_value(nets["qhat"].apply(critic_params["qhat"], batch.obs, action))
            moment = jnp.clip(moment, 1e-6, qhat_max if config.clip_targets else None)
        if config.mu_loss == "centred":
            value = batch.value[..., None] if env.discrete else batch.value
            q = q_value(critic_params["q"], batch.obs, action, q_bounds)
            moment = centred_moment(moment, q, value)
        if env.discrete:
            log_pi, log_mu = (jax.nn.log_softmax(x.logits) for x in (batch.policy, mu))
            loss = mu_loss_discrete(log_mu, mu_target(log_pi, moment))
        else:
            log_pi = batch.policy.log_prob(action)
            loss = mu_loss_continuous(mu.log_prob(action), log_pi, moment, official)
        return loss - config.ent_coef * mu.entropy().mean(), {"losses/mu_loss": loss}

    def learning_rate(state, opt_state):
        remaining = 1.0 - state.update / config.num_updates
        if official:  # B5: as many steps as pi takes, whatever network it is
            steps = config.num_updates * config.num_epochs * config.num_minibatches
            remaining = jnp.maximum(1.0 - opt_state[1].count / steps, 0.0)
        return config.learning_rate * (remaining if config.anneal_lr else 1.0)

    def descend(state, params, grads, opt_state):
        """One step of the optimiser on one network."""
        rate = learning_rate(state, opt_state)
        direction, opt_state = optimizer.update(grads, opt_state)
        return jax.tree.map(lambda p, u: p - rate * u, params, direction), opt_state

    def fit(state, names, loss_fn, data, num_rollouts, key, num_epochs, num_minibatches):
        """Train networks by `loss_fn(params, target_params, batch, key)`; also returns its metrics.

        `data` has room for `num_rollouts` of equal size, which fill it in order and are whole
        minibatches each, so there are fewer of them at first. The loop's bound depends on the
        shared counter alone: no seed waits for another.
        """
        if config.shuffle == "transitions":
            data = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), data)
        size, filled = len(data.obs), jnp.minimum(state.update + 1, num_rollouts)
        used = filled * (num_minibatches // num_rollouts)

        def gradient_step(index, key, i, carry):
            params, target_params, opt_state, metrics = carry
            batch = jax.tree.map(lambda x: x[index[i]], data)
            grads, aux = jax.grad(loss_fn, has_aux=True)(
                params, target_params, batch, jax.random.fold_in(key, i)
            )
            aux["losses/grad_norm"] = optax.global_norm(grads)
            metrics = jax.tree.map(lambda total, x: total + x / (num_epochs * used), metrics, aux)
            steps = {n: descend(state, params[n], grads[n], opt_state[n]) for n in names}
            params, opt_state = ({n: steps[n][part] for n in names} for part in (0, 1))
            tau = config.polyak_tau if config.polyak_tau > 0 else 1.0 * (i == used - 1)
            online = {name: params[name] for name in target_params}
            target_params = optax.incremental_update(online, target_params, tau)
            return params, target_params, opt_state, metrics

        def epoch(carry, key):
            key_order, key_steps = jax.random.split(key)
            order = jax.random.uniform(key_order, (size,))
            order = jnp.where(jnp.arange(size) < filled * (size // num_rollouts), order, jnp.inf)
            index = jnp.argsort(order).reshape(num_minibatches, -1)
            return jax.lax.fori_loop(0, used, partial(gradient_step, index, key_steps), carry), None

        fields = "params", "target_params", "opt_state"
        trees = [getattr(state, field) for field in fields]
        carry = [{name: tree[name] for name in names if name in tree} for tree in trees]
        aux = jax.eval_shape(loss_fn, *carry[:2], jax.tree.map(lambda x: x[:1], data), key)[1]
        aux = {name: jnp.zeros(()) for name in (*aux, "losses/grad_norm")}
        keys = jax.random.split(key, num_epochs)
        (*fitted, metrics), _ = jax.lax.scan(epoch, (*carry, aux), keys)
        fitted = [tree | new for tree, new in zip(trees, fitted, strict=True)]
        return state._replace(**dict(zip(fields, fitted, strict=True))), metrics

    def fit_to_replay(state, scale, key):
        """Fit Q, Q^ and then mu to the new pi, whose opinion of the replay is computed once."""
        key_q, key_qhat, key_stale, key_mu = jax.random.split(key, 4)
        replay, pi = state.replay, state.params["actor"]
        obs, next_obs = (normalize(state.obs_stats, x) for x in (replay.obs, replay.next_obs))
        policy = actor.apply(pi, obs)
        data = Experience(
            obs=obs,
            action=replay.action,
            reward=scale * replay.reward,
            terminated=replay.terminated,
            policy=policy,
            log_ratio=policy.log_prob(replay.action) - replay.log_prob,
            value=critic.apply(state.params["critic"], obs),
            next_obs=next_obs,
            next_policy=actor.apply(pi, next_obs),
        )

        gamma, passes = config.gamma, (config.num_vf_epochs, config.num_vf_minibatches)
        q_bounds = scale * state.reward_range / (1.0 - gamma)
        loss_fn = partial(fqe_loss_fn, "q", gamma, q_bounds)
        state, q_metrics = fit(state, ["q"], loss_fn, data, K, key_q, *passes)

        q_params = (state.params if from_online else state.target_params)["q"]
        r_hat = second_moment_reward(
            data.reward, q_value(q_params, data.obs, data.action, q_bounds)
        )
        filled = jnp.arange(K)[:, None] <= state.update
        r_hat_max = jnp.max(r_hat.reshape(K, -1), where=filled, initial=0.0) / scale**2
        state = state._replace(r_hat_max=jnp.maximum(state.r_hat_max, r_hat_max))

        if official:  # B1: raw rewards, of whatever transitions
            rows = jnp.minimum(state.update + 1, K) * T
            r_hat = data.reward[jax.random.randint(key_stale, (K * T,), 0, rows)]
        qhat_bounds = jnp.stack([1e-8, scale**2 * state.r_hat_max]) / (1.0 - gamma**2)
        loss_fn = partial(fqe_loss_fn, "qhat", gamma**2, qhat_bounds)
        data = data._replace(reward=r_hat)
        state, qhat_metrics = fit(state, ["qhat"], loss_fn, data, K, key_qhat, *passes)

        passes = config.num_mu_epochs, config.num_mu_minibatches
        source = state.params if config.symlog_targets else state.target_params
        loss_fn = partial(mu_loss_fn, source, q_bounds, qhat_bounds[1])
        state, mu_metrics = fit(state, ["mu"], loss_fn, data, K, key_mu, *passes)
        return state, q_metrics | qhat_metrics | mu_metrics

    def update(state):
        key, key_rollout, key_shuffle, key_replay = jax.random.split(state.key, 4)
        remaining = 1.0 - state.update / config.num_updates
        clip_eps = config.clip_eps * (remaining if config.anneal_clip else 1.0)

        obs, env_state, traj, info = rollout(state, key_rollout)

        scale = state.reward_scale.factor() if config.normalize_reward else 1.0
        normalized_obs = normalize(state.obs_stats, traj.obs)
        value, next_value = (
            critic.apply(state.params["critic"], x)
            for x in (normalized_obs, normalize(state.obs_stats, traj.next_obs))
        )
        log_pi = actor.apply(state.params["actor"], normalized_obs).log_prob(traj.action)
        log_ratio = jnp.clip(log_pi - traj.log_prob, -20.0, 20.0)
        args = scale * traj.reward, value, next_value, traj.terminated, traj.done, log_ratio
        args += config.gamma, config.gae_lambda, config.clip_rho, config.clip_c
        if config.clip_traj:
            advantage, target = trajectory_estimator(*args, config.weight_on_adv, official)
        else:
            pdis = config.estimator == "pdis"
            advantage, target = step_estimator(*args, config.weight_on_adv, pdis)
        log_old = log_pi if config.weight_on_adv else traj.log_prob
        batch = Batch(normalized_obs, traj.action, log_old, advantage, target)
        passes = config.num_epochs, config.num_minibatches
        loss_fn = partial(ppo_loss_fn, clip_eps)
        state, metrics = fit(state, ["actor", "critic"], loss_fn, batch, 1, key_shuffle, *passes)

        write = partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=state.update % K * T, axis=0
        )
        rewards = jnp.append(traj.reward, state.reward_range)
        state = state._replace(
            replay=jax.tree.map(write, state.replay, traj),
            reward_range=jnp.stack([rewards.min(), rewards.max()]),
        )
        state, replay_metrics = fit_to_replay(state, scale, key_replay)

        q, qhat = (
            to_value(net.apply(state.params[name], normalized_obs, traj.action))
            for name, net in nets.items()
        )
        ratio = jnp.exp(log_ratio)
        metrics = replay_metrics | metrics  # the gradient norm is that of pi and V
        metrics |= common.run_metrics(info, (state.params, metrics["losses/value_loss"]))
        metrics |= {
            "losses/explained_variance": 1.0 - (target - value).var() / (target.var() + 1e-8),
            "ratios/mean": ratio.mean(),
            "ratios/max": ratio.max(),
            "ratios/ess": ratio.mean() ** 2 / (ratio**2).mean(),
            "ratios/clip_fraction": (ratio > config.clip_rho).mean(),
            "charts/learning_rate": jnp.asarray(learning_rate(state, state.opt_state["actor"])),
            "health/kl_mu_pi": (ratio - 1.0 - log_ratio).mean(),
            "health/qhat_q2_corr": (standardize(qhat) * standardize(q**2)).mean(),
            "health/qhat_below_q2": (qhat < q**2).mean(),
        }
        state = state._replace(
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
    launch.main("bpo", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

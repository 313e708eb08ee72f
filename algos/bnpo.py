"""Bellman with (natural and) policy optimisation (BNPO): PPO and DDPG train one actor in turns.

After R. Dai's experiments of 2019, https://github.com/rezer0dai/bnpo, for tasks with goals g. The
critic does not take an action. It takes the parameters of a Gaussian: Q(s, g, mean, std) is the
expected return of drawing one action from it and following the policy pi afterwards. DDPG follows
the gradient of Q with respect to mean and std, and the baseline of PPO is Q(s, g, pi(s, g)).

A brain is a learning rule with its own actor optimiser, target actor, schedule and window of the
replay buffer. The brains take turns; all of them train the same actor and the same critic. The
losses use the n-step target y = y_0 of a sampled step, computed by target networks Q' and pi':

    V_j     = Q'(s_j, g_j, mean_j, std_j)
    y_j     = r_j + gamma (1 - terminated_j) ((1 - lambda) V_{j+1} + lambda y_{j+1})  j < n - 1
    y_{n-1} = r_{n-1} + gamma (1 - terminated_{n-1}) Q'(s_n, g_n, pi'(s_n, g_n))
    critic:  E[(Q(s, g, mean, std) - y)^2]
    PPO:     -E[min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)],   A = y - Q(s, g, pi(s, g))
    DDPG:    -E[D],   D = Q(s, g, pi(s, g)) - y
    weighted DDPG: -E[min(ratio D, clip(ratio, 1 - eps, 1 + eps) D)]

In V_j and in the critic's loss mean and std are those of the behaviour policy, as stored. pi(s, g)
stands for those of the current actor. ratio is pi(a | s, g) over the behaviour policy's density, by
default the geometric mean over the action's dimensions, and at most 100. A and D are sums over the
parts of the reward. No gradient goes through y, through Q's parameters in the losses of PPO and
DDPG, through A in PPO's, or through the ratio in weighted DDPG's.

Hindsight relabelling replaces the goals of some sampled steps by goals that the same episode had at
other times ("shift"), recomputes the rewards, and sets n to 1. The behaviour policy under the
original goals is still the correct denominator of the ratio, as long as the new goals do not depend
on the actions; docs/bnpo.md has the equation and its assumptions.

Differences from ppo.py:

1. The critic is Q(s, g, mean, std), not V(s). A reward may be a vector of m parts: Q has m outputs.
2. Minibatches come from a replay buffer of whole episodes. Target networks compute the targets of
   a minibatch when it is sampled. The first brain's target actor is evaluated and exported.
3. An update is one short episode in all environments, from a reset to the time limit. The brains
   learn during it, from earlier episodes. Steps are sampled so that no target reaches a time limit.
4. Noise on the actor's weights adds exploration and stays on in the losses. The actor has no
   biases, and its std is bounded.
5. Observation statistics change at every environment step.
6. Advantages are not standardised, and there is no entropy bonus.

    python algos/bnpo.py --env arm/reacher-moving --num-seeds 10
    python algos/bnpo.py --env arm/reacher-moving --preset a4 --num-seeds 10

Documentation: docs/bnpo.md
"""

import itertools
import math
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # the checkout, not algos/, comes first on the import path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends the imports at once

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

import envs
from algos import common, launch
from algos.common import UnitFloat


@dataclass(frozen=True)
class Brain:
    """One learning rule, its data and its schedule."""

    # objective
    # PPO, DDPG, or DDPG whose gradient is weighted by the clipped importance ratio
    rule: Literal["ppo", "ddpg", "weighted_ddpg"] = "ppo"
    clip_eps: NonNegativeFloat = 0.2  # clip range of the importance ratio; "ddpg" has no ratio
    mean_only: bool = False  # DDPG trains the policy's mean only, not its std

    # data
    buffer_size: PositiveInt = 6_000  # newest environment steps to sample from, as whole episodes
    batch_size: PositiveInt = 2048  # sampled steps in a minibatch
    her_ratio: UnitFloat = 0.0  # share of sampled steps that get goals in hindsight
    importance_resampling: bool = False  # prefer steps with a large importance ratio

    # schedule
    learning_starts: PositiveInt = 2048  # sampleable steps collected before it learns
    turn_interval: PositiveInt = 60  # steps of each environment between two turns
    turn_minibatches: PositiveFloat = 6.0  # minibatches per turn; 1.5: 1 and 2 alternately

    # optimiser of the actor: Adam, or natural gradient steps, which need no learning rate
    learning_rate: NonNegativeFloat = 1e-3  # learning rate of Adam
    natural_gradient: bool = False  # a natural gradient step in place of Adam's

    # target networks
    actor_tau: UnitFloat = 0.1  # Polyak step of this brain's target actor
    actor_tau_interval: PositiveInt = 2  # minibatches between two such steps
    critic_tau: UnitFloat = 0.1  # Polyak step of the target critic
    critic_tau_interval: PositiveInt = 1  # minibatches between two such steps
    own_target_actor: bool = True  # bootstrap from its own target actor, else from a random one

    def validate(self) -> None:
        """Raise ValueError if `mean_only` would have no effect."""
        if self.mean_only and self.rule == "ppo":
            raise ValueError("mean_only=True: rule='ppo' has no gradient through the critic")

    def minibatches(self, steps):
        """Number of minibatches due in the first `steps` (array) steps of each environment."""
        return (steps // self.turn_interval * self.turn_minibatches).astype(np.int32)


# fmt: off
PPO_BRAIN = Brain()
DDPG_BRAIN = Brain(
    rule="ddpg", mean_only=True, buffer_size=240_000, batch_size=512, her_ratio=0.12,
    importance_resampling=True, learning_starts=1536, turn_interval=10, turn_minibatches=1.5,
    learning_rate=3e-5, actor_tau_interval=1, own_target_actor=False,
)
# fmt: on


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "arm/reacher-moving"  # task, see docs/environments.md
    total_timesteps: PositiveInt = 384_000  # environment steps per seed, all environments together

    # brains
    brains: tuple[Brain, ...] = (PPO_BRAIN, DDPG_BRAIN)  # in the order of their turns
    share_target_actor: bool = False  # one target actor for all brains instead of one each

    # batch
    num_envs: PositiveInt = 20  # parallel environments per seed
    num_steps: PositiveInt = 60  # length of a training episode, which is a rollout

    # optimiser: Adam, after clipping by global norm; each brain has its own for the actor
    critic_lr: NonNegativeFloat = 3e-4  # learning rate of the critic
    max_grad_norm: PositiveFloat = 1.0  # largest global norm of one network's gradient

    # objective
    gamma: UnitFloat = 0.99  # discount
    gae_lambda: UnitFloat = 0.95  # lambda of the n-step targets
    max_nstep: PositiveInt = 10  # largest n of the n-step targets
    floating_nstep: bool = True  # n from 1 to max_nstep, equally often; else always max_nstep
    # hindsight goals: the episode's goals from another step on, or what it achieved at a later step
    her_strategy: Literal["shift", "future"] = "shift"
    # denominator of the ratio for relabelled steps: the behaviour policy under the original goals,
    # or the policy at the start of the turn under the new goals
    ratio_denominator: Literal["behaviour", "relabelled"] = "behaviour"
    ratio_reduce: Literal["mean", "sum"] = "mean"  # of log-ratios over action dimensions

    # observations and rewards
    reward_kind: Literal["env", "proxy", "proxy_sum", "sparse"] = "proxy"  # reward to learn from

    # exploration
    param_noise_interval: PositiveInt = 10  # steps of each environment between changes of noise

    # networks
    hidden: tuple[PositiveInt, ...] = (400, 300)  # hidden layers of the actor and of the critic
    tanh_mean: bool = False  # bound the policy's mean to [-1, 1] by tanh
    critic_input: Literal["distribution", "action"] = "distribution"  # action: Q(s, g, a)

    @property
    def steps_per_update(self) -> int:
        """Environment steps in one episode of all environments."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    @property
    def buffer_episodes(self) -> int:
        """Number of episodes in the replay buffer, per environment."""
        return max(map(self.window, self.brains))

    def window(self, brain: Brain) -> int:
        """Number of newest episodes, per environment, that a brain samples from."""
        return max(1, brain.buffer_size // self.steps_per_update)

    def warmup(self, brain: Brain) -> int:
        """Number of episodes that must be complete before a brain learns."""
        steps = self.num_envs * (self.num_steps - self.max_nstep)  # to sample from in an episode
        return math.ceil(brain.learning_starts / steps)

    def validate(self) -> None:
        """Raise ValueError if max_nstep is too large, or a brain is invalid or never learns."""
        if not self.brains:
            raise ValueError("brains=(): at least one is needed")
        if self.max_nstep >= self.num_steps:
            raise ValueError(
                f"max_nstep={self.max_nstep}: it should be less than num_steps={self.num_steps}"
            )
        for k, brain in enumerate(self.brains):
            try:
                common.check(brain)
            except ValueError as error:
                raise ValueError(f"brains[{k}].{error}") from None
            warmup = self.warmup(brain)
            first, end = brain.minibatches(self.num_steps * np.array([warmup, self.num_updates]))
            if first >= end:
                raise ValueError(
                    f"brains[{k}] never learns: it needs {warmup} of {self.num_updates} episodes "
                    f"before its first turn, and has a turn every {brain.turn_interval} steps: "
                    "lower its learning_starts or turn_interval, or raise total_timesteps"
                )


NUM_CANDIDATES = 8  # steps drawn for each one that importance resampling keeps


# --- networks ---


class Actor(nn.Module):
    """Policy network without biases: observation [..., obs_size] and parameter noise -> Gaussian.

    A layer's weights [in, out] are kernel + noise_std * noise; kernel and noise_std are learned.
    """

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, x, noise):
        for i, size in enumerate((*self.config.hidden, self.action_size)):
            x = nn.relu(x) if i > 0 else x
            shape = x.shape[-1], size
            kernel = self.param(f"kernel_{i}", uniform(math.sqrt(3.0 / shape[0])), shape)
            noise_std = self.param(f"noise_std_{i}", nn.initializers.constant(0.017), shape)
            x = x @ (kernel + noise_std * noise[i])
        mean = jnp.tanh(x) if self.config.tanh_mean else x
        # The std does not depend on the observation and stays between 1 / e and e.
        log_std = jnp.tanh(self.param("log_std", nn.initializers.zeros, (self.action_size,)))
        return common.Gaussian(mean, jnp.broadcast_to(log_std, mean.shape))


class Critic(nn.Module):
    """Q: observation [..., obs_size] and the Gaussian that draws the action -> [..., num_heads].

    With critic_input="action" it is an ordinary Q of `action`, or of the Gaussian's mean.
    """

    config: Config
    num_heads: int

    @nn.compact
    def __call__(self, x, policy, action=None):
        if self.config.critic_input == "distribution":
            action = jnp.concatenate([policy.mean, jnp.exp(policy.log_std)], -1)
        elif action is None:
            action = policy.mean
        x = jnp.concatenate([nn.relu(dense(x, x.shape[-1])), dense(action, x.shape[-1])], -1)
        for size in self.config.hidden:
            x = nn.relu(dense(x, size))
        return dense(x, self.num_heads, 3e-3)


def uniform(bound: float):
    """Initialiser, uniform in [-bound, bound]."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, -bound, bound)


def dense(x, size: int, bound: float | None = None):
    """Linear layer; weights within `bound`, by default 1 / sqrt(outputs) as the author has it."""
    kernel_init = uniform(bound or 1.0 / math.sqrt(size))
    bias_init = uniform(1.0 / math.sqrt(x.shape[-1]))
    return nn.Dense(size, kernel_init=kernel_init, bias_init=bias_init)(x)


# --- data types ---


class Trajectory(NamedTuple):
    """Consecutive steps: a rollout [T, N, ...], samples [B, H, ...], or the replay buffer.

    The buffer, [W, N, T, ...], has W episodes of each environment. It and samples have one more
    observation than steps; a stored episode ends with its true successor.
    """

    obs: jax.Array  # as the environment gave it
    action: jax.Array  # unclipped; the environment clips
    policy: common.Gaussian  # the behaviour policy, with its parameter noise
    reward: jax.Array  # [..., m], of reward_kind
    terminated: jax.Array


class Rows(NamedTuple):
    """Where sampled steps are in the replay buffer, and their hindsight; int arrays [B]."""

    episode: jax.Array
    env: jax.Array
    step: jax.Array
    relabel: jax.Array  # bool: the goals are replaced
    goal_step: jax.Array  # step of the same episode that the new goals come from


class Batch(NamedTuple):
    """What the losses need of sampled steps; arrays [B, ...]."""

    step: Trajectory  # one step, after relabelling; its observation is normalised
    log_prob: jax.Array  # [B, A], denominator of the ratio
    target: jax.Array  # [B, m]


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # keys "actor" and "critic"
    target_params: dict  # keys "critic" and "actor0", "actor1", ...; only "actor0" if it is shared
    opt_state: dict  # keys "critic" and "actor0", "actor1", ..., one for each brain
    noise: tuple  # parameter noise of the actor, [in, out] per layer
    replay: Trajectory
    obs_stats: common.Stats
    obs: jax.Array  # [N, obs_size], as the environment gave it
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32, finished updates


# --- targets and losses ---


def normalize(obs_stats, obs):
    """`Stats.normalize` with an epsilon of 1e-4; observations [..., obs_size] include goals."""
    return jnp.clip((obs - obs_stats.mean) / jnp.sqrt(obs_stats.var + 1e-4), -10.0, 10.0)


def reward_of(goals, kind, obs):
    """Rewards [..., m] for arriving at `obs` [..., obs_size], under the goal in it."""
    return goals.compute_reward(goals.achieved_goal(obs), goals.desired_goal(obs), kind)


def draw_rows(config, brain, update, size, keys) -> Rows:
    """`size` steps, drawn uniformly from the brain's window of finished episodes; five `keys`.

    At least max_nstep steps of the episode come after each of them, so that no target reaches the
    time limit.
    """
    key_age, key_env, key_step, key_relabel, key_goal = keys
    T, H = config.num_steps, config.max_nstep
    age = jax.random.randint(key_age, (size,), 0, jnp.minimum(update, config.window(brain)))
    step = jax.random.randint(key_step, (size,), 0, T - H)
    first, end = (step + 1, T + 1) if config.her_strategy == "future" else (0, T - H + 1)
    return Rows(
        episode=(update - 1 - age) % config.buffer_episodes,
        env=jax.random.randint(key_env, (size,), 0, config.num_envs),
        step=step,
        relabel=jax.random.uniform(key_relabel, (size,)) < brain.her_ratio,
        goal_step=jax.random.randint(key_goal, (size,), first, end),
    )


def resample(key, ratio, size):
    """Indices [size] of rows, drawn without replacement in proportion to min(ratio [B], 2)^0.666.

    Importance resampling after Schlegel et al. 2019. The rows with the largest log-weight plus
    Gumbel noise are such a draw.
    """
    score = 0.666 * jnp.log(jnp.clip(ratio, 1e-8, 2.0)) + jax.random.gumbel(key, ratio.shape)
    return jax.lax.top_k(score, size)[1]


def gather(replay, rows, num_steps) -> Trajectory:
    """The `num_steps` steps [B, num_steps, ...] from each row on, not relabelled."""
    episode, env = rows.episode[:, None], rows.env[:, None]
    step = rows.step[:, None] + np.arange(num_steps + 1)
    traj = jax.tree.map(lambda x: x[episode, env, step[:, :-1]], replay._replace(obs=None))
    return traj._replace(obs=replay.obs[episode, env, step])


def relabel(goals, config, replay, rows, traj) -> Trajectory:
    """Hindsight: new goals for the rows with `relabel`, and the rewards under these goals.

    "shift": the goals that the episode had from `goal_step` on. "future": the goal achieved at
    `goal_step`, for all steps.
    """
    at = lambda step: replay.obs[rows.episode[:, None], rows.env[:, None], step]
    goal = goals.desired_goal(traj.obs)
    if config.her_strategy == "shift":
        ahead = np.arange(traj.obs.shape[1])
        new_goal = goals.desired_goal(at(rows.goal_step[:, None] + ahead))
    else:
        # The first entries of what was achieved are a goal; the others only matter to rewards.
        new_goal = goals.achieved_goal(at(rows.goal_step[:, None]))[..., : goal.shape[-1]]
    obs = goals.with_goal(traj.obs, jnp.where(rows.relabel[:, None, None], new_goal, goal))
    # A terminated step keeps its reward: the observation after it is that of a new start.
    changed = rows.relabel[:, None] & ~traj.terminated
    reward = reward_of(goals, config.reward_kind, obs[:, 1:])
    return traj._replace(obs=obs, reward=jnp.where(changed[..., None], reward, traj.reward))


def lookaheads(config, size):
    """The n [size] of a minibatch's n-step targets: 1 to max_nstep in turn, or max_nstep."""
    n = np.arange(size) % config.max_nstep + 1
    return n if config.floating_nstep else np.full(size, config.max_nstep)


def nstep_target(reward, next_value, bootstrap, n, terminated, gamma, lam):
    """n-step targets [B, m]: V_0 plus the GAE of n steps, in which V_0 cancels.

    `reward` [B, H, m], `terminated` [B, H], and `next_value` [B, H, m], the value after each step.
    After the last of the `n` [B] steps, `bootstrap` [B, m] takes its place.
    """

    def backward(target, step):
        j, reward, next_value, terminated = step
        later = (1.0 - lam) * next_value + lam * target
        later = jnp.where((j == n - 1)[:, None], bootstrap, later)
        return reward + gamma * jnp.where(terminated[:, None], 0.0, later), None

    steps = (jnp.swapaxes(x, 0, 1) for x in (reward, next_value, terminated))
    steps = jnp.arange(reward.shape[1]), *steps
    return jax.lax.scan(backward, jnp.zeros_like(bootstrap), steps, reverse=True)[0]


def log_prob_of(policy, action):
    """Log-density [..., A] of each dimension of an action."""
    z = (action - policy.mean) * jnp.exp(-policy.log_std)
    return -(0.5 * z**2 + policy.log_std + 0.5 * math.log(2.0 * math.pi))


def ratio_of(log_ratio):
    """Importance ratio, at most 100: the gradient of an infinite one would be NaN."""
    return jnp.exp(jnp.minimum(log_ratio, math.log(100.0)))


def policy_loss(brain, q, ratio, target):
    """Loss of a brain's rule; `q` and `target` [B, m], `ratio` [B].

    PPO has a gradient with respect to `ratio` only, both kinds of DDPG with respect to `q` only.
    """
    if brain.rule == "ppo":
        gain = (target - jax.lax.stop_gradient(q)).sum(-1)  # the advantage
    else:
        gain = (q - target).sum(-1)  # the target only decides whether the ratio is clipped
        ratio = jax.lax.stop_gradient(ratio)
    if brain.rule == "ddpg":
        return -gain.mean()
    clipped = jnp.clip(ratio, 1.0 - brain.clip_eps, 1.0 + brain.clip_eps)
    return -jnp.minimum(ratio * gain, clipped * gain).mean()


def value_loss(value, target):
    """Mean squared error to the value target."""
    return ((value - target) ** 2).mean()


def kl_divergence(p: common.Gaussian, q: common.Gaussian):
    """KL(p || q) [...] of two Gaussians."""
    moments = jnp.exp(2.0 * p.log_std) + (p.mean - q.mean) ** 2
    return (q.log_std - p.log_std + 0.5 * moments * jnp.exp(-2.0 * q.log_std) - 0.5).sum(-1)


def fisher_product(policy_at, params, vector, damping):
    """(F + damping I) v, where F is the Fisher matrix of the Gaussians [B, A] of `policy_at`.

    F is the mean over rows of J' M J. J is the Jacobian of (mean, log std), and M is the
    Fisher matrix of a Gaussian with respect to (mean, log std), diag(1 / std^2, 2).
    """
    policy, change = jax.jvp(policy_at, (params,), (vector,))
    change = common.Gaussian(jnp.exp(-2.0 * policy.log_std) * change.mean, 2.0 * change.log_std)
    (product,) = jax.vjp(policy_at, params)[1](change)
    return jax.tree.map(lambda p, v: p / len(policy.mean) + damping * v, product, vector)


def natural_step(loss_at, policy_at, params, grads, delta=1e-3, damping=1e-3, iterations=10):
    """Parameters after a natural gradient step (Schulman et al. 2015, appendix C).

    `loss_at` and `policy_at` are functions of the parameters, and `grads` the gradient of the loss.
    The full step has a mean KL of `delta`, to second order. It is halved up to nine times, until
    the loss falls by at least 0.1% of the predicted decrease and the KL is at most 1.5 delta. If
    this never happens, the parameters stay as they are.
    """
    product = partial(fisher_product, policy_at, params, damping=damping)
    downhill = jax.tree.map(jnp.negative, grads)
    direction, _ = jax.scipy.sparse.linalg.cg(product, downhill, maxiter=iterations)
    size = jnp.sqrt(2.0 * delta / (optax.tree.vdot(direction, product(direction)) + 1e-12))
    predicted = size * jnp.abs(optax.tree.vdot(grads, direction))  # decrease by the full step
    moved = lambda scale: jax.tree.map(lambda p, d: p + scale * size * d, params, direction)
    policy, loss = policy_at(params), loss_at(params)

    def accepted(scale):
        new = moved(scale)
        near = kl_divergence(policy, policy_at(new)).mean() <= 1.5 * delta
        return (loss_at(new) < loss - 1e-3 * scale * predicted) & near

    smallest = 0.5**9
    rejected = lambda scale: (scale >= smallest) & ~accepted(scale)
    scale = jax.lax.while_loop(rejected, lambda scale: 0.5 * scale, 1.0)
    return moved(jnp.where(scale >= smallest, scale, 0.0))


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environments that a run learns in; all of them start an episode at the same time."""
    env = envs.make(config.env, config.num_envs, stagger=False, max_steps=config.num_steps)
    goals, kind = env.goals, config.reward_kind
    if env.discrete:
        raise ValueError(
            f"{env.name} has discrete actions, and BNPO needs continuous ones: "
            "run it with ppo.py, bpo.py, p3o.py or reppo_discrete.py"
        )
    if not goals and (kind != "env" or any(brain.her_ratio for brain in config.brains)):
        off = " ".join(f"--brains.{k}.her-ratio 0" for k in range(len(config.brains)))
        raise ValueError(f"{env.name} has no goals: add --reward-kind env {off}")
    if goals and kind not in goals.kinds:
        known = ", ".join(goals.kinds)
        raise ValueError(f"{env.name} has no reward_kind={kind!r}: choose from {known}")
    if goals and goals.moving and config.her_strategy == "future":
        raise ValueError(
            f"{env.name} moves its goal within an episode, and her_strategy='future' gives "
            "constant goals: take 'shift'"
        )
    return env


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose environments, networks and optimiser into the pure functions of a run."""
    T, N, H, A = config.num_steps, config.num_envs, config.max_nstep, env.action_size
    # Parameter noise may change, and brains may learn, between blocks of U steps.
    U = math.gcd(T, config.param_noise_interval, *(x.turn_interval for x in config.brains))
    goals, kind, K = env.goals, config.reward_kind, len(config.brains)
    obs_like = jnp.zeros((1, env.obs_size))
    # A saved policy is loaded with a stand-in for its task, without goals. Its critic is not used.
    from_goals = goals and kind != "env"
    num_heads = reward_of(goals, kind, obs_like).shape[-1] if from_goals else 1
    actor, critic = Actor(config, A), Critic(config, num_heads)
    no_noise = tuple(map(jnp.zeros, itertools.pairwise((env.obs_size, *config.hidden, A))))
    optimizer = optax.chain(  # no learning rate: see descend
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    )

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        params = {"actor": actor.init(key_actor, obs_like, no_noise)}
        policy = actor.apply(params["actor"], obs_like, no_noise)
        params["critic"] = critic.init(key_critic, obs_like, policy)
        num_targets = 1 if config.share_target_actor else K
        target_actors = {f"actor{k}": params["actor"] for k in range(num_targets)}
        opt_states = {f"actor{k}": optimizer.init(params["actor"]) for k in range(K)}
        zeros = lambda *shape: jnp.zeros((config.buffer_episodes, N, *shape))
        return TrainState(
            params=params,
            target_params={"critic": params["critic"], **target_actors},
            opt_state={"critic": optimizer.init(params["critic"]), **opt_states},
            noise=no_noise,
            obs_stats=common.Stats.empty((env.obs_size,)),
            replay=Trajectory(
                obs=zeros(T + 1, env.obs_size),
                action=zeros(T, A),
                policy=common.Gaussian(zeros(T, A), zeros(T, A)),
                reward=zeros(T, num_heads),
                terminated=zeros(T).astype(bool),
            ),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.int32(0),
        )

    def noise_of(key, shape):
        """Noise [*shape, action_size] for sampling actions of batch shape `shape`."""
        return jax.random.normal(key, (*shape, A))

    def redraw(noise, key, due):
        """Parameter noise; if `due`, one layer, chosen at random, gets new values."""
        key_layer, *keys = jax.random.split(key, 1 + len(noise))
        layer = jax.random.randint(key_layer, (), 0, len(noise))
        draw = lambda i: jax.random.normal(keys[i], noise[i].shape)
        return tuple(jnp.where(due & (layer == i), draw(i), x) for i, x in enumerate(noise))

    def rollout(state, key):
        """Act for a block of U steps; returns the state, transitions [U, N] and infos [U, N]."""
        key_noise, key_env = jax.random.split(key)

        def step(carry, x):
            obs, obs_stats, env_state = carry
            noise, key = x
            obs_stats = obs_stats.add(obs)
            policy = actor.apply(state.params["actor"], normalize(obs_stats, obs), state.noise)
            action = policy.sample(noise)
            next_obs, env_state, reward, terminated, _, info = env.step(key, env_state, action)
            successor = info["final_observation"]
            reward = reward[:, None] if kind == "env" else reward_of(goals, kind, successor)
            # Where the physics broke, the successor is no state and has no reward.
            reward = jnp.where(info["env_nan"][:, None], 0.0, reward)
            transition = Trajectory(obs, action, policy, reward, terminated)
            return (next_obs, obs_stats, env_state), (transition, info)

        carry = state.obs, state.obs_stats, state.env_state
        xs = noise_of(key_noise, (U, N)), jax.random.split(key_env, U)
        (obs, obs_stats, env_state), (traj, info) = jax.lax.scan(step, carry, xs)
        return state._replace(obs=obs, obs_stats=obs_stats, env_state=env_state), traj, info

    def learner(k, brain):
        """The function `turn(state, steps, key)` by which brain number k learns."""
        target_actor = "actor0" if config.share_target_actor else f"actor{k}"

        def trajectory(state, rows, num_steps) -> Trajectory:
            """The `num_steps` steps from each row on, relabelled if the brain uses hindsight."""
            traj = gather(state.replay, rows, num_steps)
            return relabel(goals, config, state.replay, rows, traj) if brain.her_ratio else traj

        def sample(state, key) -> Rows:
            """A minibatch of steps of the brain's window, drawn uniformly.

            With importance_resampling it is chosen from more candidates, by the means of their
            ratios over the action's dimensions.
            """
            *keys, key_choice = jax.random.split(key, 6)
            draw = lambda size: draw_rows(config, brain, state.update, size, keys)
            if not brain.importance_resampling:
                return draw(brain.batch_size)
            rows = draw(NUM_CANDIDATES * brain.batch_size)
            step = jax.tree.map(lambda x: x[:, 0], trajectory(state, rows, 1))
            obs = normalize(state.obs_stats, step.obs)
            policy = actor.apply(state.params["actor"], obs, state.noise)
            log_ratio = log_prob_of(policy, step.action) - log_prob_of(step.policy, step.action)
            chosen = resample(key_choice, jnp.exp(log_ratio).mean(-1), brain.batch_size)
            return jax.tree.map(lambda x: x[chosen], rows)

        def nstep_targets(state, rows, traj, key):
            """n-step targets [B, m], computed by the target networks."""
            obs = normalize(state.obs_stats, traj.obs)
            q_of = partial(critic.apply, state.target_params["critic"])
            longest = lookaheads(config, brain.batch_size)
            # Relabelled rows have n = 1, because later actions were chosen for the old goal.
            n = jnp.where(rows.relabel, 1, longest)
            # Only the values after steps 1 to n - 1: with floating n, about half of [B, H].
            row, j = np.nonzero(np.arange(1, H) < longest[:, None])
            policy = jax.tree.map(lambda x: x[row, j + 1], traj.policy)
            value = q_of(obs[row, j + 1], policy, traj.action[row, j + 1])
            next_value = jnp.zeros_like(traj.reward).at[row, j].set(value)
            # The value after step n, for the policy of a target actor.
            last = obs[jnp.arange(len(n)), n]
            bootstrap = q_of(last, actor.apply(bootstrap_actor(state, key), last, no_noise))
            gamma, lam = config.gamma, config.gae_lambda
            return nstep_target(traj.reward, next_value, bootstrap, n, traj.terminated, gamma, lam)

        def bootstrap_actor(state, key):
            """Parameters of the target actor that the targets bootstrap from."""
            if brain.own_target_actor:
                return state.target_params[target_actor]
            actors = [x for name, x in state.target_params.items() if name != "critic"]
            which = jax.random.randint(key, (), 0, len(actors))
            return jax.tree.map(lambda *x: jnp.stack(x)[which], *actors)

        def targets(state, old_actor, rows, key) -> Batch:
            """The minibatch of these rows; `old_actor` is the actor at the start of the turn."""
            traj = trajectory(state, rows, H)
            step = jax.tree.map(lambda x: x[:, 0], traj)
            step = step._replace(obs=normalize(state.obs_stats, step.obs))
            log_prob = log_prob_of(step.policy, step.action)
            if config.ratio_denominator == "relabelled":
                policy = actor.apply(old_actor, step.obs, state.noise)
                new_log_prob = log_prob_of(policy, step.action)
                log_prob = jnp.where(rows.relabel[:, None], new_log_prob, log_prob)
            return Batch(step, log_prob, nstep_targets(state, rows, traj, key))

        def judge(params, state, batch):
            """Value [B, m] of the actor's policy, and its log-ratio [B] to the denominator."""
            step = batch.step
            policy = actor.apply(params["actor"], step.obs, state.noise)
            fixed_std = policy._replace(log_std=jax.lax.stop_gradient(policy.log_std))
            fixed_critic = jax.lax.stop_gradient(params["critic"])
            q = critic.apply(fixed_critic, step.obs, fixed_std if brain.mean_only else policy)
            log_ratio = log_prob_of(policy, step.action) - batch.log_prob
            return q, log_ratio.mean(-1) if config.ratio_reduce == "mean" else log_ratio.sum(-1)

        def loss_fn(params, state, batch):
            step = batch.step
            q, log_ratio = judge(params, state, batch)
            ratio = ratio_of(log_ratio)
            pg_loss = policy_loss(brain, q, ratio, batch.target)
            value = critic.apply(params["critic"], step.obs, step.policy, step.action)
            vf_loss = value_loss(value, batch.target)
            aux = {
                "policy_loss": pg_loss,
                "value_loss": vf_loss,
                "approx_kl": (ratio - 1.0 - log_ratio).mean(),
                "ess": ratio.mean() ** 2 / (ratio**2).mean(),
            }
            if brain.rule != "ddpg":
                aux["clip_fraction"] = (jnp.abs(ratio - 1.0) > brain.clip_eps).mean()
            return pg_loss + vf_loss, aux

        def descend(state, grads):
            """One step of Adam on each network in `grads`; the actor's Adam is the brain's own."""
            params, opt_state = dict(state.params), dict(state.opt_state)
            learning_rate = {"actor": brain.learning_rate, "critic": config.critic_lr}
            for name, grad in grads.items():
                adam = f"actor{k}" if name == "actor" else name
                direction, opt_state[adam] = optimizer.update(grad, opt_state[adam], params[name])
                move = lambda p, u, rate=learning_rate[name]: p - rate * u
                params[name] = jax.tree.map(move, params[name], direction)
            return state._replace(params=params, opt_state=opt_state)

        def gradient_step(state, batch):
            grads, aux = jax.grad(loss_fn, has_aux=True)(state.params, state, batch)
            aux |= {f"{name}_grad_norm": optax.global_norm(grads[name]) for name in grads}
            if not brain.natural_gradient:
                return descend(state, grads), aux
            q, log_ratio = judge(state.params, state, batch)

            def loss_at(x):
                # PPO's baseline and DDPG's ratio have no gradient: they stay the old actor's.
                new_q, new_log_ratio = judge(state.params | {"actor": x}, state, batch)
                if brain.rule == "ppo":
                    return policy_loss(brain, q, ratio_of(new_log_ratio), batch.target)
                return policy_loss(brain, new_q, ratio_of(log_ratio), batch.target)

            policy_at = lambda x: actor.apply(x, batch.step.obs, state.noise)
            new = natural_step(loss_at, policy_at, state.params["actor"], grads["actor"])
            state = descend(state, {"critic": grads["critic"]})
            return state._replace(params=state.params | {"actor": new}), aux

        def follow(state, number):
            """Polyak steps of the target networks, if they are due after this minibatch."""
            actor_tau = jnp.where(number % brain.actor_tau_interval == 0, brain.actor_tau, 0.0)
            critic_tau = jnp.where(number % brain.critic_tau_interval == 0, brain.critic_tau, 0.0)
            move, old = optax.incremental_update, state.target_params
            moved = {
                target_actor: move(state.params["actor"], old[target_actor], actor_tau),
                "critic": move(state.params["critic"], old["critic"], critic_tau),
            }
            return state._replace(target_params=old | moved)

        def turn(state, steps, key):
            """Learn from the minibatches that are due; returns the state and sums of metrics.

            `steps` are those of each environment since the run began. The last U of them are new.
            """
            old_actor = state.params["actor"]
            end = brain.minibatches(steps)  # minibatches are numbered from the start of the run
            start = brain.minibatches(steps - U)
            start = jnp.where(state.update < config.warmup(brain), end, start)  # none in warm-up

            def minibatch(number, state):
                key_rows, key_targets = jax.random.split(jax.random.fold_in(key, number))
                rows = sample(state, key_rows)
                batch = targets(state, old_actor, rows, key_targets)
                state, aux = gradient_step(state, batch)
                aux["her_fraction"] = rows.relabel.mean()
                aux["reward"] = batch.step.reward.sum(-1).mean()
                return follow(state, number), aux

            def step(number, carry):
                state, sums = carry
                state, aux = minibatch(number, state)
                return state, jax.tree.map(jnp.add, sums, aux)

            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(minibatch, start, state)[1])
            state, sums = jax.lax.fori_loop(start, end, step, (state, zeros))
            sums["count"] = (end - start).astype(jnp.float32)
            return state, {f"brain{k}/{name}": x for name, x in sums.items()}

        return turn

    turns = [learner(k, brain) for k, brain in enumerate(config.brains)]

    def update(state):
        """One episode in every environment, during which the brains learn from earlier ones."""
        key, key_reset, key_blocks = jax.random.split(state.key, 3)
        obs, env_state = env.reset(key_reset)
        state = state._replace(obs=obs, env_state=env_state)

        def block(state, x):
            start, key = x
            key_noise, key_rollout, *keys = jax.random.split(key, 2 + K)
            steps = state.update * T + start  # of each environment, since the run began
            noise = redraw(state.noise, key_noise, steps % config.param_noise_interval == 0)
            state, traj, info = rollout(state._replace(noise=noise), key_rollout)
            metrics = {}
            for turn, key_turn in zip(turns, keys, strict=True):
                state, sums = turn(state, steps + U, key_turn)
                metrics |= sums
            return state, (traj, info, metrics)

        xs = jnp.arange(0, T, U), jax.random.split(key_blocks, T // U)
        state, (traj, info, sums) = jax.lax.scan(block, state, xs)
        traj, info = jax.tree.map(lambda x: x.reshape((T, *x.shape[2:])), (traj, info))
        last_obs = info["final_observation"][-1:]
        episode = traj._replace(obs=jnp.concatenate([traj.obs, last_obs]))
        slot = state.update % config.buffer_episodes
        write = lambda buffer, x: buffer.at[slot].set(jnp.swapaxes(x, 0, 1))

        metrics = {name: x.sum(0) for name, x in sums.items()}
        metrics |= common.run_metrics(info, state.params)
        metrics["charts/score"] = episode.reward.mean(-1).sum(0).mean()
        metrics["charts/std"] = jnp.exp(traj.policy.log_std).mean()
        metrics["charts/saturation"] = (jnp.abs(traj.policy.mean) > 1.0).mean()
        state = state._replace(
            replay=jax.tree.map(write, state.replay, episode), key=key, update=state.update + 1
        )
        return state, metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], normalize(policy["obs_stats"], obs), no_noise)
        if greedy:
            return distribution.mode()
        return distribution.sample(noise_of(key, obs.shape[:-1]))

    def policy_of(state):
        return {"actor": state.target_params["actor0"], "obs_stats": state.obs_stats}

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
TRACEABLE = ("critic_lr", "max_grad_norm", "gamma", "gae_lambda")

# --- presets ---

# fmt: off
# Values that replace the defaults; docs/presets.md has their origins.
DDPG_FIRST = replace(
    DDPG_BRAIN, her_ratio=0.05, importance_resampling=False, turn_minibatches=11 / 6,
)
# a5 to a7: a PPO brain that updates often, and one that updates rarely, with many minibatches
SELDOM = replace(
    PPO_BRAIN, buffer_size=8_400, turn_interval=210, turn_minibatches=20.0, learning_rate=1e-4,
    actor_tau=1.0, actor_tau_interval=1, critic_tau=1.0, own_target_actor=False,
)
OFTEN = replace(
    PPO_BRAIN, buffer_size=14_000, batch_size=1024, turn_interval=10, learning_rate=1e-4,
    actor_tau_interval=1, critic_tau=0.0, own_target_actor=False,
)
TWO_PPO = {"brains": (OFTEN, SELDOM), "num_steps": 70, "critic_lr": 5e-5}
TWO_PPO_SHORT = {
    **TWO_PPO, "brains": (replace(OFTEN, turn_interval=4), SELDOM), "max_nstep": 4,
}
DDPG_ALONE = replace(
    DDPG_BRAIN, mean_only=False, buffer_size=120_000, batch_size=256, her_ratio=0.03,
    importance_resampling=False, learning_starts=512, turn_interval=40, turn_minibatches=107.0,
    learning_rate=1e-3, actor_tau=1e-3, actor_tau_interval=7, critic_tau=1e-3,
    critic_tau_interval=7,
)
DDPG = {
    "brains": (DDPG_ALONE,), "critic_lr": 1e-4, "max_nstep": 6, "param_noise_interval": 120,
    "tanh_mean": True,
}
BOTH = {"brains": (replace(PPO_BRAIN, her_ratio=0.12), DDPG_BRAIN)}  # hindsight for both brains
FUTURE = {**BOTH, "env": "arm/reacher-static", "her_strategy": "future"}
PRESETS: dict[str, dict[str, Any]] = {
    # the author's comparison, on the arm
    "a1": {},
    "a2": {"brains": (PPO_BRAIN, DDPG_FIRST)},
    "a2b": {"brains": (replace(PPO_BRAIN, her_ratio=0.04), DDPG_FIRST)},
    "a3": {"brains": (DDPG_BRAIN,)},
    "a4": {"brains": (PPO_BRAIN,)},
    "a5": {**TWO_PPO, "brains": tuple(replace(x, her_ratio=0.04) for x in TWO_PPO["brains"])},
    "a6": TWO_PPO,
    "a7": TWO_PPO_SHORT,
    "a7b": {**TWO_PPO_SHORT, "floating_nstep": False},
    "a7c": {**TWO_PPO, "floating_nstep": False},
    "a8": DDPG,
    "a9": {**DDPG, "brains": (replace(DDPG_ALONE, rule="weighted_ddpg"),)},
    # a1 with one part changed
    "b1": {"brains": (PPO_BRAIN, replace(DDPG_BRAIN, learning_rate=0.0))},
    "b2": BOTH, "b2_relabelled": {**BOTH, "ratio_denominator": "relabelled"},
    "b2_future": FUTURE, "b2_future_relabelled": {**FUTURE, "ratio_denominator": "relabelled"},
    "b3_none": {"brains": (PPO_BRAIN, replace(DDPG_BRAIN, her_ratio=0.0))},
    "b4_mean": {"brains": (PPO_BRAIN, replace(DDPG_BRAIN, mean_only=False))},
    "b4_one_target": {"share_target_actor": True},
    "b5_sum": {"ratio_reduce": "sum"}, "b5_fixed": {"floating_nstep": False},
    "b6_dpg": {"brains": (PPO_BRAIN, replace(DDPG_BRAIN, natural_gradient=True))},
    "b6_ppo": {"brains": (replace(PPO_BRAIN, natural_gradient=True), DDPG_BRAIN)},
    "b7": {"reward_kind": "env"}, "b8": {"critic_input": "action"},
}
# fmt: on


if __name__ == "__main__":
    launch.main("bnpo")

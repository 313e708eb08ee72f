"""Bellman with (natural and) policy optimisation (BNPO): PPO and DDPG train one Gaussian actor.

After R. Dai's experiments of 2019, https://github.com/rezer0dai/bnpo. The critic does not see the
action but the policy's parameters, Q(s, g, mean, std): the value of playing this distribution once.
Several learning rules, called brains, take turns on one actor and one critic; each brain has its
own optimiser, window of the replay and target actor:

    y   = V_t + sum_{j < n} (gamma lambda)^j (r_{t+j} + gamma V_{t+j+1} - V_{t+j})
    PPO:  -E[min(clip(x, 1 - eps, 1 + eps) A, x A)],   A = y - Q(s, g, pi)
    DDPG: -E[Q(s, g, pi)]
    critic: E[(Q(s, g, mean, std) - y)^2] at the parameters that acted

where n is random, V_j the target critic at the parameters that acted, V_{t+n} at a target actor's,
and x the ratio of pi to what acted. One update is one short episode of all environments; learning
in between sees the episodes before it. Hindsight: a sampled row may get the goals that its episode
had at other times ("shift"). If the target's motion ignores the agent and the shift is drawn
independently of it, the policy that acted for the original goal is the exact denominator of x.

Differences from ppo.py:

1. Q(s, g, mean, std) instead of V(s), and targets from a replay of whole episodes.
2. Rewards may have several parts, each with its own output of the critic.
3. Exploration adds noise to the actor's weights as well; target actors have none.
4. DDPG climbs the critic; it may take importance ratios too, or a natural gradient step.
5. Observations are standardised by statistics that change with every step of the environments.

    python algos/bnpo.py --env arm/reacher-moving --num-seeds 10
    python algos/bnpo.py --env arm/reacher-moving --preset two_ppo --num-seeds 10

Documentation: docs/bnpo.md
"""

import itertools
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

    env: str = "arm/reacher-moving"  # task, see docs/environments.md
    total_timesteps: int = 384_000  # environment steps per seed, all parallel environments together

    # episodes
    num_envs: int = 20  # parallel environments per seed
    num_steps: int = 60  # length of an episode in training, at most
    reward_kind: Literal["env", "proxy", "proxy_sum", "sparse"] = "proxy"  # what is learned from

    # brains, one entry each
    bellman: tuple[bool, ...] = (False, True)  # climb the critic
    ppo_eps: tuple[float, ...] = (0.2, 0.0)  # clip range of the ratio; 0: no ratio
    memory_size: tuple[int, ...] = (6_000, 240_000)  # newest steps that are sampled
    batch_size: tuple[int, ...] = (2048, 512)  # rows of a minibatch
    optim_batch_size: tuple[int, ...] = (2048, 1536)  # rows that must be there before it learns
    learning_delay: tuple[int, ...] = (60, 10)  # steps of each environment between its turns
    learning_repeat: tuple[float, ...] = (6.0, 1.5)  # minibatches of a turn, on average
    lr_actor: tuple[float, ...] = (1e-3, 3e-5)  # step size of Adam
    tau_actor: tuple[float, ...] = (0.1, 0.1)  # step of the brain's target actor
    tau_critic: tuple[float, ...] = (0.1, 0.1)  # step of the target critic
    sync_delta_a: tuple[int, ...] = (2, 1)  # minibatches between steps of the target actor
    sync_delta_c: tuple[int, ...] = (1, 1)  # minibatches between steps of the target critic
    separate_actors: tuple[bool, ...] = (True, False)  # bootstrap from its own target actor
    mean_only: tuple[bool, ...] = (False, True)  # no gradient of Q for the deviation
    natural: tuple[bool, ...] = (False, False)  # natural gradient step instead of Adam
    her_ratio: tuple[float, ...] = (0.0, 0.12)  # part of the rows that get other goals
    importance_resampling: tuple[bool, ...] = (False, True)  # prefer rows that pi makes likely
    detach_actors: bool = True  # a target actor for each brain, not one for all

    # targets and ratios
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # decay of the trace
    max_nstep: int = 10  # longest lookahead
    floating_step: bool = True  # draw the lookahead from 1 to max_nstep, instead of the longest
    her_strategy: Literal["none", "shift", "future"] = "shift"  # future: goals achieved later
    her_nstep: bool = False  # relabelled rows keep their lookahead, which is 1 otherwise
    # of x: what acted, for its own goal; or the policy at the start of the turn, for the new goal
    is_denominator: Literal["behaviour", "relabelled"] = "behaviour"
    is_inverted: bool = False  # DDPG with ratios: what acted over pi, as published
    ratio_reduce: Literal["mean", "sum"] = "mean"  # over the dimensions of log x

    # optimiser: Adam after clipping by global norm
    lr_critic: float = 3e-4  # step size of the critic
    max_grad_norm: float = 1.0  # largest global norm of the gradient of one network

    # networks
    hidden: tuple[int, ...] = (400, 300)  # hidden layers of the actor and of the critic
    mean_squash: Literal["none", "tanh"] = "none"  # of the policy's mean
    critic_input: Literal["distribution", "action"] = "distribution"  # action: an ordinary Q
    noise_period: int = 10  # steps of each environment between changes of the weights' noise
    noise_init: float = 0.017  # initial deviation of that noise, learned

    @property
    def steps_per_update(self) -> int:
        """Environment steps in one episode of all environments."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    @property
    def num_brains(self) -> int:
        """Learning rules that take turns."""
        return len(self.bellman)

    @property
    def window(self) -> tuple[int, ...]:
        """Newest episodes that each brain samples from."""
        return tuple(max(1, size // self.steps_per_update) for size in self.memory_size)

    @property
    def warmup(self) -> tuple[int, ...]:
        """Episodes that must be complete before each brain learns."""
        rows = self.num_envs * (self.num_steps - self.max_nstep)
        return tuple(max(1, math.ceil(size / rows)) for size in self.optim_batch_size)

    @property
    def block(self) -> int:
        """Steps after which a brain may have its turn or the noise change."""
        return math.gcd(self.num_steps, self.noise_period, *self.learning_delay)

    def validate(self) -> None:
        """Raise ValueError if a brain contradicts itself or can never learn."""
        if not 1 <= self.max_nstep < self.num_steps:
            raise ValueError(f"max_nstep={self.max_nstep}: 1 to {self.num_steps - 1} is needed")
        for name in BRAIN_FIELDS:
            if len(getattr(self, name)) != self.num_brains:
                raise ValueError(
                    f"{name}={getattr(self, name)}: {self.num_brains} entries are needed, one for "
                    f"each brain (bellman={self.bellman})"
                )
        for k in range(self.num_brains):
            if not self.bellman[k] and not self.ppo_eps[k]:
                raise ValueError(
                    f"brain {k} contradicts itself: bellman=False without a clip range "
                    f"(ppo_eps={self.ppo_eps}): give it one, or let it climb the critic"
                )
            if self.warmup[k] >= self.num_updates:
                raise ValueError(
                    f"brain {k} learns after {self.warmup[k]} episodes (optim_batch_size="
                    f"{self.optim_batch_size[k]}), and the run has {self.num_updates}: lower it "
                    "or raise total_timesteps"
                )


BRAIN_FIELDS = ("bellman", "ppo_eps", "memory_size", "batch_size", "optim_batch_size")
BRAIN_FIELDS += ("learning_delay", "learning_repeat", "lr_actor", "tau_actor", "tau_critic")
BRAIN_FIELDS += ("sync_delta_a", "sync_delta_c", "separate_actors", "mean_only", "natural")
BRAIN_FIELDS += ("her_ratio", "importance_resampling")

# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("gamma", "gae_lambda", "lr_critic", "max_grad_norm")

# --- presets ---


def brains(*chosen: dict) -> dict[str, tuple]:
    """Columns of the table whose rows are these brains."""
    return {name: tuple(brain[name] for brain in chosen) for name in BRAIN_FIELDS}


# fmt: off
# Origins are in docs/presets.md. The brains of the authors' notebooks.
PPO = {
    "bellman": False, "ppo_eps": 0.2, "memory_size": 6_000, "batch_size": 2048,
    "optim_batch_size": 2048, "learning_delay": 60, "learning_repeat": 6.0, "lr_actor": 1e-3,
    "tau_actor": 0.1, "tau_critic": 0.1, "sync_delta_a": 2, "sync_delta_c": 1,
    "separate_actors": True, "mean_only": False, "natural": False, "her_ratio": 0.0,
    "importance_resampling": False,
}
DPG = {
    **PPO, "bellman": True, "ppo_eps": 0.0, "memory_size": 240_000, "batch_size": 512,
    "optim_batch_size": 1536, "learning_delay": 10, "learning_repeat": 1.5, "lr_actor": 3e-5,
    "sync_delta_a": 1, "separate_actors": False, "mean_only": True, "her_ratio": 0.12,
    "importance_resampling": True,
}
QUICK_PPO = {  # one of two that share the work
    **PPO, "memory_size": 14_000, "batch_size": 1024, "learning_delay": 10, "lr_actor": 1e-4,
    "tau_critic": 0.0, "sync_delta_a": 1, "separate_actors": False,
}
SLOW_PPO = {
    **QUICK_PPO, "memory_size": 8_400, "batch_size": 2048, "learning_delay": 210,
    "learning_repeat": 20.0, "tau_actor": 1.0, "tau_critic": 1.0,
}
TWO_PPO = {"num_steps": 70, "lr_critic": 5e-5, **brains(QUICK_PPO, SLOW_PPO)}
SHORT = {"max_nstep": 4, "learning_delay": (4, 210)}
LONE_DPG = {
    **DPG, "memory_size": 120_000, "batch_size": 256, "optim_batch_size": 512,
    "learning_delay": 40, "learning_repeat": 107.0, "lr_actor": 1e-3, "tau_actor": 1e-3,
    "tau_critic": 1e-3, "sync_delta_a": 7, "sync_delta_c": 7, "separate_actors": True,
    "mean_only": False, "her_ratio": 0.03, "importance_resampling": False,
}
DDPG = {
    **brains(LONE_DPG), "max_nstep": 6, "lr_critic": 1e-4, "mean_squash": "tanh",
    "noise_period": 120, "detach_actors": False,
}
DDPG_IS = {**DDPG, **brains({**LONE_DPG, "ppo_eps": 0.2})}
PRESETS: dict[str, dict[str, Any]] = {
    # the authors' comparison, to be run on the arm
    "a1": {},
    "a2": {"importance_resampling": (False, False), "her_ratio": (0.0, 0.05)},
    "a2b": {"importance_resampling": (False, False), "her_ratio": (0.04, 0.05)},
    "a3": brains(DPG),
    "a4": brains(PPO),
    "a5": {**TWO_PPO, "her_ratio": (0.04, 0.04)},
    "a6": TWO_PPO,
    "a7": {**TWO_PPO, **SHORT},
    "a7b": {**TWO_PPO, **SHORT, "floating_step": False},
    "a7c": {**TWO_PPO, "floating_step": False},
    "a8": DDPG,
    "a9": DDPG_IS,
    "a9_inverted": {**DDPG_IS, "is_inverted": True},
    # what the comparison leaves open: a1 with one part changed
    "b1": {"lr_actor": (1e-3, 0.0)},
    "b2": {"her_ratio": (0.12, 0.12)},
    "b2_relabelled": {"her_ratio": (0.12, 0.12), "is_denominator": "relabelled"},
    "b2_future": {
        "env": "arm/reacher-static", "her_ratio": (0.12, 0.12), "her_strategy": "future",
    },
    "b3_none": {"her_strategy": "none"},
    "b3_half": {"her_ratio": (0.0, 0.5)},
    "b3_nstep": {"her_nstep": True},
    "b4_mean_only": {"mean_only": (False, False)},
    "b4_separate": {"separate_actors": (True, True)},
    "b4_one_target": {"detach_actors": False},
    "b5_sum": {"ratio_reduce": "sum"},
    "b5_fixed": {"floating_step": False},
    "b6_natural_dpg": {"natural": (False, True)},
    "b6_natural_ppo": {"natural": (True, False)},
    "b7_env": {"reward_kind": "env"},
    "b8": {"critic_input": "action"},
}
# fmt: on


# --- networks ---


class NoisyDense(nn.Module):
    """Linear layer without bias, its weights plus learned deviations times `noise` [in, out]."""

    size: int
    noise_init: float

    @nn.compact
    def __call__(self, x, noise):
        shape = x.shape[-1], self.size
        kernel = self.param("kernel", uniform(math.sqrt(3.0 / shape[0])), shape)
        deviation = self.param("deviation", nn.initializers.constant(self.noise_init), shape)
        return x @ (kernel + deviation * noise)


class Actor(nn.Module):
    """Policy network: inputs [..., I] and noise of each layer -> Gaussian; no noise: zeros."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, x, noise):
        config, sizes = self.config, (*self.config.hidden, self.action_size)
        for i, size in enumerate(sizes):
            x = NoisyDense(size, config.noise_init)(x, noise[i])
            x = nn.relu(x) if i < len(config.hidden) else x
        mean = jnp.tanh(x) if config.mean_squash == "tanh" else x
        log_std = jnp.tanh(self.param("log_std", nn.initializers.zeros, (self.action_size,)))
        return common.Gaussian(mean, jnp.broadcast_to(log_std, mean.shape))


class Critic(nn.Module):
    """Q of each part of the reward [..., m]: inputs [..., I], and what the policy is [..., P]."""

    config: Config
    num_heads: int

    @nn.compact
    def __call__(self, x, policy):
        size = x.shape[-1]
        x = jnp.concatenate([nn.relu(Linear(size)(x)), Linear(size)(policy)], -1)
        for width in self.config.hidden:
            x = nn.relu(Linear(width)(x))
        return Linear(self.num_heads, 3e-3)(x)


class Linear(nn.Module):
    """Linear layer; weights within `bound`, by default 1 / sqrt(outputs), as published."""

    size: int
    bound: float | None = None

    @nn.compact
    def __call__(self, x):
        fan_in = x.shape[-1]
        init = uniform(self.bound or 1.0 / math.sqrt(self.size))
        kernel = self.param("kernel", init, (fan_in, self.size))
        return x @ kernel + self.param("bias", uniform(1.0 / math.sqrt(fan_in)), (self.size,))


def uniform(bound: float):
    """Initialiser, uniform in [-bound, bound]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


# --- data types ---


class Episodes(NamedTuple):
    """Episodes of all environments; arrays [N, L, ...], in the replay [W, N, L, ...]."""

    obs: jax.Array  # [N, L + 1, ...] as the environment gave them; the last is a true successor
    action: jax.Array  # unclipped
    policy: common.Gaussian  # that acted, with the noise of its weights
    log_prob: jax.Array  # [N, L, A], of each dimension of the action
    reward: jax.Array  # [N, L, m]
    terminated: jax.Array
    cut: jax.Array  # truncated before the last step, so that the successor is lost


class Transition(NamedTuple):
    """One step of all environments; arrays [U, N, ...]."""

    obs: jax.Array  # as the environment gave it
    action: jax.Array  # unclipped
    policy: common.Gaussian  # that acted
    log_prob: jax.Array  # [..., A]
    reward: jax.Array  # [..., m]
    terminated: jax.Array
    truncated: jax.Array
    next_obs: jax.Array  # true successor, never a reset observation


class Rows(NamedTuple):
    """Where sampled rows are in the replay, and which goals they get; arrays [B]."""

    slot: jax.Array
    env: jax.Array
    t: jax.Array
    relabel: jax.Array  # bool
    h: jax.Array  # where the new goals are


class Batch(NamedTuple):
    """What the losses need of sampled rows; arrays [B, ...]."""

    inputs: jax.Array  # normalised goal and observation
    action: jax.Array
    policy: common.Gaussian  # that acted
    log_prob: jax.Array  # [B, A], denominator of x
    target: jax.Array  # [B, m]


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "actor" and "critic"
    target_params: dict  # of "actor" [targets, ...], and of "critic"
    opt_state: dict  # of "actor", one for each brain, and of "critic"
    noise: tuple  # of the actor's weights, in each layer
    stats: common.Stats  # of goals and observations
    replay: Episodes  # [W, N, ...]
    obs: jax.Array  # [N, obs_size]
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32


MEASURED = ("count", "policy_loss", "value_loss", "approx_kl", "clip_fraction", "ess", "std")
MEASURED += ("saturation", "her_fraction", "reward", "actor_grad_norm", "critic_grad_norm")

# --- targets and losses ---


def relabelled(goals, strategy, obs, rows, ahead):
    """Observations with their goals, and these goals, of rows [B] that many steps `ahead` [J].

    `obs` [W, N, L + 1, ...] is the replay's. A row that is relabelled gets the goals that its own
    episode had from step h on ("shift"), or at all times what was achieved at step h ("future").
    """

    def at(start):
        return obs[rows.slot[:, None], rows.env[:, None], start[:, None] + ahead]

    own = at(rows.t)
    goal = goals.desired_goal(own)
    if strategy == "future":
        achieved = goals.achieved_goal(obs[rows.slot, rows.env, rows.h])
        other = achieved[:, None, : goal.shape[-1]]
    else:
        other = goals.desired_goal(at(rows.h))
    goal = jnp.where(rows.relabel[:, None, None], other, goal)
    return goals.with_goal(own, goal), goal


def floating_target(reward, value, bootstrap, n, terminated, cut, gamma, lam):
    """Targets y [B, m] that look n [B] of at most N steps ahead.

    `reward` and `value` [B, N, m] are those of the steps, `bootstrap` [B, m] is the value after n
    of them, `terminated` and `cut` [B, N]. Nothing follows a step that terminated; a step that was
    cut and what follows it teach nothing.
    """
    j = jnp.arange(reward.shape[1])
    ended = terminated | cut
    ends_before = jnp.cumsum(ended, 1) - ended > 0
    next_value = jnp.concatenate([value[:, 1:], bootstrap[:, None]], 1)
    last = (j + 1 == n[:, None])[..., None]
    next_value = jnp.where(last, bootstrap[:, None], next_value)
    delta = reward + gamma * jnp.where(terminated[..., None], 0.0, next_value) - value
    used = (j < n[:, None]) & ~ends_before & ~cut
    weight = jnp.where(used, (gamma * lam) ** j, 0.0)
    return value[:, 0] + (weight[..., None] * delta).sum(1)


def log_prob_of(policy, action):
    """Log-density [..., A] of each dimension of an action."""
    z = (action - policy.mean) * jnp.exp(-policy.log_std)
    return -(0.5 * z**2 + policy.log_std + 0.5 * math.log(2.0 * math.pi))


def log_ratio_of(log_prob, old_log_prob, reduce):
    """Logarithm of x [...] from the dimensions [..., A]: their mean, as published, or their sum."""
    difference = log_prob - old_log_prob
    return difference.mean(-1) if reduce == "mean" else difference.sum(-1)


def actor_loss(q, log_ratio, target, bellman, eps, inverted):
    """Loss of a brain; `q`, `target` [B, m] and `log_ratio` [B]. Only DDPG has a gradient by q."""
    if bellman and not eps:
        return -(q - target).sum(-1).mean()
    if bellman:
        ratio = jnp.exp(jax.lax.stop_gradient(-log_ratio if inverted else log_ratio))
        gain = (q - target).sum(-1)
    else:
        ratio = jnp.exp(log_ratio)
        gain = (target - jax.lax.stop_gradient(q)).sum(-1)
    clipped = jnp.clip(ratio, 1.0 - eps, 1.0 + eps)
    return -jnp.minimum(clipped * gain, jnp.minimum(ratio, 100.0) * gain).mean()


def critic_loss(q, target):
    """Mean squared error over rows and parts of the reward."""
    return ((q - target) ** 2).mean()


def kl_divergence(p, q):
    """KL(p || q) [...] of two Gaussians."""
    moments = jnp.exp(2.0 * p.log_std) + (p.mean - q.mean) ** 2
    return (q.log_std - p.log_std + 0.5 * moments * jnp.exp(-2.0 * q.log_std) - 0.5).sum(-1)


def fisher_product(policy_of, params, vector, damping):
    """(F + damping I) v of the Gaussians [B, A] that `policy_of(params)` gives, exactly.

    F is the mean over states of J' M J, J the derivative of mean and log deviation, and M their
    Fisher matrix: 1 / variance, and 2.
    """
    outputs = lambda params: (policy_of(params).mean, policy_of(params).log_std)
    (_, log_std), (mean_dot, log_std_dot) = jax.jvp(outputs, (params,), (vector,))
    scaled = jnp.exp(-2.0 * log_std) * mean_dot, 2.0 * log_std_dot
    rows = len(log_std)
    product = jax.vjp(outputs, params)[1](jax.tree.map(lambda x: x / rows, scaled))[0]
    return jax.tree.map(lambda p, v: p + damping * v, product, vector)


def natural_step(loss_of, policy_of, params, grads, delta=1e-3, damping=1e-3, iterations=10):
    """Parameters after a natural gradient step to a mean KL of `delta`, halved until it helps.

    Schulman et al. 2015, appendix C. Of 10 halvings the first is taken whose loss falls by a
    thousandth of what the gradient promises and whose KL is at most 1.5 delta; else none.
    """
    product = partial(fisher_product, policy_of, params, damping=damping)
    direction, _ = jax.scipy.sparse.linalg.cg(
        product, jax.tree.map(jnp.negative, grads), maxiter=iterations
    )
    dot = lambda x, y: sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), x, y)))
    size = jnp.sqrt(2.0 * delta / (dot(direction, product(direction)) + 1e-12))
    start, old = loss_of(params), policy_of(params)
    moved = lambda scale: jax.tree.map(lambda p, d: p + scale * size * d, params, direction)

    def accepted(scale):
        new = moved(scale)
        promise = 1e-3 * scale * size * jnp.abs(dot(grads, direction))
        near = kl_divergence(old, policy_of(new)).mean() <= 1.5 * delta
        return (loss_of(new) < start - promise) & near

    scales = 0.5 ** jnp.arange(10.0)
    good = jax.lax.map(accepted, scales)
    return moved(jnp.where(good.any(), scales[jnp.argmax(good)], 0.0))


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, config.num_envs, stagger=False, max_steps=config.num_steps)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions: BNPO needs continuous ones")
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    relabels = config.her_strategy != "none" and any(config.her_ratio)
    if relabels and env.goals is None:
        raise ValueError(
            f"{env.name} has no goals to relabel (her_ratio={config.her_ratio}): take "
            "her_strategy='none'"
        )
    if relabels and config.her_strategy == "future" and env.goals.moving:
        raise ValueError(
            f"her_strategy='future' gives a row one goal for ever, and that of {env.name} moves: "
            "take 'shift'"
        )
    if config.reward_kind != "env" and env.goals is None:
        raise ValueError(f"reward_kind={config.reward_kind!r}: {env.name} has no goals, take 'env'")
    N, L, W, K = config.num_envs, config.num_steps, max(config.window), config.num_brains
    H, U, num_targets = config.max_nstep, config.block, K if config.detach_actors else 1

    # An environment without goals has empty ones, and its own reward [...].
    nowhere = lambda obs: obs[..., :0]
    goals = env.goals or envs.Goals(nowhere, nowhere, lambda obs, goal: obs, None, ("env",), False)

    def reward_of(obs, goal, reward):
        """Rewards [..., m] of successors."""
        if env.goals is None:
            return reward[..., None]
        return goals.compute_reward(goals.achieved_goal(obs), goal, config.reward_kind)

    def look(replay, rows, ahead):
        return relabelled(goals, config.her_strategy, replay.obs, rows, ahead)

    sample = jnp.zeros((1, env.obs_size))
    num_heads = jax.eval_shape(reward_of, sample, goals.desired_goal(sample), sample[:, 0]).shape[
        -1
    ]
    actor, critic = Actor(config, env.action_size), Critic(config, num_heads)
    widths = env.obs_size, *config.hidden, env.action_size
    silence = tuple(jnp.zeros(shape) for shape in itertools.pairwise(widths))
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    )

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        actor_params = actor.init(key_actor, obs, silence)
        params = {
            "actor": actor_params,
            "critic": critic.init(key_critic, obs, seen(actor.apply(actor_params, obs, silence))),
        }
        copies = lambda x: jnp.repeat(x[None], num_targets, 0)
        state = TrainState(
            params=params,
            target_params=params | {"actor": jax.tree.map(copies, actor_params)},
            opt_state={
                "actor": tuple(optimizer.init(actor_params) for _ in range(K)),
                "critic": optimizer.init(params["critic"]),
            },
            noise=silence,
            stats=common.Stats.empty((env.obs_size,)).add(obs),
            replay=None,
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.zeros((), jnp.int32),
        )
        block = jax.eval_shape(play, state, key)[1]
        steps = jax.tree.map(lambda x: jax.ShapeDtypeStruct((L, *x.shape[1:]), x.dtype), block)
        fresh = jax.eval_shape(episodes_of, steps)
        return state._replace(
            replay=jax.tree.map(lambda x: jnp.zeros((W, *x.shape), x.dtype), fresh)
        )

    def normalize(stats, obs):
        return jnp.clip((obs - stats.mean) / jnp.sqrt(stats.var + 1e-4), -10.0, 10.0)

    def seen(policy, action=None):
        """What the critic is told of a policy, and of the action that it took."""
        if config.critic_input == "action":
            return policy.mean if action is None else action
        return jnp.concatenate([policy.mean, jnp.exp(policy.log_std)], -1)

    # acting

    def disturb(noise, key):
        """New noise for the weights of one layer, whichever."""
        key_layer, key_noise = jax.random.split(key)
        layer = jax.random.randint(key_layer, (), 0, len(noise))
        keys = jax.random.split(key_noise, len(noise))
        draw = lambda i: jax.random.normal(keys[i], noise[i].shape)
        return tuple(jnp.where(layer == i, draw(i), noise[i]) for i in range(len(noise)))

    def play(state, key):
        """Act for a block of U steps; new state, arrays [U, N, ...]."""
        key_noise, key_env = jax.random.split(key)
        noise = jax.random.normal(key_noise, (U, N, env.action_size))

        def step(carry, x):
            obs, stats, env_state = carry
            noise, key = x
            policy = actor.apply(state.params["actor"], normalize(stats, obs), state.noise)
            action = policy.sample(noise)
            next_obs, env_state, reward, terminated, truncated, info = env.step(
                key, env_state, action
            )
            final_obs = info.pop("final_observation")
            transition = Transition(
                obs=obs,
                action=action,
                policy=policy,
                log_prob=log_prob_of(policy, action),
                reward=reward_of(final_obs, goals.desired_goal(final_obs), reward),
                terminated=terminated,
                truncated=truncated,
                next_obs=final_obs,
            )
            return (next_obs, stats.add(next_obs), env_state), (transition, info)

        carry, xs = (state.obs, state.stats, state.env_state), (noise, jax.random.split(key_env, U))
        (obs, stats, env_state), (traj, info) = jax.lax.scan(step, carry, xs)
        return state._replace(obs=obs, stats=stats, env_state=env_state), traj, info

    def episodes_of(traj):
        """Rows of the replay [N, L, ...] from the steps [L, N, ...] of an update."""
        obs = jnp.concatenate([traj.obs, traj.next_obs[-1:]])
        cut = traj.truncated.at[-1].set(False)
        episodes = Episodes(
            obs, traj.action, traj.policy, traj.log_prob, traj.reward, traj.terminated, cut
        )
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), episodes)

    # learning

    def draw_rows(k, replay, state, key):
        """Rows of brain k's window, all equally likely, or preferring what pi makes likely."""
        keys = jax.random.split(key, 6)
        resample = config.importance_resampling[k]
        size = config.batch_size[k] * (8 if resample else 1)
        newest = jnp.minimum(state.update, config.window[k])
        t = jax.random.randint(keys[2], (size,), 0, L - H + 1)
        if config.her_strategy == "future":
            h = jax.random.randint(keys[4], (size,), t + 1, L + 1)
        else:
            h = jax.random.randint(keys[4], (size,), 0, L - H + 1)
        rows = Rows(
            slot=(state.update - 1 - jax.random.randint(keys[0], (size,), 0, newest)) % W,
            env=jax.random.randint(keys[1], (size,), 0, N),
            t=t,
            relabel=relabels & jax.random.bernoulli(keys[3], config.her_ratio[k], (size,)),
            h=h,
        )
        if not resample:
            return rows
        obs = look(replay, rows, jnp.zeros(1, jnp.int32))[0][:, 0]
        policy = actor.apply(state.params["actor"], normalize(state.stats, obs), state.noise)
        action, log_prob = (
            x[rows.slot, rows.env, rows.t] for x in (replay.action, replay.log_prob)
        )
        ratio = jnp.exp(log_prob_of(policy, action) - log_prob).mean(-1)
        score = 0.666 * jnp.log(jnp.clip(ratio, 1e-8, 2.0)) + jax.random.gumbel(keys[5], (size,))
        chosen = jax.lax.top_k(score, config.batch_size[k])[1]
        return jax.tree.map(lambda x: x[chosen], rows)

    def read(k, replay, state, acting, key):
        """A minibatch of brain k, with targets of the target networks."""
        key_rows, key_n, key_target = jax.random.split(key, 3)
        rows = draw_rows(k, replay, state, key_rows)
        obs, goal = look(replay, rows, jnp.arange(H + 1))
        inputs = normalize(state.stats, obs)
        index = rows.slot[:, None], rows.env[:, None], rows.t[:, None] + jnp.arange(H)
        action, policy, log_prob, reward, terminated, cut = (
            jax.tree.map(lambda x: x[index], x) for x in replay[1:]
        )
        if relabels:
            new = reward_of(obs[:, 1:], goal[:, 1:], None)
            reward = jnp.where(rows.relabel[:, None, None], new, reward)
        n = jax.random.randint(key_n, rows.t.shape, 1, H + 1) if config.floating_step else H
        n = jnp.where(rows.relabel & (not config.her_nstep), 1, n)

        target = state.target_params
        which = (
            k if config.separate_actors[k] else jax.random.randint(key_target, (), 0, num_targets)
        )
        target_actor = jax.tree.map(lambda x: x[which % num_targets], target["actor"])
        last = jnp.take_along_axis(inputs, n[:, None, None], 1)[:, 0]
        bootstrap = critic.apply(
            target["critic"], last, seen(actor.apply(target_actor, last, silence))
        )
        value = critic.apply(target["critic"], inputs[:, :-1], seen(policy, action))
        y = floating_target(
            reward, value, bootstrap, n, terminated, cut, config.gamma, config.gae_lambda
        )
        inputs, policy, action, log_prob = (
            jax.tree.map(lambda x: x[:, 0], x) for x in (inputs, policy, action, log_prob)
        )
        if config.is_denominator == "relabelled":
            log_prob = log_prob_of(actor.apply(acting, inputs, state.noise), action)
        aux = {"her_fraction": rows.relabel.mean(), "reward": reward[:, 0].sum(-1).mean()}
        return Batch(inputs, action, policy, log_prob, y), aux

    def actor_loss_fn(actor_params, critic_params, noise, batch, k):
        policy = actor.apply(actor_params, batch.inputs, noise)
        log_std = policy.log_std
        held = (
            policy._replace(log_std=jax.lax.stop_gradient(log_std))
            if config.mean_only[k]
            else policy
        )
        q = critic.apply(critic_params, batch.inputs, seen(held))
        log_ratio = log_ratio_of(
            log_prob_of(policy, batch.action), batch.log_prob, config.ratio_reduce
        )
        loss = actor_loss(
            q, log_ratio, batch.target, config.bellman[k], config.ppo_eps[k], config.is_inverted
        )
        ratio, eps = jnp.exp(log_ratio), config.ppo_eps[k]
        return loss, {
            "policy_loss": loss,
            "approx_kl": (ratio - 1.0 - log_ratio).mean(),
            "clip_fraction": (jnp.abs(ratio - 1.0) > eps).mean() if eps else jnp.zeros(()),
            "ess": ratio.mean() ** 2 / (ratio**2).mean(),
            "std": jnp.exp(log_std).mean(),
            "saturation": (jnp.abs(policy.mean) > 1.0).mean(),
        }

    def critic_loss_fn(params, batch):
        q = critic.apply(params, batch.inputs, seen(batch.policy, batch.action))
        return critic_loss(q, batch.target), {"value_loss": critic_loss(q, batch.target)}

    def descend(params, grads, opt_state, learning_rate):
        direction, opt_state = optimizer.update(grads, opt_state)
        return jax.tree.map(lambda p, u: p - learning_rate * u, params, direction), opt_state

    def turn(k, replay, tick, key, state, sums):
        """Brain k learns from the replay; new state, and sums of metrics with what it adds."""
        acting = state.params["actor"]
        first, end = (
            jnp.floor((tick // config.learning_delay[k] - i) * config.learning_repeat[k])
            for i in (1, 0)
        )

        def step(i, carry):
            state, sums = carry
            batch, aux = read(k, replay, state, acting, jax.random.fold_in(key, i))
            params, target, opt_state = state.params, state.target_params, state.opt_state
            args = params["critic"], state.noise, batch, k
            grads, actor_aux = jax.grad(actor_loss_fn, has_aux=True)(params["actor"], *args)
            if config.natural[k]:
                new_actor, actor_opt_state = (
                    natural_step(
                        lambda params: actor_loss_fn(params, *args)[0],
                        lambda params: actor.apply(params, batch.inputs, state.noise),
                        params["actor"],
                        grads,
                    ),
                    opt_state["actor"][k],
                )
            else:
                new_actor, actor_opt_state = descend(
                    params["actor"], grads, opt_state["actor"][k], config.lr_actor[k]
                )
            aux |= actor_aux | {"actor_grad_norm": optax.global_norm(grads)}
            grads, critic_aux = jax.grad(critic_loss_fn, has_aux=True)(params["critic"], batch)
            new_critic, critic_opt_state = descend(
                params["critic"], grads, opt_state["critic"], config.lr_critic
            )
            aux |= critic_aux | {"critic_grad_norm": optax.global_norm(grads)}

            number = first + i  # of this minibatch among all of the brain
            tau = lambda tau, delta: jnp.where(number % delta[k] == 0, tau[k], 0.0)
            tau_actor = tau(config.tau_actor, config.sync_delta_a)
            tau_critic = tau(config.tau_critic, config.sync_delta_c)
            follow = lambda new, old, tau: jax.tree.map(lambda x, y: y + tau * (x - y), new, old)
            mine = jnp.arange(num_targets) == k % num_targets
            weight = lambda x: tau_actor * mine.reshape((-1, *[1] * (x.ndim - 1)))
            targets = jax.tree.map(lambda x, y: y + weight(y) * (x - y), new_actor, target["actor"])
            actor_opt_states = list(opt_state["actor"])
            actor_opt_states[k] = actor_opt_state
            state = state._replace(
                params={"actor": new_actor, "critic": new_critic},
                target_params={
                    "actor": targets,
                    "critic": follow(new_critic, target["critic"], tau_critic),
                },
                opt_state={"actor": tuple(actor_opt_states), "critic": critic_opt_state},
            )
            added = {f"brain{k}/{name}": x for name, x in (aux | {"count": 1}).items()}
            return state, sums | {name: sums[name] + x for name, x in added.items()}

        return jax.lax.fori_loop(0, (end - first).astype(jnp.int32), step, (state, sums))

    def update(state):
        key, key_blocks = jax.random.split(state.key)
        replay, state = state.replay, state._replace(replay=None)

        def block(carry, x):
            state, sums = carry
            tick, key = x
            key_noise, key_play, *keys = jax.random.split(key, 2 + K)
            now = state.update * L + tick
            noise = disturb(state.noise, key_noise)
            noise = jax.tree.map(
                lambda x, y: jnp.where(now % config.noise_period == 0, x, y), noise, state.noise
            )
            state, traj, info = play(state._replace(noise=noise), key_play)
            now = now + U
            for k in range(K):
                due = (now % config.learning_delay[k] == 0) & (state.update >= config.warmup[k])
                learn = partial(turn, k, replay, now, keys[k])
                state, sums = jax.lax.cond(due, learn, lambda *carry: carry, state, sums)
            return (state, sums), (traj, info)

        sums = {f"brain{k}/{name}": jnp.zeros(()) for k in range(K) for name in MEASURED}
        xs = jnp.arange(0, L, U), jax.random.split(key_blocks, L // U)
        (state, sums), out = jax.lax.scan(block, (state, sums), xs)
        traj, info = jax.tree.map(lambda x: x.reshape((L, *x.shape[2:])), out)
        write = lambda kept, new: jax.lax.dynamic_update_index_in_dim(
            kept, new, state.update % W, 0
        )
        replay = jax.tree.map(write, replay, episodes_of(traj))

        metrics = sums | common.run_metrics(info, state.params)
        metrics["charts/score"] = traj.reward.mean(-1).sum(0).mean()
        state = state._replace(replay=replay, key=key, update=state.update + 1)
        return state, metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], normalize(policy["stats"], obs), silence)
        if greedy:
            return distribution.mode()
        return distribution.sample(jax.random.normal(key, distribution.mean.shape))

    def policy_of(state):
        first = jax.tree.map(lambda x: x[0], state.target_params["actor"])
        return {"actor": first, "stats": state.stats}

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
    launch.main("bnpo", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

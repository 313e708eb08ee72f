"""Bellman with (natural and) policy optimisation (BNPO): PPO and DDPG train one Gaussian actor.

After R. Dai's experiments of 2019, https://github.com/rezer0dai/bnpo. The critic does not see the
action but the policy's parameters, Q(s, g, mean, std): the value of playing this distribution once.
Several learning rules, called brains, take turns on one actor and one critic; each has its own
optimiser, window of the replay and target actor. With a lookahead of n steps, Q' and pi' targets:

    y_j = r_j + gamma ((1 - lambda) Q'_{j+1} + lambda y_{j+1}),   y_{n-1} = r_{n-1} + gamma Q'(pi')
    PPO:    -E[min(clip(x, 1 - eps, 1 + eps) A, x A)],   A = y - Q(s, g, pi)
    DDPG:   -E[Q(s, g, pi)]
    critic:  E[(Q(s, g, mean, std) - y)^2]   at the parameters that acted

where Q'_j is taken at the parameters that acted, and x is the ratio of pi to what acted. One update
is one short episode of all environments; learning in between sees the episodes before it.
Hindsight: a sampled row may get the goals that its episode had at other times ("shift"). If the
target's motion ignores the agent and the shift is drawn independently of it, the policy that acted
for the original goal is the exact denominator of x.

Differences from ppo.py:

1. Q(s, g, mean, std) instead of V(s), and targets from a replay of whole episodes.
2. Rewards may have several parts, each with its own output of the critic.
3. Exploration adds noise to the actor's weights as well; target actors have none.
4. DDPG climbs the critic; it may take importance ratios too, or a natural gradient step.
5. Observations are standardised by statistics that change with every step of the environments.

    python algos/bnpo.py --env arm/reacher-moving --num-seeds 10
    python algos/bnpo.py --env arm/reacher-moving --preset a5 --num-seeds 10

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
import numpy as np
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
    num_steps: int = 60  # length of an episode in training
    # what is learned from: the task's reward, or what its goals define
    reward_kind: Literal["env", "proxy", "proxy_sum", "sparse"] = "proxy"

    # brains, one entry each: first PPO, then DDPG
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
    floating_step: bool = True  # lookaheads of 1 to max_nstep, equally often; or the longest
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
        return tuple(math.ceil(size / rows) for size in self.optim_batch_size)

    @property
    def block(self) -> int:
        """Steps after which a brain may have its turn or the noise may change."""
        return math.gcd(self.num_steps, self.noise_period, *self.learning_delay)

    def validate(self) -> None:
        """Raise ValueError if a brain contradicts itself or can never learn."""
        if not 1 <= self.max_nstep < self.num_steps:
            raise ValueError(f"max_nstep={self.max_nstep}: 1 to {self.num_steps - 1} is needed")
        for name in BRAIN_FIELDS:
            values = getattr(self, name)
            if len(values) != self.num_brains:
                raise ValueError(
                    f"{name}={values}: {self.num_brains} entries are needed, one for each brain "
                    f"(bellman={self.bellman})"
                )
            least = int(type(values[0]) is int)  # of a count; rates and switches may be 0
            if min(values) < least:
                raise ValueError(f"{name}={values}: at least {least} is needed")
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

NOISE_INIT = 0.017  # initial deviation of the weights' noise, which is learned


def uniform(bound: float):
    """Initialiser, uniform in [-bound, bound]."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class NoisyDense(nn.Module):
    """Linear layer without bias, its weights plus learned deviations times `noise` [in, out]."""

    size: int

    @nn.compact
    def __call__(self, x, noise):
        shape = x.shape[-1], self.size
        kernel = self.param("kernel", uniform(math.sqrt(3.0 / shape[0])), shape)
        deviation = self.param("deviation", nn.initializers.constant(NOISE_INIT), shape)
        return x @ (kernel + deviation * noise)


class Actor(nn.Module):
    """Policy network: inputs [..., I] and noise of each layer -> Gaussian; no noise: zeros."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, x, noise):
        for i, size in enumerate(self.config.hidden):
            x = nn.relu(NoisyDense(size)(x, noise[i]))
        mean = NoisyDense(self.action_size)(x, noise[-1])
        if self.config.mean_squash == "tanh":
            mean = jnp.tanh(mean)
        # The deviation, the same in all states, stays between 1 / e and e.
        log_std = jnp.tanh(self.param("log_std", nn.initializers.zeros, (self.action_size,)))
        return common.Gaussian(mean, jnp.broadcast_to(log_std, mean.shape))


class Linear(nn.Module):
    """Linear layer; weights within `bound`, by default 1 / sqrt(outputs), as published."""

    size: int
    bound: float | None = None

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1], self.size
        kernel = self.param("kernel", uniform(self.bound or 1.0 / math.sqrt(shape[1])), shape)
        return x @ kernel + self.param("bias", uniform(1.0 / math.sqrt(shape[0])), shape[1:])


class Critic(nn.Module):
    """Q: inputs [..., I], what it is told of the policy [..., P] -> parts [..., num_heads]."""

    config: Config
    num_heads: int

    @nn.compact
    def __call__(self, x, policy):
        size = x.shape[-1]
        x = jnp.concatenate([nn.relu(Linear(size)(x)), Linear(size)(policy)], -1)
        for width in self.config.hidden:
            x = nn.relu(Linear(width)(x))
        return Linear(self.num_heads, 3e-3)(x)


# --- data types ---


class Episodes(NamedTuple):
    """Episodes of all environments; arrays [L, N, ...], in the replay [W, N, L, ...]."""

    obs: jax.Array  # as the environment gave them; in the replay one more, the last true successor
    action: jax.Array  # unclipped
    policy: common.Gaussian  # that acted, with the noise of its weights
    reward: jax.Array  # the task's; in the replay [..., m], what is learned from
    terminated: jax.Array


class Rows(NamedTuple):
    """Where sampled rows are in the replay, and which goals they get; arrays [B]."""

    slot: jax.Array
    env: jax.Array
    t: jax.Array
    relabel: jax.Array  # bool
    h: jax.Array  # where the new goals are


class Batch(NamedTuple):
    """What the losses need of sampled rows; arrays [B, ...]."""

    inputs: jax.Array  # normalised observation, with its goal
    action: jax.Array
    policy: common.Gaussian  # that acted
    log_prob: jax.Array  # [B, A], denominator of x
    target: jax.Array  # [B, m]


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "actor" and "critic"
    target_params: dict  # of "actor", one for each brain or one for all, and of "critic"
    opt_state: dict  # of "actor", one for each brain, and of "critic"
    noise: tuple  # of the actor's weights, in each layer
    obs_stats: common.Stats
    replay: Episodes
    obs: jax.Array  # [N, obs_size]
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32


# --- targets and losses ---


def relabelled(goals, strategy, obs, rows, ahead):
    """Observations [B, J, ...] that many steps `ahead` [J] of rows [B], with their goals.

    `obs` [W, N, L + 1, ...] is the replay's. A row that is relabelled gets the goals that its own
    episode had from step h on ("shift"), or at all times what was achieved at step h ("future").
    """
    at = lambda start: obs[rows.slot[:, None], rows.env[:, None], start[:, None] + ahead]
    own = at(rows.t)
    if strategy == "future":
        goal_size = goals.desired_goal(own).shape[-1]
        achieved = goals.achieved_goal(obs[rows.slot, rows.env, rows.h])
        goal = achieved[:, None, :goal_size]
    else:
        goal = goals.desired_goal(at(rows.h))
    return jnp.where(rows.relabel[:, None, None], goals.with_goal(own, goal), own)


def lookaheads(size, longest, floating):
    """Lookaheads [size] of the rows of a minibatch: 1 to `longest` in turn, or the longest."""
    return 1 + np.arange(size) % longest if floating else np.full(size, longest)


def nstep_target(reward, next_value, bootstrap, n, terminated, gamma, lam):
    """Targets y [B, m] that look n [B] of at most H steps ahead.

    `reward` [B, H, m] and `terminated` [B, H] are those of the steps, `next_value` [B, H, m] is the
    value after each of them and `bootstrap` [B, m] that after the last. It is GAE plus V at the
    first step, where V itself cancels. Nothing follows a step that terminated.
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


def put(items, i, item):
    """The tuple `items` with another item in place i."""
    return (*items[:i], item, *items[i + 1 :])


def minibatches(steps, delay, repeat):
    """Minibatches that a brain has had when each environment has made that many steps."""
    return jnp.floor(steps // delay * repeat).astype(jnp.int32)


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, config.num_envs, stagger=False, max_steps=config.num_steps)
    goals, relabels = env.goals, config.her_strategy != "none" and any(config.her_ratio)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions: BNPO needs continuous ones")
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    if relabels and goals is None:
        raise ValueError(
            f"{env.name} has no goals to relabel (her_ratio={config.her_ratio}): take "
            "her_strategy='none'"
        )
    if relabels and config.her_strategy == "future" and goals.moving:
        raise ValueError(
            f"her_strategy='future' gives a row one goal for ever, and that of {env.name} moves: "
            "take 'shift'"
        )
    if config.reward_kind != "env" and goals is None:
        raise ValueError(f"reward_kind={config.reward_kind!r}: {env.name} has no goals, take 'env'")
    N, L, W, K = config.num_envs, config.num_steps, max(config.window), config.num_brains
    H, U, A = config.max_nstep, config.block, env.action_size

    def reward_at(obs):
        """Rewards [..., m] of arriving at observations, for the goals in them."""
        achieved, goal = goals.achieved_goal(obs), goals.desired_goal(obs)
        return goals.compute_reward(achieved, goal, config.reward_kind)

    def learned_reward(obs, reward):
        return reward[..., None] if config.reward_kind == "env" else reward_at(obs)

    sample = jnp.zeros((1, env.obs_size))
    num_heads = learned_reward(sample, sample[:, 0]).shape[-1]
    actor, critic = Actor(config, A), Critic(config, num_heads)
    widths = env.obs_size, *config.hidden, A
    silence = tuple(jnp.zeros(shape) for shape in itertools.pairwise(widths))
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    )

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        actor_params = actor.init(key_actor, sample, silence)
        seen_policy = seen(actor.apply(actor_params, sample, silence))
        params = {"actor": actor_params, "critic": critic.init(key_critic, sample, seen_policy)}
        zeros = lambda *shape: jnp.zeros((W, N, *shape))
        return TrainState(
            params=params,
            target_params=params | {"actor": (actor_params,) * (K if config.detach_actors else 1)},
            opt_state={
                "actor": (optimizer.init(actor_params),) * K,
                "critic": optimizer.init(params["critic"]),
            },
            noise=silence,
            obs_stats=common.Stats.empty((env.obs_size,)),
            replay=Episodes(
                obs=zeros(L + 1, env.obs_size),
                action=zeros(L, A),
                policy=common.Gaussian(zeros(L, A), zeros(L, A)),
                reward=zeros(L, num_heads),
                terminated=zeros(L).astype(bool),
            ),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.zeros((), jnp.int32),
        )

    def normalize(obs_stats, obs):
        return jnp.clip((obs - obs_stats.mean) / jnp.sqrt(obs_stats.var + 1e-4), -10.0, 10.0)

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
        return tuple(jnp.where(layer == i, draw(i), x) for i, x in enumerate(noise))

    def play(state, key):
        """Act for a block of U steps; new state, and arrays [U, N, ...]."""
        key_noise, key_env = jax.random.split(key)
        noise = jax.random.normal(key_noise, (U, N, A))

        def step(carry, x):
            obs, obs_stats, env_state = carry
            noise, key = x
            obs_stats = obs_stats.add(obs)
            policy = actor.apply(state.params["actor"], normalize(obs_stats, obs), state.noise)
            action = policy.sample(noise)
            next_obs, env_state, reward, terminated, _, info = env.step(key, env_state, action)
            return (next_obs, obs_stats, env_state), (
                Episodes(obs, action, policy, reward, terminated),
                info,
            )

        carry, xs = (state.obs, state.obs_stats, state.env_state), jax.random.split(key_env, U)
        (obs, obs_stats, env_state), (traj, info) = jax.lax.scan(step, carry, (noise, xs))
        return state._replace(obs=obs, obs_stats=obs_stats, env_state=env_state), traj, info

    # learning

    def look(state, rows, ahead):
        """Raw observations [B, J, ...] that many steps ahead, and their inputs to the networks."""
        if relabels:
            obs = relabelled(goals, config.her_strategy, state.replay.obs, rows, ahead)
        else:
            obs = state.replay.obs[rows.slot[:, None], rows.env[:, None], rows.t[:, None] + ahead]
        return obs, normalize(state.obs_stats, obs)

    def recorded(state, rows):
        """What the replay has of H steps from each row on: action, policy, reward, terminated."""
        index = rows.slot[:, None], rows.env[:, None], rows.t[:, None] + np.arange(H)
        return jax.tree.map(lambda x: x[index], tuple(state.replay[1:]))

    def draw_rows(k, state, actor_params, key):
        """Rows of brain k's window, all equally likely, or preferring what pi makes likely."""
        keys = jax.random.split(key, 6)
        size = config.batch_size[k] * (8 if config.importance_resampling[k] else 1)
        newest = jnp.minimum(state.update, config.window[k])
        t = jax.random.randint(keys[2], (size,), 0, L - H)
        bounds = (t + 1, L + 1) if config.her_strategy == "future" else (0, L - H + 1)
        rows = Rows(
            slot=(state.update - 1 - jax.random.randint(keys[0], (size,), 0, newest)) % W,
            env=jax.random.randint(keys[1], (size,), 0, N),
            t=t,
            relabel=relabels & jax.random.bernoulli(keys[3], config.her_ratio[k], (size,)),
            h=jax.random.randint(keys[4], (size,), *bounds),
        )
        if not config.importance_resampling[k]:
            return rows
        inputs = look(state, rows, np.zeros(1, int))[1][:, 0]
        action, acted = jax.tree.map(lambda x: x[:, 0], recorded(state, rows)[:2])
        ratio = log_prob_of(actor.apply(actor_params, inputs, state.noise), action)
        ratio = jnp.exp(ratio - log_prob_of(acted, action)).mean(-1)
        score = 0.666 * jnp.log(jnp.clip(ratio, 1e-8, 2.0)) + jax.random.gumbel(keys[5], (size,))
        chosen = jax.lax.top_k(score, config.batch_size[k])[1]
        return jax.tree.map(lambda x: x[chosen], rows)

    def read(k, state, target_params, acting, rows, key):
        """The minibatch of these rows, with targets of the target networks."""
        obs, inputs = look(state, rows, np.arange(H + 1))
        action, policy, reward, terminated = recorded(state, rows)
        if relabels:
            reward = jnp.where(rows.relabel[:, None, None], reward_at(obs[:, 1:]), reward)
        longest = lookaheads(config.batch_size[k], H, config.floating_step)
        n = longest if config.her_nstep else jnp.where(rows.relabel, 1, longest)

        # Only values before the end of a lookahead are used: half of them, if it floats.
        row, j = np.nonzero(np.arange(1, H) < longest[:, None])
        passed = jax.tree.map(lambda x: x[row, j + 1], (inputs[:, :-1], policy, action))
        value = critic.apply(target_params["critic"], passed[0], seen(*passed[1:]))
        next_value = jnp.zeros_like(reward).at[row, j].set(value)
        which = jax.random.randint(key, (), 0, len(target_params["actor"]))
        which = k % len(target_params["actor"]) if config.separate_actors[k] else which
        target_actor = jax.tree.map(lambda *x: jnp.stack(x)[which], *target_params["actor"])
        last = inputs[jnp.arange(len(longest)), n]
        bootstrap = critic.apply(
            target_params["critic"], last, seen(actor.apply(target_actor, last, silence))
        )
        target = nstep_target(
            reward, next_value, bootstrap, n, terminated, config.gamma, config.gae_lambda
        )

        inputs, action, policy = jax.tree.map(lambda x: x[:, 0], (inputs, action, policy))
        log_prob = log_prob_of(policy, action)
        if config.is_denominator == "relabelled":
            new = log_prob_of(actor.apply(acting, inputs, state.noise), action)
            log_prob = jnp.where(rows.relabel[:, None], new, log_prob)
        aux = {"her_fraction": rows.relabel.mean(), "reward": reward[:, 0].sum(-1).mean()}
        return Batch(inputs, action, policy, log_prob, target), aux

    def actor_loss_fn(params, critic_params, noise, batch, k):
        policy, eps = actor.apply(params, batch.inputs, noise), config.ppo_eps[k]
        known = policy
        if config.mean_only[k]:
            known = policy._replace(log_std=jax.lax.stop_gradient(policy.log_std))
        q = critic.apply(critic_params, batch.inputs, seen(known))
        log_ratio = log_prob_of(policy, batch.action) - batch.log_prob
        log_ratio = log_ratio.mean(-1) if config.ratio_reduce == "mean" else log_ratio.sum(-1)
        ratio = jnp.exp(log_ratio)
        loss = actor_loss(q, log_ratio, batch.target, config.bellman[k], eps, config.is_inverted)
        aux = {
            "policy_loss": loss,
            "approx_kl": (ratio - 1.0 - log_ratio).mean(),
            "ess": ratio.mean() ** 2 / (ratio**2).mean(),
        }
        return loss, aux | ({"clip_fraction": (jnp.abs(ratio - 1.0) > eps).mean()} if eps else {})

    def critic_loss_fn(params, batch):
        return critic_loss(
            critic.apply(params, batch.inputs, seen(batch.policy, batch.action)), batch.target
        )

    def descend(params, grads, opt_state, learning_rate):
        direction, opt_state = optimizer.update(grads, opt_state)
        return jax.tree.map(lambda p, u: p - learning_rate * u, params, direction), opt_state

    def improve(k, state, params, opt_state, batch):
        """Brain k's step of the actor; new parameters, optimiser state, diagnostics."""
        loss_fn = lambda x: actor_loss_fn(x, params["critic"], state.noise, batch, k)
        grads, aux = jax.grad(loss_fn, has_aux=True)(params["actor"])
        aux["actor_grad_norm"] = optax.global_norm(grads)
        if config.natural[k]:
            policy_of = lambda x: actor.apply(x, batch.inputs, state.noise)
            step = natural_step(lambda x: loss_fn(x)[0], policy_of, params["actor"], grads)
            return step, opt_state, aux
        return *descend(params["actor"], grads, opt_state, config.lr_actor[k]), aux

    def turn(k, state, steps, key):
        """Brain k learns if it is due after that many steps; new state, and sums of metrics."""
        acting = state.params["actor"]
        first, end = (
            minibatches(x, config.learning_delay[k], config.learning_repeat[k])
            for x in (steps - U, steps)
        )
        first = jnp.where(state.update < config.warmup[k], end, first)

        def step(number, learned):
            params, targets, opt_state = learned
            key_rows, key_target = jax.random.split(jax.random.fold_in(key, number))
            rows = draw_rows(k, state, params["actor"], key_rows)
            batch, aux = read(k, state, targets, acting, rows, key_target)
            new_actor, opt_actor, actor_aux = improve(
                k, state, params, opt_state["actor"][k], batch
            )
            value_loss, grads = jax.value_and_grad(critic_loss_fn)(params["critic"], batch)
            new_critic, opt_critic = descend(
                params["critic"], grads, opt_state["critic"], config.lr_critic
            )
            aux |= actor_aux | {"value_loss": value_loss, "count": jnp.ones(())}
            aux["critic_grad_norm"] = optax.global_norm(grads)

            follow = lambda new, old, tau, delta: optax.incremental_update(
                new, old, jnp.where(number % delta[k] == 0, tau[k], 0.0)
            )
            mine = k % len(targets["actor"])
            target_actor = follow(
                new_actor, targets["actor"][mine], config.tau_actor, config.sync_delta_a
            )
            targets = {
                "actor": put(targets["actor"], mine, target_actor),
                "critic": follow(
                    new_critic, targets["critic"], config.tau_critic, config.sync_delta_c
                ),
            }
            opt_state = {"actor": put(opt_state["actor"], k, opt_actor), "critic": opt_critic}
            return ({"actor": new_actor, "critic": new_critic}, targets, opt_state), aux

        def add(number, carry):
            learned, sums = carry
            learned, aux = step(number, learned)
            return learned, jax.tree.map(jnp.add, sums, aux)

        learned = state.params, state.target_params, state.opt_state
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(step, end, learned)[1])
        learned, sums = jax.lax.fori_loop(first, end, add, (learned, sums))
        names = ("params", "target_params", "opt_state")
        state = state._replace(**dict(zip(names, learned, strict=True)))
        return state, {f"brain{k}/{name}": x for name, x in sums.items()}

    def update(state):
        key, key_reset, key_blocks = jax.random.split(state.key, 3)
        obs, env_state = env.reset(key_reset)  # every episode begins anew

        def block(state, x):
            tick, key = x
            key_noise, key_play, *keys = jax.random.split(key, 2 + K)
            steps = state.update * L + tick
            noise = jax.tree.map(
                partial(jnp.where, steps % config.noise_period == 0),
                disturb(state.noise, key_noise),
                state.noise,
            )
            state, traj, info = play(state._replace(noise=noise), key_play)
            metrics = {}
            for k in range(K):
                state, sums = turn(k, state, steps + U, keys[k])
                metrics |= sums
            return state, (traj, info, metrics)

        xs = jnp.arange(0, L, U), jax.random.split(key_blocks, L // U)
        state, out = jax.lax.scan(block, state._replace(obs=obs, env_state=env_state), xs)
        traj, info = jax.tree.map(lambda x: x.reshape((L, *x.shape[2:])), out[:2])
        final_obs = info["final_observation"]
        reward = learned_reward(final_obs, traj.reward)
        episodes = traj._replace(obs=jnp.concatenate([traj.obs, final_obs[-1:]]), reward=reward)
        write = lambda kept, new: jax.lax.dynamic_update_index_in_dim(
            kept, jnp.swapaxes(new, 0, 1), state.update % W, 0
        )
        replay = jax.tree.map(write, state.replay, episodes)

        metrics = {name: x.sum(0) for name, x in out[2].items()}
        metrics |= common.run_metrics(info, state.params)
        metrics["charts/score"] = reward.mean(-1).sum(0).mean()
        metrics["charts/std"] = jnp.exp(traj.policy.log_std).mean()
        metrics["charts/saturation"] = (jnp.abs(traj.policy.mean) > 1.0).mean()
        return state._replace(replay=replay, key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        inputs = normalize(policy["obs_stats"], obs)
        distribution = actor.apply(policy["actor"], inputs, silence)
        if greedy:
            return distribution.mode()
        return distribution.sample(jax.random.normal(key, distribution.mean.shape))

    def policy_of(state):
        return {"actor": state.target_params["actor"][0], "obs_stats": state.obs_stats}

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

"""Bellman with (natural and) policy optimisation (BNPO): PPO and DDPG train one Gaussian actor.

After R. Dai's experiments of 2019, https://github.com/rezer0dai/bnpo. The critic does not see the
action but the policy's parameters, Q(s, g, mean, std): the value of playing this distribution once.
Several learning rules, called brains, take turns on one actor and one critic; each has its own
optimiser, window of the replay and target actor. With a lookahead of n steps, Q' and pi' targets:

    y_j = r_j + gamma ((1 - lambda) Q'_{j+1} + lambda y_{j+1}),   y_{n-1} = r_{n-1} + gamma Q'(pi')
    PPO:    -E[min(clip(x, 1 - eps, 1 + eps) A, x A)],   A = y - Q(s, g, pi)
    DDPG:   -E[Q(s, g, pi)]
    critic:  E[(Q(s, g, mean, std) - y)^2]   at the parameters that acted, as Q'_j

where x is the ratio of pi to what acted, by default its geometric mean over dimensions. One update
is one short episode of all environments; learning in between sees the episodes before it. Hindsight
gives sampled rows the goals that their episode had at other times ("shift"). If neither target nor
shift depends on the agent, what acted for the old goals is an episode's exact denominator.

Differences from ppo.py:

1. Q(s, g, mean, std) instead of V(s); rewards may have several parts, each with its own output.
2. Minibatches are drawn from a replay of whole episodes, and their targets computed anew.
3. Advantages are not normalised; instead of an entropy bonus the deviation has bounds.
4. Exploration adds noise to the actor's weights as well, which have no biases.
5. DDPG climbs the critic; it may take importance ratios too, or a natural gradient step.
6. Bootstraps, evaluation and the exported policy come from target networks, without that noise.
7. Observations are standardised by statistics that change with every step of the environments.

    python algos/bnpo.py --env arm/reacher-moving --num-seeds 10
    python algos/bnpo.py --preset a4 --num-seeds 10

Documentation: docs/bnpo.md
"""

import itertools
import math
from collections import namedtuple
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
    reward_kind: Literal["env", "proxy", "proxy_sum", "sparse"] = "proxy"  # what is learned from

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
    def window(self) -> tuple[int, ...]:
        """Newest episodes that each brain samples from."""
        return tuple(max(1, size // self.steps_per_update) for size in self.memory_size)

    @property
    def warmup(self) -> tuple[int, ...]:
        """Episodes that must be complete before each brain learns."""
        rows = self.num_envs * (self.num_steps - self.max_nstep)
        return tuple(math.ceil(size / rows) for size in self.optim_batch_size)

    def validate(self) -> None:
        """Raise ValueError if a brain contradicts itself or can never learn."""
        if not 1 <= self.max_nstep < self.num_steps:
            raise ValueError(f"max_nstep={self.max_nstep}: 1 to {self.num_steps - 1} is needed")
        brains = max(1, len(self.bellman))
        for name in BRAIN_FIELDS:
            values = getattr(self, name)
            least = int(type(getattr(Config, name)[0]) is int)  # of a count; of a rate 0
            most = 1 if name in ("her_ratio", "tau_actor", "tau_critic") else math.inf
            if len(values) != brains or not all(least <= x <= most for x in values):
                wanted = f"{brains} entries of {least} to {most}, one for each brain, are needed"
                raise ValueError(f"{name}={values}: {wanted} (bellman={self.bellman})")
        for k in range(brains):
            if not self.bellman[k] and not self.ppo_eps[k]:
                raise ValueError(f"brain {k}: bellman=False needs ppo_eps > 0, not {self.ppo_eps}")
            delay, repeat, warm = self.learning_delay[k], self.learning_repeat[k], self.warmup[k]
            steps = self.num_steps * np.array([warm, self.num_updates])
            first, end = np.floor(steps // delay * repeat)
            if first >= end:
                plan = f"{repeat} minibatches every {delay} steps after {warm} episodes"
                advice = "lower optim_batch_size or learning_delay, or raise total_timesteps"
                raise ValueError(f"brain {k} never learns: {plan} of {self.num_updates}: {advice}")


# Those that describe brains: the tuples, but for the networks'.
BRAIN_FIELDS = tuple(x for x, v in vars(Config()).items() if type(v) is tuple and x != "hidden")
Brain = namedtuple("Brain", ("index", *BRAIN_FIELDS))

# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("gamma", "gae_lambda", "lr_critic", "max_grad_norm")

# --- presets ---

# fmt: off
# Origins are in docs/presets.md. The defaults are the brains of the author's main notebook, a1.
ONLY_PPO, ONLY_DPG = ({x: (getattr(Config, x)[k],) for x in BRAIN_FIELDS} for k in (0, 1))
NO_IR, BOTH = {"importance_resampling": (False, False)}, {"her_ratio": (0.12, 0.12)}
FIRST = {**NO_IR, "learning_repeat": (6.0, 11 / 6)}
TWO_PPO = {  # a quick one, and one that seldom learns, but much
    **NO_IR, "num_steps": 70, "lr_critic": 5e-5, "bellman": (False, False), "ppo_eps": (0.2, 0.2),
    "memory_size": (14_000, 8_400), "batch_size": (1024, 2048), "optim_batch_size": (2048, 2048),
    "learning_delay": (10, 210), "learning_repeat": (6.0, 20.0), "lr_actor": (1e-4, 1e-4),
    "tau_actor": (0.1, 1.0), "tau_critic": (0.0, 1.0), "sync_delta_a": (1, 1),
    "separate_actors": (False, False), "mean_only": (False, False), "her_ratio": (0.0, 0.0),
}
SHORT = {**TWO_PPO, "max_nstep": 4, "learning_delay": (4, 210)}
DDPG = {
    **ONLY_DPG, "memory_size": (120_000,), "batch_size": (256,), "optim_batch_size": (512,),
    "learning_delay": (40,), "learning_repeat": (107.0,), "lr_actor": (1e-3,),
    "tau_actor": (1e-3,), "tau_critic": (1e-3,), "sync_delta_a": (7,), "sync_delta_c": (7,),
    "mean_only": (False,), "her_ratio": (0.03,), "importance_resampling": (False,),
    "max_nstep": 6, "lr_critic": 1e-4, "mean_squash": "tanh", "noise_period": 120,
}
RATIO, FIXED = {**DDPG, "ppo_eps": (0.2,)}, {"floating_step": False}
FUTURE = BOTH | {"env": "arm/reacher-static", "her_strategy": "future"}
RELABELLED = {"is_denominator": "relabelled"}
PRESETS: dict[str, dict[str, Any]] = {
    # the author's comparison, to be run on the arm
    "a1": {}, "a2": FIRST | {"her_ratio": (0.0, 0.05)}, "a2b": FIRST | {"her_ratio": (0.04, 0.05)},
    "a3": ONLY_DPG, "a4": ONLY_PPO, "a5": TWO_PPO | {"her_ratio": (0.04, 0.04)}, "a6": TWO_PPO,
    "a7": SHORT, "a7b": SHORT | FIXED, "a7c": TWO_PPO | FIXED,
    "a8": DDPG, "a9": RATIO, "a9_inverted": RATIO | {"is_inverted": True},
    # what the comparison leaves open: a1 with a part changed
    "b1": {"lr_actor": (1e-3, 0.0)}, "b2": BOTH, "b2_relabelled": BOTH | RELABELLED,
    "b2_future": FUTURE, "b2_future_relabelled": FUTURE | RELABELLED, "b7": {"reward_kind": "env"},
    "b3_none": {"her_strategy": "none"}, "b3_half": {"her_ratio": (0.0, 0.5)},
    "b3_nstep": {"her_nstep": True}, "b4_mean": {"mean_only": (False, False)},
    "b4_separate": {"separate_actors": (True, True)}, "b4_one_target": {"detach_actors": False},
    "b5_sum": {"ratio_reduce": "sum"}, "b5_fixed": FIXED, "b8": {"critic_input": "action"},
    "b6_dpg": {"natural": (False, True)}, "b6_ppo": {"natural": (True, False)},
}
# fmt: on


# --- networks ---


def uniform(bound: float):
    """Initialiser, uniform in [-bound, bound]."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, -bound, bound)


class Actor(nn.Module):
    """Policy network without biases: inputs [..., I] and noise of the weights -> Gaussian.

    Each layer's weights are moved by its noise [in, out] times learned deviations.
    """

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, x, noise):
        for i, size in enumerate((*self.config.hidden, self.action_size)):
            x, shape = nn.relu(x) if i else x, (x.shape[-1], size)
            kernel = self.param(f"kernel_{i}", uniform(math.sqrt(3.0 / shape[0])), shape)
            deviation = self.param(f"deviation_{i}", nn.initializers.constant(0.017), shape)
            x = x @ (kernel + deviation * noise[i])
        mean = jnp.tanh(x) if self.config.mean_squash == "tanh" else x
        # The deviation, the same in all states, stays between 1 / e and e.
        log_std = jnp.tanh(self.param("log_std", nn.initializers.zeros, (self.action_size,)))
        return common.Gaussian(mean, jnp.broadcast_to(log_std, mean.shape))


class Critic(nn.Module):
    """Q: inputs [..., I], what it is told of the policy [..., P] -> parts [..., num_heads]."""

    config: Config
    num_heads: int

    @nn.compact
    def __call__(self, x, policy):
        x = jnp.concatenate([nn.relu(dense(x, x.shape[-1])), dense(policy, x.shape[-1])], -1)
        for size in self.config.hidden:
            x = nn.relu(dense(x, size))
        return dense(x, self.num_heads, 3e-3)


def dense(x, size: int, bound: float | None = None):
    """Linear layer; weights within `bound`, by default 1 / sqrt(outputs), as published."""
    init = uniform(bound or 1.0 / math.sqrt(size)), uniform(1.0 / math.sqrt(x.shape[-1]))
    return nn.Dense(size, kernel_init=init[0], bias_init=init[1])(x)


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


MEASURED = ("count", "policy_loss", "value_loss", "approx_kl", "ess", "her_fraction", "reward")
MEASURED += ("actor_grad_norm", "critic_grad_norm", "clip_fraction")  # the last if there is a range

# --- targets and losses ---


def relabelled(goals, strategy, obs, rows, ahead):
    """Observations [B, J, ...] that many steps `ahead` [J] of rows [B], with their goals.

    `obs` [W, N, L + 1, ...] is the replay's. A row that is relabelled gets the goals that its own
    episode had from step h on ("shift"), or at all times what was achieved at step h ("future").
    """
    at = lambda start, ahead: obs[rows.slot[:, None], rows.env[:, None], start[:, None] + ahead]
    own = at(rows.t, ahead)
    if strategy == "none":
        return own
    goal = goals.desired_goal(own)
    if strategy == "shift":
        other = goals.desired_goal(at(rows.h, ahead))
    else:
        other = goals.achieved_goal(at(rows.h, 0))[..., : goal.shape[-1]]
    return goals.with_goal(own, jnp.where(rows.relabel[:, None, None], other, goal))


def normalize(obs_stats, obs):
    """Observations [..., obs_size], goals included, standardised by running `obs_stats`."""
    return jnp.clip((obs - obs_stats.mean) / jnp.sqrt(obs_stats.var + 1e-4), -10.0, 10.0)


def lookaheads(size, longest, floating):
    """Lookaheads [size] of the rows of a minibatch: 1 to `longest` in turn, or the longest."""
    return 1 + np.arange(size) % longest if floating else np.full(size, longest)


def nstep_target(reward, next_value, bootstrap, n, terminated, gamma, lam):
    """Targets y [B, m] that look n [B] of at most H steps ahead.

    `reward` [B, H, m] and `terminated` [B, H] are those of the steps, `next_value` [B, H, m] and
    `bootstrap` [B, m] the values after each and the last. GAE plus the first V, which cancels.
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
        log_ratio = jax.lax.stop_gradient(-log_ratio if inverted else log_ratio)
        gain = (q - target).sum(-1)
    else:
        gain = (target - jax.lax.stop_gradient(q)).sum(-1)
    ratio = jnp.exp(jnp.minimum(log_ratio, math.log(100.0)))  # an infinite one's gradient is nan
    clipped = jnp.clip(ratio, 1.0 - eps, 1.0 + eps)
    return -jnp.minimum(clipped * gain, ratio * gain).mean()


def minibatches(steps, delay, repeat):
    """Minibatches that a brain has had when each environment has made that many steps."""
    return jnp.floor(steps // delay * repeat).astype(jnp.int32)


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, config.num_envs, stagger=False, max_steps=config.num_steps)
    goals, kind, strategy = env.goals, config.reward_kind, config.her_strategy
    strategy = strategy if any(config.her_ratio) else "none"
    kinds = goals.kinds if goals else ("env",)
    for wrong, message in (
        (env.discrete, "has discrete actions: BNPO needs continuous ones"),
        (env.privileged_size, "shows the actor what only a critic may see: no privileged=1"),
        (not goals and strategy != "none", "has no goals to relabel: take her_strategy='none'"),
        (kind not in kinds, f"has no reward_kind={kind!r}: take one of {', '.join(kinds)}"),
        (goals and goals.moving and strategy == "future", "moves its goal, and her_strategy="
         "'future' gives a row one for ever: take 'shift'"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(f"{env.name} {message}")
    N, L, W, K = config.num_envs, config.num_steps, max(config.window), len(config.bellman)
    H, A = config.max_nstep, env.action_size
    U = math.gcd(L, config.noise_period, *config.learning_delay)  # steps between possible turns
    brains = [Brain(k, *(getattr(config, name)[k] for name in BRAIN_FIELDS)) for k in range(K)]

    def reward_at(obs):
        """Rewards [..., m] of arriving at observations, for the goals in them."""
        return goals.compute_reward(goals.achieved_goal(obs), goals.desired_goal(obs), kind)

    look = partial(relabelled, goals, strategy)
    sample = jnp.zeros((1, env.obs_size))
    num_heads = 1 if kind == "env" else reward_at(sample).shape[-1]
    actor, critic = Actor(config, A), Critic(config, num_heads)
    silence = tuple(map(jnp.zeros, itertools.pairwise((env.obs_size, *config.hidden, A))))
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam)

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        params = {"actor": actor.init(key_actor, sample, silence)}
        policy = actor.apply(params["actor"], sample, silence)
        params["critic"] = critic.init(key_critic, sample, seen(policy))
        opt_state = {name: optimizer.init(params[name]) for name in params}
        zeros = lambda *shape: jnp.zeros((W, N, *shape))
        policy, reward = common.Gaussian(zeros(L, A), zeros(L, A)), zeros(L, num_heads)
        replay = Episodes(zeros(L + 1, env.obs_size), zeros(L, A), policy, reward, zeros(L) > 0)
        several = lambda tree, n: tree | {"actor": dict.fromkeys(range(n), tree["actor"])}
        return TrainState(
            params, several(params, K if config.detach_actors else 1), several(opt_state, K),
            silence, common.Stats.empty((env.obs_size,)), replay, obs, env_state, key, jnp.int32(0),
        )  # fmt: skip

    def seen(policy, action=None):
        """What the critic is told of a policy, and of the action that it took."""
        if config.critic_input == "action":
            return policy.mean if action is None else action
        return jnp.concatenate([policy.mean, jnp.exp(policy.log_std)], -1)

    def disturb(noise, key):
        """New noise for the weights of one layer, whichever."""
        key_layer, *keys = jax.random.split(key, 1 + len(noise))
        layer = jax.random.randint(key_layer, (), 0, len(noise))
        draw = lambda i: jax.random.normal(keys[i], noise[i].shape)
        return tuple(jnp.where(layer == i, draw(i), x) for i, x in enumerate(noise))

    def play(state, key):
        """Act for a block of U steps; new state, and arrays [U, N, ...]."""
        key_noise, key_env = jax.random.split(key)

        def step(carry, x):
            obs, obs_stats, env_state = carry
            noise, key = x
            obs_stats = obs_stats.add(obs)
            policy = actor.apply(state.params["actor"], normalize(obs_stats, obs), state.noise)
            action = policy.sample(noise)
            next_obs, env_state, reward, terminated, _, info = env.step(key, env_state, action)
            transition = Episodes(obs, action, policy, reward, terminated)
            return (next_obs, obs_stats, env_state), (transition, info)

        carry = state.obs, state.obs_stats, state.env_state
        xs = jax.random.normal(key_noise, (U, N, A)), jax.random.split(key_env, U)
        (obs, obs_stats, env_state), (traj, info) = jax.lax.scan(step, carry, xs)
        return state._replace(obs=obs, obs_stats=obs_stats, env_state=env_state), traj, info

    def recorded(state, rows):
        """Action, policy, reward and terminated [B, H, ...] of the steps from each row on."""
        index = rows.slot[:, None], rows.env[:, None], rows.t[:, None] + np.arange(H)
        return jax.tree.map(lambda x: x[index], tuple(state.replay[1:]))

    def draw_rows(brain, state, params, key):
        """Rows of a brain's window, all equally likely, or preferring what pi makes likely."""
        keys = jax.random.split(key, 6)
        size = brain.batch_size * (8 if brain.importance_resampling else 1)
        newest = jnp.minimum(state.update, config.window[brain.index])
        t = jax.random.randint(keys[2], (size,), 0, L - H)
        bounds = (t + 1, L + 1) if strategy == "future" else (0, L - H + 1)
        rows = Rows(
            slot=(state.update - 1 - jax.random.randint(keys[0], (size,), 0, newest)) % W,
            env=jax.random.randint(keys[1], (size,), 0, N),
            t=t,
            relabel=jax.random.uniform(keys[3], (size,)) < brain.her_ratio * (strategy != "none"),
            h=jax.random.randint(keys[4], (size,), *bounds),
        )
        if not brain.importance_resampling:
            return rows
        inputs = normalize(state.obs_stats, look(state.replay.obs, rows, np.zeros(1, int))[:, 0])
        action, acted = jax.tree.map(lambda x: x[:, 0], recorded(state, rows)[:2])
        log_prob = log_prob_of(actor.apply(params["actor"], inputs, state.noise), action)
        ratio = jnp.exp(log_prob - log_prob_of(acted, action)).mean(-1)
        score = 0.666 * jnp.log(jnp.clip(ratio, 1e-8, 2.0)) + jax.random.gumbel(keys[5], (size,))
        chosen = jax.lax.top_k(score, brain.batch_size)[1]
        return jax.tree.map(lambda x: x[chosen], rows)

    def read(brain, state, targets, acting, rows, key):
        """The minibatch of these rows, with targets of the target networks."""
        obs = look(state.replay.obs, rows, np.arange(H + 1))
        inputs = normalize(state.obs_stats, obs)
        action, policy, reward, terminated = recorded(state, rows)
        if strategy != "none":
            # What follows a step that terminated is not there to be rewarded anew.
            renew = rows.relabel[:, None] & ~terminated
            reward = jnp.where(renew[..., None], reward_at(obs[:, 1:]), reward)
        longest = lookaheads(brain.batch_size, H, config.floating_step)
        n = longest if config.her_nstep else jnp.where(rows.relabel, 1, longest)
        # Only values before the end of a lookahead are used: half of them, if it floats.
        row, j = np.nonzero(np.arange(1, H) < longest[:, None])
        passed = jax.tree.map(lambda x: x[row, j + 1], (inputs[:, :-1], policy, action))
        value = critic.apply(targets["critic"], passed[0], seen(*passed[1:]))
        next_value = jnp.zeros_like(reward).at[row, j].set(value)
        last = inputs[jnp.arange(len(n)), n]
        any_of = jax.random.randint(key, (), 0, len(targets["actor"]))
        which = brain.index % len(targets["actor"]) if brain.separate_actors else any_of
        chosen = jax.tree.map(lambda *x: jnp.stack(x)[which], *targets["actor"].values())
        bootstrap = critic.apply(targets["critic"], last, seen(actor.apply(chosen, last, silence)))
        trace = config.gamma, config.gae_lambda
        target = nstep_target(reward, next_value, bootstrap, n, terminated, *trace)

        inputs, action, policy = jax.tree.map(lambda x: x[:, 0], (inputs, action, policy))
        log_prob = log_prob_of(policy, action)
        if config.is_denominator == "relabelled":
            new = log_prob_of(actor.apply(acting, inputs, state.noise), action)
            log_prob = jnp.where(rows.relabel[:, None], new, log_prob)
        aux = {"her_fraction": rows.relabel.mean(), "reward": reward[:, 0].sum(-1).mean()}
        return Batch(inputs, action, policy, log_prob, target), aux

    def loss_fn(params, brain, noise, batch):
        policy, eps = actor.apply(params["actor"], batch.inputs, noise), brain.ppo_eps
        log_std = jax.lax.stop_gradient(policy.log_std) if brain.mean_only else policy.log_std
        known, fixed = policy._replace(log_std=log_std), jax.lax.stop_gradient(params["critic"])
        q = critic.apply(fixed, batch.inputs, seen(known))
        log_ratio = log_prob_of(policy, batch.action) - batch.log_prob
        log_ratio = log_ratio.mean(-1) if config.ratio_reduce == "mean" else log_ratio.sum(-1)
        ratio = jnp.exp(jnp.minimum(log_ratio, math.log(100.0)))
        pg_loss = actor_loss(q, log_ratio, batch.target, brain.bellman, eps, config.is_inverted)
        value = critic.apply(params["critic"], batch.inputs, seen(batch.policy, batch.action))
        vf_loss = ((value - batch.target) ** 2).mean()
        aux = {"policy_loss": pg_loss, "value_loss": vf_loss, "count": 1.0}
        aux["approx_kl"] = (ratio - 1.0 - log_ratio).mean()
        aux["ess"] = ratio.mean() ** 2 / (ratio**2).mean()
        if eps:
            aux["clip_fraction"] = (jnp.abs(ratio - 1.0) > eps).mean()
        return pg_loss + vf_loss, aux

    def descend(params, grads, opt_state, learning_rate):
        direction, opt_state = optimizer.update(grads, opt_state)
        return jax.tree.map(lambda p, u: p - learning_rate * u, params, direction), opt_state

    def learn(brain, state, acting, key, number, learned):
        """A brain's minibatch of this `number`: new parameters, targets and optimiser states."""
        params, targets, opt_state = learned
        k, mine = brain.index, brain.index % len(targets["actor"])
        key_rows, key_target = jax.random.split(jax.random.fold_in(key, number))
        rows = draw_rows(brain, state, params, key_rows)
        batch, aux = read(brain, state, targets, acting, rows, key_target)
        grads, loss_aux = jax.grad(loss_fn, has_aux=True)(params, brain, state.noise, batch)
        aux |= loss_aux | {f"{name}_grad_norm": optax.global_norm(grads[name]) for name in grads}

        old, slope, opt_actor = params["actor"], grads["actor"], opt_state["actor"][k]
        if brain.natural:
            loss_of = lambda x: loss_fn(params | {"actor": x}, brain, state.noise, batch)[0]
            policy_of = lambda x: actor.apply(x, batch.inputs, state.noise)
            new_actor = common.natural_step(loss_of, policy_of, old, slope)
        else:
            new_actor, opt_actor = descend(old, slope, opt_actor, brain.lr_actor)
        old, slope = params["critic"], grads["critic"]
        new_critic, opt_critic = descend(old, slope, opt_state["critic"], config.lr_critic)
        opt_state = {"actor": opt_state["actor"] | {k: opt_actor}, "critic": opt_critic}
        tau_actor = jnp.where(number % brain.sync_delta_a == 0, brain.tau_actor, 0.0)
        tau_critic = jnp.where(number % brain.sync_delta_c == 0, brain.tau_critic, 0.0)
        target_actor = optax.incremental_update(new_actor, targets["actor"][mine], tau_actor)
        target_critic = optax.incremental_update(new_critic, targets["critic"], tau_critic)
        targets = {"actor": targets["actor"] | {mine: target_actor}, "critic": target_critic}
        return ({"actor": new_actor, "critic": new_critic}, targets, opt_state), aux

    def turn(brain, state, steps, key):
        """What a brain that is due after that many steps learns; new state, sums of metrics."""
        plan, warm = (brain.learning_delay, brain.learning_repeat), config.warmup[brain.index]
        end = minibatches(steps, *plan)
        first = jnp.where(state.update < warm, end, minibatches(steps - U, *plan))
        step = partial(learn, brain, state, state.params["actor"], key)

        def add(number, carry):
            learned, aux = step(number, carry[0])
            return learned, jax.tree.map(jnp.add, carry[1], aux)

        learned = state.params, state.target_params, state.opt_state
        zeros = dict.fromkeys(MEASURED if brain.ppo_eps else MEASURED[:-1], jnp.zeros(()))
        (params, targets, opt_state), sums = jax.lax.fori_loop(first, end, add, (learned, zeros))
        state = state._replace(params=params, target_params=targets, opt_state=opt_state)
        return state, {f"brain{brain.index}/{name}": x for name, x in sums.items()}

    def update(state):
        key, key_reset, key_blocks = jax.random.split(state.key, 3)
        obs, env_state = env.reset(key_reset)  # every episode begins anew

        def block(state, x):
            tick, key = x
            key_noise, key_play, *keys = jax.random.split(key, 2 + K)
            steps = state.update * L + tick
            renew = partial(jnp.where, steps % config.noise_period == 0)
            noise = jax.tree.map(renew, disturb(state.noise, key_noise), state.noise)
            state, traj, info = play(state._replace(noise=noise), key_play)
            metrics = {}
            for brain in brains:
                state, sums = turn(brain, state, steps + U, keys[brain.index])
                metrics |= sums
            return state, (traj, info, metrics)

        xs = jnp.arange(0, L, U), jax.random.split(key_blocks, L // U)
        state, out = jax.lax.scan(block, state._replace(obs=obs, env_state=env_state), xs)
        traj, info = jax.tree.map(lambda x: x.reshape((L, *x.shape[2:])), out[:2])
        final_obs = info["final_observation"]
        reward = traj.reward[..., None] if kind == "env" else reward_at(final_obs)
        traj = traj._replace(obs=jnp.concatenate([traj.obs, final_obs[-1:]]), reward=reward)
        write = lambda kept, new: kept.at[state.update % W].set(jnp.swapaxes(new, 0, 1))
        replay = jax.tree.map(write, state.replay, traj)

        metrics = jax.tree.map(lambda x: x.sum(0), out[2]) | common.run_metrics(info, state.params)
        metrics["charts/score"] = reward.mean(-1).sum(0).mean()
        metrics["charts/std"] = jnp.exp(traj.policy.log_std).mean()
        metrics["charts/saturation"] = (jnp.abs(traj.policy.mean) > 1.0).mean()
        return state._replace(replay=replay, key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], normalize(policy["obs_stats"], obs), silence)
        noise = 0.0 if greedy else jax.random.normal(key, distribution.mean.shape)
        return distribution.sample(noise)

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

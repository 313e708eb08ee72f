"""Policy-on policy-off policy optimisation (P3O): A2C that also learns from a replay buffer.

Fakoor, Chaudhari, Smola 2019, https://arxiv.org/abs/1905.01756. One update collects a rollout
[T, N] with the current policy, takes one gradient step on it, and then a Poisson number of gradient
steps on segments of recent rollouts. beta is the policy that acted (the behaviour policy):

    A   = advantage by GAE as in ppo.py,   R = A + V,   both from the current critic V
    w   = pi(a | s) / beta(a | s)
    ESS = (sum w)^2 / (M sum w^2)   over the M steps of a minibatch   (effective sample size)

    fresh loss    = -E[A log pi(a | s)] + vf_coef E[(R - V)^2] - ent_coef E[H(pi)]
    replayed loss = -E[min(w, ESS) A log pi(a | s)] + vf_coef E[(R - V)^2]
                    + (1 - ESS) E[KL(pi || beta)] / K

A, R, w and ESS are constants in the loss. As published, A is not corrected for the difference
between beta and pi. K is the number of discrete actions, and 1 for continuous ones.

Differences from ppo.py:

1. A rollout gives one gradient step, without a ratio and without minibatches.
2. A replay buffer keeps the newest rollouts. A segment is T steps of one environment with T + 1
   observations, normalised by the running statistics when it was collected.
3. At a time limit a segment does not hold the true successor s'. Instead, gamma V(s') is added to
   the reward after the rollout, and the step counts as terminated in both losses. A replayed
   segment keeps this old value.
4. The gradient of all parameters is clipped by one norm. For images, actor and critic share their
   hidden layers.
5. The optimiser is RMSprop as in PyTorch. With `anneal_lr`, update u = 1, ..., U has the learning
   rate times 1 - u / (U + 1).
6. Hidden layers start with gain sqrt(2), and so does the critic's last layer (1 for images). Large
   images (Atari) have three convolutions. Bytes are divided by 255.
7. Advantages are not standardised.

    python algos/p3o.py --env cartpole --num-seeds 16
    python algos/p3o.py --env breakout --preset a2c --num-seeds 4

Documentation: docs/p3o.md
"""

import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__":  # the checkout, not algos/, comes first on the import path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends the imports at once

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Interval
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
    num_steps: PositiveInt = 16  # length of a rollout in each environment, and of a segment

    # optimiser: RMSprop, after clipping by global norm
    learning_rate: NonNegativeFloat = 7e-4  # learning rate of all parameters
    anneal_lr: bool = True  # decrease the learning rate linearly to almost 0 over the run
    max_grad_norm: PositiveFloat = 0.5  # largest global norm of the gradient
    # decay of the running mean of squared gradients
    rms_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    rms_eps: PositiveFloat = 1e-5  # epsilon of RMSprop, added to the square root

    # objective
    gamma: UnitFloat = 0.99  # discount
    gae_lambda: UnitFloat = 0.95  # lambda of GAE; 1: n-step returns
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss
    off_policy_entropy: bool = False  # entropy bonus in the replayed loss too

    # replay
    replay_ratio: NonNegativeFloat = 2.0  # replayed minibatches per update, on average; 0: A2C
    replay_fraction: UnitFloat = 0.0286  # share of the run's rollouts that the buffer keeps
    warmup_fraction: UnitFloat = 0.3  # share of the buffer that is filled before it is used
    sample_mult: PositiveInt = 6  # segments of each environment in a replayed minibatch
    max_ratio: NonNegativeFloat | None = None  # upper limit of the ratio w; None: the ESS
    kl_coef: NonNegativeFloat | None = None  # weight of the KL; None: 1 - ESS
    kl_direction: Literal["pi_beta", "beta_pi"] = "pi_beta"  # KL(pi || beta) or KL(beta || pi)
    # mean: divide the KL by the number of discrete actions, K; sum: do not (K = 1)
    kl_reduction: Literal["mean", "sum"] = "mean"

    # observations and rewards
    normalize_obs: bool = False  # standardise observations by running statistics
    normalize_reward: bool = False  # divide rewards by the std of the discounted return

    # networks
    hidden: tuple[PositiveInt, ...] = (64, 64)  # fully connected hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # activation of the hidden layers
    log_std_init: float = 0.0  # initial log standard deviation of a Gaussian policy

    @property
    def steps_per_update(self) -> int:
        """Environment steps in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    @property
    def num_slots(self) -> int:
        """Rollouts in the replay buffer: `replay_fraction` of all, but at least `sample_mult`.

        With fewer, a replayed minibatch would hold many segments more than once. A run of fewer
        rollouts keeps all of them.
        """
        kept = round(self.replay_fraction * self.num_updates)
        return min(max(kept, self.sample_mult), self.num_updates)

    @property
    def warmup_slots(self) -> int:
        """Rollouts that must be in the replay buffer before it is used; two if it can hold two."""
        return min(self.num_slots, max(2, round(self.warmup_fraction * self.num_slots)))

    def validate(self) -> None:
        """All combinations of fields are allowed."""


# --- networks ---


class Torso(nn.Module):
    """Hidden layers: observation [..., obs_size] -> features [..., hidden[-1]].

    If `obs_shape` is [height, width, channels], convolutions come first: one for small images
    (MinAtar), three for images of at least 36 x 36 pixels (Atari). Bytes are divided by 255.
    """

    config: Config
    obs_shape: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        activation, init = getattr(nn, self.config.activation), nn.initializers.orthogonal(2**0.5)
        x = obs.astype(jnp.float32)
        if obs.dtype == jnp.uint8:
            x = x / 255.0
        if len(self.obs_shape) == 3:
            small = min(self.obs_shape[:2]) < 36
            layers = [(16, 3, 1)] if small else [(32, 8, 4), (64, 4, 2), (32, 3, 1)]
            x = x.reshape((*obs.shape[:-1], *self.obs_shape))
            for channels, size, stride in layers:
                x = activation(nn.Dense(channels, kernel_init=init)(patches(x, size, stride)))
            x = x.reshape((*obs.shape[:-1], -1))
        for size in self.config.hidden:
            x = activation(nn.Dense(size, kernel_init=init)(x))
        return x


class ActorCritic(nn.Module):
    """Observation [..., obs_size] -> policy (Categorical or Gaussian) and state value [...]."""

    config: Config
    obs_shape: tuple[int, ...]
    action_size: int
    discrete: bool

    @nn.compact
    def __call__(self, obs):
        config, size = self.config, self.action_size
        shared = len(self.obs_shape) == 3
        x = Torso(config, self.obs_shape, name="torso" if shared else "actor_torso")(obs)
        out = nn.Dense(size, kernel_init=nn.initializers.orthogonal(0.01), name="actor")(x)
        if not shared:
            x = Torso(config, self.obs_shape, name="critic_torso")(obs)
        init = nn.initializers.orthogonal(1.0 if shared else 2**0.5)  # as in the authors' code
        value = nn.Dense(1, kernel_init=init, name="critic")(x)[..., 0]
        if self.discrete:
            return common.Categorical(out), value
        log_std = self.param("log_std", nn.initializers.constant(config.log_std_init), (size,))
        return common.Gaussian(out, jnp.broadcast_to(log_std, out.shape)), value


def patches(x, size: int, stride: int):
    """Patches [..., h, w, size^2 C] of images [..., H, W, C], one every `stride` pixels.

    A dense layer on patches is a convolution. XLA's own convolution is slow inside a loop on a CPU.
    """
    for axis in (-2, -3):
        stop = x.shape[axis] - size + 1
        parts = [jax.lax.slice_in_dim(x, i, stop + i, stride, axis) for i in range(size)]
        x = jnp.concatenate(parts, -1)
    return x


# --- data types ---


class Transition(NamedTuple):
    """One step of the rollout; arrays [T, N, ...]."""

    obs: jax.Array  # as the environment gave it
    action: jax.Array  # unclipped; the environment clips
    policy: common.Categorical | common.Gaussian  # beta
    reward: jax.Array
    terminated: jax.Array
    done: jax.Array  # terminated or truncated
    valid: jax.Array  # the physics was finite
    next_obs: jax.Array  # true successor, never a reset observation


class Segments(NamedTuple):
    """B segments: T steps of one environment each; arrays [B, T, ...]."""

    obs: jax.Array  # [B, T + 1, ...], normalised by the running statistics when collected
    action: jax.Array
    policy: common.Categorical | common.Gaussian  # beta
    reward: jax.Array  # scaled; at a time limit with gamma V(s') of the critic when collected
    done: jax.Array  # terminated or truncated; both count as terminated from here on
    valid: jax.Array  # the physics was finite


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict
    opt_state: tuple
    replay: Segments | None  # [S N, T, ...], num_slots = S rollouts; None if replay_ratio is 0
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


def policy_loss(log_prob, advantage, weight=1.0):
    """Policy gradient loss; arrays [B, T]. `advantage` and `weight` get no gradient."""
    return -(jax.lax.stop_gradient(weight * advantage) * log_prob).mean()


def value_loss(value, target):
    """Mean squared error to the value target."""
    return ((value - target) ** 2).mean()


def effective_sample_size(log_weight):
    """(sum w)^2 / (M sum w^2) of all M weights, in [1 / M, 1], from their logarithms [...]."""
    log_sum, log_squares = jax.nn.logsumexp(log_weight), jax.nn.logsumexp(2.0 * log_weight)
    return jnp.minimum(jnp.exp(2.0 * log_sum - log_squares) / log_weight.size, 1.0)


def kl_divergence(p, q):
    """KL(p || q) [...] of two Categoricals or of two Gaussians."""
    if isinstance(p, common.Categorical):
        log_p, log_q = jax.nn.log_softmax(p.logits), jax.nn.log_softmax(q.logits)
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    moments = jnp.exp(2.0 * p.log_std) + (p.mean - q.mean) ** 2
    return (q.log_std - p.log_std + 0.5 * moments * jnp.exp(-2.0 * q.log_std) - 0.5).sum(-1)


def estimates(policy, value, segments, config):
    """Policy, log pi(a | s), V, value target R and advantage A of the T steps; arrays [B, T].

    `policy` and `value` are those of the T + 1 observations. Every done step counts as terminated
    here, because the reward of a truncated step already includes the value of its successor. R and
    A = R - V get no gradient.
    """
    policy = jax.tree.map(lambda x: x[:, :-1], policy)
    value, next_value = value[:, :-1], value[:, 1:]
    valid = segments.valid
    reward = jnp.where(valid, segments.reward, value)  # physics not finite: V is its own target
    steps = reward, value, next_value, segments.done, segments.done
    advantage = gae(*(x.T for x in steps), config.gamma, config.gae_lambda).T  # gae scans axis 0
    target = jax.lax.stop_gradient(advantage + value)
    # Not finite: the mean advantage, because 0 would favour such steps while V is too high.
    mean = (advantage * valid).sum() / jnp.maximum(valid.sum(), 1)
    advantage = jax.lax.stop_gradient(jnp.where(valid, advantage, mean))
    return policy, policy.log_prob(segments.action), value, target, advantage


def fresh_loss(policy, value, segments, config):
    """Loss of the last rollout, as in A2C, and its metrics.

    `policy` and `value` are those of the T + 1 observations, [B, T + 1].
    """
    policy, log_prob, value, target, advantage = estimates(policy, value, segments, config)
    pg_loss = policy_loss(log_prob, advantage)
    vf_loss = value_loss(value, target)
    entropy = policy.entropy().mean()
    loss = pg_loss + config.vf_coef * vf_loss - config.ent_coef * entropy
    return loss, {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": vf_loss,
        "losses/entropy": entropy,
        "losses/explained_variance": 1.0 - (target - value).var() / (target.var() + 1e-8),
    }


def replay_loss(policy, value, segments, config):
    """Loss of replayed segments (second and third term of eq. 14, and value loss), and its metrics.

    `policy` and `value` are those of the T + 1 observations, [B, T + 1]. The ratio, and with it
    `ess`, `max_ratio` and `kl_coef`, gets no gradient.
    """
    policy, log_prob, value, target, advantage = estimates(policy, value, segments, config)
    beta = segments.policy
    log_ratio = jax.lax.stop_gradient(log_prob - beta.log_prob(segments.action))
    ratio = jnp.exp(jnp.minimum(log_ratio, 20.0))  # so that exp stays finite
    ess = effective_sample_size(log_ratio)
    max_ratio = ess if config.max_ratio is None else config.max_ratio
    kl_coef = 1.0 - ess if config.kl_coef is None else config.kl_coef
    pair = (policy, beta) if config.kl_direction == "pi_beta" else (beta, policy)
    kl = kl_divergence(*pair).mean()
    averaged = isinstance(policy, common.Categorical) and config.kl_reduction == "mean"
    K = policy.logits.shape[-1] if averaged else 1
    pg_loss = policy_loss(log_prob, advantage, jnp.minimum(ratio, max_ratio))
    vf_loss = value_loss(value, target)
    entropy = policy.entropy().mean()
    loss = pg_loss + config.vf_coef * vf_loss + kl_coef * kl / K
    if config.off_policy_entropy:
        loss -= config.ent_coef * entropy
    return loss, {
        "replay/policy_loss": pg_loss,
        "replay/value_loss": vf_loss,
        "replay/entropy": entropy,
        "replay/kl": kl,
        "replay/kl_coef": kl_coef,
        "replay/ess": ess,
        "replay/ratio_limit": max_ratio,
        "replay/mean_ratio": ratio.mean(),
        "replay/largest_ratio": ratio.max(),
        "replay/clip_fraction": (ratio > max_ratio).mean(),
    }


def sample_segments(replay, key, filled, num_envs, sample_mult):
    """`sample_mult` segments of each environment, from random rollouts among the first `filled`."""
    env = jnp.arange(sample_mult * num_envs) % num_envs
    slot = jax.random.randint(key, env.shape, 0, filled)
    return jax.tree.map(lambda x: x[slot * num_envs + env], replay)


def replay_counts(config: Config) -> np.ndarray:
    """Poisson number of gradient steps on replayed segments in each update, [num_updates].

    numpy draws the numbers before the program is compiled, and all seeds share them. If each seed
    drew its own, all would wait for the largest, because `vmap` runs a loop until its last row has
    finished.
    """
    counts = np.random.default_rng(0).poisson(config.replay_ratio, config.num_updates)
    counts[: config.warmup_slots - 1] = 0  # until then the buffer holds too few rollouts
    return counts


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environments that a run learns in."""
    return envs.make(config.env, config.num_envs)


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose environments, networks and optimiser into the pure functions of a run."""
    network = ActorCritic(config, env.obs_shape, env.action_size, env.discrete)
    optimizer = optax.chain(  # no learning rate: see descend
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_rms(config.rms_decay, config.rms_eps, eps_in_sqrt=False),
    )
    T, N, S = config.num_steps, config.num_envs, config.num_slots
    counts = replay_counts(config)

    def init(key) -> TrainState:
        key_params, key_env, key = jax.random.split(key, 3)
        obs, env_state = env.reset(key_env)
        params = network.init(key_params, obs[:1])
        state = TrainState(
            params=params,
            opt_state=optimizer.init(params),
            replay=None,
            obs_stats=common.Stats.empty((env.obs_size,)),
            reward_scale=common.RewardScale.empty(N),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.int32(0),
        )
        if not config.replay_ratio:
            return state
        segments = jax.eval_shape(lambda: segments_of(*rollout(state, key)[:2]))  # shapes only
        empty = lambda x: jnp.zeros((S * N, *x.shape[1:]), x.dtype)
        return state._replace(replay=jax.tree.map(empty, segments))

    def normalize(obs_stats, obs):
        return obs_stats.normalize(obs.astype(jnp.float32)) if config.normalize_obs else obs

    def noise_of(key, shape):
        """Noise [*shape, action_size] for sampling actions of batch shape `shape`."""
        draw = jax.random.gumbel if env.discrete else jax.random.normal
        return draw(key, (*shape, env.action_size))

    def rollout(state, key):
        """Act for T steps; returns the state, transitions [T, N] and infos [T, N]."""
        key_noise, key_env, key_refresh = jax.random.split(key, 3)
        env_state = env.refresh(key_refresh, state.env_state)  # redraws cached start states

        def step(carry, x):
            obs, env_state = carry
            noise, key = x
            policy, _ = network.apply(state.params, normalize(state.obs_stats, obs))
            action = policy.sample(noise)
            next_obs, env_state, reward, terminated, truncated, info = env.step(
                key, env_state, action
            )
            transition = Transition(
                obs=obs,
                action=action,
                policy=policy,
                reward=reward,
                terminated=terminated,
                done=terminated | truncated,
                valid=~info["env_nan"],
                next_obs=info.pop("final_observation"),
            )
            return (next_obs, env_state), (transition, info)

        xs = noise_of(key_noise, (T, N)), jax.random.split(key_env, T)
        (obs, env_state), (traj, info) = jax.lax.scan(step, (state.obs, env_state), xs)
        return state._replace(obs=obs, env_state=env_state), traj, info

    def segments_of(state, traj) -> Segments:
        """The N segments of a rollout that ended in `state`."""
        reward = traj.reward * (state.reward_scale.factor() if config.normalize_reward else 1.0)
        _, next_value = network.apply(state.params, normalize(state.obs_stats, traj.next_obs))
        truncated = traj.done & ~traj.terminated
        reward += jnp.where(truncated, config.gamma * next_value, 0.0)
        obs = normalize(state.obs_stats, jnp.concatenate([traj.obs, state.obs[None]]))
        segments = Segments(obs, traj.action, traj.policy, reward, traj.done, traj.valid)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), segments)

    def remaining(state):
        """Share of the run that is left, for schedules: U / (U + 1) in the first of U updates."""
        return jnp.maximum(1.0 - (state.update + 1) / (config.num_updates + 1), 0.0)

    def loss_fn(params, segments, replayed):
        loss = replay_loss if replayed else fresh_loss
        return loss(*network.apply(params, segments.obs), segments, config)

    def learning_rate(state):
        return config.learning_rate * (remaining(state) if config.anneal_lr else 1.0)

    def descend(state, grads):
        """One step of the optimiser on all parameters."""
        rate = learning_rate(state)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, direction)
        return state._replace(params=params, opt_state=opt_state)

    def gradient_step(state, segments, replayed):
        grads, aux = jax.grad(loss_fn, has_aux=True)(state.params, segments, replayed)
        aux["replay/grad_norm" if replayed else "losses/grad_norm"] = optax.global_norm(grads)
        return descend(state, grads), aux

    def store(state, segments):
        """Replace the oldest rollout in the replay buffer."""
        row = (state.update % S) * N
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)
        return state._replace(replay=jax.tree.map(write, state.replay, segments))

    def replay_steps(state, key):
        """The update's gradient steps on replayed segments; returns sums of their metrics too.

        The launcher divides all `replay/` metrics by `replay/count`, and leaves them out where
        it is 0. A metric of the update, not of a gradient step, goes into another group.
        """
        filled, count = jnp.minimum(state.update + 1, S), jnp.asarray(counts)[state.update]

        def step(i, carry):
            state, sums = carry
            key_i = jax.random.fold_in(key, i)
            segments = sample_segments(state.replay, key_i, filled, N, config.sample_mult)
            state, aux = gradient_step(state, segments, replayed=True)
            return state, jax.tree.map(jnp.add, sums, aux)

        # only for the names: any number of segments will do
        aux = jax.eval_shape(lambda: gradient_step(state, state.replay, replayed=True)[1])
        sums = {k: jnp.zeros(()) for k in aux}
        state, sums = jax.lax.fori_loop(0, count, step, (state, sums))
        sums |= {"replay/count": count, "charts/replay_steps": count}
        return state, sums | {"charts/replay_filled": filled}

    def update(state):
        key, key_rollout, key_replay = jax.random.split(state.key, 3)
        state, traj, info = rollout(state, key_rollout)
        segments = segments_of(state, traj)
        state, metrics = gradient_step(state, segments, replayed=False)
        if config.replay_ratio:
            state, sums = replay_steps(store(state, segments), key_replay)
            metrics |= sums

        metrics |= common.run_metrics(info, (state.params, metrics["losses/value_loss"]))
        metrics["charts/learning_rate"] = jnp.asarray(learning_rate(state))
        state = state._replace(
            obs_stats=state.obs_stats.add(traj.obs),
            reward_scale=state.reward_scale.add(traj.reward, traj.done, config.gamma),
            key=key,
            update=state.update + 1,
        )
        return state, metrics

    def act(policy, obs, key, greedy):
        distribution, _ = network.apply(policy["network"], normalize(policy["obs_stats"], obs))
        if greedy:
            return distribution.mode()
        return distribution.sample(noise_of(key, obs.shape[:-1]))

    def policy_of(state):
        return {"network": state.params, "obs_stats": state.obs_stats}

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
TRACEABLE = ("learning_rate", "max_grad_norm", "gamma", "gae_lambda", "ent_coef", "vf_coef")

# --- presets ---

# fmt: off
# Values that replace the defaults; docs/presets.md has their origins.
MINATAR = {"total_timesteps": 1_000_000, "hidden": (128,), "activation": "relu"}
PHYSICS = {
    "total_timesteps": 1_000_000, "learning_rate": 3e-4, "ent_coef": 0.0, "normalize_obs": True,
    "normalize_reward": True, "hidden": (256, 256),
}
PRESETS: dict[str, dict[str, Any]] = {
    # sources of tasks, for those that have no preset of their own
    "gym": {**PHYSICS, "log_std_init": -1.0},
    **dict.fromkeys(("brax", "playground"), PHYSICS),
    "atari": {"total_timesteps": 28_000_000, "hidden": (512,), "activation": "relu"},
    # tasks
    "cartpole": {"normalize_reward": True},
    **dict.fromkeys(("breakout", "asterix", "freeway", "space_invaders"), MINATAR),
    # ablations, on top of a task's preset
    "a2c": {"replay_ratio": 0.0},
    "fixed_clip": {"max_ratio": 1.0},
    "no_kl": {"kl_coef": 0.0},
}
# fmt: on


if __name__ == "__main__":
    launch.main("p3o")

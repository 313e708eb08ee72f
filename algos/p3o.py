"""Policy-on policy-off policy optimisation (P3O): A2C that also replays, as far as samples allow.

Fakoor, Chaudhari, Smola 2019, https://arxiv.org/abs/1905.01756. One update collects a rollout
[T, N], takes one step on it, and then a Poisson number of steps on old segments from a replay:

    fresh:     -E[A log pi(a | s)] + vf_coef E[(R - V)^2] - ent_coef H
    replayed:  -E[min(w, c) A log pi(a | s)] + vf_coef E[(R - V)^2]
               + (1 - ESS) E[KL(pi || beta)] / K
    w = pi(a | s) / beta(a | s),   ESS = (sum w)^2 / (M sum w^2),   c = ESS

where beta is the policy that acted, R the lambda-return and A = R - V under the present V, M the
steps of the minibatch, and K the number of discrete actions, or 1. Nothing corrects R for what
beta did later, as published. Deviations from the authors' code: a time limit is bootstrapped, by
the value that the true successor had when it was collected; c stays the ESS where the ESS is 1.

Differences from ppo.py:

1. One full-batch step on each rollout, without a ratio; more steps come from the replay.
2. A segment is T steps with T + 1 observations, as the agent saw them: normalised at the time. The
   value after a truncated step is in its reward.
3. Gradients of actor and critic are clipped together; for images they share a torso.
4. RMSprop as PyTorch has it; its step size ends a little above 0.
5. Advantages are not normalised, exploration noise is drawn every step.
6. Hidden layers start with gain sqrt(2), and observations that are not normalised keep their type.
7. The exported policy holds the critic too.

    python algos/p3o.py --env cartpole --num-seeds 16
    python algos/p3o.py --env breakout --preset a2c --num-seeds 4

Documentation: docs/p3o.md
"""

import math
from dataclasses import dataclass, replace
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

    env: str = "cartpole"  # task, see docs/environments.md
    total_timesteps: int = 500_000  # environment steps per seed, all parallel environments together

    # batch
    num_envs: int = 16  # parallel environments per seed
    num_steps: int = 16  # length of a rollout in each environment, and of a segment

    # optimiser: RMSprop after clipping by the global norm of all parameters
    learning_rate: float = 7e-4  # step size of RMSprop
    anneal_lr: bool = True  # decrease the step size linearly to almost 0 over the run
    max_grad_norm: float = 0.5  # largest global norm of the gradient
    rms_decay: float = 0.99  # decay of the mean square
    rms_eps: float = 1e-5  # added to the root

    # objective
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # decay of the advantage's trace; 1: none
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus on fresh rollouts
    off_policy_entropy: bool = False  # give that bonus to replayed segments too

    # replay
    replay_ratio: float = 2.0  # mean of the Poisson number of steps on replayed segments; 0: A2C
    replay_fraction: float = 0.0286  # rollouts kept, of all rollouts of the run
    warmup_fraction: float = 0.3  # part of the replay that is filled before it is used
    sample_mult: int = 6  # segments of each environment in a replayed minibatch
    max_ratio: float | None = None  # clip ratios to this; None: to the ESS
    kl_coef: float | None = None  # weight of the KL; None: 1 - ESS
    kl_direction: Literal["pi_beta", "beta_pi"] = "pi_beta"  # beta_pi: KL(beta || pi)
    kl_reduction: Literal["mean", "sum"] = "mean"  # over discrete actions; sum: the plain KL

    # observations and rewards
    normalize_obs: bool = False  # standardise observations by running statistics
    normalize_reward: bool = False  # divide rewards by the deviation of the discounted return

    # networks
    torso: Literal["mlp", "minatar", "atari"] = "mlp"  # mlp: one each for the actor and the critic
    hidden: tuple[int, ...] = (64, 64)  # fully connected layers, after the convolutions if any
    activation: Literal["tanh", "relu"] = "tanh"  # activation of all hidden layers
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
        """Rollouts in the replay."""
        return round(self.replay_fraction * self.num_updates)

    @property
    def warmup_slots(self) -> int:
        """Rollouts in the replay when it is first used."""
        return min(self.num_slots, max(2, round(self.warmup_fraction * self.num_slots)))

    def validate(self) -> None:
        """Raise ValueError if the replay is too small, or filled only when the run ends."""
        if not self.replay_ratio:
            return
        run = f"{self.num_updates} rollouts of {self.steps_per_update} steps"
        kept = f"replay_fraction={self.replay_fraction:g} of {run}"
        if self.num_slots < 1:
            raise ValueError(f"{kept} is less than one: raise it or total_timesteps")
        if self.warmup_slots >= self.num_updates:
            raise ValueError(
                f"the replay is first used with {self.warmup_slots} rollouts ({kept}, "
                f"warmup_fraction={self.warmup_fraction:g}), when the run ends: raise "
                "total_timesteps or lower a fraction"
            )
        if self.sample_mult > self.num_slots:
            raise ValueError(
                f"sample_mult={self.sample_mult} segments of an environment, and the replay holds "
                f"{self.num_slots} ({kept}): lower it to {self.num_slots}, or keep more"
            )


# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("learning_rate", "max_grad_norm", "gamma", "gae_lambda", "vf_coef", "ent_coef")

# --- presets ---

# fmt: off
# Origins are in docs/presets.md.
MINATAR = {
    "total_timesteps": 1_000_000, "torso": "minatar", "hidden": (128,), "activation": "relu",
}
PHYSICS = {
    "total_timesteps": 1_000_000, "learning_rate": 3e-4, "ent_coef": 0.0, "normalize_obs": True,
    "normalize_reward": True, "hidden": (256, 256),
}
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "cartpole": {"normalize_reward": True},
    "atari": {
        "total_timesteps": 28_000_000, "torso": "atari", "hidden": (512,), "activation": "relu",
    },
    **dict.fromkeys(("breakout", "asterix", "freeway", "seaquest", "space_invaders"), MINATAR),
    **dict.fromkeys(("ant", "halfcheetah", "hopper", "walker2d", "humanoid"), PHYSICS),
    # ablations, to follow a task
    "a2c": {"replay_ratio": 0.0},
    "fixed_clip": {"max_ratio": 1.0},
    "no_kl": {"kl_coef": 0.0},
}
# fmt: on


# --- networks ---


class Torso(nn.Module):
    """Hidden layers: observation [..., *obs_shape], flat -> features [..., hidden[-1]]."""

    config: Config
    obs_shape: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        activation, torso = getattr(nn, self.config.activation), self.config.torso
        x = obs.astype(jnp.float32)
        if torso != "mlp":
            x = x.reshape((-1, *self.obs_shape)) / (255.0 if torso == "atari" else 1.0)
            layers = [(16, 3, 1)] if torso == "minatar" else [(32, 8, 4), (64, 4, 2), (32, 3, 1)]
            for features, size, stride in layers:
                x = activation(dense(features, math.sqrt(2))(patches(x, size, stride)))
            x = x.reshape((*obs.shape[:-1], -1))
        for size in self.config.hidden:
            x = activation(dense(size, math.sqrt(2))(x))
        return x


class ActorCritic(nn.Module):
    """Observation [..., obs_size] -> Categorical or Gaussian, and its value [...]."""

    config: Config
    obs_shape: tuple[int, ...]
    action_size: int
    discrete: bool

    @nn.compact
    def __call__(self, obs):
        shared = self.config.torso != "mlp"
        x = Torso(self.config, self.obs_shape, name="torso" if shared else "actor_torso")(obs)
        out = dense(self.action_size, 0.01, "actor")(x)
        x = x if shared else Torso(self.config, self.obs_shape, name="critic_torso")(obs)
        value = dense(1, 1.0 if shared else math.sqrt(2), "critic")(x)[..., 0]
        if self.discrete:
            return common.Categorical(out), value
        init = nn.initializers.constant(self.config.log_std_init)
        log_std = self.param("log_std", init, (self.action_size,))
        return common.Gaussian(out, jnp.broadcast_to(log_std, out.shape)), value


def patches(x, size: int, stride: int):
    """Squares [..., h, w, size * size * C] of images [..., H, W, C], for a convolution.

    On the CPU, XLA is far slower at convolutions in a loop than at these and a matrix product.
    """
    for axis in (-2, -3):
        stop = x.shape[axis] - size + 1
        parts = [jax.lax.slice_in_dim(x, i, stop + i, stride, axis) for i in range(size)]
        x = jnp.concatenate(parts, -1)
    return x


def dense(size: int, gain: float, name: str | None = None):
    """Linear layer with orthogonal weights."""
    return nn.Dense(size, kernel_init=nn.initializers.orthogonal(gain), name=name)


# --- data types ---


class Transition(NamedTuple):
    """One step of the rollout; arrays [T, N, ...]."""

    obs: jax.Array  # as the environment gave it
    action: jax.Array  # unclipped
    policy: common.Categorical | common.Gaussian  # beta
    reward: jax.Array
    truncated: jax.Array
    done: jax.Array  # terminated or truncated
    next_obs: jax.Array  # true successor, never a reset observation


class Segments(NamedTuple):
    """T steps of B environments each, as the agent saw them; arrays [B, T, ...]."""

    obs: jax.Array  # [B, T + 1, ...]
    action: jax.Array
    policy: common.Categorical | common.Gaussian  # beta
    reward: jax.Array  # with the discounted value of what follows a truncated step
    done: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict
    opt_state: tuple
    replay: Segments | None  # [S N, ...], S rollouts; None if it is never used
    obs_stats: common.Stats
    reward_scale: common.RewardScale
    obs: jax.Array  # [N, obs_size]
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32


# --- targets and losses ---


def lambda_return(reward, value, done, gamma, lam):
    """Lambda-returns R [B, T], GAE plus V; `reward` and `done` [B, T], `value` [B, T + 1].

    A `done` step is followed by nothing but what its reward says. No gradient passes.
    """
    value = jax.lax.stop_gradient(value)
    going_on = jnp.where(done, 0.0, gamma)

    def backward(target, step):
        reward, going_on, next_value = step
        target = reward + going_on * ((1.0 - lam) * next_value + lam * target)
        return target, target

    steps = reward.T, going_on.T, value[:, 1:].T
    return jax.lax.scan(backward, value[:, -1], steps, reverse=True)[1].T


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
    """What both losses need of T steps: policy, log pi(a | s), V and R, arrays [B, T].

    `policy` and `value` are those of the T + 1 observations.
    """
    target = lambda_return(segments.reward, value, segments.done, config.gamma, config.gae_lambda)
    policy = jax.tree.map(lambda x: x[:, :-1], policy)
    return policy, policy.log_prob(segments.action), value[:, :-1], target


def policy_loss(log_prob, advantage, weight=1.0):
    """Policy gradient loss; neither advantages nor weights have a gradient."""
    return -(jax.lax.stop_gradient(weight * advantage) * log_prob).mean()


def value_loss(value, target):
    """Mean squared error to the lambda-return."""
    return ((value - target) ** 2).mean()


def fresh_loss(policy, value, segments, config):
    """Loss on the segments of the last rollout (A2C), with its diagnostics."""
    policy, log_prob, value, target = estimates(policy, value, segments, config)
    pg_loss, vf_loss = policy_loss(log_prob, target - value), value_loss(value, target)
    entropy = policy.entropy().mean()
    loss = pg_loss + config.vf_coef * vf_loss - config.ent_coef * entropy
    return loss, {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": vf_loss,
        "losses/entropy": entropy,
        "losses/explained_variance": 1.0 - (target - value).var() / (target.var() + 1e-8),
    }


def replay_loss(policy, value, segments, config):
    """Loss on replayed segments (eq. 14 without its first term, and V's), with its diagnostics."""
    policy, log_prob, value, target = estimates(policy, value, segments, config)
    log_weight = log_prob - segments.policy.log_prob(segments.action)
    log_weight = jax.lax.stop_gradient(log_weight)
    weight, ess = jnp.exp(jnp.minimum(log_weight, 20.0)), effective_sample_size(log_weight)
    max_ratio = ess if config.max_ratio is None else config.max_ratio
    kl_coef = 1.0 - ess if config.kl_coef is None else config.kl_coef
    p, q = policy, segments.policy
    if config.kl_direction == "beta_pi":
        p, q = q, p
    kl = kl_divergence(p, q).mean()
    averaged = isinstance(policy, common.Categorical) and config.kl_reduction == "mean"
    penalty = kl / policy.logits.shape[-1] if averaged else kl
    pg_loss = policy_loss(log_prob, target - value, jnp.minimum(weight, max_ratio))
    vf_loss, entropy = value_loss(value, target), policy.entropy().mean()
    loss = pg_loss + config.vf_coef * vf_loss + kl_coef * penalty
    if config.off_policy_entropy:
        loss -= config.ent_coef * entropy
    return loss, {
        "replay/policy_loss": pg_loss,
        "replay/value_loss": vf_loss,
        "replay/entropy": entropy,
        "replay/kl": kl,
        "replay/kl_coef": kl_coef,
        "replay/ess": ess,
        "replay/max_ratio": max_ratio,
        "replay/mean_ratio": weight.mean(),
        "replay/largest_ratio": weight.max(),
        "replay/clip_fraction": (weight > max_ratio).mean(),
    }


def sample_segments(replay, key, filled, num_envs, sample_mult):
    """`sample_mult` segments of each environment, each from one of the `filled` rollouts."""
    column = jnp.arange(sample_mult * num_envs) % num_envs
    slot = jax.random.randint(key, column.shape, 0, filled)
    return jax.tree.map(lambda x: x[slot * num_envs + column], replay)


def replay_counts(config: Config) -> np.ndarray:
    """Steps on replayed segments of each update [num_updates], drawn on the host.

    They are the same for all seeds, so that under `vmap` no seed waits for another.
    """
    counts = np.random.default_rng(0).poisson(config.replay_ratio, config.num_updates)
    counts[: config.warmup_slots - 1] = 0
    return counts


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, config.num_envs)
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    if config.torso != "mlp" and len(env.obs_shape) != 3:
        raise ValueError(
            f"torso={config.torso!r} needs images, and {env.name} observes {env.obs_shape}: "
            "take torso='mlp'"
        )
    if config.torso == "atari" and min(env.obs_shape[:2]) < 36:
        raise ValueError(
            f"torso='atari' needs images of 36 x 36 or more, and {env.name} observes "
            f"{env.obs_shape}: take torso='minatar'"
        )
    network = ActorCritic(config, env.obs_shape, env.action_size, env.discrete)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_rms(config.rms_decay, config.rms_eps, eps_in_sqrt=False),
    )
    T, N, S = config.num_steps, config.num_envs, config.num_slots
    counts = replay_counts(config)

    def init(key) -> TrainState:
        key_params, key_env, key = jax.random.split(key, 3)
        obs, env_state = env.reset(key_env)
        params = network.init(key_params, obs)
        state = TrainState(
            params=params,
            opt_state=optimizer.init(params),
            replay=None,
            obs_stats=common.Stats.empty((env.obs_size,)),
            reward_scale=common.RewardScale.empty(N),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.zeros((), jnp.int32),
        )
        if not config.replay_ratio:
            return state
        fresh = jax.eval_shape(collect, state, key)[1]
        empty = lambda x: jnp.zeros((S * N, *x.shape[1:]), x.dtype)
        return state._replace(replay=jax.tree.map(empty, fresh))

    def normalize(obs_stats, obs):
        return obs_stats.normalize(obs.astype(jnp.float32)) if config.normalize_obs else obs

    def noise_of(key, shape):
        """Exploration noise for `shape` actions."""
        draw = jax.random.gumbel if env.discrete else jax.random.normal
        return draw(key, (*shape, env.action_size))

    def collect(state, key):
        """Act for T steps; returns the new state, N segments, and infos [T, N]."""
        key_noise, key_env, key_refresh = jax.random.split(key, 3)
        env_state = env.refresh(key_refresh, state.env_state)

        def step(carry, x):
            obs, env_state = carry
            noise, key = x
            policy, _ = network.apply(state.params, normalize(state.obs_stats, obs))
            action = policy.sample(noise)
            next_obs, env_state, reward, terminated, truncated, info = env.step(
                key, env_state, action
            )
            done = terminated | truncated
            final_obs = info.pop("final_observation")
            transition = Transition(obs, action, policy, reward, truncated, done, final_obs)
            return (next_obs, env_state), (transition, info)

        xs = noise_of(key_noise, (T, N)), jax.random.split(key_env, T)
        (obs, env_state), (traj, info) = jax.lax.scan(step, (state.obs, env_state), xs)

        reward = traj.reward
        if config.normalize_reward:
            reward = reward * state.reward_scale.factor()
        _, value = network.apply(state.params, normalize(state.obs_stats, traj.next_obs))
        reward += jnp.where(traj.truncated, config.gamma * value, 0.0)
        seen = normalize(state.obs_stats, jnp.concatenate([traj.obs, obs[None]]))
        segments = Segments(seen, traj.action, traj.policy, reward, traj.done)
        segments = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), segments)
        state = state._replace(
            obs_stats=state.obs_stats.add(traj.obs),
            reward_scale=state.reward_scale.add(traj.reward, traj.done, config.gamma),
            obs=obs,
            env_state=env_state,
        )
        return state, segments, info

    def fresh_loss_fn(params, segments):
        return fresh_loss(*network.apply(params, segments.obs), segments, config)

    def replay_loss_fn(params, segments):
        return replay_loss(*network.apply(params, segments.obs), segments, config)

    def descend(loss_fn, params, opt_state, segments, learning_rate):
        """One step of the optimiser: params, opt_state, metrics and norm of the gradient."""
        grads, aux = jax.grad(loss_fn, has_aux=True)(params, segments)
        direction, opt_state = optimizer.update(grads, opt_state)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, params, direction)
        return params, opt_state, aux, optax.global_norm(grads)

    def replay_steps(state, learning_rate, key):
        """The update's steps on replayed segments: params, opt_state, sums of metrics."""
        filled = jnp.minimum(state.update + 1, S)

        def step(i, carry):
            params, opt_state, sums = carry
            key_i = jax.random.fold_in(key, i)
            segments = sample_segments(state.replay, key_i, filled, N, config.sample_mult)
            params, opt_state, aux, grad_norm = descend(
                replay_loss_fn, params, opt_state, segments, learning_rate
            )
            aux["replay/grad_norm"] = grad_norm
            return params, opt_state, jax.tree.map(jnp.add, sums, aux)

        aux = jax.eval_shape(replay_loss_fn, state.params, state.replay)[1]
        sums = {name: jnp.zeros(()) for name in (*aux, "replay/grad_norm")}
        count = jnp.asarray(counts)[state.update]
        carry = state.params, state.opt_state, sums
        params, opt_state, sums = jax.lax.fori_loop(0, count, step, carry)
        counted = {"replay/count": count, "charts/replay_steps": count}
        return params, opt_state, sums | counted | {"charts/replay_filled": filled}

    def update(state):
        key, key_collect, key_replay = jax.random.split(state.key, 3)
        remaining = 1.0 - (state.update + 1) / (config.num_updates + 1)
        learning_rate = config.learning_rate * (remaining if config.anneal_lr else 1.0)

        state, segments, info = collect(state, key_collect)
        params, opt_state, metrics, grad_norm = descend(
            fresh_loss_fn, state.params, state.opt_state, segments, learning_rate
        )
        metrics["losses/grad_norm"] = grad_norm
        state = state._replace(params=params, opt_state=opt_state)
        if config.replay_ratio:
            row = (state.update % S) * N
            write = lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new, row, 0)
            state = state._replace(replay=jax.tree.map(write, state.replay, segments))
            params, opt_state, sums = replay_steps(state, learning_rate, key_replay)
            state, metrics = state._replace(params=params, opt_state=opt_state), metrics | sums

        metrics |= common.run_metrics(info, (params, metrics["losses/value_loss"]))
        metrics["charts/learning_rate"] = jnp.asarray(learning_rate)
        return state._replace(key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        obs = normalize(policy["obs_stats"], obs)
        distribution, _ = network.apply(policy["network"], obs)
        if greedy:
            return distribution.mode()
        return distribution.sample(noise_of(key, obs.shape[:-1]))

    def policy_of(state):
        return {"network": state.params, "obs_stats": state.obs_stats}

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
    launch.main("p3o", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

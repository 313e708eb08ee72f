"""REPPO for discrete actions: every expectation over actions is a sum.

Voelcker et al. 2025, https://arxiv.org/abs/2507.11019. One update collects a rollout [T, N] with
the current policy, pi_old, and takes several epochs of minibatch gradient steps. The critic Q
learns soft TD(lambda) targets G from this rollout alone. Where KL(pi_old || pi) is below a bound,
the policy ascends the expectation of Q over its own actions; elsewhere it returns towards pi_old:

    G_t    = r_t + (1 - terminated_t) (b_t + gamma ((1 - c_t) V'_t + c_t G_{t+1}))
    V'_t   = sum_a pi(a | s'_t) Q(s'_t, a),  b_t = gamma alpha H(pi(. | s'_t))
    c_t    = 0 if truncated_t or t = T - 1, else lambda
    KL(s)  = KL(pi_old(. | s) || pi(. | s))
    critic = cross-entropy of the histogram of Q(s_t, a_t) to that of G_t             (HL-Gauss)
    actor  = E[L(s) if KL(s) < bound else beta KL(s)]
    L(s)   = sum_a pi(a | s) (alpha log pi(a | s) - Q(s, a))
    duals  = alpha (E[H(pi)] - m log A) + beta (bound - E[KL(s)])

The duals loss trains the multipliers alpha and beta alone, which are constants in the actor's loss:
alpha keeps the mean entropy above m log A (A: number of actions), beta the mean KL below the bound.
G and pi_old are constants too. s'_t is the true successor of s_t, taken before any reset. A time
limit (truncated) therefore bootstraps from V'_t, a terminal state (terminated) does not; both end
the trace.

Differences from reppo.py, which is the published algorithm:

1. Values, entropies and the KL are exact. Only the actions of the rollout are samples.
2. The critic takes the observation alone and has a histogram for each action. Only the histogram of
   the action taken is trained. The action is an input of the auxiliary prediction instead.
3. The target of the mean entropy is `target_entropy_mult` times log(number of actions).
4. The variants (`kl_mode`, `critic_loss`, `norm` and others) are left out, and so are privileged
   observations.

    python algos/reppo_discrete.py --env cartpole --num-seeds 16
    python algos/reppo_discrete.py --env breakout --num-seeds 4

Documentation: docs/reppo_discrete.md
"""

import math
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if __name__ == "__main__":  # the checkout, not algos/, comes first on the import path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends the imports at once

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge
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
    num_envs: PositiveInt = 64  # parallel environments per seed
    num_steps: PositiveInt = 32  # length of a rollout in each environment
    num_epochs: PositiveInt = 4  # epochs per rollout
    num_minibatches: PositiveInt = 8  # gradient steps per epoch

    # optimiser: Adam, after clipping by global norm
    learning_rate: NonNegativeFloat = 3e-4  # learning rate of every network
    anneal_lr: bool = False  # decrease the learning rate linearly to 0 over the run
    max_grad_norm: PositiveFloat = 0.5  # largest global norm of one network's gradient
    dual_lr_mult: NonNegativeFloat = 1.0  # factor on the learning rate of the two multipliers

    # objective
    gamma: UnitFloat = 0.99  # discount
    td_lambda: UnitFloat = 0.95  # lambda of TD(lambda)
    kl_bound: NonNegativeFloat = 0.1  # bound on the KL of a state and on its mean, in nats
    kl_coef_init: PositiveFloat = 0.01  # initial multiplier of the KL (beta)
    temperature_init: PositiveFloat = 0.01  # initial multiplier of the entropy (alpha)
    target_entropy_mult: float = 0.5  # the entropy's target is this times log(number of actions)

    # critic
    num_bins: Annotated[int, Ge(2)] = 151  # bins of a histogram
    vmin: float = 0.0  # centre of the first bin; targets below are clipped to it
    vmax: float = 150.0  # centre of the last bin; targets above are clipped to it
    aux_loss_mult: NonNegativeFloat = 1.0  # weight of the auxiliary loss (reward, next features)

    # observations and rewards
    normalize_obs: bool = True  # standardise observations by running statistics
    reward_scale: PositiveFloat = 1.0  # factor on rewards; logged returns are not scaled
    # smallest and largest reward of a step, not scaled, to check vmin and vmax; 0, 0: unknown
    reward_range: tuple[float, float] = (0.0, 0.0)

    # networks
    hidden: tuple[PositiveInt, ...] = (128, 128)  # hidden layers of the actor
    critic_width: PositiveInt = 128  # width of the critic's hidden layers and features

    @property
    def steps_per_update(self) -> int:
        """Environment steps in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    def validate(self) -> None:
        """Raise ValueError for sizes that do not fit; warn if values may leave the support."""
        size = self.steps_per_update
        if size % self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} does not divide the {size} transitions "
                f"of a rollout (num_envs={self.num_envs}, num_steps={self.num_steps}): "
                "change one of them"
            )
        if self.vmin >= self.vmax:
            raise ValueError(f"vmin={self.vmin:g}: it must be below vmax={self.vmax:g}")
        if self.reward_range[0] > self.reward_range[1]:
            raise ValueError(f"reward_range={self.reward_range}: the lower end comes first")
        low, high = (self.reward_scale * x / max(1.0 - self.gamma, 1e-8) for x in self.reward_range)
        low, high = min(low, 0.0), max(high, 0.0)  # an episode may end at any step
        if any(self.reward_range) and (low < self.vmin or high > self.vmax):
            warnings.warn(
                f"values can be {low:g} to {high:g} given reward_range, reward_scale and gamma, "
                f"but the critic clips them to vmin={self.vmin:g}, vmax={self.vmax:g}",
                stacklevel=2,
            )


# --- networks ---


class Prediction(NamedTuple):
    """What the critic returns; `predicted` is None if the critic gets no action."""

    value: jax.Array  # [..., A], Q
    logits: jax.Array  # [..., A, num_bins] of the histograms
    features: jax.Array  # [..., critic_width], output of the encoder
    predicted: jax.Array | None  # [..., 1 + critic_width], reward and next features


class Block(nn.Module):
    """Hidden layer: linear, normalisation, swish."""

    size: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.size)(x)
        x = nn.RMSNorm(epsilon=1e-6)(x)
        return nn.swish(x)


class Actor(nn.Module):
    """Policy network: observation [..., obs_size] -> Categorical."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs):
        x = obs
        for size in self.config.hidden:
            x = Block(size)(x)
        return common.Categorical(nn.Dense(self.action_size)(x))


class Critic(nn.Module):
    """Q of every action: observation [..., obs_size], action [...] or None -> Prediction."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs, action=None):
        config, width, A = self.config, self.config.critic_width, self.action_size
        features = nn.Dense(width)(Block(width)(obs))
        x = nn.swish(features)
        support = config.vmin, config.vmax, config.num_bins
        # Q starts at 0: a trained vector, initially the histogram of 0, dominates the logits.
        zero = self.param("zero_code", lambda _: hl_gauss(jnp.zeros(A), *support))
        logits = nn.Dense(A * config.num_bins)(Block(width)(x))
        logits = logits.reshape((*obs.shape[:-1], A, config.num_bins)) + 40.0 * zero
        value = (jax.nn.softmax(logits) * jnp.linspace(*support)).sum(-1)
        predicted = None
        if action is not None:
            x = jnp.concatenate([x, jax.nn.one_hot(action, A)], -1)
            predicted = nn.Dense(1 + width)(Block(width)(x))
        return Prediction(value, logits, features, predicted)


# --- data types ---


class Transition(NamedTuple):
    """One step of the rollout; arrays [T, N, ...]."""

    obs: jax.Array  # normalised
    action: jax.Array  # as the environment got it
    policy: common.Categorical  # pi_old
    reward: jax.Array  # scaled
    terminated: jax.Array
    truncated: jax.Array
    valid: jax.Array  # the physics was finite
    next_obs: jax.Array  # normalised; true successor, never a reset observation


class Batch(NamedTuple):
    """What the losses need of a transition; arrays [T N, ...]."""

    step: Transition
    target: jax.Array
    next_features: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # keys "actor" ("net"; "duals": logs of the multipliers) and "critic"
    opt_state: dict  # the same keys
    obs_stats: common.Stats
    obs: jax.Array  # [N, obs_size], as the environment gave it
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32, finished updates


# --- targets and losses ---


def soft_td_lambda(reward, bonus, next_value, terminated, truncated, gamma, lam):
    """Soft TD(lambda) targets [T, N]; arrays [T, N].

    `bonus` is the discounted entropy bonus of the next state, and `next_value` its value. A
    terminated step gets neither. A truncated step bootstraps from `next_value` alone, and so does
    the last step, because the scan starts from it; other steps mix it with the next target.
    """
    soft_reward = reward + jnp.where(terminated, 0.0, bonus)

    def backward(target, step):
        soft_reward, next_value, terminated, truncated = step
        decay = jnp.where(truncated, 0.0, lam)
        future = decay * target + (1.0 - decay) * next_value
        target = soft_reward + gamma * jnp.where(terminated, 0.0, future)
        return target, target

    steps = soft_reward, next_value, terminated, truncated
    return jax.lax.scan(backward, next_value[-1], steps, reverse=True)[1]


def hl_gauss(value, vmin, vmax, num_bins):
    """Histogram [..., num_bins] of a Gaussian around `value` whose std is 0.75 bins (HL-Gauss)."""
    width = (vmax - vmin) / (num_bins - 1)
    edges = vmin + width * (jnp.arange(num_bins + 1) - 0.5)
    value = jnp.clip(value, vmin, vmax)[..., None]
    cdf = jax.lax.erf((edges - value) / (0.75 * width * math.sqrt(2)))  # 2 cdf - 1
    # float32's erf is not monotone: it drops by up to 5e-7 in places
    return jnp.maximum(jnp.diff(cdf), 0.0) / (cdf[..., -1:] - cdf[..., :1])


def critic_loss(prediction, target, vmin, vmax):
    """Loss [...] of Q: cross-entropy of its histogram."""
    histogram = hl_gauss(target, vmin, vmax, prediction.logits.shape[-1])
    return -(histogram * jax.nn.log_softmax(prediction.logits)).sum(-1)


def aux_loss(predicted, batch):
    """Mean squared error [B] of the predicted reward and next features; 0 if terminated."""
    target = jnp.append(batch.step.reward[:, None], batch.next_features, 1)
    return jnp.where(batch.step.terminated, 0.0, ((predicted - target) ** 2).mean(1))


def kl_divergence(p, q):
    """KL(p || q) [...] of two Categoricals."""
    log_p, log_q = jax.nn.log_softmax(p.logits), jax.nn.log_softmax(q.logits)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def policy_loss(sac_loss, kl, kl_coef, kl_bound):
    """Loss [...] of each state, and whether the state is gated: its KL is not below the bound.

    `sac_loss` is the loss of SAC's actor, E[temperature log pi - Q].
    """
    gated = ~(kl < kl_bound)  # true for a KL of NaN
    kl_loss = jax.lax.stop_gradient(kl_coef) * kl
    return jnp.where(gated, kl_loss, sac_loss), gated


def dual_loss(temperature, kl_coef, surplus, slack):
    """Loss of the multipliers: each one falls while its constraint holds, and rises otherwise.

    The temperature (alpha) follows `surplus`, the mean entropy minus its target; kl_coef (beta)
    follows `slack`, the KL bound minus the mean KL. The policy gets no gradient.
    """
    surplus, slack = jax.lax.stop_gradient((surplus, slack))
    return temperature * surplus + kl_coef * slack


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environments that a run learns in."""
    env = envs.make(config.env, config.num_envs)
    if not env.discrete:
        raise ValueError(f"{env.name} has continuous actions: run it with algos/reppo.py")
    if len(env.obs_shape) == 3 and min(env.obs_shape[:2]) >= 36:  # the networks are for MinAtar
        raise ValueError(f"{env.name} has large images: run it with algos/p3o.py")
    return env


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose environments, networks and optimiser into the pure functions of a run."""
    actor = Actor(config, env.action_size)
    critic = Critic(config, env.action_size)
    optimizer = optax.chain(  # no learning rate: see descend
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    )
    T, N = config.num_steps, config.num_envs
    target_entropy = config.target_entropy_mult * math.log(env.action_size)

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        multipliers = {"temperature": config.temperature_init, "kl_coef": config.kl_coef_init}
        duals = {name: jnp.log(jnp.float32(x)) for name, x in multipliers.items()}
        action = jnp.zeros(1, jnp.int32)
        params = {
            "actor": {"net": actor.init(key_actor, obs[:1]), "duals": duals},
            "critic": critic.init(key_critic, obs[:1], action),
        }
        return TrainState(
            params=params,
            opt_state={name: optimizer.init(params[name]) for name in params},
            obs_stats=common.Stats.empty((env.obs_size,)).add(obs),
            obs=obs,
            env_state=env_state,
            key=key,
            update=jnp.int32(0),
        )

    def normalize(obs_stats, obs):
        obs = obs.astype(jnp.float32)
        mean, var = obs_stats.mean, obs_stats.var
        return (obs - mean) / jnp.sqrt(var + 1e-2) if config.normalize_obs else obs

    def noise_of(key, shape):
        """Noise [*shape, action_size] for sampling actions of batch shape `shape`."""
        return jax.random.gumbel(key, (*shape, env.action_size))

    def rollout(state, key):
        """Act for T steps; returns the state, transitions [T, N] and infos [T, N]."""
        key_noise, key_env, key_refresh = jax.random.split(key, 3)
        env_state = env.refresh(key_refresh, state.env_state)  # redraws cached start states

        def step(carry, x):
            obs, obs_stats, env_state = carry
            noise, key = x
            inputs = normalize(obs_stats, obs)
            policy = actor.apply(state.params["actor"]["net"], inputs)
            action = policy.sample(noise)
            next_obs, env_state, reward, terminated, truncated, info = env.step(
                key, env_state, action
            )
            obs_stats = obs_stats.add(next_obs)
            transition = Transition(
                obs=inputs,
                action=action,
                policy=policy,
                reward=config.reward_scale * reward,
                terminated=terminated,
                truncated=truncated,
                valid=~info["env_nan"],
                next_obs=normalize(obs_stats, info.pop("final_observation")),
            )
            return (next_obs, obs_stats, env_state), (transition, info)

        carry = state.obs, state.obs_stats, env_state
        xs = noise_of(key_noise, (T, N)), jax.random.split(key_env, T)
        (obs, obs_stats, env_state), (traj, info) = jax.lax.scan(step, carry, xs)
        return state._replace(obs=obs, obs_stats=obs_stats, env_state=env_state), traj, info

    def value_of(state, policy, obs):
        """Value and entropy of the policy, and the critic's features."""
        prediction = critic.apply(state.params["critic"], obs)
        value = (jax.nn.softmax(policy.logits) * prediction.value).sum(-1)
        return value, policy.entropy(), prediction.features

    def targets(state, traj) -> Batch:
        """Soft TD(lambda) targets of a rollout, and features of its next states."""
        policy = actor.apply(state.params["actor"]["net"], traj.next_obs)
        next_value, entropy, features = value_of(state, policy, traj.next_obs)
        temperature = jnp.exp(state.params["actor"]["duals"]["temperature"])
        bonus = config.gamma * temperature * entropy
        # A step of broken physics has no target, so the trace ends at the step before it.
        before_broken = jnp.append(~traj.valid[1:], jnp.zeros((1, N), bool), 0)
        step = traj.reward, bonus, next_value, traj.terminated, traj.truncated | before_broken
        target = soft_td_lambda(*step, config.gamma, config.td_lambda)
        batch = Batch(traj, target, features)
        return jax.tree.map(lambda x: x.reshape((T * N, *x.shape[2:])), batch)

    def remaining(state):
        """Share of the run that is left, for schedules: 1 in the first update."""
        return jnp.maximum(1.0 - state.update / config.num_updates, 0.0)

    def critic_loss_fn(params, state, batch):
        step = batch.step
        prediction = critic.apply(params, step.obs, step.action)
        at = jnp.arange(len(step.action)), step.action  # only the action taken has a target
        prediction = prediction._replace(value=prediction.value[at], logits=prediction.logits[at])
        error = critic_loss(prediction, batch.target, config.vmin, config.vmax)
        aux_error = aux_loss(prediction.predicted, batch) if config.aux_loss_mult else 0.0
        mean = lambda x: jnp.where(step.valid, x, 0.0).mean()
        loss = mean(error + config.aux_loss_mult * aux_error)
        return loss, {
            "losses/qf_loss": loss,
            "losses/aux_loss": mean(aux_error),
            "losses/value_error": mean((prediction.value - batch.target) ** 2),
            "losses/q_data": prediction.value.mean(),
        }

    def policy_loss_fn(params, state, batch):
        step = batch.step
        policy = actor.apply(params["net"], step.obs)
        value, entropy, _ = value_of(state, policy, step.obs)
        kl = kl_divergence(step.policy, policy)
        duals = jax.tree.map(jnp.exp, params["duals"])
        sac_loss = -jax.lax.stop_gradient(duals["temperature"]) * entropy - value
        losses, gated = policy_loss(sac_loss, kl, duals["kl_coef"], config.kl_bound)
        mean = lambda x: jnp.where(step.valid, x, 0.0).mean()
        surplus, slack = mean(entropy - target_entropy), mean(config.kl_bound - kl)
        loss = mean(losses) + dual_loss(**duals, surplus=surplus, slack=slack)
        return loss, {
            "losses/policy_loss": mean(losses),
            "losses/entropy": mean(entropy),
            "losses/kl": mean(kl),
            "losses/gated_fraction": mean(gated),
        }

    def learning_rate(state):
        return config.learning_rate * (remaining(state) if config.anneal_lr else 1.0)

    def descend(state, grads):
        """One step of the optimiser on each network in `grads` whose gradient is finite."""
        params, opt_state = dict(state.params), dict(state.opt_state)
        rate = learning_rate(state)
        for name, grad in grads.items():
            direction, new_opt_state = optimizer.update(grad, opt_state[name], params[name])
            if name == "actor":
                duals = jax.tree.map(lambda u: config.dual_lr_mult * u, direction["duals"])
                direction = direction | {"duals": duals}
            new_params = jax.tree.map(lambda p, u: p - rate * u, params[name], direction)
            new, old = (new_params, new_opt_state), (params[name], opt_state[name])
            finite = common.all_finite(grad)
            params[name], opt_state[name] = optax.tree.where(finite, new, old)
        return state._replace(params=params, opt_state=opt_state)

    def gradient_step(state, batch):
        """One step of the critic, then one of the actor with the updated critic held fixed."""
        critic_grads, critic_aux = jax.grad(critic_loss_fn, has_aux=True)(
            state.params["critic"], state, batch
        )
        state = descend(state, {"critic": critic_grads})
        actor_grads, actor_aux = jax.grad(policy_loss_fn, has_aux=True)(
            state.params["actor"], state, batch
        )
        state = descend(state, {"actor": actor_grads})
        return state, critic_aux | actor_aux | {
            "losses/critic_grad_norm": optax.global_norm(critic_grads),
            "losses/actor_grad_norm": optax.global_norm(actor_grads),
            "health/skipped_steps": ~common.all_finite((critic_grads, actor_grads)),
        }

    def epoch(state, batch, key):
        """Gradient steps on all of the batch, in shuffled minibatches."""
        index = jax.random.permutation(key, len(batch.target)).reshape(config.num_minibatches, -1)
        step = lambda state, i: gradient_step(state, jax.tree.map(lambda x: x[i], batch))
        return jax.lax.scan(step, state, index)

    def update(state):
        key, key_rollout, key_epochs = jax.random.split(state.key, 3)
        state, traj, info = rollout(state, key_rollout)
        batch = targets(state, traj)
        keys = jax.random.split(key_epochs, config.num_epochs)
        state, aux = jax.lax.scan(lambda state, key: epoch(state, batch, key), state, keys)

        # Means over the steps not skipped. If all are skipped, they are NaN: the seed has failed.
        skipped = aux.pop("health/skipped_steps")
        metrics = {name: x.mean(where=~skipped) for name, x in aux.items()}
        metrics |= common.run_metrics(info, (state.params, metrics["losses/qf_loss"]))
        metrics["health/skipped_steps"] = skipped.sum()
        duals = jax.tree.map(jnp.exp, state.params["actor"]["duals"])
        metrics |= {f"losses/{name}": x for name, x in duals.items()}
        unexplained = metrics["losses/value_error"] / (batch.target.var() + 1e-8)
        metrics["losses/explained_variance"] = 1.0 - unexplained
        clipped = (batch.target < config.vmin) | (batch.target > config.vmax)
        metrics["health/target_clip_fraction"] = clipped.mean()
        metrics["charts/learning_rate"] = jnp.asarray(learning_rate(state))
        return state._replace(key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], normalize(policy["obs_stats"], obs))
        if greedy:
            return distribution.mode()
        return distribution.sample(noise_of(key, obs.shape[:-1]))

    def policy_of(state):
        return {"actor": state.params["actor"]["net"], "obs_stats": state.obs_stats}

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
    "learning_rate", "max_grad_norm", "dual_lr_mult", "gamma", "td_lambda", "kl_bound",
    "kl_coef_init", "temperature_init", "target_entropy_mult", "reward_scale",
)  # fmt: skip

# --- presets ---

# fmt: off
# Values that replace the defaults; docs/presets.md has their origins.
MINATAR = {
    "total_timesteps": 5_000_000, "num_envs": 128, "vmin": -1.0, "vmax": 50.0,
    "normalize_obs": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "cartpole": {"num_epochs": 8, "dual_lr_mult": 3.0, "vmax": 105.0, "reward_range": (0.0, 1.0)},
    **dict.fromkeys(("breakout", "asterix", "freeway", "space_invaders"), MINATAR),
}
# fmt: on


if __name__ == "__main__":
    launch.main("reppo_discrete")

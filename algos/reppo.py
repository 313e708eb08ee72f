"""Relative entropy pathwise policy optimisation (REPPO): climb a Q that only knows the rollout.

Voelcker et al. 2025, https://arxiv.org/abs/2507.11019. One update collects a rollout [T, N] with
pi_old and fits Q(s, a) to soft TD(lambda) targets G of that rollout alone. The policy maximises
E[Q(s, a) + alpha H], a ~ pi, through the action, subject to E[KL(pi_old || pi)] <= bound,
by a loss that climbs in states whose KL is below the bound and pulls back in the others:

    KL(s) <  bound:  alpha log pi(a | s) - Q(s, a)
    KL(s) >= bound:  beta KL(s)
    G_t = r_t + (1 - terminated_t) (b_t + gamma ((1 - c_t) V'_t + c_t G_{t+1})),  V'_t = Q(s'_t, a')
    b_t = -gamma alpha log pi(a' | s'_t),  a' ~ pi,  c_t = lambda w_{t+1}, or 0 at an end

where w is 1 without scaled exploration, an end is that of an episode or of the rollout, and the
multipliers alpha and beta follow mean entropy and mean KL. Actions are continuous.
Deviations from the authors' code: targets of the true successors, no entropy bonus where an episode
terminates, and independent noise for every draw.

Differences from ppo.py:

1. The gradient goes through Q and the action; there is no ratio and no advantage.
2. Q is categorical: cross-entropy to a histogram of each target (HL-Gauss). It also predicts the
   reward and its own next features. It may see privileged observations; the actor sees none.
3. Actions are squashed by tanh, and stored as the environment gets them: clipped to +-0.999.
4. Observations are normalised when they arrive, by statistics that include them.
5. A gradient that is not finite is skipped and counted; a step of broken physics teaches nothing.

    python algos/reppo.py --env pendulum --num-seeds 16
    python algos/reppo.py --env CheetahRun --preset dmc_small --num-seeds 4

Documentation: docs/reppo.md
"""

import math
import warnings
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

    env: str = "pendulum"  # task, see docs/environments.md
    total_timesteps: int = 50_000_000  # environment steps per seed, all environments together

    # batch
    num_envs: int = 1024  # parallel environments per seed
    num_steps: int = 128  # length of a rollout in each environment
    num_epochs: int = 4  # passes over a rollout
    num_minibatches: int = 128  # gradient steps of the critic and of the actor per pass

    # optimiser: Adam after clipping by global norm, for the actor and the critic alike
    learning_rate: float = 3e-4  # step size of Adam
    anneal_lr: bool = False  # decrease the step size linearly to 0 over the run
    max_grad_norm: float = 0.5  # largest global norm of one gradient; the actor's has the duals
    dual_lr_mult: float = 1.0  # factor on the step size of the two multipliers

    # targets and critic loss
    gamma: float = 0.99  # discount
    td_lambda: float = 0.95  # decay of the target's trace
    target_mode: Literal["aligned", "shifted"] = "aligned"  # shifted: the true successor is unknown
    value_samples: int = 1  # actions that the value of a successor is averaged over
    critic_loss: Literal["hl_gauss", "mse"] = "hl_gauss"  # mse: a plain scalar critic
    num_bins: int = 151  # bins of the categorical critic
    vmin: float = 0.0  # centre of the first bin, at most the smallest value
    vmax: float = 150.0  # centre of the last bin, at least the largest value
    aux_loss_mult: float = 1.0  # weight of predicting reward and next features; 0: no prediction

    # actor loss
    # clipped: climb or pull back, by the state's KL; full: both everywhere; value: climb everywhere
    kl_mode: Literal["clipped", "full", "value"] = "clipped"
    kl_bound: float = 0.1  # largest KL of a state, in nats summed over action dimensions
    # log-densities at clipped samples as published, at the samples themselves, or in closed form
    kl_estimator: Literal["sampled", "unclipped", "exact"] = "sampled"
    kl_samples: int = 16  # samples of an estimate
    reverse_kl: bool = False  # bound KL(pi || pi_old) instead of KL(pi_old || pi)
    kl_coef_init: float = 0.01  # initial multiplier of the KL (beta)
    tune_kl_coef: bool = True  # let it follow the mean KL
    temperature_init: float = 0.01  # initial multiplier of the entropy (alpha)
    tune_temperature: bool = True  # let it follow the mean entropy
    target_entropy_mult: float = 0.5  # smallest mean entropy is minus this for each action

    # observations and rewards
    normalize_obs: bool = True  # standardise observations by running statistics
    obs_eps: float = 1e-2  # added to the variances
    reward_scale: float = 1.0  # factor on the rewards, not on the logged returns
    reward_range: tuple[float, float] = (0.0, 0.0)  # of a raw reward if known, to check vmin, vmax

    # exploration: environments act with the policy's deviation times a factor
    noise_min: float = 1.0  # factor in the first environment
    noise_max: float = 1.0  # factor that the others rise to, which none has
    trace_min: float = 0.5  # smallest weight of an action on the trace that other noise drew

    # networks
    hidden: tuple[int, ...] = (512, 512)  # hidden layers of the actor
    critic_width: int = 512  # features, and units of every hidden layer of the critic
    encoder_layers: int = 2  # layers of the critic up to the features
    encoder_output: Literal["linear", "block"] = "linear"  # last of these layers
    norm: Literal["rms", "layer", "none"] = "rms"  # normalisation in every hidden layer
    zero_init: bool = True  # a categorical critic starts at 0, not in the middle of its support
    min_std: float = 0.1  # added to the policy's standard deviation before tanh

    @property
    def steps_per_update(self) -> int:
        """Environment steps in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    def validate(self) -> None:
        """Raise ValueError for impossible sizes; warn if the support is too small for the task."""
        size, support = self.steps_per_update, f"vmin={self.vmin:g} to vmax={self.vmax:g}"
        if size % self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} does not divide the {size} transitions of "
                f"a rollout (num_envs={self.num_envs}, num_steps={self.num_steps}): change one"
            )
        if self.num_bins < 2 or self.vmin >= self.vmax:
            raise ValueError(f"num_bins={self.num_bins}, {support}: 2 bins and a range are needed")
        if self.critic_loss == "mse" or isinstance(self.gamma * self.reward_scale, jax.Array):
            return  # a swept value is no number yet
        horizon = 1.0 / max(1.0 - self.gamma, 1e-8)
        low, high = (self.reward_scale * horizon * x for x in self.reward_range)
        if min(low, 0.0) < self.vmin or max(high, 0.0) > self.vmax:
            warnings.warn(
                f"values can be {low:g} to {high:g} (reward_range={self.reward_range}, "
                f"reward_scale={self.reward_scale:g}, gamma={self.gamma:g}): {support} clips them",
                stacklevel=2,
            )


# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("learning_rate", "max_grad_norm", "dual_lr_mult", "gamma", "td_lambda", "kl_bound")
TRACEABLE += ("kl_coef_init", "temperature_init", "target_entropy_mult", "reward_scale")

# --- presets ---

# fmt: off
# Origins are in docs/presets.md. What follows is published, but for the tasks sized for a CPU.
RECIPE = {  # everything a task's own preset may have changed, rewards and support aside
    "total_timesteps": 50_000_000, "num_envs": 1024, "num_steps": 128, "num_epochs": 4,
    "num_minibatches": 128, "hidden": (512, 512), "critic_width": 512, "dual_lr_mult": 1.0,
    "learning_rate": 3e-4, "anneal_lr": False, "kl_bound": 0.1, "target_entropy_mult": 0.5,
    "critic_loss": "hl_gauss",
}
UNIT = {"vmin": 0.0, "vmax": 150.0, "reward_scale": 1.0, "reward_range": (0.0, 1.0), "gamma": 0.99}
DMC = {**RECIPE, **UNIT, "num_epochs": 8}
JOYSTICK = {"vmin": -10.0, "vmax": 10.0, "reward_range": (0.0, 0.0), "gamma": 0.97}
HUMANOID = {**DMC, **JOYSTICK, "critic_width": 1024}
BRAX = {**UNIT, "reward_scale": 0.1, "reward_range": (0.0, 0.0)}
HUMANOID_BRAX = {**BRAX, "vmax": 200.0}
CPU = {
    "total_timesteps": 500_000, "num_envs": 32, "num_steps": 32, "num_epochs": 8,
    "num_minibatches": 16, "hidden": (128, 128), "critic_width": 128, "dual_lr_mult": 3.0,
    "learning_rate": 1e-3, "anneal_lr": True, "kl_bound": 0.2, "target_entropy_mult": 0.0,
}
CPU_DMC = {**CPU, **UNIT, "total_timesteps": 1_000_000}
MANY_GOALS = {  # an episode has one goal: more environments, and smaller steps of the policy
    **CPU_DMC, "num_envs": 512, "num_steps": 16, "num_minibatches": 32, "kl_bound": 0.1,
    "target_entropy_mult": 0.5, "critic_loss": "mse",
}
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "pendulum": {
        **CPU, "reward_scale": 0.1, "reward_range": (-16.28, 0.0), "vmin": -168.0, "vmax": 12.0,
    },
    "inverted_pendulum": {**CPU, **UNIT}, "ReacherEasy": MANY_GOALS,
    "CartpoleBalance": CPU_DMC, "CartpoleSwingup": CPU_DMC, "CheetahRun": CPU_DMC,
    # rewards and support of Brax's tasks
    "ant": BRAX, "halfcheetah": BRAX, "hopper": BRAX, "walker2d": BRAX, "humanoid": HUMANOID_BRAX,
    "brax": BRAX, "humanoid_brax": HUMANOID_BRAX,
    # published sizes; those of DMC and of the robots on a joystick have a support as well
    "default": RECIPE,
    "dmc_large": {**DMC, "num_minibatches": 64},
    "dmc_medium": {**DMC, "num_steps": 64, "num_minibatches": 32},
    "dmc_small": {**DMC, "num_steps": 32, "num_minibatches": 16},
    "tiny": {**RECIPE, "num_envs": 128, "num_steps": 32, "num_minibatches": 8},
    "really_tiny": {
        **RECIPE, "num_envs": 128, "num_steps": 8, "num_minibatches": 4, "num_epochs": 2,
    },
    "humanoid_large": {**HUMANOID, "num_minibatches": 16},
    "humanoid_small": {**HUMANOID, "num_steps": 32, "num_minibatches": 4},
    # the later variant in one file, to follow one of these
    "single_file": {
        **RECIPE, "total_timesteps": 32_768_000, "num_steps": 32, "num_minibatches": 32,
        "value_samples": 64, "aux_loss_mult": 0.0, "kl_samples": 4, "temperature_init": 0.001,
        "obs_eps": 1e-8, "min_std": 1e-6, "hidden": (512, 512, 512), "encoder_layers": 3,
        "encoder_output": "block", "norm": "layer",
    },
}
# fmt: on


# --- networks ---

MAX_ACTION = 0.999  # actions are clipped to this before the environment and the critic see them
MAX_SAMPLE = math.atanh(1.0 - 1e-4)  # where the published estimate of the KL clips its samples
linear = partial(nn.Dense, kernel_init=nn.initializers.lecun_normal())


class Prediction(NamedTuple):
    """What the critic says of observations and actions; None: not asked for."""

    value: jax.Array  # [...], Q
    logits: jax.Array | None  # [..., num_bins]
    features: jax.Array  # [..., critic_width]
    predicted: jax.Array | None  # [..., 1 + critic_width], reward and next features


class Block(nn.Module):
    """Hidden layer: linear, normalised, swish."""

    config: Config
    size: int

    @nn.compact
    def __call__(self, x):
        x = linear(self.size)(x)
        if self.config.norm == "rms":
            x = nn.RMSNorm(epsilon=1e-6)(x)
        elif self.config.norm == "layer":
            x = nn.LayerNorm(epsilon=1e-6)(x)
        return nn.swish(x)


class Actor(nn.Module):
    """Policy network: the first `obs_size` entries of an observation -> common.TanhGaussian."""

    config: Config
    obs_size: int  # without what only the critic may see
    action_size: int

    @nn.compact
    def __call__(self, obs):
        x = obs[..., : self.obs_size]
        for size in self.config.hidden:
            x = Block(self.config, size)(x)
        mean, log_std = jnp.split(linear(2 * self.action_size)(x), 2, -1)
        return common.TanhGaussian(mean, jnp.exp(log_std) + self.config.min_std)


class Critic(nn.Module):
    """Q: observation [..., obs_size], action [..., action_size] in (-1, 1) -> Prediction."""

    config: Config

    @nn.compact
    def __call__(self, obs, action):
        config, width = self.config, self.config.critic_width
        x = jnp.concatenate([obs, action], -1)
        for _ in range(config.encoder_layers - 1):
            x = Block(config, width)(x)
        plain = config.encoder_output == "linear"
        features = linear(width)(x) if plain else Block(config, width)(x)
        x = nn.swish(features) if plain else features
        categorical = config.critic_loss == "hl_gauss"
        out = linear(config.num_bins if categorical else 1)(Block(config, width)(x))
        logits, value = None, out[..., 0]
        if categorical:
            support = config.vmin, config.vmax, config.num_bins
            if config.zero_init:
                # The code of 0, trained like any weight: it outweighs everything else at first.
                out += 40.0 * self.param("zero_code", lambda _: hl_gauss(jnp.zeros(()), *support))
            logits, value = out, (jax.nn.softmax(out) * jnp.linspace(*support)).sum(-1)
        ahead = Block(config, width)(x) if config.aux_loss_mult else None
        predicted = None if ahead is None else linear(1 + width)(ahead)
        return Prediction(value, logits, features, predicted)


# --- data types ---


class Transition(NamedTuple):
    """One step of the rollout; arrays [T, N, ...]."""

    obs: jax.Array  # normalised
    action: jax.Array  # as the environment and the critic see it
    policy: common.TanhGaussian  # pi_old, without the factor on its deviation
    weight: jax.Array  # of the action on the trace, 1 if pi_old drew it
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    valid: jax.Array  # the physics was finite
    next_obs: jax.Array  # normalised: true successor, or what follows the reset if shifted


class Batch(NamedTuple):
    """What the losses need of a transition."""

    obs: jax.Array
    action: jax.Array
    policy: common.TanhGaussian  # pi_old
    reward: jax.Array  # scaled
    terminated: jax.Array
    valid: jax.Array
    has_target: jax.Array  # valid, and there is a correct target
    target: jax.Array
    next_features: jax.Array | None


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "critic", and of "actor": {"net", "duals": logarithms of the multipliers}
    opt_state: dict  # of "actor" and "critic"
    obs_stats: common.Stats
    obs: jax.Array  # [N, obs_size]
    env_state: Any
    key: jax.Array
    update: jax.Array  # [] int32


# --- targets and losses ---


def trace_weight(policy, behaviour, u, trace_min):
    """min(1, pi / behaviour) [...] of the action tanh(u), and not less than `trace_min`."""
    u = jnp.clip(u, -math.atanh(MAX_ACTION), math.atanh(MAX_ACTION))
    ratio = jnp.exp(policy.log_prob(u) - behaviour.log_prob(u))
    return jnp.where(jnp.isnan(ratio), trace_min, jnp.clip(ratio, trace_min, 1.0))


def soft_td_lambda(reward, bonus, next_value, terminated, truncated, weight, gamma, lam, mode):
    """Soft TD(lambda) targets [T, N]; arrays [T, N], `bonus` is for the next state's entropy.

    aligned: from true successors. A terminated step has neither bonus nor bootstrap; a truncated
    one, as the last of the rollout, does not look at the next step. shifted: from what follows the
    reset, as in the authors' code. A truncated step has no correct target and is for the loss to
    leave out; the one before it, as the last of the rollout, takes its bootstrap though terminated.
    """
    aligned = mode == "aligned"

    def backward(carry, step):
        target, next_truncated, next_weight = carry
        reward, bonus, next_value, terminated, truncated, weight = step
        alone = truncated if aligned else next_truncated
        decay = jnp.where(alone, 0.0, lam * next_weight)
        future = bonus + gamma * (decay * target + (1.0 - decay) * next_value)
        if aligned:
            target = reward + jnp.where(terminated, 0.0, future)
        else:
            target = reward + jnp.where((terminated | truncated) & ~alone, bonus, future)
        return (target, truncated, weight), target

    steps = (reward, bonus, next_value, terminated, truncated, weight)
    start = next_value[-1], jnp.ones_like(truncated[-1]), jnp.zeros_like(weight[-1])
    return jax.lax.scan(backward, start, steps, reverse=True)[1]


def hl_gauss(value, vmin, vmax, num_bins):
    """HL-Gauss code [..., num_bins]: histogram of a Gaussian 0.75 bins wide about `value`."""
    width = (vmax - vmin) / (num_bins - 1)
    edges = vmin + width * (jnp.arange(num_bins + 1) - 0.5)
    value = jnp.clip(value, vmin, vmax)[..., None]
    below = 0.5 * jax.lax.erf((edges - value) / (0.75 * width * math.sqrt(2)))
    return jnp.maximum(jnp.diff(below), 0.0) / (below[..., -1:] - below[..., :1])


def critic_loss(prediction, batch, vmin, vmax, aux_loss_mult):
    """Cross-entropy, or squared error of a scalar critic, and auxiliary error: a mean over all."""
    squared = (prediction.value - batch.target) ** 2
    error, aux_error = squared, jnp.zeros_like(squared)
    if prediction.logits is not None:
        wanted = hl_gauss(batch.target, vmin, vmax, prediction.logits.shape[-1])
        error = -(wanted * jax.nn.log_softmax(prediction.logits)).sum(-1)
    if prediction.predicted is not None:
        wanted = jnp.append(batch.reward[:, None], batch.next_features, 1)
        aux_error = ((prediction.predicted - wanted) ** 2).mean(1)
        aux_error = jnp.where(batch.terminated, 0.0, aux_error)
    mean = lambda x: jnp.where(batch.has_target, x, 0.0).mean()
    loss = mean(error + aux_loss_mult * aux_error)
    return loss, {
        "losses/qf_loss": loss,
        "losses/aux_loss": mean(aux_error),
        "losses/value_error": mean(squared),
        "losses/q_value": prediction.value.mean(),
    }


def kl_divergence(p, q, noise, estimator):
    """KL(p || q) [...], "exact" or from the samples of p that normal noise [M, ..., A] gives.

    "sampled" takes q's density at clipped samples, as published: two equal policies that are
    saturated then have a positive KL. The exact one is that of the Gaussians: tanh is a bijection.
    """
    if estimator == "exact":
        moments = (p.std**2 + (p.mean - q.mean) ** 2) / (2.0 * q.std**2)
        return (jnp.log(q.std / p.std) + moments - 0.5).sum(-1)
    u = p.sample(noise)
    v = jnp.clip(u, -MAX_SAMPLE, MAX_SAMPLE) if estimator == "sampled" else u
    return (p.log_prob(u) - q.log_prob(v)).mean(0)


def policy_loss(value, log_prob, kl, temperature, kl_coef, kl_bound, mode):
    """Loss [...] of each state, and which are gated: their KL has reached the bound."""
    climb = jax.lax.stop_gradient(temperature) * log_prob - value
    pull = jax.lax.stop_gradient(kl_coef) * kl
    gated = ~(kl < kl_bound)
    loss = {"clipped": jnp.where(gated, pull, climb), "full": climb + pull, "value": climb}[mode]
    return loss, gated


def dual_losses(temperature, kl_coef, surplus, slack):
    """Losses of the multipliers; they put no force on the policy.

    `surplus` is the mean of the entropy above its target, `slack` that of the KL below its bound.
    """
    surplus, slack = jax.lax.stop_gradient((surplus, slack))
    return temperature * surplus, kl_coef * slack


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, config.num_envs)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions: run it with algos/reppo_discrete.py")
    actor = Actor(config, env.obs_size - env.privileged_size, env.action_size)
    critic = Critic(config)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    )
    T, N, A = config.num_steps, config.num_envs, env.action_size
    aligned = config.target_mode == "aligned"
    scales = jnp.linspace(config.noise_min, config.noise_max, N, endpoint=False)

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        sample, action = jnp.zeros((1, env.obs_size)), jnp.zeros((1, A))
        duals = {"temperature": config.temperature_init, "kl_coef": config.kl_coef_init}
        duals = {name: jnp.log(jnp.float32(x)) for name, x in duals.items()}
        params = {
            "actor": {"net": actor.init(key_actor, sample), "duals": duals},
            "critic": critic.init(key_critic, sample, action),
        }
        obs_stats = common.Stats.empty((env.obs_size,)).add(obs)
        opt_state = {name: optimizer.init(params[name]) for name in params}
        return TrainState(params, opt_state, obs_stats, obs, env_state, key, jnp.int32(0))

    def normalize(obs_stats, obs):
        """Standardised observations; the privileged entries at their end may be missing."""
        obs = obs.astype(jnp.float32)
        mean, var = (x[: obs.shape[-1]] for x in (obs_stats.mean, obs_stats.var))
        return (obs - mean) / jnp.sqrt(var + config.obs_eps) if config.normalize_obs else obs

    to_action = lambda u: jnp.clip(jnp.tanh(u), -MAX_ACTION, MAX_ACTION)

    def rollout(state, key):
        """Act for T steps; returns state, transitions and infos [T, N] of the environments."""
        key_noise, key_env, key_refresh = jax.random.split(key, 3)
        noise = jax.random.normal(key_noise, (T, N, A))
        env_state = env.refresh(key_refresh, state.env_state)

        def step(carry, x):
            obs, obs_stats, env_state = carry
            noise, key = x
            inputs = normalize(obs_stats, obs)
            policy = actor.apply(state.params["actor"]["net"], inputs)
            behaviour = policy._replace(std=scales[:, None] * policy.std)
            u = behaviour.sample(noise)
            next_obs, env_state, reward, terminated, truncated, info = env.step(
                key, env_state, to_action(u)
            )
            obs_stats = obs_stats.add(next_obs)
            final_obs = info.pop("final_observation")
            transition = Transition(
                obs=inputs, action=to_action(u), policy=policy,
                weight=trace_weight(policy, behaviour, u, config.trace_min),
                reward=reward, terminated=terminated, truncated=truncated, valid=~info["env_nan"],
                next_obs=normalize(obs_stats, final_obs if aligned else next_obs),
            )  # fmt: skip
            return (next_obs, obs_stats, env_state), (transition, info)

        carry = state.obs, state.obs_stats, env_state
        xs = noise, jax.random.split(key_env, T)
        (obs, obs_stats, env_state), (traj, info) = jax.lax.scan(step, carry, xs)
        return state._replace(obs=obs, obs_stats=obs_stats, env_state=env_state), traj, info

    def bootstrap(params, next_obs, key):
        """Values [T, N] and features of the successors, and log-probabilities of actions there."""
        policy = actor.apply(params["actor"]["net"], next_obs)

        def draw(_, key):
            u = policy.sample(jax.random.normal(key, policy.mean.shape))
            prediction = critic.apply(params["critic"], next_obs, jnp.tanh(u))
            features = prediction.features if config.aux_loss_mult else None
            return features, (prediction.value, policy.log_prob(u))

        # Of the features only those of the last action are kept, so that they are stored once.
        features = jnp.zeros((T, N, config.critic_width)) if config.aux_loss_mult else None
        keys = jax.random.split(key, config.value_samples)
        features, (value, log_prob) = jax.lax.scan(draw, features, keys)
        return value.mean(0), log_prob.mean(0), features

    def critic_loss_fn(params, batch):
        prediction = critic.apply(params, batch.obs, batch.action)
        return critic_loss(prediction, batch, config.vmin, config.vmax, config.aux_loss_mult)

    def actor_loss_fn(params, critic_params, batch, key):
        key_action, key_kl = jax.random.split(key)
        policy = actor.apply(params["net"], batch.obs)
        u = policy.sample(jax.random.normal(key_action, policy.mean.shape))
        log_prob = policy.log_prob(u)
        value = critic.apply(critic_params, batch.obs, jnp.tanh(u)).value
        noise = jax.random.normal(key_kl, (config.kl_samples, *u.shape))
        pair = (policy, batch.policy) if config.reverse_kl else (batch.policy, policy)
        kl = kl_divergence(*pair, noise, config.kl_estimator)
        dual = jax.tree.map(jnp.exp, params["duals"])
        mean = lambda x: jnp.where(batch.valid, x, 0.0).mean()
        losses, gated = policy_loss(
            value, log_prob, kl, **dual, kl_bound=config.kl_bound, mode=config.kl_mode
        )
        surplus = mean(-log_prob + config.target_entropy_mult * A)
        temperature_loss, kl_coef_loss = dual_losses(
            **dual, surplus=surplus, slack=mean(config.kl_bound - kl)
        )
        loss = mean(losses) + config.tune_temperature * temperature_loss
        loss += config.tune_kl_coef * kl_coef_loss
        return loss, {
            "losses/policy_loss": mean(losses),
            "losses/entropy": mean(-log_prob),
            "losses/kl": mean(kl),
            "losses/gated_fraction": mean(gated),
            "losses/std": policy.std.mean(),
        }

    def descend(params, grads, opt_state, learning_rate):
        """One step of the optimiser on one network, skipped if a gradient is not finite."""
        direction, new_opt_state = optimizer.update(grads, opt_state)
        if "duals" in direction:
            scaled = jax.tree.map(lambda u: config.dual_lr_mult * u, direction["duals"])
            direction = direction | {"duals": scaled}
        new_params = jax.tree.map(lambda p, u: p - learning_rate * u, params, direction)
        finite = common.all_finite(grads)
        choose = partial(jax.tree.map, partial(jnp.where, finite))
        return choose(new_params, params), choose(new_opt_state, opt_state), finite

    def fit(state, batch, learning_rate, key):
        """All gradient steps of an update: params, opt_state, metrics."""

        def gradient_step(carry, x):
            params, opt_state = carry
            index, key = x
            minibatch = jax.tree.map(lambda x: x[index], batch)
            grad = partial(jax.grad, has_aux=True)
            grads, aux = grad(critic_loss_fn)(params["critic"], minibatch)
            aux["losses/critic_grad_norm"] = optax.global_norm(grads)
            critic_step = descend(params["critic"], grads, opt_state["critic"], learning_rate)
            grads, actor_aux = grad(actor_loss_fn)(params["actor"], critic_step[0], minibatch, key)
            actor_aux["losses/actor_grad_norm"] = optax.global_norm(grads)
            actor_step = descend(params["actor"], grads, opt_state["actor"], learning_rate)
            params = {"actor": actor_step[0], "critic": critic_step[0]}
            opt_state = {"actor": actor_step[1], "critic": critic_step[1]}
            return (params, opt_state), (aux | actor_aux, actor_step[2] & critic_step[2])

        def epoch(carry, key):
            key_order, key_steps = jax.random.split(key)
            K = config.num_minibatches
            index = jax.random.permutation(key_order, T * N).reshape(K, -1)
            return jax.lax.scan(gradient_step, carry, (index, jax.random.split(key_steps, K)))

        carry, keys = (state.params, state.opt_state), jax.random.split(key, config.num_epochs)
        (params, opt_state), (aux, finite) = jax.lax.scan(epoch, carry, keys)
        # Skipped steps are left out of the means; if all are, these are NaN, and the seed is dead.
        metrics = {name: x.mean(where=finite) for name, x in aux.items()}
        return params, opt_state, metrics | {"health/skipped_steps": (~finite).sum()}

    def update(state):
        key, key_rollout, key_bootstrap, key_fit = jax.random.split(state.key, 4)
        remaining = 1.0 - state.update / config.num_updates
        learning_rate = config.learning_rate * (remaining if config.anneal_lr else 1.0)

        state, traj, info = rollout(state, key_rollout)

        reward = config.reward_scale * traj.reward
        value, log_prob, features = bootstrap(state.params, traj.next_obs, key_bootstrap)
        temperature = jnp.exp(state.params["actor"]["duals"]["temperature"])
        bonus = -config.gamma * temperature * log_prob
        target = soft_td_lambda(
            reward, bonus, value, traj.terminated, traj.truncated, traj.weight, config.gamma,
            config.td_lambda, config.target_mode,
        )  # fmt: skip
        batch = Batch(
            traj.obs, traj.action, traj.policy, reward, traj.terminated, traj.valid,
            has_target=traj.valid & (aligned | ~traj.truncated),
            target=target, next_features=features,
        )  # fmt: skip
        batch = jax.tree.map(lambda x: x.reshape((T * N, *x.shape[2:])), batch)
        params, opt_state, metrics = fit(state, batch, learning_rate, key_fit)

        metrics |= common.run_metrics(info, (params, metrics["losses/qf_loss"]))
        metrics |= {f"losses/{n}": jnp.exp(x) for n, x in params["actor"]["duals"].items()}
        unexplained = metrics["losses/value_error"] / (target.var() + 1e-8)
        metrics["losses/explained_variance"] = 1.0 - unexplained
        outside = (target < config.vmin) | (target > config.vmax)
        outside &= config.critic_loss == "hl_gauss"
        metrics["charts/learning_rate"] = jnp.asarray(learning_rate)
        metrics["health/target_clip_fraction"] = outside.mean()
        state = state._replace(params=params, opt_state=opt_state, key=key, update=state.update + 1)
        return state, metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], normalize(policy["obs_stats"], obs))
        noise = 0.0 if greedy else jax.random.normal(key, distribution.mean.shape)
        return to_action(distribution.sample(noise))

    def policy_of(state):
        return {"actor": state.params["actor"]["net"], "obs_stats": state.obs_stats}

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
    launch.main("reppo", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

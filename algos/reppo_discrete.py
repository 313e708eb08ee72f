"""REPPO for discrete actions: every expectation over actions is a sum.

Voelcker et al. 2025, https://arxiv.org/abs/2507.11019, who publish no discrete algorithm: this is
reppo.py with Q(s, .) as a vector. One update collects a rollout [T, N] with pi_old and fits Q to

    G_t = r_t + (1 - terminated_t) (b_t + gamma ((1 - c_t) V'_t + c_t G_{t+1}))
    V'_t = sum_a pi(a | s'_t) Q(s'_t, a),  b_t = gamma alpha H(pi(. | s'_t))
    c_t = lambda, or 0 at the end of an episode and of the rollout

and then climbs in the states whose KL(s) = KL(pi_old || pi) is below the bound, and pulls back in
the others:

    KL(s) <  bound:  sum_a pi(a | s) (alpha log pi(a | s) - Q(s, a))
    KL(s) >= bound:  beta KL(s)

Differences from reppo.py:

1. The critic sees the observation alone and has one histogram per action; only that of the action
   taken is trained. The prediction of reward and next features is told the action.
2. Values, entropies and the KL are exact: nothing is sampled but the actions of the rollout.
3. The entropy's target is `target_entropy_mult` log(number of actions).
4. One variant of each part: forward KL, clipped, aligned targets, HL-Gauss, RMS norm, no privileged
   observations, no scaled exploration.

    python algos/reppo_discrete.py --env cartpole --num-seeds 16
    python algos/reppo_discrete.py --env breakout --num-seeds 4

Documentation: docs/reppo_discrete.md
"""

import math
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

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
    total_timesteps: int = 500_000  # environment steps per seed, all environments together

    # batch
    num_envs: int = 64  # parallel environments per seed
    num_steps: int = 32  # length of a rollout in each environment
    num_epochs: int = 4  # passes over a rollout
    num_minibatches: int = 8  # gradient steps of the critic and of the actor per pass

    # optimiser: Adam after clipping by global norm, for the actor and the critic alike
    learning_rate: float = 3e-4  # step size of Adam
    anneal_lr: bool = False  # decrease the step size linearly to 0 over the run
    max_grad_norm: float = 0.5  # largest global norm of one gradient; the actor's has the duals
    dual_lr_mult: float = 1.0  # factor on the step size of the two multipliers

    # targets and critic loss
    gamma: float = 0.99  # discount
    td_lambda: float = 0.95  # decay of the target's trace
    num_bins: int = 151  # bins of the categorical critic
    vmin: float = 0.0  # centre of the first bin, at most the smallest value
    vmax: float = 150.0  # centre of the last bin, at least the largest value
    aux_loss_mult: float = 1.0  # weight of predicting reward and next features; 0: no prediction

    # actor loss
    kl_bound: float = 0.1  # largest KL of a state, in nats
    kl_coef_init: float = 0.01  # initial multiplier of the KL (beta)
    temperature_init: float = 0.01  # initial multiplier of the entropy (alpha)
    target_entropy_mult: float = 0.5  # smallest mean entropy is this times log(number of actions)

    # observations and rewards
    normalize_obs: bool = True  # standardise observations by running statistics
    reward_scale: float = 1.0  # factor on the rewards, not on the logged returns
    reward_range: tuple[float, float] = (0.0, 0.0)  # of a raw reward if known, to check vmin, vmax

    # networks
    hidden: tuple[int, ...] = (128, 128)  # hidden layers of the actor
    critic_width: int = 128  # features, and units of every hidden layer of the critic

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
        if isinstance(self.gamma * self.reward_scale, jax.Array):
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
# Origins are in docs/presets.md.
MINATAR = {
    "total_timesteps": 5_000_000, "num_envs": 128, "num_steps": 32, "num_minibatches": 8,
    "gamma": 0.99, "vmin": 0.0, "vmax": 50.0, "normalize_obs": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "cartpole": {"num_epochs": 8, "vmax": 105.0, "reward_range": (0.0, 1.0), "dual_lr_mult": 3.0},
    "breakout": MINATAR,
    "asterix": MINATAR,
    "freeway": MINATAR,
    "space_invaders": MINATAR,
}
# fmt: on


# --- networks ---

linear = partial(nn.Dense, kernel_init=nn.initializers.lecun_normal())


class Prediction(NamedTuple):
    """What the critic says of observations; `predicted` is None without an action."""

    value: jax.Array  # [..., A], Q of each action
    logits: jax.Array  # [..., A, num_bins]
    features: jax.Array  # [..., critic_width]
    predicted: jax.Array | None  # [..., 1 + critic_width], reward and next features


class Block(nn.Module):
    """Hidden layer: linear, normalised, swish."""

    size: int

    @nn.compact
    def __call__(self, x):
        return nn.swish(nn.RMSNorm(epsilon=1e-6)(linear(self.size)(x)))


class Actor(nn.Module):
    """Policy network: observation [..., obs_size] -> Categorical."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs):
        x = obs
        for size in self.config.hidden:
            x = Block(size)(x)
        return common.Categorical(linear(self.action_size)(x))


class Critic(nn.Module):
    """Q of every action: observation [..., obs_size], action taken [...] or None -> Prediction."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs, action=None):
        config, width, A = self.config, self.config.critic_width, self.action_size
        support = config.vmin, config.vmax, config.num_bins
        features = linear(width)(Block(width)(obs))
        x = nn.swish(features)
        out = linear(A * config.num_bins)(Block(width)(x))
        logits = out.reshape((*out.shape[:-1], A, config.num_bins))
        # The code of 0, trained like any weight: it outweighs everything else at first.
        logits += 40.0 * self.param("zero_code", lambda _: hl_gauss(jnp.zeros(A), *support))
        value = (jax.nn.softmax(logits) * jnp.linspace(*support)).sum(-1)
        predicted = None
        if config.aux_loss_mult and action is not None:
            x = jnp.concatenate([x, jax.nn.one_hot(action, A)], -1)
            predicted = linear(1 + width)(Block(width)(x))
        return Prediction(value, logits, features, predicted)


# --- data types ---


class Transition(NamedTuple):
    """One step of the rollout; arrays [T, N, ...]."""

    obs: jax.Array  # normalised
    action: jax.Array
    policy: common.Categorical  # pi_old
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    valid: jax.Array  # the physics was finite
    next_obs: jax.Array  # normalised true successor


class Batch(NamedTuple):
    """What the losses need of a transition."""

    obs: jax.Array
    action: jax.Array
    policy: common.Categorical  # pi_old
    reward: jax.Array  # scaled
    terminated: jax.Array
    valid: jax.Array
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


def soft_td_lambda(reward, bonus, next_value, terminated, truncated, gamma, lam):
    """Soft TD(lambda) targets [T, N]; arrays [T, N], `bonus` is for the next state's entropy.

    A terminated step has neither bonus nor bootstrap; a truncated one, as the last of the rollout,
    does not look at the next step.
    """

    def backward(target, step):
        reward, bonus, next_value, terminated, truncated = step
        decay = jnp.where(truncated, 0.0, lam)
        future = bonus + gamma * (decay * target + (1.0 - decay) * next_value)
        target = reward + jnp.where(terminated, 0.0, future)
        return target, target

    steps = reward, bonus, next_value, terminated, truncated
    return jax.lax.scan(backward, next_value[-1], steps, reverse=True)[1]


def hl_gauss(value, vmin, vmax, num_bins):
    """HL-Gauss code [..., num_bins]: histogram of a Gaussian 0.75 bins wide about `value`."""
    width = (vmax - vmin) / (num_bins - 1)
    edges = vmin + width * (jnp.arange(num_bins + 1) - 0.5)
    value = jnp.clip(value, vmin, vmax)[..., None]
    below = 0.5 * jax.lax.erf((edges - value) / (0.75 * width * math.sqrt(2)))
    return jnp.maximum(jnp.diff(below), 0.0) / (below[..., -1:] - below[..., :1])


def critic_loss(prediction, batch, vmin, vmax, aux_loss_mult):
    """Cross-entropy of the taken action's histogram, and auxiliary error: a mean over all."""
    action = batch.action[:, None]
    value = jnp.take_along_axis(prediction.value, action, 1)[:, 0]
    logits = jnp.take_along_axis(prediction.logits, action[..., None], 1)[:, 0]
    wanted = hl_gauss(batch.target, vmin, vmax, logits.shape[-1])
    error, aux_error = -(wanted * jax.nn.log_softmax(logits)).sum(-1), jnp.zeros_like(value)
    if prediction.predicted is not None:
        wanted = jnp.append(batch.reward[:, None], batch.next_features, 1)
        aux_error = ((prediction.predicted - wanted) ** 2).mean(1)
        aux_error = jnp.where(batch.terminated, 0.0, aux_error)
    mean = lambda x: jnp.where(batch.valid, x, 0.0).mean()
    loss = mean(error + aux_loss_mult * aux_error)
    return loss, {
        "losses/qf_loss": loss,
        "losses/aux_loss": mean(aux_error),
        "losses/value_error": mean((value - batch.target) ** 2),
        "losses/q_value": value.mean(),
    }


def kl_divergence(p, q):
    """KL(p || q) [...] of two Categoricals."""
    log_p, log_q = jax.nn.log_softmax(p.logits), jax.nn.log_softmax(q.logits)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def policy_loss(policy, value, kl, temperature, kl_coef, kl_bound):
    """Loss [...] of each state, and which are gated: their KL has reached the bound."""
    expected = (jax.nn.softmax(policy.logits) * value).sum(-1)
    climb = -jax.lax.stop_gradient(temperature) * policy.entropy() - expected
    gated = ~(kl < kl_bound)
    return jnp.where(gated, jax.lax.stop_gradient(kl_coef) * kl, climb), gated


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
    if not env.discrete:
        raise ValueError(f"{env.name} has continuous actions: run it with algos/reppo.py")
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    actor, critic = (net(config, env.action_size) for net in (Actor, Critic))
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    )
    T, N, A = config.num_steps, config.num_envs, env.action_size

    def init(key) -> TrainState:
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        obs, env_state = env.reset(key_env)
        sample, action = jnp.zeros((1, env.obs_size)), jnp.zeros(1, jnp.int32)
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
        obs = obs.astype(jnp.float32)
        standard = (obs - obs_stats.mean) / jnp.sqrt(obs_stats.var + 1e-2)
        return standard if config.normalize_obs else obs

    def rollout(state, key):
        """Act for T steps; returns state, transitions and infos [T, N] of the environments."""
        key_noise, key_env, key_refresh = jax.random.split(key, 3)
        noise = jax.random.gumbel(key_noise, (T, N, A))
        env_state = env.refresh(key_refresh, state.env_state)

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
                reward=reward,
                terminated=terminated,
                truncated=truncated,
                valid=~info["env_nan"],
                next_obs=normalize(obs_stats, info.pop("final_observation")),
            )
            return (next_obs, obs_stats, env_state), (transition, info)

        carry = state.obs, state.obs_stats, env_state
        xs = noise, jax.random.split(key_env, T)
        (obs, obs_stats, env_state), (traj, info) = jax.lax.scan(step, carry, xs)
        return state._replace(obs=obs, obs_stats=obs_stats, env_state=env_state), traj, info

    def critic_loss_fn(params, batch):
        prediction = critic.apply(params, batch.obs, batch.action)
        return critic_loss(prediction, batch, config.vmin, config.vmax, config.aux_loss_mult)

    def actor_loss_fn(params, critic_params, batch):
        policy = actor.apply(params["net"], batch.obs)
        value = critic.apply(critic_params, batch.obs).value
        entropy, kl = policy.entropy(), kl_divergence(batch.policy, policy)
        dual = jax.tree.map(jnp.exp, params["duals"])
        mean = lambda x: jnp.where(batch.valid, x, 0.0).mean()
        losses, gated = policy_loss(policy, value, kl, **dual, kl_bound=config.kl_bound)
        surplus = mean(entropy - config.target_entropy_mult * math.log(A))
        temperature_loss, kl_coef_loss = dual_losses(
            **dual, surplus=surplus, slack=mean(config.kl_bound - kl)
        )
        return mean(losses) + temperature_loss + kl_coef_loss, {
            "losses/policy_loss": mean(losses),
            "losses/entropy": mean(entropy),
            "losses/kl": mean(kl),
            "losses/gated_fraction": mean(gated),
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

        def gradient_step(carry, index):
            params, opt_state = carry
            minibatch = jax.tree.map(lambda x: x[index], batch)
            grad = partial(jax.grad, has_aux=True)
            grads, aux = grad(critic_loss_fn)(params["critic"], minibatch)
            aux["losses/critic_grad_norm"] = optax.global_norm(grads)
            critic_step = descend(params["critic"], grads, opt_state["critic"], learning_rate)
            grads, actor_aux = grad(actor_loss_fn)(params["actor"], critic_step[0], minibatch)
            actor_aux["losses/actor_grad_norm"] = optax.global_norm(grads)
            actor_step = descend(params["actor"], grads, opt_state["actor"], learning_rate)
            params = {"actor": actor_step[0], "critic": critic_step[0]}
            opt_state = {"actor": actor_step[1], "critic": critic_step[1]}
            return (params, opt_state), (aux | actor_aux, actor_step[2] & critic_step[2])

        def epoch(carry, key):
            index = jax.random.permutation(key, T * N).reshape(config.num_minibatches, -1)
            return jax.lax.scan(gradient_step, carry, index)

        carry, keys = (state.params, state.opt_state), jax.random.split(key, config.num_epochs)
        (params, opt_state), (aux, finite) = jax.lax.scan(epoch, carry, keys)
        # Skipped steps are left out of the means; if all are, these are NaN, and the seed is dead.
        metrics = {name: x.mean(where=finite) for name, x in aux.items()}
        return params, opt_state, metrics | {"health/skipped_steps": (~finite).sum()}

    def update(state):
        key, key_rollout, key_fit = jax.random.split(state.key, 3)
        remaining = 1.0 - state.update / config.num_updates
        learning_rate = config.learning_rate * (remaining if config.anneal_lr else 1.0)

        state, traj, info = rollout(state, key_rollout)

        reward = config.reward_scale * traj.reward
        policy = actor.apply(state.params["actor"]["net"], traj.next_obs)
        prediction = critic.apply(state.params["critic"], traj.next_obs)
        value = (jax.nn.softmax(policy.logits) * prediction.value).sum(-1)
        temperature = jnp.exp(state.params["actor"]["duals"]["temperature"])
        bonus = config.gamma * temperature * policy.entropy()
        target = soft_td_lambda(
            reward, bonus, value, traj.terminated, traj.truncated, config.gamma, config.td_lambda
        )
        features = prediction.features if config.aux_loss_mult else None
        batch = Batch(
            traj.obs, traj.action, traj.policy, reward, traj.terminated, traj.valid,
            target=target, next_features=features,
        )  # fmt: skip
        batch = jax.tree.map(lambda x: x.reshape((T * N, *x.shape[2:])), batch)
        params, opt_state, metrics = fit(state, batch, learning_rate, key_fit)

        metrics |= common.run_metrics(info, (params, metrics["losses/qf_loss"]))
        metrics |= {f"losses/{n}": jnp.exp(x) for n, x in params["actor"]["duals"].items()}
        unexplained = metrics["losses/value_error"] / (target.var() + 1e-8)
        metrics["losses/explained_variance"] = 1.0 - unexplained
        outside = (target < config.vmin) | (target > config.vmax)
        metrics["charts/learning_rate"] = jnp.asarray(learning_rate)
        metrics["health/target_clip_fraction"] = outside.mean()
        state = state._replace(params=params, opt_state=opt_state, key=key, update=state.update + 1)
        return state, metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], normalize(policy["obs_stats"], obs))
        if greedy:
            return distribution.mode()
        return distribution.sample(jax.random.gumbel(key, (*obs.shape[:-1], A)))

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
    launch.main("reppo_discrete", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

"""Behaviour regularised actor-critic (BRAC): offline, regularised towards the behaviour policy.

Wu et al. 2019, https://arxiv.org/abs/1911.11361. A divergence D(s) between the policy pi(. | s) and
the behaviour policy b(. | s) is added to the policy loss and, as a value penalty, subtracted from
the critics' targets. A gradient step draws a minibatch uniformly with replacement, moves the target
networks Qbar_i, and takes one step of Adam on each loss, in this order:

    Qbar_i          <- (1 - tau) Qbar_i + tau Q_i
    y                = r + gamma (1 - terminated) V
    V                = mix Qbar(s', a') - T log pi(a' | s') - p alpha D(s')
    critic loss      = sum_i E[(Q_i(s, a) - y)^2]
    policy loss      = E[T log pi(c | s) + alpha D(s) - [t > warm_start] mix Q(s, c)]
    divergence loss  = -E[D(s)] + gradient penalty of g                    (if D has a critic g)
    alpha loss       = -alpha E[D(s) - target_divergence]                  (if train_alpha)
    temperature loss = T E[-log pi(d | s) + m A]                           (if train_temperature)

The losses train the Q_i, pi, g, alpha and T in turn. In each, y and all other parameters are
constants. a', c and d are new draws from the current policy, each tanh(u) with u Gaussian, and
mix Q = l min_i Q_i + (1 - l) max_i Q_i. p is 0 for policy regularisation and usually 1 for a value
penalty, t counts gradient steps from 0, A is the number of action dimensions, and -m A is the
target entropy. In the fields l is `min_weight`, p `value_penalty` and m `target_entropy_mult`.

D is estimated from draws x of pi and, with a critic g, from the behaviour policy's action a
(at s', its next action). clip limits x to [-0.999, 0.999]:

    kl           mean of log pi(x | s) - log b(clip(x) | s) over 4 draws, b is a clone
    mmd          squared maximum mean discrepancy of 4 draws of pi and 4 of the clone b
    dual_kl      log h(s, x) + 1 - h(s, a), h = softplus(g)
    wasserstein  g(s, x) - g(s, a)
    none         0

A critic g takes `divergence_steps` gradient steps for each one of the policy: the first on the same
minibatch, the others on minibatches of their own. Its gradient penalty, 5 E[max(|dg/da| - 1, 0)^2],
is taken at random points between x and a.

s' is the true successor of s, taken before any reset. A time limit (truncated) therefore bootstraps
from it, and a terminal state (terminated) does not.

Differences from ppo.py:

1. Nothing is collected: all seeds share one dataset, an argument of the compiled program. An
   update is a fixed number of gradient steps, which count as timesteps.
2. The gradient reaches the policy through the action and the critics, so there is no ratio.
3. The clone of seed i is the policy of seed i of a run of bc.py. It is not trained here.
4. Actions are continuous. Layers are ReLU with Glorot-uniform weights, the log standard deviation
   is squashed into [-5, 0], gradients are not clipped, and observations are not normalised.
5. Evaluations also report `max_q`, which takes 10 draws and plays the one with the largest Q_1.

    python algos/brac.py --env hopper --dataset data/hopper-eps1.npz --behavior RUN_DIR
    python algos/brac.py --env hopper --dataset data/hopper-eps1.npz --preset dual --alpha 1 10 30

Documentation: docs/brac.md
"""

import math
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__":  # the checkout, not algos/, comes first on the import path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends the imports at once

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from annotated_types import Interval
from pydantic import NonNegativeFloat, PositiveInt

import envs
from algos import common, launch
from algos.common import UnitFloat
from algos.launch import datasets

MAX_ALPHA = 500.0  # upper end of alpha's range


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "hopper"  # task of the dataset, in which the policy is evaluated
    dataset: str = ""  # file of transitions, or minari:NAME, see docs/datasets.md
    behavior: str = ""  # run directory of bc.py; the policy of its seed i is the clone of seed i
    total_timesteps: PositiveInt = 500_000  # gradient steps per seed

    # batch
    gradient_steps: PositiveInt = 100  # gradient steps in one update
    batch_size: PositiveInt = 256  # transitions in a minibatch

    # optimiser: Adam
    critic_lr: NonNegativeFloat = 1e-3  # learning rate of all critics, also the divergence's
    learning_rate: NonNegativeFloat = 3e-4  # learning rate of the policy
    multiplier_lr: NonNegativeFloat = 1e-3  # learning rate of alpha and of the temperature
    polyak_tau: UnitFloat = 0.005  # Polyak step of the target networks

    # divergence from the behaviour policy
    alpha: Annotated[float, Interval(ge=0, le=MAX_ALPHA)] = 0.1  # weight of the divergence
    # kl and mmd need a clone; dual_kl and wasserstein train a critic; none is for --preset sac
    divergence: Literal["kl", "mmd", "dual_kl", "wasserstein", "none"] = "kl"
    value_penalty: NonNegativeFloat = 1.0  # factor on alpha in the targets; 0: policy loss only
    train_alpha: bool = False  # train alpha so that the divergence meets its target
    target_divergence: NonNegativeFloat = 0.0  # the divergence's target, with train_alpha
    divergence_steps: PositiveInt = 3  # gradient steps of the divergence's critic per policy step
    warm_start: int = 20_000  # last gradient step (from 0) without critics in its policy loss

    # objective
    gamma: UnitFloat = 0.99  # discount
    min_weight: UnitFloat = 1.0  # weight of the smallest Q_i; the largest gets the rest
    temperature: NonNegativeFloat = 0.0  # weight of the entropy
    train_temperature: bool = False  # train the temperature so that the entropy meets its target
    target_entropy_mult: float = 1.0  # target entropy, in nats: minus this times action_size

    # networks
    hidden: tuple[PositiveInt, ...] = (200, 200)  # hidden layers of the policy and of the clone
    critic_hidden: tuple[PositiveInt, ...] = (300, 300)  # hidden layers of each critic
    num_critics: PositiveInt = 2  # number of critics

    @property
    def steps_per_update(self) -> int:
        """Gradient steps in one update, which count as timesteps."""
        return self.gradient_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run, rounded up so that at least `total_timesteps` are taken."""
        return math.ceil(self.total_timesteps / self.steps_per_update)

    @property
    def cloned(self) -> bool:
        """True if the divergence needs a clone of the behaviour policy."""
        return self.divergence in ("kl", "mmd")

    @property
    def dual(self) -> bool:
        """True if the divergence has a critic of its own."""
        return self.divergence in ("dual_kl", "wasserstein")

    def validate(self) -> None:
        """Raise ValueError without a dataset or for contradictions; warn of useless warm starts."""
        if not self.dataset:
            raise ValueError(
                "dataset='': give --dataset PATH or --dataset minari:NAME (docs/datasets.md)"
            )
        if self.cloned and not self.behavior:
            raise ValueError("behavior='': give --behavior RUN_DIR of bc.py, or --preset dual")
        if self.behavior and not self.cloned:
            raise ValueError(f"behavior={self.behavior}: {self.divergence} uses no clone")
        if self.train_alpha and self.divergence == "none":
            raise ValueError("divergence=none: leave --train-alpha out, there is nothing to weigh")
        if self.train_alpha != (self.target_divergence > 0.0):
            raise ValueError(
                f"target_divergence={self.target_divergence:g}: it has to be positive with "
                "--train-alpha, or alpha grows without end, and 0 without it"
            )
        entropy = self.temperature or self.train_temperature
        if self.divergence == "none" and not entropy and self.warm_start >= 0:
            warnings.warn("divergence=none has no loss in a warm start: --preset sac", stacklevel=2)
        steps = self.num_updates * self.gradient_steps
        if self.warm_start >= steps - 1:  # gradient steps are counted from 0
            warnings.warn(
                f"warm_start={self.warm_start}: the policy loss leaves the critics out in all "
                f"{steps} gradient steps of the run; lower warm_start",
                stacklevel=2,
            )


# --- networks ---

MIN_LOG_STD, MAX_LOG_STD = -5.0, 0.0  # of the policy, before tanh
MAX_ACTION = 0.999  # given actions are clipped to this, because arctanh is infinite at 1
NUM_DRAWS = 4  # draws of each policy for an estimate of kl or mmd
NUM_CANDIDATES = 10  # draws from which `max_q` takes the best
MMD_SCALE = 20.0  # scale of the Laplacian kernel
GRADIENT_PENALTY_WEIGHT = 5.0  # weight of the gradient penalty


class MLP(nn.Module):
    """Hidden layers and a linear layer: inputs [..., size], concatenated -> [..., out]."""

    hidden: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, *inputs):
        init = nn.initializers.glorot_uniform()
        x = jnp.concatenate([x.astype(jnp.float32) for x in inputs], -1)
        for size in self.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=init)(x))
        return nn.Dense(self.out, kernel_init=init)(x)


class Actor(nn.Module):
    """Policy network: observation [..., obs_size] -> TanhGaussian.

    The clone's parameters come from bc.py, so the layers have to be the same as there.
    """

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs):
        init = nn.initializers.glorot_uniform()
        x = obs.astype(jnp.float32)
        for size in self.config.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=init)(x))
        out = nn.Dense(2 * self.action_size, kernel_init=init)(x)
        mean, raw = jnp.split(out, 2, -1)
        log_std = MIN_LOG_STD + 0.5 * (MAX_LOG_STD - MIN_LOG_STD) * (jnp.tanh(raw) + 1.0)
        return common.TanhGaussian(mean, jnp.exp(log_std))


class Critic(nn.Module):
    """`num` action values: observation [..., obs_size], action [..., action_size] -> [num, ...]."""

    config: Config
    num: int

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=self.num,
        )
        return ensemble(self.config.critic_hidden, 1)(obs, action)[..., 0]


# --- data types ---


class Batch(NamedTuple):
    """What the losses need of the dataset; arrays [rows, ...]."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    next_obs: jax.Array
    next_action: jax.Array  # what the behaviour policy did, or would have done, at next_obs
    clone: Any = None  # parameters of the clone, if the divergence needs one; the same for all rows


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # keys "actor", "critic", "alpha", "temperature" and, if dual, "divergence"
    target_params: dict  # key "critic"
    opt_state: dict  # the keys of params that are trained
    key: jax.Array
    update: jax.Array  # [] int32, finished updates


# --- targets and losses ---


def given_log_prob(policy, action):
    """Log-density [...] of `action` [..., action_size], which is clipped to +-MAX_ACTION first."""
    return policy.log_prob(jnp.arctanh(jnp.clip(action, -MAX_ACTION, MAX_ACTION)))


def kl_estimate(policy, clone, u):
    """KL(policy || clone) [B], estimated from draws tanh(u), u [draws, B, A], of the policy.

    The policy's own density is exact, the clone's is that of the clipped action. Where draws are
    clipped, the estimate is biased, but it still grows with |u|, which discourages saturation.
    """
    return (policy.log_prob(u) - given_log_prob(clone, jnp.tanh(u))).mean(0)


def squared_mmd(x, y):
    """Squared maximum mean discrepancy [B] of two sets of actions [draws, B, A].

    Laplacian kernel. Each draw is also compared with itself, so the estimate is biased upward.
    """
    distance = lambda x, y: jnp.abs(x[:, None] - y[None]).sum(-1)
    kernel = lambda x, y: jnp.exp(-distance(x, y) / MMD_SCALE).mean((0, 1))
    return kernel(x, x) + kernel(y, y) - 2.0 * kernel(x, y)


def dual_divergence(kind, own_value, given_value):
    """Lower bound [B] on a divergence, from its critic's values of own and given actions.

    Here and below, own actions are the policy's, and given ones are the behaviour policy's.
    """
    if kind == "wasserstein":
        return own_value - given_value
    return jnp.log(jax.nn.softplus(own_value) + 1e-8) + 1.0 - jax.nn.softplus(given_value)


def gradient_penalty(critic, own, given, weight):
    """Gradient penalty of `critic` (actions [B, A] -> [B]) between own and given actions.

    Only norms above 1 count. `weight` [B, 1] is 0 at the own action and 1 at the given one.
    """
    between = own + weight * (given - own)
    gradient = jax.grad(lambda action: critic(action).sum())(between)
    slope = jnp.sqrt(1e-8 + (gradient**2).sum(-1))
    return GRADIENT_PENALTY_WEIGHT * (jnp.maximum(slope - 1.0, 0.0) ** 2).mean()


def divergence_loss(kind, critic, own, given, weight):
    """Loss of a divergence's critic, gradient penalty minus lower bound; and the penalty."""
    penalty = gradient_penalty(critic, own, given, weight)
    return penalty - dual_divergence(kind, critic(own), critic(given)).mean(), penalty


def mix(value, min_weight):
    """Weighted sum of the smallest and the largest of the critics' values [critics, ...]."""
    return min_weight * value.min(0) + (1.0 - min_weight) * value.max(0)


def td_target(reward, terminated, next_value, gamma):
    """Targets [B] of the critics; no gradient passes through them.

    `next_value` [B] is the value of the true successor. A terminated step does not bootstrap.
    """
    return jax.lax.stop_gradient(reward + gamma * jnp.where(terminated, 0.0, next_value))


def critic_loss(value, target):
    """Sum over critics of the mean squared error of values [critics, B] to targets [B]."""
    return ((value - target) ** 2).mean(-1).sum()


def policy_loss(value, log_prob, divergence, temperature, alpha, warm):
    """Mean of temperature log pi + alpha D - value; if `warm`, without the value.

    `value`, `log_prob` and `divergence` [B] are of the policy's actions and states.
    """
    temperature, alpha = jax.lax.stop_gradient((temperature, alpha))
    return (temperature * log_prob + alpha * divergence - jnp.where(warm, 0.0, value)).mean()


def bounded(x, slope, high):
    """The product slope x, with a gradient of 0 where descent would move x out of [0, high]."""
    inside = jnp.where(slope > 0.0, x > 0.0, x < high)  # a positive slope lowers x
    return jnp.where(inside, slope, 0.0) * x


def alpha_loss(alpha, divergence, target):
    """Loss whose gradient step raises alpha while the divergence [B] is above its target."""
    return bounded(alpha, -jax.lax.stop_gradient(divergence - target).mean(), MAX_ALPHA)


def temperature_loss(temperature, log_prob, target_entropy):
    """Loss whose gradient step raises the temperature while the entropy is below its target."""
    surplus = jax.lax.stop_gradient(-log_prob - target_entropy).mean()
    return bounded(temperature, surplus, jnp.inf)


# --- build ---


def make_env(config: Config) -> envs.Env:
    """The environment that the dataset comes from."""
    env = envs.make(config.env, 1)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions, and BRAC needs continuous ones")
    return env


def build(config: Config, env: envs.Env) -> common.Algo:
    """Compose networks and optimiser into the pure functions of a run."""
    A = env.action_size
    actor, critic = Actor(config, A), Critic(config, config.num_critics)
    divergence_critic = Critic(config, 1)
    optimizer = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-7)  # no learning rate: see descend
    target_entropy = -config.target_entropy_mult * A
    learning_rate = {
        "critic": config.critic_lr,
        "actor": config.learning_rate,
        "divergence": config.critic_lr,
        "alpha": config.multiplier_lr,
        "temperature": config.multiplier_lr,
    }
    trained = {
        "critic": True,
        "actor": True,
        "divergence": config.dual,
        "alpha": config.train_alpha,
        "temperature": config.train_temperature,
    }

    def data(seeds):
        """The dataset, which all seeds share, and the clone of each seed, if one is needed."""
        dataset = datasets.load(config.dataset, env)
        rows = Batch(*(getattr(dataset, name) for name in Batch._fields if name != "clone"))
        if not config.cloned:
            return (rows,), ()
        return (rows,), (datasets.load_clones(config.behavior, env, config.hidden, seeds),)

    def init(key) -> TrainState:
        # One key is unused, so that a seed gives the same run as in earlier versions.
        key_actor, key_critic, key_divergence, _, key = jax.random.split(key, 5)
        obs, action = (jnp.zeros((1, size)) for size in (env.obs_size, A))
        params = {
            "actor": actor.init(key_actor, obs),
            "critic": critic.init(key_critic, obs, action),
            "alpha": jnp.float32(config.alpha),
            "temperature": jnp.float32(config.temperature),
        }
        if config.dual:
            params["divergence"] = divergence_critic.init(key_divergence, obs, action)
        return TrainState(
            params=params,
            target_params={"critic": params["critic"]},
            opt_state={name: optimizer.init(params[name]) for name in params if trained[name]},
            key=key,
            update=jnp.int32(0),
        )

    def noise_of(key, shape):
        """Noise [*shape, A] for sampling actions of batch shape `shape`."""
        return jax.random.normal(key, (*shape, A))

    def draw(params, obs, key):
        """The policy at `obs`, the u of a new action tanh(u), and its log-probability."""
        policy = actor.apply(params, obs)
        u = policy.sample(noise_of(key, obs.shape[:-1]))
        return policy, u, policy.log_prob(u)

    def candidates(policy, obs, key):
        """Draws [draws, ..., A] at each observation; their values [critics, draws, ...]."""
        distribution = actor.apply(policy["actor"], obs)
        obs = jnp.broadcast_to(obs, (NUM_CANDIDATES, *obs.shape))
        action = jnp.tanh(distribution.sample(noise_of(key, obs.shape[:-1])))
        return action, critic.apply(policy["critic"], obs, action)

    def divergence_of(state, batch, policy, u, key):
        """D [B] of `policy` at the observations of `batch`; `u` [B, A] is a draw from it."""
        if config.divergence == "none":
            return jnp.zeros(u.shape[:-1])
        if config.dual:
            params = state.params["divergence"]
            g = lambda action: divergence_critic.apply(params, batch.obs, action)[0]
            return dual_divergence(config.divergence, g(jnp.tanh(u)), g(batch.action))
        key_own, key_clone = jax.random.split(key)
        shape = NUM_DRAWS, *u.shape[:-1]
        own, clone = policy.sample(noise_of(key_own, shape)), actor.apply(batch.clone, batch.obs)
        if config.divergence == "kl":
            return kl_estimate(policy, clone, own)
        return squared_mmd(jnp.tanh(own), jnp.tanh(clone.sample(noise_of(key_clone, shape))))

    def multipliers(state):
        """Temperature and alpha, clipped to their ranges."""
        temperature, alpha = state.params["temperature"], state.params["alpha"]
        return jnp.maximum(temperature, 0.0), jnp.clip(alpha, 0.0, MAX_ALPHA)

    def critic_loss_fn(params, state, batch, key):
        key_draw, key_divergence = jax.random.split(key)
        temperature, alpha = multipliers(state)
        next_batch = batch._replace(obs=batch.next_obs, action=batch.next_action)
        policy, u, log_prob = draw(state.params["actor"], next_batch.obs, key_draw)
        next_value = critic.apply(state.target_params["critic"], next_batch.obs, jnp.tanh(u))
        next_value = mix(next_value, config.min_weight)
        divergence = divergence_of(state, next_batch, policy, u, key_divergence)
        next_value -= temperature * log_prob + config.value_penalty * alpha * divergence
        target = td_target(batch.reward, batch.terminated, next_value, config.gamma)
        value = critic.apply(params, batch.obs, batch.action)
        loss = critic_loss(value, target)
        return loss, {
            "losses/qf_loss": loss,
            "losses/q_data": value.mean(),
            "losses/target": target.mean(),
        }

    def policy_loss_fn(params, state, batch, key):
        key_draw, key_divergence = jax.random.split(key)
        temperature, alpha = multipliers(state)
        policy, u, log_prob = draw(params, batch.obs, key_draw)
        value = critic.apply(state.params["critic"], batch.obs, jnp.tanh(u))
        mixed = mix(value, config.min_weight)
        divergence = divergence_of(state, batch, policy, u, key_divergence)
        # Adam counts the gradient steps
        warm = optax.tree.get(state.opt_state["actor"], "count") <= config.warm_start
        loss = policy_loss(mixed, log_prob, divergence, temperature, alpha, warm)
        return loss, {
            "losses/policy_loss": loss,
            "losses/q_policy": value.mean(),
            "losses/entropy": -log_prob.mean(),
            "losses/divergence": divergence.mean(),
            "losses/divergence_std": divergence.std(),
            "losses/saturated_fraction": (jnp.abs(jnp.tanh(u)) > 0.99).mean(),
        }

    def divergence_loss_fn(params, state, batch, key):
        key_draw, key_between = jax.random.split(key)
        _, u, _ = draw(state.params["actor"], batch.obs, key_draw)
        weight = jax.random.uniform(key_between, (len(u), 1))
        g = lambda action: divergence_critic.apply(params, batch.obs, action)[0]
        loss, penalty = divergence_loss(config.divergence, g, jnp.tanh(u), batch.action, weight)
        return loss, {"losses/divergence_loss": loss, "losses/gradient_penalty": penalty}

    def alpha_loss_fn(alpha, state, batch, key):
        key_draw, key_divergence = jax.random.split(key)
        policy, u, _ = draw(state.params["actor"], batch.obs, key_draw)
        divergence = divergence_of(state, batch, policy, u, key_divergence)
        return alpha_loss(alpha, divergence, config.target_divergence), {}

    def temperature_loss_fn(temperature, state, batch, key):
        _, _, log_prob = draw(state.params["actor"], batch.obs, key)
        return temperature_loss(temperature, log_prob, target_entropy), {}

    # In the order of a gradient step; the gradient is with respect to the first argument.
    losses = {
        "critic": critic_loss_fn,
        "actor": policy_loss_fn,
        "divergence": divergence_loss_fn,
        "alpha": alpha_loss_fn,
        "temperature": temperature_loss_fn,
    }

    def descend(state, grads):
        """One step of the optimiser on each network in `grads`."""
        params, opt_state = dict(state.params), dict(state.opt_state)
        for name, grad in grads.items():
            direction, opt_state[name] = optimizer.update(grad, opt_state[name], params[name])
            move = lambda p, u, rate=learning_rate[name]: p - rate * u
            params[name] = jax.tree.map(move, params[name], direction)
        return state._replace(params=params, opt_state=opt_state)

    def gradient_step(state, batches, key):
        """Move the target networks, then descend on one loss after the other.

        Each loss sees the parameters that the steps before it changed. The first minibatch is for
        all losses, the others are for the divergence loss.
        """
        online = {name: state.params[name] for name in state.target_params}
        target_params = optax.incremental_update(online, state.target_params, config.polyak_tau)
        state, aux = state._replace(target_params=target_params), {}
        # A key for each loss, trained or not, and one for the further steps of the divergence.
        *keys, key_further = jax.random.split(key, len(losses) + 1)
        keys += [*jax.random.split(key_further, len(batches) - 1)]
        steps = [(name, batches[0]) for name in losses]
        steps += [("divergence", batch) for batch in batches[1:]]
        for (name, batch), key_loss in zip(steps, keys, strict=True):
            if not trained[name]:
                continue
            grad_fn = jax.grad(losses[name], has_aux=True)
            grads, loss_aux = grad_fn(state.params[name], state, batch, key_loss)
            aux |= loss_aux | {f"losses/{name}_grad_norm": optax.global_norm(grads)}
            state = descend(state, {name: grads})
        return state, aux

    def update(state, rows, clone=None):
        key, key_index, key_steps = jax.random.split(state.key, 3)
        num_batches = config.divergence_steps if config.dual else 1
        shape = config.gradient_steps, num_batches, config.batch_size
        index = jax.random.randint(key_index, shape, 0, len(rows.obs))

        def step(state, x):
            index, key = x
            minibatch = lambda i: jax.tree.map(lambda x: x[i], rows)._replace(clone=clone)
            return gradient_step(state, [minibatch(i) for i in index], key)

        xs = index, jax.random.split(key_steps, config.gradient_steps)
        state, aux = jax.lax.scan(step, state, xs)

        metrics = {name: x.mean() for name, x in aux.items()}
        metrics["losses/temperature"], metrics["losses/alpha"] = multipliers(state)
        learned = state.params, metrics["losses/qf_loss"]
        metrics["health/finite"] = common.all_finite(learned)
        metrics["charts/learning_rate"] = jnp.asarray(config.learning_rate)
        return state._replace(key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], obs)
        if greedy:
            return jnp.tanh(distribution.mean)
        return jnp.tanh(distribution.sample(noise_of(key, obs.shape[:-1])))

    def act_max_q(policy, obs, key, greedy):
        """The draw with the largest value of the first critic, greedy or not."""
        action, value = candidates(policy, obs, key)
        best = jnp.argmax(value[0], 0)[None, ..., None]
        return jnp.take_along_axis(action, best, 0)[0]

    def policy_of(state):
        return {"actor": state.params["actor"], "critic": state.params["critic"]}

    return common.Algo(init, update, act, policy_of, data, further={"max_q": act_max_q})


def make_train(config: Config):
    """The whole run as one pure function; `hparams` overrides fields of TRACEABLE with arrays.

    `data` are the arrays that `Algo.data` reads.
    """
    common.check(config)
    env = make_env(config)

    def train(key, hparams, *data):
        algo = build(common.with_hparams(config, hparams or {}, TRACEABLE), env)
        step = lambda state, _: algo.update(state, *data)
        state, metrics = jax.lax.scan(step, algo.init(key), length=config.num_updates)
        return {"state": state, "metrics": metrics}

    return train


def config_for(env: str, *presets: str, **changes) -> Config:
    """What the command line would run: defaults, the task's preset, `presets`, `changes`."""
    return launch.config_for(Config, PRESETS, env, presets, changes)


# Fields that may be arrays, so that a sweep is one more vmap: no `if`, shape or `act` reads them.
TRACEABLE = (
    "critic_lr", "learning_rate", "multiplier_lr", "polyak_tau", "alpha", "value_penalty", "gamma",
    "min_weight", "temperature", "target_entropy_mult",
)  # fmt: skip

# --- presets ---

# fmt: off
# Values that replace the defaults; docs/presets.md has their origins.
PRESETS: dict[str, dict[str, Any]] = {
    # tasks
    "pendulum": {
        "total_timesteps": 10_000, "batch_size": 128, "warm_start": 2_000,
        "hidden": (64, 64), "critic_hidden": (64, 64),
    },
    # the forms of Wu et al., on top of a task's preset
    "mmd": {"divergence": "mmd", "alpha": 1.0},
    "dual": {"divergence": "dual_kl", "alpha": 10.0, "value_penalty": 0.0, "learning_rate": 3e-6},
    "wasserstein": {"divergence": "wasserstein", "alpha": 10.0},
    "policy_regularisation": {"value_penalty": 0.0},
    "adaptive": {"train_alpha": True, "target_divergence": 0.05},
    "bear_like": {
        "divergence": "mmd", "value_penalty": 0.0, "min_weight": 0.75, "train_alpha": True,
        "target_divergence": 0.05,
    },
    "sac": {
        "divergence": "none", "warm_start": -1, "temperature": 1.0, "train_temperature": True,
        "learning_rate": 5e-4, "critic_lr": 5e-4, "multiplier_lr": 5e-4,
    },
}
# fmt: on


if __name__ == "__main__":
    launch.main("brac")

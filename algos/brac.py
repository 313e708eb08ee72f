"""Behaviour regularised actor-critic (BRAC): actor-critic on a dataset, kept near who collected it.

Wu et al. 2019, https://arxiv.org/abs/1911.11361. A divergence D(s) between the policy pi(. | s) and
the behaviour policy b(. | s) enters the policy loss and, as a value penalty, the critics' targets.
A gradient step takes a minibatch drawn uniformly with replacement and goes, in this order,

    Qbar_i <- (1 - tau) Qbar_i + tau Q_i
    y       = r + gamma (1 - terminated) (mix Qbar(s', a') - T log pi(a' | s') - p alpha D(s'))
    Q:        sum_i E[(Q_i(s, a) - y)^2]
    pi:       E[T log pi(c | s) + alpha D(s) - [t > warm_start] mix Q(s, c)]
    alpha:    -alpha E[D(s) - target]                    if it is trained
    T:         T E[-log pi(d | s) + m A]                 if it is trained

where a', c and d are drawn anew from the policy as it then is, mix Q = l min_i Q_i + (1 - l) max_i
Q_i, p is 1 (value penalty) or 0 (policy regularisation), t counts gradient steps from 0, and A is
the dimension of actions. D is estimated from

    kl           a clone of b: E[log pi(x | s) - log b(clip(x) | s)] over 4 draws x of pi
    mmd          a clone of b: squared maximum mean discrepancy of 4 draws of each
    dual_kl      no clone but a critic h = softplus(g): log h(s, x) + 1 - h(s, a)
    wasserstein  no clone but a critic g: g(s, x) - g(s, a)

with x of pi and a of the dataset. g ascends E[D] with a penalty on action gradients longer than 1,
`divergence_steps` times for each step of the policy. With `none` there is no divergence.

Differences from ppo.py:

1. Nothing is collected: all seeds share one dataset, an argument of the program. An update is a
   fixed number of gradient steps, and these are what is counted as steps.
2. The gradient of the policy goes through the action into the critics; there is no ratio.
3. The clone of seed i is the policy of seed i of a run of bc.py, and is never trained.
4. Glorot-uniform weights, ReLU, log-deviations squashed into [-5, 0]; gradients are not clipped,
   observations are not normalised.
5. Evaluations also report `max_q`: of 10 draws of the policy the one that Q_1 prefers.

    python algos/brac.py --env hopper --dataset data/hopper-eps1.npz --behavior RUN_DIR
    python algos/brac.py --env hopper --dataset data/hopper-eps1.npz --preset dual --alpha 1 10 30

Documentation: docs/brac.md
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import envs
from algos import common, datasets, launch


@dataclass(frozen=True)
class Config:
    """Settings of a run; `--help --env NAME` shows those of a task's preset."""

    env: str = "hopper"  # task that evaluates, and that the dataset is of
    dataset: str = ""  # file of transitions, or minari:NAME, see docs/datasets.md
    behavior: str = ""  # run directory of bc.py: seed i takes the clone of its seed i
    total_timesteps: int = 500_000  # gradient steps per seed

    # batch
    gradient_steps: int = 100  # gradient steps of an update
    batch_size: int = 256  # transitions of a gradient step

    # optimiser: Adam, for each network and multiplier
    critic_lr: float = 1e-3  # step size of the critics, the divergence's among them
    learning_rate: float = 3e-4  # step size of the policy
    multiplier_lr: float = 1e-3  # step size of alpha and of the temperature, if they are trained
    polyak_tau: float = 0.005  # step of the target critics towards the critics

    # divergence from the behaviour policy
    alpha: float = 0.1  # weight of the divergence
    # kl and mmd need a clone, dual_kl and wasserstein have a critic; none: SAC is --preset sac
    divergence: Literal["kl", "mmd", "dual_kl", "wasserstein", "none"] = "kl"
    value_penalty: float = 1.0  # factor on that weight in the targets; 0: policy regularisation
    train_alpha: bool = False  # let the weight follow the divergence
    target_divergence: float = 0.0  # where the weight then holds it
    divergence_steps: int = 3  # gradient steps of a dual divergence's critic per step of the policy
    warm_start: int = 20_000  # last gradient step in which the policy sees no critic

    # objective
    gamma: float = 0.99  # discount
    min_weight: float = 1.0  # weight of the smallest critic, the largest gets the rest
    temperature: float = 0.0  # weight of the entropy
    train_temperature: bool = False  # let it follow the entropy
    target_entropy_mult: float = 1.0  # mean entropy is then held at minus this for each action

    # networks
    hidden: tuple[int, ...] = (200, 200)  # hidden layers of the policy, the same as the clone's
    critic_hidden: tuple[int, ...] = (300, 300)  # hidden layers of each critic
    num_critics: int = 2  # their number
    random_targets: bool = False  # target critics start at weights of their own, as published

    @property
    def steps_per_update(self) -> int:
        """Gradient steps of an update, which is what the launcher counts."""
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
        """Raise ValueError if there is nothing to learn from, or the settings contradict."""
        if not self.dataset:
            raise ValueError("dataset='': give --dataset PATH or --dataset minari:NAME")
        for name in ("gradient_steps", "divergence_steps", "num_critics"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.behavior and not self.cloned:
            raise ValueError(
                f"behavior={self.behavior}: leave it out, {self.divergence} uses no clone"
            )
        if self.train_alpha and self.divergence == "none":
            raise ValueError("divergence=none: leave --train-alpha out, there is nothing to weigh")
        if self.train_alpha and not self.target_divergence > 0:
            raise ValueError(
                f"target_divergence={self.target_divergence:g}: with --train-alpha it has to be "
                "positive, or the weight can only grow"
            )


# Fields that may be arrays, so that a sweep is one more vmap.
TRACEABLE = ("critic_lr", "learning_rate", "multiplier_lr", "polyak_tau", "alpha", "value_penalty")
TRACEABLE += ("gamma", "min_weight", "temperature", "target_entropy_mult")

# --- presets ---

# Origins are in docs/presets.md.
PRESETS: dict[str, dict[str, Any]] = {
    # to follow a task
    "mmd": {"divergence": "mmd", "alpha": 1.0},
    "dual": {"divergence": "dual_kl", "alpha": 10.0, "value_penalty": 0.0, "learning_rate": 3e-6},
    "wasserstein": {"divergence": "wasserstein", "alpha": 10.0},
    "policy_regularisation": {"value_penalty": 0.0},
    "adaptive": {"train_alpha": True, "target_divergence": 0.05},
    "bear_like": {
        **{"divergence": "mmd", "value_penalty": 0.0, "min_weight": 0.75},
        **{"train_alpha": True, "target_divergence": 0.05},
    },
    "sac": {
        **{"divergence": "none", "warm_start": -1, "temperature": 1.0, "train_temperature": True},
        **{"learning_rate": 5e-4, "critic_lr": 5e-4, "multiplier_lr": 5e-4},
    },
    "published_targets": {"random_targets": True},
}


# --- networks ---

MIN_LOG_STD, MAX_LOG_STD = -5.0, 0.0
MAX_ACTION = 0.999  # actions that another policy is asked about are clipped to this
NUM_DRAWS = 4  # of each policy, to estimate a divergence from a clone
NUM_CANDIDATES = 10  # draws of which `max_q` plays one
MMD_SCALE = 20.0  # of the Laplacian kernel
MAX_ALPHA = 500.0
SLOPE_WEIGHT = 5.0  # of the penalty on action gradients


class MLP(nn.Module):
    """Fully connected: hidden layers with ReLU, then a linear layer of `out` units."""

    hidden: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x):
        for size in self.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=nn.initializers.glorot_uniform())(x))
        return nn.Dense(self.out, kernel_init=nn.initializers.glorot_uniform())(x)


class Actor(nn.Module):
    """Policy network, as in bc.py: observation [..., obs_size] -> common.TanhGaussian."""

    config: Config
    action_size: int

    @nn.compact
    def __call__(self, obs):
        x = obs.astype(jnp.float32)
        for size in self.config.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=nn.initializers.glorot_uniform())(x))
        out = nn.Dense(2 * self.action_size, kernel_init=nn.initializers.glorot_uniform())(x)
        mean, raw = jnp.split(out, 2, -1)
        log_std = MIN_LOG_STD + 0.5 * (MAX_LOG_STD - MIN_LOG_STD) * (jnp.tanh(raw) + 1.0)
        return common.TanhGaussian(mean, jnp.exp(log_std))


class Critic(nn.Module):
    """Values [num, ...] of observation [..., obs_size] and action [..., action_size]."""

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
        x = jnp.concatenate([obs.astype(jnp.float32), action], -1)
        return ensemble(self.config.critic_hidden, 1)(x)[..., 0]


# --- data types ---


class Batch(NamedTuple):
    """What is learned from; arrays [rows, ...]."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array
    next_action: jax.Array  # what the behaviour policy did, or would have done, there
    terminated: jax.Array


class TrainState(NamedTuple):
    """Everything that a run carries from one update to the next."""

    params: dict  # of "actor", "critic", "divergence" if it is dual, "alpha" and "temperature"
    target_params: dict  # of the target critics
    opt_state: dict  # of what is trained
    key: jax.Array
    update: jax.Array  # [] int32


# --- targets and losses ---


def given_log_prob(policy, action):
    """Log-density of actions of others, which may lie on the bounds."""
    return policy.log_prob(jnp.arctanh(jnp.clip(action, -MAX_ACTION, MAX_ACTION)))


def kl_divergence(policy, clone, u):
    """KL(policy || clone) [B], estimated from draws tanh(u), u [draws, B, A], of the policy.

    The policy's own density is exact; where its draws saturate, the clone's is that of the clipped
    action, so that the estimate is too large there and draws the policy back.
    """
    return (policy.log_prob(u) - given_log_prob(clone, jnp.tanh(u))).mean(0)


def squared_mmd(x, y):
    """Squared maximum mean discrepancy [B] of two sets of actions [draws, B, A].

    Laplacian kernel; every draw is compared with itself as well, so the estimate is biased upward.
    """
    distance = lambda x, y: jnp.abs(x[:, None] - y[None]).sum(-1)
    kernel = lambda x, y: jnp.exp(-distance(x, y) / MMD_SCALE).mean((0, 1))
    return kernel(x, x) + kernel(y, y) - 2.0 * kernel(x, y)


def dual_divergence(kind, own, given):
    """Lower bound [B] on a divergence from its critic at own and given actions."""
    if kind == "wasserstein":
        return own - given
    return jnp.log(jax.nn.softplus(own) + 1e-8) + 1.0 - jax.nn.softplus(given)


def slope_penalty(critic, own, given, weight):
    """Penalty on slopes above 1 of `critic` (actions [B, A] -> [B]) between two sets of actions.

    `weight` [B, 1] says where between them, 0 is at the own action.
    """
    between = own + weight * (given - own)
    gradient = jax.grad(lambda action: critic(action).sum())(between)
    slope = jnp.sqrt(1e-8 + (gradient**2).sum(-1))
    return SLOPE_WEIGHT * (jnp.maximum(slope - 1.0, 0.0) ** 2).mean()


def divergence_loss(kind, critic, own, given, weight):
    """Loss whose descent raises the bound that `critic` gives, and the penalty on slopes in it."""
    penalty = slope_penalty(critic, own, given, weight)
    return penalty - dual_divergence(kind, critic(own), critic(given)).mean(), penalty


def mix(value, min_weight):
    """Weighted smallest and largest of the critics' values [num_critics, B]."""
    return min_weight * value.min(0) + (1.0 - min_weight) * value.max(0)


def penalised_target(batch, next_value, log_prob, divergence, gamma, temperature, penalty):
    """Targets [B] from the mixed value, log-probability and divergence at the next state."""
    value = next_value - temperature * log_prob - penalty * divergence
    target = batch.reward + jnp.where(batch.terminated, 0.0, gamma) * value
    return jax.lax.stop_gradient(target)


def critic_loss(value, target):
    """Sum over critics of the mean squared error of values [num_critics, B] to targets [B]."""
    return ((value - target) ** 2).mean(-1).sum()


def policy_loss(value, log_prob, divergence, temperature, alpha, warm):
    """Mean over states; while `warm`, the value does not count."""
    temperature, alpha = jax.lax.stop_gradient((temperature, alpha))
    return (temperature * log_prob + alpha * divergence - jnp.where(warm, 0.0, value)).mean()


@jax.custom_vjp
def clamp(x, high):
    """clip(x, 0, high), whose gradient can always bring x back into the range."""
    return jnp.clip(x, 0.0, high)


def _clamp_forward(x, high):
    return clamp(x, high), (x, high)


def _clamp_backward(saved, grad):
    x, high = saved
    passes = jnp.where(grad > 0.0, x > 0.0, x < high)  # a positive gradient lowers x
    return jnp.where(passes, grad, 0.0), None


clamp.defvjp(_clamp_forward, _clamp_backward)


def alpha_loss(alpha, divergence, target):
    """Loss whose gradient raises the weight while the divergence is above its target."""
    return -clamp(alpha, MAX_ALPHA) * jax.lax.stop_gradient(divergence - target).mean()


def temperature_loss(temperature, log_prob, target_entropy):
    """Loss whose gradient raises the weight while the entropy is below its target."""
    surplus = jax.lax.stop_gradient(-log_prob - target_entropy).mean()
    return clamp(temperature, jnp.inf) * surplus


# --- build ---


def build(config: Config) -> common.Algo:
    """Compose environment, networks and optimiser into the pure functions of a run."""
    config.validate()
    env = envs.make(config.env, 1)
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions, and BRAC needs continuous ones")
    if env.privileged_size:
        raise ValueError(f"{env.name}: the actor would see what only a critic may: no privileged=1")
    actor, critic = Actor(config, env.action_size), Critic(config, config.num_critics)
    divergence_critic = Critic(config, 1)
    optimizer = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-7)
    target_entropy = -config.target_entropy_mult * env.action_size
    learning_rate = {"critic": config.critic_lr, "actor": config.learning_rate}
    if config.dual:
        learning_rate["divergence"] = config.critic_lr
    if config.train_alpha:
        learning_rate["alpha"] = config.multiplier_lr
    if config.train_temperature:
        learning_rate["temperature"] = config.multiplier_lr

    def data(seeds):
        dataset = datasets.load(config.dataset, env)
        rows = Batch(*(getattr(dataset, name) for name in Batch._fields))
        if not config.cloned:
            return (rows,), ()
        return (rows,), (datasets.load_clones(config.behavior, env, config.hidden, seeds),)

    def init(key) -> TrainState:
        key_actor, key_critic, key_divergence, key_target, key = jax.random.split(key, 5)
        sample, action = jnp.zeros((1, env.obs_size)), jnp.zeros((1, env.action_size))
        params = {
            "actor": actor.init(key_actor, sample),
            "critic": critic.init(key_critic, sample, action),
            "alpha": jnp.float32(config.alpha),
            "temperature": jnp.float32(config.temperature),
        }
        if config.dual:
            params["divergence"] = divergence_critic.init(key_divergence, sample, action)
        target_params = params["critic"]
        if config.random_targets:
            target_params = critic.init(key_target, sample, action)
        opt_state = {name: optimizer.init(params[name]) for name in learning_rate}
        return TrainState(params, target_params, opt_state, key, jnp.zeros((), jnp.int32))

    def draw(actor_params, obs, key):
        """The policy, a draw u of it, and its log-probability."""
        policy = actor.apply(actor_params, obs)
        u = policy.sample(jax.random.normal(key, policy.mean.shape))
        return policy, u, policy.log_prob(u)

    def divergence_of(params, clone, policy, u, obs, action, key):
        """D [B] of the policy at `obs`; `u` is its draw, `action` the dataset's."""
        if config.divergence == "none":
            return jnp.zeros(u.shape[:-1])
        if config.dual:
            g = lambda action: divergence_critic.apply(params["divergence"], obs, action)[0]
            return dual_divergence(config.divergence, g(jnp.tanh(u)), g(action))
        key_own, key_clone = jax.random.split(key)
        noise = lambda key: jax.random.normal(key, (NUM_DRAWS, *u.shape))
        own, behavior = policy.sample(noise(key_own)), actor.apply(clone, obs)
        if config.divergence == "kl":
            return kl_divergence(policy, behavior, own)
        return squared_mmd(jnp.tanh(own), jnp.tanh(behavior.sample(noise(key_clone))))

    def critic_loss_fn(critic_params, params, target_params, clone, batch, key):
        key_draw, key_divergence = jax.random.split(key)
        policy, u, log_prob = draw(params["actor"], batch.next_obs, key_draw)
        next_value = critic.apply(target_params, batch.next_obs, jnp.tanh(u))
        divergence = divergence_of(
            params, clone, policy, u, batch.next_obs, batch.next_action, key_divergence
        )
        target = penalised_target(
            batch,
            mix(next_value, config.min_weight),
            log_prob,
            divergence,
            config.gamma,
            clamp(params["temperature"], jnp.inf),
            config.value_penalty * clamp(params["alpha"], MAX_ALPHA),
        )
        value = critic.apply(critic_params, batch.obs, batch.action)
        loss = critic_loss(value, target)
        return loss, {
            "losses/qf_loss": loss,
            "losses/q_data": mix(value, config.min_weight).mean(),
            "losses/target": target.mean(),
        }

    def policy_loss_fn(actor_params, params, warm, clone, batch, key):
        key_draw, key_divergence = jax.random.split(key)
        policy, u, log_prob = draw(actor_params, batch.obs, key_draw)
        value = mix(critic.apply(params["critic"], batch.obs, jnp.tanh(u)), config.min_weight)
        divergence = divergence_of(
            params, clone, policy, u, batch.obs, batch.action, key_divergence
        )
        temperature = clamp(params["temperature"], jnp.inf)
        alpha = clamp(params["alpha"], MAX_ALPHA)
        loss = policy_loss(value, log_prob, divergence, temperature, alpha, warm)
        return loss, {
            "losses/policy_loss": loss,
            "losses/q_policy": value.mean(),
            "losses/entropy": -log_prob.mean(),
            "losses/divergence": divergence.mean(),
            "losses/divergence_std": divergence.std(),
            "losses/saturated_fraction": (jnp.abs(jnp.tanh(u)) > 0.99).mean(),
        }

    def divergence_loss_fn(critic_params, params, batch, key):
        key_draw, key_between = jax.random.split(key)
        own = jnp.tanh(draw(params["actor"], batch.obs, key_draw)[1])
        weight = jax.random.uniform(key_between, (len(own), 1))
        g = lambda action: divergence_critic.apply(critic_params, batch.obs, action)[0]
        loss, penalty = divergence_loss(config.divergence, g, own, batch.action, weight)
        return loss, {"losses/divergence_critic": loss, "losses/slope_penalty": penalty}

    def alpha_loss_fn(alpha, params, clone, batch, key):
        key_draw, key_divergence = jax.random.split(key)
        policy, u, _ = draw(params["actor"], batch.obs, key_draw)
        divergence = divergence_of(
            params, clone, policy, u, batch.obs, batch.action, key_divergence
        )
        return alpha_loss(alpha, divergence, config.target_divergence), {}

    def temperature_loss_fn(temperature, params, batch, key):
        log_prob = draw(params["actor"], batch.obs, key)[2]
        return temperature_loss(temperature, log_prob, target_entropy), {}

    def descend(name, loss_fn, params, opt_state, *args):
        """One step of Adam on one network or multiplier: params, opt_state, metrics."""
        grads, aux = jax.grad(loss_fn, has_aux=True)(params[name], params, *args)
        direction, new = optimizer.update(grads, opt_state[name])
        move = lambda p, u: p - learning_rate[name] * u
        params = params | {name: jax.tree.map(move, params[name], direction)}
        return params, opt_state | {name: new}, aux

    def gradient_step(state, batches, clone, t, key):
        """Target critics, critics, policy, the divergence's critic, multipliers, in this order."""
        keys = jax.random.split(key, 6)
        batch = jax.tree.map(lambda x: x[0], batches)
        target_params = optax.incremental_update(
            state.params["critic"], state.target_params, config.polyak_tau
        )
        learned, metrics = (state.params, state.opt_state), {}

        def take(name, loss_fn, *args):
            nonlocal learned, metrics
            *learned, aux = descend(name, loss_fn, *learned, *args)
            metrics |= aux

        take("critic", critic_loss_fn, target_params, clone, batch, keys[0])
        take("actor", policy_loss_fn, t <= config.warm_start, clone, batch, keys[1])
        if config.dual:
            take("divergence", divergence_loss_fn, batch, keys[2])
        if config.train_alpha:
            take("alpha", alpha_loss_fn, clone, batch, keys[3])
        if config.train_temperature:
            take("temperature", temperature_loss_fn, batch, keys[4])
        if config.dual:  # its critic goes on alone, on minibatches of its own
            for i, key in enumerate(jax.random.split(keys[5], config.divergence_steps - 1), 1):
                batch = jax.tree.map(lambda x, i=i: x[i], batches)
                take("divergence", divergence_loss_fn, batch, key)
        params, opt_state = learned
        state = state._replace(params=params, target_params=target_params, opt_state=opt_state)
        return state, metrics

    def update(state, rows, clone=None):
        key, key_index, key_steps = jax.random.split(state.key, 3)
        batches = config.divergence_steps if config.dual else 1
        shape = config.gradient_steps, batches, config.batch_size
        index = jax.random.randint(key_index, shape, 0, len(rows.obs))
        first = state.update * config.gradient_steps

        def step(carry, x):
            t, index, key = x
            batches = jax.tree.map(lambda x: x[index], rows)
            return gradient_step(carry, batches, clone, t, key)

        keys = jax.random.split(key_steps, config.gradient_steps)
        xs = first + jnp.arange(config.gradient_steps), index, keys
        state, aux = jax.lax.scan(step, state, xs)
        metrics = {name: x.mean() for name, x in aux.items()}
        metrics["losses/alpha"] = clamp(state.params["alpha"], MAX_ALPHA)
        metrics["losses/temperature"] = clamp(state.params["temperature"], jnp.inf)
        metrics["health/finite"] = common.all_finite((state.params, metrics["losses/qf_loss"]))
        metrics["charts/learning_rate"] = jnp.asarray(config.learning_rate)
        return state._replace(key=key, update=state.update + 1), metrics

    def act(policy, obs, key, greedy):
        distribution = actor.apply(policy["actor"], obs)
        noise = 0.0 if greedy else jax.random.normal(key, distribution.mean.shape)
        return jnp.tanh(distribution.sample(noise))

    def act_max_q(policy, obs, key, _):
        """Of several draws the one that the first critic prefers."""
        distribution = actor.apply(policy["actor"], obs)
        noise = jax.random.normal(key, (NUM_CANDIDATES, *distribution.mean.shape))
        actions = jnp.tanh(distribution.sample(noise))
        value = jax.vmap(lambda a: critic.apply(policy["critic"], obs, a)[0])(actions)
        best = jnp.argmax(value, 0)[None, ..., None]
        return jnp.take_along_axis(actions, best, 0)[0]

    def policy_of(state):
        return {"actor": state.params["actor"], "critic": state.params["critic"]}

    return common.Algo(init, update, act, policy_of, data, further={"max_q": act_max_q})


def make_train(config: Config):
    """The whole run as one pure function; `hparams` overrides fields of TRACEABLE with arrays.

    The rest are the arrays of `build(config).data(seeds)`: rows, which all seeds share, and the
    clone of the seed, if the divergence needs one.
    """
    build(config)  # fails here, not while tracing, if the configuration is wrong

    def train(key, hparams, rows, *clone):
        algo = build(replace(config, **common.traceable(hparams or {}, TRACEABLE)))
        step = lambda state, _: algo.update(state, rows, *clone)
        state, metrics = jax.lax.scan(step, algo.init(key), length=config.num_updates)
        return {"state": state, "metrics": metrics}

    return train


def main():
    """Train from the command line."""
    launch.main("brac", Config, PRESETS, TRACEABLE, build)


if __name__ == "__main__":
    main()

"""Variance of BPO's value targets and gradients when pi acts, when mu acts, and with a centred mu.

    python experiments/return_variance.py --out runs/variance
    python experiments/return_variance.py --run-dir runs/... --out runs/cartpole

Without --run-dir: the exact variance on a task of two states, by dynamic programming, for value
targets without clipping and with lambda = 1.

With --run-dir: a Monte Carlo estimate on the task of a run of `algos/bpo.py`, at its last
checkpoint. In each of --starts environments, pi plays --num-steps from the start of an episode.
From the state where it is then, pi and the behaviour policies play --num-steps again, --repeats
times. Every rollout gives one value target by the run's own estimator and by two others, and one
policy gradient of its first action, ratio A grad log pi(a | s), with and without the clipping of
the surrogate loss. The variance of a gradient is the trace of its covariance, and its mean the norm
of the mean. Rewards are normalised if the run normalises them, advantages are not. The closed form
of mu exists for discrete actions only, and leaves out the bounds used in training. The number after
a variance is its standard error over states. The last column compares with pi in the same states:
geometric mean of the ratio of the two variances [95 % interval over states].
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import envs
from algos import bpo, common
from algos.launch import cli, logs, policies, program, report, rundir

# --- exact ---


class TabularTask(NamedTuple):
    """Task of S states and A actions that never ends, with deterministic rewards."""

    reward: np.ndarray  # [S, A]
    transition: np.ndarray  # [S, A, S]
    policy: np.ndarray  # [S, A], pi
    gamma: float


MDP_X = TabularTask(
    reward=np.array([[1.0, 0.0], [2.0, -1.0]]),
    transition=np.array([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]]),
    policy=np.array([[0.6, 0.4], [0.3, 0.7]]),
    gamma=0.9,
)


class Solution(NamedTuple):
    """Values and moments of pi, and the behaviour policies made of them."""

    v: np.ndarray  # [S]
    q: np.ndarray  # [S, A]
    r_hat: np.ndarray  # [S, A] reward of the second moment
    qhat: np.ndarray  # [S, A] second moment of the return
    mu_hat: np.ndarray  # [S, A]
    mu_centred: np.ndarray  # [S, A]


def action_values(task: TabularTask, reward: np.ndarray, gamma: float) -> np.ndarray:
    """Discounted sum of `reward` [S, A] under pi, [S, A]."""
    mean_reward = (task.policy * reward).sum(-1)
    kernel = np.einsum("sa,saz->sz", task.policy, task.transition)
    v = np.linalg.solve(np.eye(len(mean_reward)) - gamma * kernel, mean_reward)
    return reward + gamma * task.transition @ v


def proportional(weight: np.ndarray) -> np.ndarray:
    """Policy [S, A] proportional to `weight`."""
    return weight / weight.sum(-1, keepdims=True)


def solve(task: TabularTask) -> Solution:
    """Moments of pi's return, and the behaviour policies, exactly."""
    q = action_values(task, task.reward, task.gamma)
    v = (task.policy * q).sum(-1)
    r_hat = 2.0 * task.reward * q - task.reward**2
    qhat = action_values(task, r_hat, task.gamma**2)
    centred = qhat - 2.0 * v[:, None] * q + v[:, None] ** 2
    return Solution(
        *(v, q, r_hat, qhat),
        mu_hat=proportional(task.policy * np.sqrt(qhat)),
        mu_centred=proportional(task.policy * np.sqrt(centred)),
    )


def one_step_moment(task: TabularTask, baseline: np.ndarray) -> np.ndarray:
    """E[(R + gamma v(S') - baseline)^2 | s, a], [S, A], of pi's value v."""
    v = solve(task).v
    q = task.reward + task.gamma * task.transition @ v
    spread = task.transition @ v**2 - (task.transition @ v) ** 2
    return (q - baseline[:, None]) ** 2 + task.gamma**2 * spread


def variance(task: TabularTask, mu: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Variance [S] of ratio (R + gamma G' - baseline) + baseline, the unclipped target at lambda 1.

    Baseline 0 is per-decision importance sampling.
    """
    weight = task.policy**2 / mu
    v = solve(task).v
    own = (weight * one_step_moment(task, baseline)).sum(-1) - (v - baseline) ** 2
    kernel = task.gamma**2 * np.einsum("sa,saz->sz", weight, task.transition)
    return np.linalg.solve(np.eye(len(v)) - kernel, own)


def best_pdis_policy(task: TabularTask) -> np.ndarray:
    """Behaviour policy [S, A] of the least variance when all later steps use it too."""
    zero = np.zeros(len(task.policy))
    mu = task.policy
    for _ in range(100):
        later = task.gamma**2 * task.transition @ variance(task, mu, zero)
        mu = proportional(task.policy * np.sqrt(one_step_moment(task, zero) + later))
    return mu


def exact_rows() -> list[dict]:
    """Variance of each estimate under each behaviour policy on MDP_X."""
    exact = solve(MDP_X)
    zero = np.zeros(2)
    return [
        {"task": "MDP-X", "estimate": estimate, "acting": name, "variance": list(variance(*args))}
        for name, mu in [
            ("pi", MDP_X.policy),
            ("mu", exact.mu_hat),
            ("mu centred", exact.mu_centred),
            ("best for PDIS", best_pdis_policy(MDP_X)),
        ]
        for estimate, args in [
            ("PDIS", (MDP_X, mu, zero)),
            ("V-trace, exact V", (MDP_X, mu, exact.v)),
        ]
    ]


# --- sampled ---


def pdis_estimator(reward, next_value, terminated, done, log_ratio, gamma):
    """Per-decision importance sampling: targets G_t = ratio_t (r_t + gamma G_{t+1}), [T, N].

    The value of the true successor stands for G at the end of the rollout and at a time limit.
    """
    end_value = jnp.where(terminated, 0.0, next_value)

    def backward(later, step):
        reward, end_value, done, log_ratio = step
        target = jnp.exp(log_ratio) * (reward + gamma * jnp.where(done, end_value, later))
        return target, target

    steps = reward, end_value, done, log_ratio
    return jax.lax.scan(backward, end_value[-1], steps, reverse=True)[1]


def gradient_weight(ratio, advantage, clip_eps):
    """Factor of grad log pi in the gradient of PPO's clipped surrogate; arrays of one shape."""
    clipped = jnp.where(advantage > 0.0, ratio > 1.0 + clip_eps, ratio < 1.0 - clip_eps)
    return jnp.where(clipped, 0.0, ratio * advantage)


def gradient_spread(weight, score):
    """Norm of the mean, and trace of the covariance, of R gradients weight [R] x score [R, P]."""
    gradient = weight[:, None] * score
    return jnp.linalg.norm(gradient.mean(0)), gradient.var(0, ddof=1).sum()


def relative(spread, of_pi):
    """Geometric mean of spread / of_pi [starts], and its 95 % interval by a normal distribution.

    None in place of numbers if a variance is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(np.asarray(spread, np.float64) / np.asarray(of_pi, np.float64))
    if not np.isfinite(log).all():
        return [None] * 3
    half = 1.96 * log.std(ddof=1) / np.sqrt(len(log))
    return rundir.jsonable(np.exp(log.mean() + np.array([0.0, -half, half])))


class Networks(NamedTuple):
    """Networks of one trained seed, as functions of observations [N, obs_size]."""

    policies: dict[str, Callable]  # pi and the behaviour policies, by name
    value: Callable
    score: Callable  # obs [obs_size], action -> gradient of log pi with respect to pi's parameters
    reward_scale: float


def read_networks(run: rundir.Run, config: bpo.Config, algo: Any, env: envs.Env, row: int):
    """Networks of the last checkpoint; `row` counts the seeds of the run."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(run.seeds, jnp.uint32))
    axes = program.per_row(bpo.TrainState, 0, None)
    template = jax.eval_shape(jax.vmap(algo.init, out_axes=axes), keys)
    state, _ = rundir.load_tree(rundir.checkpoints(run.path)[-1], template)
    params, obs_stats, reward_scale = jax.tree.map(
        lambda x: jnp.asarray(x[row]), (state.params, state.obs_stats, state.reward_scale)
    )
    actor = bpo.Actor(config, env.obs_shape, env.action_size, env.discrete)
    critic = bpo.Critic(config, env.obs_shape)
    q_network = partial(bpo.ActionCritic, config, env.obs_shape, env.action_size, env.discrete)

    def normalize(obs):
        return obs_stats.normalize(obs.astype(jnp.float32)) if config.normalize_obs else obs

    def value(obs):
        return critic.apply(params["critic"], normalize(obs))

    def score(obs, action):
        log_prob = lambda actor_params: actor.apply(actor_params, normalize(obs)).log_prob(action)
        return ravel_pytree(jax.grad(log_prob)(params["actor"]))[0]

    def network(name):
        return lambda obs: actor.apply(params[name], normalize(obs))

    def closed_form(centred):
        def policy(obs):
            q, qhat = (
                q_network(positive=positive).apply(params[name], normalize(obs))
                for name, positive in (("q", False), ("qhat", True))
            )
            if config.symlog_targets:
                q, qhat = bpo.symexp(q), bpo.symexp(qhat)
            moment = bpo.centred_moment(qhat, q, value(obs)[:, None]) if centred else qhat
            log_pi = acting["pi"](obs).logits
            return common.Categorical(bpo.mu_target(log_pi, jnp.maximum(moment, 1e-6)))

        return policy

    acting = {"pi": network("actor"), "mu as trained": network("mu")}
    if env.discrete:
        acting |= {"mu in closed form": closed_form(False), "mu centred": closed_form(True)}
    scale = reward_scale.factor() if config.normalize_reward else 1.0
    return Networks(acting, value, score, scale)


def sampled_rows(run_dir: Path, row: int, starts: int, repeats: int, num_steps: int) -> list[dict]:
    """Variance of estimates over `repeats` rollouts of `num_steps`, averaged over start states.

    Pi reaches the start states in `num_steps`. Raises ValueError if this is no run of BPO with a
    checkpoint, or if it holds noise, clips trajectories or sweeps a field.
    """
    run = rundir.read_run(run_dir)
    if run.algo != "bpo" or not rundir.checkpoints(run.path):
        raise ValueError(f"{run_dir} is not a run of bpo with a checkpoint")
    config = rundir.from_json(bpo.Config, run.config)
    _, algo = policies.load_algo("bpo", run.config)
    if config.noise_interval > 1 or config.clip_traj or any(run.labels):
        raise ValueError(
            f"{run_dir} holds noise, clips trajectories or sweeps a field: train again"
        )
    few = envs.make(config.env, starts, stagger=False)
    many = envs.make(config.env, starts * repeats, stagger=False)
    if not 0 <= row < len(run.seeds):
        raise ValueError(f"--row {row}: the run has rows 0 to {len(run.seeds) - 1}")
    networks = read_networks(run, config, algo, few, row)
    noise_of = jax.random.gumbel if few.discrete else jax.random.normal

    def play(env, acting, carry, key):
        def step(carry, key):
            obs, env_state = carry
            key_act, key_env = jax.random.split(key)
            mu = acting(obs)
            action = mu.sample(noise_of(key_act, (env.num_envs, env.action_size)))
            log_ratio = networks.policies["pi"](obs).log_prob(action) - mu.log_prob(action)
            log_ratio = jnp.clip(log_ratio, -20.0, 20.0)
            next_obs, env_state, reward, terminated, truncated, info = env.step(
                key_env, env_state, action
            )
            value, next_value = networks.value(obs), networks.value(info["final_observation"])
            reward = reward * networks.reward_scale
            done = terminated | truncated
            rollout = reward, value, next_value, terminated, done, log_ratio
            return (next_obs, env_state), (action, rollout)

        return jax.lax.scan(step, carry, jax.random.split(key, num_steps))

    gamma, lam, clips = config.gamma, config.gae_lambda, (config.clip_rho, config.clip_c)

    @partial(jax.jit, static_argnames="acting")
    def measure(carry, key, acting):
        """Mean and variance [starts] of each estimate."""
        actions, rollout = play(many, networks.policies[acting], carry, key)[1]
        reward, _, next_value, terminated, done, log_ratio = rollout
        advantage, target = bpo.step_estimator(*rollout, gamma, lam, *clips)
        unclipped = bpo.step_estimator(*rollout, gamma, 1.0, jnp.inf, jnp.inf)[1]
        split = lambda x: x.reshape((starts, repeats, *x.shape[1:]))
        targets = {
            "value target as trained": target[0],
            "V-trace, no clipping, lambda 1": unclipped[0],
            "PDIS": pdis_estimator(reward, next_value, terminated, done, log_ratio, gamma)[0],
        }
        result = {k: (split(x).mean(-1), split(x).var(-1, ddof=1)) for k, x in targets.items()}
        weights = {
            name: gradient_weight(jnp.exp(log_ratio[0]), advantage[0], clip_eps)
            for name, clip_eps in (("gradient as trained", config.clip_eps), ("gradient", jnp.inf))
        }

        def spreads(data):
            weights, obs, action = data
            score = jax.vmap(networks.score)(obs, action)
            return {name: gradient_spread(weight, score) for name, weight in weights.items()}

        data = jax.tree.map(split, (weights, carry[0], actions[0]))
        result |= jax.lax.map(spreads, data)  # one start at a time, to save memory
        return result

    key_reset, key_start, key_play = jax.random.split(jax.random.key(0), 3)
    start, _ = jax.jit(partial(play, few, networks.policies["pi"]))(few.reset(key_reset), key_start)
    carry = jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=0), start)
    found = {acting: measure(carry, key_play, acting) for acting in networks.policies}
    rows = []
    for acting, estimates in found.items():
        for name, (mean, spread) in estimates.items():
            row = {"task": config.env, "estimate": name, "acting": acting}
            row |= {"mean": float(mean.mean()), "variance": float(spread.mean())}
            row["error"] = float(spread.std() / np.sqrt(starts))
            if acting != "pi":
                row["relative"] = relative(spread, found["pi"][name][1])
            rows.append(row)
    return rows


# --- output ---


def markdown(rows: list[dict]) -> str:
    """Table of the rows."""
    cells = []
    for row in rows:
        values = ", ".join(f"{x:.4g}" for x in np.atleast_1d(row["variance"]))
        error = f" ± {row['error']:.2g}" if "error" in row else ""
        ratio = row.get("relative", [None])
        compared = "" if None in ratio else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)
        cells.append([row["task"], row["estimate"], row["acting"], values + error, compared])
    return report.table(["task", "estimate", "acting", "variance", "relative to pi"], cells)


@logs.steady()
def main(argv: list[str] | None = None):
    """Measure from the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--run-dir", type=cli.path, help="finished run of algos/bpo.py; without it: MDP-X, exactly"
    )
    parser.add_argument("--row", type=cli.integer, default=0, help="which seed of the run")
    parser.add_argument("--starts", type=cli.integer, default=32, help="start states")
    parser.add_argument("--repeats", type=cli.integer, default=256, help="rollouts from each")
    parser.add_argument("--num-steps", type=cli.integer, default=128, help="length of a rollout")
    parser.add_argument(
        "--out", type=cli.path, required=True, help="files to write, without suffix"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    parser.needs(args, "run_dir", "row", "starts", "repeats", "num_steps")
    if args.repeats < 2 or args.starts < 2 or args.num_steps < 1:
        parser.error("--starts and --repeats must be at least 2, and --num-steps at least 1")
    try:
        program.setup_jax(1)
        table, numbers = rundir.measurement_files(args.out, args.force)
        rows = exact_rows()
        if args.run_dir:
            rows = sampled_rows(args.run_dir, args.row, args.starts, args.repeats, args.num_steps)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(markdown(rows))
    rundir.write_text(table, markdown(rows))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "force")}
    settings["run_dir"] = args.run_dir and str(args.run_dir)
    rundir.write_json(numbers, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()

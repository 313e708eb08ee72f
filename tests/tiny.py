"""Tiny runs of every algorithm; tests share them, so that one compilation serves many."""

import atexit
import dataclasses
import importlib
import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from algos import bnpo, common
from algos.launch import datasets, policies, program, rundir
from algos.launch.cli import Launch
from algos.launch.rows import Rows, inputs
from envs import gymnax
from envs.wrappers import Goals, RawEnv

# Transitions that offline algorithms learn from, written below.
DATASET = Path(tempfile.mkdtemp()) / "balance.npz"
atexit.register(shutil.rmtree, DATASET.parent)

# A new algorithm is one more name, with what its smallest run needs beside SHARED.
ALGOS = {
    "ppo": {},
    "bpo": {
        "replay_rollouts": 2,
        "num_vf_epochs": 1,
        "num_vf_minibatches": 2,
        "num_mu_epochs": 1,
        "num_mu_minibatches": 2,
    },
    "reppo": {
        "env": "tiny:balance",
        "reward_scale": 0.1,
        "critic_width": 8,
        "num_bins": 29,
        "vmin": -2.0,
        "vmax": 12.0,
        "kl_samples": 2,
    },
    "reppo_discrete": {
        "target_entropy_mult": 0.0,  # the best policies of the probes are deterministic
        "reward_scale": 0.1,
        "critic_width": 8,
        "num_bins": 29,
        "vmin": -2.0,
        "vmax": 12.0,
    },
    "p3o": {"replay_fraction": 0.5, "sample_mult": 2, "log_std_init": -1.0},
    "bnpo": {
        "env": "tiny:seek",
        "brains": (
            dataclasses.replace(
                bnpo.PPO_BRAIN,
                buffer_size=64,
                batch_size=16,
                learning_starts=20,
                turn_interval=8,
                turn_minibatches=2.0,
            ),
            dataclasses.replace(
                bnpo.DDPG_BRAIN,
                buffer_size=128,
                batch_size=8,
                her_ratio=0.5,
                learning_starts=60,
                turn_interval=4,
            ),
        ),
        "max_nstep": 3,
        "param_noise_interval": 8,
    },
    "sac": {
        "env": "tiny:balance",
        "reward_scale": 0.1,
        "updates_per_step": 0.125,
        "batch_size": 16,
        "buffer_size": 4 * 32,
        "learning_starts": 32,
        "critic_hidden": (8,),
    },
    "bc": {"env": "tiny:balance", "dataset": str(DATASET), "gradient_steps": 32, "batch_size": 16},
    "brac": {
        "env": "tiny:balance",
        "dataset": str(DATASET),
        "divergence": "dual_kl",
        "warm_start": 64,
        "gradient_steps": 32,
        "batch_size": 16,
        "critic_hidden": (8,),
    },
    "bcq": {
        "env": "tiny:balance",
        "dataset": str(DATASET),
        "gradient_steps": 32,
        "batch_size": 16,
        "critic_hidden": (8,),
        "vae_hidden": (8,),
    },
}

# Tasks of both kinds of actions, for the algorithms that know that kind.
TASKS = {"discrete": "cartpole", "continuous": "pendulum"}
KINDS = dict.fromkeys(ALGOS, tuple(TASKS)) | {
    "reppo": ("continuous",),
    "reppo_discrete": ("discrete",),
    "bnpo": ("continuous",),
    "sac": ("continuous",),
    "bc": ("continuous",),
    "brac": ("continuous",),
    "bcq": ("continuous",),
}
GOALS = {"bnpo"}  # the tiny task has goals, which those above have not
OFFLINE = {"bc", "brac", "bcq"}  # they learn from DATASET
RANDOM = {"bcq"}  # they draw also when they act greedily
ASYMMETRIC = {"reppo"}  # the critic may see what the actor does not

SHARED = {
    "env": "cartpole",
    "total_timesteps": 6 * 32,
    "num_envs": 4,
    "num_steps": 8,
    "num_epochs": 2,
    "num_minibatches": 2,
    "hidden": (8,),
    "anneal_lr": True,
    "normalize_obs": True,
    "normalize_reward": True,
}

LAUNCH = Launch(num_seeds=2, eval_episodes=2, num_evals=2)


def balance():
    """Cartpole for a continuous action: its sign is the side to push to."""
    raw = gymnax.make("CartPole-v1")
    step = lambda key, state, action: raw.step(key, state, jnp.int32(action[0] > 0))
    return raw._replace(step=step, action_size=1, discrete=False)


def seek():
    """`balance` with goals: a speed of the angle. It ends when the cart is fast, and pays 1 anyway.

    A second action does nothing.
    """
    raw = balance()

    def step(key, state, action):
        obs, state, reward, terminated, info = raw.step(key, state, action)
        return obs, state, reward, terminated | (jnp.abs(obs[1]) > 0.5), info

    def compute_reward(achieved, goal, kind):
        if kind == "env":
            return jnp.ones_like(goal)
        return jnp.concatenate([0.1 * (jnp.abs(achieved - goal) < 0.3), -0.1 * jnp.abs(goal)], -1)

    goals = Goals(
        achieved_goal=lambda obs: obs[..., 1:2],
        desired_goal=lambda obs: obs[..., 3:],
        with_goal=lambda obs, goal: jnp.concatenate([obs[..., :3], goal], -1),
        compute_reward=compute_reward,
        kinds=("env", "proxy"),
        moving=True,
    )
    return raw._replace(step=step, action_size=2, goals=goals)


def counter(discrete=False):
    """Observes how many of its 4 steps an episode has had, and has left."""
    observe = lambda t: jnp.stack([t, 4.0 - t])
    step = lambda key, t, action: (observe(t + 1.0), t + 1.0, 1.0, False, {})
    reset = lambda key: (observe(jnp.zeros(())), jnp.zeros(()))
    return RawEnv(reset, step, 2, (2,), 2, discrete, 4, "cached")


counter_discrete = partial(counter, discrete=True)


def successors(truncated):
    """Observations [T, N, 2] of `counter` after each step: before a reset, and after it."""
    count, true = np.zeros(truncated.shape[1]), []
    for ends in truncated:
        count = count + 1
        true.append(count)
        count = np.where(ends, 0.0, count)
    true = np.stack(true)
    shown = np.where(truncated, 0.0, true)
    return tuple(np.stack([t, 4.0 - t], -1).astype(np.float32) for t in (true, shown))


def transitions(n, obs_size=4, action_size=1, seed=0):
    """A dataset of noise, in which every tenth step fails and every tenth is cut."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, n, obs_size)).astype(np.float32)
    action, next_action = rng.uniform(-1, 1, size=(2, n, action_size)).astype(np.float32)
    step = np.arange(n) % 10
    reward = rng.normal(size=n).astype(np.float32)
    return datasets.Dataset(obs, action, reward, next_obs, next_action, step == 4, step == 9)


def write_policy(path, name, **changes):
    """A policy's file, with numbers in which no bias is 0 and no statistic that of an empty one."""
    config = config_of(name, **changes)
    env = module_of(name).make_env(config)
    algo = module_of(name).build(config, env)
    policy = algo.policy_of(jax.jit(algo.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    random = {k: np.float32(x + rng.uniform(-0.5, 0.5, x.shape)) for k, x in arrays(policy).items()}
    random |= {k: np.abs(x) + 0.1 for k, x in random.items() if k.endswith(".var")}
    policies.save_policy(path, random, name, config, policies.interface_of(env), {"seed": 0})
    return path


def write_clones(run_dir):
    """A run directory as bc.py leaves it, with seeds 3 and 4."""
    config = config_of("bc")
    description = {"algo": "bc", "config": dataclasses.asdict(config), "launch": {}}
    description["rows"] = {"seeds": [3, 4], "labels": ["", ""]}
    run_dir.mkdir()
    rundir.write_json(run_dir / "config.json", description)
    for row, seed in enumerate((3, 4)):
        params = module_of("bc").Actor(config, 1).init(jax.random.key(seed), jnp.zeros((1, 4)))
        arrays = rundir.flatten({"actor": params})
        rundir.save_arrays(run_dir / f"policy_s{row:03d}.npz", arrays, {"seed": seed})
    return run_dir


datasets.write(DATASET, transitions(64), {"env": "tiny:balance"})


def module_of(name):
    return importlib.import_module(f"algos.{name}")


def config_of(name, **changes):
    """The tiny Config of an algorithm."""
    config_type = module_of(name).Config
    known = {field.name for field in dataclasses.fields(config_type)}
    shared = {k: v for k, v in SHARED.items() if k in known}
    return config_type(**(shared | ALGOS[name] | changes))


def build(name, config):
    """The Algo of a checked configuration, in the environments that it asks for."""
    module = module_of(name)
    common.check(config)
    return module.build(config, module.make_env(config))


@cache
def compiled_update(name, config):
    """(key, swept values) -> first state, state after one update, its metrics; compiled."""
    module = module_of(name)
    common.check(config)
    env = module.make_env(config)

    def run(key, hparams):
        algo = module.build(dataclasses.replace(config, **hparams), env)
        state = algo.init(key)
        return state, *algo.update(state)

    return jax.jit(run)


def run_update(name, **changes):
    """One update of the tiny Config from seed 0: state before and after it, metrics.

    Calls that differ only in fields of TRACEABLE share one compilation.
    """
    config, names = config_of(name, **changes), module_of(name).TRACEABLE
    default = {k: getattr(config_of(name), k) for k in names}
    values = {k: jnp.float32(getattr(config, k)) for k in names}
    return compiled_update(name, dataclasses.replace(config, **default))(jax.random.key(0), values)


def flags_of(config, prefix="", swept=()):
    """Command line that gives this configuration; of parts in a tuple, --NAME.NUMBER.FIELD.

    Fields in `swept` are left out.
    """
    flags = []
    for field in (x for x in dataclasses.fields(config) if x.name not in swept):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(value, bool):
            flags.append(f"--{prefix}{flag}" if value else f"--{prefix}no-{flag}")
        elif dataclasses.is_dataclass(values[0]):
            for i, part in enumerate(values):
                flags += flags_of(part, f"{prefix}{flag}.{i}.")
        else:
            flags += [f"--{prefix}{flag}", *map(str, values)]
    return flags


def program_of(name, config, seeds=(0, 1)):
    """The launcher's program for these seeds, not compiled."""
    rows = Rows(np.array(seeds), {}, [""] * len(seeds))
    return program.make_program(module_of(name), config, LAUNCH, rows), *inputs(rows)


def lines_of(run_dir):
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def arrays(tree):
    """Copy of a tree as numpy arrays by path."""
    return {k: np.array(v) for k, v in rundir.flatten(tree).items()}


def assert_same(a, b):
    """Bitwise equality of two trees."""
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].tobytes() != b[k].tobytes() or a[k].dtype != b[k].dtype]
    assert not different, f"differ: {different[:5]}"


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    """Equality of two trees to rounding."""
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_allclose(a[k], b[k], rtol=rtol, atol=atol, err_msg=k)


def assert_allclose(actual, desired, rtol=1e-5, atol=1e-5):
    """Equality of two arrays to rounding."""
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


def row(tree, i):
    """Row i of a state of several rows."""
    return jax.tree.map(lambda x: x[i] if x.ndim else x, tree)

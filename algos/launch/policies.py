"""Exported policies: one file each, with all that is needed to play it.

The file is an .npz: the arrays of `policy_of`, and metadata, which docs/policies.md lists: the
algorithm and its configuration, what goes in and out, and where the policy comes from. It loads
without its run directory and without the task's simulator.
"""

import dataclasses
import importlib
import reprlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import envs
from algos.launch import cli, rundir
from envs import wrappers

# Of the metadata. The oldest files have no format; a file of a later format is refused.
FORMAT = 1


def interface_of(env: envs.Env) -> dict[str, Any]:
    """What a policy takes and gives, for the metadata of its file."""
    size = env.obs_size - env.privileged_size
    dtype = jax.eval_shape(env.reset, jax.random.key(0))[0].dtype
    obs = {"size": size, "shape": [*env.obs_shape], "dtype": str(dtype)}
    action: dict[str, Any] = {"size": env.action_size, "discrete": env.discrete}
    if env.privileged_size:
        obs |= {"shape": [size], "privileged_size": env.privileged_size}
    if not env.discrete:
        unscaled = np.broadcast_to([[-1.0], [1.0]], (2, env.action_size))
        task = unscaled if env.action_range is None else env.action_range
        task_low, task_high = np.asarray(task, np.float64).tolist()
        action |= {"low": -1.0, "high": 1.0, "task_low": task_low, "task_high": task_high}
    return {"obs": obs, "action": action}


def save_policy(
    path: str | Path, arrays: dict[str, Any], algo: str, config: Any, interface: dict, record: dict
) -> None:
    """Write a flattened policy, and all that is needed to play it, to one file.

    `record` says where it comes from: seed, step, return.
    """
    meta = {"format": FORMAT, "algo": algo, "config": dataclasses.asdict(config)}
    meta["source"] = rundir.source_digest(algo)
    rundir.save_arrays(Path(path), arrays, meta | interface | record)


def stand_in(config: Any, interface: dict[str, Any]) -> envs.Env:
    """Environments of the interface's shapes in which nothing happens: enough to build an Algo."""
    obs, action = interface["obs"], interface["action"]
    privileged_size = obs.get("privileged_size", 0)
    size = obs["size"] + privileged_size
    still = jnp.zeros(size, obs["dtype"]), ()
    raw = envs.RawEnv(
        reset=lambda key: still,
        step=lambda key, state, action: (*still, jnp.float32(0.0), jnp.bool_(False), {}),
        obs_size=size,
        obs_shape=tuple(obs["shape"]),
        action_size=action["size"],
        discrete=action["discrete"],
        max_steps=1,
        reset_mode="fresh",
        privileged_size=privileged_size,
    )
    # Offline algorithms have no num_envs.
    num_envs = getattr(config, "num_envs", 1)
    return wrappers.wrap(raw, config.env, num_envs, stagger=False, privileged=True)


def describe_policy(path: Path) -> dict[str, Any]:
    """The metadata of an exported policy, with algo and config; ValueError if there is none.

    A file without a format needs the config.json of its run beside it.
    """
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        found = ", ".join(sorted(p.name for p in folder.glob("*_s*.npz")))
        problem = "is a folder, name a policy" if path.is_dir() else "does not exist"
        running = (folder / "config.json").exists() and not (folder / "done.json").exists()
        nothing = "no policies" + running * ": its run writes them at its end, --resume it first"
        raise ValueError(f"{path} {problem}; there: {found or nothing}")
    meta = rundir.load_arrays(path)[1]
    if "format" not in meta:
        if not (path.parent / "config.json").exists():
            raise ValueError(
                f"{path} is no policy: name policy_sNNN.npz or partial_sNNN.npz. That of an old "
                "version needs the config.json of its run beside it"
            )
        return rundir.read_description(path.parent) | meta
    kinds = {"format": int, "algo": str, "config": dict, "obs": dict, "action": dict}
    for name, kind in kinds.items():
        if not isinstance(meta.get(name), kind):
            raise ValueError(f"{path} is damaged or no policy: its metadata have no {name}")
    if meta["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {meta['format']}, and this PurePO reads {FORMAT}: update it"
        )
    return meta


def load_algo(
    name: str,
    values: dict[str, Any],
    interface: dict[str, Any] | None = None,
    source: str = "config.json",
) -> tuple[envs.Env, Any]:
    """The environments and the Algo of `algos/<name>.py` for the configuration in `source`.

    With the `interface` of a policy they are a `stand_in`, and the task is not loaded. ValueError
    if there is no such algorithm, or a value is damaged.
    """
    if name not in cli.ALGOS:
        raise ValueError(f"{source} is of the algorithm {name}: {cli.nearest(name, cli.ALGOS)}")
    module = importlib.import_module(f"algos.{name}")
    # Ignore fields that a later version removed: arrays that do not fit are refused on loading.
    config = rundir.from_json(module.Config, values, source, extra="ignore")
    env = stand_in(config, interface) if interface else module.make_env(config)
    return env, module.build(config, env)


def read_policy(path: str | Path) -> tuple[envs.Env, Any, Any]:
    """Environments, Algo and parameters of an exported policy.

    Warns if the algorithm's file, which has the networks, is not the one that exported it.
    ValueError if there is no policy, or if its seed had died.
    """
    path = rundir.expanded(path)
    about = describe_policy(path)
    with jax.enable_x64(False):  # the caller's program may use double precision
        # A file without a format has no interface, so its task is loaded.
        interface = about if "format" in about else None
        env, algo = load_algo(about["algo"], about["config"], interface, str(path))
        if about.get("source") not in (None, rundir.source_digest(about["algo"])):
            warnings.warn(
                f"algos/{about['algo']}.py has changed since it exported this policy: if its "
                "networks have, the policy acts differently",
                stacklevel=2,
            )
        template = jax.eval_shape(lambda key: algo.policy_of(algo.init(key)), jax.random.key(0))
        policy = rundir.load_tree(path, template)[0]
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(policy)):
            raise ValueError(f"{path} is of a dead seed: its parameters are not finite")
        return env, algo, policy


def check_task(path: Path, known: envs.Env, env: envs.Env) -> None:
    """ValueError if the task of a policy, read with `known`, has other sizes by now."""

    def sizes(env):
        size = env.action_size
        actions = f"{size} discrete actions" if env.discrete else f"actions of size {size}"
        return f"observations of size {interface_of(env)['obs']['size']} and {actions}"

    if sizes(known) != sizes(env):
        raise ValueError(
            f"{path} is for {sizes(known)}, but {env.name} has {sizes(env)}: train a policy of the "
            "task as it is now"
        )


def act_of(env: envs.Env, algo: Any, policy: Any) -> Callable:
    """The policy that `read_policy` read as act(obs, key=None), a function for compiled code."""

    def act(obs, key=None):
        greedy = key is None
        action = algo.act(policy, obs, jax.random.key(0) if greedy else key, greedy)
        return action if env.discrete else jnp.clip(action, -1.0, 1.0)

    return act


def load_policy(path: Path | str) -> Callable:
    """Load an exported policy `RUN_DIR/policy_s000.npz` as `act(obs, key=None)`.

    `act` takes observations [obs_size] or [N, obs_size] as the environment gives them, arrays or
    lists, and returns actions as a numpy array, continuous ones clipped to [-1, 1]; greedy without
    a key, sampled with one. The observation statistics are inside. It raises ValueError, in one
    line, for observations or a key that it cannot take.
    """
    env, algo, policy = read_policy(path)
    play = jax.jit(act_of(env, algo, policy))
    wanted = interface_of(env)["obs"]

    def act(obs, key=None):
        if key is not None and not is_one_key(key):
            raise ValueError(f"key is {reprlib.repr(key)}: jax.random.key(SEED) is wanted")
        with jax.enable_x64(False):
            return np.array(play(check_obs(obs, wanted), key))

    return act


def is_one_key(x: Any) -> bool:
    """True for a single key, typed or as the two numbers of `jax.random.PRNGKey`."""
    if not isinstance(x, jax.Array):
        return False
    return not x.ndim if rundir.is_key(x) else (x.dtype, x.shape) == (jnp.uint32, (2,))


def check_obs(obs: Any, wanted: dict[str, Any]) -> np.ndarray:
    """Observations as the array that `interface_of` describes; ValueError if they do not fit.

    Privileged entries may follow what the policy reads.
    """
    size, dtype = wanted["size"], np.dtype(wanted["dtype"])
    try:
        given = np.asarray(obs)
        real = (jnp.floating, jnp.integer, jnp.bool_)
        numeric = any(jnp.issubdtype(given.dtype, kind) for kind in real)
    except ValueError:  # rows of different lengths
        numeric = False
    if not numeric:
        raise ValueError(f"obs is {reprlib.repr(obs)}: an array of numbers is wanted")
    sizes = size, size + wanted.get("privileged_size", 0)
    if given.ndim not in (1, 2) or given.shape[-1] not in sizes:
        raise ValueError(f"obs has shape {[*given.shape]}: [{size}] or [N, {size}] is wanted")
    with np.errstate(all="ignore"):  # what does not fit is named below
        cast = given.astype(dtype)
    fits = np.isfinite(cast) if jnp.issubdtype(dtype, jnp.floating) else cast == given
    if not fits.all():
        index = tuple(np.argwhere(~fits)[0].tolist())
        raise ValueError(f"obs{[*index]} is {given[index]}: a finite {dtype} is wanted")
    return cast

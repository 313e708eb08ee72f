"""The run directory: the format of what a launch writes, and how it is read again.

    config.json  meta.json  metrics.jsonl  eval.npz  final.npz  policy_s000.npz  partial_s000.npz
    done.json
    checkpoints/  plots/  videos/

Everything is JSON or numpy arrays without pickles. `session.py` writes it, experiments read it.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import TypeAdapter, ValidationError

import envs
from envs import wrappers

# The generator of all keys. A seed gives the same run under any JAX_DEFAULT_PRNG_IMPL.
PRNG = "threefry2x32"

# --- trees of arrays as .npz, keyed by tree path ---


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by tree path, typed keys as their key data."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): jax.random.key_data(x) if is_key(x) else x for path, x in leaves
    }


def save_arrays(path: Path, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write arrays by name, and `meta` as JSON, to `path`; either all of it or nothing."""
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    # bfloat16 is not a numpy type: store the bits, the template knows the type.
    arrays = {k: x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for k, x in arrays.items()}
    write_atomic(path, lambda file: np.savez(file, **arrays, __meta__=np.array(json.dumps(meta))))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; ValueError that names the file if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # damage may show in numpy, zipfile, zlib or tokenize
        raise ValueError(f"{path} is damaged or not ours ({error})") from None


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata that `save_arrays` wrote; ValueError if the file is damaged."""
    arrays = read_arrays(path)
    try:
        meta = json.loads(str(arrays.pop("__meta__")))
    except (KeyError, ValueError):
        meta = None
    if not isinstance(meta, dict):
        raise ValueError(f"{path} is damaged or not ours (no __meta__)")
    return arrays, meta


def load_tree(path: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """Read what `save_arrays(path, flatten(tree), meta)` wrote, into the shape of `template`.

    Raises ValueError if the file is damaged, or names what is missing, unexpected or changed.
    """
    try:
        arrays, meta = load_arrays(path)
    except ValueError as error:
        advice = ": delete it to use the one before" if path.parent.name == "checkpoints" else ""
        raise ValueError(f"{error}{advice}") from None
    wanted = {
        jax.tree_util.keystr(path): jax.eval_shape(jax.random.key_data, x) if is_key(x) else x
        for path, x in jax.tree_util.tree_flatten_with_path(template)[0]
    }
    problems = [f"missing {name}" for name in wanted.keys() - arrays.keys()]
    problems += [f"unexpected {name}" for name in arrays.keys() - wanted.keys()]
    stored = lambda x: np.dtype(np.uint16 if x.dtype == jnp.bfloat16 else x.dtype)
    problems += [
        f"{name} is {arrays[name].dtype}{list(arrays[name].shape)}, not {x.dtype}{list(x.shape)}"
        for name, x in wanted.items()
        if name in arrays and (arrays[name].shape, arrays[name].dtype) != (x.shape, stored(x))
    ]
    if problems:
        raise ValueError(f"{path} does not fit this configuration: " + "; ".join(problems[:5]))

    def restore(path, x):
        array = arrays[jax.tree_util.keystr(path)]
        if is_key(x):
            return jax.random.wrap_key_data(array, impl=PRNG)
        return array.view(jnp.bfloat16) if x.dtype == jnp.bfloat16 else array

    return jax.tree_util.tree_map_with_path(restore, template), meta


def write_atomic(path: Path, write: Callable) -> None:
    """Call `write(binary file)` and put the file in place only when it is complete on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def jsonable(value: Any) -> Any:
    """Plain numbers and lists, null for what is not finite."""
    array = np.asarray(value, np.float64)
    if array.ndim:
        return [jsonable(x) for x in array]
    return float(array) if np.isfinite(array) else None


def is_key(x: Any) -> bool:
    """True for arrays of typed keys, and their shapes."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def read_json(path: Path, **wanted: type) -> dict[str, Any]:
    """The object in a JSON file; ValueError that names the file if it is damaged.

    `wanted` are names that the object must have, and the types of their values.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (no object)")
    for name, kind in wanted.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{path} is damaged or not ours (no {kind.__name__} {name!r})")
    return value


# --- one process, one run ---


def lock(run_dir: Path) -> filelock.FileLock:
    """The lock of a run directory, held; ValueError if another process holds it."""
    held = filelock.FileLock(run_dir / ".lock", timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        raise ValueError(f"{run_dir} is in use by another process: wait until it ends") from None
    return held


def files(run_dir: Path) -> list[Path]:
    """What a run has written to the directory, by name."""
    names = ("config.json", "meta.json", "metrics.jsonl", "done.json", "checkpoints", "*.npz")
    return sorted(path for name in names for path in run_dir.glob(name))


# --- checkpoints ---


def save_checkpoint(run_dir: Path, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
    """Save the flattened state after `meta["update"]` updates and keep the last two."""
    folder = run_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    save_arrays(folder / f"{meta['update']:09d}.npz", arrays, meta)
    for old in checkpoints(run_dir)[:-2]:
        old.unlink()


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((run_dir / "checkpoints").glob("[0-9]*.npz"))


# --- reading a run ---

FURTHER = "_returns"  # end of the name of an array with the returns of a further policy


class Run(NamedTuple):
    """A finished or running launch, as read from its directory."""

    path: Path
    algo: str
    config: dict[str, Any]
    launch: dict[str, Any]
    labels: list[str]  # one per row: the swept values, or ""
    seeds: np.ndarray  # [R]
    steps: np.ndarray  # [E] steps of one seed: of environments, offline of gradients
    seconds: np.ndarray  # [E] of training, without compilation and evaluation
    returns: np.ndarray  # [R, E, K] greedy evaluation; NaN where a seed is dead
    lengths: np.ndarray  # [R, E, K]
    further: dict[str, np.ndarray]  # returns [R, E, K] of an algorithm's further policies
    final: np.ndarray  # [R, F] returns of the last evaluation with all its episodes
    final_further: dict[str, np.ndarray]  # the same of further policies
    done: dict[str, Any] | None  # None if the launch did not reach its end


def read_description(run_dir: Path) -> dict[str, Any]:
    """What config.json says: algo, config, launch and rows; ValueError if it does not."""
    path = run_dir / "config.json"
    try:
        saved = read_json(path, algo=str, config=dict, launch=dict, rows=dict)
        if not isinstance(saved["config"].get("env"), str):
            raise ValueError(f"{path} is damaged or not ours (no env in 'config')")
    except ValueError as error:
        raise ValueError(f"{run_dir} is not a run directory: {error}") from None
    return saved


def read_run(run_dir: Path | str) -> Run:
    """Read a run directory; ValueError if it is not one."""
    path = Path(run_dir)
    saved = read_description(path)
    rows = saved["rows"]
    if not all(isinstance(rows.get(name), list) for name in ("seeds", "labels")):
        raise ValueError(f"{path / 'config.json'} is damaged or not ours (no seeds or labels)")
    num_rows = len(rows["seeds"])
    evals = read_evals(path / "eval.npz", num_rows)
    further = further_of(evals)
    final = {"returns": evals["returns"][:, -1]} | {
        returns_of(name): x[:, -1] for name, x in further.items()
    }
    if (path / "final.npz").exists():  # otherwise it is unfinished, or older than this file
        final = read_final(path / "final.npz", num_rows)
    done = path / "done.json"
    return Run(
        path=path,
        algo=saved["algo"],
        config=saved["config"],
        launch=saved["launch"],
        labels=rows["labels"],
        seeds=np.array(rows["seeds"]),
        steps=evals["steps"],
        seconds=evals["seconds"],
        returns=evals["returns"],
        lengths=evals["lengths"],
        further=further,
        final=final["returns"],
        final_further=further_of(final),
        done=read_json(done, seconds=dict) if done.exists() else None,
    )


def read_evals(path: Path, num_rows: int) -> dict[str, np.ndarray]:
    """The arrays of eval.npz, as `write_evals` describes them; ValueError if it is damaged."""
    evals = read_arrays(path)
    count = evals["steps"].size if "steps" in evals else 0
    per_row = {"returns", "lengths", *map(returns_of, further_of(evals))}
    shapes = {"steps": (count,), "seconds": (count,)} | dict.fromkeys(per_row, (num_rows, count))
    for name, shape in shapes.items():
        if not count or name not in evals or evals[name].shape[:2] != shape:
            raise ValueError(f"{path} is damaged or not ours (no {name} of {count} evaluations)")
    return evals


def read_final(path: Path, num_rows: int) -> dict[str, np.ndarray]:
    """The arrays of final.npz, as `write_final` describes them; ValueError if it is damaged."""
    final = read_arrays(path)
    if "returns" not in final or any(
        x.shape[:1] != (num_rows,) or x.ndim != 2 for x in final.values()
    ):
        raise ValueError(f"{path} is damaged or not ours (no returns of {num_rows} rows)")
    return final


def returns_of(policy: str) -> str:
    """Name of the array with the returns of a policy: "" is the main one, others are `further`."""
    return f"{policy}{FURTHER}" if policy else "returns"


def further_of(evals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns of further policies by their names."""
    return {x.removesuffix(FURTHER): evals[x] for x in evals if x.endswith(FURTHER)}


def load_algo(
    name: str, values: dict[str, Any], interface: dict[str, Any] | None = None
) -> tuple[envs.Env, Any]:
    """The environments and the Algo of `algos/<name>.py` for the config.json values of a run.

    With the `interface` of a policy they are a `stand_in`, and the task is not loaded.
    """
    module = importlib.import_module(f"algos.{name}")
    # Fields of an older version that are gone do not matter: a policy's shapes are checked.
    config = from_json(module.Config, values, extra="ignore")
    env = stand_in(config, interface) if interface else module.make_env(config)
    return env, module.build(config, env)


def from_json(
    config_type: type, values: dict[str, Any], extra: Literal["forbid", "ignore"] = "forbid"
) -> Any:
    """A config dataclass from its JSON; ValueError if a field has a wrong type.

    `extra` says what happens to fields that the dataclass, or one inside it, does not have.
    """
    try:
        # Lists become tuples again.
        return TypeAdapter(config_type).validate_python(values, extra=extra)
    except ValidationError as error:
        problems = [(".".join(map(str, x["loc"])), x) for x in error.errors()]
    unknown = [name for name, x in problems if x["type"] == "unexpected_keyword_argument"]
    if unknown:
        raise ValueError(
            f"config.json was written by another version, which had {', '.join(sorted(unknown))}"
        )
    name, problem = problems[0]
    raise ValueError(f"config.json: {name}={problem['input']!r}: {problem['msg']}")


# --- exported policies ---

FORMAT = 1  # of the metadata in a policy's file; files of older versions have none


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
    path: Path, arrays: dict[str, Any], algo: str, config: Any, interface: dict, record: dict
) -> None:
    """Write a flattened policy, and all that is needed to play it, to one file.

    `record` says where it comes from: seed, step, return.
    """
    meta = {"format": FORMAT, "algo": algo, "config": dataclasses.asdict(config)}
    save_arrays(path, arrays, meta | interface | record)


def stand_in(config: Any, interface: dict[str, Any]) -> envs.Env:
    """Environments of these shapes in which nothing happens: building an Algo needs no more."""
    obs, action = interface["obs"], interface["action"]
    privileged_size = obs.get("privileged_size", 0)
    size = obs["size"] + privileged_size
    still = jnp.zeros(size, obs["dtype"]), ()
    raw = envs.RawEnv(
        name=config.env,
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
    return wrappers.wrap(raw, getattr(config, "num_envs", 1), stagger=False, privileged=True)


def describe_policy(path: Path) -> dict[str, Any]:
    """The metadata of an exported policy, with algo and config; ValueError if there is none.

    For a file of an older version, the config.json of its run is read too.
    """
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        found = ", ".join(sorted(p.name for p in folder.glob("*_s*.npz"))) or "no policies"
        problem = "is a folder, name a policy" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}; there: {found}")
    meta = load_arrays(path)[1]
    if "format" not in meta:
        return read_description(path.parent) | meta
    if meta["format"] > FORMAT:
        raise ValueError(f"{path} has format {meta['format']}, and this PurePO reads 1: update it")
    return meta


def read_policy(path: Path) -> tuple[envs.Env, Any, Any]:
    """Environments, Algo and parameters of an exported policy; ValueError if there is none."""
    about = describe_policy(path)
    env, algo = load_algo(about["algo"], about["config"], about if "format" in about else None)
    template = jax.eval_shape(lambda key: algo.policy_of(algo.init(key)), jax.random.key(0))
    return env, algo, load_tree(path, template)[0]


def act_of(env: envs.Env, algo: Any, policy: Any) -> Callable:
    """The policy that `read_policy` read as act(obs, key=None), a function for compiled code."""

    def act(obs, key=None):
        action = algo.act(policy, obs, jax.random.key(0) if key is None else key, key is None)
        return action if env.discrete else jnp.clip(action, -1.0, 1.0)

    return act


def load_policy(path: Path | str) -> Callable:
    """Load an exported policy `RUN_DIR/policy_s000.npz` as `act(obs, key=None)`.

    `act` takes observations [obs_size] or [N, obs_size] as the environment gives them, arrays or
    lists, and returns actions as a numpy array, continuous ones clipped to [-1, 1]; greedy without
    a key, sampled with one. The observation statistics are inside. It raises ValueError, in one
    line, for observations that it cannot take.
    """
    env, algo, policy = read_policy(Path(path))
    play = jax.jit(act_of(env, algo, policy))
    wanted = interface_of(env)["obs"]
    return lambda obs, key=None: np.array(play(check_obs(obs, wanted), key))


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


def write_evals(run_dir: Path, evals: dict[str, list]) -> None:
    """Write eval.npz: steps [E], seconds [E], returns [R, E, K], lengths [R, E, K].

    Further policies of an algorithm have NAME_returns [R, E, K].
    """
    arrays = {name: np.stack(values, min(1, np.ndim(values[0]))) for name, values in evals.items()}
    write_atomic(run_dir / "eval.npz", lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def write_final(run_dir: Path, final: dict[str, np.ndarray]) -> None:
    """Write final.npz: returns and lengths [R, F] of the last evaluation with all its episodes."""
    write_atomic(run_dir / "final.npz", lambda file: np.savez(file, **final))  # type: ignore[arg-type]


def rewind(run_dir: Path, step: int, write: bool) -> dict[str, list]:
    """The evaluations up to `step`; if `write`, drop what metrics.jsonl has after it."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = "".join(x for i, x in enumerate(lines) if step_of(x, path, i, len(lines)) <= step)
    if write:
        write_atomic(path, lambda file: file.write(kept.encode()))
    if not (run_dir / "eval.npz").exists():  # stopped before the first evaluation
        return {}
    run = read_run(run_dir)
    keep = np.flatnonzero(run.steps <= step)
    if not len(keep):
        return {}
    per_row = {"returns": run.returns, "lengths": run.lengths}
    per_row |= {returns_of(name): x for name, x in run.further.items()}
    return {
        "steps": [int(run.steps[i]) for i in keep],
        "seconds": [float(run.seconds[i]) for i in keep],
        **{name: [x[:, i] for i in keep] for name, x in per_row.items()},
    }


def step_of(line: str, path: Path, number: int, count: int) -> float:
    """The step of a line of metrics.jsonl; infinite for a last line that was cut short."""
    try:
        if line.endswith("\n"):
            return float(json.loads(line)["global_step"])
        raise ValueError("it has no end")
    except (ValueError, KeyError, TypeError) as error:
        if number == count - 1:
            return math.inf
        raise ValueError(f"{path} is damaged in line {number + 1} ({error})") from None


def digest(tree: Any) -> str:
    """SHA-256 of the leaves of a tree, their names and types."""
    sha = hashlib.sha256()
    for name, x in flatten(tree).items():
        sha.update(f"{name} {x.dtype} {x.shape}".encode())
        sha.update(np.ascontiguousarray(x).data)
    return sha.hexdigest()


def check_data(run_dir: Path, digests: list[str]) -> None:
    """ValueError if a run learned from other data than these."""
    path = run_dir / "meta.json"
    saved = read_json(path).get("data", digests) if path.exists() else digests
    if saved != digests:
        raise ValueError(
            f"cannot resume {run_dir}: the dataset or the clones are not those it learned from"
        )

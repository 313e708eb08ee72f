"""Datasets of transitions, and clones of the policies that collected them: read and checked.

    load("hopper-pure.npz", env)      # a file of experiments/collect_data.py
    load("foreign.hdf5", env)         # episodes as Minari stores them, or D4RL's flat arrays
    load("minari:NAME", env)          # a Minari dataset on this machine
    load_clones("bc-hopper", env, hidden, seeds)    # policies of a run of bc.py

Offline algorithms get the arrays as arguments of their compiled program. Rows are in the order in
which they were collected; within an episode `next_obs` and `next_action` are the next row's `obs`
and `action`.
"""

import difflib
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import envs
from algos.launch import policies, rundir


class Dataset(NamedTuple):
    """n transitions, float32 and bool; no row spans a reset."""

    obs: np.ndarray  # [n, obs_size]
    action: np.ndarray  # [n, action_size], in [-1, 1]
    reward: np.ndarray  # [n]
    next_obs: np.ndarray  # [n, obs_size], true successor
    next_action: np.ndarray  # [n, action_size], what the collecting policy did or would do there
    terminated: np.ndarray  # [n], the task ended: the value of next_obs is zero
    truncated: np.ndarray  # [n], cut by the clock or by the end of collection: the value goes on


# --- reading ---

HDF5 = (".hdf5", ".h5")  # suffixes of what is read as HDF5, in any letter case


def load(source: str, env: envs.Env) -> Dataset:
    """Read a dataset for `env`; ValueError in one line if there is none, or it does not fit."""
    minari = source.startswith("minari:")
    path = minari_path(source[7:]) if minari else rundir.expanded(source)
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(f"dataset {source!r} does not exist{where}, or is not a file")
    if is_hdf5(path):
        dataset = read_hdf5(path)
        if dataset.action.shape[1:] == (env.action_size,):  # else `check` says what is wrong
            middle, half = middle_and_half(env)
            scaled = [(x - middle) / half for x in (dataset.action, dataset.next_action)]
            dataset = dataset._replace(action=scaled[0], next_action=scaled[1])
        source += ", without the last steps of truncated episodes"  # as rows are counted
    else:
        dataset, meta = read(path)
        if canonical(str(meta["env"])) != env.name:
            raise ValueError(f"{source} is of {meta['env']} ({shapes(dataset)}), not {env.name}")
    dataset = Dataset(*map(single, dataset))
    check(dataset, source, env)
    ends = np.flatnonzero(dataset.terminated | dataset.truncated)
    longest = int(np.diff(ends, prepend=-1, append=len(dataset.obs) - 1).max())
    if longest > env.max_steps:
        warnings.warn(
            f"{source} has an episode of {longest} steps, and {env.name} stops at {env.max_steps}: "
            "are its ends marked?",
            stacklevel=2,
        )
    return dataset


def canonical(name: str) -> str:
    """Full name of an environment; `name` itself if there is none of this name."""
    try:
        return envs.canonical(name)
    except (ValueError, ImportError):
        return name


def read(path: Path) -> tuple[Dataset, dict[str, Any]]:
    """The arrays and the metadata of a file that `write` wrote."""
    arrays, meta = rundir.load_arrays(path)
    missing = sorted({*Dataset._fields} - arrays.keys())
    if missing:
        raise ValueError(f"{path} is damaged or no dataset: no {', '.join(missing)}")
    if "env" not in meta:
        raise ValueError(f"{path} is damaged or no dataset: its metadata names no env")
    return Dataset(*(arrays[name] for name in Dataset._fields)), meta


def write(path: Path, dataset: Dataset, meta: dict[str, Any]) -> None:
    """Write a dataset and its metadata, which names its environment; all of it or nothing."""
    rundir.save_arrays(path, dataset._asdict(), meta)


def check(dataset: Dataset, source: str, env: envs.Env) -> None:
    """Raise ValueError if the rows cannot be of `env`, or would poison what is learned."""
    if env.discrete:
        raise ValueError(f"{env.name} has discrete actions, and datasets have continuous ones")
    for name, x in dataset._asdict().items():
        kind = "b" if name in ("terminated", "truncated") else "f"
        if x.dtype.kind != kind:
            kinds = {"b": "bool", "f": "float"}
            raise ValueError(f"{source}: {name} is {x.dtype}, and {kinds[kind]} is needed")
    n = dataset.obs.shape[0] if dataset.obs.ndim else 1
    if not n:
        raise ValueError(f"{source} has no rows")
    wanted = {"obs": (env.obs_size,), "action": (env.action_size,)}
    wanted |= {"next_obs": wanted["obs"], "next_action": wanted["action"]}
    for name, x in dataset._asdict().items():
        if x.shape != (n, *wanted.get(name, ())):
            raise ValueError(
                f"{source} has {shapes(dataset)}, and {env.name} needs obs [n, {env.obs_size}], "
                f"action [n, {env.action_size}] and as many rows of each; {name} is {[*x.shape]}"
            )
    for name, x in dataset._asdict().items():
        rows = np.flatnonzero(~np.isfinite(x).reshape(n, -1).all(1))
        if len(rows):
            raise ValueError(
                f"{source}: {name} is not finite in {len(rows)} rows, first {rows[0]}, as float32"
            )
    rows = np.flatnonzero(dataset.terminated & dataset.truncated)
    if len(rows):
        raise ValueError(
            f"{source}: {len(rows)} rows, first {rows[0]}, are terminated and truncated: a row may "
            "be only one of them"
        )
    for name in ("action", "next_action"):
        rows = np.flatnonzero((np.abs(getattr(dataset, name)) > 1.0 + 1e-5).any(1))
        if len(rows):
            worst = np.abs(getattr(dataset, name)).max()
            raise ValueError(
                f"{source}: {name} is outside [-1, 1] in {len(rows)} rows, first {rows[0]}: "
                f"the largest is {worst:g}, where [-1, 1] stands for the task's range of actions"
            )


def middle_and_half(env: envs.Env) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half-width [action_size] of the task's own range of actions; float32.

    Files of others have actions of this range, and ours the [-1, 1] that `env` scales to it.
    """
    scaled = [[-1.0], [1.0]] if env.action_range is None else env.action_range
    low, high = np.broadcast_to(np.asarray(scaled, np.float32), (2, env.action_size))
    return (low + high) / 2, (high - low) / 2


def single(x: np.ndarray) -> np.ndarray:
    """Floats of any precision and byte order as float32, infinite where it cannot hold them.

    Other types are returned unchanged.
    """
    with np.errstate(over="ignore"):
        return x.astype(np.float32, copy=False) if x.dtype.kind == "f" else x


def shapes(dataset: Dataset) -> str:
    """Shapes of the observations and actions, to be read by people."""
    return f"obs {list(dataset.obs.shape)}, action {list(dataset.action.shape)}"


# --- files of others ---


def from_episodes(episodes: Iterable[tuple]) -> Dataset:
    """Transitions of episodes (obs [T or T + 1], action [T], reward [T], terminated: bool).

    The last step of a truncated episode is left out, because the action after it is unknown. The
    step before it becomes the last one and is marked as truncated.
    """
    parts = []
    for obs, action, reward, terminated in episodes:
        if len(reward) != len(action) or len(obs) - len(action) not in (0, 1):
            raise ValueError(
                f"an episode has {len(obs)} observations, {len(action)} actions and {len(reward)} "
                "rewards"
            )
        n = len(action) if terminated else len(action) - 1
        if n < 1:
            continue
        # After a termination the next observation and action are never used: any will do.
        following = lambda x: np.concatenate([x, x[-1:]])[1 : n + 1]  # noqa: B023
        last = np.arange(n) == n - 1
        ends = last & terminated, last & ~np.bool_(terminated)
        parts.append((obs[:n], action[:n], reward[:n], following(obs), following(action), *ends))
    if not parts:
        raise ValueError("no episode has two steps")
    joined = [np.concatenate(x) for x in zip(*parts, strict=True)]
    with np.errstate(over="ignore"):  # to infinity, which `check` refuses
        return Dataset(*(x if x.dtype == bool else x.astype(np.float32) for x in joined))


def to_episodes(dataset: Dataset) -> Iterable[tuple]:
    """Episodes (obs [T + 1], action [T], reward [T], terminated), as `from_episodes` takes them."""
    ends = np.flatnonzero(dataset.terminated | dataset.truncated)
    for start, end in zip([0, *ends[:-1] + 1], ends, strict=True):
        part = Dataset(*(x[start : end + 1] for x in dataset))
        obs = np.concatenate([part.obs, part.next_obs[-1:]])
        yield obs, part.action, part.reward, bool(part.terminated[-1])


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, by its suffix or its first bytes."""
    with open(path, "rb") as file:
        return path.suffix.lower() in HDF5 or file.read(8) == b"\x89HDF\r\n\x1a\n"


def read_hdf5(path: Path) -> Dataset:
    """An HDF5 file with Minari's groups of episodes, or with D4RL's flat arrays."""
    try:
        import h5py
    except ImportError:
        raise ImportError(f'{path} needs h5py: pip install -e ".[minari]"') from None
    try:
        with h5py.File(path, "r") as file:
            flat = "observations" in file
            return from_episodes(flat_episodes(file) if flat else minari_episodes(file))
    except Exception as error:  # whatever the damage makes h5py and numpy raise
        raise ValueError(f"{path} is damaged or no dataset: {error}") from None


def minari_episodes(file: Mapping[str, Any]):
    """Episodes of Minari's layout: a group each, with one observation more than actions."""
    names = [name for name in file if re.fullmatch(r"episode_\d+", name)]
    if not names:
        raise ValueError("it has neither observations, as D4RL's files, nor episode_0, as Minari's")
    for name in sorted(names, key=lambda name: int(name[8:])):
        group = file[name]
        obs, action, reward = columns(group, "observations", "actions", "rewards")
        ends = [flags(group, x, len(action)) for x in ("terminations", "truncations")]
        if any(x[:-1].any() for x in ends):
            raise ValueError(f"{name} goes on after a step that ends it: an episode is one group")
        yield obs, action, reward, bool(ends[0][-1])


def flat_episodes(file: Mapping[str, Any]):
    """Episodes of D4RL's layout: flat arrays, cut after each `terminals` and `timeouts`.

    Steps after the last flag are an episode that the end of the file cut. A step with both flags
    counts as terminated.
    """
    obs, action, reward = columns(file, "observations", "actions", "rewards")
    if "timeouts" not in file:
        raise ValueError("it has no timeouts, so nobody knows where episodes were cut")
    n = len(obs)
    if not n == len(action) == len(reward):
        raise ValueError(f"it has {n} observations, {len(action)} actions, {len(reward)} rewards")
    terminals, timeouts = (flags(file, name, n) for name in ("terminals", "timeouts"))
    ends = np.union1d(np.flatnonzero(terminals | timeouts), [len(obs) - 1]).astype(int)
    for start, end in zip([0, *ends[:-1] + 1], ends, strict=True):
        part = slice(start, end + 1)
        yield obs[part], action[part], reward[part], bool(terminals[end])


def columns(group: Any, *names: str) -> list[np.ndarray]:
    """Arrays of numbers in an HDF5 group.

    ValueError for those that are missing, dicts and tuples, no rows, and other types.
    """
    found = []
    for name in names:
        if name not in group:
            raise ValueError(f"{group.name.strip('/') or 'it'} has no {name}")
        if isinstance(group[name], Mapping):
            raise ValueError(f"{name} have the parts {', '.join(group[name])}: an array is needed")
        x = group[name][()]
        if x.dtype.kind not in "fiub":
            raise ValueError(f"{name} are {x.dtype}: numbers are needed")
        if not len(x):
            raise ValueError(f"{name} has no rows")
        found.append(x)
    return found


def flags(group: Any, name: str, n: int) -> np.ndarray:
    """Flags [n] of an HDF5 group; ValueError for another shape and for values beside 0 and 1."""
    (x,) = columns(group, name)
    if x.shape != (n,):
        raise ValueError(f"{name} is {[*x.shape]}, and [{n}] is needed")
    if not np.isin(x, (0, 1)).all():
        raise ValueError(f"{name} has values beside 0 and 1")
    return x.astype(bool)


def minari_root() -> Path:
    """Where Minari keeps the datasets of this machine."""
    path = os.environ.get("MINARI_DATASETS_PATH")
    return Path(path) if path else rundir.expanded("~/.minari/datasets")


def minari_path(name: str) -> Path:
    """The file of a Minari dataset on this machine; ValueError lists the nearest names."""
    root = minari_root()
    path = root / name / "data" / "main_data.hdf5"
    if not path.exists():
        found = [str(x.parents[1].relative_to(root)) for x in root.rglob("main_data.hdf5")]
        near = difflib.get_close_matches(name, found, n=4, cutoff=0.0)
        raise ValueError(
            f"no Minari dataset {name!r} in {root}: {', '.join(near) or 'it is empty'}"
        )
    return path


# --- clones of the policies that collected ---


def load_clones(run_dir: str, env: envs.Env, hidden: tuple[int, ...], seeds: Iterable[int]) -> Any:
    """Parameters [R, ...] of the policies of a run of bc.py, those of `seeds` [R].

    Raises ValueError if there is no such run, or it is of another environment or has other hidden
    layers, or no policy of one of the seeds.
    """
    folder = rundir.expanded(run_dir)
    saved = rundir.read_description(folder)
    task, layers = saved["config"]["env"], saved["config"].get("hidden")
    if saved["algo"] != "bc" or envs.canonical(task) != envs.canonical(env.name):
        raise ValueError(
            f"behavior={run_dir} is of {saved['algo']} on {task}: give a run of bc on {env.name}"
        )
    if layers != [*hidden]:
        raise ValueError(
            f"behavior={run_dir} has hidden={layers}, the policy {[*hidden]}: make them equal"
        )
    of_rows = saved["rows"].get("seeds", [])
    row_of = {seed: row for row, seed in enumerate(of_rows)}
    if len(row_of) < len(of_rows):
        raise ValueError(
            f"behavior={run_dir} has several policies of each seed, for it is a sweep: give a run "
            "of bc with one value"
        )
    absent = sorted({int(seed) for seed in seeds} - row_of.keys())
    if absent:
        raise ValueError(
            f"behavior={run_dir} has no seed {absent[0]} but {sorted(row_of)}: clone the same seeds"
        )
    trees = {}
    for seed in sorted({int(seed) for seed in seeds}):  # swept rows of a seed share its clone
        path = folder / f"policy_s{row_of[seed]:03d}.npz"
        trees[seed] = policies.read_policy(path)[-1]["actor"]
    return jax.tree.map(lambda *x: np.stack(x), *(trees[int(seed)] for seed in seeds))

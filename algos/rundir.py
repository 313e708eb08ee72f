"""The run directory: what a launch leaves on disk, and how it is read again.

    config.json  meta.json  metrics.jsonl  eval.npz  policy_s000.npz  partial_s000.npz  done.json
    checkpoints/  plots/  videos/

All of it is JSON or numpy arrays without pickles. `algos/launch.py` writes, experiments read.
"""

import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

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


def load_tree(path: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """Read what `save_arrays(path, flatten(tree), meta)` wrote, into the shape of `template`.

    Raises ValueError if the file is damaged, or names what is missing, unexpected or changed.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("__meta__")))
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not ours ({error}): delete it to use the one before"
        ) from None
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
            return jax.random.wrap_key_data(array)
        return array.view(jnp.bfloat16) if x.dtype == jnp.bfloat16 else array

    return jax.tree_util.tree_map_with_path(restore, template), meta


def write_atomic(path: Path, write: Callable) -> None:
    """Call `write(binary file)` and put the file in place only when it is complete on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def is_key(x: Any) -> bool:
    """True for arrays of typed keys, and their shapes."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


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
    done: dict[str, Any] | None  # None if the launch did not reach its end


def read_description(run_dir: Path) -> dict[str, Any]:
    """What config.json says: algo, config, launch and rows; ValueError if it does not."""
    try:
        saved = json.loads((run_dir / "config.json").read_text())
        missing = {"algo", "config", "launch", "rows"} - saved.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{run_dir} is not a run directory: {error}") from None
    if missing:
        raise ValueError(f"{run_dir} is not a run directory: its config.json is of something else")
    return saved


def read_run(run_dir: Path | str) -> Run:
    """Read a run directory; ValueError if it is not one."""
    path = Path(run_dir)
    saved = read_description(path)
    try:
        with np.load(path / "eval.npz", allow_pickle=False) as file:
            evals = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a run directory: {error}") from None
    names = [name for name in evals if name.endswith("_returns")]
    done = path / "done.json"
    return Run(
        path=path,
        algo=saved["algo"],
        config=saved["config"],
        launch=saved["launch"],
        labels=saved["rows"]["labels"],
        seeds=np.array(saved["rows"]["seeds"]),
        further={name.removesuffix("_returns"): evals.pop(name) for name in names},
        done=json.loads(done.read_text()) if done.exists() else None,
        **evals,
    )


def load_algo(name: str, config: dict[str, Any]):
    """Import `algos/<name>.py` and build it; returns its Config instance and Algo."""
    module = importlib.import_module(f"algos.{name}")
    loaded = from_json(module.Config, config)
    return loaded, module.build(loaded)


def from_json(config_type: type, values: dict[str, Any]) -> Any:
    """A config dataclass from its JSON, in which tuples have become lists."""
    unknown = values.keys() - {field.name for field in dataclasses.fields(config_type)}
    if unknown:
        raise ValueError(
            f"config.json was written by another version, which had {', '.join(sorted(unknown))}"
        )
    return config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_policy(path: Path) -> tuple[Any, Any]:
    """The Algo and the parameters of an exported policy; ValueError if there is none."""
    if not path.exists():
        found = sorted(p.name for p in path.parent.glob("*_s*.npz"))
        raise ValueError(f"{path} does not exist; there: {', '.join(found) or 'no policies'}")
    saved = read_description(path.parent)
    _, algo = load_algo(saved["algo"], saved["config"])
    template = jax.eval_shape(lambda key: algo.policy_of(algo.init(key)), jax.random.key(0))
    return algo, load_tree(path, template)[0]


def load_policy(path: Path | str) -> Callable:
    """Load an exported policy `RUN_DIR/policy_s000.npz` as `act(obs, key=None)`.

    `act` takes observations [obs_size] or [N, obs_size] as the environment gives them and returns
    actions; greedy without a key, sampled with one. The observation statistics are inside.
    """
    algo, policy = read_policy(Path(path))
    greedy = jax.jit(lambda obs: algo.act(policy, obs, jax.random.key(0), True))
    sample = jax.jit(lambda obs, key: algo.act(policy, obs, key, False))
    return lambda obs, key=None: greedy(obs) if key is None else sample(obs, key)


def write_evals(run_dir: Path, evals: dict[str, list]) -> None:
    """Write eval.npz: steps [E], seconds [E], returns [R, E, K], lengths [R, E, K].

    Further policies of an algorithm have NAME_returns [R, E, K].
    """
    arrays = {name: np.stack(values, min(1, np.ndim(values[0]))) for name, values in evals.items()}
    write_atomic(run_dir / "eval.npz", lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def rewind(run_dir: Path, step: int, write: bool) -> dict[str, list]:
    """The evaluations up to `step`; if `write`, drop what metrics.jsonl has after it."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = "".join(x for x in lines if x.endswith("\n") and json.loads(x)["global_step"] <= step)
    if write:
        write_atomic(path, lambda file: file.write(kept.encode()))
    if not (run_dir / "eval.npz").exists():  # stopped before the first evaluation
        return {}
    run = read_run(run_dir)
    keep = np.flatnonzero(run.steps <= step)
    if not len(keep):
        return {}
    per_row = {"returns": run.returns, "lengths": run.lengths}
    per_row |= {f"{name}_returns": x for name, x in run.further.items()}
    return {
        "steps": [int(run.steps[i]) for i in keep],
        "seconds": [float(run.seconds[i]) for i in keep],
        **{name: [x[:, i] for i in keep] for name, x in per_row.items()},
    }


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
    saved = json.loads(path.read_text()).get("data", digests) if path.exists() else digests
    if saved != digests:
        raise ValueError(
            f"cannot resume {run_dir}: the dataset or the clones are not those it learned from"
        )


def groups(run: Run) -> list[tuple[str, np.ndarray]]:
    """Rows of each swept value, in order: (label, indices); one group without a sweep."""
    labels = np.array(run.labels)
    return [(label, np.flatnonzero(labels == label)) for label in dict.fromkeys(run.labels)]


# --- statistics over seeds ---


def iqm(x: np.ndarray) -> float:
    """Interquartile mean of the finite values: the mean of the middle half."""
    x = x[np.isfinite(x)]
    return float(stats.trim_mean(x, 0.25)) if len(x) else float("nan")


def iqm_interval(x: np.ndarray, num_resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the IQM over seeds; `x` [R], NaN left out."""
    lo, hi = np.percentile(resampled_iqm(x, np.random.default_rng(0), num_resamples), [2.5, 97.5])
    return float(lo), float(hi)


def resampled_iqm(x: np.ndarray, rng: np.random.Generator, num_resamples: int = 2000) -> np.ndarray:
    """IQMs [num_resamples] of seeds drawn anew from `x` [R], NaN left out; NaN of fewer than 2."""
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return np.full(num_resamples, np.nan)
    return stats.trim_mean(rng.choice(x, (num_resamples, len(x))), 0.25, axis=1)


def final(returns: np.ndarray) -> dict[str, Any]:
    """IQM, its interval and the value of each seed in the last evaluation of returns [R, E, K]."""
    last = returns[:, -1].mean(-1)
    return {"iqm": iqm(last), "interval": [*iqm_interval(last)], "per_seed": last}


# --- curves ---

# Okabe and Ito's palette, which colour-blind readers can tell apart; an algorithm keeps its colour.
COLORS = {
    "ppo": "#0072B2",
    "bpo": "#D55E00",
    "p3o": "#009E73",
    "reppo": "#CC79A7",
    "bnpo": "#E69F00",
    "sac": "#56B4E9",
}
SPARE_COLORS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def curve_of(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IQM [E] over seeds and its interval, from returns [R, E, K]."""
    per_seed = returns.mean(-1)  # [R, E]; NaN of a dead seed stays NaN
    intervals = np.array([iqm_interval(x) for x in per_seed.T]).reshape(-1, 2)
    return np.array([iqm(x) for x in per_seed.T]), intervals[:, 0], intervals[:, 1]


def plot_curves(runs: list[tuple[str, Run, np.ndarray]], path: Path, title: str) -> None:
    """Draw greedy evaluation returns of `runs` (label, run, indices of its rows) to a PNG.

    Thick line: IQM over seeds; band: 95 % bootstrap interval; thin lines: the seeds, if they are no
    more than 64. Left against steps, right against training seconds. Nothing is smoothed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    algos = [run.algo for _, run, _ in runs]
    own = {algo: COLORS[algo] for algo in algos if algo in COLORS and algos.count(algo) == 1}
    colors = [color for color in SPARE_COLORS if color not in own.values()]
    spare = itertools.cycle((color, style) for style in ("-", "--", ":") for color in colors)
    for label, run, rows in runs:
        color, style = (own[run.algo], "-") if run.algo in own else next(spare)
        middle, lo, hi = curve_of(run.returns[rows])
        text = f"{label} (n={len(rows)})"
        for axis, x in zip(axes, (run.steps, run.seconds), strict=True):
            if sum(len(rows) for *_, rows in runs) <= 64:
                per_seed = run.returns[rows].mean(-1).T
                axis.plot(x, per_seed, color=color, alpha=0.2, linewidth=0.7)
            axis.fill_between(x, lo, hi, color=color, alpha=0.2, linewidth=0)
            axis.plot(x, middle, style, color=color, linewidth=2, label=text)
    axes[0].set(xlabel="steps per seed", ylabel="greedy return", title=title)
    axes[1].set(xlabel="training seconds, all seeds", title="IQM, 95 % interval over seeds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    for axis in axes:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))

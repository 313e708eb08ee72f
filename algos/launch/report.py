"""What is computed from a run: statistics over seeds, curves and tables."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import envs
from algos.launch import rundir

# --- rows of runs ---


def read_runs(run_dirs: list[str]) -> list[rundir.Run]:
    """Read run directories; ValueError if one is none, or if they differ in environment."""
    runs = [rundir.read_run(path) for path in run_dirs]
    found = {envs.canonical(run.config["env"]): run.path for run in runs}
    if len(found) > 1:
        listed = ", ".join(f"{env} ({path})" for env, path in found.items())
        raise ValueError(f"runs of different environments cannot share a figure: {listed}")
    return runs


def groups(run: rundir.Run) -> list[tuple[str, np.ndarray]]:
    """Rows of each swept value, in order: (label, indices); one group without a sweep."""
    labels = np.array(run.labels)
    return [(label, np.flatnonzero(labels == label)) for label in dict.fromkeys(run.labels)]


def entries(runs: list[rundir.Run]) -> list[tuple[str, rundir.Run, np.ndarray]]:
    """(label, run, indices of its rows) of every swept value; all labels differ."""
    found = [
        (f"{run.algo} {label}".strip(), run, index) for run in runs for label, index in groups(run)
    ]
    labels = [label for label, _, _ in found]
    return [
        (f"{label} ({run.path.name})" if labels.count(label) > 1 else label, run, index)
        for label, run, index in found
    ]


# --- statistics over seeds ---


def iqm(x: np.ndarray) -> float:
    """Interquartile mean of the finite values: the mean of the middle half."""
    x = x[np.isfinite(x)]
    return float(middle_mean(x)) if len(x) else float("nan")


def iqm_interval(x: np.ndarray, num_resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the IQM over seeds; `x` [R], NaN left out."""
    lo, hi = np.percentile(resampled_iqm(x, np.random.default_rng(0), num_resamples), [2.5, 97.5])
    return float(lo), float(hi)


def resampled_iqm(x: np.ndarray, rng: np.random.Generator, num_resamples: int = 2000) -> np.ndarray:
    """IQMs [num_resamples] of seeds drawn anew from `x` [R], NaN left out; NaN of fewer than 2."""
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return np.full(num_resamples, np.nan)
    return middle_mean(rng.choice(x, (num_resamples, len(x))))


def middle_mean(x: np.ndarray) -> np.ndarray:
    """Mean over the last axis without its lowest and highest quarter (rounded down)."""
    cut = x.shape[-1] // 4
    return np.sort(x)[..., cut : x.shape[-1] - cut].mean(-1)


def final(returns: np.ndarray) -> dict[str, Any]:
    """IQM, its interval and the mean of each seed in final returns [R, F]."""
    means = returns.mean(-1)
    return {"iqm": iqm(means), "interval": [*iqm_interval(means)], "per_seed": means}


def results(run: rundir.Run) -> list[dict[str, Any]]:
    """`final` of each swept value, and of its further policies, as JSON has it."""
    found = []
    for label, index in groups(run):
        numbers = final(run.final[index])
        if run.final_further:
            numbers["further"] = {name: final(x[index]) for name, x in run.final_further.items()}
        numbers = jax.tree.map(rundir.jsonable, numbers)
        found.append({"label": label, "n": len(index)} | numbers)
    return found


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


def plot_curves(runs: list[tuple[str, rundir.Run, np.ndarray]], path: Path, title: str) -> None:
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
    rundir.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


# --- tables ---


def summary(label: str, run: rundir.Run, index: np.ndarray) -> dict[str, Any]:
    """Final return of the rows `index` of a run, and what it cost."""
    final = run.final[index].mean(-1)  # [n]
    meta = rundir.read_json(run.path / "meta.json", num_devices=int, device=str)
    seconds = run.done["seconds"] if run.done else {"train": run.seconds[-1], "compile": np.nan}
    return {
        "label": label,
        "run": str(run.path),
        "env": envs.canonical(run.config["env"]),
        "finished": run.done is not None,
        "n": len(index),
        "alive": int(np.isfinite(final).sum()),
        "iqm": rundir.jsonable(iqm(final)),
        "interval": rundir.jsonable(iqm_interval(final)),
        "per_seed": rundir.jsonable(final),
        "episodes": run.final.shape[1],
        "steps": int(run.steps[-1]),
        "train_seconds": rundir.jsonable(seconds["train"]),
        "compile_seconds": rundir.jsonable(seconds["compile"]),
        "device": f"{meta['num_devices']} x {meta['device']}",
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Table of the summaries."""
    head = ["algorithm", "environment", "n", "final greedy return, IQM [95 %]", "episodes"]
    head += ["steps", "train, s", "compile, s", "device"]
    cells = [
        [
            row["label"] + ("" if row["finished"] else ", unfinished"),
            row["env"],
            f"{row['alive']}/{row['n']}",
            estimate(row["iqm"], row["interval"]),
            str(row["episodes"]),
            f"{row['steps']:,}",
            number(row["train_seconds"]),
            number(row["compile_seconds"]),
            row["device"],
        ]
        for row in rows
    ]
    return table(head, cells)


def number(x: float | None) -> str:
    """One decimal; a dash for what is not known."""
    return "-" if x is None or not np.isfinite(x) else f"{x:,.1f}"


def estimate(middle: float | None, interval: Iterable[float | None]) -> str:
    """A number with its interval."""
    lo, hi = map(number, interval)
    return f"{number(middle)} [{lo}, {hi}]"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown of the rows of cells."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return "".join((lines[0], f"|{'---|' * len(head)}\n", *lines[1:]))

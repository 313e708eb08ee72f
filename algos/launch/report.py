"""What is computed from runs: statistics over seeds and tasks, figures and tables."""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import envs
from algos.launch import rundir

# --- what is compared ---


class Entry(NamedTuple):
    """A curve and a row of a table: the seeds of one swept value of a run."""

    label: str  # entries of one label on several tasks are one method
    run: rundir.Run
    rows: np.ndarray  # [n] indices into the run's rows

    @property
    def task(self) -> str:
        """Full name of the environment."""
        return envs.canonical(self.run.config["env"])


def groups(run: rundir.Run) -> list[tuple[str, np.ndarray]]:
    """Rows of each swept value, in order: (label, indices); one group without a sweep."""
    labels = np.array(run.labels)
    return [(label, np.flatnonzero(labels == label)) for label in dict.fromkeys(run.labels)]


def entries(runs: Iterable[rundir.Run]) -> list[Entry]:
    """Every swept value of the runs, named by the algorithm and the value.

    If several have one name on the same task, the differing part of their paths is added to it,
    unless that is just the algorithm's name.
    """
    found = [
        Entry(f"{run.algo} {label}".strip(), run, rows)
        for run in runs
        for label, rows in groups(run)
    ]
    named = []
    for entry in found:
        same = [x.run.path for x in found if (x.label, x.task) == (entry.label, entry.task)]
        part = own_part(entry.run.path, same)
        more = f" ({part})" if len(same) > 1 and part != entry.run.algo else ""
        named.append(entry._replace(label=entry.label + more))
    return named


def own_part(path: Path, paths: list[Path]) -> str:
    """The part of `path` between the folders that all `paths` share at their start and end."""
    parts = [x.absolute().parts for x in paths]
    begin = num_shared(parts)
    end = num_shared([x[begin:][::-1] for x in parts])
    if min(map(len, parts)) == begin + end:  # one path lies in another: the folder before it too
        begin -= 1
    own = path.absolute().parts
    return "/".join(own[begin : len(own) - end])


def num_shared(parts: list[tuple[str, ...]]) -> int:
    """Number of the first items in which all of `parts` agree."""
    return sum(1 for _ in itertools.takewhile(lambda x: len({*x}) == 1, zip(*parts, strict=False)))


def by_task(entries: list[Entry]) -> dict[str, list[Entry]]:
    """The entries of each task."""
    tasks = dict.fromkeys(entry.task for entry in entries)
    return {task: [entry for entry in entries if entry.task == task] for task in tasks}


def relabel(entries: list[Entry], labels: list[str]) -> list[Entry]:
    """The entries with these labels, in the order of the legend."""
    known = dict.fromkeys(entry.label for entry in entries)
    if len(labels) != len(known):
        raise ValueError(f"{len(labels)} labels for {len(known)} curves: {', '.join(known)}")
    for label in labels:
        if not label.strip() or label.startswith("_"):  # matplotlib leaves it out of the legend
            raise ValueError(f"label {label!r}: it must not be empty or begin with _")
    names = dict(zip(known, labels, strict=True))
    renamed = [entry._replace(label=names[entry.label]) for entry in entries]
    taken: set[tuple[str, str]] = set()
    for entry in renamed:
        if (entry.label, entry.task) in taken:
            raise ValueError(f"two curves of {entry.task} are called {entry.label!r}")
        taken.add((entry.label, entry.task))
    return renamed


# --- statistics over seeds ---


def iqm(x: np.ndarray) -> float:
    """Interquartile mean of the finite values: the mean of the middle half."""
    x = x[np.isfinite(x)]
    return float(middle_mean(x)) if len(x) else float("nan")


def iqm_interval(*x: np.ndarray, num_resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the IQM over seeds [R], NaN left out.

    With several arrays, one for each task, the IQM is of all their values together, and the seeds
    of each task are drawn anew apart from the others (a stratified bootstrap). NaN if one of them
    has fewer than 2.
    """
    rng = np.random.default_rng(0)
    drawn = np.concatenate([resampled(part, rng, num_resamples) for part in x], 1)
    if np.isnan(drawn).any():  # sorting puts it last, where `middle_mean` cuts it off as if highest
        return float("nan"), float("nan")
    lo, hi = np.percentile(middle_mean(drawn), [2.5, 97.5])
    return float(lo), float(hi)


def resampled(x: np.ndarray, rng: np.random.Generator, num_resamples: int = 2000) -> np.ndarray:
    """Seeds drawn anew from `x` [R], NaN left out: [num_resamples, n]; NaN of fewer than 2."""
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return np.full((num_resamples, 1), np.nan)
    return rng.choice(x, (num_resamples, len(x)))


def middle_mean(x: np.ndarray) -> np.ndarray:
    """Mean over the last axis without its lowest and highest quarter (rounded down)."""
    cut = x.shape[-1] // 4
    return np.sort(x)[..., cut : x.shape[-1] - cut].mean(-1)


def difference(x: np.ndarray, y: np.ndarray) -> tuple[float, tuple[float, float]]:
    """IQM of the returns x [R] of seeds minus that of y [Q], and its 95 % bootstrap interval.

    The seeds of both are drawn anew, apart from each other; NaN is left out.
    """
    rng = np.random.default_rng(0)
    drawn_x, drawn_y = (middle_mean(resampled(returns, rng)) for returns in (x, y))
    lo, hi = np.percentile(drawn_x - drawn_y, [2.5, 97.5])
    return iqm(x) - iqm(y), (float(lo), float(hi))


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


# --- scores over tasks ---


def scores(entries: list[Entry], ranges: dict[str, tuple[float, float]]) -> dict[str, np.ndarray]:
    """Normalised final returns [tasks, n] of the seeds of each label, NaN where one is dead.

    `ranges` has the returns of each task that count as 0 and as 1. ValueError if one is missing, if
    a label has no live seed on a task, or not as many seeds as on the others: then their weights
    would differ.
    """
    found = {(entry.label, entry.task): entry for entry in entries}
    tasks = dict.fromkeys(entry.task for entry in entries)
    scores: dict[str, list[np.ndarray]] = {entry.label: [] for entry in entries}
    for label, task in itertools.product(scores, tasks):
        if task not in ranges:
            raise ValueError(f"the returns that count as 0 and as 1 are missing for {task}")
        if (label, task) not in found:
            raise ValueError(f"{label} has no run on {task}: scores need it on all tasks")
        _, run, rows = found[label, task]
        low, high = ranges[task]
        scores[label].append((run.final[rows].mean(-1) - low) / (high - low))
        if not np.isfinite(scores[label][-1]).any():
            raise ValueError(f"every seed of {label} on {task} died: it has no score")
        if len({len(score) for score in scores[label]}) > 1:
            raise ValueError(f"{label} has {len(rows)} seeds on {task}: scores need equal numbers")
    return {label: np.array(parts) for label, parts in scores.items()}


def profile(scores: np.ndarray, taus: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of seeds whose score is above each of `taus` [T], and its 95 % interval at each.

    Of `scores` [tasks, n], NaN is left out. The share is the mean over tasks; the interval is that
    of a stratified bootstrap.
    """
    above = lambda x: np.where(np.isnan(x[..., None]), np.nan, x[..., None] > taus).mean(-2)
    share = np.mean([above(x[np.isfinite(x)]) for x in scores], 0)
    rng = np.random.default_rng(0)
    drawn = np.mean([above(resampled(x, rng)) for x in scores], 0)  # [resamples, T]
    lo, hi = np.percentile(drawn, [2.5, 97.5], axis=0)
    return share, lo, hi


# --- figures ---

FORMATS = (".png", ".pdf", ".svg")
TEXT_WIDTH = 6.75  # inches, of a paper with two columns
MAX_THIN = 16  # seeds in a panel of which each has a line
X_LABELS = {"steps": "steps", "seconds": "seconds of training, all seeds"}
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.handlelength": 1.5,
    "legend.columnspacing": 1.2,
    "pdf.fonttype": 42,  # journals refuse matplotlib's default, fonts of type 3
}

# Colours that colour-blind readers can tell apart: Okabe and Ito's, then some of Paul Tol's.
COLORS = {
    "ppo": "#0072B2",
    "bpo": "#D55E00",
    "p3o": "#009E73",
    "reppo": "#CC79A7",
    "bnpo": "#E69F00",
    "sac": "#56B4E9",
    "reppo_discrete": "#882255",
    "bc": "#000000",
    "bcq": "#999933",
    "brac": "#332288",
}


def looks(entries: list[Entry]) -> dict[str, tuple[str, str]]:
    """Colour and line style of each label.

    An algorithm's colour goes to the label that is its name, or else to its first label. Other
    labels get colours of algorithms that are not shown, and then other styles.
    """
    algos: dict[str, str] = {}
    for entry in entries:
        algos.setdefault(entry.label, entry.run.algo)
    own: dict[str, str] = {}
    for label, algo in sorted(algos.items(), key=lambda item: item[0].lower() != item[1]):
        if algo in COLORS and algo not in own:
            own[algo] = label
    found = {label: (COLORS[algo], "-") for algo, label in own.items()}
    colors = sorted(COLORS.values(), key=lambda color: (color, "-") in found.values())
    pairs = [(color, style) for style in ("-", "--", ":", "-.") for color in colors]
    spare = itertools.cycle(pair for pair in pairs if pair not in found.values())
    return {label: found[label] if label in found else next(spare) for label in algos}


def curve_of(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IQM [E] over seeds and its interval, from returns [R, E, K]."""
    per_seed = returns.mean(-1)  # [R, E]; NaN of a dead seed stays NaN
    intervals = np.array([iqm_interval(x) for x in per_seed.T]).reshape(-1, 2)
    return np.array([iqm(x) for x in per_seed.T]), intervals[:, 0], intervals[:, 1]


def names(entries: list[Entry]) -> dict[str, str]:
    """Each label as the legend has it: with the number of seeds, or its range over tasks.

    Where seeds died, the number of those alive comes first.
    """
    counts: dict[str, list[int]] = {}
    alive: dict[str, list[int]] = {}
    for entry in entries:
        last = entry.run.returns[entry.rows, -1].mean(-1)
        counts.setdefault(entry.label, []).append(len(entry.rows))
        alive.setdefault(entry.label, []).append(int(np.isfinite(last).sum()))
    span = lambda n: "-".join(map(str, sorted({min(n), max(n)})))
    found = {}
    for label, n in counts.items():
        shown = span(n) if alive[label] == n else f"{span(alive[label])} of {span(n)}"
        found[label] = f"{label} (n={shown})"
    return found


def unit_of_steps(entries: list[Entry]) -> str:
    """What the runs count as steps; ValueError if they differ."""
    offline = [entry.label for entry in entries if "dataset" in entry.run.config]
    others = [entry.label for entry in entries if "dataset" not in entry.run.config]
    if offline and others:
        raise ValueError(
            f"steps of {offline[0]} are gradient steps, those of {others[0]} environment "
            "steps: choose --x seconds"
        )
    return "gradient steps" if offline else "environment steps"


def plot_curves(
    entries: list[Entry],
    path: Path,
    title: str = "",
    xs: tuple[str, ...] = ("steps",),
    width: float = TEXT_WIDTH,
) -> None:
    """Draw greedy evaluation returns: a panel for each task and each of `xs`, of X_LABELS."""
    tasks = by_task(entries)
    panels = [(task, x) for task in tasks for x in xs]
    x_labels = X_LABELS | ({"steps": unit_of_steps(entries)} if "steps" in xs else {})
    look, name = looks(entries), names(entries)
    title = title or ("" if len(tasks) > 1 else next(iter(tasks)))
    columns = len(xs) if len(xs) > 1 else int(width / 1.6)
    alive = [int(np.isfinite(run.final[rows]).all(-1).sum()) for _, run, rows in entries]
    legend = f"line: IQM over seeds; band: {interval_name(*alive)}"
    if any(map(shows_seeds, tasks.values())):
        legend += "; thin lines: single seeds"
    with figure(path, len(panels), columns, width, title, legend) as axes:
        columns = axes[0].get_gridspec().ncols
        for i, (axis, (task, x)) in enumerate(zip(axes, panels, strict=True)):
            draw_curves(axis, tasks[task], x, look, name)
            if len(tasks) > 1:
                axis.set_title(task.split("/", 1)[-1].replace("?", "\n?"))
            if i % columns == 0:
                axis.set_ylabel("greedy return")
            if i + columns >= len(panels):  # nothing below
                axis.set_xlabel(x_labels[x])
            axis.locator_params(axis="x", nbins=int(2 * width / columns))


def shows_seeds(entries: list[Entry]) -> bool:
    """Whether a panel has a thin line for each seed: it has several, and no more than MAX_THIN."""
    return len(entries) < sum(len(entry.rows) for entry in entries) <= MAX_THIN


def draw_curves(
    axis: Any,
    entries: list[Entry],
    x: str,
    look: dict[str, tuple[str, str]],
    name: dict[str, str],
) -> None:
    """Draw the entries of one task against `x`, of X_LABELS, with `looks` and names by label.

    Line: IQM over seeds; band: 95 % bootstrap interval; thin lines: see `shows_seeds`. Nothing is
    smoothed.
    """
    from matplotlib.ticker import EngFormatter

    thin = shows_seeds(entries)
    for label, run, rows in entries:
        color, style = look[label]
        along = getattr(run, x)
        if thin:
            axis.plot(along, run.returns[rows].mean(-1).T, color=color, alpha=0.3, linewidth=0.5)
        middle, lo, hi = curve_of(run.returns[rows])
        axis.fill_between(along, lo, hi, color=color, alpha=0.2, linewidth=0)
        marker = "o" if len(along) == 1 else ""  # one evaluation makes no line
        axis.plot(along, middle, style, color=color, label=name[label], marker=marker, markersize=3)
    if x == "steps":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_metric(axis: Any, lines: list[tuple[tuple[str, str], np.ndarray, np.ndarray]]) -> None:
    """Draw lines of (colour and style, steps [T], values [T, n]): median and range over seeds."""
    from matplotlib.ticker import EngFormatter

    for (color, style), steps, values in lines:
        some = np.isfinite(values).any(1)
        if some.any():
            x, y = steps[some], values[some]
            band = np.nanmin(y, 1), np.nanmax(y, 1)
            axis.fill_between(x, *band, color=color, alpha=0.2, linewidth=0)
            marker = "o" if len(x) == 1 else ""
            axis.plot(x, np.nanmedian(y, 1), style, color=color, marker=marker, markersize=3)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.locator_params(nbins=4)
    known = np.concatenate([values[np.isfinite(values)] for _, _, values in lines])
    if 0 < 100 * known.min() < known.max():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")


def plot_scores(
    entries: list[Entry],
    scores: dict[str, np.ndarray],
    path: Path,
    title: str = "",
    width: float = TEXT_WIDTH,
) -> None:
    """Draw the IQM of the `scores` of all tasks and its 95 % interval; beside it, the profile."""
    look = looks(entries)
    every = np.concatenate([score.ravel() for score in scores.values()])
    taus = np.linspace(min(0.0, np.nanmin(every)), max(1.0, np.nanmax(every)), 201)
    flat = {"solid_capstyle": "butt"}  # the default adds half a line width at each end
    with figure(path, 2, 2, width, title) as (left, right):
        for i, (label, score) in enumerate(scores.items()):
            color, style = look[label]
            left.plot(iqm_interval(*score), [i, i], color=color, alpha=0.3, linewidth=6, **flat)
            left.plot(iqm(score), i, "o", color=color, markersize=4)
            share, lo, hi = profile(score, taus)
            right.fill_between(taus, lo, hi, color=color, alpha=0.2, linewidth=0)
            right.plot(taus, share, style, color=color, label=label)
        left.set(ylim=(len(scores) - 0.5, -0.5), yticks=[], xlabel="normalised score")
        left.set_title("IQM, 95 % interval")
        left.spines["left"].set_visible(False)
        right.set(ylim=(0, 1.02), xlabel="normalised score", ylabel="share of runs")
        right.set_title("runs above a score")


@contextlib.contextmanager
def figure(
    path: Path, count: int, columns: int, width: float, title: str, legend_title: str = ""
) -> Iterator[list]:
    """The `count` panels of a figure, to draw in; then come the legend, the size and the file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = math.ceil(count / max(1, columns))
    columns = math.ceil(count / num_rows)  # rows of equal length, as far as possible
    height = min(max(0.75 * width / columns, 1.5), 2.6)  # of a panel
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(fig)
        axes = list(fig.subplots(num_rows, columns, squeeze=False).flat)
        for axis in axes[count:]:
            axis.remove()
        yield axes[:count]
        lines = {
            label: line
            for axis in axes[:count]
            for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        titles = legend_title, legend_title.replace("; ", ";\n")
        # As many columns as the width allows; where the title is wider, it gets several lines.
        for text, ncols in itertools.product(titles, range(len(lines), 0, -1)):
            for too_wide in fig.legends[:]:
                too_wide.remove()
            place: dict[str, Any] = {"loc": "outside lower center", "ncols": ncols}
            legend = fig.legend(lines.values(), map(plain, lines), title=text, **place)
            if legend.get_window_extent().width < fig.bbox.width:
                break
        below = sum(legend.get_window_extent().height for legend in fig.legends) / fig.dpi
        fig.suptitle(plain(title))
        fig.set_figheight(num_rows * height + below + 0.25 * bool(title))
        kind = path.suffix[1:]
        rundir.write_atomic(path, lambda file: fig.savefig(file, format=kind, dpi=200))


def plain(text: str) -> str:
    """The text as matplotlib draws it without formulas."""
    return text.replace("$", r"\$")


# --- tables ---


def summary(label: str, run: rundir.Run, index: np.ndarray) -> dict[str, Any]:
    """Final return of the rows `index` of a run, and what it cost."""
    numbers = jax.tree.map(rundir.jsonable, final(run.final[index]))
    meta = rundir.read_json(run.path / "meta.json", num_devices=int, device=str)
    seconds = run.done["seconds"] if run.done else {"train": run.seconds[-1], "compile": np.nan}
    return {
        "label": label,
        "run": str(run.path),
        "env": envs.canonical(run.config["env"]),
        "finished": run.done is not None,
        "n": len(index),
        "alive": sum(x is not None for x in numbers["per_seed"]),
        **numbers,
        "episodes": run.final.shape[1],
        "steps": int(run.steps[-1]),
        "train_seconds": rundir.jsonable(seconds["train"]),
        "compile_seconds": rundir.jsonable(seconds["compile"]),
        "device": f"{meta['num_devices']} x {meta['device']}",
    }


def summary_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of the summaries."""
    interval = interval_name(*(row["alive"] for row in rows))
    head = ["algorithm", "environment", "n", f"final greedy return, IQM [{interval}]"]
    head += ["worst seed", "episodes", "steps", "train, s", "compile, s", "device"]
    cells = [
        [
            row["label"] + ("" if row["finished"] else ", unfinished"),
            row["env"],
            f"{row['alive']}/{row['n']}",
            estimate(row["iqm"], row["interval"]),
            number(worst(row["per_seed"]), decimals(row["iqm"])),
            str(row["episodes"]),
            f"{row['steps']:,}",
            number(row["train_seconds"]),
            number(row["compile_seconds"]),
            row["device"],
        ]
        for row in rows
    ]
    return head, cells


def markdown(rows: list[dict[str, Any]]) -> str:
    """Table of the summaries."""
    return table(*summary_table(rows))


def differences(entries: list[Entry]) -> list[dict[str, Any]]:
    """Final returns of each entry minus those of the first entry of its task."""
    found = []
    for task, (first, *others) in by_task(entries).items():
        reference = first.run.final[first.rows].mean(-1)
        for entry in others:
            returns = entry.run.final[entry.rows].mean(-1)
            middle, interval = difference(returns, reference)
            found.append(
                {
                    "label": entry.label,
                    "minus": first.label,
                    "env": task,
                    "n": [int(np.isfinite(x).sum()) for x in (returns, reference)],
                    "steps": [int(x.run.steps[-1]) for x in (entry, first)],
                    "iqm": rundir.jsonable(middle),
                    "interval": rundir.jsonable(interval),
                }
            )
    return found


def curve_table(entries: list[Entry]) -> tuple[list[str], list[list[Any]]]:
    """Head and cells of the curves: a row for each seed and evaluation, with its mean return."""
    head = ["label", "algorithm", "environment", "seed", "steps", "seconds", "return"]
    cells = [
        [entry.label, run.algo, task, int(run.seeds[row]), int(steps), float(seconds), value]
        for task, same in by_task(entries).items()
        for entry in same
        for run in [entry.run]
        for row in entry.rows
        for steps, seconds, value in zip(
            run.steps, run.seconds, run.returns[row].mean(-1).tolist(), strict=True
        )
    ]
    return head, cells


def difference_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of the differences; with steps if some compare unequal ones."""
    few = "; rough with 4 seeds or fewer" if any(min(row["n"]) <= 4 for row in rows) else ""
    head = ["algorithm", "minus", "environment", f"difference of the IQMs [95 % interval{few}]"]
    cells = [
        [row["label"], row["minus"], row["env"], difference_estimate(row["iqm"], row["interval"])]
        for row in rows
    ]
    if any(row["steps"][0] != row["steps"][1] for row in rows):
        head.append("steps")
        for row, line in zip(rows, cells, strict=True):
            line.append("{:,} and {:,}".format(*row["steps"]))
    return head, cells


def score_summary(label: str, scores: np.ndarray) -> dict[str, Any]:
    """IQM of the scores [tasks, n] of all tasks together."""
    return {
        "label": label,
        "tasks": len(scores),
        "n": scores.size,
        "alive": int(np.isfinite(scores).sum()),
        "iqm": iqm(scores),
        "interval": rundir.jsonable(iqm_interval(*scores)),
    }


def score_markdown(rows: list[dict[str, Any]]) -> str:
    """Table of the summaries of scores."""
    cells = [
        [
            row["label"],
            str(row["tasks"]),
            f"{row['alive']}/{row['n']}",
            estimate(row["iqm"], row["interval"], digits=3),
        ]
        for row in rows
    ]
    return table(["algorithm", "tasks", "n", "normalised score, IQM [95 % interval]"], cells)


def worst(per_seed: list[float | None]) -> float | None:
    """The lowest of the seeds that are alive; None if none is."""
    return min((x for x in per_seed if x is not None), default=None)


def interval_name(*num_seeds: int) -> str:
    """What the bootstrap intervals of so many seeds are."""
    # With 4 seeds or fewer, over 2.5 % of the resamples have the lowest seed as their IQM, and over
    # 2.5 % the highest, so the interval is the range.
    few = [n <= 4 for n in num_seeds]
    if all(few):
        return "lowest and highest seed"
    return "95 % interval; of 4 seeds or fewer their range" if any(few) else "95 % interval"


def number(x: float | None, digits: int = 1) -> str:
    """A number with so many decimals; a dash for what is not known."""
    return "-" if x is None or not np.isfinite(x) else f"{x:z,.{digits}f}"  # z: never -0.0


def decimals(x: float | None) -> int:
    """Decimals with which a return is shown: one from 10 on, two below."""
    return 1 if x is None or abs(x) >= 10 else 2


def estimate(
    middle: float | None, interval: Iterable[float | None], digits: int | None = None
) -> str:
    """A number with its interval, with the decimals of a return if `digits` does not say them."""
    digits = decimals(middle) if digits is None else digits
    shown, lo, hi = (number(x, digits) for x in (middle, *interval))
    return f"{shown} [{lo}, {hi}]"


def difference_estimate(middle: float | None, interval: Iterable[float | None]) -> str:
    """A difference with its interval, with the decimals of the largest of the three."""
    ends = [*interval]
    largest = max((abs(x) for x in (middle, *ends) if x is not None), default=None)
    return estimate(middle, ends, decimals(largest))


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown of the rows of cells."""
    one_cell = lambda text: text.replace("|", r"\|").replace("\n", " ")
    lines = [f"| {' | '.join(map(one_cell, cells))} |\n" for cells in (head, *rows)]
    return "".join((lines[0], f"|{'---|' * len(head)}\n", *lines[1:]))

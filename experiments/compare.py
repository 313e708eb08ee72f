"""Runs side by side: one figure of all curves, and a Markdown table of the final evaluations.

    python experiments/compare.py RUN_DIR RUN_DIR --out comparison.png --json comparison.json

All runs must be of one environment. The table has a row for each run, and for each value of a swept
run: the interquartile mean over seeds of the last greedy evaluation, with its 95 % bootstrap
interval. Seconds are of the whole launch, all of its rows together.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import envs
from algos import logs, rundir


def read_runs(run_dirs: list[str]) -> list[rundir.Run]:
    """Read run directories; ValueError if one is none, or if they differ in environment."""
    runs = [rundir.read_run(path) for path in run_dirs]
    found = {envs.canonical(run.config["env"]): run.path for run in runs}
    if len(found) > 1:
        listed = ", ".join(f"{env} ({path})" for env, path in found.items())
        raise ValueError(f"runs of different environments cannot share a figure: {listed}")
    return runs


def entries(runs: list[rundir.Run]) -> list[tuple[str, rundir.Run, np.ndarray]]:
    """(label, run, indices of its rows) of every swept value; all labels differ."""
    found = [
        (f"{run.algo} {label}".strip(), run, index)
        for run in runs
        for label, index in rundir.groups(run)
    ]
    labels = [label for label, _, _ in found]
    return [
        (f"{label} ({run.path.name})" if labels.count(label) > 1 else label, run, index)
        for label, run, index in found
    ]


def summary(label: str, run: rundir.Run, index: np.ndarray) -> dict[str, Any]:
    """Final return of the rows `index` of a run, and what it cost."""
    final = run.returns[index, -1].mean(-1)  # [n]
    meta = json.loads((run.path / "meta.json").read_text())
    seconds = run.done["seconds"] if run.done else {"train": run.seconds[-1], "compile": np.nan}
    return {
        "label": label,
        "run": str(run.path),
        "env": envs.canonical(run.config["env"]),
        "finished": run.done is not None,
        "n": len(index),
        "alive": int(np.isfinite(final).sum()),
        "iqm": logs.jsonable(rundir.iqm(final)),
        "interval": logs.jsonable(rundir.iqm_interval(final)),
        "per_seed": logs.jsonable(final),
        "steps": int(run.steps[-1]),
        "train_seconds": logs.jsonable(seconds["train"]),
        "compile_seconds": logs.jsonable(seconds["compile"]),
        "device": f"{meta['num_devices']} x {meta['device']}",
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Table of the summaries."""
    head = ["algorithm", "environment", "n", "final greedy return, IQM [95 %]"]
    head += ["steps", "train, s", "compile, s", "device"]
    cells = [
        [
            row["label"] + ("" if row["finished"] else ", unfinished"),
            row["env"],
            f"{row['alive']}/{row['n']}",
            estimate(row["iqm"], row["interval"]),
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


def main(argv: list[str] | None = None):
    """Compare from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", default="comparison.png", help="PNG to write")
    parser.add_argument("--json", help="JSON to write, with the values of every seed")
    args = parser.parse_args(argv)
    try:
        found = entries(read_runs(args.run_dirs))
        rows = [summary(*entry) for entry in found]
        rundir.plot_curves(found, Path(args.out), rows[0]["env"])
        if args.json:
            rundir.write_json(Path(args.json), rows)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(markdown(rows), end="")
    print(f"\ncurves: {args.out}")


if __name__ == "__main__":
    main()

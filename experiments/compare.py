"""Overlay finished or running launches of one environment, as curves and as a Markdown table.

    python experiments/compare.py RUN_DIR RUN_DIR [--out curves.png]

Final greedy returns: interquartile mean (IQM) over seeds with its 95 % bootstrap interval. A swept
launch gives one row and one curve for each value.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import envs
from algos import rundir

HEADER = ["run", "environment", "seeds", "IQM [95 %]", "steps", "train s", "compile s", "device"]


def main(argv: list[str] | None = None) -> None:
    """Print the table and draw the curves; one line and exit status 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="picture to write")
    arguments = parser.parse_args(argv)
    try:
        runs = curves_of([rundir.read_run(path) for path in arguments.run_dirs])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(table(runs))
    rundir.plot_curves(runs, arguments.out, envs.canonical(runs[0][1].config["env"]))
    print(f"\ncurves: {arguments.out}")


def curves_of(runs: list[rundir.Run]) -> list[tuple[str, rundir.Run, np.ndarray]]:
    """(label, run, rows) of every curve; ValueError if the environments differ."""
    tasks = {envs.canonical(run.config["env"]) for run in runs}
    if len(tasks) > 1:
        raise ValueError(f"runs of different environments cannot share axes: {sorted(tasks)}")
    names = [run.algo for run in runs]
    curves = []
    for run in runs:
        name = run.algo if names.count(run.algo) == 1 else run.path.name
        curves += [(f"{name} {label}".strip(), run, rows) for label, rows in rundir.groups(run)]
    return curves


def table(curves: list[tuple[str, rundir.Run, np.ndarray]]) -> str:
    """Markdown table, one row per curve; seeds are those alive over all."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for label, run, rows in curves:
        final = run.returns[rows, -1].mean(-1)
        lo, hi = rundir.iqm_interval(final)
        meta = json.loads((run.path / "meta.json").read_text())
        compiling = f"{run.done['seconds']['compile']:.1f}" if run.done else "not finished"
        lines.append(
            [
                label,
                envs.canonical(run.config["env"]),
                f"{np.isfinite(final).sum()}/{len(rows)}",
                f"{rundir.iqm(final):.1f} [{lo:.1f}, {hi:.1f}]",
                f"{run.steps[-1]:,}",
                f"{run.seconds[-1]:.1f}",
                compiling,
                f"{meta['num_devices']} x {meta['device']}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()

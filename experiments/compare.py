"""Runs side by side: one figure of all curves, and a Markdown table of the final evaluations.

    python experiments/compare.py RUN_DIR RUN_DIR --out comparison.png --json comparison.json

All runs must be of one environment. The table has a row for each run, and for each value of a swept
run: the interquartile mean over seeds of the last greedy evaluation, with its 95 % bootstrap
interval. Seconds are of the whole launch, all of its rows together.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from algos.launch import report, rundir


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
        found = report.entries(report.read_runs(args.run_dirs))
        rows = [report.summary(*entry) for entry in found]
        report.plot_curves(found, Path(args.out), rows[0]["env"])
        if args.json:
            rundir.write_json(Path(args.json), rows)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(report.markdown(rows), end="")
    print(f"\ncurves: {args.out}")


if __name__ == "__main__":
    main()

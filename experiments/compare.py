"""Runs side by side: Markdown tables, a figure for a paper, and scores over several tasks.

    python experiments/compare.py RUN_DIR RUN_DIR
    python experiments/compare.py RUN_DIR RUN_DIR --out comparison.pdf --json comparison.json
    python experiments/compare.py RUN_DIR ... --out narrow.pdf --width 3.25 --labels PPO BPO
    python experiments/compare.py RUN_DIR ... --normalise scores.json

The table has a row for each run, and for each value of a swept run: the interquartile mean over
seeds of the last greedy evaluation, with its 95 % bootstrap interval. Seconds are those of
all rows of the run together. A second table has the difference of each row to the first one of
its task. The figure of --out has a panel for each task. RUN_DIR_s8, a launch that adds seeds to
RUN_DIR, is merged with it if both are given.

--normalise names a JSON file with the returns of each task that count as 0 and as 1, such as those
of a random and of a trained policy: {"gym/Hopper-v5": [18, 3500], "gym/Ant-v5": [-60, 5000]}. With
it there is a further table, the interquartile mean over the seeds of all tasks, and --out writes a
second figure, OUT_scores, which adds the share of seeds above each score.
"""

import argparse
import csv
import io
import math
import sys
from pathlib import Path

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import envs
from algos.launch import cli, logs, report, rundir
from experiments import runner


def read_runs(run_dirs: list[Path]) -> list[rundir.Run]:
    """The runs in these directories; ValueError if one is none, or is given twice."""
    places = [path.resolve() for path in run_dirs]
    for i, path in enumerate(run_dirs):
        if places[i] in places[:i]:
            raise ValueError(f"{path} is given twice: name each run once")
    return [rundir.read_run(path) for path in run_dirs]


def grouped(runs: list[rundir.Run]) -> list[list[rundir.Run]]:
    """The runs, each followed by the launches that add seeds to it (RUN_s8 to RUN).

    Both must be complete and have the same settings, and all their seeds must differ. RUN_s8_s16
    adds seeds to RUN too, if RUN_s8 does.
    """

    def first_of(run: rundir.Run) -> rundir.Run:
        before = next((other for other in runs if continues(run, other)), None)
        return first_of(before) if before else run

    whole = {run.path: run for run in runs}
    launches: dict[Path, list[Path]] = {}
    for run in runs:
        launches.setdefault(first_of(run).path, []).append(run.path)
    return [
        [whole[path], *(whole[x] for x in sorted({*paths} - {path}))]
        for path, paths in launches.items()
    ]


def joined(launches: list[rundir.Run]) -> rundir.Run:
    """The launches of a run as one run."""
    return runner.read_launches([x.path for x in launches]) if launches[1:] else launches[0]


def continues(run: rundir.Run, other: rundir.Run) -> bool:
    """Whether `run` adds seeds to `other`: by its name, by its settings, and with new seeds."""

    def settings(x: rundir.Run) -> tuple:
        return x.algo, x.config, [x.launch.get(name) for name in runner.SHARED]

    return bool(
        runner.adds_seeds(run.path.resolve(), other.path.resolve())
        and settings(run) == settings(other)
        and not {*run.seeds.tolist()} & {*other.seeds.tolist()}
        and run.done
        and other.done
    )


def check_ending(out: Path, *endings: str) -> None:
    """ValueError if the name of a file to write has another ending."""
    if out.suffix not in endings:
        raise ValueError(f"--out {out}: its name is to end in {', '.join(endings)}")


def outputs_of(args: argparse.Namespace) -> dict[str, Path]:
    """The files that will be written; ValueError for an unknown format, or one that exists."""
    outputs = {}
    if args.out:
        check_ending(args.out, *report.FORMATS)
        outputs["curves"] = args.out
        if args.normalise:
            outputs["scores"] = args.out.with_stem(f"{args.out.stem}_scores")
    if args.json:
        outputs["numbers"] = args.json
    if args.csv:
        outputs["rows"] = args.csv
    places = [path.resolve() for path in outputs.values()]
    twice = [path for path in outputs.values() if places.count(path.resolve()) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is to be written twice: choose another name")
    rundir.check_new(outputs.values(), args.force)
    return outputs


def read_ranges(path: Path) -> dict[str, tuple[float, float]]:
    """Returns that count as 0 and as 1, by the full name of each task; ValueError if damaged."""
    found = {}
    for task, ends in rundir.read_json(path).items():
        two = isinstance(ends, list) and [type(x) in (int, float) for x in ends] == [True, True]
        low, high = map(float, ends) if two else (math.nan, math.nan)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"{path}: {task} is to have [low, high], two numbers, not {ends!r}")
        name = envs.canonical(task)
        if name in found:
            raise ValueError(f"{path}: {name} is there twice")
        found[name] = low, high
    return found


@logs.steady()
def main(argv: list[str] | None = None) -> None:
    """Compare from the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "run_dirs", nargs="+", type=cli.path, metavar="RUN_DIR", help="runs to compare"
    )
    parser.add_argument("--out", type=cli.path, help="figure to write: png, pdf or svg")
    parser.add_argument("--labels", nargs="+", help="names of the curves, in the legend's order")
    parser.add_argument(
        "--title", default="", help="of the figure; default: the task, if it has only one"
    )
    parser.add_argument("--width", type=float, default=report.TEXT_WIDTH, help="inches")
    parser.add_argument(
        "--x", nargs="+", choices=report.X_LABELS, default=["steps"], help="a panel for each"
    )
    parser.add_argument(
        "--normalise", type=cli.path, metavar="FILE", help="JSON: TASK -> [low, high]"
    )
    parser.add_argument(
        "--json", type=cli.path, help="JSON to write, with the values of every seed"
    )
    parser.add_argument(
        "--csv", type=cli.path, help="CSV to write: steps, seconds and return of every evaluation"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    if not 2 <= args.width <= 30:
        parser.error(f"--width {args.width:g}: 2 to 30 inches are possible")
    parser.needs(args, "out", "title", "width", "x")
    try:
        outputs = outputs_of(args)
        entries = report.entries(map(joined, grouped(read_runs(args.run_dirs))))
        if args.labels:
            entries = report.relabel(entries, args.labels)
        rows = [report.summary(*entry) for entry in entries]
        differences = report.differences(entries)
        scores = report.scores(entries, read_ranges(args.normalise)) if args.normalise else {}
        summaries = [report.score_summary(*item) for item in scores.items()]
        if "curves" in outputs:
            report.plot_curves(entries, outputs["curves"], args.title, tuple(args.x), args.width)
        if "scores" in outputs:
            report.plot_scores(entries, scores, outputs["scores"], args.title, args.width)
        if "numbers" in outputs:
            rundir.write_json(
                outputs["numbers"], {"rows": rows, "differences": differences, "scores": summaries}
            )
        if "rows" in outputs:
            text = io.StringIO(newline="")
            head, cells = report.curve_table(entries)
            csv.writer(text, lineterminator="\n").writerows([head, *cells])
            rundir.write_text(outputs["rows"], text.getvalue())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(report.markdown(rows))
    if differences:
        print(report.table(*report.difference_table(differences)))
    if summaries:
        print(report.score_markdown(summaries))
    for what, path in outputs.items():
        print(f"{what}: {path}")


if __name__ == "__main__":
    main()

"""One HTML page of runs, to look at or to send: curves, tables, losses, pictures and settings.

    python experiments/report.py RUN_DIR --out page.html
    python experiments/report.py RUN_DIR RUN_DIR --out page.html --title "PPO and BPO on hopper"

The page is one file that loads nothing, so it works offline. Its curves and numbers are those of
compare.py, which joins RUN_s8, a launch that adds seeds to RUN, with RUN. It includes the pictures
of the best, median and worst policy of each launch that --render or render.py drew.
"""

import base64
import itertools
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from algos.launch import cli, logs, render, report, rundir
from experiments import compare
from experiments.page import LARGE, SMALL, chart, charts, node, page_of, section, table

# Starts of names in metrics.jsonl that get no small chart: curves and tables show evaluations.
NO_METRIC = ("global_step", "time/", "eval/", "final/")
# Launch flags that are listed with the settings of a run.
FLAGS = ("preset", "seed", "num_seeds", "sweep")
FLAGS += ("num_evals", "eval_episodes", "final_episodes", "partial_at_return")
# SVG's dashes for matplotlib's line styles.
DASHES = {"-": "", "--": "7 3", ":": "2 2", "-.": "7 2 2 2"}


# Steps [T] and values [T, R] of each metric, as `rundir.read_metrics` has them.
Metrics = dict[str, tuple[np.ndarray, np.ndarray]]


class Source(NamedTuple):
    """What the page shows of a run directory; an entry, in contrast, is one curve."""

    name: str
    run: rundir.Run
    meta: dict[str, Any]


# --- sections ---


def headings(entries: list[report.Entry]) -> list[str]:
    """Labels of the entries, with their tasks if there are several."""
    several = len(report.by_task(entries)) > 1
    return [f"{entry.label}, {entry.task}" if several else entry.label for entry in entries]


def legend(entries: list[report.Entry]) -> ET.Element:
    """Colour and name of every curve."""
    names, items = report.names(entries), []
    for label, (color, style) in report.looks(entries).items():
        look = {"stroke": color, "stroke_width": "3", "stroke_dasharray": DASHES[style]}
        swatch = node("svg", node("path", d="M0 7H44", **look), viewBox="0 0 44 14")
        items.append(node("li", swatch, names[label]))
    return node("ul", *items, class_="legend")


def curves(entries: list[report.Entry]) -> list[ET.Element]:
    """Learning curves of every task, against steps and against seconds."""
    look, tasks = report.looks(entries), report.by_task(entries)
    found: dict[str, list[ET.Element]] = {x: [] for x in report.X_LABELS}
    for task, present in tasks.items():
        labels = dict(report.X_LABELS)
        try:
            labels["steps"] = report.unit_of_steps(present)
        except ValueError:  # offline and other runs have only seconds in common
            del labels["steps"]
        for x, label in labels.items():

            def paint(axis, present=present, x=x, label=label):
                unnamed = dict.fromkeys(look, "")  # the page has one legend for all charts
                report.draw_curves(axis, present, x, look, unnamed)
                axis.set(xlabel=label, ylabel="greedy return")

            found[x].append(chart(paint, LARGE, task))
    # A row of tasks for each horizontal axis; with one task, a single row.
    rows = found.values() if len(tasks) > 1 else [itertools.chain(*found.values())]
    return [charts(row) for row in rows]


def seeds(entries: list[report.Entry], summaries: list[dict[str, Any]]) -> ET.Element:
    """Final return of every seed of every entry."""
    every = sorted({int(seed) for entry in entries for seed in entry.run.seeds[entry.rows]})
    rows = []
    for name, entry, row in zip(headings(entries), entries, summaries, strict=True):
        digits = report.decimals(row["iqm"])
        shown = ["dead" if x is None else report.number(x, digits) for x in row["per_seed"]]
        final = dict(zip(entry.run.seeds[entry.rows].tolist(), shown, strict=True))
        rows.append([name, *(final.get(seed, "") for seed in every)])
    return table("seeds", ["seed", *map(str, every)], rows)


def metrics(entries: list[report.Entry], of_run: dict[Path, Metrics]) -> list[ET.Element]:
    """A chart for each metric but NO_METRIC, by task and by what the runs count as steps.

    Metrics that are constant are listed instead.
    """
    look, parts = report.looks(entries), []
    groups: dict[str, list[report.Entry]] = {}
    for task, present in report.by_task(entries).items():
        for entry in present:
            groups.setdefault(f"{task}, {report.unit_of_steps([entry])}", []).append(entry)
    for title, present in groups.items():
        names = {name for entry in present for name in of_run[entry.run.path]}
        figures, constant = [], []
        for name in sorted(x for x in names if not x.startswith(NO_METRIC)):
            having = [entry for entry in present if name in of_run[entry.run.path]]
            lines = [
                (look[label], steps, values[:, rows])
                for label, run, rows in having
                for steps, values in [of_run[run.path][name]]
            ]
            known = {x for _, _, values in lines for x in values[np.isfinite(values)].tolist()}
            if len(known) < 2:
                constant.append(f"{name} = {known.pop():g}" if known else f"{name} (no value)")
            else:
                paint = lambda axis, lines=lines: report.draw_metric(axis, lines)
                figures.append(chart(paint, SMALL, "", name))
        parts += [node("h3", title), charts(figures, "charts small")] if names else []
        parts += [node("p", f"Constant: {', '.join(constant)}.")] if constant else []
    return parts


def pictures(source: Source) -> list[ET.Element]:
    """What was drawn of the best, median and worst policy of a run."""
    figures = []
    for path, caption in render.pictures(source.run).items():
        text = f"{source.name}, {caption}"
        if path.suffix == ".html":  # its script cannot reach this page
            player = {"srcdoc": path.read_text(), "sandbox": "allow-scripts"}
            shown = node("iframe", **player, title=text)
        else:
            data = base64.b64encode(path.read_bytes()).decode()
            shown = node("img", src=f"data:image/gif;base64,{data}", alt=text)
        figures.append(node("figure", node("figcaption", text), shown))
    return [charts(figures, "charts pictures")] if figures else []


def facts(source: Source) -> dict[str, str]:
    """What was run, and what it cost."""
    _, run, meta = source
    seconds = {"train": float(run.seconds[-1])} | (run.done["seconds"] if run.done else {})
    named = [f"{name} {version}" for name, version in meta.get("versions", {}).items()]
    return {
        "algorithm": run.algo,
        "task": run.config["env"],
        "seeds": ", ".join(map(str, dict.fromkeys(run.seeds.tolist()))),
        "swept": ", ".join(label for label, _ in report.groups(run)),
        "steps": f"{run.steps[-1]:,}" + ("" if run.done else ", unfinished"),
        **{
            f"{part}, s": report.number(seconds.get(part))
            for part in ("compile", "train", "eval", "wall")
        },
        "device": f"{meta['num_devices']} x {meta['device']}",
        "commit": meta.get("commit", ""),
        "versions": ", ".join(named),
        "command": meta.get("command", ""),
        "resumed by": "; ".join(resumed["command"] for resumed in meta.get("resumed", [])),
        "directory": str(run.path),
    }


def settings(run: rundir.Run) -> dict[str, str]:
    """Fields of the configuration by their path, and the flags that decide what is measured."""
    flags = {name: run.launch[name] for name in FLAGS if name in run.launch}
    swept = dict(item.partition("=")[::2] for item in run.launch.get("sweep", []))
    nested = lambda x: isinstance(x, dict) or (isinstance(x, list) and dict in map(type, x))
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        run.config | swept | flags, is_leaf=lambda x: not nested(x)
    )
    name_of = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name_of(path): json.dumps(x) for path, x in leaves}


def differing_settings(sources: list[Source]) -> list[list[str]]:
    """Settings that differ between the runs that have them: name and value of each run."""
    found = [settings(source.run) for source in sources]
    names = dict.fromkeys(itertools.chain(*found))
    rows = [[name, *(values.get(name, "-") for values in found)] for name in names]
    return [row for row in rows if len({*row[1:]} - {"-"}) > 1]


def read_sources(runs: list[rundir.Run]) -> list[Source]:
    """What the page has of each run; ValueError if a file is damaged."""
    # An empty label makes one entry of all rows, so that a name is that of the whole run.
    whole = report.entries(run._replace(labels=[""] * len(run.labels)) for run in runs)
    return [
        Source(
            name,
            run,
            rundir.read_json(run.path / "meta.json", num_devices=int, device=str),
        )
        for name, run in zip(headings(whole), runs, strict=True)
    ]


def read_metrics(launches: list[rundir.Run]) -> Metrics:
    """The metrics of all launches of a run; NaN where a launch has none of this name and step."""
    parts = [rundir.read_metrics(run.path, len(run.seeds)) for run in launches]
    ends = np.cumsum([len(run.seeds) for run in launches])
    found: Metrics = {}
    for name in dict.fromkeys(itertools.chain(*parts)):
        steps = np.unique(np.concatenate([part[name][0] for part in parts if name in part]))
        values = np.full((len(steps), ends[-1]), np.nan)
        for run, part, end in zip(launches, parts, ends, strict=True):
            if name in part:
                rows = slice(end - len(run.seeds), end)
                values[np.searchsorted(steps, part[name][0]), rows] = part[name][1]
        found[name] = steps, values
    return found


def sections(
    entries: list[report.Entry], sources: list[Source], of_run: dict[Path, Metrics]
) -> list[ET.Element]:
    """All parts of the page, in order.

    For a further chart, add a `section` with a `chart`, whose `paint` draws on a matplotlib axis.
    """
    summaries = [report.summary(*entry) for entry in entries]
    alive, count = (sum(row[name] for row in summaries) for name in ("alive", "n"))
    num_runs = "One run" if len(sources) == 1 else f"{len(sources)} runs"
    names = [source.name for source in sources]
    compared = report.differences(entries)
    small, different = metrics(entries, of_run), differing_settings(sources)
    columns = [facts(source) for source in sources]
    rows = [[key, *(values[key] for values in columns)] for key in columns[0]]
    return [
        node("p", f"{num_runs}; {alive} of {count} seeds are alive."),
        *section(
            "Learning curves",
            "Greedy evaluation. Line: interquartile mean (IQM) over seeds. Band: "
            f"{report.interval_name(*(row['alive'] for row in summaries))}. "
            f"Thin lines: the seeds, if a chart has at most {report.MAX_THIN}.",
            legend(entries),
            *curves(entries),
        ),
        *section(
            "Final returns",
            "The last evaluation. n: seeds that are alive, of all. Episodes are those of a seed, "
            "seconds those of all seeds together.",
            table("returns", *report.summary_table(summaries)),
        ),
        *section(
            "Differences",
            "Final returns minus those of the first run of the task: the difference of the IQMs "
            "and its 95 % bootstrap interval. If that contains 0, the seeds do not show which run "
            "is better.",
            *([table("differences", *report.difference_table(compared))] if compared else []),
        ),
        *section("Seeds", "Final return of each seed.", seeds(entries, summaries)),
        *section(
            "Policies",
            "One greedy episode of the best, the median and the worst seed, from the same state.",
            *itertools.chain(*map(pictures, sources)),
        ),
        *section(
            "Losses and health",
            "Line: median over seeds. Band: from the lowest to the highest seed. Horizontal axis: "
            "the steps that the heading names. A vertical axis is logarithmic if all values are "
            "positive and the highest is over 100 times the lowest.",
            *([legend(entries), *small] if small else []),
        ),
        *section(
            "Runs",
            "What was run. Seconds are those of the whole launch.",
            table("facts", ["", *names], [row for row in rows if any(row[1:])]),
        ),
        *section(
            "Settings that differ",
            "Those in which the runs are not the same. A dash: the run has no such setting.",
            *([table("facts", ["", *names], different)] if different else []),
        ),
        *section("Configurations", "All settings of each run.", *map(configuration, sources)),
    ]


def configuration(source: Source) -> ET.Element:
    """All settings of a run, folded."""
    saved = rundir.read_description(source.run.path) | {"meta": source.meta}
    shown = node("pre", json.dumps(saved, indent=2), tabindex="0")
    return node("details", node("summary", source.name), shown)


@logs.steady()
def main(argv: list[str] | None = None) -> None:
    """Write the page from the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "run_dirs", nargs="+", type=cli.path, metavar="RUN_DIR", help="runs to show"
    )
    parser.add_argument(
        "--out", type=cli.path, required=True, metavar="PAGE.html", help="page to write"
    )
    parser.add_argument("--title", default="", help="of the page; default: algorithms and tasks")
    parser.add_argument("--force", action="store_true", help="replace a page that exists")
    args = parser.parse_args(argv)
    try:
        compare.check_ending(args.out, ".html")
        rundir.check_new([args.out], args.force)
        runs = compare.read_runs(args.run_dirs)
        groups = compare.grouped(runs)
        entries, sources = report.entries(map(compare.joined, groups)), read_sources(runs)
        of_run = {launches[0].path: read_metrics(launches) for launches in groups}
        algos, tasks = dict.fromkeys(run.algo for run in runs), report.by_task(entries)
        title = args.title or f"{', '.join(algos)} on {', '.join(tasks)}"
        page = page_of(title, sections(entries, sources, of_run))
        rundir.write_atomic(args.out, lambda file: file.write(page.encode()))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"page: {args.out}")


if __name__ == "__main__":
    main()

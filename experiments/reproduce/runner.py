"""What the reproductions share: lists of launches, run once each, with a table and curves.

Each run is one launch with its own run directory OUT/<group>/<task>/<name>. What is complete is
left alone and what was interrupted is resumed, so the same command goes on where it stopped. With
--seed, seeds are added to a run: OUT/<group>/<task>/<name>_s<seed> is a further launch of it. At
the end of each group OUT/<group>/table.md and table.json hold its numbers, OUT/<group>/<task>.png
its curves. There the launches of a run are one, with the sum of their seconds and the first one's
device.
"""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from algos.launch import cli, report, rundir

ROOT = Path(__file__).parents[2]


class Job(NamedTuple):
    """A run: OUT/<group>/<task>/<name> is its run directory, {here} in flags the parent.

    {more} in flags is the end of the name of a launch that adds seeds: _s<seed>, otherwise nothing.
    """

    task: str
    name: str
    algo: str
    flags: str = ""


class Report(NamedTuple):
    """The finished runs of a group."""

    folder: Path
    runs: dict[Job, rundir.Run]
    rows: list[dict[str, Any]]  # report.summary of each run
    text: str  # table of the rows


def launches(run_dir: Path, file: str) -> list[Path]:
    """Directories of the launches of a run that have this file: the first, then added seeds."""
    paths = [run_dir, *sorted(run_dir.parent.glob(f"{run_dir.name}_s[0-9]*"))]
    return [path for path in paths if (path / file).exists()]


def flags_of(job: Job, run_dir: Path, path: Path) -> list[str]:
    """Flags of the launch `path` of the run `run_dir`, those of its seeds left out."""
    more = path.name.removeprefix(run_dir.name)
    return ["--env", job.task, *shlex.split(job.flags.format(here=run_dir.parent, more=more))]


def settings(config: Any, launch: cli.Launch) -> dict[str, Any]:
    """What the launches of a run have in common."""
    shared = "sweep", "num_evals", "eval_episodes", "final_episodes"
    return vars(config) | {name: getattr(launch, name) for name in shared}


def check_launch(job: Job, run_dir: Path, path: Path, seeds: range) -> None:
    """ValueError if a launch of other settings, or with some of these seeds, is among the run's."""
    module = importlib.import_module(f"algos.{job.algo}")
    saved = rundir.read_description(path)
    shared = sorted({*saved["rows"]["seeds"]} & {*seeds})
    if shared:
        raise ValueError(f"{path} has seed {shared[0]} already: give other seeds, or move it away")
    config = rundir.from_json(module.Config, saved["config"])
    old = settings(config, rundir.from_json(cli.Launch, saved["launch"]))
    argv = flags_of(job, run_dir, path)
    new = settings(*cli.parse(job.algo, module.Config, module.PRESETS, argv))
    differing = ", ".join(f"{x}={old[x]}, now {new[x]}" for x in new if old[x] != new[x])
    if differing:
        raise ValueError(f"{path} has other settings ({differing}): move it away")


def command(job: Job, run_dir: Path, seed: int, num_seeds: int) -> list[str] | None:
    """Command line that starts, resumes or, if None, need not run the launch with these seeds.

    ValueError if it does not go together with the run's other launches.
    """
    path = run_dir.with_name(run_dir.name + (f"_s{seed}" if seed else ""))
    if (path / "done.json").exists():
        return None
    for other in launches(run_dir, "config.json"):
        if other != path:
            check_launch(job, run_dir, other, range(seed, seed + num_seeds))
    program = [sys.executable, os.path.relpath(ROOT / "algos" / f"{job.algo}.py")]
    if (path / "config.json").exists():
        return [*program, "--resume", str(path)]
    seeds = ["--seed", str(seed), "--num-seeds", str(num_seeds)]
    return [*program, *flags_of(job, run_dir, path), *seeds, "--run-dir", str(path)]


def plan(jobs: list[Job], folder: Path, args: argparse.Namespace) -> list[tuple]:
    """(job, run directory, command line) of the launches that are asked for and not complete."""
    todo = []
    for job in jobs:
        if job.task in (args.tasks or [job.task]) and job.name in (args.jobs or [job.name]):
            run_dir = folder / job.task / job.name
            argv = command(job, run_dir, args.seed, args.num_seeds)
            todo += [(job, run_dir, argv)] if argv else []
    return todo


def read_launches(paths: list[Path]) -> rundir.Run:
    """Complete launches of a run as one."""
    parts = [rundir.read_run(path) for path in paths]
    steps = max((part.steps for part in parts), key=len)

    def rows(arrays):
        """[R, E, K] of all seeds; NaN after the end of a launch whose seeds all died."""
        missing = lambda x: ((0, 0), (0, len(steps) - x.shape[1]), (0, 0))
        return np.concatenate([np.pad(x, missing(x), constant_values=np.nan) for x in arrays])

    seconds = [np.pad(x.seconds, (0, len(steps) - len(x.steps)), "edge") for x in parts]
    done = [part.done["seconds"] for part in parts if part.done]
    return parts[0]._replace(
        labels=[label for part in parts for label in part.labels],
        seeds=np.concatenate([part.seeds for part in parts]),
        steps=steps,
        seconds=np.sum(seconds, 0),
        returns=rows([part.returns for part in parts]),
        lengths=rows([part.lengths for part in parts]),
        further={name: rows([part.further[name] for part in parts]) for name in parts[0].further},
        final=np.concatenate([part.final for part in parts]),
        final_further={
            name: np.concatenate([part.final_further[name] for part in parts])
            for name in parts[0].final_further
        },
        done={"seconds": {name: sum(x[name] for x in done) for name in done[0]}},
    )


def run(argv: list[str]) -> None:
    """Run one launch. It gets a ctrl-C as well, and once it has saved this program ends too."""
    print(f"$ {shlex.join(['python', *argv[1:]])}", flush=True)
    child = subprocess.Popen(argv)
    while True:
        try:
            status = child.wait()
            break
        except KeyboardInterrupt:
            continue
    if status == 3:
        print("every seed of this run died; the others go on", file=sys.stderr)
    elif status:
        raise SystemExit(status)


def last_return(value: tuple[str, rundir.Run, np.ndarray]) -> float:
    """IQM of the last evaluation of a run's rows; nothing is worse than all of them dead."""
    _, run, index = value
    return np.nan_to_num(report.final(run.final[index])["iqm"], nan=-np.inf)


def summarise(jobs: list[Job], folder: Path) -> Report:
    """Summaries of the runs that are complete; draws the curves of each task.

    A sweep has a summary for each value, and the curve of the best one, which names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {job: launches(folder / job.task / job.name, "done.json") for job in jobs}
    runs = {job: read_launches(paths) for job, paths in done.items() if paths}
    rows: list[dict[str, Any]] = []
    for task in dict.fromkeys(job.task for job in runs):
        curves = []
        for job in (job for job in runs if job.task == task):
            run = runs[job]
            values = [(f"{job.name} {x}".strip(), run, index) for x, index in report.groups(run)]
            rows += [report.summary(*value) for value in values]
            curves.append(max(values, key=last_return))
        report.plot_curves(curves, folder / f"{task}.png", task)
    return Report(folder, runs, rows, report.markdown(rows))


def main(
    doc: str,
    groups: dict[str, list[Job]],
    out: str,
    further: dict[str, Callable[[Report], str]],
    argv: list[str] | None = None,
    before: Callable[[Job, Path], None] = lambda job, run_dir: None,
) -> None:
    """Reproduce from the command line.

    `further` adds text to the table of a group; `before` makes what a job needs in its run
    directory's parent.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=groups, metavar="GROUP")
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the groups")
    parser.add_argument("--jobs", nargs="+", help="only jobs of these names")
    parser.add_argument("--num-seeds", type=int, default=8, help="of runs that are not there yet")
    parser.add_argument("--seed", type=int, default=0, help="the first; others add to the runs")
    parser.add_argument("--out", type=Path, default=Path(out))
    args = parser.parse_args(argv)
    for flag, field in (("tasks", "task"), ("jobs", "name")):
        known = {getattr(job, field) for group in args.groups for job in groups[group]}
        for name in getattr(args, flag) or []:
            if name not in known:
                parser.error(f"--{flag} {name}: choose from {', '.join(sorted(known))}")
    if args.num_seeds < 1:
        parser.error(f"--num-seeds {args.num_seeds}: at least 1 is needed")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: at least 0 is needed")
    try:
        todo = {group: plan(groups[group], args.out / group, args) for group in args.groups}
    except ValueError as error:
        parser.error(str(error))
    for group in args.groups:
        for job, run_dir, launch in todo[group]:
            before(job, run_dir)
            run(launch)
        folder = args.out / group
        done = summarise(groups[group], folder)
        text = done.text + (further[group](done) if group in further else "")
        (folder / "table.md").write_text(text)
        rundir.write_json(folder / "table.json", done.rows)
        print(text, end="")

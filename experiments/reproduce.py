"""What the reproductions share: lists of launches, run once each, with a table and curves.

Each run is one launch with its own run directory OUT/<group>/<task>/<name>. What is complete is
left alone and what was interrupted is resumed, so the same command goes on where it stopped. Where
--num-seeds asks for more than a complete run has, OUT/<group>/<task>/<name>_s<seed> gets those from
<seed> on, and both count as one run. At the end of each group OUT/<group>/table.md and table.json
hold its numbers, OUT/<group>/<task>.png its curves.
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

from algos import cli, rundir
from experiments import compare

ROOT = Path(__file__).parents[1]


class Job(NamedTuple):
    """One launch: OUT/<group>/<task>/<name> is its run directory, {here} in flags the parent.

    {more} in flags is the end of its name where it adds seeds.
    """

    task: str
    name: str
    algo: str
    flags: str = ""


class Report(NamedTuple):
    """The finished runs of a group."""

    folder: Path
    runs: dict[Job, rundir.Run]
    rows: list[dict[str, Any]]  # compare.summary of each run
    text: str  # table of the rows


def launches(run_dir: Path) -> tuple[list[Path], int]:
    """The complete launches of a run, in the order of their seeds, and the seed after them."""
    found: list[Path] = []
    seed, path = 0, run_dir
    while (path / "done.json").exists():
        found.append(path)
        seed += rundir.read_description(path)["launch"]["num_seeds"]
        path = run_dir.with_name(f"{run_dir.name}_s{seed}")
    return found, seed


def flags_of(job: Job, here: Path, more: str = "") -> list[str]:
    """Flags of the job in the folder `here`, those of its seeds left out."""
    return ["--env", job.task, *shlex.split(job.flags.format(here=here, more=more))]


def config_of(job: Job, here: Path) -> Any:
    """Configuration of the job in the folder `here`."""
    module = importlib.import_module(f"algos.{job.algo}")
    return cli.parse(job.algo, module.Config, module.PRESETS, flags_of(job, here))[0]


def command(job: Job, run_dir: Path, num_seeds: int) -> list[str] | None:
    """Command line that starts, extends, resumes or, if None, need not run the job.

    ValueError if seeds would be added to a run of other settings.
    """
    here, more = run_dir.parent, ""
    found, seed = launches(run_dir)
    if seed >= num_seeds:
        return None
    if found:
        config, saved = config_of(job, here), rundir.read_description(run_dir)["config"]
        if rundir.from_json(type(config), saved) != config:
            raise ValueError(
                f"{run_dir} has {seed} of {num_seeds} seeds, with other settings than {job.name}'s "
                "of today: move it away, or ask for no more"
            )
        more = f"_s{seed}"
        run_dir = here / (run_dir.name + more)
    program = [sys.executable, os.path.relpath(ROOT / "algos" / f"{job.algo}.py")]
    if (run_dir / "config.json").exists():
        return [*program, "--resume", str(run_dir)]
    seeds = ["--seed", str(seed), "--num-seeds", str(num_seeds - seed)]
    return [*program, *flags_of(job, here, more), *seeds, "--run-dir", str(run_dir)]


def read_run(run_dir: Path) -> rundir.Run:
    """The complete launches of a run as one."""
    parts = [rundir.read_run(path) for path in launches(run_dir)[0]]
    rows = lambda name: np.concatenate([getattr(part, name) for part in parts])
    further = parts[0].further.keys()
    seconds = [(part.done or {})["seconds"] for part in parts]
    return parts[0]._replace(
        labels=[label for part in parts for label in part.labels],
        seeds=rows("seeds"),
        seconds=np.sum([part.seconds for part in parts], 0),
        returns=rows("returns"),
        lengths=rows("lengths"),
        further={name: np.concatenate([part.further[name] for part in parts]) for name in further},
        done={"seconds": {name: sum(x[name] for x in seconds) for name in ("train", "compile")}},
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
    if status == 1:
        print("every seed of this run died; the others go on", file=sys.stderr)
    elif status:
        raise SystemExit(status)


def last_return(value: tuple[str, rundir.Run, np.ndarray]) -> float:
    """IQM of the last evaluation of a run's rows; nothing is worse than all of them dead."""
    _, run, index = value
    return np.nan_to_num(rundir.final(run.returns[index])["iqm"], nan=-np.inf)


def report(jobs: list[Job], folder: Path) -> Report:
    """Summaries of the runs that are complete; draws the curves of each task.

    A sweep has a summary for each value, and the curve of the best one, which names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {job: folder / job.task / job.name for job in jobs}
    runs = {job: read_run(path) for job, path in paths.items() if launches(path)[0]}
    rows: list[dict[str, Any]] = []
    for task in dict.fromkeys(job.task for job in runs):
        curves = []
        for job in (job for job in runs if job.task == task):
            run = runs[job]
            values = [(f"{job.name} {x}".strip(), run, index) for x, index in rundir.groups(run)]
            rows += [compare.summary(*value) for value in values]
            curves.append(max(values, key=last_return))
        rundir.plot_curves(curves, folder / f"{task}.png", task)
    return Report(folder, runs, rows, compare.markdown(rows))


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
    parser.add_argument("--num-seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(out))
    args = parser.parse_args(argv)
    for flag, field in (("tasks", "task"), ("jobs", "name")):
        known = {getattr(job, field) for group in args.groups for job in groups[group]}
        for name in getattr(args, flag) or []:
            if name not in known:
                parser.error(f"--{flag} {name}: choose from {', '.join(sorted(known))}")
    if args.num_seeds < 1:
        parser.error(f"--num-seeds {args.num_seeds}: at least 1 is needed")
    for group in args.groups:
        folder = args.out / group
        for job in groups[group]:
            if args.tasks and job.task not in args.tasks:
                continue
            if args.jobs and job.name not in args.jobs:
                continue
            run_dir = folder / job.task / job.name
            try:
                todo = command(job, run_dir, args.num_seeds)
            except ValueError as error:
                parser.error(str(error))
            if todo:
                before(job, run_dir)
                run(todo)
        done = report(groups[group], folder)
        text = done.text + (further[group](done) if group in further else "")
        (folder / "table.md").write_text(text)
        rundir.write_json(folder / "table.json", done.rows)
        print(text, end="")

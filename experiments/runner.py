"""Lists of launches, run once each: what the reproductions and grid.py share.

Each run is one launch with its own run directory. What is complete is left alone and what was
interrupted is resumed, so the same command goes on where it stopped. With --seed, seeds are added
to a run: <run directory>_s<seed> is a further launch of it. Tables and figures show the
launches of a run as one: seconds are summed, the device is the first one's.

A reproduction has groups of runs, OUT/<group>/<task>/<name>; those of the docs are in results/. At
the end of each group OUT/<group>/table.md and table.json hold its numbers, OUT/<group>/<task>.png
its curves.
"""

import importlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import envs
from algos.launch import cli, logs, report, rundir

ROOT = Path(__file__).parents[1]


# Flags of a launch that all launches of a run have in common.
SHARED = ("sweep", "num_evals", "eval_episodes", "final_episodes")


class Job(NamedTuple):
    """A run. In its flags {here} is the parent of its run directory.

    {more} is the end of the name of a launch: _s<seed> if it adds seeds, else nothing.
    """

    task: str
    name: str
    algo: str
    flags: str = ""


def launches(run_dir: Path, file: str) -> list[Path]:
    """Directories of the launches of a run that have this file: the first, then added seeds."""
    added = sorted(path for path in run_dir.parent.glob("*_s*") if adds_seeds(path, run_dir))
    return [path for path in (run_dir, *added) if (path / file).exists()]


def adds_seeds(path: Path, run_dir: Path) -> bool:
    """Whether this is the directory of a launch that adds seeds to a run."""
    name = re.fullmatch(r"(.+)_s\d+", path.name)
    return bool(name) and path.with_name(name[1]) == run_dir


def flags_of(job: Job, run_dir: Path, path: Path) -> list[str]:
    """Flags of the launch `path` of the run `run_dir`, those of its seeds left out."""
    more = path.name.removeprefix(run_dir.name)
    words = (word.format(here=run_dir.parent, more=more) for word in shlex.split(job.flags))
    return ["--env", job.task, *words]


def settings(config: Any, launch: cli.Launch) -> dict[str, Any]:
    """What the launches of a run have in common."""
    return vars(config) | {name: getattr(launch, name) for name in SHARED}


def check_settings(job: Job, run_dir: Path, path: Path) -> None:
    """ValueError if `path`, a launch of the run, has other settings than the job."""
    saved, config, launch = beside(job, run_dir, path)
    try:
        old = settings(
            rundir.from_json(type(config), saved["config"]),
            rundir.from_json(cli.Launch, saved["launch"]),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}: move it away") from None
    new = settings(config, launch)
    refuse(path, [f"{x}={old[x]}, now {new[x]}" for x in new if old[x] != new[x]])


def beside(job: Job, run_dir: Path, path: Path) -> tuple[dict[str, Any], Any, cli.Launch]:
    """What a launch says of itself, and config and launch of the job in its place.

    ValueError if it is of another algorithm.
    """
    saved = rundir.read_description(path)
    if saved["algo"] != job.algo:
        raise ValueError(f"{path} is a run of {saved['algo']}, not {job.algo}: move it away")
    module = importlib.import_module(f"algos.{job.algo}")
    argv = flags_of(job, run_dir, path)
    return saved, *cli.parse(job.algo, module.Config, module.PRESETS, argv)


def refuse(path: Path, differing: list[str]) -> None:
    """ValueError if there are settings in which a launch and its job differ."""
    if differing:
        raise ValueError(f"{path} has other settings ({', '.join(differing)}): move it away")


def check_complete(job: Job, run_dir: Path, path: Path) -> None:
    """ValueError if a complete launch has another algorithm or task, or other flags than the job.

    Paths are left out, as it may be a copy. So is what the job does not name, as it may be of an
    earlier version with other defaults.
    """
    saved, config, launch = beside(job, run_dir, path)
    new = {k: [*x] if isinstance(x, tuple) else x for k, x in (vars(config) | vars(launch)).items()}
    old = saved["launch"] | saved["config"]
    words = {
        word.partition("=")[0].removeprefix("--").replace("-", "_")
        for word in flags_of(job, run_dir, path)
    }
    named = {"sweep", *words} - {"dataset", "behavior", "env"}
    same = lambda x: x not in named or old.get(x, new[x]) == new[x]
    differing = [f"{x}={old[x]}, now {new[x]}" for x in new if not same(x)]
    if envs.canonical(old["env"]) != envs.canonical(config.env):
        differing.append(f"env={old['env']}, now {config.env}")
    refuse(path, differing)


def check_launch(job: Job, run_dir: Path, path: Path, seeds: range) -> None:
    """ValueError if `path`, a launch of the run, does not go together with these new seeds.

    It has other settings or some of the seeds, or is of an old version, without final.npz.
    """
    shared = sorted({*rundir.read_description(path)["rows"]["seeds"]} & {*seeds})
    if shared:
        raise ValueError(f"{path} has seed {shared[0]} already: give other seeds, or move it away")
    if (path / "done.json").exists() and not (path / "final.npz").exists():
        raise ValueError(f"{path} has no final.npz, as it is of an old version: move it away")
    check_settings(job, run_dir, path)


def name_missing_seeds(run_dir: Path, path: Path, seeds: range) -> None:
    """Say on stderr how to add those of these seeds that no launch of the run has.

    `path` is the launch that would have them, and complete.
    """
    found = [rundir.read_description(x)["rows"]["seeds"] for x in launches(run_dir, "config.json")]
    missing = sorted({*seeds}.difference(*found))
    # those that follow one another: a launch has no others
    count = sum(seed == missing[0] + i for i, seed in enumerate(missing))
    if missing:
        flags = f"--seed {missing[0]} --num-seeds {count}"
        print(f"{path} is complete: {flags} adds {count} seeds", file=sys.stderr)


def launch_dir(run_dir: Path, seed: int) -> Path:
    """Directory of the launch of a run whose first seed this is."""
    return run_dir.with_name(run_dir.name + (f"_s{seed}" if seed else ""))


def command(job: Job, run_dir: Path, seed: int, num_seeds: int) -> list[str] | None:
    """Command line that starts or resumes the launch with these seeds; None if it is complete.

    ValueError if it does not go together with the run's other launches.
    """
    path = launch_dir(run_dir, seed)
    if (path / "done.json").exists():
        check_complete(job, run_dir, path)
        name_missing_seeds(run_dir, path, range(seed, seed + num_seeds))
        return None
    for other in launches(run_dir, "config.json"):
        if other != path:
            check_launch(job, run_dir, other, range(seed, seed + num_seeds))
    program = [sys.executable, os.path.relpath(ROOT / "algos" / f"{job.algo}.py")]
    if (path / "config.json").exists():
        check_settings(job, run_dir, path)
        return [*program, "--resume", str(path)]
    seeds = ["--seed", str(seed), "--num-seeds", str(num_seeds)]
    return [*program, *flags_of(job, run_dir, path), *seeds, "--run-dir", str(path)]


def plan(jobs: dict[Path, Job], seed: int, num_seeds: int) -> list[tuple[Path, Job, list[str]]]:
    """(run directory, job, command line) of the launches that are asked for and not complete.

    ValueError if one directory would belong to two runs.
    """
    for path, run_dir in itertools.permutations(jobs, 2):
        if adds_seeds(path, run_dir):
            raise ValueError(f"{path} would also hold further seeds of {run_dir}: rename a task")
    found = [(path, job, command(job, path, seed, num_seeds)) for path, job in jobs.items()]
    return [(path, job, argv) for path, job, argv in found if argv]


def read_launches(paths: list[Path]) -> rundir.Run:
    """Complete launches of a run as one; ValueError if they share seeds or differ in evaluations.

    A launch whose seeds all died has fewer evaluations. Launches of several commits, whose code may
    differ, are named on stderr.
    """
    parts = [rundir.read_run(path) for path in paths]
    found = [rundir.read_json(path / "meta.json", commit=str)["commit"] for path in paths]
    commits = dict.fromkeys(commit or "unknown" for commit in found)
    if len(commits) > 1:
        print(f"{paths[0]}: seeds of several commits: {', '.join(commits)}", file=sys.stderr)
    longest = max(parts, key=lambda part: len(part.steps))
    steps = longest.steps
    for i, part in enumerate(parts):
        same_steps = np.array_equal(part.steps, steps[: len(part.steps)])
        if not same_steps or part.final.shape[1] != longest.final.shape[1]:
            raise ValueError(f"{part.path} has other evaluations than {longest.path}: move it away")
        if shared := {*part.seeds.tolist()} & {x for p in parts[:i] for x in p.seeds.tolist()}:
            raise ValueError(f"{part.path} has seed {min(shared)} again: move it away")

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
    """Run one launch. It gets all signals too, and once it has saved this program ends as well.

    ctrl-C in a terminal reaches both; sent to this program alone, it ends it after the launch.
    """
    print(f"$ {shlex.join(['python', *argv[1:]])}", flush=True)
    child, interrupted = subprocess.Popen(argv), False

    def pass_on(number, frame):
        nonlocal interrupted
        interrupted = True
        child.send_signal(number)

    numbers = [x for x in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(x) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        while True:
            try:
                status = child.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
                print("the launch that runs is the last one", file=sys.stderr)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if status < 0:  # before it could save, or for lack of memory
        print(f"the launch was ended by signal {-status}", file=sys.stderr)
        status = 128 - status
    if interrupted and status in (0, 3):  # it was complete before it could stop
        status = 130
    if status == 3:
        print("every seed of this run died; the others go on", file=sys.stderr)
    elif status:
        if status > 128:
            print("stopped: the same command goes on", file=sys.stderr)
        raise SystemExit(status)


def complete(jobs: dict[Path, Job]) -> dict[Job, rundir.Run]:
    """The runs that have a complete launch, with all their complete launches."""
    done = {job: launches(run_dir, "done.json") for run_dir, job in jobs.items()}
    return {job: read_launches(paths) for job, paths in done.items() if paths}


def write_table(folder: Path, text: str, rows: list[dict[str, Any]]) -> None:
    """Print the table of the runs in a folder; write it there with its numbers."""
    rundir.write_text(folder / "table.md", text)
    rundir.write_json(folder / "table.json", rows)
    print(text, end="")


# --- reproductions ---


class Report(NamedTuple):
    """The complete runs of a group, those of a task one after the other."""

    folder: Path
    runs: dict[Job, rundir.Run]
    rows: list[dict[str, Any]]  # report.summary of each swept value of each run
    text: str  # table of the rows


def placed(jobs: Iterable[Job], folder: Path) -> dict[Path, Job]:
    """The jobs of a group by their run directories."""
    return {folder / job.task / job.name: job for job in jobs}


def last_return(entry: report.Entry) -> float:
    """IQM of the last evaluation of a run's rows; -inf if all of them are dead."""
    return np.nan_to_num(report.final(entry.run.final[entry.rows])["iqm"], nan=-np.inf)


def estimates(row: dict[str, Any]) -> list[str]:
    """IQM with its interval, and mean with std, of a run."""
    final = np.array(row["per_seed"], float)
    estimate = report.estimate(row["iqm"], row["interval"])
    return [estimate, f"{np.nanmean(final):.0f} ± {np.nanstd(final):.0f}"]


def summarise(jobs: list[Job], folder: Path) -> Report:
    """Summaries of the runs that are complete; draws the curves of each task.

    A sweep has a summary for each value, and the curve of the best one, which names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = list(dict.fromkeys(job.task for job in jobs))
    jobs = sorted(jobs, key=lambda job: tasks.index(job.task))
    runs = complete(placed(jobs, folder))
    rows: list[dict[str, Any]] = []
    for task in dict.fromkeys(job.task for job in runs):
        curves = []
        for job in (job for job in runs if job.task == task):
            run = runs[job]
            values = [
                report.Entry(f"{job.name} {label}".strip(), run, index)
                for label, index in report.groups(run)
            ]
            rows += [report.summary(*value) for value in values]
            curves.append(max(values, key=last_return))
        report.plot_curves(curves, folder / f"{task}.png", task)
    return Report(folder, runs, rows, report.markdown(rows))


@logs.steady()
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
    parser = cli.Parser(doc)
    parser.add_argument("groups", nargs="+", choices=groups, metavar="GROUP", help="tables to make")
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the groups")
    parser.add_argument("--jobs", nargs="+", help="only jobs of these names")
    parser.add_argument("--num-seeds", type=cli.integer, default=8, help="seeds of each new launch")
    parser.add_argument(
        "--seed", type=cli.integer, default=0, help="first seed; not 0: adds seeds to runs"
    )
    parser.add_argument("--out", type=cli.path, default=Path(out), help="of runs and tables")
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
    wanted = lambda job: (
        job.task in (args.tasks or [job.task]) and job.name in (args.jobs or [job.name])
    )
    if not any(map(wanted, (job for group in args.groups for job in groups[group]))):
        parser.error("none of these tasks has one of these jobs")
    try:
        todo = {}
        for group in args.groups:
            jobs = placed(filter(wanted, groups[group]), args.out / group)
            todo[group] = plan(jobs, args.seed, args.num_seeds)
            complete(placed(groups[group], args.out / group))  # what the table will hold
        for group, missing in todo.items():
            for run_dir, job, launch in missing:
                before(job, run_dir)
                run(launch)
            done = summarise(groups[group], args.out / group)
            text = done.text + (further[group](done) if group in further else "")
            write_table(done.folder, text, done.rows)
    except (ValueError, OSError) as error:
        parser.error(str(error))

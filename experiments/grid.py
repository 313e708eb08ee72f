"""Every algorithm on every task: runs what is missing, then draws the figure and the table.

    python experiments/grid.py --algos ppo bpo --envs gym/Hopper-v5 gym/Ant-v5 --out DIR
    python experiments/grid.py --algos ppo --envs cartpole --out DIR --learning-rate 3e-4 1e-3

One launch runs after the other, in DIR/ALGO/TASK. Further flags go to every launch. Ctrl-C stops
and saves the launch that runs; the same command goes on with it and skips what is complete.
--seed 8 adds seeds to those that are there, in DIR/ALGO/TASK_s8.

At the end DIR/curves.png has a panel for each task, and DIR/table.md and DIR/table.json have the
numbers, of all complete runs in DIR. compare.py draws the same run directories in other ways.
"""

import argparse
import importlib
import shlex
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import envs
from algos.launch import cli, logs, program, report, rundir, session
from experiments import runner
from experiments.runner import Job

OWN = {"--env": "--envs", "--run-dir": "--out", "--resume": "the same --out"}


def jobs_of(args: argparse.Namespace, flags: list[str]) -> dict[Path, Job]:
    """The runs of a grid by their run directories; ValueError for an unknown name."""
    for algo in args.algos:
        if algo not in cli.ALGOS:
            raise ValueError(f"--algos {algo}: {cli.nearest(algo, cli.ALGOS)}")
    for flag in (flag.partition("=")[0] for flag in flags):
        if flag in OWN:
            raise ValueError(f"{flag} differs between the launches: give {OWN[flag]}")
    text = shlex.join(flags).replace("{", "{{").replace("}", "}}")
    tasks = dict.fromkeys(map(envs.canonical, args.envs))
    return {
        args.out / algo / task: Job(task, algo, algo, text) for algo in args.algos for task in tasks
    }


def jobs_in(out: Path) -> dict[Path, Job]:
    """All runs of the grid in a directory, by their run directories."""
    found = [path for algo in cli.ALGOS for path in sorted((out / algo).rglob("config.json"))]
    saved = [rundir.read_description(path.parent) for path in found]
    runs = [(x["algo"], envs.canonical(x["config"]["env"])) for x in saved]
    return {out / algo / task: Job(task, algo, algo) for algo, task in runs}


def check_present(job: Job, run_dir: Path, seed: int, num_seeds: int) -> None:
    """ValueError if an existing launch differs from what is asked for."""
    for path in runner.launches(run_dir, "config.json"):
        runner.check_settings(job, run_dir, path)
        count = len({*rundir.read_description(path)["rows"]["seeds"]})
        if path == runner.launch_dir(run_dir, seed) and count != num_seeds:
            raise ValueError(
                f"{path} has {count} seeds, not {num_seeds}: give --num-seeds {count}; "
                f"--seed {seed + count} adds others"
            )


def check(job: Job, argv: list[str]) -> None:
    """Whatever a launch checks before it compiles; ValueError in one line."""
    try:
        algorithm = importlib.import_module(f"algos.{job.algo}")
        config, launch = cli.parse(job.algo, algorithm.Config, algorithm.PRESETS, argv)
        trained = session.prepare(algorithm, config, launch)
        program.make_program(algorithm, config, launch, trained)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"{job.algo} on {job.task}: {error}") from None


def check_apart(todo: list[tuple[Job, list[str]]]) -> None:
    """Check launches in another process: once it has ended, the accelerator is theirs."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process keeps this
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        checks = [pool.submit(check, job, argv) for job, argv in todo]
        signal.signal(signal.SIGINT, handler)
        try:
            for checked in checks:
                checked.result()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


@logs.steady()
def main(argv: list[str] | None = None) -> None:
    """Run a grid from the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--algos", nargs="+", required=True, help=f"of {', '.join(cli.ALGOS)}")
    parser.add_argument("--envs", nargs="+", required=True, help="tasks: docs/environments.md")
    parser.add_argument("--num-seeds", type=cli.integer, default=8, help="of each run")
    parser.add_argument(
        "--seed", type=cli.integer, default=0, help="first seed; not 0: adds seeds to runs"
    )
    parser.add_argument(
        "--out", type=cli.path, required=True, metavar="DIR", help="of runs, table and curves"
    )
    args, flags = parser.parse_known_args(cli.dashed(sys.argv[1:] if argv is None else argv))
    try:
        jobs = jobs_of(args, flags)
        others = jobs_in(args.out)
        for run_dir, job in jobs.items():
            check_present(job, run_dir, args.seed, args.num_seeds)
        todo = runner.plan(jobs, args.seed, args.num_seeds)
        runner.complete(jobs | others)  # what the table will hold
        print(f"runs: {len(jobs)}, complete: {len(jobs) - len(todo)}", flush=True)
        check_apart([(job, argv) for _, job, (_, _, *argv) in todo if argv[0] != "--resume"])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped before the start\n")
    for _, _, argv in todo:
        runner.run(argv)
    entries = report.entries(runner.complete(jobs | others).values())
    summaries = [report.summary(*entry) for entry in entries]
    text, differences = report.markdown(summaries), report.differences(entries)
    if differences:
        text += f"\n{report.table(*report.difference_table(differences))}"
    runner.write_table(args.out, text, summaries)
    # Steps of offline algorithms are gradient steps; beside others only seconds compare.
    kinds = {"dataset" in entry.run.config for entry in entries}
    x = "steps" if len(kinds) == 1 else "seconds"
    report.plot_curves(entries, args.out / "curves.png", xs=(x,))
    print(f"\ncurves: {args.out / 'curves.png'}")


if __name__ == "__main__":
    main()

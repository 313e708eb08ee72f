"""REPPO's tasks beside PPO, and its ablations: runs, a table, and curves.

    python experiments/reproduce_reppo.py tasks ablations --num-seeds 8 --out results/reppo
    python experiments/reproduce_reppo.py published --num-seeds 4 --out results/reppo

Each run is one launch with its own run directory OUT/<group>/<task>/<name>. What is complete is
left alone and what was interrupted is resumed, so the same command goes on where it stopped. At the
end of each group OUT/<group>/table.md and table.json hold its numbers, OUT/<group>/<task>.png its
curves.

groups:
  tasks      the presets sized for a CPU, on three tasks with PPO at equal environment steps
  ablations  REPPO on one task with one part changed
  published  dmc_small for 10M steps beside the authors' numbers: for an accelerator
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from algos import rundir
from experiments import compare

ROOT = Path(__file__).parents[1]


class Job(NamedTuple):
    """One launch: OUT/<group>/<task>/<name> is its run directory."""

    task: str
    name: str
    algo: str
    flags: str = ""


ABLATIONS = {
    "default": "",
    "kl_mode_full": "--kl-mode full",
    "kl_mode_value": "--kl-mode value",
    "critic_loss_mse": "--critic-loss mse",
    "no_auxiliary_loss": "--aux-loss-mult 0",
    "norm_none": "--norm none",
    "target_mode_shifted": "--target-mode shifted",
    "kl_estimator_exact": "--kl-estimator exact",
    "kl_estimator_unclipped": "--kl-estimator unclipped",
    "reverse_kl": "--reverse-kl",
    "no_zero_init": "--no-zero-init",
    "min_std_0": "--min-std 0",
    "value_samples_16": "--value-samples 16",
    "noise_max_2": "--noise-max 2",
}
GROUPS: dict[str, list[Job]] = {
    "tasks": [
        Job("pendulum", "reppo", "reppo"),
        Job("cartpole", "reppo_discrete", "reppo_discrete"),
        Job("inverted_pendulum", "reppo", "reppo"),
        Job("CartpoleBalance", "reppo", "reppo"),
        *(
            Job(task, algo, algo, f"--total-timesteps {budget}")
            for task, budget in (
                ("CartpoleSwingup", 1_000_000),
                ("ReacherEasy", 1_000_000),
                ("CheetahRun", 500_000),
            )
            for algo in ("reppo", "ppo")
        ),
    ],
    "ablations": [
        Job("CartpoleSwingup", name, "reppo", f"--total-timesteps 500000 {flags}".strip())
        for name, flags in ABLATIONS.items()
    ],
    "published": [
        Job(task, "reppo", "reppo", "--preset dmc_small --total-timesteps 10000000")
        for task in (
            *("CartpoleBalance", "CartpoleSwingup", "CheetahRun"),
            *("HopperStand", "WalkerWalk", "ReacherEasy"),
        )
    ],
}

# Return of the authors' dmc_small runs after 10M true steps: mean, deviation over runs, runs. Their
# files label the steps of these runs four times too high.
PUBLISHED = {
    "CartpoleBalance": (999.6, 0.2, 10),
    "CartpoleSwingup": (867.4, 4.9, 10),
    "CheetahRun": (889.6, 19.7, 10),
    "HopperStand": (175.8, 272.3, 10),
    "WalkerWalk": (960.7, 17.8, 11),
    "ReacherEasy": (958.1, 11.4, 10),
}


def command(job: Job, run_dir: Path, num_seeds: int) -> list[str] | None:
    """Command line that starts, resumes or, if None, need not run the job."""
    if (run_dir / "done.json").exists():
        return None
    program = [sys.executable, os.path.relpath(ROOT / "algos" / f"{job.algo}.py")]
    if (run_dir / "config.json").exists():
        return [*program, "--resume", str(run_dir)]
    flags = ["--env", job.task, *shlex.split(job.flags), "--num-seeds", str(num_seeds)]
    return [*program, *flags, "--run-dir", str(run_dir)]


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


def report(group: str, folder: Path) -> str:
    """Write the group's table and curves; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in GROUPS[group] if (folder / job.task / job.name / "done.json").exists()]
    rows: list[dict[str, Any]] = []
    for task in dict.fromkeys(job.task for job in jobs):
        runs = [rundir.read_run(folder / task / job.name) for job in jobs if job.task == task]
        found = [(r.path.name, r, index) for r in runs for _, index in rundir.groups(r)]
        rows += [compare.summary(*entry) for entry in found]
        rundir.plot_curves(found, folder / f"{task}.png", task)
    text = compare.markdown(rows)
    if group == "published":
        lines = ["", "| task | authors at 10M steps, mean ± deviation | here |", "|---|---|---|"]
        for job, row in zip(jobs, rows, strict=True):
            mean, deviation, n = PUBLISHED[job.task]
            ours = np.array(row["per_seed"], float)
            lines.append(
                f"| {job.task} | {mean} ± {deviation} (n={n}) "
                f"| {np.nanmean(ours):.1f} ± {np.nanstd(ours):.1f} (n={row['alive']}) |"
            )
        text += "\n".join(lines) + "\n"
    (folder / "table.md").write_text(text)
    rundir.write_json(folder / "table.json", rows)
    return text


def main(argv: list[str] | None = None) -> None:
    """Reproduce from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("groups", nargs="+", choices=GROUPS, metavar="GROUP")
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the groups")
    parser.add_argument("--num-seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("results/reppo"))
    args = parser.parse_args(argv)
    known = {job.task for group in args.groups for job in GROUPS[group]}
    for task in args.tasks or []:
        if task not in known:
            parser.error(f"--tasks {task}: choose from {', '.join(sorted(known))}")
    if args.num_seeds < 1:
        parser.error(f"--num-seeds {args.num_seeds}: at least 1 is needed")
    for group in args.groups:
        folder = args.out / group
        for job in GROUPS[group]:
            if args.tasks and job.task not in args.tasks:
                continue
            todo = command(job, folder / job.task / job.name, args.num_seeds)
            if todo:
                run(todo)
        print(report(group, folder), end="")


if __name__ == "__main__":
    main()

"""BNPO: the author's comparison beside PPO, and what it leaves open; runs, tables, and curves.

    python experiments/reproduce/bnpo.py tasks --jobs a1 ppo --num-seeds 10
    python experiments/reproduce/bnpo.py ablations hindsight --num-seeds 4

groups:
  tasks      the author's settings a1 to a9, PPO and SAC, 384,000 steps, after which a1 has solved
             the task according to the author. A second table has the short episodes that each
             setting needs to returns of 10, 20 and 30, beside the author's single runs
  ablations  a1 with one part changed, for half as many episodes
  ppo        `algos/ppo.py` with smaller batches, a smaller learning rate, and noise that is held
             for four steps, beside the setting that `tasks` takes
  hindsight  on the moving target, b2 (shifted goals for both brains) with the ratio's other
             denominator; on the static target, achieved goals with either denominator, and none

Under each table are the differences of the returns to those of a1, a4 and a6, or b3_none.
"""

import math
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from algos.launch import report, rundir
from experiments import runner
from experiments.runner import Job, Report

TASK, STATIC = "arm/reacher-moving", "arm/reacher-static"
LONG, HALF = "--total-timesteps 384000 --num-evals 16", "--total-timesteps 192000 --num-evals 8"
AUTHOR = ["a1", "a2", "a2b", "a3", "a4", "a5", "a6", "a7", "a7b", "a7c", "a8", "a9"]
PARTS = ["b1", "b2", "b3_none", "b4_mean", "b4_one_target", "b5_sum", "b5_fixed", "b6_dpg"]
PARTS += ["b6_ppo", "b7", "b8"]
FLAGS = {
    "default": "",
    **{name: f"--preset {name}" for name in PARTS},
    "b4_separate": "--brains.1.own-target-actor",
    "her_0.05": "--brains.1.her-ratio 0.05",
    "her_0.5": "--brains.1.her-ratio 0.5",
    "her_0.8": "--brains.1.her-ratio 0.8",
    "lambda_0.9": "--gae-lambda 0.9",
    "lambda_1": "--gae-lambda 1",
}
PPO = {
    "small": "",
    "small_slow": "--learning-rate 3e-4",
    "small_held": "--noise-interval 4",
}
HINDSIGHT = {
    TASK: ["b2_relabelled"],
    STATIC: ["b3_none", "b2_future", "b2_future_relabelled"],
}
GROUPS: dict[str, list[Job]] = {
    "tasks": [
        *(Job(TASK, name, "bnpo", f"--preset {name} {LONG}") for name in AUTHOR),
        Job(TASK, "ppo", "ppo", LONG),
        Job(TASK, "sac", "sac", LONG),
    ],
    "ablations": [Job(TASK, name, "bnpo", f"{flags} {HALF}") for name, flags in FLAGS.items()],
    "ppo": [
        Job(TASK, name, "ppo", f"--num-envs 16 --num-minibatches 4 {flags} {LONG}")
        for name, flags in PPO.items()
    ],
    "hindsight": [
        Job(task, name, "bnpo", f"--preset {name} {HALF}")
        for task, names in HINDSIGHT.items()
        for name in names
    ],
}
# Runs that the others of a task are compared with, and their group.
REFERENCES = {TASK: ("tasks", ["a1", "a4", "a6"]), STATIC: ("hindsight", ["b3_none"])}
THRESHOLDS = 10.0, 20.0, 30.0
# Short episodes of the author's single runs until an evaluation of the better target actor, with
# sampled actions, is at 10 and at 20, and until ten in a row are above 30.
PUBLISHED = {
    "a1": (259, 279, 319), "a2b": (239, 319, 339), "a5": (None, None, 180),
    "a6": (199, 239, 539), "a7": (119, 199, 899), "a8": (419, 759, 1219),
}  # fmt: skip


def episodes_to(run: rundir.Run, threshold: float) -> int | None:
    """Short episodes until the IQM over seeds of an evaluation reaches the threshold."""
    steps_per_episode = run.config["num_envs"] * run.config["num_steps"]
    for step, returns in zip(run.steps, run.returns.mean(-1).T, strict=True):
        if report.iqm(returns) >= threshold:
            return math.ceil(step / steps_per_episode)
    return None


def milestones(done: Report) -> str:
    """Table of the episodes that each setting of BNPO needed, and the author's."""
    rows = []
    shown = lambda numbers: ", ".join("-" if x is None else str(x) for x in numbers)
    for job, run in done.runs.items():
        if job.algo == "bnpo":
            here = shown(episodes_to(run, threshold) for threshold in THRESHOLDS)
            reached = (run.returns.mean(-1) >= THRESHOLDS[-1]).any(1)
            seeds = f"{reached.sum()} of {len(reached)}"
            published = shown(PUBLISHED.get(job.name, ()))
            rows.append([job.name, here, seeds, published])
    if not rows:
        return ""
    title = "Short episodes to a greedy return of 10, 20 and 30 (IQM), and the author's:"
    head = ["setting", "here", "seeds ever at 30", "published: 10, 20, solved"]
    return f"\n{title}\n\n{report.table(head, rows)}"


def differences(done: Report) -> str:
    """Tables of the final returns minus those of the references after as many steps."""
    text = ""
    for task, (group, names) in REFERENCES.items():
        runs = {job.name: run for job, run in done.runs.items() if job.task == task}
        folder = done.folder.parent / group / task
        paths = {name: runner.launches(folder / name, "done.json") for name in names}
        references = {name: runner.read_launches(x) for name, x in paths.items() if x}
        if not runs or not references:
            continue
        steps = max(run.steps[-1] for run in runs.values())
        at_the_end = {
            name: run.returns[:, np.abs(run.steps - steps).argmin()].mean(-1)
            for name, run in (references | runs).items()
        }
        rows = []
        for x, returns in at_the_end.items():
            minus = {y: report.difference(returns, at_the_end[y]) for y in references}
            shown = {y: report.difference_estimate(*found) for y, found in minus.items()}
            rows.append([x, *("-" if x == y else shown[y] for y in references)])
        head = [task, *(f"minus {name}" for name in references)]
        text += f"\nDifferences after {steps:,} steps:\n\n{report.table(head, rows)}"
    return text


def main(argv: list[str] | None = None) -> None:
    """Reproduce from the command line."""
    further = dict.fromkeys(GROUPS, lambda done: milestones(done) + differences(done))
    runner.main(__doc__ or "", GROUPS, "runs/bnpo", further, argv)


if __name__ == "__main__":
    main()

"""The offline pipeline: a partly trained policy, five types of data, clones, and what learns.

    python experiments/reproduce/brac.py policy pure eps1 eps3 gaussian1 gaussian3 --num-seeds 4
    python experiments/reproduce/brac.py eps1 --tasks pendulum --num-seeds 4

groups:
  policy     SAC, which exports its policy when it is partly trained; without this group the
             policies in results/ are used
  pure, eps1, eps3, gaussian1, gaussian3
             a dataset of this type, clones of it, and offline algorithms at a CPU's sizes

The tables have both policies of BRAC, and the mean return of the policies that collected. Beside
the curves, TASK_alpha.png has the last returns against alpha.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from algos.launch import datasets, report, rundir
from experiments import runner
from experiments.collect_data import TYPES
from experiments.runner import Job, Report

V5 = ("gym/Hopper-v5", "gym/HalfCheetah-v5", "gym/Walker2d-v5")
V5_SAC = "--batch-size 128 --updates-per-step 0.5"
# Return at which a policy counts as partly trained: 40 % of the way from random to trained. These
# are -1309 and -120 on pendulum, which it passes in a few hundred steps, 16 and 2826 on hopper, and
# on Gymnasium's tasks, trained by CleanRL's SAC, 18 and 2310, -280 and 9635, 2 and 3591.
POLICIES = {
    "pendulum": "--partial-at-return -830 --total-timesteps 40000 --num-evals 160",
    "hopper": "--partial-at-return 1140 --total-timesteps 600000 --num-evals 30 --batch-size 128 "
    "--buffer-size 600000",
    "gym/Hopper-v5": f"--partial-at-return 935 --total-timesteps 200000 --num-evals 20 {V5_SAC}",
    "gym/HalfCheetah-v5": "--partial-at-return 3686 --total-timesteps 200000 --num-evals 20 "
    f"{V5_SAC}",
    "gym/Walker2d-v5": f"--partial-at-return 1437 --total-timesteps 600000 --num-evals 30 {V5_SAC}",
}
POLICY_RESULTS = runner.ROOT / "results" / "brac" / "policy"
ROWS = {"pendulum": 100_000, "hopper": 200_000, **dict.fromkeys(V5, 200_000)}
BUDGETS = {  # gradient steps and evaluations of every learner
    "pendulum": "--total-timesteps 10000 --batch-size 128 --num-evals 5",
    "hopper": "--total-timesteps 20000 --batch-size 64 --num-evals 2 --eval-episodes 8",
    **dict.fromkeys(
        V5,
        "--total-timesteps 30000 --batch-size 128 --num-evals 3 --eval-episodes 8 "
        "--final-episodes 32",
    ),
}
SMALL = "--dataset {here}/data.npz --hidden 64 64"
CRITIC = f"{SMALL} --critic-hidden 64 64"
ACTOR_CRITIC = f"{CRITIC} --warm-start 2000 --learning-rate 3e-4"
CLONED = f"{ACTOR_CRITIC} --behavior {{here}}/bc{{more}}"
LEARNERS = {
    "bc": ("bc", SMALL),
    "bcq": ("bcq", f"{CRITIC} --vae-hidden 128 128"),
    "brac_kl_vp": ("brac", f"{CLONED} --alpha 0.1 1 10 100"),
    "brac_kl_vp_1q": ("brac", f"{CLONED} --alpha 0.1 1 10 100 --num-critics 1"),
    "brac_kl_pr": ("brac", f"{CLONED} --alpha 0.1 1 10 100 --preset policy_regularisation"),
    "brac_mmd_vp": ("brac", f"{CLONED} --alpha 1 10 100 500 --preset mmd"),
    "brac_dual_kl_pr": ("brac", f"{ACTOR_CRITIC} --alpha 0.1 1 10 100 --preset dual"),
    "brac_adaptive_kl": ("brac", f"{CLONED} --preset adaptive"),
    "brac_bear_like": ("brac", f"{CLONED} --preset bear_like"),
    "brac_wasserstein_vp": ("brac", f"{ACTOR_CRITIC} --alpha 0.1 1 10 100 --preset wasserstein"),
    "offline_sac": ("brac", f"{CRITIC} --preset sac"),
}
GROUPS: dict[str, list[Job]] = {
    "policy": [Job(task, "sac", "sac", flags) for task, flags in POLICIES.items()],
    **{
        kind: [
            Job(task, name, algo, f"{flags} {BUDGETS[task]}")
            for task in POLICIES
            for name, (algo, flags) in LEARNERS.items()
        ]
        for kind in TYPES
    },
}


def collect(job: Job, run_dir: Path) -> None:
    """Collect the dataset that a job learns from, if it learns from one and it is not there.

    What it says of itself is written beside it as JSON, for the table: the dataset is too large to
    be kept with the results.
    """
    path = run_dir.parent / "data.npz"
    if job.algo == "sac":
        return
    if not path.exists():
        collect_dataset(job, run_dir, path)
    rundir.write_json(path.with_suffix(".json"), datasets.read(path)[1])


def collect_dataset(job: Job, run_dir: Path, path: Path) -> None:
    """Collect with the first partly trained policy: of the group policy, or of the results."""
    group = run_dir.parents[len(Path(job.task).parts)]
    folders = (group.parent / "policy", POLICY_RESULTS)
    found = [x for folder in folders for x in sorted(folder.glob(f"{job.task}/sac/partial_s*.npz"))]
    if not found:
        raise SystemExit(
            f"no partly trained policy of {job.task} in {group.parent}: run the group policy"
        )
    script = os.path.relpath(runner.ROOT / "experiments" / "collect_data.py")
    program = [sys.executable, script, str(found[0])]
    flags = ["--type", group.name, "--steps", str(ROWS[job.task]), "--out", str(path)]
    runner.run([*program, *flags])


def behaviour_return(folder: Path) -> float:
    """Mean return of the policies that collected the dataset of a task, by their shares."""
    parts = json.loads((folder / "data.json").read_text())["parts"]
    shares = [part["count"] for part in parts]
    return np.average([part["returns"]["mean"] for part in parts], weights=shares)


def plot_alphas(done: Report) -> None:
    """Draw the last greedy returns of every form of BRAC against alpha, to TASK_alpha.png.

    Points: IQM and 95 % interval over seeds. Lines: the learners without alpha, and the behaviour
    policy.
    """
    for task in dict.fromkeys(job.task for job in done.runs):
        path = done.folder / f"{task}_alpha.png"
        with report.figure(path, 1, 1, report.TEXT_WIDTH, task) as (axis,):
            for i, job in enumerate(job for job in done.runs if job.task == task):
                run, look = done.runs[job], {"color": f"C{i}", "label": job.name}
                finals = {label: report.final(run.final[x]) for label, x in report.groups(run)}
                middle = np.array([final["iqm"] for final in finals.values()])
                if "" in finals:
                    axis.axhline(middle[0], linestyle="--", **look)
                    continue
                interval = np.array([final["interval"] for final in finals.values()]).T
                alpha = [float(label.removeprefix("alpha=")) for label in finals]
                axis.errorbar(alpha, middle, np.abs(interval - middle), marker="o", **look)
            behaviour = behaviour_return(done.folder / task)
            axis.axhline(behaviour, color="black", linestyle=":", label="behaviour policy")
            axis.set(xscale="log", xlabel="alpha", ylabel="last greedy return")


def both_policies(done: Report) -> str:
    """Table of the returns of both policies of every run, beside the behaviour policy's."""
    rows = []
    for job, run in done.runs.items():
        behaviour = behaviour_return(done.folder / job.task)
        for label, index in report.groups(run):
            name = f"{job.name} {label}".strip()
            cells = [cell(returns[index]) for returns in (run.final, *run.final_further.values())]
            rows.append([job.task, name, *[*cells, ""][:2], report.number(behaviour, 1)])
    return "\n" + report.table(["task", "learner", "greedy", "max_q", "behaviour policy"], rows)


def cell(returns: np.ndarray) -> str:
    """IQM and interval of final returns [R, F]."""
    final = report.final(returns)
    return report.estimate(final["iqm"], final["interval"])


def further(done: Report) -> str:
    """What the group of a type of data has beside the common table and curves."""
    plot_alphas(done)
    return both_policies(done)


def main(argv: list[str] | None = None) -> None:
    """Reproduce from the command line."""
    tables = dict.fromkeys(TYPES, further)
    runner.main(__doc__ or "", GROUPS, "runs/brac", tables, argv, before=collect)


if __name__ == "__main__":
    main()

"""REPPO's tasks beside PPO, and its ablations: runs, a table, and curves.

    python experiments/reproduce/reppo.py tasks ablations --num-seeds 8
    python experiments/reproduce/reppo.py published --num-seeds 4

groups:
  tasks      the presets sized for a CPU, on five tasks with PPO at equal environment steps
  ablations  REPPO with the published critic, a histogram, on CartpoleSwingup, and with one part
             changed: those that the authors changed too
  details    the same with parts that the authors did not change
  published  dmc_small for 10M steps beside the authors' numbers: for an accelerator
"""

import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from algos.launch import report
from experiments import runner
from experiments.runner import Job, Report

HISTOGRAM = "--critic-loss hl_gauss"  # the preset of the task has a scalar critic
ABLATIONS = {
    "default": HISTOGRAM,
    "kl_mode_full": f"{HISTOGRAM} --kl-mode full",
    "kl_mode_value": f"{HISTOGRAM} --kl-mode value",
    "critic_loss_mse": "--critic-loss mse",
    "no_auxiliary_loss": f"{HISTOGRAM} --aux-loss-mult 0",
    "norm_none": f"{HISTOGRAM} --norm none",
    "kl_estimator_exact": f"{HISTOGRAM} --kl-estimator exact",
}
DETAILS = {
    "min_std_0": f"{HISTOGRAM} --min-std 0",
    "normalize_obs_off": f"{HISTOGRAM} --no-normalize-obs",
}
GROUPS: dict[str, list[Job]] = {
    "tasks": [
        Job("pendulum", "reppo", "reppo"),
        Job("cartpole", "reppo_discrete", "reppo_discrete"),
        Job("inverted_pendulum", "reppo", "reppo", "--total-timesteps 100000"),
        Job("CartpoleBalance", "reppo", "reppo", "--total-timesteps 300000"),
        *(
            Job(task, algo, algo, f"--total-timesteps {budget}")
            for task, budget in (
                ("CartpoleSwingup", 1_000_000),
                ("ReacherEasy", 1_000_000),
                ("CheetahRun", 300_000),
                ("WalkerWalk", 300_000),
                ("HopperHop", 300_000),
            )
            for algo in ("reppo", "ppo")
        ),
    ],
    **{
        group: [
            Job("CartpoleSwingup", name, "reppo", f"--total-timesteps 200000 {flags}")
            for name, flags in changes.items()
        ]
        for group, changes in (("ablations", ABLATIONS), ("details", DETAILS))
    },
    "published": [
        Job(task, "reppo", "reppo", "--preset dmc_small --total-timesteps 10000000")
        for task in (
            *("CartpoleBalance", "CartpoleSwingup", "CheetahRun"),
            *("HopperStand", "WalkerWalk", "ReacherEasy"),
        )
    ],
}

# Return of the authors' dmc_small runs after 10M true steps: mean, std over runs, runs. Their
# files label the steps of these runs four times too high.
PUBLISHED = {
    "CartpoleBalance": (999.6, 0.2, 10),
    "CartpoleSwingup": (867.4, 4.9, 10),
    "CheetahRun": (889.6, 19.7, 10),
    "HopperStand": (175.8, 272.3, 10),
    "WalkerWalk": (960.7, 17.8, 11),
    "ReacherEasy": (958.1, 11.4, 10),
}


def beside_published(done: Report) -> str:
    """Table of the means beside those of the authors."""
    rows = []
    for job, row in zip(done.runs, done.rows, strict=True):
        mean, std, n = PUBLISHED[job.task]
        ours = np.array(row["per_seed"], float)
        here = f"{np.nanmean(ours):.1f} ± {np.nanstd(ours):.1f} (n={row['alive']})"
        rows.append([job.task, f"{mean} ± {std} (n={n})", here])
    return "\n" + report.table(["task", "authors at 10M steps, mean ± std", "here"], rows)


def main(argv: list[str] | None = None) -> None:
    """Reproduce from the command line."""
    further = {"published": beside_published}
    runner.main(__doc__ or "", GROUPS, "runs/reppo", further, argv)


if __name__ == "__main__":
    main()

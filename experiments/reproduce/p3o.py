"""P3O beside A2C and PPO, and its ablations: runs, a table, and curves.

    python experiments/reproduce/p3o.py tasks ablations --num-seeds 10

groups:
  tasks      cartpole, MinAtar and hopper at budgets for a CPU, at equal environment steps
  ablations  replay ratio, clipping and the weight of the KL on one task, with curves of
             OUT/ablations/<task>-replay.png: ESS, KL and share of clipped ratios
"""

import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from algos.launch import report, rundir
from experiments import runner
from experiments.runner import Job, Report

MINATAR = ("breakout", "asterix", "freeway", "space_invaders")
BUDGETS = {"cartpole": 500_000, **dict.fromkeys(MINATAR, 1_000_000), "hopper": 300_000}
ALGOS = {"p3o": ("p3o", ""), "a2c": ("p3o", "--preset a2c"), "ppo": ("ppo", "")}
ABLATIONS = {
    "default": "",
    "replay_ratio_0": "--replay-ratio 0",
    "replay_ratio_1": "--replay-ratio 1",
    "replay_ratio_4": "--replay-ratio 4",
    "replay_half": "--replay-fraction 0.0143",
    "replay_times_4": "--replay-fraction 0.1144",
    "fixed_clip": "--max-ratio 1",
    "no_kl": "--kl-coef 0",
    "kl_0.1": "--kl-coef 0.1",
    "kl_0.5": "--kl-coef 0.5",
    "kl_reduction_sum": "--kl-reduction sum",
    "kl_direction_beta_pi": "--kl-direction beta_pi",
    "no_trace": "--gae-lambda 1",
    "off_policy_entropy": "--off-policy-entropy",
}
GROUPS: dict[str, list[Job]] = {
    "tasks": [
        Job(task, name, algo, f"{flags} --total-timesteps {budget}".strip())
        for task, budget in BUDGETS.items()
        for name, (algo, flags) in ALGOS.items()
    ],
    "ablations": [
        Job("cartpole", name, "p3o", f"--total-timesteps 100000 {flags}".strip())
        for name, flags in ABLATIONS.items()
    ],
}
SHOWN = {"replay/ess": "ESS", "replay/kl": "KL", "replay/clip_fraction": "clipped ratios"}


def replay_curves(done: Report) -> str:
    """Draw what the replay was like: means over the seeds of first launches; returns where."""
    if not done.runs:
        return ""
    out = done.folder / f"{next(iter(done.runs)).task}-replay.png"
    with report.figure(out, len(SHOWN), len(SHOWN), report.TEXT_WIDTH, "") as axes:
        for i, (job, run) in enumerate(done.runs.items()):
            look = {"label": job.name, "linestyle": "-" if i < 10 else "--"}  # of ten colours
            first = rundir.read_run(run.path)  # `run` has the seeds of all its launches
            metrics = rundir.read_metrics(run.path, len(first.seeds))
            for axis, (metric, label) in zip(axes, SHOWN.items(), strict=True):
                if metric in metrics:
                    steps, values = metrics[metric]
                    filled = np.isfinite(values).any(1)
                    axis.plot(steps[filled], np.nanmean(values[filled], 1), **look)
                axis.set(xlabel="environment steps", ylabel=label)
                axis.locator_params(axis="x", nbins=4)
    return f"\nESS, KL and clipped ratios: {out}\n"


def main(argv: list[str] | None = None) -> None:
    """Reproduce from the command line."""
    runner.main(__doc__ or "", GROUPS, "runs/p3o", {"ablations": replay_curves}, argv)


if __name__ == "__main__":
    main()

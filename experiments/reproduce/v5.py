"""Gymnasium's MuJoCo v5 tasks, beside published numbers: runs, tables, and curves.

    python experiments/reproduce/v5.py tasks --jobs ppo --num-seeds 10

groups:
  tasks      the presets of this collection at equal environment steps: PPO on eight tasks, BPO,
             P3O, A2C, REPPO and SAC on some of them
  std        the search of PPO's initial standard deviation, exp(log_std_init)
  p3o        the search of P3O's, and of its learning rate
  mu         the search of BPO's epochs of mu at PPO's clip range, 0.2; the preset has 10 and 0.4
  ablations  BPO's preset with the other losses of mu, and other clip ranges of PPO and BPO
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from algos.launch import report
from experiments import runner
from experiments.runner import Job, Report

# Tasks.
BPO = ["Hopper", "HalfCheetah", "Walker2d", "Ant"]
PPO = [*BPO, "Humanoid", "Swimmer", "InvertedDoublePendulum", "Reacher"]
ALGOS = {  # name: algorithm, flags, tasks
    "ppo": ("ppo", "", PPO),
    "bpo": ("bpo", "", BPO),
    "p3o": ("p3o", "", BPO[:3]),
    "a2c": ("p3o", "--preset a2c", BPO[:3]),
    "reppo": ("reppo", "", BPO[:3]),
    "sac": ("sac", "--updates-per-step 0.5", BPO[:3]),  # half the preset's, for a CPU
    "sac_300k": ("sac", "--updates-per-step 0.5 --total-timesteps 300000", BPO[:3]),
}
# Values of log_std_init to try on each task.
STD = {"Hopper": (0, -1), "HalfCheetah": (0, -0.5, -1), "Walker2d": (0,), "Ant": (-1,)}
P3O_STD = {"HalfCheetah": (0, -1), "Hopper": (-1,), "Walker2d": (-1,)}
ABLATIONS = {  # name: algorithm, flags, tasks
    "kl": ("bpo", "--mu-loss kl", BPO[:2]),
    "centred": ("bpo", "--mu-loss centred", BPO[:1]),
    "ppo_clip_0.4": ("ppo", "--clip-eps 0.4", BPO[:2]),
    "bpo_clip_0.3": ("bpo", "--clip-eps 0.3", BPO),
}
MU_EPOCHS = {"Hopper": (2, 10, 40), "HalfCheetah": (10,)}
EVALS = "--num-evals 10"


def v5(name: str) -> str:
    """Full name of a task."""
    return f"gym/{name}-v5"


def jobs(table: dict[str, tuple[str, str, list[str]]]) -> list[Job]:
    """One job for each name of a table and each of its tasks."""
    return [
        Job(v5(task), name, algo, f"{flags} {EVALS}".strip())
        for name, (algo, flags, tasks) in table.items()
        for task in tasks
    ]


GROUPS: dict[str, list[Job]] = {
    "tasks": jobs(ALGOS),
    "std": [
        Job(v5(task), f"log_std_{x}", "ppo", f"--log-std-init {x} {EVALS}")
        for task, values in STD.items()
        for x in values
    ],
    "p3o": [
        *(
            Job(
                v5(task),
                f"log_std_{x}",
                "p3o",
                f"--log-std-init {x} --sweep learning_rate=3e-4,1e-3 --total-timesteps 300000 "
                "--num-evals 3",
            )
            for task, values in P3O_STD.items()
            for x in values
        ),
        *(
            Job(v5(task), "log_std_0_1m", "p3o", f"--log-std-init 0 {EVALS}")
            for task in ("Hopper", "HalfCheetah")
        ),
    ],
    "mu": [
        Job(v5(task), f"epochs_{x}", "bpo", f"--clip-eps 0.2 --num-mu-epochs {x} {EVALS}")
        for task, values in MU_EPOCHS.items()
        for x in values
    ],
    "ablations": jobs(ABLATIONS),
}

# Published means and stds over seeds, by algorithm and task, after 1M steps; versions of the
# tasks and evaluations differ: CleanRL on v4 (3 seeds), Tianshou on v2 and v3 (10 seeds), single
# runs of the RL Zoo on v3.
SOURCES = {
    "ppo": ["CleanRL", "Tianshou", "RL Zoo"],
    "a2c": ["Tianshou"],
    "sac": ["CleanRL", "Tianshou", "RL Zoo"],
}
PUBLISHED = {
    "ppo": {
        "Hopper": ["2383 ± 272", "2609 ± 701", "2410"],
        "HalfCheetah": ["1443 ± 46", "5784 ± 1244", "5819"],
        "Walker2d": ["2288 ± 572", "3589 ± 757", "3479"],
        "Ant": ["", "3258 ± 1079", "1327"],
        "Humanoid": ["716 ± 49", "787 ± 194", ""],
        "Swimmer": ["", "66.7 ± 99.1", "282"],
        "InvertedDoublePendulum": ["", "9231 ± 270", ""],
        "Reacher": ["", "-4.1 ± 0.3", ""],
    },
    "a2c": {
        "Hopper": ["1253 ± 458"],
        "HalfCheetah": ["1830 ± 1068"],
        "Walker2d": ["1092 ± 709"],
    },
    "sac": {
        "Hopper": ["2310 ± 343", "3542 ± 52", "2326"],
        "HalfCheetah": ["9635 ± 1424", "12139 ± 1049", "9535"],
        "Walker2d": ["3591 ± 911", "5007 ± 252", "3863"],
    },
}


def short(job: Job) -> str:
    """Name of a job's task in the tables of published numbers."""
    return job.task.removeprefix("gym/").removesuffix("-v5")


def beside_published(done: Report) -> str:
    """Tables of the runs of PPO, A2C and SAC beside published numbers."""
    text = ""
    for algo, sources in SOURCES.items():
        rows = [
            [
                job.task,
                *runner.estimates(row),
                *PUBLISHED[algo].get(short(job), [""] * len(sources)),
            ]
            for job, row in zip(done.runs, done.rows, strict=True)
            if job.name == algo
        ]
        head = [algo, "here, IQM [95 %]", "here, mean ± std", *sources]
        text += f"\n{report.table(head, rows)}" if rows else ""
    return text


def main(argv: list[str] | None = None) -> None:
    """Reproduce from the command line."""
    runner.main(__doc__ or "", GROUPS, "runs/v5", {"tasks": beside_published}, argv)


if __name__ == "__main__":
    main()

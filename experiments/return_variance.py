"""Variance of return estimates under pi, under BPO's mu and under its centred variant.

    python experiments/return_variance.py --out results/return_variance
    python experiments/return_variance.py --run-dir runs/cartpole/bpo/... --out results/return_variance

Without --run-dir: exactly, by dynamic programming, on a task of two states, for estimates that are
not clipped and look at the whole return (lambda = 1). With it: by Monte Carlo, on start states of
the task of a finished BPO run. Each start is played many times by pi and by behaviour policies made
of its Q, Q^ and V, and the estimator of `algos/bpo.py` turns every rollout into one estimate. Writes
a Markdown table and JSON.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs
from algos import bpo, rundir

# --- exact ---


class TabularTask(NamedTuple):
    """Task of S states and A actions that never ends, with deterministic rewards."""

    reward: np.ndarray  # [S, A]
    transition: np.ndarray  # [S, A, S]
    policy: np.ndarray  # [S, A], pi
    gamma: float


MDP_X = TabularTask(
    reward=np.array([[1.0, 0.0], [2.0, -1.0]]),
    transition=np.array([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]]),
    policy=np.array([[0.6, 0.4], [0.3, 0.7]]),
    gamma=0.9,
)


class Solution(NamedTuple):
    """Values and moments of pi, and the behaviour policies made of them."""

    v: np.ndarray  # [S]
    q: np.ndarray  # [S, A]
    r_hat: np.ndarray  # [S, A] reward of the second moment
    qhat: np.ndarray  # [S, A] second moment of the return
    mu_hat: np.ndarray  # [S, A]
    mu_centred: np.ndarray  # [S, A]


def action_values(task: TabularTask, reward: np.ndarray, gamma: float) -> np.ndarray:
    """Discounted sum of `reward` [S, A] under pi, [S, A]."""
    mean_reward = (task.policy * reward).sum(-1)
    kernel = np.einsum("sa,saz->sz", task.policy, task.transition)
    v = np.linalg.solve(np.eye(len(mean_reward)) - gamma * kernel, mean_reward)
    return reward + gamma * task.transition @ v


def proportional(weight: np.ndarray) -> np.ndarray:
    """Policy [S, A] proportional to `weight`."""
    return weight / weight.sum(-1, keepdims=True)


def solve(task: TabularTask) -> Solution:
    """Moments of pi's return, and the behaviour policies, exactly."""
    q = action_values(task, task.reward, task.gamma)
    v = (task.policy * q).sum(-1)
    r_hat = 2.0 * task.reward * q - task.reward**2
    qhat = action_values(task, r_hat, task.gamma**2)
    centred = qhat - 2.0 * v[:, None] * q + v[:, None] ** 2
    return Solution(
        *(v, q, r_hat, qhat),
        mu_hat=proportional(task.policy * np.sqrt(qhat)),
        mu_centred=proportional(task.policy * np.sqrt(centred)),
    )


def next_variance(task: TabularTask, variance: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """E[(R + gamma G' - baseline)^2 | s, a], [S, A]; G' has pi's mean and `variance` [S]."""
    v = solve(task).v
    q = task.reward + task.gamma * task.transition @ v
    spread = task.transition @ v**2 - (task.transition @ v) ** 2
    later = task.gamma**2 * (spread + task.transition @ variance)
    return (q - baseline[:, None]) ** 2 + later


def variance(task: TabularTask, mu: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Variance [S] of ratio (R + gamma G' - baseline) + baseline, the unclipped target at lambda 1.

    Baseline 0 is per-decision importance sampling.
    """
    v, result = solve(task).v, np.zeros(len(task.policy))
    for _ in range(2000):
        second = (task.policy**2 / mu * next_variance(task, result, baseline)).sum(-1)
        result = second - (v - baseline) ** 2
    return result


def best_pdis_policy(task: TabularTask) -> np.ndarray:
    """Behaviour policy [S, A] of the least variance when all later steps use it too."""
    zero = np.zeros(len(task.policy))
    mu = task.policy
    for _ in range(500):
        mu = proportional(task.policy * np.sqrt(next_variance(task, variance(task, mu, zero), zero)))
    return mu


def exact_rows() -> list[dict]:
    """Variance of each estimate under each behaviour policy on MDP_X."""
    exact = solve(MDP_X)
    zero = np.zeros(2)
    return [
        {"task": "MDP-X", "estimate": estimate, "acting": name, "variance": list(variance(*args))}
        for name, mu in [
            ("pi", MDP_X.policy),
            ("mu", exact.mu_hat),
            ("mu centred", exact.mu_centred),
            ("best for PDIS", best_pdis_policy(MDP_X)),
        ]
        for estimate, args in [
            ("PDIS", (MDP_X, mu, zero)),
            ("V-trace, exact V", (MDP_X, mu, exact.v)),
        ]
    ]


def main():
    print(exact_rows())


if __name__ == "__main__":
    main()

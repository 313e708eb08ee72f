"""Speed beside other libraries, for `experiments/benchmark.py --peer`.

PurePO and the peer each have a process in their own Python, and work in turn: after one call of
each to warm up, each round times one call of each. A call may be longer on one side, as rates are
compared. Neither evaluates.

    rejax     PPO on CartPole, at small sizes and at rejax's defaults
    sbx, cleanrl
              PPO on Gymnasium's tasks, 16 environments x 128 steps, 10 epochs, minibatches of 128;
              both train one seed at a time, so their rate is that of any number of seeds
    envpool   64 of Gymnasium's environments alone, under random actions, one seed
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import envs
from algos.launch import report

HERE = Path(__file__).resolve().parent


class Contest(NamedTuple):
    """What both sides do: the arguments of `benchmark.serve` and of the peer's script."""

    label: str
    num_seeds: int
    ours: dict[str, Any]
    theirs: dict[str, Any]


def rejax(seeds: list[int]) -> Iterator[Contest]:
    """PPO on CartPole: all seeds at once on both sides."""
    sizes = {
        "small sizes": (
            {"num_envs": 32, "num_steps": 32, "num_epochs": 4, "num_minibatches": 4},
            160,
        ),
        "rejax's defaults": (
            {"num_envs": 64, "num_steps": 64, "num_epochs": 8, "num_minibatches": 16},
            20,
        ),
    }
    for (label, (given, num_updates)), num_seeds in itertools.product(sizes.items(), seeds):
        changes = given | {"learning_rate": 1e-3, "hidden": (64, 64), "activation": "tanh"}
        updates = -(-num_updates // num_seeds)
        yield Contest(
            f"PPO, CartPole, {label}",
            num_seeds,
            _ours("train", "cartpole", num_seeds, updates, changes),
            changes | {"num_seeds": num_seeds, "num_updates": updates},
        )


def ppo(seeds: list[int]) -> Iterator[Contest]:
    """PPO on MuJoCo: our seeds at once, the peer's one."""
    given = {"num_envs": 16, "num_steps": 128, "num_epochs": 10, "num_minibatches": 16}
    changes = given | {"learning_rate": 3e-4, "hidden": (64, 64), "activation": "tanh"}
    for env, num_seeds in itertools.product(("Hopper-v5", "HalfCheetah-v5"), seeds):
        yield Contest(
            f"PPO, {env}",
            num_seeds,
            _ours("train", f"gym/{env}", num_seeds, -(-16 // num_seeds), changes),
            changes | {"env": env, "num_updates": 4},
        )


V5 = ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5"]


def envpool(seeds: list[int]) -> Iterator[Contest]:
    """Environments alone: 64 of them, 128 steps a call."""
    for env in V5:
        yield Contest(
            f"environment, {env}",
            1,
            _ours("play", f"gym/{env}", 1, 1, {"num_envs": 64, "num_steps": 128}),
            {"env": env, "num_envs": 64, "num_steps": 128, "threads": envs.cores()},
        )


PEERS = {"rejax": rejax, "sbx": ppo, "cleanrl": ppo, "envpool": envpool}


def _ours(work, env, num_seeds, num_updates, changes) -> dict[str, Any]:
    what = {"work": work, "env": env}
    return what | {"num_seeds": num_seeds, "num_updates": num_updates, "changes": changes}


class Side:
    """A process that works once for every line that it is sent."""

    def __init__(self, command: list[str], limit: float):
        self.cache = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": self.cache.name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.timer = threading.Timer(limit, self.process.kill)
        self.timer.start()
        try:
            self.description = self.answer()
        except BaseException:
            self.close()
            raise

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; RuntimeError if the process has ended."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{' '.join(self.process.args[:2])} ended or took too long")

    def rate(self) -> float:
        """Environment steps per second of one call."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.answer()
        return answer["steps"] / answer["seconds"]

    def close(self) -> None:
        """End the process."""
        self.timer.cancel()
        self.process.kill()
        self.process.communicate()
        self.cache.cleanup()


def hold(peer: str, python: str, contest: Contest, rounds: int, limit: float) -> dict[str, Any]:
    """Both sides in turn, `rounds` times; rates in environment steps per second."""
    commands = {
        "ours": [sys.executable, str(HERE / "benchmark.py"), "--serve", json.dumps(contest.ours)],
        peer: [python, str(HERE / f"peer_{peer}.py"), json.dumps(contest.theirs)],
    }
    sides: dict[str, Side] = {}
    try:
        for name, command in commands.items():
            sides[name] = Side(command, limit)
        for side in sides.values():
            side.rate()  # the first call warms up
        turns = [{name: side.rate() for name, side in sides.items()} for _ in range(rounds)]
    finally:
        for side in sides.values():
            side.close()
    return contest._asdict() | {
        "rates": {name: [turn[name] for turn in turns] for name in sides},
        "ratios": sorted(turn["ours"] / turn[peer] for turn in turns),
        "processes": {name: side.description for name, side in sides.items()},
    }


def markdown(peer: str, measured: list[dict[str, Any]]) -> str:
    """One row per contest."""
    head = ["work", "our seeds", "PurePO, steps/s", f"{peer}, steps/s", "ratio [min, max]"]
    rows = []
    for case in measured:
        cells = [case["label"], str(case["num_seeds"])]
        if "error" in case:
            cells += [case["error"], "", ""]
        else:
            ratios = case["ratios"]
            cells += [f"{statistics.median(x):,.0f}" for x in case["rates"].values()]
            cells.append(f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")
        rows.append(cells)
    return report.table(head, rows)

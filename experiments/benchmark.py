"""Speed: start-up, compilation, environments, training and evaluation, each timed apart.

    python experiments/benchmark.py --out results/benchmark/cpu.json
    python experiments/benchmark.py --envs cartpole hopper --algos ppo --seeds 1 16
    python experiments/benchmark.py --peer-python REJAX_PYTHON

Each case runs in processes of its own, with a time limit. The first one starts with an empty
compilation cache (cold), the second one with the cache that the first one left (warm). Both say how
many seconds passed from the command to the end of the first update; the second one goes on and
times, in turn, the environments under random actions and the whole update, from the middle of a run
on, so that replay buffers are full. Rates are environment steps per second of all seeds together.

With --peer-python, PPO on CartPole is timed against rejax instead: the two are called in turn, with
the same sizes, and evaluate nothing.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

STARTED = time.time()  # before jax is imported, which is part of the start-up
if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp

import envs
from algos.launch import cli, logs, report, rundir
from algos.launch import program as programs
from algos.launch.rows import evaluation_keys, inputs, make_rows

CALL_SECONDS = 1.0  # of one timed call, or one update where that takes longer
ROUNDS = 5  # timed calls of the environments and of training

# --- one case, in a process of its own ---


class Case:
    """The compiled program of a launch, as the launcher makes it."""

    def __init__(self, algo: str, env: str, presets: list[str], num_seeds: int, **changes):
        module = importlib.import_module(f"algos.{algo}")
        self.config = module.config_for(env, *presets, **changes)
        self.launch = cli.Launch(num_seeds=num_seeds)
        self.rows = make_rows(self.launch, self.config, module.TRACEABLE)
        programs.setup_jax(num_seeds)
        self.env = module.make_env(self.config)
        start = time.perf_counter()
        program = programs.make_program(module, self.config, self.launch, self.rows)
        traced = programs.trace(program, self.rows)
        middle = time.perf_counter()
        self.program = programs.compile_ahead(traced, self.rows)
        self.seconds = {"trace": middle - start, "compile": time.perf_counter() - middle}
        self.keys, self.hparams = inputs(self.rows)
        self.state = self.program.init(self.keys, self.hparams)

    @property
    def steps(self) -> int:
        """Environment steps of one update of all seeds."""
        return self.config.steps_per_update * len(self.rows.seeds)

    def train(self, num_updates: int) -> None:
        """Take that many updates, from the middle of the run on."""
        middle = self.config.num_updates // 2
        state = self.state._replace(update=0 * self.state.update + middle)
        self.state, sums = self.program.train(state, self.hparams, jnp.int32(num_updates))
        jax.block_until_ready(sums)

    def play(self, num_updates: int) -> None:
        """Step the environments as often as that many updates do, with random actions."""
        jax.block_until_ready(self.random_play(self.keys, jnp.int32(num_updates)))

    @functools.cached_property
    def random_play(self):
        """Keys [R], number of updates -> sums [R] of what random actions gave; compiled."""
        env, size, num_steps = self.env, self.config.num_envs, self.config.num_steps

        def steps(key, num_updates):
            key, key_reset = jax.random.split(key)
            _, state = env.reset(key_reset)

            def step(_, carry):
                key, state, total = carry
                key, key_act, key_step = jax.random.split(key, 3)
                if env.discrete:
                    action = jax.random.randint(key_act, (size,), 0, env.action_size)
                else:
                    shape = size, env.action_size
                    action = jax.random.uniform(key_act, shape, minval=-1.0, maxval=1.0)
                obs, state, reward, *_ = env.step(key_step, state, action)
                return key, state, total + reward.sum() + obs.sum()  # or nothing would be computed

            carry = key, state, jnp.zeros(())
            return jax.lax.fori_loop(0, num_updates * num_steps, step, carry)[-1]

        devices = programs.row_devices(len(self.rows.seeds))
        mesh, row = jax.sharding.Mesh(devices, "row"), jax.sharding.PartitionSpec("row")
        played = jax.shard_map(
            jax.vmap(steps, (0, None)),
            mesh=mesh,
            in_specs=(row, jax.sharding.PartitionSpec()),
            out_specs=row,
            check_vma=False,
        )
        return jax.jit(played).lower(self.keys, jnp.int32(1)).compile()


def seconds_of(function, *args) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def measure(case: dict[str, Any], budget: float, started: float) -> dict[str, Any]:
    """Start-up of a case and, with a budget of seconds, its rates."""
    lab = Case(**case)
    lab.train(1)
    measured = {"startup": time.time() - started, **lab.seconds}
    if not budget:
        return measured
    updates, samples = {"environment": 1, "training": 1}, {"environment": [], "training": []}
    functions = {"environment": lab.play, "training": lab.train}
    longest = max(1, lab.config.num_updates // 2)
    lab.play(1)
    start = time.perf_counter()
    while min(map(len, samples.values())) < ROUNDS and time.perf_counter() - start < budget:
        for name, function in functions.items():
            seconds = seconds_of(function, updates[name])
            if seconds > CALL_SECONDS / 4 or updates[name] == longest:
                samples[name].append(lab.steps * updates[name] / seconds)
            else:  # too short to be measured well
                wanted = int(updates[name] * min(CALL_SECONDS / seconds, 100)) + 1
                updates[name] = min(wanted, longest)

    def evaluate():
        plays = lab.program.begin(evaluation_keys(lab.rows, 0))
        jax.block_until_ready(lab.program.play(lab.state, plays, jnp.int32(2**31 - 1)))

    return measured | {
        "evaluation": seconds_of(evaluate),
        "rates": {name: statistics.median(x) for name, x in samples.items() if x},
        "samples": samples,
        "sizes": [lab.config.num_envs, lab.config.num_steps],
        "devices": len(programs.row_devices(len(lab.rows.seeds))),
        "device": jax.devices()[0].device_kind,
    }


def in_own_process(case: dict[str, Any], budget: float, limit: float) -> dict[str, Any]:
    """Measure a case cold and then warm, in processes that may fail or hang."""
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_TRACEBACK_FILTERING": "off",  # the last line of an error is then its message
        }
        for name, seconds in ("cold", 0.0), ("warm", budget):
            command = [sys.executable, __file__, "--case", json.dumps([case, seconds])]
            try:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=limit
                )
            except subprocess.TimeoutExpired:
                return case | {"error": f"nothing after {limit:.0f} s"}
            if done.returncode:
                return case | {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
            results[name] = json.loads(done.stdout.splitlines()[-1])
    return case | results


def markdown(cases: list[dict[str, Any]]) -> str:
    """One row per case."""
    head = ["algorithm", "environment", "seeds x envs x steps", "devices"]
    head += ["first update, s, cold", "warm", "trace + compile, s, cold", "warm"]
    head += ["environment alone, steps/s", "training, steps/s", "one evaluation, s"]
    rows = []
    for case in cases:
        task = " ".join([case["env"], *case["presets"]])
        cells = [case["algo"], task, str(case["num_seeds"])]
        if "error" in case:
            cells.append(case["error"])
        else:
            cold, warm = case["cold"], case["warm"]
            cells[-1] += " x {} x {}".format(*warm["sizes"])
            cells.append(f"{warm['devices']} x {warm['device']}")
            cells += [f"{x['startup']:.1f}" for x in (cold, warm)]
            cells += [f"{x['trace']:.1f} + {x['compile']:.1f}" for x in (cold, warm)]
            rates = warm["rates"]
            cells += [f"{rates.get(x, float('nan')):,.0f}" for x in ("environment", "training")]
            cells.append(f"{warm['evaluation']:.1f}")
        rows.append(cells + [""] * (len(head) - len(cells)))
    return report.table(head, rows)


# --- against rejax ---

# Our preset of the task, and rejax's defaults: both libraries get both.
SIZES = {
    "ours": {"num_envs": 32, "num_steps": 32, "num_epochs": 4, "num_minibatches": 4},
    "rejax": {"num_envs": 64, "num_steps": 64, "num_epochs": 8, "num_minibatches": 16},
}
COMMON = {"learning_rate": 1e-3, "hidden": (64, 64), "activation": "tanh"}
UPDATES = {"ours": 160, "rejax": 20}  # of one call, divided by the number of seeds


class Contestant:
    """A process that trains once for every line that it is sent."""

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
        self.description = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; RuntimeError if the process has ended."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{' '.join(self.process.args[:2])} ended or took too long")

    def train(self) -> float:
        """Seconds of one training."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()["seconds"]

    def close(self) -> None:
        """End the process."""
        self.timer.cancel()
        self.process.kill()
        self.process.communicate()
        self.cache.cleanup()


def serve(num_seeds: int, num_updates: int, **sizes) -> None:
    """The side of this project: tell the compile seconds, then train for every line of stdin."""
    case = Case("ppo", "cartpole", [], num_seeds, **(sizes | {"hidden": tuple(sizes["hidden"])}))
    print(json.dumps({"compile": sum(case.seconds.values())}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": seconds_of(case.train, num_updates)}), flush=True)


def against(peer_python: str, sizes: str, num_seeds: int, rounds: int, limit: float):
    """Time PPO on CartPole of this project and of rejax in turn, `rounds` times."""
    given = {"num_seeds": num_seeds, "num_updates": -(-UPDATES[sizes] // num_seeds)}
    given |= SIZES[sizes] | COMMON
    peer = str(Path(__file__).with_name("peer_rejax.py"))
    commands = {
        "ours": [sys.executable, __file__, "--serve", json.dumps(given)],
        "rejax": [peer_python, peer, json.dumps(given)],
    }
    contestants: dict[str, Contestant] = {}
    try:
        for name, command in commands.items():
            contestants[name] = Contestant(command, limit)
        for contestant in contestants.values():
            contestant.train()  # the first call warms up
        seconds = [{name: x.train() for name, x in contestants.items()} for _ in range(rounds)]
    finally:
        for contestant in contestants.values():
            contestant.close()
    steps = num_seeds * given["num_updates"] * given["num_envs"] * given["num_steps"]
    return given | {
        "sizes": sizes,
        "rates": {name: [steps / x[name] for x in seconds] for name in contestants},
        "ratios": sorted(x["rejax"] / x["ours"] for x in seconds),
        "processes": {name: x.description for name, x in contestants.items()},
    }


def peer_markdown(cases: list[dict[str, Any]]) -> str:
    """One row per case."""
    head = ["sizes of", "seeds", "envs x steps", "epochs x minibatches", "PurePO, steps/s"]
    head += ["rejax", "ratio [min, max]", "compile, s", "rejax"]
    rows = []
    for case in cases:
        ratios = case["ratios"]
        rows.append(
            [
                case["sizes"],
                str(case["num_seeds"]),
                f"{case['num_envs']} x {case['num_steps']}",
                f"{case['num_epochs']} x {case['num_minibatches']}",
                *(f"{statistics.median(x):,.0f}" for x in case["rates"].values()),
                f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
                *(f"{x['compile']:.0f}" for x in case["processes"].values()),
            ]
        )
    return report.table(head, rows)


# --- command line ---


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; one line and exit status 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--envs", nargs="+", default=("cartpole", "hopper", "ant"), help="tasks")
    parser.add_argument("--algos", nargs="+", default=("ppo", "bpo"), help="online algorithms")
    parser.add_argument("--presets", nargs="+", default=[], help="on top of the task's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 16), help="numbers of seeds")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to time one case")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds to wait for one case")
    parser.add_argument("--peer-python", help="Python that has rejax 0.1.3 and gymnax 0.0.9")
    parser.add_argument("--rounds", type=int, default=11, help="calls of each side of a comparison")
    parser.add_argument("--out", default="", help="JSON to write")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.seeds) < 1 or args.rounds < 1:
        parser.error("--seeds and --rounds must be at least 1")
    for algo in args.algos:
        config = getattr(importlib.import_module(f"algos.{algo}"), "Config", None)
        if "num_envs" not in {field.name for field in dataclasses.fields(config or cli.Launch)}:
            parser.error(f"algos/{algo}.py is not an online algorithm")
    for env in args.envs:
        try:
            envs.canonical(env)
        except ValueError as error:
            parser.error(str(error))
    return args


def cases(args: argparse.Namespace):
    """Measure one case after the other."""
    if args.peer_python:
        for sizes, num_seeds in itertools.product(SIZES, args.seeds):
            print(f"PPO of rejax, sizes of {sizes}, {num_seeds} seeds", file=sys.stderr)
            yield against(args.peer_python, sizes, num_seeds, args.rounds, args.limit)
        return
    for algo, env, num_seeds in itertools.product(args.algos, args.envs, args.seeds):
        print(f"{algo} on {env}, {num_seeds} seeds", file=sys.stderr)
        case = {"algo": algo, "env": env, "presets": args.presets, "num_seeds": num_seeds}
        yield in_own_process(case, args.budget, args.limit)


def main():
    """Measure from the command line."""
    args = parse()
    if args.case:
        print(json.dumps(measure(*args.case, STARTED)))
        return
    if args.serve:
        serve(**args.serve)
        return
    measured: dict[str, Any] = logs.surroundings() | {
        "load": os.getloadavg(),  # of the last 1, 5 and 15 minutes, before the first case
        "cases": [],
    }
    for case in cases(args):
        measured["cases"].append(case)
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            rundir.write_json(Path(args.out), measured)
    print((peer_markdown if args.peer_python else markdown)(measured["cases"]), end="")


if __name__ == "__main__":
    main()

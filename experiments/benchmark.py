"""Speed: steps per second, compile seconds, and where the time of an update goes.

    python experiments/benchmark.py --out results/benchmark/cpu.json
    python experiments/benchmark.py --envs cartpole hopper --algos ppo --seeds 1 16
    python experiments/benchmark.py --peer rejax --peer-python REJAX_PYTHON

Each case is a process of its own, with a time limit and an empty compilation cache, and compiles
and trains as the launcher does, from the middle of a run on, so that warm-ups are over and what is
replayed has its size. Four variants of its update take turns on the same state:

    environment    random actions in place of the policy
    acting         the rollout alone, with the policy
    no gradient    the whole update, with gradients and optimiser that cost nothing
    full           the update

and an update's seconds are split by subtraction: environment; acting (policy and noise, which is
here drawn step by step); gradient (forward and backward passes, clipping, Adam); rest (targets,
shuffling, gathering minibatches, statistics, metrics). Where an algorithm has several losses, an
update without the gradient of one of them tells the share of that one. Rates are environment steps
per second of all seeds together. Evaluation is timed apart, on the policy that there is by then.

With --peer, PPO on CartPole is timed against another library, call by call in turn: `benchmark.py`
and `peer_rejax.py` in the peer's Python have the same sizes and evaluate nothing.
"""

import argparse
import contextlib
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import envs
from algos import common, launch, logs, rundir
from experiments import compare

ENVS = ("cartpole", "ant", "hopper", "halfcheetah", "CartpoleBalance")
PARTS = ("environment", "acting", "gradient", "rest")
CALL_SECONDS = 1.0  # of one timed call, or one update where that takes longer
ROUNDS = 5  # timed calls of each variant

# --- one case: runs in a process of its own ---


def rollout_alone(build: Callable, acting: bool) -> Callable:
    """`build` with an update that only plays: the policy if `acting`, else random actions."""

    def build_rollout(config) -> common.Algo:
        algo, env = build(config), envs.make(config.env, config.num_envs)
        shape = config.num_steps, config.num_envs

        def update(state):
            key, key_refresh, key_action, key_env = jax.random.split(state.key, 4)
            policy = algo.policy_of(state)
            if env.discrete:
                actions = jax.random.randint(key_action, shape, 0, env.action_size)
            else:
                actions = jax.random.uniform(key_action, (*shape, env.action_size), minval=-1.0)

            def step(carry, x):
                obs, env_state = carry
                action, key_act, key_step = x
                if acting:
                    action = algo.act(policy, obs, key_act, False)
                next_obs, env_state, reward, terminated, truncated, info = env.step(
                    key_step, env_state, action
                )
                seen = obs, action, reward, terminated, truncated, info["final_observation"]
                return (next_obs, env_state), seen

            xs = actions, *(jax.random.split(key, shape[0]) for key in (key_action, key_env))
            carry = state.obs, env.refresh(key_refresh, state.env_state)
            (obs, env_state), seen = jax.lax.scan(step, carry, xs)
            state = state._replace(obs=obs, env_state=env_state, key=key, update=state.update + 1)
            return state, {"seen": total(seen)}  # what nobody sees would not be computed

        return algo._replace(update=update)

    return build_rollout


def total(tree: Any) -> jax.Array:
    """Sum of all numbers of a tree."""
    leaves = [x for x in map(jnp.asarray, jax.tree.leaves(tree)) if not rundir.is_key(x)]
    return sum((jnp.sum(x, dtype=jnp.float32) for x in leaves), jnp.zeros(()))


def name_of(loss: Callable) -> str:
    """Name of a loss function, or of what it is a partial of."""
    return getattr(loss, "func", loss).__name__


def losses_of(algo: common.Algo) -> list[str]:
    """Names of the functions that an update takes gradients of."""
    names, real = [], jax.grad

    def grad(function, **options):
        names.append(name_of(function))
        return real(function, **options)

    with mock.patch.object(jax, "grad", grad):
        state = jax.eval_shape(algo.init, jax.random.key(0))
        jax.eval_shape(lambda state: algo.update(state), state)
    return list(dict.fromkeys(names))


@contextlib.contextmanager
def free_gradients(only: str = ""):
    """What is traced here has gradients and optimiser steps that cost nothing and change nothing.

    Their place is taken by a vanishing multiple of the sum of the minibatch, so that everything
    before them is computed and everything after them has the right shapes. With `only` this is so
    for the gradient of the function of that name alone, and optimisers work.
    """
    real = jax.grad

    def grad(function, has_aux=False):
        if only and name_of(function) != only:
            return real(function, has_aux=has_aux)

        def free(params, *args):
            little = 1e-30 * total(args)
            fill = lambda x: jnp.full(x.shape, little).astype(x.dtype)
            grads = jax.tree.map(fill, params)
            if has_aux:
                aux = jax.eval_shape(lambda params: function(params, *args)[1], params)
                return grads, jax.tree.map(fill, aux)
            return grads

        return free

    def idle(transformation):
        return lambda *args, **options: optax.GradientTransformation(
            transformation(*args, **options).init,
            lambda updates, state, params=None: (updates, state),
        )

    with contextlib.ExitStack() as stack:
        patch = lambda *args, **options: stack.enter_context(mock.patch.object(*args, **options))
        patch(jax, "grad", grad)
        if not only:
            patch(optax, "scale_by_adam", idle(optax.scale_by_adam))
            patch(optax, "scale_by_rms", idle(optax.scale_by_rms))
            patch(optax, "clip_by_global_norm", return_value=optax.identity())
        yield


class Case:
    """The compiled launch of one algorithm, as the launcher makes it, with its seconds."""

    def __init__(self, algo: str, env: str, presets: list[str], num_seeds: int, **changes):
        module = importlib.import_module(f"algos.{algo}")
        flags = ["--env", env, "--num-seeds", str(num_seeds)]
        flags += ["--preset", *presets] if presets else []
        config, self.launch = launch.parse(algo, module.Config, module.PRESETS, flags)
        self.config = replace(config, **changes)
        self.middle = self.config.num_updates // 2
        self.build = module.build
        self.rows = launch.make_rows(self.launch, self.config, module.TRACEABLE)
        launch.setup_jax(num_seeds)
        start = time.perf_counter()
        program = launch.make_program(self.config, self.launch, self.build, self.rows)
        traced = launch.trace(program, self.rows)
        middle = time.perf_counter()
        self.program, self.state = launch.compile_ahead(traced, self.rows)
        self.seconds = {"trace": middle - start, "compile": time.perf_counter() - middle}

    @property
    def steps(self) -> int:
        """Environment steps of one update of all seeds."""
        return self.config.steps_per_update * len(self.rows.seeds)

    @property
    def devices(self) -> int:
        """Devices that share the seeds."""
        return len(launch.row_devices(len(self.rows.seeds)))

    def variant(self, build: Callable) -> Callable:
        """`train(state, number of updates)` of another build, compiled."""
        program = launch.make_program(self.config, self.launch, build, self.rows)
        _, hparams = launch.row_inputs(self.rows)
        compiled = program.train.lower(self.state, hparams, jnp.int32(1)).compile()
        return lambda state, num_updates: compiled(state, hparams, jnp.int32(num_updates))

    def timed(self, train: Callable, num_updates: int) -> float:
        """Seconds of one call of `train` in the middle of the run, past every warm-up."""
        state = self.state._replace(update=0 * self.state.update + self.middle)
        jax.block_until_ready(state)
        start = time.perf_counter()
        self.state, metrics = train(state, num_updates)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def measure(algo: str, env: str, presets: list[str], num_seeds: int, budget: float):
    """Time one case for about `budget` seconds, at least one call of each variant."""
    case = Case(algo, env, presets, num_seeds)
    variants = {
        "environment": case.variant(rollout_alone(case.build, acting=False)),
        "acting": case.variant(rollout_alone(case.build, acting=True)),
        "full": case.program.train,
    }
    with free_gradients():
        variants["no gradient"] = case.variant(case.build)
    losses = losses_of(case.build(case.config))
    for name in losses if len(losses) > 1 else ():
        with free_gradients(only=name):
            variants[f"no {name}"] = case.variant(case.build)
    samples: dict[str, list] = {name: [] for name in variants}
    lengths = dict.fromkeys(variants, 1)
    longest = case.config.num_updates - case.middle
    start = time.perf_counter()
    while not all(samples.values()) or (
        len(samples["full"]) < ROUNDS and time.perf_counter() - start < budget
    ):
        for name, train in variants.items():
            seconds = case.timed(train, lengths[name])
            if seconds > CALL_SECONDS / 4 or lengths[name] == longest:
                samples[name].append(seconds / lengths[name])
            else:  # too short to say anything
                wanted = int(lengths[name] * min(CALL_SECONDS / seconds, 100)) + 1
                lengths[name] = min(wanted, longest)
    start = time.perf_counter()
    _, eval_lengths, _ = jax.block_until_ready(case.program.evaluate(case.state, jax.random.key(0)))
    seconds = case.seconds | {"evaluation": time.perf_counter() - start}
    config = case.config
    return {
        "num_envs": config.num_envs,
        "num_steps": config.num_steps,
        "device": jax.devices()[0].device_kind,
        "devices": case.devices,
        "seconds": seconds,
        "evaluation": {
            "episodes": eval_lengths.size,
            "longest": int(eval_lengths.max()),
        },
        "steps_per_update": case.steps,
        "seconds_per_update": samples,
        **derived(samples, case.steps),
    }


def derived(samples: dict[str, list], steps: int) -> dict[str, Any]:
    """Rates and shares from the seconds per update of each variant, by their medians."""
    seconds = {name: statistics.median(x) for name, x in samples.items()}
    full = seconds["full"]
    parts = {
        "environment": seconds["environment"],
        "acting": seconds["acting"] - seconds["environment"],
        "gradient": full - seconds["no gradient"],
        "rest": seconds["no gradient"] - seconds["acting"],
    }
    losses = [name for name in samples if name.startswith("no ") and name != "no gradient"]
    return {
        "rates": {"environment": steps / seconds["environment"], "training": steps / full},
        "shares": {name: parts[name] / full for name in PARTS},
        "losses": {name[3:]: (full - seconds[name]) / full for name in losses},
    }


def serve(num_seeds: int, num_updates: int, **sizes) -> None:
    """Tell the compile seconds, then train `num_updates` for each line of standard input."""
    sizes["hidden"] = tuple(sizes["hidden"])
    case = Case("ppo", "cartpole", [], num_seeds, **sizes)
    compiled = sum(case.seconds.values())
    description = {"compile": compiled, "devices": case.devices, "versions": logs.versions()}
    print(json.dumps(description), flush=True)
    for _ in sys.stdin:
        cpu = time.process_time()
        seconds = case.timed(case.program.train, num_updates)
        cpu_seconds = time.process_time() - cpu
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)


# --- all cases ---


def in_own_process(case: dict[str, Any], limit: float) -> dict[str, Any]:
    """Measure one case in a process that may fail or hang without harm to the others."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_TRACEBACK_FILTERING": "off",  # the last line of an error is then its message
        }
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return case | {"error": f"nothing after {limit:.0f} s"}
    if done.returncode:
        return case | {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return case | json.loads(done.stdout.splitlines()[-1])


def markdown(cases: list[dict[str, Any]]) -> str:
    """One row per case."""
    head = ["algorithm", "environment", "seeds x envs x steps", "devices"]
    head += ["environment alone, steps/s", "training, steps/s", *PARTS]
    head += ["trace + compile, s", "one evaluation, s"]
    rows = []
    for case in cases:
        task = " ".join([case["env"], *case["presets"]])
        cells = [case["algo"], task, str(case["num_seeds"])]
        if "error" in case:
            cells.append(case["error"])
        else:
            seconds = case["seconds"]
            cells[-1] += f" x {case['num_envs']} x {case['num_steps']}"
            cells.append(f"{case['devices']} x {case['device']}")
            cells += [f"{case['rates'][name]:,.0f}" for name in ("environment", "training")]
            shares = {part: f"{case['shares'][part]:.0%}" for part in PARTS}
            losses = [f"{name} {share:.0%}" for name, share in case["losses"].items()]
            shares["gradient"] += f" ({', '.join(losses)})" if losses else ""
            cells += shares.values()
            cells.append(f"{seconds['trace']:.0f} + {seconds['compile']:.0f}")
            cells.append(f"{seconds['evaluation']:.1f}")
        rows.append(cells + [""] * (len(head) - len(cells)))
    return compare.table(head, rows)


# --- against another library ---

# What both libraries are given: our preset of the task, and rejax's defaults.
SIZES = {
    "ours": {
        "num_envs": 32,
        "num_steps": 32,
        "num_epochs": 4,
        "num_minibatches": 4,
        "learning_rate": 2.5e-3,
    },
    "rejax": {
        "num_envs": 64,
        "num_steps": 64,
        "num_epochs": 8,
        "num_minibatches": 16,
        "learning_rate": 3e-4,
    },
}
NETWORK = {"hidden": (64, 64), "activation": "tanh"}
UPDATES = {"ours": 160, "rejax": 20}  # of one call, over the number of seeds


class Contestant:
    """A process that trains once each time it is asked to."""

    def __init__(self, command: list[str], limit: float, one_device: bool = False):
        self.cache = tempfile.TemporaryDirectory()
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": self.cache.name}
        if one_device:
            flags = environment.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=1"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.timer = threading.Timer(limit, self.process.kill)
        self.timer.start()
        self.description = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; RuntimeError if the process has ended."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{' '.join(self.process.args[:2])} ended or took too long")

    def train(self) -> dict[str, Any]:
        """Train once; seconds and CPU seconds."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.timer.cancel()
        self.process.kill()
        self.process.communicate()
        self.cache.cleanup()


def against(peer_python: str, sizes: str, num_seeds: int, rounds: int, limit: float):
    """Time PPO on CartPole of this project and of rejax in turn, `rounds` times."""
    given = {"num_seeds": num_seeds, "num_updates": -(-UPDATES[sizes] // num_seeds)}
    given |= SIZES[sizes] | NETWORK
    mine = [sys.executable, __file__, "--serve", json.dumps(given)]
    theirs = [peer_python, str(Path(__file__).with_name("peer_rejax.py")), json.dumps(given)]
    contestants: dict[str, Contestant] = {}
    try:
        contestants["ours"] = Contestant(mine, limit)
        contestants["ours, one device"] = Contestant(mine, limit, one_device=True)
        contestants["rejax"] = Contestant(theirs, limit)
        answers: dict[str, list] = {name: [] for name in contestants}
        for i in range(rounds + 1):
            for name, contestant in contestants.items():
                answer = contestant.train()
                if i:  # the first call warms up
                    answers[name].append(answer)
    finally:
        for contestant in contestants.values():
            contestant.close()
    steps = num_seeds * given["num_updates"] * given["num_envs"] * given["num_steps"]
    rates = {name: [steps / x["seconds"] for x in answers[name]] for name in answers}
    cpu = {name: [1e6 * x["cpu_seconds"] / steps for x in answers[name]] for name in answers}
    return {
        "sizes": sizes,
        **given,
        "steps_per_call": steps,
        "processes": {name: x.description for name, x in contestants.items()},
        "rates": rates,
        "cpu_microseconds_per_step": cpu,
        "ratios": {name: ratios(rates[name], rates["rejax"]) for name in list(rates)[:2]},
    }


def ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Smallest, median and largest ratio of calls that followed each other."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"min": min(each), "median": statistics.median(each), "max": max(each)}


def peer_markdown(cases: list[dict[str, Any]]) -> str:
    """One row per case."""
    head = ["sizes of", "seeds", "envs x steps", "epochs x minibatches", "PurePO, steps/s"]
    head += ["one device", "rejax", "ratio [min, max]", "one device", "compile, s", "rejax"]
    rows = []
    for case in cases:
        cells = [case["sizes"], str(case["num_seeds"])]
        cells.append(f"{case['num_envs']} x {case['num_steps']}")
        cells.append(f"{case['num_epochs']} x {case['num_minibatches']}")
        cells += [f"{statistics.median(x):,.0f}" for x in case["rates"].values()]
        for ratio in case["ratios"].values():
            cells.append(f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]")
        cells += [f"{case['processes'][name]['compile']:.0f}" for name in ("ours", "rejax")]
        rows.append(cells)
    return compare.table(head, rows)


# --- command line ---


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; one line and exit status 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--envs", nargs="+", default=ENVS, help="tasks")
    parser.add_argument("--algos", nargs="+", default=("ppo", "bpo"), help="algorithms")
    parser.add_argument("--presets", nargs="+", default=[], help="on top of the task's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 16), help="numbers of seeds")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to time one case")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds to wait for one case")
    parser.add_argument("--peer", choices=["rejax"], help="compare with this library instead")
    parser.add_argument("--peer-python", help="Python that has rejax 0.1.3 and gymnax 0.0.9")
    parser.add_argument("--rounds", type=int, default=21, help="calls of each side of --peer")
    parser.add_argument("--out", default="", help="JSON to write")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.seeds) < 1 or args.rounds < 1:
        parser.error("--seeds and --rounds must be at least 1")
    if bool(args.peer) != bool(args.peer_python):
        parser.error("--peer and --peer-python go together")
    for algo in args.algos:
        if not hasattr(importlib.import_module(f"algos.{algo}"), "PRESETS"):
            parser.error(f"algos/{algo}.py is not an algorithm")
    for env in args.envs:
        try:
            envs.canonical(env)
        except ValueError as error:
            parser.error(str(error))
    return args


def cases(args: argparse.Namespace):
    """Measure one case after the other."""
    if args.peer:
        for sizes, num_seeds in itertools.product(SIZES, args.seeds):
            print(f"PPO of {args.peer}, sizes of {sizes}, {num_seeds} seeds", file=sys.stderr)
            yield against(args.peer_python, sizes, num_seeds, args.rounds, args.limit)
        return
    for algo, env, num_seeds in itertools.product(args.algos, args.envs, args.seeds):
        print(f"{algo} on {env}, {num_seeds} seeds", file=sys.stderr)
        case = {"algo": algo, "env": env, "presets": args.presets}
        case |= {"num_seeds": num_seeds, "budget": args.budget}
        yield in_own_process(case, args.limit)


def main():
    """Measure from the command line."""
    args = parse()
    if args.case:
        print(json.dumps(measure(**args.case)))
        return
    if args.serve:
        serve(**args.serve)
        return
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": logs.commit(),
        "versions": logs.versions(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),  # of the last 1, 5 and 15 minutes, before the first case
        "cases": [],
    }
    for case in cases(args):
        report["cases"].append(case)
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            rundir.write_json(Path(args.out), report)
    print((peer_markdown if args.peer else markdown)(report["cases"]), end="")


if __name__ == "__main__":
    main()

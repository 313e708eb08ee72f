"""Speed: start-up, compilation, environments, training and evaluation, each timed apart.

    python experiments/benchmark.py --out runs/benchmark.json
    python experiments/benchmark.py --envs cartpole hopper --algos ppo --seeds 1 16
    python experiments/benchmark.py --peer sbx --peer-python SBX_PYTHON --seeds 1 8

Each case runs in processes of its own, with a time limit. The first one starts with an empty
compilation cache (cold), the second one with the cache that the first one left (warm). Both say how
many seconds passed from the command to the end of the first update; the second one goes on and
times, in turn, the environments under random actions and the whole update. The update counter is
that of the middle of a run, so schedules and the number of gradient steps are those of a run, but
networks are untrained and most of a replay buffer is zeros. Rates are environment steps per second
of all seeds together.

With --peer, PPO or the environments are timed beside another library instead, which has a Python of
its own: the two work in turn, at the same sizes (`experiments/peers.py`).
"""

import argparse
import functools
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
from experiments import peers

CALL_SECONDS = 1.0  # of one timed call, or one update where that takes longer
ROUNDS = 5  # timed calls of the environments and of training, at least
UPDATES = 50  # timed updates, at least; those of P3O differ in their work

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
        self.program = programs.compile_ahead(traced)
        self.seconds = {"trace": middle - start, "compile": time.perf_counter() - middle}
        self.keys, self.hparams = inputs(self.rows)
        self.update = self.config.num_updates // 2  # of the next call of `train`
        self.state = self.program.init(self.keys, self.hparams)

    @property
    def steps(self) -> int:
        """Environment steps of one update of all seeds."""
        return self.config.steps_per_update * len(self.rows.seeds)

    def train(self, num_updates: int) -> None:
        """Run `num_updates` updates; the counter cycles through the second half of the run."""
        if self.update + num_updates > self.config.num_updates:
            self.update = self.config.num_updates // 2
        state = self.state._replace(update=0 * self.state.update + self.update)
        self.state, sums = self.program.train(state, self.hparams, jnp.int32(num_updates))
        jax.block_until_ready(sums)
        self.update += num_updates

    def play(self, num_updates: int) -> None:
        """Step the environments as often as that many updates do, with random actions."""
        jax.block_until_ready(self.random_play(self.keys, jnp.int32(num_updates)))

    @functools.cached_property
    def random_play(self):
        """Keys [R], number of updates -> sums [R] of what random actions gave; compiled."""
        env, config = self.env, self.config
        shape = config.num_steps, config.num_envs

        def steps(key, num_updates):
            key, key_reset = jax.random.split(key)
            _, state = env.reset(key_reset)

            def step(carry, x):
                (state, total), (key, action) = carry, x
                obs, state, reward, *_ = env.step(key, state, action)
                # something has to be made of all results, or they are not computed
                return (state, total + reward.sum() + obs.sum()), None

            def rollout(i, carry):
                # keys and actions of a rollout are drawn at once
                key_act, key_step = jax.random.split(jax.random.fold_in(key, i))
                if env.discrete:
                    actions = jax.random.randint(key_act, shape, 0, env.action_size)
                else:
                    actions = jax.random.uniform(key_act, (*shape, env.action_size), minval=-1.0)
                keys = jax.random.split(key_step, config.num_steps)
                return jax.lax.scan(step, carry, (keys, actions))[0]

            return jax.lax.fori_loop(0, num_updates, rollout, (state, jnp.zeros(())))[1]

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
    enough = lambda name: len(samples[name]) >= max(ROUNDS, UPDATES / updates[name])
    functions = {"environment": lab.play, "training": lab.train}
    longest = max(1, lab.config.num_updates // 2)
    lab.play(1)
    start = time.perf_counter()
    while not all(map(enough, samples)) and time.perf_counter() - start < budget:
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


# --- beside other libraries ---


def serve(work: str, env: str, num_seeds: int, num_updates: int, changes: dict[str, Any]) -> None:
    """The side of this project for `peers`: PPO trains, or plays, for every line of stdin."""
    changes = {k: tuple(x) if isinstance(x, list) else x for k, x in changes.items()}
    case = Case("ppo", env, [], num_seeds, **changes)
    print(json.dumps({"seconds": case.seconds, "versions": logs.versions()}), flush=True)
    for _ in sys.stdin:
        seconds = seconds_of(getattr(case, work), num_updates)
        print(json.dumps({"seconds": seconds, "steps": num_updates * case.steps}), flush=True)


# --- command line ---


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; one line and exit status 2 for what cannot be measured."""
    parser = cli.Parser(__doc__)
    tasks = "cartpole", "hopper", "ant"
    parser.add_argument("--envs", nargs="+", default=tasks, help="tasks")
    parser.add_argument("--algos", nargs="+", default=("ppo", "bpo"), help="online algorithms")
    parser.add_argument("--presets", nargs="+", default=[], help="on top of the task's own")
    parser.add_argument(
        "--seeds", nargs="+", type=cli.integer, default=(1, 16), help="numbers of seeds"
    )
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to time a case")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds to wait for a case")
    parser.add_argument("--peer", choices=peers.PEERS, help="library to compare with")
    parser.add_argument("--peer-python", help="Python that has it")
    parser.add_argument(
        "--rounds", type=cli.integer, default=11, help="calls of each side of a comparison"
    )
    parser.add_argument("--out", type=cli.path, help="JSON to write")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case or args.serve:  # a process of its own: nothing is imported that it does not need
        return args
    if min(args.seeds) < 1 or args.rounds < 1:
        parser.error("--seeds and --rounds must be at least 1")
    if not min(args.budget, args.limit) > 0:
        parser.error("--budget and --limit must be above 0")
    if (args.peer is None) != (args.peer_python is None):
        parser.error("--peer and --peer-python go together")
    for name in ("envs", "algos", "presets", "budget"):
        if args.peer and getattr(args, name) != parser.get_default(name):
            parser.error(f"--peer has tasks, settings and times of its own: leave out --{name}")
    for algo in args.algos:
        if algo not in cli.ALGOS:
            parser.error(f"--algos {algo}: {cli.nearest(algo, cli.ALGOS)}")
        module = importlib.import_module(f"algos.{algo}")
        if not hasattr(module.Config, "num_envs"):
            parser.error(f"--algos {algo}: it is offline, and only online algorithms are timed")
        for preset in args.presets:
            if preset not in module.PRESETS:
                parser.error(f"--presets {preset}: {cli.nearest(preset, module.PRESETS)}")
    try:
        rundir.check_new([args.out], args.force)
        for env in args.envs:
            envs.canonical(env)
    except ValueError as error:
        parser.error(str(error))
    return args


def cases(args: argparse.Namespace):
    """Measure one case after the other."""
    if args.peer:
        for contest in peers.PEERS[args.peer](args.seeds):
            print(f"{contest.label}, {contest.num_seeds} seeds", file=sys.stderr)
            try:
                yield peers.hold(args.peer, args.peer_python, contest, args.rounds, args.limit)
            except (RuntimeError, OSError) as error:
                yield contest._asdict() | {"error": str(error)}
        return
    for algo, env, num_seeds in itertools.product(args.algos, args.envs, args.seeds):
        print(f"{algo} on {env}, {num_seeds} seeds", file=sys.stderr)
        case = {"algo": algo, "env": env, "presets": args.presets, "num_seeds": num_seeds}
        yield in_own_process(case, args.budget, args.limit)


@logs.steady()
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
            rundir.write_json(args.out, measured)
    found = measured["cases"]
    print(peers.markdown(args.peer, found) if args.peer else markdown(found), end="")


if __name__ == "__main__":
    main()

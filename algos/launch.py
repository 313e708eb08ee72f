"""The host side of a run: rows, devices, the loop around the compiled program.

    keys  = key(seed + i) for i in range(num_seeds)    # seed i of a launch is the run --seed i
    state = jit(vmap(init))(keys)
    until the next evaluation: state, metrics = jit(vmap(n updates))(state)
    evaluate; log; save

Nothing here knows an algorithm, and nothing calls back to the host from inside the program.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import envs
from algos import common, logs, rundir
from algos.cli import Launch, check_bounds, parse

# --- rows: every seed of every swept value ---


class Rows(NamedTuple):
    """What distinguishes the R runs of a launch."""

    seeds: np.ndarray  # [R]
    hparams: dict[str, np.ndarray]  # field -> [R]
    labels: list[str]  # swept values of each row, or ""


def make_rows(launch: Launch, config: Any, traceable: tuple[str, ...]) -> Rows:
    """Seeds times swept values, values outermost."""
    grid = {}
    for item in launch.sweep:
        field, _, values = item.partition("=")
        common.traceable({field: None}, traceable)
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"cannot read --sweep {item!r}: write {field}=VALUE,VALUE") from None
        if field in grid or len({f"{x:g}" for x in numbers}) < len(numbers):
            raise ValueError(f"--sweep {item!r} repeats a field or a value (to 6 digits)")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"--sweep {item!r} has a value that is not finite")
        grid[field] = numbers
        for value in numbers:
            check_bounds({field: value})
            dataclasses.replace(config, **{field: value}).validate()
    if launch.num_seeds < 1 or launch.num_evals < 1 or launch.eval_episodes < 1:
        raise ValueError("--num-seeds, --num-evals and --eval-episodes must be at least 1")
    points = list(itertools.product(*grid.values()))
    repeated = np.repeat(np.array(points, np.float32).reshape(len(points), -1), launch.num_seeds, 0)
    labels = [" ".join(f"{k}={v:g}" for k, v in zip(grid, point, strict=True)) for point in points]
    return Rows(
        seeds=np.tile(np.arange(launch.seed, launch.seed + launch.num_seeds), len(points)),
        hparams={field: repeated[:, i] for i, field in enumerate(grid)},
        labels=[label for label in labels for _ in range(launch.num_seeds)],
    )


# --- devices ---


def setup_jax(num_rows: int) -> None:
    """Settings that must be made before jax starts its backends."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        try:
            count, index = (int(os.environ[f"JAX_{x}"]) for x in ("NUM_PROCESSES", "PROCESS_ID"))
        except KeyError as missing:
            raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, but not {missing}") from None
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, index)
    # One host device per core: on a CPU, seeds run faster side by side than with shared threads.
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the backend is already up, as in tests
            jax.config.update("jax_num_cpu_devices", max(1, min(num_rows, os.cpu_count() or 1)))
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "purepo"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def local_rows(rows: Rows) -> Rows:
    """The part of the rows that this host trains."""
    count, index = jax.process_count(), jax.process_index()
    if len(rows.seeds) % count:
        raise ValueError(f"{len(rows.seeds)} rows cannot be shared by {count} hosts equally")
    part = slice(index * len(rows.seeds) // count, (index + 1) * len(rows.seeds) // count)
    hparams = {k: v[part] for k, v in rows.hparams.items()}
    return Rows(rows.seeds[part], hparams, rows.labels[part])


def gather(rows: np.ndarray) -> np.ndarray:
    """Rows [R / hosts, ...] of this host -> the rows [R, ...] of all."""
    if jax.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


# --- the compiled program ---


class Program(NamedTuple):
    """Functions of all rows of this host, sharded over its devices."""

    init: Any  # keys [R], hparams -> state
    train: Any  # state (donated), hparams, number of updates, *data -> state, sums of metrics [R]
    evaluate: Any  # state, key -> returns [R, K], lengths [R, K]; returns of further policies
    policies: Any  # state -> policies [R, ...]
    data: tuple  # what an offline algorithm learns from: shared arrays, then own ones [R, ...]
    shared: int  # how many of `data` are shared


def row_devices(num_rows: int) -> list[jax.Device]:
    """As many local devices as divide the rows of this host equally."""
    devices = jax.local_devices()
    return devices[: max(d for d in range(1, len(devices) + 1) if num_rows % d == 0)]


def make_program(config: Any, launch: Launch, build: Callable, rows: Rows) -> Program:
    """Lay the rows over the local devices; nothing is compiled yet."""
    mesh = jax.sharding.Mesh(row_devices(len(rows.seeds)), "row")
    eval_env = envs.make(config.env, launch.eval_episodes, stagger=False, reset_mode="cached")
    if eval_env.stateful and len(rows.seeds) > 1:
        raise ValueError(f"{eval_env.name}: a program has one seed here, not {len(rows.seeds)}")
    if eval_env.stateful and launch.resume:
        raise ValueError(f"{eval_env.name}: its emulators are in no checkpoint: start a new run")
    algo = build(config)
    state = jax.eval_shape(algo.init, jax.random.key(0))
    # All fields of the state have a leading row axis but the counter, which the rows share.
    axes = type(state)(*[0] * len(state))._replace(update=None)
    row, shared = PartitionSpec("row"), PartitionSpec()
    data = algo.data(rows.seeds)
    data_axes = [None] * len(data[0]) + [0] * len(data[1])
    data_specs = [shared] * len(data[0]) + [row] * len(data[1])
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    data = tuple(map(place, (*data[0], *data[1]), data_specs))
    specs = type(state)(*[row] * len(state))._replace(update=shared)

    def algo_of(hparams):
        return build(dataclasses.replace(config, **hparams)) if hparams else algo

    def init(key, hparams):
        return jax.tree.map(strong, algo_of(hparams).init(key))

    def train(state, hparams, num_updates, *data):
        algo = algo_of(hparams)

        def step(_, carry):
            state, sums = carry
            state, metrics = algo.update(state, *data)
            return state, {k: reduction(k)(sums[k], metrics[k]) for k in sums}

        names = jax.eval_shape(algo.update, state, *data)[1]
        sums = {k: jnp.float32(-np.inf if reduction(k) is max_of else 0) for k in names}
        return jax.lax.fori_loop(0, num_updates, step, (state, sums))

    def evaluate(state, key):
        policy = algo.policy_of(state)
        play = lambda act: common.evaluate(act, policy, eval_env, key)
        return *play(algo.act), {name: play(act)[0] for name, act in algo.further.items()}

    def shard(function, in_specs, out_specs, **options):
        # shard_map, not a plain jit: each device loops over its own rows and waits for no other.
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        place = lambda tree: jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree)
        shardings = {"in_shardings": place(in_specs), "out_shardings": place(out_specs)}
        return jax.jit(mapped, **shardings, **options)

    return Program(
        init=shard(jax.vmap(init, out_axes=axes), (row, row), specs),
        train=shard(
            jax.vmap(train, (axes, 0, None, *data_axes), (axes, 0)),
            (specs, row, shared, *data_specs),
            (specs, row),
            donate_argnums=0,
        ),
        evaluate=shard(jax.vmap(evaluate, (axes, None)), (specs, shared), (row, row, row)),
        policies=shard(jax.vmap(algo.policy_of, (axes,)), (specs,), row),
        data=data,
        shared=data_axes.count(None),
    )


def row_inputs(rows: Rows) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Keys [R] and swept values [R] of the rows."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(rows.seeds, jnp.uint32))
    return keys, {k: jnp.asarray(v) for k, v in rows.hparams.items()}


def evaluation_key() -> jax.Array:
    """The key of every evaluation, which is no seed's own."""
    return jax.random.fold_in(jax.random.key(0), 2**31)


def strong(x: jax.Array) -> jax.Array:
    """`x` without a weak type, so that an update returns the types it was given."""
    return x if rundir.is_key(x) else jax.lax.convert_element_type(x, x.dtype)


def reduction(name: str) -> Callable:
    """How a metric is reduced over updates: the largest of `.../max`, sums of all others."""
    return max_of if name.endswith("/max") else operator.add


def max_of(a, b):
    """Elementwise maximum of jax or numpy arrays."""
    return (jnp if isinstance(a, jax.Array) else np).maximum(a, b)


def trace(program: Program, rows: Rows) -> Program:
    """All functions traced for these rows."""
    keys, hparams = row_inputs(rows)
    state = jax.eval_shape(program.init, keys, hparams)
    return program._replace(
        init=program.init.trace(keys, hparams),
        train=program.train.trace(state, hparams, jnp.int32(1), *program.data),
        evaluate=program.evaluate.trace(state, evaluation_key()),
    )


def compile_ahead(traced: Program, rows: Rows) -> tuple[Program, Any]:
    """Compile all functions, two at a time; returns the compiled program and the first state."""
    keys, hparams = row_inputs(rows)
    lowered = [x.lower() for x in (traced.train, traced.evaluate, traced.init)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        train, evaluate, init = pool.map(lambda x: x.compile(), lowered)
    compiled = traced._replace(
        train=lambda state, num_updates: train(
            state, hparams, jnp.int32(num_updates), *traced.data
        ),
        evaluate=evaluate,
    )
    return compiled, jax.block_until_ready(init(keys, hparams))


def peak_bytes(jaxpr: Any) -> int:
    """Most bytes alive at once when the equations run in order: an estimate, fusion needs less."""
    size = lambda v: math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 8)
    variables = lambda vs: {v for v in vs if not hasattr(v, "val")}  # without literals
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in variables(eqn.invars)}
    last |= {v: len(jaxpr.eqns) for v in variables(jaxpr.outvars)}
    live = peak = sum(map(size, (*jaxpr.invars, *jaxpr.constvars)))
    for i, eqn in enumerate(jaxpr.eqns):
        inner = [getattr(p, "jaxpr", p) for p in jax.tree.leaves(list(eqn.params.values()))]
        inside = max((peak_bytes(p) for p in inner if hasattr(p, "eqns")), default=0)
        made = sum(map(size, eqn.outvars))
        peak = max(peak, live + max(made, inside))
        live += made - sum(size(v) for v in variables(eqn.invars) if last[v] == i)
        live -= sum(size(v) for v in eqn.outvars if v not in last)
    return peak


def replay_bytes(state: Any) -> int:
    """Bytes that each row of a train state [R, ...] keeps in its replay, 0 if it has none."""
    replay = jax.tree.leaves(getattr(state, "replay", None))
    return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in replay)


def data_bytes(program: Program, state: Any) -> tuple[int, int]:
    """Bytes of the data that rows share, and of each row's own: its data and state [R, ...]."""
    own = jax.tree.leaves((program.data[program.shared :], state))
    shared = sum(x.nbytes for x in jax.tree.leaves(program.data[: program.shared]))
    return shared, sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in own)


# --- the run ---

# Steps per second and CPU core of training PPO with 16 seeds (docs/benchmark.md), for the first
# estimate; an algorithm with more gradient steps takes longer.
CPU_STEPS_PER_SECOND = {"brax/ant": 6300, "brax/halfcheetah": 7100, "brax/hopper": 11400}
SLICE_SECONDS = 1.0  # device time between two looks at ctrl-C and the progress bar


def main(
    name: str,
    config_type: type,
    presets: dict[str, dict],
    traceable: tuple[str, ...],
    build: Callable,
    argv: list[str] | None = None,
) -> None:
    """Train from the command line; bad input is one line on stderr and exit status 2.

    With --verbose 2 an error keeps its traceback, for whoever is changing an algorithm.
    """
    launch = None
    logs.tell_warnings_once()
    try:
        config, launch = parse(name, config_type, presets, argv)
        rows = make_rows(launch, config, traceable)
        config.validate()
        setup_jax(len(rows.seeds))
        session = Session(name, config, launch, rows, build)
    except (ValueError, OSError, ImportError) as error:
        if launch and launch.verbose == 2:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    session.run()


class Session:
    """One launch from its run directory to its last line."""

    def __init__(self, name: str, config: Any, launch: Launch, rows: Rows, build: Callable):
        self.name, self.config, self.launch, self.rows = name, config, launch, rows
        self.lead = jax.process_index() == 0  # the host that writes and speaks
        self.update = 0
        self.seconds = {"compile": 0.0, "train": 0.0, "eval": 0.0}
        self.evals: dict[str, list] = {}  # as `rundir.write_evals` takes them
        self.speed = 0.0  # steps per second of all rows, in the last interval
        self.dead = np.zeros(len(rows.seeds), bool)
        self.restored = None
        self.stop = False
        self.started = time.time()
        self.run_dir = Path(launch.run_dir or self.default_run_dir())
        if self.lead and not launch.resume and (self.run_dir / "config.json").exists():
            raise ValueError(
                f"{self.run_dir} already holds a run: --resume it or choose another --run-dir"
            )
        mine = local_rows(rows)
        self.devices = row_devices(len(mine.seeds))
        if self.lead and launch.verbose:
            print(self.plan(), file=sys.stderr)
        self.program = make_program(config, launch, build, mine)
        self.digests = [rundir.digest(x) for x in self.program.data]
        if launch.resume:
            if self.lead:  # who wrote down what its rows learn from
                rundir.check_data(self.run_dir, self.digests)
            self.restore()
        if self.lead:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if not launch.resume:
                (self.run_dir / "config.json").touch(exist_ok=False)  # it is ours from here on
            self.write_description()
        step = self.update * config.steps_per_update
        self.log = logs.Log(self.run_dir, name, config, launch, rows, self.lead, step)

    def default_run_dir(self) -> str:
        """`runs/<env>/<algo>/<time>_s<seed>x<seeds>_<hash>`."""
        settings = dataclasses.asdict(self.config) | dataclasses.asdict(self.launch)
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        env = re.sub("[^A-Za-z0-9_.]+", "-", envs.canonical(self.config.env))
        seeds = f"s{self.launch.seed}x{self.launch.num_seeds}"
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return f"runs/{env}/{self.name}/{stamp}_{seeds}_{digest[:6]}"

    def write_description(self) -> None:
        """config.json, from which the launch can be run again, and meta.json with its history."""
        description = {
            "algo": self.name,
            "config": dataclasses.asdict(self.config),
            "launch": dataclasses.asdict(dataclasses.replace(self.launch, resume="", run_dir="")),
            "rows": {"seeds": self.rows.seeds.tolist(), "labels": self.rows.labels},
        }
        rundir.write_json(self.run_dir / "config.json", description)
        meta = logs.surroundings() | {"data": self.digests}
        meta["num_devices"] = len(self.devices) * jax.process_count()
        path = self.run_dir / "meta.json"
        if self.launch.resume and path.exists():
            first = json.loads(path.read_text())
            meta = first | {"resumed": [*first.get("resumed", []), meta]}
        rundir.write_json(path, meta)

    # the steps of a run

    def run(self) -> None:
        """Compile, train, evaluate, save; exit status 130 if interrupted, 3 if every seed died."""
        handlers = {x: signal.signal(x, self.on_signal) for x in (signal.SIGINT, signal.SIGTERM)}
        start, rows = time.time(), local_rows(self.rows)
        with self.log.waiting("tracing"):
            traced = trace(self.program, rows)
        mebibytes = peak_bytes(traced.train.jaxpr.jaxpr) / 2**20
        replay = replay_bytes(traced.init.out_info) / 2**20
        kept = f", {replay:,.1f} MiB of replay for each row" if replay else ""
        if traced.data:
            shared, own = (x / 2**20 for x in data_bytes(traced, traced.init.out_info))
            kept = f", {shared:,.1f} MiB of it a dataset, {own:,.1f} MiB what is each row's own"
        self.log.say(f"memory: at most about {mebibytes:,.0f} MiB on each device{kept}")
        with self.log.waiting("compiling"):
            self.program, state = compile_ahead(traced, rows)
        self.seconds["compile"] += time.time() - start
        if self.restored is not None:
            state = self.place(self.restored, state)
            self.restored = None
        steps_per_update = self.config.steps_per_update
        total = self.config.num_updates * steps_per_update * len(self.rows.seeds)
        stopped = False  # what the hosts agree on; a signal that comes later is too late
        with self.log.progress(total, self.update * steps_per_update * len(self.rows.seeds)):
            for i, point in self.eval_points():
                state = self.train_until(point, state)
                stopped = bool(gather(np.array([self.stop])).any())
                if stopped:
                    break
                self.evaluate(state)
                self.export(state, self.partial_rows(), "partial")
                every = self.launch.checkpoint_every
                last = point == self.config.num_updates
                if last or (every and i % every == 0 and i > 0):
                    self.save(state)
                if self.dead.all():
                    break
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if stopped:
            self.save(state)
            self.log.say(f"stopped and saved; go on with --resume {self.run_dir}", 0)
        else:
            self.finish(state)
        self.log.close()
        if stopped or self.dead.all():
            raise SystemExit(130 if stopped else 3)

    def eval_points(self):
        """Evaluations still to come: (number, finished updates)."""
        count, num_updates = self.launch.num_evals, self.config.num_updates
        points = {round(i * num_updates / count): i for i in range(count + 1)}
        done = self.evals["steps"][-1] if self.evals else -1
        return [(i, p) for p, i in points.items() if p * self.config.steps_per_update > done]

    def train_until(self, point: int, state: Any) -> Any:
        """Train in slices of about SLICE_SECONDS until `point` updates are done, then log."""
        totals, first, start = None, self.update, self.seconds["train"]
        length = 1
        # Hosts must stay in step, so several of them stop only where they meet: at evaluations.
        while self.update < point and not (self.stop and jax.process_count() == 1):
            length = min(length, point - self.update)
            clock = time.time()
            state, sums = self.program.train(state, length)
            sums = {k: np.asarray(v, np.float64) for k, v in sums.items()}
            clock = time.time() - clock
            totals = {k: reduction(k)(totals[k], sums[k]) for k in sums} if totals else sums
            self.update += length
            self.seconds["train"] += clock
            self.log.advance(length * self.config.steps_per_update * len(self.rows.seeds))
            length = max(1, int(length * SLICE_SECONDS / max(clock, 1e-6)))
        if totals:
            self.log_training(totals, self.update - first, self.seconds["train"] - start)
        return state

    def log_training(self, totals: dict, num_updates: int, seconds: float) -> None:
        """Turn sums over updates into means, and name the seeds that died."""
        totals = {k: gather(v) for k, v in totals.items()}
        died = (totals["health/finite"] < num_updates) & ~self.dead
        for i in np.flatnonzero(died):
            row = f"seed {self.rows.seeds[i]} {self.rows.labels[i]}".strip()
            self.log.say(f"{row} is dead: parameters or loss not finite; left out", 0)
        self.dead |= died
        # A group with a count is averaged over what was counted, such as the episodes that ended.
        counts = {k.split("/")[0]: totals.pop(k) for k in [*totals] if k.endswith("/count")}
        values = {}
        for k, total in totals.items():
            if k != "health/env_nan" and not k.endswith("/max"):
                count = counts.get(k.split("/")[0], num_updates)
                total = total / np.where(count > 0, count, np.nan)
            values[k.replace("episodes/", "charts/episodic_")] = total
        values = {k: np.where(self.dead, np.nan, v) for k, v in values.items()}
        values["health/finite"] = (~self.dead).astype(float)
        values["health/seeds_alive"] = float((~self.dead).sum())
        steps = num_updates * self.config.steps_per_update * len(self.rows.seeds)
        values["charts/SPS"] = self.speed = steps / seconds
        self.write(values)

    def evaluate(self, state: Any) -> None:
        """Greedy evaluation of every row, to the log, eval.npz and the console."""
        clock = time.time()
        alive = lambda x: np.where(self.dead[:, None], np.nan, gather(np.asarray(x)))
        evaluated = jax.tree.map(alive, self.program.evaluate(state, evaluation_key()))
        returns, lengths, others = evaluated
        self.seconds["eval"] += time.time() - clock
        step = self.update * self.config.steps_per_update
        entry = {"steps": step, "seconds": self.seconds["train"]}
        entry |= {"returns": returns, "lengths": lengths}
        entry |= {f"{name}_returns": x for name, x in others.items()}
        for key, value in entry.items():
            self.evals.setdefault(key, []).append(value)
        self.write(
            {"eval/episodic_return": returns.mean(1), "eval/episodic_length": lengths.mean(1)}
            | {f"eval/{name}_return": x.mean(1) for name, x in others.items()}
        )
        if self.lead:
            rundir.write_evals(self.run_dir, self.evals)
        spent = self.seconds["train"] + self.seconds["eval"]
        left = spent * (self.config.num_updates / self.update - 1) if self.update else None
        clocks = time.time() - self.started, left
        self.log.evaluation(step, returns.mean(1), lengths.mean(1), self.dead, self.speed, *clocks)

    def write(self, values: dict[str, Any]) -> None:
        """Log `values` with the times so far."""
        times = {f"time/{k}": v for k, v in self.seconds.items()}
        times["time/wall"] = time.time() - self.started
        self.log.write(self.update * self.config.steps_per_update, values | times)

    def save(self, state: Any) -> None:
        """Write a checkpoint of all rows of all hosts."""
        arrays = {k: np.asarray(v) for k, v in rundir.flatten(state).items()}
        arrays = {k: v if k == ".update" else gather(v) for k, v in arrays.items()}
        meta = {"update": self.update, "seconds": self.seconds, "dead": self.dead.tolist()}
        if self.lead:
            rundir.save_checkpoint(self.run_dir, arrays, meta)

    def restore(self) -> None:
        """Read the last checkpoint and forget what was logged after it."""
        saved = rundir.checkpoints(self.run_dir)
        done = self.run_dir / "done.json"
        if not saved:
            if done.exists():
                raise ValueError(f"{self.run_dir} has no checkpoint to resume from")
            self.evals = rundir.rewind(self.run_dir, -1, write=self.lead)  # from the start again
            return
        template = jax.eval_shape(self.program.init, *row_inputs(self.rows))
        self.restored, meta = rundir.load_tree(saved[-1], template)
        self.update, self.seconds = meta["update"], meta["seconds"]
        self.dead = np.array(meta["dead"])
        # Without done.json it was stopped between its last update and its end, which is to come.
        if self.update >= self.config.num_updates and done.exists():
            raise ValueError(
                f"{self.run_dir} is complete ({self.update} updates): "
                "raise --total-timesteps to train on"
            )
        if self.lead:
            done.unlink(missing_ok=True)  # it speaks of a shorter run
        step = self.update * self.config.steps_per_update
        self.evals = rundir.rewind(self.run_dir, step, write=self.lead)

    def place(self, tree: Any, like: Any) -> Any:
        """Put this host's rows of `tree` where those of `like` lie."""
        count, index = jax.process_count(), jax.process_index()

        def put(x, y):
            if x.ndim:
                part = len(x) // count
                x = x[index * part : (index + 1) * part]
            return jax.device_put(x, y.sharding)

        return jax.tree.map(put, tree, like)

    def partial_rows(self) -> Any:
        """Rows whose last two evaluations are the first two in a row to reach --stop-at-return."""
        target = self.launch.stop_at_return
        if target is None or len(self.evals["returns"]) < 2:
            return []
        reached = np.stack(self.evals["returns"]).mean(-1) >= target  # [E, R], never if dead
        twice = reached[1:] & reached[:-1]
        return np.flatnonzero(twice[-1] & ~twice[:-1].any(0))

    def export(self, state: Any, rows: Any, prefix: str) -> None:
        """Write the policies of some rows as PREFIX_sNNN.npz."""
        if not len(rows):
            return
        policies = rundir.flatten(self.program.policies(state))
        policies = {k: gather(np.asarray(v)) for k, v in policies.items()}
        step = self.update * self.config.steps_per_update
        for i in rows if self.lead else []:
            row = {k: v[i] for k, v in policies.items()}
            meta = {"seed": int(self.rows.seeds[i]), "label": self.rows.labels[i], "step": step}
            meta["return"] = logs.jsonable(self.evals["returns"][-1][i].mean())
            rundir.save_arrays(self.run_dir / f"{prefix}_s{i:03d}.npz", row, meta)
            if prefix == "partial":
                self.log.say(f"seed {self.rows.seeds[i]} reached the return: {prefix}_s{i:03d}.npz")

    def finish(self, state: Any) -> None:
        """Export the policies, draw the curve, write done.json last."""
        self.export(state, range(len(self.rows.seeds)), "policy")
        if not self.lead:
            return
        run = rundir.read_run(self.run_dir)
        rundir.plot_curves(
            [(label or self.name, run, index) for label, index in rundir.groups(run)],
            self.run_dir / "plots" / "curve.png",
            f"{self.name} on {self.config.env}",
        )
        done: dict[str, Any] = {
            "steps": int(run.steps[-1]),
            "alive": int((~self.dead).sum()),
            "results": [],
        }
        for label, index in rundir.groups(run):
            numbers = rundir.final(run.returns[index])
            others = {name: rundir.final(x[index]) for name, x in run.further.items()}
            result = numbers | ({"further": others} if others else {})
            result = {"label": label, "n": len(index)} | jax.tree.map(logs.jsonable, result)
            done["results"].append(result)
            lo, hi = numbers["interval"]
            self.log.say(
                f"{label or 'final greedy return'}: IQM {numbers['iqm']:.1f} [{lo:.1f}, {hi:.1f}], "
                f"n={np.isfinite(numbers['per_seed']).sum()}/{len(index)}"
            )
        done["seconds"] = self.seconds | {"wall": time.time() - self.started}
        rundir.write_json(self.run_dir / "done.json", done)
        self.log.say(
            "seconds: "
            + ", ".join(f"{k} {v:.1f}" for k, v in done["seconds"].items())
            + f"\ncurve: {self.run_dir / 'plots' / 'curve.png'}"
        )
        if self.launch.render:
            from experiments import render

            render.render_run(self.run_dir)

    def plan(self) -> str:
        """What will run, where and, for physics on a CPU, about how long."""
        config, launch, rows = self.config, self.launch, len(self.rows.seeds)
        env, actual = envs.canonical(config.env), config.num_updates * config.steps_per_update
        noun = "rows" if launch.sweep else "seeds"
        text = (
            f"{self.name} on {env}: {rows} {noun} x {actual:,} steps "
            f"({config.num_updates:,} updates of {config.steps_per_update:,}) "
            f"on {len(self.devices)} x {self.devices[0].device_kind}\n"
            f"run directory: {self.run_dir}"
        )
        rate = CPU_STEPS_PER_SECOND.get(env, 0) * (os.cpu_count() or 1)
        if rate and hasattr(config, "num_envs") and jax.default_backend() == "cpu":
            evaluation = launch.num_evals * launch.eval_episodes * 1000  # steps of a full episode
            least, most = (logs.clock(rows * x / rate) for x in (actual, actual + evaluation))
            text += (
                f"\non this CPU training takes at least about {least}, with evaluations up to "
                f"{most}: fewer seeds, --total-timesteps or --num-evals make it shorter"
            )
        return text

    def on_signal(self, number, frame) -> None:
        """First ctrl-C: stop after the slice. Second: stop at once, losing what is not saved."""
        if self.stop:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.stop = True
        self.log.say("stopping after this slice of training; ctrl-C again to stop at once", 0)

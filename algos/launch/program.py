"""The compiled program of a launch: all rows side by side, sharded over the local devices.

    state = init(keys, hparams)
    state, sums of metrics = train(state, hparams, number of updates, *data)  # donates the state
    plays = begin(keys)
    plays = play(state, plays, number of steps)                   # until all episodes have ended

Nothing here depends on the algorithm. Nothing here calls the host from inside the program, but some
environments do: those of MuJoCo's C engine and of Atari.
"""

import concurrent.futures
import contextlib
import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import envs
from algos import common
from algos.launch import evaluation, policies, rundir
from algos.launch.cli import Launch
from algos.launch.rows import Rows, inputs


class Program(NamedTuple):
    """Functions of all rows of this host: jitted, or traced, or compiled."""

    init: Any  # keys [R], hparams -> state
    train: Any  # state (donated), hparams, number of updates, *data -> state, sums of metrics [R]
    begin: Any  # keys [R] -> plays: an evaluation.Play by policy; "" is the main one
    play: Any  # state, plays (donated), number of steps -> plays
    policies: Any  # state -> policies [R, ...]; always jitted
    data: tuple  # of an offline algorithm: arrays all rows share, then arrays of each row [R, ...]
    num_shared: int  # how many of `data` are shared
    stateful: bool  # the environments are not in the state: no resume
    interface: dict  # what the policies take and give: see policies.interface_of


# --- devices ---

# Single precision, programs that are compiled before they run, and float times int is float.
SETTINGS: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_disable_jit": False,
    "jax_numpy_dtype_promotion": "standard",
}


def setup_jax(num_rows: int) -> None:
    """Settings that must be made before jax starts its backends; `num_rows` of all hosts."""
    num_hosts = 1
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None:
        try:
            names = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
            num_hosts, index = (int(os.environ[name]) for name in names)
        except KeyError as missing:
            raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, but not {missing}") from None
        except ValueError:
            found = ", ".join(f"{name}={os.environ[name]!r}" for name in names)
            raise ValueError(f"{found}: whole numbers are wanted") from None
        if ":" not in address:
            raise ValueError(f"JAX_COORDINATOR_ADDRESS={address}: write HOST:PORT")
        jax.distributed.initialize(address, num_hosts, index)
    if jax.config.jax_logging_level == "NOTSET":  # type: ignore[attr-defined]
        # XLA prints three warnings for every compilation that it finds in the cache.
        jax.config.update("jax_logging_level", "CRITICAL")
    # Several devices on a CPU: rows run faster side by side than with shared threads. Their number
    # divides the number of rows: physics gives each an equal share of the cores, and none may idle.
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the backend is already up, as in tests
            count = largest_divisor(num_rows // num_hosts, envs.cores())
            jax.config.update("jax_num_cpu_devices", count)
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        with contextlib.suppress(RuntimeError):  # no home directory: nothing is cached
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "purepo"
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    for name, wanted in SETTINGS.items():
        if jax.config.values[name] != wanted:
            raise ValueError(f"{name.upper()} is set: unset it, runs need {wanted!r}")
    jax.config.update("jax_default_prng_impl", rundir.PRNG)
    try:
        jax.devices()
    except Exception as error:  # jax raises what its backends raise, even AssertionError
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = f": {error}" if str(error) else ""
        raise ValueError(f"no device for JAX_PLATFORMS={wanted!r}{reason}") from None


def row_devices(num_rows: int) -> list[jax.Device]:
    """As many local devices as divide the rows of this host equally."""
    devices = jax.local_devices()
    return devices[: largest_divisor(num_rows, len(devices))]


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return max(d for d in range(1, limit + 1) if n % d == 0)


# --- from an algorithm to a program ---


def make_program(algorithm: ModuleType, config: Any, launch: Launch, rows: Rows) -> Program:
    """The jitted functions of an algorithm's module for these rows; nothing is compiled yet."""
    if config.num_updates >= 2**31:  # the counter of updates is an int32
        raise ValueError(
            f"total_timesteps={config.total_timesteps} makes {config.num_updates:,} updates of "
            f"{config.steps_per_update} steps: fewer than 2**31 are possible"
        )
    if config.steps_per_update >= 2**31:
        raise ValueError(
            f"an update would have {config.steps_per_update:,} steps, and fewer than 2**31 are "
            "possible: lower num_envs or num_steps"
        )
    env = algorithm.make_env(config)
    eval_env = envs.make(config.env, launch.eval_episodes, stagger=False, reset_mode="cached")
    if env.stateful and len(rows.seeds) > 1:
        raise ValueError(
            f"{env.name}: its emulators serve one row, not {len(rows.seeds)}: start each seed with "
            "--seed N --num-seeds 1, without a sweep"
        )
    if env.stateful and launch.resume:
        raise ValueError(f"{env.name}: its emulators are in no checkpoint: start a new run")
    if launch.render and (env.frame is None or env.render is None):
        raise ValueError(f"{env.name} has no drawing: leave --render out")
    algo = algorithm.build(config, env)
    state = jax.eval_shape(algo.init, jax.random.key(0))
    axes = per_row(type(state), 0, None)
    mesh = jax.sharding.Mesh(row_devices(len(rows.seeds)), "row")
    row, shared = PartitionSpec("row"), PartitionSpec()
    specs = per_row(type(state), row, shared)
    shared_data, own_data = algo.data(rows.seeds)
    data_axes = [None] * len(shared_data) + [0] * len(own_data)
    data_specs = [shared] * len(shared_data) + [row] * len(own_data)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    data = tuple(map(place, (*shared_data, *own_data), data_specs))

    def algo_of(hparams):
        swept = common.with_hparams(config, hparams, algorithm.TRACEABLE)
        return algorithm.build(swept, env) if hparams else algo

    def init(key, hparams):
        return jax.tree.map(strong, algo_of(hparams).init(key))

    def train(state, hparams, num_updates, *data):
        algo = algo_of(hparams)

        def step(_, carry):
            state, sums = carry
            state, metrics = algo.update(state, *data)
            return state, {k: reduction(k)(sums[k], metrics[k]) for k in sums}

        shapes = jax.eval_shape(algo.update, state, *data)[1]
        check_metrics(shapes)
        sums = {k: jnp.float32(-np.inf if reduction(k) is max_of else 0) for k in shapes}
        return jax.lax.fori_loop(0, num_updates, step, (state, sums))

    acts = {"": algo.act, **algo.further}

    def begin(keys):
        return dict.fromkeys(acts, evaluation.begin(eval_env, keys))

    def play(state, plays, num_steps):
        params = jax.vmap(algo.policy_of, (axes,))(state)
        advance = lambda name: evaluation.advance(
            acts[name], params, eval_env, plays[name], num_steps
        )
        return {name: advance(name) for name in acts}

    def shard(function, in_specs, out_specs, **options):
        # shard_map, not a plain jit: each device loops over its own rows and waits for no other.
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        named = lambda specs: jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        shardings = {"in_shardings": named(in_specs), "out_shardings": named(out_specs)}
        return jax.jit(mapped, **shardings, **options)

    return Program(
        init=shard(jax.vmap(init, out_axes=axes), (row, row), specs),
        train=shard(
            jax.vmap(train, (axes, 0, None, *data_axes), (axes, 0)),
            (specs, row, shared, *data_specs),
            (specs, row),
            donate_argnums=0,
        ),
        begin=shard(begin, (row,), row),
        play=shard(play, (specs, row, shared), row, donate_argnums=1),
        policies=shard(jax.vmap(algo.policy_of, (axes,)), (specs,), row),
        data=data,
        num_shared=len(shared_data),
        stateful=env.stateful,
        interface=policies.interface_of(env),
    )


def check_metrics(metrics: dict[str, Any]) -> None:
    """ValueError unless the metrics of an update are scalars and say whether the run is finite."""
    for name, x in metrics.items():
        if x.shape:
            raise ValueError(f"update's metric {name!r} has shape {[*x.shape]}: make it a scalar")
    if "health/finite" not in metrics:
        raise ValueError("update has no metric 'health/finite': add those of common.run_metrics")


def strong(x: jax.Array) -> jax.Array:
    """`x` without a weak type, so that an update returns the types it was given."""
    return x if rundir.is_key(x) else jax.lax.convert_element_type(x, x.dtype)


def per_row(state_type: Any, row: Any, shared: Any) -> Any:
    """A train state with `row` in every field but the counter `update`, which all rows share."""
    return state_type(*[row] * len(state_type._fields))._replace(update=shared)


def reduction(name: str) -> Callable:
    """How a metric is reduced over updates: the largest of `.../max`, sums of all others."""
    return max_of if name.endswith("/max") else operator.add


def max_of(a, b):
    """Elementwise maximum of jax or numpy arrays."""
    return (jnp if isinstance(a, jax.Array) else np).maximum(a, b)


# --- compilation ---


def trace(program: Program, rows: Rows) -> Program:
    """All functions traced for these rows."""
    keys, hparams = inputs(rows)
    state = jax.eval_shape(program.init, keys, hparams)
    return program._replace(
        init=program.init.trace(keys, hparams),
        train=program.train.trace(state, hparams, jnp.int32(1), *program.data),
        begin=program.begin.trace(keys),
        play=program.play.trace(state, jax.eval_shape(program.begin, keys), jnp.int32(1)),
    )


def compile_ahead(traced: Program) -> Program:
    """All functions compiled, two at a time."""
    names = "train", "play", "init", "begin"  # the slow ones first
    lowered = {name: getattr(traced, name).lower() for name in names}
    compile_one = lambda name: lowered[name].compile(compiler_options=compiler_options(name))
    pool = concurrent.futures.ThreadPoolExecutor(2)
    try:
        return traced._replace(**dict(zip(names, pool.map(compile_one, names), strict=True)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # ctrl-C does not wait for compilations


def compiler_options(name: str) -> dict[str, Any]:
    """Settings of XLA for a function of the program.

    On a CPU, LLVM's first level of optimisation compiles PPO twice as fast as its last one, and the
    code is as fast; what runs once needs none.
    """
    flag = "xla_backend_optimization_level"
    if jax.default_backend() != "cpu" or flag in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {flag: 0 if name in ("init", "begin") else 1}


# --- memory ---


def memory(compiled: Program) -> int:
    """Bytes that training needs on each device."""
    sizes = compiled.train.memory_analysis()
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes


def check_memory(compiled: Program, num_devices: int) -> None:
    """MemoryError if training needs more than a CPU's machine has: the kernel would kill it.

    A GPU refuses by itself.
    """
    needed = memory(compiled) * num_devices
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if jax.default_backend() == "cpu" and needed > has:
        raise MemoryError(
            f"Out of memory: training needs {needed / 2**30:,.0f} GiB, the machine has "
            f"{has / 2**30:,.0f} GiB"
        )


def memory_text(compiled: Program, state: Any) -> str:
    """How much memory training needs on each device, and what takes most of it."""
    text = f"memory: {memory(compiled) / 2**20:,.0f} MiB on each device"
    replay = row_bytes(getattr(state, "replay", None))
    if replay:
        text += f", {replay / 2**20:,.1f} MiB of replay for each row"
    if compiled.data:
        dataset = sum(x.nbytes for x in jax.tree.leaves(compiled.data[: compiled.num_shared]))
        own = row_bytes((compiled.data[compiled.num_shared :], state))
        text += f", {dataset / 2**20:,.1f} MiB of dataset, {own / 2**20:,.1f} MiB for each row"
    return text


def row_bytes(tree: Any) -> int:
    """Bytes of one row of a tree of arrays [R, ...]."""
    return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in jax.tree.leaves(tree))

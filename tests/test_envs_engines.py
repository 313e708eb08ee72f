"""MuJoCo's C engine in compiled programs: batches, devices, resume, instability, refusals."""

import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
from envs import arm, engines, gym, wrappers

pytestmark = pytest.mark.xdist_group("gym")

SEEDS, NUM_ENVS = 3, 5


@pytest.fixture(scope="module")
def raw():
    return envs._load("gym/Ant-v5")  # its rule reads contact forces, and remembers a place


@pytest.fixture(scope="module")
def start(raw):
    """States [SEEDS, NUM_ENVS, ...] and actions [10, SEEDS, NUM_ENVS, 8]."""
    keys = jax.random.split(jax.random.key(0), (SEEDS, NUM_ENVS))
    state = jax.jit(jax.vmap(jax.vmap(raw.reset)))(keys)[1]
    shape = (10, SEEDS, NUM_ENVS, raw.action_size)
    return state, jax.random.uniform(jax.random.key(1), shape, minval=-1.0)


@pytest.fixture(scope="module")
def play(raw):
    """State and actions [T, seeds, environments, 8] -> last state, results [T, ...]."""

    def step(state, action):
        each = jax.vmap(jax.vmap(raw.step, (None, 0, 0)), (None, 0, 0))
        obs, state, *results = each(None, state, action)
        return state, (obs, *results)

    return jax.jit(lambda state, actions: jax.lax.scan(step, state, actions))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_seeds_and_environments_are_independent_simulations(raw, start, play):
    state, actions = start
    _, (obs, reward, terminated, _) = play(state, actions)
    step = jax.jit(raw.step)
    for i, j in ((0, 0), (1, 3), (2, 4)):
        alone = state[i, j]
        for t in range(len(actions)):
            seen, alone, paid, ended, _ = step(None, alone, actions[t, i, j])
            assert_same((seen, paid, ended), (obs[t, i, j], reward[t, i, j], terminated[t, i, j]))


def test_an_argument_without_the_axis_is_shared(raw, start):
    state, action = start[0][0, 0], start[1][0, 0]  # one state, NUM_ENVS actions
    one_state = jax.jit(jax.vmap(raw.step, (None, None, 0)))(None, state, action)
    states = jnp.broadcast_to(state, (NUM_ENVS, *state.shape))
    assert_same(one_state, jax.jit(jax.vmap(raw.step, (None, 0, 0)))(None, states, action))


def test_the_state_is_all_there_is(start, play):
    """A run that is stopped, saved as numbers and gone on with is the run that was not stopped."""
    state, actions = start
    last, whole = play(state, actions)
    middle, first = play(state, actions[:5])
    saved = np.array(middle)
    play(jnp.roll(state, 1, 0), actions)  # the simulators do something else meanwhile
    end, second = play(jnp.asarray(saved), actions[5:])
    assert_same(end, last)
    assert_same(jax.tree.map(lambda *x: np.concatenate(x), first, second), whole)


def test_state_is_one_row_without_a_key(raw):
    _, state = jax.eval_shape(raw.reset, jax.random.key(0))
    assert state.shape == (2 * (150 + 1),)  # mjSTATE_INTEGRATION and the rule's memory
    assert state.dtype == jnp.uint32


def test_threads_call_at_the_same_time(start, play):
    """Each call has simulations of its own."""
    state, actions = start
    inputs = [(jnp.roll(state, k, 0), jnp.roll(actions, k, 1)) for k in range(3)]
    expected = [play(*each) for each in inputs]
    results = {}

    def work(k):
        results[k] = [jax.block_until_ready(play(*inputs[k])) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        for result in results[k]:
            assert_same(result, expected[k])


PROGRAM = """
import hashlib, sys
import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
import envs

jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
env = envs.make("HalfCheetah-v5", 256, max_steps=7)

def play(key):
    def step(state, key):
        obs, state, *results = env.step(key, state, jax.random.uniform(key, (256, 6)))
        return state, (obs, *results)
    keys = jax.random.split(key, 11)
    return jax.lax.scan(step, env.reset(keys[0])[1], keys[1:])

mesh, row = Mesh(jax.local_devices(), "row"), PartitionSpec("row")
play = jax.shard_map(jax.vmap(play), mesh=mesh, in_specs=row, out_specs=row, check_vma=False)
play = jax.jit(play)
for _ in range(3):
    leaves = jax.tree.leaves(play(jax.random.split(jax.random.key(0), 8)))
    print(hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest())
"""


def test_devices_step_at_the_same_time():
    """On 1 and 8 devices the same bits, and no deadlock."""
    digests = set()
    for num_devices in (1, 8):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(num_devices)],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        digests.update(run.stdout.split())
    assert len(digests) == 1


def test_devices_divide_the_cores_that_the_process_may_use(monkeypatch):
    batch, threads = engines.Batch, []
    monkeypatch.setattr(engines, "cores", lambda: 6)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.setattr(
        engines, "Batch", lambda *args, **named: threads.append(args[2]) or batch(*args, **named)
    )
    envs._load("gym/Hopper-v5")
    assert set(threads) == {3}


PENDING = """
import jax
import envs

key = jax.random.key(0)
env = envs.make("HalfCheetah-v5", 64)
play = jax.jit(lambda key: jax.lax.fori_loop(0, 1000, lambda i, _: env.reset(key)[0].sum(), 0.0))
play.lower(key).compile()(key)
"""


TRAINED = """
from algos import launch
sizes = "--num-envs 2 --num-steps 4 --num-minibatches 1 --total-timesteps 8 --num-evals 1"
launch.main("ppo", ["--env", "probe/value", *sizes.split(), "--verbose", "0", "--run-dir", "{}"])
"""


@pytest.mark.parametrize("first", ["", TRAINED], ids=["alone", "after a launch"])
def test_a_script_may_end_without_reading_its_results(first, tmp_path):
    """Python cannot end while a program calls MuJoCo through it."""
    script, root = first.format(tmp_path / "run") + PENDING, Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=120, check=False)
    assert run.returncode == 0


# --- instability ---


def test_an_unstable_simulation_is_reported_and_no_other(tmp_path, monkeypatch, capfd):
    """MuJoCo itself puts it back to its default pose, which looks healthy, and writes a file."""
    monkeypatch.chdir(tmp_path)
    raw = envs._load("gym/HalfCheetah-v5")
    env = wrappers.wrap(raw, "gym/HalfCheetah-v5", 3, stagger=False)
    _, state = jax.jit(env.reset)(jax.random.key(0))
    action = jnp.zeros((3, 6)).at[1].set(jnp.nan)
    obs, _, reward, terminated, truncated, info = jax.jit(env.step)(
        jax.random.key(1), state, action
    )
    assert info["env_nan"].tolist() == terminated.tolist() == [False, True, False]
    assert reward[1] == 0
    assert not truncated.any()
    assert np.isfinite(obs).all()
    assert not [*tmp_path.iterdir()]
    assert "WARNING" not in capfd.readouterr().err


def test_a_velocity_out_of_all_bounds_is_unstable(raw, start):
    state = np.array(start[0][0])
    rows = state.view(np.float64)
    rows[2, 1 + 15] = 1e11  # time, 15 positions, first velocity
    rows[3, 1 + 15] = np.nan
    step = jax.jit(jax.vmap(raw.step, (None, 0, 0)))
    for _ in range(2):  # MuJoCo's own count of such events is 1 after both
        *_, info = step(None, state, jnp.zeros((NUM_ENVS, 8)))
        assert info["env_nan"].tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("bad", [1e11, -1e11, np.inf, np.nan])
def test_what_mujoco_would_call_unstable_is_unstable_on_mjx(bad):
    assert engines.bounded((jnp.zeros(2), jnp.array([1e9, -1e9])))
    assert not engines.bounded((jnp.zeros(2), jnp.array([0.0, bad])))
    raw = envs._load("gym/InvertedPendulum-v5?engine=mjx")
    _, (packed, memory) = raw.reset(jax.random.key(0))
    step = jax.jit(lambda state: raw.step(None, state, jnp.zeros(1))[-1]["env_nan"])
    assert not step((packed, memory))
    assert step((packed | {"qpos": jnp.array([bad, 0.0])}, memory))


@pytest.mark.parametrize(
    "task", ["brax/hopper", "playground/CartpoleBalance", "arm/reacher-static"]
)
def test_every_source_reports_what_the_engine_finds(task):
    """MuJoCo replaces the broken state, so that nothing else shows it."""
    if task.startswith("playground"):
        pytest.importorskip("mujoco_playground")
    raw = envs._load(task)
    state = jax.jit(jax.vmap(raw.reset))(jax.random.split(jax.random.key(0), 2))[1]
    action = jnp.zeros((2, raw.action_size)).at[1].set(jnp.nan)
    *_, info = jax.jit(jax.vmap(raw.step, (None, 0, 0)))(jax.random.key(1), state, action)
    assert info["env_nan"].tolist() == [False, True]


# --- numpy functions ---


def test_an_exception_in_a_host_function_reaches_the_caller():
    def root(x):
        if (x < 0).any():
            raise ValueError("no root of a negative number")
        return {"root": np.sqrt(x), "large": x[:, 0] > 1}

    function = jax.jit(
        jax.vmap(engines.host_function("test/root", root, jax.ShapeDtypeStruct((2,), jnp.float32)))
    )
    with pytest.raises(Exception, match="test/root: ValueError: no root of a negative number"):
        jax.block_until_ready(function(jnp.array([[1.0, -1.0]])))
    result = function(jnp.array([[1.0, 4.0], [9.0, 0.0]]))
    assert result["root"].tolist() == [[1, 2], [3, 0]]
    assert result["large"].tolist() == [False, True]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_a_host_function_gets_the_dtype_that_it_asks_for(dtype):
    """Arguments of a user may have any."""
    double = engines.host_function(
        "test/double", lambda x: 2 * x, jax.ShapeDtypeStruct((2,), jnp.float32)
    )
    result = jax.jit(double)(jnp.array([1, -3], dtype))
    assert result.dtype == jnp.float32
    assert result.tolist() == [2, -6]


def test_simulations_are_made_once(monkeypatch):
    made = []

    class Simulations(engines._Simulations):
        def __init__(self, physics, n, threads):
            super().__init__(physics, n, threads)
            made.append(n)

    monkeypatch.setattr(engines, "_Simulations", Simulations)
    raw = gym.make("Hopper-v5")
    _, state = jax.jit(jax.vmap(raw.reset))(jax.random.split(jax.random.key(0), 4))
    step = jax.jit(jax.vmap(raw.step, (None, 0, 0)))
    for _ in range(3):
        jax.block_until_ready(step(None, state, jnp.zeros((4, 3))))
    assert made == [1, 4]  # one to see what the rule returns


# --- choice of an engine ---


def test_c_needs_a_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="gym/Hopper-v5: engine=c needs a CPU, and this is a gpu"):
        envs.make("Hopper-v5?engine=c&frame_skip=1", 1)


def test_an_accelerator_gets_mjx(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(engines, "_mjx", lambda physics, implementation: implementation)
    assert engines.make(None, None) == engines.make("mjx", None) == "jax"


def test_a_model_that_mjx_cannot_run():
    model = mujoco.MjModel.from_xml_string("<mujoco><option integrator='implicit'/></mujoco>")
    physics = engines.Physics("test", model, 1, (), None, 0)
    with pytest.raises(ValueError, match=r"test: MJX cannot run .*IMPLICIT\): use engine=c"):
        engines.make("mjx", physics)


def test_warp_needs_a_gpu():
    with pytest.raises(ValueError, match="engine=warp needs an NVIDIA GPU, and this is a cpu"):
        envs.make("Hopper-v5?engine=warp", 1)
    with pytest.raises(ValueError, match="engine='MJX': choose c, mjx or warp"):
        arm.make("reacher-static", "MJX")


def test_warp_that_is_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install warp-lang"):
        envs.make("Hopper-v5?engine=warp", 1)


def test_warp_has_no_contact_forces(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(ValueError, match="Warp has no contact forces"):
        envs.make("Ant-v5?engine=warp", 1)

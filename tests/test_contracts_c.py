"""The promises of test_contracts.py on MuJoCo's C engine, at the size of a real launch.

PPO on 16 seeds of 512 Hoppers each, on 1, 2 and 8 devices of a CPU. The number of devices is fixed
when jax starts, so each number has a process of its own, for which this file is the program.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import test_contracts
from jax.sharding import PartitionSpec
from tiny import arrays, assert_close, assert_same, program_of, row

import envs
from algos import ppo
from algos.launch import rundir
from algos.launch.program import compile_ahead, setup_jax, trace
from algos.launch.rows import Rows
from envs import wrappers

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("contracts_c")]

SEEDS, NUM_ENVS, NUM_STEPS = 16, 512, 4
CONFIG = ppo.config_for(
    "gym/Hopper-v5", num_envs=NUM_ENVS, num_steps=NUM_STEPS, hidden=(16,), num_epochs=2,
    num_minibatches=4, total_timesteps=6 * NUM_ENVS * NUM_STEPS,
)  # fmt: skip
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}  # a device's matrix products depend on how many rows it has


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For the last states of all numbers of devices."""
    return tmp_path_factory.mktemp("contracts_c")


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_promises_hold_on_any_number_of_devices(folder, num_devices):
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    done = subprocess.run(
        [sys.executable, __file__, str(folder / str(num_devices))],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_number_of_devices_changes_nothing_but_rounding(folder):
    one, *others = (rundir.load_arrays(path)[0] for path in folder.glob("*/last.npz"))
    assert len(others) == 2
    for other in others:
        assert_close(other, one, **ROUNDING)


# --- in the process with these devices ---


def make_lab(seeds):
    """The launcher's program for these seeds, compiled as a launch compiles it."""
    program, keys, _ = program_of("ppo", CONFIG, seeds)
    rows = Rows(np.array(seeds), {}, [""] * len(seeds))
    compiled = compile_ahead(trace(program, rows))
    return test_contracts.Lab("ppo", ppo, CONFIG, compiled._replace(init=program.init), rows, keys)


def numbers(state):
    """The arrays of a state by name, simulations as the numbers that they are."""
    physics = lambda name, x: name.startswith(".env_state") and x.dtype == np.uint32
    return {k: x.view(np.float64) if physics(k, x) else x for k, x in arrays(state).items()}


def check_a_row_is_the_run_of_its_seed_alone(trained):
    alone = make_lab([5])
    for mine, all_rows in zip(alone.train(alone.start(), 6), trained, strict=True):
        assert_close(row(numbers(mine), 0), row(numbers(all_rows), 5), **ROUNDING)


def check_the_final_observation_is_the_true_one(state):
    """It is the raw environment's own, while the next observation is that of the next episode."""
    raw, env = envs._load(CONFIG.env), ppo.make_env(CONFIG)

    def step(env_state, key):
        key_action, key_step = jax.random.split(key)
        action = jax.random.uniform(key_action, (NUM_ENVS, raw.action_size), minval=-1.0)
        simulations = wrappers.raw_state(env_state)
        true, *_ = jax.vmap(raw.step, (None, 0, 0))(None, simulations, action)
        start, _ = env_state.inner.start
        obs, env_state, _, *ended, info = env.step(key_step, env_state, action)
        return env_state, (true, start, obs, info["final_observation"], *ended)

    def play(env_state, key):
        return jax.lax.scan(step, env_state, jax.random.split(key, 10))[1]

    mesh, rows = state.obs.sharding.mesh, PartitionSpec("row")
    play = jax.shard_map(jax.vmap(play), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    played = jax.jit(play)(state.env_state, jax.random.split(jax.random.key(1), SEEDS))
    true, start, obs, final, terminated, truncated = map(np.asarray, played)
    np.testing.assert_array_equal(final, true)
    for ended in (terminated, truncated):
        assert ended.any()
        assert (final[ended] != obs[ended]).any(-1).all()
    ended = terminated | truncated
    np.testing.assert_array_equal(obs, np.where(ended[..., None], start, true))


def check_an_unstable_simulation_is_reported_and_no_other(lab):
    whole, sums = map(arrays, lab.train(lab.start(), 1))
    state = lab.start()
    simulations = wrappers.raw_state(state.env_state)
    harmed = np.array(simulations).view(np.float64)
    velocity = 1 + 6  # after time and 6 positions
    harmed[5, 100, velocity], harmed[9, 3, velocity] = 1e11, np.nan
    harmed = jax.device_put(harmed.view(np.uint32), simulations.sharding)
    changed = jax.tree.map(lambda x: harmed if x is simulations else x, state)
    state, reported = map(arrays, lab.train(changed, 1))
    nan, finite = "['health/env_nan']", "['health/finite']"
    assert not sums[nan].any()
    assert (np.flatnonzero(reported[nan]).tolist(), reported[nan].sum()) == ([5, 9], 2)
    assert reported[finite].all()
    for i in set(range(SEEDS)) - {5, 9}:
        assert_same(row((state, reported), i), row((whole, sums), i))


def main(folder):
    """Check every promise on the devices of this process, and save the last state."""
    folder.mkdir()
    setup_jax(SEEDS)
    lab = make_lab(range(SEEDS))
    trained = lab.train(lab.start(), 6)
    test_contracts.test_chunk_length_changes_nothing(lab, trained)
    test_contracts.test_save_load_continue_is_continue(lab, trained, folder)
    check_a_row_is_the_run_of_its_seed_alone(trained)
    check_the_final_observation_is_the_true_one(trained[0])
    check_an_unstable_simulation_is_reported_and_no_other(lab)
    rundir.save_arrays(folder / "last.npz", numbers(trained[0]), {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
